"""Several processes, one GPU each, train as one process with the whole batch would: configs/multi_gpu_train.json.

Every process draws the same batches and makes its share of each (`cohort.CohortLoader`), gradients are averaged by
PyTorch, and batch normalisation sees the whole batch.
"""

from __future__ import annotations

from datetime import timedelta

import torch
from ignite.distributed import all_reduce
from ignite.engine import Engine, Events
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel

from scripts.data.checks import InputError

PATIENCE = timedelta(hours=2)  # the others wait while the first process validates and writes


def join() -> torch.device:
    """Join the processes that `torchrun` started, by NCCL where there are GPUs, else by Gloo; this one's device.

    Raises:
        InputError: not started by `torchrun`, or more processes on this machine than it has GPUs.
    """
    if not distributed.is_torchelastic_launched():
        raise InputError("multi_gpu_train.json: start it by torchrun --nproc_per_node=N -m monai.bundle run …")
    number, gpus = distributed.get_node_local_rank(), torch.cuda.device_count()
    if gpus and number >= gpus:
        raise InputError(f"process {number} on a machine of {gpus} GPUs; give torchrun --nproc_per_node={gpus} or less")
    device = torch.device(f"cuda:{number}" if gpus else "cpu")
    if gpus:
        torch.cuda.set_device(device)
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if gpus else "gloo", timeout=PATIENCE)
    return device


class _Normalised(torch.autograd.Function):
    """x (B, C, X, Y, Z), normalised channel by channel by the mean and variance (C,) of all processes' x together.

    The gradient takes into account that both depend on every process's x.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float) -> Tensor:
        scale = torch.rsqrt(variance + eps)
        ctx.save_for_backward(x, weight, mean, scale)
        slope = weight * scale
        shift = bias - mean * slope
        return torch.addcmul(shift.view(-1, 1, 1, 1), x, slope.view(-1, 1, 1, 1)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale = (v if v.ndim > 1 else v.view(-1, 1, 1, 1) for v in ctx.saved_tensors)
        normalised, upstream = (x - mean) * scale, upstream.to(mean.dtype)
        sums = torch.stack([upstream.sum((0, 2, 3, 4)), (upstream * normalised).sum((0, 2, 3, 4))])
        (along_bias, along_weight), means = sums.unbind(), sums.clone()
        distributed.all_reduce(means)
        means = means / (x.numel() / x.shape[1] * distributed.get_world_size())
        of_upstream, of_product = means.view(2, -1, 1, 1, 1).unbind()
        gradient = weight * scale * (upstream - of_upstream - normalised * of_product)
        return gradient.to(x.dtype), along_weight, along_bias, None, None, None


class JointBatchNorm3d(nn.BatchNorm3d):
    """Batch normalisation over the batches of all processes, which have equal shapes.

    `torch.nn.SyncBatchNorm` is for GPUs alone; this one computes the same on a CPU, where it can be compared with one
    process.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        with torch.no_grad():
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            moments = torch.stack(torch.var_mean(wide, (0, 2, 3, 4), correction=0)).double()
            moments[0] += moments[1] ** 2  # the mean of squares, in double precision: its difference is the variance
            distributed.all_reduce(moments)
            square, mean = moments / distributed.get_world_size()
            variance = square - mean**2
            count = x.numel() / x.shape[1] * distributed.get_world_size()
            mean, variance = mean.to(wide.dtype), variance.to(wide.dtype)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        return _Normalised.apply(x, self.weight, self.bias, mean, variance, self.eps)


def with_joint_norms(network: nn.Module) -> nn.Module:
    """The network with `JointBatchNorm3d` in place of each `BatchNorm3d`; names of its parameters stay the same."""
    for module in list(network.modules()):
        for name, norm in module.named_children():
            if isinstance(norm, nn.BatchNorm3d):
                joint = JointBatchNorm3d(norm.num_features, norm.eps, norm.momentum).to(norm.weight)
                joint.load_state_dict(norm.state_dict())
                setattr(module, name, joint)
    return network


def distribute(network: nn.Module, device: torch.device) -> DistributedDataParallel:
    """The network on this process's device, its gradients averaged over the processes."""
    devices = [device] if device.type == "cuda" else None
    # running statistics are equal already, and the first process evaluates alone
    return DistributedDataParallel(with_joint_norms(network).to(device), devices, broadcast_buffers=False)


class JointLoss:
    """Replace the loss of a process's share by the mean over the processes, that of the batch, before it is shown.

    The other processes than the first log warnings alone.
    """

    def attach(self, engine: Engine) -> None:
        if distributed.get_rank() > 0:
            engine.logger.setLevel("WARNING")
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._average)

    def _average(self, engine: Engine) -> None:
        share = engine.state.output["loss"].detach() / distributed.get_world_size()
        engine.state.output["loss"] = all_reduce(share)
