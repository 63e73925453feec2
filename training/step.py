"""One optimizer step: forward and backward passes over its batches, clipping, AdamW."""

import contextlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from training.device import Machine

SMALLEST_SCALE = 1.0  # minimum scale for fp16 gradients: if they still overflow, they really are too large


class Batch(NamedTuple):
    """Examples that the model processes together."""

    inputs: Tensor  # (B, T)
    targets: Tensor  # (B, T)
    learned: int  # number of targets that are not ignored
    seed: int = 0  # dropout seed


class Learner(NamedTuple):
    """A model in training, with everything that changes its weights."""

    model: nn.Module
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    max_grad_norm: float


def take_step(learner: Learner, batches: Sequence[Batch], machine: Machine) -> tuple[float, int, float | None]:
    """Take one optimizer step over `batches`; return its mean loss, number of learned tokens and gradient norm.

    With several processes, each passes its share of the batches, and all get the same result.

    Raises:
        FloatingPointError: the loss or the gradient is NaN or infinite; the weights are unchanged.
    """
    model, optimizer, scaler, max_grad_norm = learner
    learned = int(machine.total(sum(batch.learned for batch in batches))[0])
    loss = 0.0
    model.train()
    for number, (inputs, targets, _, seed) in enumerate(batches, 1):
        machine.seed(seed)
        last = number == len(batches)
        with machine.deterministic(), contextlib.nullcontext() if last else machine.without_sharing(model):
            with machine.autocast():
                part = model(inputs, targets) / learned
            # A shared model averages gradients over the processes; multiply, so that each token counts once.
            scaler.scale(part * machine.processes).backward()
        loss += part.item()
    loss = machine.total(loss)[0]
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss}")
    scaler.unscale_(optimizer)
    limit = max_grad_norm or (math.inf if scaler.is_enabled() else 0)
    norm = nn.utils.clip_grad_norm_(model.parameters(), limit).item() if limit else None
    if norm is not None and not math.isfinite(norm) and not scaler.is_enabled():
        raise FloatingPointError(f"the gradient is {norm}")
    scaler.step(optimizer)  # skipped if an fp16 gradient has overflowed
    scaler.update()
    optimizer.zero_grad()
    if scaler.get_scale() < SMALLEST_SCALE:
        raise FloatingPointError("the gradients are too large for fp16")
    return loss, learned, norm


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Set the learning rate of the next step, in place if CUDA graphs read it from a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
