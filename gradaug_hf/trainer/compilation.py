"""torch.compile with sub-networks: how many graphs there are, and that all of them are compiled."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator

from gradaug_hf.objective.resolutions import default_resolutions
from gradaug_hf.objective.sampling import SubnetSampler, drops_blocks, drops_channels
from gradaug_hf.trainer.config import GradAugConfig
from gradaug_hf.utils.compat import compiles_stale_graphs, recompile_limits


def compile_statically(sampler: SubnetSampler, args: GradAugConfig, accelerator: Accelerator) -> None:
    """Have a model compiled for each width and resolution by itself, if it is to be compiled.

    Otherwise the second width or resolution makes torch.compile turn widths and shapes into symbols. Its backend then
    makes one graph for all, slowly: minutes for the smallest model.
    """
    if args.torch_compile:
        check_compilable(sampler)
        accelerator.state.dynamo_plugin.dynamic = False


def check_compilable(sampler: SubnetSampler) -> None:
    """Raise a ValueError if sub-networks are too many to compile each, or their graphs are taken for each other."""
    if compiles_stale_graphs():
        raise ValueError(
            f"torch_compile with torch {torch.__version__} on Python 3.13.0 runs graphs of other widths, without an "
            "error; use another Python, such as 3.13.1, or torch 2.12 or newer, or leave out torch_compile"
        )
    if not isinstance(sampler, SubnetSampler):
        return
    mode = sampler.subnet_mode
    if drops_blocks(mode) or mode == "tokens":
        difference = "drops other blocks" if drops_blocks(mode) else "sees another share of the patches"
        raise ValueError(
            f"torch_compile compiles each sub-network, but with subnet_mode {mode!r} each {difference}; set "
            "subnet_mode='width', or leave out torch_compile"
        )
    if number_of_widths(sampler) is None:
        raise ValueError(
            "torch_compile compiles each sub-network, but width_levels is None, with which each has another width; "
            "set width_levels=3, for example, or leave out torch_compile"
        )


def number_of_widths(sampler: SubnetSampler) -> int | None:
    """Return the number of widths that sub-networks can have; None if they are continuous."""
    if not drops_channels(sampler.subnet_mode) or sampler.min_width == sampler.max_width or sampler.num_subnets == 1:
        return 1
    return sampler.width_levels


def number_of_graphs(sampler: SubnetSampler, args: GradAugConfig) -> int:
    """Return the number of graphs that a training and its evaluations compile at most.

    A graph is for one width, one resolution, one batch size, and either training or evaluation. Unless
    `dataloader_drop_last` is set, the last batch of an epoch may have another size, in training and in evaluation.
    """
    resolutions = sampler.resolutions or default_resolutions(7)  # as many as of any side
    sizes = 1 if sampler.subnet_share == 1 else 2  # parts of a batch that does not divide differ by an image
    training = 1 + number_of_widths(sampler) * len(resolutions) * sizes
    evaluation = 1 + len(args.eval_widths)
    return (training + evaluation) * (1 if args.dataloader_drop_last else 2)


@contextmanager
def compiling(sampler: SubnetSampler, args: GradAugConfig) -> Iterator[None]:
    """Let all graphs of a training be compiled, and raise an error where there are more.

    torch.compile by itself runs what is beyond the eighth uncompiled. The limit stays raised afterwards, so that the
    graphs stay in use. With a sampler that is no SubnetSampler it stays what it is.
    """
    if not args.torch_compile or args.num_subnets == 0:
        yield
        return
    config = torch._dynamo.config
    *limits, fails = recompile_limits()
    if isinstance(sampler, SubnetSampler):
        graphs = number_of_graphs(sampler, args)
        for name in limits:
            setattr(config, name, max(getattr(config, name), graphs))
    # torch 2.6 makes a symbol of the width, as of any float, even where shapes are static.
    with config.patch(**{fails: True, "specialize_float": True}):
        yield
