"""Defaults for unset options, by model size and number of training tokens; see docs/training.md."""

from dataclasses import replace
from typing import Any

from settings import TrainingSettings

SMALL = 30_000_000  # models with fewer parameters get the bundled model's defaults
MUCH = 1_000_000  # with this many training tokens, small models get larger batches and a falling learning rate
FOR_MUCH: dict[str, Any] = {"learning_rate": 5e-4, "batch_size": 8, "schedule": "linear"}


def defaults(settings: TrainingSettings, parameters: int, tokens: int = 0) -> dict[str, Any]:
    """Values for unset options.

    Args:
        parameters: number of the model's parameters.
        tokens: number of training tokens.
    """
    small = parameters < SMALL
    rates = (2e-3, 8e-4) if settings.lora_rank else (1.2e-4, 5e-5)
    values = {"epochs": 3 if small else 10, "learning_rate": rates[0] if small else rates[1]}
    found: dict[str, Any] = {name: value for name, value in values.items() if getattr(settings, name) is None}
    untouched = all(getattr(settings, name) == getattr(TrainingSettings, name) for name in FOR_MUCH)
    return found | (FOR_MUCH if small and tokens >= MUCH and untouched and not settings.lora_rank else {})


def complete(settings: TrainingSettings, parameters: int, tokens: int = 0) -> TrainingSettings:
    """`settings` with defaults for unset options; see `defaults`."""
    return replace(settings, **defaults(settings, parameters, tokens))


def explain(settings: TrainingSettings, parameters: int, tokens: int = 0) -> str:
    """One line with the options that `defaults` may choose; it says whether each is a default or the user's choice."""
    left_open, completed = defaults(settings, parameters, tokens), complete(settings, parameters, tokens)
    default = "the default" + " with LoRA" * bool(settings.lora_rank) + " for a small model" * (parameters < SMALL)
    much = f"{default} and {tokens:,} training tokens"
    explained = []
    for name in ("epochs", "learning_rate", "batch_size", "schedule"):
        chosen = much if name in FOR_MUCH and left_open.keys() >= FOR_MUCH.keys() else default
        if name in left_open or getattr(settings, name) != getattr(TrainingSettings, name):
            why = chosen if name in left_open else "as requested"
            explained.append(f"{name.replace('_', ' ')}: {getattr(completed, name)} ({why})")
    if settings.lora_rank:
        explained.append(f"LoRA of rank {settings.lora_rank}")
    if settings.max_steps:
        explained.append(f"at most {settings.max_steps} steps (as requested)")
    return "; ".join(explained)
