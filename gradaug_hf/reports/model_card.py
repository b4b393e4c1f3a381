"""The model card: `README.md` next to the weights, with what the run did and what it measured, and nothing else."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from datasets import Dataset, IterableDataset
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from jinja2 import Environment, StrictUndefined

from gradaug_hf.hub.configs import CONFIG, PREPROCESSOR, timm_network
from gradaug_hf.objective.sampling import SubnetSampler, drops_blocks, drops_channels
from gradaug_hf.reports.history import LOSS, Evaluation, at_step, shares, title
from gradaug_hf.reports.plots import CURVES, PLOTS, SUBNETS, WIDTHS
from gradaug_hf.utils.environment import device_name, launched_script, public_command, versions
from gradaug_hf.utils.tables import markdown_table

if TYPE_CHECKING:
    from gradaug_hf.trainer.trainer import GradAugTrainer

CARD = "README.md"
TEMPLATE = Path(__file__).with_suffix(".md")
# Words of the comment in the cards of this package and of transformers, which only its author removes.
GENERATED = "This model card has been generated automatically"
TASK, TASK_NAME = "image-classification", "Image Classification"
# Type of a metric on the Hub, where it has another name there.
METRIC_TYPES = {"top1": "accuracy", "top5": "top_5_accuracy"}
# Type of a data set that is not on the Hub.
NOT_ON_HUB = "local"
PICTURES = {
    CURVES: "Loss and accuracy over the epochs",
    WIDTHS: "Accuracy against width",
    SUBNETS: "A batch as the full network and its sub-networks saw it",
}


@dataclass(frozen=True)
class DataName:
    """A data set as a card names it.

    Args:
        name: shown.
        hub_id: on the Hub, where it comes from there.
        config: its configuration.
        split: its split.
    """

    name: str
    hub_id: str | None = None
    config: str | None = None
    split: str | None = None


def write_model_card(
    trainer: "GradAugTrainer",
    folder: Path,
    *,
    model_name: str | None = None,
    dataset: str | Sequence[str] | None = None,
    dataset_tags: str | Sequence[str] | None = None,
    dataset_args: str | Sequence[str] | None = None,
    finetuned_from: str | None = None,
    language: str | Sequence[str] | None = None,
    license: str | None = None,
    tags: str | Sequence[str] | None = None,
    tasks: str | Sequence[str] | None = None,
) -> None:
    """Write `README.md` into a folder that holds the network of a trainer; one whose comment was removed is left.

    Args:
        trainer: whose network, settings and measurements are described.
        folder: with the saved network.
        model_name: shown and listed; None: the name of the output folder.
        dataset: name of the data set; a local path gives its last part. None: as the data set says, if it does.
        dataset_tags: its id on the Hub.
        dataset_args: its configuration.
        finetuned_from: Hub id of the network that training began with; None: as its configuration says.
        language: as on the Hub.
        license: as on the Hub.
        tags: added to those of the libraries.
        tasks: instead of `image-classification`.
    """
    if not may_be_written(folder / CARD):
        return
    name = model_name or Path(trainer.args.output_dir).absolute().name
    data = _data_name(trainer, _first(dataset), _first(dataset_tags), _first(dataset_args))
    base = finetuned_from or getattr(getattr(trainer.model, "config", None), "_name_or_path", None) or None
    base = base and (Path(base).name if Path(base).exists() else base)
    step = _step_of_network(trainer)
    measured = at_step(trainer.evaluations, step)
    load = _loading(folder, trainer.hub_model_id)
    results = _eval_results(measured, data, trainer)
    metadata = ModelCardData(
        model_name=name,
        library_name=load["library"],
        pipeline_tag=_first(tasks) or TASK,
        tags=_tags(trainer, load, tags),
        datasets=[data.hub_id] if data and data.hub_id else None,
        base_model=base if base and _is_hub_id(base) else None,
        metrics=[result.metric_type for result in results] or None,
        eval_results=results or None,
        language=language,
        license=license,
    )
    trained = trainer.state.global_step > 0
    script = launched_script()
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    content = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        card_data=metadata.to_yaml().strip(),
        title=name,
        summary=_summary(trainer, data, base),
        results=_results_table(measured),
        results_of=_results_of(trainer, data, step),
        plots={alt: f"{PLOTS}/{file}" for file, alt in PICTURES.items() if (folder / PLOTS / file).exists()},
        load=load,
        architecture=_architecture(trainer.model),
        gradaug=_table(_gradaug_rows(trainer)) if _used_subnets(trainer) else None,
        training=_table(_training_rows(trainer, data)) if trained else None,
        command=public_command(script) if trained and script else None,
        versions=_table(versions().items()),
    )
    ModelCard(content).save(folder / CARD)


def may_be_written(card: Path) -> bool:
    """Whether there is no card, or one that was generated and has not been edited since."""
    return not card.exists() or GENERATED in card.read_text(encoding="utf-8")


# ---- what it is ----


def _architecture(model: torch.nn.Module) -> str:
    network = timm_network(model)
    return type(model).__name__ if network is None else network.pretrained_cfg["architecture"]


def _used_subnets(trainer: "GradAugTrainer") -> bool:
    return trainer.args.num_subnets > 0 and trainer.state.global_step > 0


def _tags(trainer: "GradAugTrainer", load: Mapping[str, Any], tags: str | Sequence[str] | None) -> list[str]:
    libraries = [library for library in ("timm", "transformers") if load[library]]
    method = ["gradaug"] if _used_subnets(trainer) else []
    return [TASK, *libraries, *method, *([tags] if isinstance(tags, str) else tags or [])]


def _summary(trainer: "GradAugTrainer", data: DataName | None, base: str | None) -> str:
    parameters = sum(p.numel() for p in trainer.model.parameters())
    what = f"An image classifier: `{_architecture(trainer.model)}` with {parameters:,} parameters"
    if trainer.state.global_step == 0:
        return f"{what}. It was saved without training."
    start = (
        f", fine-tuned from {f'[{base}](https://huggingface.co/{base})' if _is_hub_id(base) else base}" if base else ""
    )
    on = f" on {_linked(data)}" if data else ""
    how = "with [GradAug](https://arxiv.org/abs/2006.07989)" if _used_subnets(trainer) else "without sub-networks"
    return f"{what}{start}, trained{on} {how}."


def _loading(folder: Path, hub_id: str | None) -> dict[str, Any]:
    """What the code that loads a folder depends on, as its `config.json` has it."""
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
        "register": _package_of(config["architecture"]) if by_timm else None,
    }


def _package_of(architecture: str) -> str | None:
    """Package whose import registers an architecture in timm; None for timm itself and for a script."""
    package = timm.model_entrypoint(architecture).__module__.partition(".")[0]
    return None if package in ("timm", "__main__") else package


# ---- data ----


def _data_name(trainer: "GradAugTrainer", name: str | None, hub_id: str | None, config: str | None) -> DataName | None:
    """The data set as the caller names it, or else as it says itself."""
    known = next(
        (d for d in (_evaluation_set(trainer), trainer.train_dataset) if isinstance(d, (Dataset, IterableDataset))),
        None,
    )
    hub_id = hub_id or (None if name else _hub_id_of(known))
    if name and not hub_id and "/" in name and not Path(name).exists() and _is_hub_id(name):
        hub_id = name
    if name and Path(name).exists():
        name = Path(name).absolute().name
    if not (name or hub_id):
        return None
    info = getattr(known, "info", None)
    config = config or (info.config_name if hub_id and info is not None else None)
    return DataName(name or hub_id, hub_id, config, _split_name(trainer))


def _evaluation_set(trainer: "GradAugTrainer") -> Any:
    return None if isinstance(trainer.eval_dataset, dict) else trainer.eval_dataset


def _hub_id_of(dataset: Dataset | IterableDataset | None) -> str | None:
    """The Hub id that a data set remembers from its download."""
    info = getattr(dataset, "info", None)
    for source in getattr(info, "download_checksums", None) or {}:
        if source.startswith("hf://datasets/"):
            return source.removeprefix("hf://datasets/").partition("@")[0]
    return None


def _split_name(trainer: "GradAugTrainer") -> str | None:
    """Split of the evaluation images; None where they were held out of the training images' own."""
    split = getattr(_evaluation_set(trainer), "split", None)
    return None if split is None or split == getattr(trainer.train_dataset, "split", None) else str(split)


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def _linked(data: DataName) -> str:
    return f"[{data.name}](https://huggingface.co/datasets/{data.hub_id})" if data.hub_id else data.name


