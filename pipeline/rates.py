"""`--try learning-rate`: cross-validate several learning rates and compare them."""

import shutil
from dataclasses import replace

from hub.find import find_model_folder
from pipeline.folds import Finetune, FoldEstimate, FoldsSummary, cross_validate, estimate, find_job, open_job
from pipeline.job import Data
from pipeline.prepare import make_datasets
from pipeline.run_folder import RATES, resumable
from pipeline.run_settings import as_arguments
from settings import FinetuneSettings
from support.errors import UserError, check_one_process, command_for, display
from support.files import write_json

FACTORS = (0.25, 0.5, 1, 2, 4)  # multiples of the learning rate to try
FOLDS = 5


def try_rates(settings: FinetuneSettings, finetune: Finetune) -> None:
    """Cross-validate several learning rates, or resume a stopped job; write `rates.json` and print a table.

    Each rate has its own folder in the job's folder, with one run per fold.

    Args:
        finetune: trains and evaluates a single run.

    Raises:
        UserError: a problem that the user can fix.
    """
    check_one_process("--try")
    settings = replace(settings, data=replace(settings.data, folds=settings.data.folds or FOLDS))
    begun = find_job(settings)
    folder, lock, data = open_job(settings, begun, "rates", len(FACTORS))
    found: dict[float, FoldsSummary] = {}
    try:
        settings, rates = choose_rates(settings, data)
        with resumable(folder):
            for rate in rates:
                display(f"\nlearning rate {rate:g}")
                run = replace(settings.run, resume=None, run_dir=folder / f"rate-{rate:g}")
                training = replace(settings.training, learning_rate=rate)
                folds = replace(settings.data, try_="nothing")
                found[rate] = cross_validate(replace(settings, data=folds, training=training, run=run), finetune)
    except UserError:
        if not begun and not any(folder.glob("rate-*/")):  # the first run rejected an option
            del lock
            shutil.rmtree(folder, ignore_errors=True)
        raise
    losses = {rate: summary.metrics["model"]["loss"] for rate, summary in found.items()}
    write_json(folder / RATES, {f"{rate:g}": estimate.values for rate, estimate in losses.items()})
    display(*show_rates(losses, settings), f"\nwritten: {folder / RATES}")


def choose_rates(settings: FinetuneSettings, data: Data) -> tuple[FinetuneSettings, list[float]]:
    """Return the settings with the batch size and schedule of a run on `data`, and the learning rates to try."""
    from gpt_model import count_parameters
    from load_gpt2_weights import read_config
    from training.defaults import complete

    config = read_config(find_model_folder(settings.model.name, settings.model.model_path) / "config.json")
    tokens = make_datasets(data, settings.data.max_length, config.n_positions)["train"].count_learned()
    run = complete(settings.training, count_parameters(config), tokens)
    assert run.learning_rate is not None
    rates = [float(f"{run.learning_rate * factor:.3g}") for factor in FACTORS]
    training = replace(settings.training, batch_size=run.batch_size, schedule=run.schedule)
    return replace(settings, training=training), [rate for rate in rates if 0 < rate <= 1]


def show_rates(losses: dict[float, FoldEstimate], settings: FinetuneSettings) -> list[str]:
    """Format the held-out loss of each rate, its difference from the best, and the command to use the best rate."""
    best = min(losses, key=lambda rate: losses[rate].mean)
    folds, width = len(losses[best].values), 2 + max(len(with_interval(found)) for found in losses.values())
    lines = [
        f"\nheld-out loss over {folds} folds, with approximate 95% intervals",
        f"{'learning rate':15}{'loss':{width}}difference from the best, paired by fold",
    ]
    alike = []
    for rate, found in losses.items():
        pairs = zip(found.values, losses[best].values, strict=True)
        more = estimate([value - lowest for value, lowest in pairs])
        alike += [f"{rate:g}"] * (rate != best and more.interval[0] <= 0)
        compared = "the best" if rate == best else with_interval(more)
        lines.append(f"{rate:<15g}{with_interval(found):{width}}{compared}")
    if alike:
        lines.append(f"no clear difference between {best:g} and {', '.join(alike)}")
    if best in (min(losses), max(losses)):
        lines.append(f"{best:g} is at the end of the range; try --learning-rate {best:g} --try learning-rate")
    data, training = replace(settings.data, folds=0, try_="nothing"), replace(settings.training, learning_rate=best)
    command = replace(settings, data=data, training=training, run=replace(settings.run, run_dir=None, resume=None))
    return [*lines, f"train with the best: {command_for('finetune.py')} {as_arguments(command)}"]


def with_interval(found: FoldEstimate) -> str:
    low, high = found.interval
    return f"{found.mean:.3f} ({low:.3f} to {high:.3f})"
