"""Write files atomically, and read them with clear errors."""

import contextlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from support.errors import UserError, reason

PROJECT = Path(__file__).resolve().parent.parent  # folder of the bundled files
MEGABYTE = 1_000_000
REPLACE = "restore it, or delete it and download it again"  # advice for a damaged file of a model

Json = dict[str, Any]
"""A JSON object."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an `OSError` from writing `path` (full disk, no permission) into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {reason(error)}") from error


@contextlib.contextmanager
def atomic_path(path: Path, spare: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path next to `path`; rename it to `path` if the block succeeds, remove it if it fails.

    A `spare` is an unused file on the same disk. It becomes the temporary file, with its content: overwriting it is
    several times faster than writing a new file, for which the system must find free pages.

    The data is flushed before the rename, so a power cut leaves the old file or the new one, never half a file.

    Raises:
        UserError: the file can't be written (full disk, no permission).
    """
    with writing(path):
        temporary = temporary_path(path)
        try:
            if spare:
                spare.replace(temporary)
            temporary.touch()
            mode = temporary.stat().st_mode  # set by the umask; some libraries make files readable by the owner only
            yield temporary
            temporary.chmod(mode)
            flush(temporary)
            temporary.replace(resolved(path))
        finally:
            temporary.unlink(missing_ok=True)


def crc_of(path: Path, start: int = 0) -> int:
    """The CRC-32 of a file, continued from `start`, the CRC-32 of the preceding data."""
    buffer = memoryview(bytearray(1 << 20))  # fits in the processor's cache
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(buffer):
            start = zlib.crc32(buffer[:size], start)
    return start


def flush(path: Path) -> None:
    """Flush a file to the disk, so that a power cut can't damage it."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def resolved(path: Path) -> Path:
    """The absolute path without links; a link to itself, on which `Path.resolve` fails, is kept."""
    return Path(os.path.realpath(path))


def temporary_path(path: Path) -> Path:
    """The temporary path before the rename: in the same folder or, if `path` is a link, in its target's folder."""
    target = resolved(path)
    return target.with_name(f".{target.name}.{os.getpid()}.tmp")


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 with plain newlines on every system, atomically.

    Lone surrogates, which Python uses in file names that are not UTF-8, become `\\udc..`, which JSON can read.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def without_none(fields: list[tuple[str, Any]]) -> Json:
    """A `dict_factory` for `asdict` that leaves out fields that are None."""
    return {name: value for name, value in fields if value is not None}


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; non-ASCII text stays readable, paths become text.

    Raises:
        UserError: the file can't be written.
        ValueError: a number is NaN or infinite, which JSON can't represent.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=str) + "\n")


def read_json_object(path: Path, advice: str = REPLACE) -> Json:
    """Read a JSON file that holds one object; see `read_json`."""
    return read_json(path, dict, advice)


def read_json(path: Path, kind: type, advice: str) -> Any:
    """Read a JSON file that holds an object (`kind` is dict) or a list, with or without a byte order mark.

    Args:
        advice: how to fix a damaged file, for the error.

    Raises:
        UserError: the file is unreadable, not JSON, or not of this kind.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested too deeply
        raise UserError(f"{path} is not valid JSON ({error}); {advice}") from error
    if not isinstance(value, kind):
        raise UserError(f"{path} does not hold a JSON {'object' if kind is dict else 'list'}; {advice}")
    return value


def check_output_path(
    path: Path, inputs: Sequence[Path], option: str = "--output", advice: str = "choose another file"
) -> None:
    """Check now, not after an hour of training, that `path` can be written and is not one of `inputs`.

    Args:
        option: the option that caused the writing, for the error.
        advice: how to get a different path, for the error.

    Raises:
        UserError: `path` can't be written, or would overwrite an input.
    """
    with writing(path):
        if path.exists() and not path.is_file():
            raise UserError(f"{option} {path} is not a file that can be replaced; {advice}")
        if not path.parent.is_dir():
            raise UserError(f"{option} {path}: the folder {path.parent} does not exist; create it or choose another")
        for read in inputs:
            if resolved(path) == resolved(read):
                raise UserError(f"{option} {path} would overwrite {read}, which this run reads; {advice}")
        probe = temporary_path(path)
        probe.touch()
        probe.unlink()


def check_free_space(folder: Path, needed: int, what: str) -> None:
    """Raise `UserError` if the disk under `folder` has less than `needed` bytes free for `what`."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"the disk of {folder} is too full for {what}: {needed / MEGABYTE:,.0f} MB needed,"
            f" {free / MEGABYTE:,.0f} MB free; free up space or choose another folder"
        )
