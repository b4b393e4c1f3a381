"""Does GradAug help? A sweep of it beside plain training, as long and at equal compute, with a verdict."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradaug_hf.experiments.cost import relative_cost
from gradaug_hf.experiments.sweep import Plan
from gradaug_hf.reports.differences import by_column, differences_table, verdict
from gradaug_hf.trainer.config import GradAugConfig


@dataclass(frozen=True, kw_only=True)
class Comparison(Plan):
    """A plan whose results end with the differences between a row and others, and with a verdict.

    Args:
        row: name of the row, for example that of GradAug.
        others: name of a row that it is compared with -> what it is called in the verdict.
        images: number of the images that each run is evaluated on.
    """

    row: str
    others: Mapping[str, str]
    images: int

    def conclusion(self, records: Sequence[Mapping[str, Any]]) -> str:
        """Return a table of the differences, and a verdict for each column, of the runs that are finished."""
        finished = {record["row"] for record in records}
        others = {row: words for row, words in self.others.items() if row in finished}
        if self.row not in finished or not others:
            return ""
        verdicts = {c: verdict(own, self.row, others, self.images) for c, own in by_column(records).items()}
        sentences = [f"{c}: {sentence}" if c else sentence for c, sentence in verdicts.items() if sentence]
        return "\n\n".join([differences_table(records, self.row, list(others)), *sentences])


def make_comparison(
    recipe: Path | str,
    rows: Mapping[str, Mapping[str, Any]],
    *,
    plain: str,
    plain_settings: Mapping[str, Any],
    gradaug: str,
    config: GradAugConfig,
    side: int,
    **plan: Any,
) -> Comparison:
    """Return a comparison of rows with plain training of the same length and of as many multiply-adds as GradAug.

    Args:
        recipe: Script or module of a `Plan`.
        rows: name of a row -> its settings, beside those of plain training.
        plain: name of the row of plain training.
        plain_settings: its settings.
        gradaug: name of the row of GradAug, of which `config` has the settings.
        config: from which the cost of a step follows.
        side: of the images in pixels.
        plan: further arguments of `Comparison`.
    """
    length, word = ("max_steps", "steps") if config.max_steps > 0 else ("num_train_epochs", "epochs")
    more = max(1, round(relative_cost(config, side) * getattr(config, length)))
    longer = f"{plain}, {more} {word}"
    rows = {plain: plain_settings, longer: {**plain_settings, length: more}, **rows}
    others = {plain: "plain training", longer: "plain training of equal compute"}
    return Comparison(recipe=recipe, rows=rows, row=gradaug, others=others, **plan)
