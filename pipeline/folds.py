"""K-fold cross-validation: one run per fold of the conversations, and a summary of all runs."""

import gc
import math
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from filelock import FileLock

from evaluation.findings import about_training, short_table
from evaluation.metrics import CONFIDENCE, Estimate, t_quantile
from evaluation.results import DAMAGED, Metrics, TooFew
from evaluation.run_files import number, read_lines, read_losses
from hub.find import find_model_folder, weights_checksum
from pipeline.job import Data, RunFacts
from pipeline.prepare import fingerprint, open_data, read_data
from pipeline.run_folder import FOLDS, OUTPUT, SETTINGS, create_run_folder, lock_run_folder, resumable
from pipeline.run_settings import Record, changed_options, check_record, read_facts, read_settings, write_settings
from settings import FinetuneSettings
from support.errors import UserError, amount, check_one_process, display
from support.files import Json, read_json_object, write_json, writing

VERSION = 1

Finetune = Callable[[FinetuneSettings, RunFacts], None]


def cross_validate(settings: FinetuneSettings, finetune: Finetune) -> "FoldsSummary":
    """Train and evaluate once per fold, or resume a stopped cross-validation; write, print and return the means.

    Each fold is an ordinary run in `fold-<n>/` inside the job's folder. Its `--output` is also written there.

    Args:
        finetune: trains and evaluates a single run.

    Raises:
        UserError: a problem that the user can fix.
    """
    check_one_process("--folds")
    begun = find_job(settings)
    folder, lock, _ = open_job(settings, begun)
    runs = [folder / f"fold-{fold}" for fold in range(1, settings.data.folds + 1)]
    try:
        with resumable(folder):
            for fold, run in enumerate(runs, 1):
                display(f"\nfold {fold} of {len(runs)}")
                run_fold(settings, fold, run, finetune)
                gc.collect()  # free the model before the next one is loaded
    except UserError:
        # If the first run rejects an option, leave nothing behind.
        if not begun and not (runs[0] / SETTINGS).exists():
            del lock
            shutil.rmtree(folder, ignore_errors=True)
        raise
    summary = summarise(runs)
    write_json(folder / FOLDS, summary.to_json())
    display(*show_summary(summary), f"\nwritten: {folder / FOLDS}")
    return summary


def find_job(settings: FinetuneSettings) -> Path | None:
    """Return the folder of the cross-validation to resume: `--resume`, or a `--run-dir` in which one was started.

    Raises:
        UserError: the job was started with different options, or the folder is a single fold.
    """
    folder = settings.run.resume or settings.run.run_dir
    if folder is None or not (folder / SETTINGS).exists():
        return None
    if read_facts(folder).fold:
        raise UserError(f"{folder} is one fold of a cross-validation; resume it with --resume, or choose a new folder")
    if problems := changed_options(read_settings(folder), settings):
        raise UserError(
            f"{folder} can't be resumed with {'; '.join(problems)}; correct these options, or choose a new folder"
        )
    return folder


def open_job(
    settings: FinetuneSettings, begun: Path | None, kind: str = "folds", times: int = 1
) -> tuple[Path, FileLock | None, Data]:
    """Create the folder of a cross-validation and write its settings, or check the record of `begun`.

    Args:
        begun: the folder of a cross-validation to resume, if there is one.
        kind: the part of a new folder's name that describes its content.
        times: the number of cross-validations in the folder.

    Raises:
        UserError: as for a single run; all errors in files and folders are found before training.
    """
    lock = lock_run_folder(begun) if begun else None
    opened = open_data(settings.data)
    model = find_model_folder(settings.model.name, settings.model.model_path, weights=False)
    data = read_data(opened, model, settings.data, settings.training.seed, fold=1)

    from gpt_model import count_parameters
    from load_gpt2_weights import read_config
    from training.device import choose_machine

    machine = choose_machine(settings.training.device, settings.training.precision)
    model = find_model_folder(settings.model.name, settings.model.model_path)
    fingerprints = {"conversations": fingerprint(data), "model": weights_checksum(model)}
    record = Record(RunFacts(), machine.record(), fingerprints)
    if begun:
        folder = begun
        check_record(folder, record)
    else:
        needed = 4 * count_parameters(read_config(model / "config.json")) * settings.data.folds * times
        name = Path(settings.model.name).resolve().name
        folder = create_run_folder(settings.run.run_dir, f"{name}-{kind}", needed)
        lock = lock_run_folder(folder)
    write_settings(folder, settings, model, record)
    display(f"cross-validation of {len(data.conversations)} dialogues in {settings.data.folds} folds: {folder}")
    return folder, lock, data


def run_fold(settings: FinetuneSettings, fold: int, folder: Path, finetune: Finetune) -> None:
    """Run one fold in `folder`, or resume it; leave a finished fold as it is."""
    if (folder / OUTPUT).exists():
        display(f"already finished: {folder}")
        return
    begun = (folder / SETTINGS).exists()
    if not begun:
        with writing(folder):
            if folder.exists():  # the run was killed before its settings were written
                shutil.rmtree(folder)
            folder.mkdir()
    run = replace(settings.run, run_dir=None if begun else folder, resume=folder if begun else None)
    facts = read_facts(folder) if begun else RunFacts(fold)
    finetune(replace(settings, run=run, output=folder / OUTPUT), facts)


