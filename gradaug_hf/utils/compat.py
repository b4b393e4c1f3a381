"""Differences between the versions of other packages that this one works with."""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainingArguments

# transformers 5.23 renamed `gradient_checkpointing`, and warns of the old name.
ACTIVATION_CHECKPOINTING = (
    "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"
)


def has_static_graph(args: TrainingArguments) -> bool:
    """Return `args.ddp_static_graph`, which transformers has since 5.6."""
    return bool(getattr(args, "ddp_static_graph", False))


def recompile_limits() -> tuple[str, str, str]:
    """Return the names of the settings of torch._dynamo.config that limit graphs, which torch 2.7 renamed.

    They are the limit of a function, the one of all functions, and whether it is an error to reach one.
    """
    if hasattr(torch._dynamo.config, "recompile_limit"):
        return "recompile_limit", "accumulated_recompile_limit", "fail_on_recompile_limit_hit"
    return "cache_size_limit", "accumulated_cache_size_limit", "fail_on_cache_limit_hit"


def compiles_stale_graphs() -> bool:
    """Return whether torch.compile runs a graph of the values that attributes had before they changed.

    torch 2.9 to 2.11 go by the versions of `__dict__`, which Python 3.13.0 does not keep
    (https://github.com/python/cpython/issues/125608).
    """
    by_versions = getattr(torch._dynamo.config, "use_recursive_dict_tags_for_guards", False)
    return by_versions and sys.version_info[:3] == (3, 13, 0)


def cpu_capabilities() -> Mapping[str, Any]:
    """Return which instruction sets the processor has; torch.cpu.get_capabilities is missing up to torch 2.10."""
    if hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities()
    return {
        "avx512_f": torch.cpu._is_avx512_supported(),
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "amx_bf16": torch.cpu._is_amx_tile_supported(),  # no processor has AMX without it
    }
