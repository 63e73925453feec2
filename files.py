"""What every room shares about files: the user's errors, atomic writes, the run folder."""

import contextlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent  # where the bundled files live, whatever the current folder is
MEGABYTE = 1_000_000


class UserError(Exception):
    """Something the user can mend. The message is one line: what is wrong, where, what to do."""


def run_command(command: Callable[[], None]) -> None:
    """Run a command of the project and turn its outcome into an exit code.

    0: done. 2: a `UserError`, printed as one line. 130: stopped by Ctrl-C. Anything else is our bug: Python prints the
    traceback and exits with 1.
    """
    # A console in a legacy encoding must not end a run because somebody wrote an emoji.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    try:
        command()
    except UserError as error:
        sys.stdout.flush()
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)


def reason(error: OSError) -> str:
    """The operating system's own words for `error`, without the path and the number."""
    return error.strerror or str(error)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write `path` (a full disk, no permission) into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {reason(error)}") from error


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` when the block ends well, remove it when it fails.

    The data reaches the disk before the name does, so that a power cut leaves the old file or the new one, never half.

    Raises:
        UserError: the file can't be written (no space, no permission).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            temporary.touch()
            mode = temporary.stat().st_mode  # what the user's umask gives; some libraries write for the owner only
            yield temporary
            temporary.chmod(mode)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 with plain newlines on every system, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; non-ASCII text stays readable, paths become text."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Raises:
        UserError: unreadable, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from error
    except ValueError as error:  # not UTF-8 or not JSON
        raise UserError(f"{path} is not valid JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object; fetch it again")
    return value


def check_output_path(path: Path) -> None:
    """Find out now, not after an hour of training, whether `path` can be written.

    Raises:
        UserError: it can't, with the reason.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"--output {path} is not a file that can be replaced; name a file")
    if not path.parent.is_dir():
        raise UserError(f"--output {path}: the folder {path.parent} does not exist; create it or name another")
    check_folder_is_writable(path.parent)


def check_folder_is_writable(folder: Path) -> None:
    """Raise `UserError` if no file can be made in `folder`."""
    probe = folder / f".probe.{os.getpid()}.tmp"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {reason(error)}") from error


def check_free_space(folder: Path, needed: int, what: str) -> None:
    """Raise `UserError` if the disk under `folder` has less than `needed` bytes free for `what`."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"the disk of {folder} is too full for {what}: {needed / MEGABYTE:,.0f} MB needed,"
            f" {free / MEGABYTE:,.0f} MB free; make room or choose another folder"
        )


def create_run_folder(run_dir: Path | None, model_name: str, needed: int) -> Path:
    """Make the folder of this run: `run_dir`, or the next free `runs/<model_name>-<n>`. Nothing is ever overwritten.

    Args:
        needed: bytes that the run will write there, at least.

    Raises:
        UserError: `run_dir` already holds something, no folder can be made there, or the disk is too full.
    """
    try:
        if run_dir is None:
            folder = make_numbered_folder(Path("runs"), model_name)
        else:
            folder = run_dir
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.iterdir()):
                raise UserError(f"--run-dir {folder} is not empty; name a new folder")
            check_folder_is_writable(folder)
        try:
            check_free_space(folder, needed, "the fine-tuned model")
        except UserError:
            folder.rmdir()
            raise
    except OSError as error:
        raise UserError(f"cannot make the run folder {run_dir or 'runs'}: {reason(error)}") from error
    return folder


def make_numbered_folder(parent: Path, name: str) -> Path:
    """Make the first `<parent>/<name>-<n>` that does not exist; of two runs that start at once, each gets its own."""
    for number in itertools.count(1):
        with contextlib.suppress(FileExistsError):
            folder = parent / f"{name}-{number}"
            folder.mkdir(parents=True)
            return folder
    raise AssertionError("unreachable")
