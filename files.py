"""What every room shares about files: the user's errors, atomic writes."""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent  # where the bundled files live, whatever the current folder is
MEGABYTE = 1_000_000
SPEAKING_SECONDS = 3  # that the first of several processes has to come to the same end and say so


class UserError(Exception):
    """Something the user can mend. The message is one line: what is wrong, where, what to do."""


def run_command(command: Callable[[], None]) -> None:
    """Run a command of the project and turn its outcome into an exit code.

    0: done. 2: a `UserError`, printed as one line. A refusal by the system (`OSError`) is
    the user's too. 130: stopped by Ctrl-C or SIGTERM. Anything else is our bug:
    Python prints the traceback and exits with 1.

    Of several processes that torchrun has started the first one speaks for all.
    """
    # A console in a legacy encoding must not end a run because somebody wrote an emoji.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill is a Ctrl-C
    try:
        command()
    except UserError as error:
        sys.stdout.flush()
        if is_first_process():
            print("error:", " ".join(map(str.strip, str(error).splitlines())), file=sys.stderr)
        else:
            time.sleep(SPEAKING_SECONDS)  # torchrun ends all processes when one has ended
        sys.exit(2)
    except OSError as error:  # the system's refusal where nobody expected it, as a pipe that was closed
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python flushes it once more
        print(f"error: {error.filename or 'output'}: {reason(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        if is_first_process():
            print(f"\nstopped{stop}", file=sys.stderr)
        sys.exit(130)


def is_first_process() -> bool:
    """Whether this is the one that prints and writes, of those that torchrun has started; without torchrun it is."""
    return os.environ.get("RANK", "0") == "0"


def check_one_process(job: str) -> None:
    """Raise `UserError` under torchrun, for a job that one process does."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(f"{job} is done by one process; start it without torchrun")


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
    with writing(path):
        temporary = temporary_path(path)
        try:
            temporary.touch()
            mode = temporary.stat().st_mode  # what the user's umask gives; some libraries write for the owner only
            yield temporary
            temporary.chmod(mode)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path.resolve())
        finally:
            temporary.unlink(missing_ok=True)


def temporary_path(path: Path) -> Path:
    """Where `path` is written before it is renamed: in the folder that it, or what it links to, really lies in."""
    target = path.resolve()
    return target.with_name(f".{target.name}.{os.getpid()}.tmp")


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 with plain newlines on every system, atomically.

    A file name that is not UTF-8 reaches Python as half surrogates: they become `\\udc..`, which JSON can read.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; non-ASCII text stays readable, paths become text."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def read_json_object(path: Path, advice: str = "delete it and fetch it again") -> dict[str, Any]:
    """Read a JSON file that holds one object; see `read_json`."""
    return read_json(path, dict, advice)


def read_json(path: Path, kind: type, advice: str) -> Any:
    """Read a JSON file that holds an object (`kind` is dict) or a list.

    Args:
        advice: what to do about a damaged one.

    Raises:
        UserError: unreadable, not JSON, or of another kind.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or brackets without end
        raise UserError(f"{path} is not valid JSON ({error}); {advice}") from error
    if not isinstance(value, kind):
        raise UserError(f"{path} does not hold a JSON {'object' if kind is dict else 'list'}; {advice}")
    return value


def printable(text: str) -> str:
    """`text` without the control characters by which it could take over a terminal."""
    control = (symbol for symbol in set(text) if unicodedata.category(symbol) == "Cc" and symbol not in "\n\t")
    return text.translate({ord(symbol): f"\\x{ord(symbol):02x}" for symbol in control})


def check_extra(package: str, option: str, requirement: str) -> None:
    """Find out before the work, not after it, whether a package can be loaded that only `option` needs.

    Raises:
        UserError: it is not installed, with the line that installs it.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:  # a mere folder has no origin: wandb leaves one of its name behind
        raise UserError(f'{option}: the package {package} is not installed; pip install "{requirement}"')


def check_output_path(path: Path, inputs: Sequence[Path]) -> None:
    """Find out now, not after an hour of training, whether `path` can be written without losing one of `inputs`.

    Raises:
        UserError: it can't, with the reason.
    """
    with writing(path):
        if path.exists() and not path.is_file():
            raise UserError(f"--output {path} is not a file that can be replaced; name a file")
        if not path.parent.is_dir():
            raise UserError(f"--output {path}: the folder {path.parent} does not exist; create it or name another")
        for read in inputs:
            if path.resolve() == read.resolve():
                raise UserError(f"--output {path} would overwrite {read}, which this run reads; name another file")
        probe = temporary_path(path)
        probe.touch()
        probe.unlink()


def check_free_space(folder: Path, needed: int, what: str) -> None:
    """Raise `UserError` if the disk under `folder` has less than `needed` bytes free for `what`."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"the disk of {folder} is too full for {what}: {needed / MEGABYTE:,.0f} MB needed,"
            f" {free / MEGABYTE:,.0f} MB free; make room or choose another folder"
        )
