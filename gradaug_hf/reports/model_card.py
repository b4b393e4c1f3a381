"""The model card: `README.md` next to the weights, which tells what the run did and measured, and nothing else."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from jinja2 import Environment, StrictUndefined

from gradaug_hf.hub.configs import CONFIG, PREPROCESSOR
from gradaug_hf.reports.history import LOSS, Evaluation, shares, title
from gradaug_hf.reports.photos import CONFUSION, EXAMPLES, MISTAKES
from gradaug_hf.reports.plots import CURVES, PLOTS, SUBNETS, WIDTHS
from gradaug_hf.utils.environment import versions
from gradaug_hf.utils.tables import markdown_table

CARD = "README.md"
TEMPLATE = Path(__file__).with_suffix(".md")
# Words of the comment in the cards of this package and of transformers, which only its author removes.
GENERATED = "This model card has been generated automatically"
TASK, TASK_NAME = "image-classification", "Image Classification"
# Type of a metric on the Hub, where it has another name there.
METRIC_TYPES = {"top1": "accuracy", "top5": "top_5_accuracy", "map": "mean_average_precision"}
# Type of a dataset that is not on the Hub.
NOT_ON_HUB = "local"
CAPTIONS = {
    CURVES: "Loss and accuracy over the epochs",
    WIDTHS: "Accuracy against width",
    CONFUSION: "Images of each class and what they were predicted as",
    MISTAKES: "The most wrong predictions",
    EXAMPLES: "Training images as the model saw them",
    SUBNETS: "A batch as the full network and its sub-networks saw it",
}


@dataclass(frozen=True)
class DataName:
    """A dataset as a card names it, as far as that is known.

    Args:
        name: shown.
        hub_id: on the Hub, where it comes from there.
        config: its configuration.
        split: the split that was evaluated.
    """

    name: str | None = None
    hub_id: str | None = None
    config: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class CardMetadata:
    """The statements of an author on a model, as in `Trainer.create_model_card`.

    Args:
        model_name: shown and listed; None: the name of the output folder.
        dataset: name of the dataset; a local path gives its last part. None: as the dataset says, if it does.
        dataset_tags: its id on the Hub.
        dataset_args: its configuration.
        finetuned_from: Hub id of the model that training began with; None: as its configuration says.
        language: as on the Hub.
        license: as on the Hub.
        tags: added to those of the libraries.
        tasks: instead of `image-classification`.
    """

    model_name: str | None = None
    dataset: str | Sequence[str] | None = None
    dataset_tags: str | Sequence[str] | None = None
    dataset_args: str | Sequence[str] | None = None
    finetuned_from: str | None = None
    language: str | Sequence[str] | None = None
    license: str | None = None
    tags: str | Sequence[str] | None = None
    tasks: str | Sequence[str] | None = None


@dataclass(frozen=True)
class ModelFacts:
    """The known facts of a model, its training and its evaluation.

    Args:
        name: of the model, where its author gives none.
        architecture: its name in timm, or its class.
        num_parameters: of the full network.
        hub_id: the repository that it is loaded from; None: the folder's name.
        base: Hub id or folder of the model that training began with.
        data: the dataset as it says itself.
        train_images: their number.
        eval_images: their number.
        classes: results of each class as a Markdown table; None leaves it out.
        measured: evaluations of the model as it is, on one set after the other, from the full width to the narrowest.
        steps: of the training; 0: it was not trained.
        subnets: settings of the sub-networks by name; none: it was trained without.
        training: further settings of the training, by name.
        command: that started the training.
    """

    name: str
    architecture: str
    num_parameters: int
    hub_id: str | None = None
    base: str | None = None
    data: DataName = DataName()
    train_images: int | None = None
    eval_images: int | None = None
    classes: str | None = None
    measured: Sequence[Evaluation] = ()
    steps: int = 0
    subnets: Mapping[str, str] = field(default_factory=dict)
    training: Mapping[str, str] = field(default_factory=dict)
    command: str | None = None


def as_metadata(metadata: Mapping[str, Any]) -> CardMetadata:
    """Return the statements of an author as `CardMetadata`; raise a ValueError for a name that is none of its."""
    accepted = [f.name for f in fields(CardMetadata)]
    if unknown := [name for name in metadata if name not in accepted]:
        raise ValueError(f"card_metadata holds {unknown[0]!r}; accepted are {', '.join(accepted)}")
    return CardMetadata(**metadata)


def write_model_card(folder: Path, facts: ModelFacts, metadata: CardMetadata) -> None:
    """Write `README.md` into the folder of a saved model, unless there is one whose comment was removed."""
    if not may_be_written(folder / CARD):
        return
    name = metadata.model_name or facts.name
    data = _named(facts.data, metadata)
    base = metadata.finetuned_from or facts.base
    base = base and (f"the local folder `{Path(base).absolute().name}`" if Path(base).exists() else base)
    load = _loading(folder, facts.hub_id)
    results = _eval_results(facts, data)
    listed = ModelCardData(
        model_name=name,
        library_name=load["library"],
        pipeline_tag=_first(metadata.tasks) or TASK,
        tags=_tags(facts, load, metadata.tags),
        datasets=[data.hub_id] if data and data.hub_id else None,
        base_model=base if base and _is_hub_id(base) else None,
        metrics=[result.metric_type for result in results] or None,
        eval_results=results or None,
        language=metadata.language,
        license=metadata.license,
    )
    images = f"{facts.train_images:,}{f' of {data.name}' if data else ''}" if facts.train_images else None
    training = {**({"images": images} if images else {}), **facts.training}
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    content = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        card_data=listed.to_yaml().strip(),
        title=name,
        summary=_summary(facts, data, base),
        results=_results_table(facts.measured),
        results_of=_results_of(facts, data),
        classes=facts.classes,
        plots={caption: f"{PLOTS}/{file}" for file, caption in CAPTIONS.items() if (folder / PLOTS / file).exists()},
        load=load,
        architecture=facts.architecture,
        gradaug=_table(facts.subnets) if facts.subnets else None,
        training=_table(training) if facts.steps else None,
        command=facts.command,
        versions=_table(versions()),
    )
    ModelCard(content).save(folder / CARD)


def may_be_written(card: Path) -> bool:
    """Return True if there is no card, or one that was generated and has not been edited since."""
    return not card.exists() or GENERATED in card.read_text(encoding="utf-8")


# ---- the model ----


def _tags(facts: ModelFacts, load: Mapping[str, Any], tags: str | Sequence[str] | None) -> list[str]:
    libraries = [library for library in ("timm", "transformers") if load[library]]
    method = ["gradaug"] if facts.subnets else []
    return [TASK, *libraries, *method, *([tags] if isinstance(tags, str) else tags or [])]


def _summary(facts: ModelFacts, data: DataName | None, base: str | None) -> str:
    classifier = f"An image classifier: `{facts.architecture}` with {facts.num_parameters:,} parameters"
    if facts.steps == 0:
        return f"{classifier}. It was saved without training."
    start = (
        f", fine-tuned from {f'[{base}](https://huggingface.co/{base})' if _is_hub_id(base) else base}" if base else ""
    )
    on = f" on {_linked(data)}" if data else ""
    how = "with [GradAug](https://arxiv.org/abs/2006.07989)" if facts.subnets else "without sub-networks"
    return f"{classifier}{start}, trained{on} {how}."


def _loading(folder: Path, hub_id: str | None) -> dict[str, Any]:
    """Return what the code that loads a folder depends on, as its `config.json` has it."""
    source = hub_id or folder.absolute().name
    file = folder / CONFIG
    config = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    by_timm = config.get("model_type") == "timm_wrapper"
    shape = [3, 224, 224]
    if by_timm:
        shape = config["pretrained_cfg"]["input_size"]
    elif config:
        side = config.get("image_size") or 224
        shape = [config.get("num_channels", 3), *(side if isinstance(side, list) else [side, side])]
    return {
        "source": source,
        "library": "timm" if by_timm else "transformers" if config else None,
        "timm": f"{'hf-hub' if hub_id else 'local-dir'}:{source}" if by_timm else None,
        "transformers": bool(config),
        "processor": (folder / PREPROCESSOR).exists(),
        "rgb": shape[0] == 3,
        "shape": ", ".join(map(str, [1, *shape])),
        "register": _registration(config["architecture"]) if by_timm else "",
    }


def _registration(architecture: str) -> str:
    """Return the line that imports the package which registers an architecture; none for timm's own and a script's."""
    package = timm.model_entrypoint(architecture).__module__.partition(".")[0]
    if package in ("timm", "__main__"):
        return ""
    return f"import {package}  # noqa: F401 (registers the architecture in timm)\n"


# ---- data ----


def _named(known: DataName, metadata: CardMetadata) -> DataName | None:
    """Return the dataset as the author names it, or else as it says itself; None if neither does."""
    name, hub_id, config = (
        _first(value) for value in (metadata.dataset, metadata.dataset_tags, metadata.dataset_args)
    )
    hub_id = hub_id or (None if name else known.hub_id)
    if name and Path(name).exists():
        name = Path(name).absolute().name
    elif name and not hub_id and "/" in name and _is_hub_id(name):
        hub_id = name
    if not (name or hub_id):
        return None
    return replace(known, name=name or hub_id, hub_id=hub_id, config=config or (known.config if hub_id else None))


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def _linked(data: DataName) -> str:
    return f"[{data.name}](https://huggingface.co/datasets/{data.hub_id})" if data.hub_id else data.name


# ---- results ----


def _eval_results(facts: ModelFacts, data: DataName | None) -> list[EvalResult]:
    """Return the full network's metrics as the Hub lists them; none where the dataset has no name."""
    full = next((e for e in facts.measured if e.width == 1 and e.data is None), None)
    if full is None or data is None:
        return []
    return [
        EvalResult(
            task_type=TASK,
            task_name=TASK_NAME,
            dataset_type=data.hub_id or NOT_ON_HUB,
            dataset_name=data.name,
            dataset_config=data.config,
            dataset_split=data.split,
            dataset_args={"num_images": facts.eval_images} if facts.eval_images else None,
            metric_type=METRIC_TYPES.get(name, name),
            metric_name=title(name).capitalize(),
            metric_value=value,
        )
        for name, value in full.metrics.items()
        if name != LOSS
    ]