@dataclass(frozen=True)
class FoldEstimate:
    """A metric's value in each fold, with their mean, their standard deviation, and the 95% interval of the mean."""

    values: list[float]
    mean: float
    standard_deviation: float
    interval: list[float]


@dataclass(frozen=True)
class FoldsSummary:
    """A summary of the metrics over all folds.

    Attributes:
        metrics: "base" or "model" → the metrics computed in every run.
        too_small: "base" or "model" → the metrics for which at least one run had too little data.
        best_epochs: the epoch of the lowest validation loss in each run.
        last_epoch: the last epoch of the longest run.
        chosen: the number of runs that kept weights from before the last evaluation.
    """

    folds: int
    metrics: dict[str, dict[str, FoldEstimate]]
    too_small: dict[str, list[str]]
    best_epochs: list[float]
    last_epoch: float
    chosen: int = 0

    @property
    def median_best_epoch(self) -> float:
        return statistics.median_low(self.best_epochs)

    def to_json(self) -> Json:
        """The content of folds.json."""
        return {
            "version": VERSION,
            "folds": self.folds,
            "confidence": CONFIDENCE,
            "metrics": asdict(self)["metrics"],
            "too_small": self.too_small,
            "best_epochs": self.best_epochs,
            "median_best_epoch": self.median_best_epoch,
            "last_epoch": self.last_epoch,
        }


def summarise(runs: Sequence[Path]) -> FoldsSummary:
    """Summarise the finished `runs`.

    Raises:
        UserError: an `evaluation.json` is damaged.
    """
    evaluations = [read_metrics(run / "evaluation.json") for run in runs]
    metrics, too_small = {}, {}
    for column in ("base", "model"):
        found = [each.get(column, Metrics()) for each in evaluations]
        numbers = [finite_numbers(each) for each in found]
        rows = {name: [each[name] for each in numbers if name in each] for name in numbers[0]}
        metrics[column] = {name: estimate(values) for name, values in rows.items() if len(values) == len(runs)}
        too_small[column] = sorted({name for each in found for name in each.too_small()})
    losses = [read_losses(read_lines(run / "metrics.jsonl", [])) for run in runs]
    return FoldsSummary(
        folds=len(runs),
        metrics=metrics,
        too_small=too_small,
        best_epochs=[each.best.epoch for each in losses if each.best and each.best.epoch is not None],
        last_epoch=max(each.val[-1].epoch or 0 for each in losses),
        chosen=sum(each.kept_step is not None for each in losses),
    )


def read_metrics(path: Path) -> dict[str, Metrics]:
    """Read the metrics of an `evaluation.json`, by column.

    Raises:
        UserError: the file is damaged.
    """
    advice = "recreate it with evaluate.py"
    evaluation = read_json_object(path, advice)
    try:
        return {name: Metrics.from_json(values) for name, values in evaluation["metrics"].items()}
    except DAMAGED as error:
        raise UserError(f"{path} does not hold an evaluation; {advice}") from error


def finite_numbers(metrics: Metrics) -> dict[str, float]:
    """All scalar metrics, including the loss on the training part."""
    train = (metrics.loss_by_part or {}).get("train", Metrics())
    found = metrics.numbers() | ({"train_part_loss": train.loss} if train.loss else {})
    return {name: value for name, each in found.items() if (value := number(each.value)) is not None}


def estimate(values: Sequence[float]) -> FoldEstimate:
    """The mean of a metric over folds, its standard deviation, and a 95% interval by Student's t.

    The training parts of the folds overlap, so their values are not independent, and the variance of the mean has no
    unbiased estimate (Bengio and Grandvalet 2004, No Unbiased Estimator of the Variance of K-Fold Cross-Validation).
    The interval is therefore approximate and somewhat too narrow.
    """
    mean, deviation = statistics.fmean(values), statistics.stdev(values)
    reach = t_quantile(len(values) - 1) * deviation / math.sqrt(len(values))
    return FoldEstimate(list(values), mean, deviation, [mean - reach, mean + reach])


def show_summary(summary: FoldsSummary) -> list[str]:
    """Format the main metrics with their intervals, and advice on the number of epochs."""
    columns = {name: mean_metrics(summary, name) for name, estimates in summary.metrics.items() if estimates}
    lines = [f"\nmeans of {summary.folds} folds, with approximate 95% intervals", *short_table(columns), ""]
    if "base" in columns:
        lines += about_training(columns["model"], columns["base"])
    median = summary.median_best_epoch
    if median < 0.5:
        advice = "a lower --learning-rate may find better weights"
    elif median >= summary.last_epoch:
        advice = "more --epochs may lower it further"
    else:
        advice = f"--epochs {max(1, round(median))} for a run on all data"
    if summary.chosen:
        lines.append(
            f"{amount(summary.chosen, 'fold')} kept an earlier epoch, chosen by this loss, so it is slightly optimistic"
        )
    numbers = ", ".join(f"{epoch:g}" for epoch in summary.best_epochs)
    return [*lines, f"validation loss was lowest after epoch {numbers} (median {median:g}): {advice}"]


def mean_metrics(summary: FoldsSummary, column: str) -> Metrics:
    """Return the means over the folds in the format of a single run's metrics."""
    means = {name: Estimate(each.mean, each.interval) for name, each in summary.metrics[column].items()}
    means.pop("train_part_loss", None)  # not a field: it is part of `loss_by_part`
    few = dict.fromkeys(summary.too_small[column], TooFew("needs more data in each fold"))
    return replace(Metrics(), **means, **few)
