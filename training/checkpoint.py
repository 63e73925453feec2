"""A training run on disk: written whole or not at all, and what is needed to go on with it."""

from pathlib import Path

import torch
from torch import nn

from files import UserError, atomic_path


def save_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write weights, optimizer state, random state and the number of finished steps to `path`."""
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
    }
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Put what `save_checkpoint` wrote back in place and return the number of finished steps; 0 without a checkpoint.

    Raises:
        UserError: the checkpoint belongs to another model.
    """
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    try:
        model.load_state_dict(state["model"])
    except RuntimeError:
        raise UserError(f"{path} belongs to a model of another shape; remove it to start again") from None
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"])
    return state["step"]
