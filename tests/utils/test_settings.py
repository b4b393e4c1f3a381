import inspect
from dataclasses import dataclass, field, fields

import pytest

from gradaug_hf import GradAug, GradAugConfig, SubnetSampler
from gradaug_hf.objective.objective import ObjectiveSettings
from gradaug_hf.objective.sampling import SubnetSettings
from gradaug_hf.utils.settings import documented_by, spelled_by, taken_from


@dataclass
class Colour:
    red: float = field(default=0.5, metadata={"help": "Share of red, in [0, 1]."})
    blue: int | None = None


def test_a_signature_names_the_fields_in_place_of_the_settings():
    @spelled_by(Colour)
    def paint(wall: str, *, blue: str = "sky", **settings) -> None: ...

    assert str(inspect.signature(paint)) == "(wall: str, *, blue: str = 'sky', red: float = 0.5) -> None"


def test_a_docstring_has_the_help_of_the_fields_that_have_some():
    @documented_by(Colour)
    class Wall:
        """Stands.

        Args:
            {fields}
            height: in metres.
        """

    assert Wall.__doc__ == "Stands.\n\nArgs:\n    red: Share of red, in [0, 1].\n    height: in metres."


def test_values_are_taken_by_the_names_of_the_fields():
    @dataclass
    class Other:
        blue: int = 3
        red: float = 0.1
        green: float = 0.2

    assert taken_from(Colour, Other()) == {"red": 0.1, "blue": 3}


@pytest.mark.parametrize("public", [GradAug, SubnetSampler, GradAugConfig])
def test_every_setting_of_the_subnetworks_is_in_signature_and_docstring(public):
    own = fields(SubnetSettings if public is SubnetSampler else ObjectiveSettings)
    parameters = inspect.signature(public).parameters
    for f in own:
        assert parameters[f.name].default == f.default
        assert f"    {f.name}: {f.metadata['help'][:60]}" in inspect.getdoc(public)
    assert "{fields}" not in inspect.getdoc(public)
    assert not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def test_a_setting_that_is_unknown_is_refused(tmp_path):
    with pytest.raises(TypeError, match="num_subnet'"):
        GradAug(None, num_subnet=3)