# ---- results ----


def _step_of_network(trainer: "GradAugTrainer") -> int:
    """Steps after which the network was as it is now."""
    state = trainer.state
    best_was_loaded = trainer.args.load_best_model_at_end and not trainer.is_in_train and state.best_model_checkpoint
    return state.best_global_step if best_was_loaded else state.global_step


def _eval_results(
    measured: Sequence[Evaluation], data: DataName | None, trainer: "GradAugTrainer"
) -> list[EvalResult]:
    """The full network's metrics as the Hub lists them; none where the data set has no name."""
    full = next((e for e in measured if e.width == 1 and e.data is None), None)
    if full is None or data is None:
        return []
    size = _size(_evaluation_set(trainer))
    return [
        EvalResult(
            task_type=TASK,
            task_name=TASK_NAME,
            dataset_type=data.hub_id or NOT_ON_HUB,
            dataset_name=data.name,
            dataset_config=data.config,
            dataset_split=data.split,
            dataset_args={"num_images": size} if size else None,
            metric_type=METRIC_TYPES.get(name, name),
            metric_name=title(name).capitalize(),
            metric_value=value,
        )
        for name, value in full.metrics.items()
        if name != LOSS
    ]


def _results_of(trainer: "GradAugTrainer", data: DataName | None, step: int) -> str:
    size = _size(_evaluation_set(trainer))
    images = f"{size:,} images" if size else "the evaluation images"
    split = f", split {data.split}" if data and data.split else ""
    of = f" of {data.name}{split}" if data else ""
    when = f", after {step:,} steps of training" if step else ""
    narrower = " At widths below 1 batch norm was recalibrated on training images." if trainer.args.eval_widths else ""
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


