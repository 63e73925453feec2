"""Create and find run folders, and lock them against a second process."""

import contextlib
import shlex
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from settings import RUNS
from support.errors import UserError, command_for, is_first_process, reason
from support.files import check_free_space, resolved, temporary_path, writing

SETTINGS = "settings.json"
OUTPUT = "generated_conversations.json"  # the last file that a run writes
FOLDS = "folds.json"  # the last file of a cross-validation, whose folder contains a run for each fold
RATES = "rates.json"  # the last file of --try, whose folder contains a cross-validation for each learning rate


def create_run_folder(run_dir: Path | None, model_name: str, needed: int) -> Path:
    """Create the folder of this run: `run_dir`, or the next free `runs/<model_name>-<n>`. Nothing is overwritten.

    Args:
        needed: minimum number of bytes that the run will write there.

    Raises:
        UserError: `run_dir` is not empty, the folder can't be created, or the disk is too full.
    """
    try:
        if run_dir is None:
            folder = make_numbered_folder(RUNS, model_name)
        else:
            folder = run_dir
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.iterdir()):
                raise UserError(f"--run-dir {folder} is not empty; choose a new folder, or resume with --resume")
            temporary_path(folder / SETTINGS).touch()
            temporary_path(folder / SETTINGS).unlink()
        try:
            check_free_space(folder, needed, "the fine-tuned model")
        except UserError:
            folder.rmdir()
            raise
    except OSError as error:
        raise UserError(f"cannot create the run folder {run_dir or 'runs'}: {reason(error)}") from error
    return folder


def make_numbered_folder(parent: Path, name: str) -> Path:
    """Create the first `<parent>/<name>-<n>` that does not exist; simultaneous runs get different folders."""
    parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        folder = parent / f"{name}-{number}"
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1


def find_run(name: str | None) -> Path | None:
    """Return the finished run of this name, or by default the newest in `runs/`; None if the name is not a run.

    Raises:
        UserError: the run has not finished, or there is no finished run.
    """
    if name is None:
        finished = [path.parent for path in RUNS.glob(f"*/{OUTPUT}") if (path.parent / SETTINGS).exists()]
        if not finished:
            raise UserError(
                f"there is no finished run in runs/; give a model, or train one: {command_for('finetune.py')}"
            )
        return max(finished, key=lambda folder: (folder / OUTPUT).stat().st_mtime_ns)
    folder = Path(name)
    if folder.name == "model" and (folder.parent / SETTINGS).exists():
        folder = folder.parent
    if not (folder / SETTINGS).exists():
        return None
    if (folder / FOLDS).exists() or (folder / RATES).exists():
        run = min(folder.rglob("fold-1"))
        raise UserError(f"{folder} holds the runs of a cross-validation; choose one of them, such as {run}")
    if not (folder / OUTPUT).exists():
        raise UserError(
            f"{folder} has not finished; resume with: {command_for('finetune.py')} --resume {shlex.quote(str(folder))}"
        )
    return folder


def check_report_folder(folder: Path, model: Path) -> None:
    """Check early that the evaluation of a model or run `model` can be written into `folder`; create nothing.

    Raises:
        UserError: the folder can't be written, or belongs to a different run.
    """
    with writing(folder):
        if (folder / SETTINGS).exists() and resolved(folder) != resolved(model):
            raise UserError(f"--report-dir {folder} belongs to another run; choose a new folder")
        there = next(parent for parent in (folder, *resolved(folder).parents) if parent.exists())
        temporary_path(there / SETTINGS).touch()
        temporary_path(there / SETTINGS).unlink()


def make_report_folder(folder: Path | None, model: Path) -> Path:
    """Create a folder for the evaluation of `model`: `folder`, or the next free `runs/<model>-evaluation-<n>`.

    Raises:
        UserError: the folder can't be created.
    """
    with writing(folder or RUNS):
        if folder is None:
            name = model.resolve().parent.name if model.name == "model" else model.resolve().name
            return make_numbered_folder(RUNS, f"{name}-evaluation")
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def lock_run_folder(folder: Path) -> FileLock | None:
    """Keep other processes out of `folder` while this process references the returned lock.

    If several processes train together, the first holds the lock. Partial files of a killed run are removed.

    Raises:
        UserError: another process uses the folder, or it can't be written.
    """
    if not is_first_process():
        return None
    lock = FileLock(folder / ".lock")
    with writing(folder):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"{folder}: another run is using this folder; wait for it, or stop it") from None
        for leftover in folder.rglob(".*tmp*"):  # ours end in .tmp, those of safetensors begin with .tmp
            if leftover.is_file():
                leftover.unlink()
    return lock


@contextlib.contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """Add to a `KeyboardInterrupt` the command that resumes the run in `folder` or the job that contains it."""
    try:
        yield
    except KeyboardInterrupt as stop:
        command = f"{command_for()} --resume {shlex.quote(str(folder))}"
        where = str(stop).partition("; resume with: ")[0]
        raise KeyboardInterrupt(f"{where}; resume with: {command}") from None
