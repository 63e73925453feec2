"""AdamW (Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization") and the learning-rate schedule."""

import math

from torch import nn

from fast.optimizer import AdamW
from settings import TrainingSettings


def make_optimizer(model: nn.Module, settings: TrainingSettings) -> AdamW:
    """Fused AdamW for all trainable parameters; weight decay applies to matrices and embeddings only."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.dim() >= 2]
    vectors = [parameter for parameter in trained if parameter.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return AdamW(groups, fused=True)  # the loop sets the learning rate of each step


def learning_rate_at(step: int, steps: int, settings: TrainingSettings) -> float:
    """The learning rate of `step`, from 1 to `steps`: a linear warm-up, then the schedule.

    `linear` and `cosine` (Loshchilov and Hutter 2017, "SGDR") reach 0 just after the last step.
    """
    assert settings.learning_rate is not None  # `training.defaults.complete` has filled it in
    warmup = math.ceil(settings.warmup * steps)
    if step <= warmup:
        return settings.learning_rate * step / warmup
    done = (step - 1 - warmup) / (steps - warmup)  # from 0 at the first step after the warm-up to almost 1
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[settings.schedule]
    return settings.learning_rate * factor