# ---- settings ----


def _gradaug_rows(trainer: "GradAugTrainer") -> Iterable[tuple[str, str]]:
    """What the sub-networks were and learned."""
    sampler, args = trainer.subnet_sampler, trainer.args
    if type(sampler) is SubnetSampler:
        yield "sub-networks of a step", f"{sampler.num_subnets}"
        if sampler.subnet_interval > 1:
            yield "steps with sub-networks", f"one in {sampler.subnet_interval}"
        if drops_channels(sampler.subnet_mode):
            yield "width multipliers", _widths(sampler)
            yield "channels are multiples of", f"{args.width_divisor}"
        if drops_blocks(sampler.subnet_mode):
            yield "survival probability of the last residual block", f"{sampler.min_survival:g}"
        if sampler.resolutions:
            yield "resolutions", " ".join(map(str, sampler.resolutions))
    else:
        yield "sub-networks", f"drawn by a {type(sampler).__name__}"
    if trainer.subnet_transform is not None:
        yield "further transform of their images", type(trainer.subnet_transform).__name__
    yield "they learned", {"soft": "the full network's predictions", "label": "the labels"}[args.subnet_target]
    yield "weight of their losses", f"{args.kl_weight:g}"
    yield "backward", args.subnet_backward


def _widths(sampler: SubnetSampler) -> str:
    if sampler.num_subnets == 1:
        return f"{sampler.min_width:g}"
    levels = "" if sampler.width_levels is None else f" from {sampler.width_levels} levels"
    others = f"{sampler.num_subnets - 1} drawn{levels} in [{sampler.min_width:g}, {sampler.max_width:g}]"
    return f"{sampler.min_width:g}, and {others}"


def _training_rows(trainer: "GradAugTrainer", data: DataName | None) -> Iterable[tuple[str, str]]:
    args, state = trainer.args, trainer.state
    if size := _size(trainer.train_dataset):
        yield "images", f"{size:,}{f' of {data.name}' if data else ''}"
    yield "steps", f"{state.global_step:,}"
    if state.epoch is not None:
        yield "epochs", f"{state.epoch:.4g}"
    yield "images in a step", f"{args.train_batch_size * args.world_size * args.gradient_accumulation_steps}"
    if trainer.optimizer is not None:
        yield "optimiser", _optimiser(trainer.optimizer)
    yield "learning rate schedule", args.lr_scheduler_type.value
    for name in ("label_smoothing_factor", "mixup_alpha", "cutmix_alpha", "max_grad_norm"):
        if getattr(args, name):
            yield name.replace("_", " "), f"{getattr(args, name):g}"
    if args.bf16 or args.fp16:
        yield "mixed precision", "bf16" if args.bf16 else "fp16"
    yield "seed", f"{args.seed}"
    seconds = [entry["train_runtime"] for entry in state.log_history if "train_runtime" in entry]
    if seconds:
        yield "time since it was started or last resumed, evaluation included", f"{seconds[-1]:.1f} s"
    processes = f"{args.world_size} processes, each on " if args.world_size > 1 else ""
    threads = f", {torch.get_num_threads()} threads" if args.device.type == "cpu" else ""
    yield "hardware", f"{processes}{device_name(args.device)}{threads}"


def _optimiser(optimizer: Any) -> str:
    kind = type(getattr(optimizer, "optimizer", optimizer)).__name__
    groups = optimizer.param_groups
    rate = groups[0].get("initial_lr", groups[0]["lr"])
    settings = {"highest learning rate": rate, "weight decay": max(group.get("weight_decay", 0) for group in groups)}
    settings |= {name: groups[0][name] for name in ("momentum", "nesterov", "betas") if groups[0].get(name)}
    return ", ".join([kind, *(f"{name} {value}" for name, value in settings.items())])


def _size(dataset: Any) -> int | None:
    return len(dataset) if hasattr(dataset, "__len__") else None


def _table(rows: Iterable[tuple[str, str]]) -> str:
    return markdown_table(("", ""), list(rows), text_columns=2)


def _first(values: str | Sequence[str] | None) -> str | None:
    return values if values is None or isinstance(values, str) else next(iter(values), None)