def _results_of(facts: ModelFacts, data: DataName | None) -> str:
    images = f"{facts.eval_images:,} images" if facts.eval_images else "the evaluation images"
    split = f", split {data.split}" if data and data.split else ""
    of = f" of {data.name}{split}" if data else ""
    step = facts.measured[0].step if facts.measured else 0
    when = f", after {step:,} steps of training" if step else ""
    has_widths = any(e.width != 1 for e in facts.measured)
    narrower = " At widths below 1 batch norm was recalibrated on training images." if has_widths else ""
    return f"Measured on {images}{of}{when}.{narrower}"


def _results_table(measured: Sequence[Evaluation]) -> str | None:
    if not measured:
        return None
    names = list(dict.fromkeys(name for e in measured for name in e.metrics))
    as_shares = {name for name in names if all(name in shares(e.metrics) for e in measured if name in e.metrics)}
    header = ["width", *(f"{title(name)} %" if name in as_shares else title(name) for name in names)]
    rows = [[f"{e.width:g}", *(_number(e.metrics.get(name), name in as_shares) for name in names)] for e in measured]
    if any(e.data for e in measured):
        header = ["data", *header]
        rows = [[e.data or "", *row] for e, row in zip(measured, rows, strict=True)]
    return markdown_table(header, rows)


def _number(value: float | None, is_share: bool) -> str:
    if value is None:
        return ""
    return f"{100 * value:.2f}" if is_share else f"{value:.4g}"


def _table(rows: Mapping[str, str]) -> str:
    return markdown_table(("", ""), list(rows.items()), text_columns=2)


def _first(values: str | Sequence[str] | None) -> str | None:
    return values if values is None or isinstance(values, str) else next(iter(values), None)
