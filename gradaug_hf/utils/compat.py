"""Differences between the versions of other packages that this one works with."""

from transformers import TrainingArguments

# transformers 5.23 renamed `gradient_checkpointing`, and warns of the old name.
ACTIVATION_CHECKPOINTING = (
    "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"
)


def has_static_graph(args: TrainingArguments) -> bool:
    """Return `args.ddp_static_graph`, which transformers has since 5.6."""
    return bool(getattr(args, "ddp_static_graph", False))
