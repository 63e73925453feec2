"""The options that the user left open: epochs and learning rate, by the size of the model."""

from dataclasses import replace

from settings import TrainingSettings

SMALL = 30_000_000  # parameters below which a model is trained with the defaults of the bundled one


def defaults(settings: TrainingSettings, parameters: int) -> dict[str, float]:
    """Values for the options that the user left open, for a model with that many parameters."""
    small = parameters < SMALL
    rates = (2e-3, 8e-4) if settings.lora_rank else (1.2e-4, 5e-5)
    values = {"epochs": 3 if small else 10, "learning_rate": rates[0] if small else rates[1]}
    return {name: value for name, value in values.items() if getattr(settings, name) is None}


def complete(settings: TrainingSettings, parameters: int) -> TrainingSettings:
    """The settings with the options filled in that the user left open."""
    return replace(settings, **defaults(settings, parameters))


def explain(settings: TrainingSettings, parameters: int) -> str:
    """One line on epochs and learning rate: which are defaults and which were asked for."""
    left_open, completed = defaults(settings, parameters), complete(settings, parameters)
    default = "the default" + " with LoRA" * bool(settings.lora_rank) + " for a small model" * (parameters < SMALL)
    explained = [
        f"{name.replace('_', ' ')}: {getattr(completed, name)} ({default if name in left_open else 'as asked'})"
        for name in ("epochs", "learning_rate")
    ]
    if settings.lora_rank:
        explained.append(f"LoRA of rank {settings.lora_rank}")
    if settings.max_steps:
        explained.append(f"at most {settings.max_steps} steps (as asked)")
    return "; ".join(explained)
