"""The trainer of fine-tuning: layer-wise learning rates, a frozen backbone, class weights, averaged weights."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from safetensors.torch import load_file, save_file
from timm.optim import param_groups_layer_decay
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PredictionOutput, TrainOutput

from gradaug_hf.experiments.backbone import batch_norms
from gradaug_hf.experiments.lora import adapted_state, has_adapters, merge_adapters, merged
from gradaug_hf.experiments.recipe_trainer import RecipeTrainer
from gradaug_hf.hub.configs import plain_state, timm_network
from gradaug_hf.hub.networks import head_parameters
from gradaug_hf.objective.class_weights import weighted_cross_entropy
from gradaug_hf.slimming import make_slimmable
from gradaug_hf.trainer.batches import split_batch
from gradaug_hf.trainer.checkpoints import ResumeError
from gradaug_hf.trainer.config import GradAugConfig

# File of a checkpoint with the averaged weights.
AVERAGE = "ema.safetensors"
# File of a checkpoint with the weights that are trained where adapters are; those of the model are merged.
ADAPTERS = "adapters.safetensors"
# Names of parameters that weight decay leaves alone, beside norms and biases; a timm model adds its own.
NO_DECAY = ("*cls_token", "*pos_embed", "*position_embeddings")
# What `Trainer.get_optimizer_cls_and_kwargs` returns for optimisers that choose their parameters themselves.
OWN_PARAMETERS = ("params", "model", "optimizer_dict")


class FineTuningTrainer(RecipeTrainer):
    """Fine-tune a pretrained model as GradAugTrainer trains it, with what fine-tuning adds.

    Args:
        model: a pretrained model, made for the classes; adapters that it has are merged once it is trained.
        args: the settings.
        layer_decay: factor of the learning rate from each layer to the one before it, in (0, 1].
        ema_decay: decay of the averaged weights, which are evaluated and saved; None: there are none.
        class_weights: (classes,), of the full network's loss; None: all are 1.
        freeze_statistics: whether all batch norms normalise by their running statistics, which stay as they are; else
            those of which no parameter is trained do.
        kwargs: further keyword arguments of RecipeTrainer.

    Raises:
        ValueError: as GradAugTrainer; or averaged weights or adapters are asked for, and the model is divided among
            processes.
    """

    def __init__(
        self,
        model: nn.Module,
        args: GradAugConfig,
        *,
        layer_decay: float = 1.0,
        ema_decay: float | None = None,
        class_weights: Tensor | None = None,
        freeze_statistics: bool = False,
        **kwargs: Any,
    ) -> None:
        self.layer_decay = layer_decay
        self.class_weights = class_weights
        self.freeze_statistics = freeze_statistics
        self._has_adapters = has_adapters(model)
        super().__init__(model, args, **kwargs)
        self._average: ModelEmaV3 | None = None
        asked = "lora_rank is given" if self._has_adapters else f"ema_decay is {ema_decay}"
        if (self._has_adapters or ema_decay is not None) and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(f"{asked}, which neither FSDP nor DeepSpeed can do; leave it out")
        if ema_decay is not None:
            self._average = ModelEmaV3(self.model, ema_decay, use_warmup=True)
            self.add_callback(_Averaging(self._average))

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Return the optimiser of `args.optim` with a rate for each layer, unless it chooses its parameters itself."""
        if self.optimizer is None:
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
            if any(name in settings for name in OWN_PARAMETERS):
                raise ValueError(
                    f"optim is {self.args.optim.value!r}, which takes no groups of parameters; use 'adamw_torch', "
                    "for example"
                )
            groups = parameter_groups(self.model, self.args.weight_decay, self.layer_decay)
            rate = settings.pop("lr", self.args.learning_rate)
            self.optimizer = kind([{**group, "lr": rate * group["lr_scale"]} for group in groups], lr=rate, **settings)
        return self.optimizer

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> TrainOutput:
        """`GradAugTrainer.train`, which also resumes averaged weights and adapters, and merges the latter at the end.

        Raises:
            ResumeError: as `GradAugTrainer.train`; or the checkpoint has no averaged weights or adapters.
        """
        wanted = {"ema_decay": AVERAGE} if self._average is not None else {}
        wanted |= {"lora_rank": ADAPTERS} if self._has_adapters else {}
        for setting, name in wanted.items():
            if resume_from_checkpoint is not None and not (Path(resume_from_checkpoint) / name).is_file():
                raise ResumeError(f"{resume_from_checkpoint} has no {name}, which a training with {setting} goes on")
        if self._average is not None and resume_from_checkpoint is not None:
            self._average.module.load_state_dict(load_file(Path(resume_from_checkpoint) / AVERAGE))
        output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        if self._has_adapters:
            self._merge()
        return output

    # ---- adapters ----

    def _merge(self) -> None:
        """Merge the adapters of the model and of its average for good."""
        self._has_adapters = False
        merge_adapters(self.model)
        if self.args.num_subnets > 0:
            make_slimmable(self.model, width_divisor=self.args.width_divisor)
        if self._average is not None:
            merge_adapters(self._average.module)

    # A checkpoint is an ordinary one, and its weights those of the merged model.
    @contextmanager
    def _as_saved(self) -> Iterator[None]:
        with merged(self.model) if self._has_adapters else nullcontext():
            yield

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        with self._as_saved():
            super()._save(output_dir, None if self._has_adapters else state_dict)

    # The merged weights do not say what the adapters are.
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._has_adapters:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.model.load_state_dict(load_file(Path(resume_from_checkpoint) / ADAPTERS), strict=False)

    def full_loss(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        """Return the loss of the full network, in training with the weights of the classes, and its logits.

        Frozen batch norms are as in evaluation, also in the passes of sub-networks that follow.
        """
        if not model.training:
            return super().full_loss(model, inputs)
        for norm in batch_norms(model, only_frozen=not self.freeze_statistics):
            norm.eval()
        loss, logits = super().full_loss(model, inputs)
        if self.class_weights is not None:
            labels = split_batch(inputs)[1]
            loss = weighted_cross_entropy(logits, labels, self.class_weights, self.args.label_smoothing_factor)
        return loss, logits

    # ---- averaged weights ----

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """`GradAugTrainer.evaluate`, of the averaged weights where there are any."""
        with self._averaged():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> PredictionOutput:
        """`Trainer.predict`, of the averaged weights where there are any."""
        with self._averaged():
            return super().predict(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """`GradAugTrainer.save_model`, of the averaged weights; a checkpoint has both."""
        is_checkpoint = _internal_call and output_dir is not None
        if not is_checkpoint:
            with self._averaged():
                return super().save_model(output_dir, _internal_call)
        super().save_model(output_dir, _internal_call)
        if self._average is not None and self.args.should_save:
            save_file(plain_state(self._average.module.state_dict()), Path(output_dir) / AVERAGE)
        if self._has_adapters and self.args.should_save:
            save_file(plain_state(adapted_state(self.model)), Path(output_dir) / ADAPTERS)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Give the model its averaged weights for a while."""
        if self._average is None:
            yield
            return
        trained = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.model.load_state_dict(self._average.module.state_dict())
        try:
            yield
        finally:
            self.model.load_state_dict(trained)


class _Averaging(TrainerCallback):
    """Average the weights after each step of the optimiser."""

    def __init__(self, average: ModelEmaV3) -> None:
        self._average = average

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Add the weights of the step."""
        self._average.update(model, state.global_step)


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Return the trained parameters by layer, the classifier first, each group with `lr_scale` and `weight_decay`.

    Norms, biases, position embeddings and class tokens have no weight decay. The layers are timm's where the model is
    of timm; else parameters are taken for layers twelve by twelve, in their order, as timm does.

    Args:
        model: of timm, wrapped or not, or a classifier of transformers.
        weight_decay: of the other parameters.
        layer_decay: factor of `lr_scale` from each layer to the one before it; the classifier has 1.
    """
    network = timm_network(model) or model
    no_decay = network.no_weight_decay() if hasattr(network, "no_weight_decay") else ()
    if isinstance(network, PreTrainedModel):  # timm asks a model which parameters are the classifier's
        network = SimpleNamespace(
            named_parameters=network.named_parameters, pretrained_cfg={"classifier": head_parameters(network)}
        )
    groups = param_groups_layer_decay(network, weight_decay, (*no_decay, *NO_DECAY), layer_decay=layer_decay)
    return sorted(groups, key=lambda group: group["lr_scale"], reverse=True)
