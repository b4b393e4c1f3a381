from types import SimpleNamespace

import pytest

from gradaug_hf.utils.attributes import replaced


def test_attributes_have_other_values_for_a_while_also_where_an_error_ends_it():
    target = SimpleNamespace(first=1, second=2)
    with replaced(target, first=10, second=20):
        assert (target.first, target.second) == (10, 20)
    with pytest.raises(KeyError), replaced(target, first=10):
        raise KeyError
    assert (target.first, target.second) == (1, 2)


def test_a_name_that_is_none_of_the_attributes_is_refused():
    with pytest.raises(AttributeError), replaced(SimpleNamespace(), first=10):
        pass
