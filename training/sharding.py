"""A model divided among the processes of torchrun (FSDP2): each holds a share of every tensor, a DTensor.

Making a tensor whole takes all processes, in the same order. PyTorch needs a second to import its part of this, so that
happens only where a model is divided.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from gpt_model import GPTModel
from training.device import Machine


def divide(model: GPTModel, machine: Machine) -> None:
    """Move `model` to the machine, of each tensor the share of this process; with one process all of it.

    From then on a block is made whole while it computes, and gradients come averaged and divided.
    """
    if machine.processes == 1:
        model.to(machine.device)
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(machine.device.type, (machine.processes,))
    for part in (*model.h, model):
        # The root too, which by default stays whole after an evaluation: checkpoints and the optimizer want shares.
        fully_shard(part, mesh=mesh, reshard_after_forward=True)


def whole(tensor: Any) -> Tensor:
    """All of a tensor that is divided, in all processes; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def whole_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a model by name, one made whole after another."""
    return ((name, whole(parameter.detach())) for name, parameter in model.named_parameters())


def gather(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """The whole of `tensors` on the CPU; a process that does not `keep` them only passes on its shares."""
    gathered = {}
    for name, tensor in tensors.items():
        value = whole(tensor.detach())
        if keep:
            gathered[name] = value.to("cpu").contiguous()
    return gathered


def share_like(divided: Any, value: Tensor) -> Tensor:
    """The share of a whole `value` that a process holds of `divided`; `value` itself where nothing is divided."""
    if not hasattr(divided, "full_tensor") or value.shape != divided.shape:  # AdamW's step count is one number
        return value
    from torch.distributed.tensor import distribute_tensor

    # Each process has read the value: none needs to send it.
    return distribute_tensor(value.to(divided.device), divided.device_mesh, divided.placements, src_data_rank=None)
