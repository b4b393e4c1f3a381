"""Normalise batches by the statistics of the whole batch, over all processes."""

import torch
import torch.distributed as dist
from timm.layers import SyncBatchNormAct, convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class CpuSyncBatchNorm(_BatchNorm):
    """Do as `torch.nn.SyncBatchNorm` on the CPU and the meta device, where torch's own raises an error."""

    process_group: dist.ProcessGroup | None = None

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"input has shape {tuple(x.shape)}; batch norm needs (N, C, ...)")

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, C, ...) by the statistics of all processes while training."""
        several = self.training and dist.is_initialized() and dist.get_world_size(self.process_group) > 1
        if x.device.type == "meta" or not several:
            return super().forward(x)
        self._check_input_dim(x)
        return self._normalise(x.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)

    def _normalise(self, x: Tensor) -> Tensor:
        dims, shape = [0, *range(2, x.ndim)], [1, -1, *[1] * (x.ndim - 2)]
        positions = x.new_tensor([x.numel() / x.shape[1]])
        sums = _SumOverProcesses.apply(torch.cat([x.sum(dims), positions]), self.process_group)
        count = sums[-1].detach()
        centred = x - (sums[:-1] / count).view(shape)
        variance = _SumOverProcesses.apply(centred.square().sum(dims), self.process_group) / count
        if self.track_running_stats:
            self._track(sums[:-1].detach() / count, variance.detach() * count / (count - 1))
        normalised = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.weight is not None:
            normalised = normalised * self.weight.view(shape)
        return normalised if self.bias is None else normalised + self.bias.view(shape)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        self.num_batches_tracked.add_(1)
        share = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


class CpuSyncBatchNormAct(CpuSyncBatchNorm):
    """Do as `timm.layers.SyncBatchNormAct`, batch norm with dropout and an activation, likewise."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, C, ...), and apply the activation."""
        return self.act(self.drop(super().forward(x)))


ON_CPU = {nn.SyncBatchNorm: CpuSyncBatchNorm, SyncBatchNormAct: CpuSyncBatchNormAct}


class _SumOverProcesses(torch.autograd.Function):
    """Sum a tensor over all processes; each one's gradient is the sum of the gradients of all."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        total = tensor.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


def synchronise_batchnorm(network: nn.Module, device: torch.device) -> None:
    """Have all batch norms of a model normalise by the whole batch, in place; parameters stay the same objects.

    A ValueError says that the model is slimmable or droppable already, and its batch norms are not synchronised.
    """
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    if all(isinstance(norm, (nn.SyncBatchNorm, CpuSyncBatchNorm)) for norm in norms):
        return
    if any("_width_state" in vars(module) for module in network.modules()):
        raise ValueError(
            "sync_batchnorm is True, but the model was made slimmable or droppable before; leave that to "
            "GradAugTrainer, or call timm.layers.convert_sync_batchnorm(model) first"
        )
    convert_sync_batchnorm(network)
    if device.type == "cpu":
        run_without_gpu(network)


def run_without_gpu(network: nn.Module) -> None:
    """Have the synchronised batch norms of a model run on the CPU and the meta device, in place."""
    for module in network.modules():
        module.__class__ = ON_CPU.get(type(module), type(module))
