"""Find and open conversation data: files, folders, archives, patterns and pipes; unpacked, and as UTF-8."""

import bz2
import codecs
import glob
import gzip
import io
import lzma
import os
import re
import shutil
import stat
import sys
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path, PurePath
from typing import IO, NamedTuple, cast

from dialogues.arrow import MARKS as ARROW
from dialogues.arrow import json_lines
from dialogues.kinds import HEAD, MEDIA_NAMES, packed_document, unreadable_kind
from dialogues.layouts.records import FormatError, NotRecognisedError
from support.errors import UserError, check_one_process, printable, reason

PACKED = {b"\x1f\x8b": gzip.open, b"\xfd7zXZ": lzma.open, b"BZh": bz2.open}
ARCHIVE = (b"PK\x03\x04", b"PK\x05\x06")  # the second is the signature of an empty archive
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
DAMAGED = (
    *(EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, zipfile.BadZipFile, NotImplementedError),
    UnicodeDecodeError,  # raised for the name of an archive member; text is decoded elsewhere
)
PIECE = 1 << 16  # number of bytes to transcode at a time
LIMIT = 2_000_000_000  # maximum number of bytes to read at once
PIPE = Path("-")
STANDARD_INPUT = "standard input"

# Suffixes of the files to read in folders and archives; a file named by the user may have any suffix.
TEXT_NAMES = (".json", ".jsonl", ".ndjson", ".txt", ".csv", ".tsv", ".log", ".md", ".srt", ".vtt")
NAMES = frozenset((*TEXT_NAMES, ".parquet", ".arrow"))
PACKED_NAMES = frozenset((".gz", ".xz", ".bz2"))
NO_CONVERSATIONS = re.compile(
    r"(readme|license|licence|copying|changelog|requirements)\b.*"
    r"|(dataset_infos?|dataset_dict|state)\.json|cache-.*\.arrow",
    re.IGNORECASE,
)
OF_A_MODEL = ("model.safetensors", "metrics.jsonl")  # files that identify model folders and run folders
IOS_CHAT = "_chat.txt"  # the chat in an iPhone export; the files sent in the chat are next to it
DATA_SET = re.compile(r"[\w.-]+/[\w.-]+")
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


class NotConversationsError(UserError):
    """No conversations were recognised in a file. A file found in a folder is then left out."""


class Input(NamedTuple):
    """One file of conversations, or one member of an archive. It can be sent to another process.

    `name` is printed. `path` is the file that holds the bytes: the archive of a `member`, or the copy of a pipe. `size`
    is the number of bytes that `open` yields, or None if the file is packed or transcoded. `found` is true if the user
    did not name the file: it was found in a folder, or in an archive of several files.
    """

    name: str
    path: Path
    member: str | None = None
    size: int | None = None
    found: bool = False

    @classmethod
    def of(cls, path: Path) -> "Input":
        """Return the only input under a path.

        Raises:
            UserError: there is none, or there are several.
        """
        inputs = find_inputs([path]).inputs
        if len(inputs) > 1:
            names = ", ".join(each.name for each in inputs[:3])
            raise UserError(f"{path} holds {len(inputs)} files ({names}, …); choose one")
        return inputs[0]

    def __str__(self) -> str:
        return self.name

    def open(self) -> IO[bytes]:
        """Open the unpacked content as UTF-8 without a byte order mark; Parquet and Arrow tables become JSON Lines.

        Raises:
            UserError: the file can't be read, or this program does not read files of its kind.
        """
        with reading(self):
            file = unpacked(self)
            head = file.read(HEAD)
            if kind := unreadable_kind(head, self.name):
                raise NotConversationsError(f"{self.name} is {kind}")
            if head.startswith(codecs.BOM_UTF8):
                file.seek(len(codecs.BOM_UTF8))
                return file
            file.seek(0)
            if head.startswith(ARROW):
                return io.BufferedReader(Pieces(file, json_lines(file, head, self.name)))
            return io.BufferedReader(Pieces(file, recoded(file))) if head.startswith(UTF_16) else file

    def lines(self, limit: int | None = None) -> Iterator[tuple[int, bytes]]:
        """Yield the lines, numbered from 1, with their line ends.

        Args:
            limit: maximum total bytes, for callers that keep the lines; None: no limit. No line may exceed `LIMIT`.

        Raises:
            UserError: the file can't be read, or exceeds the limit.
        """
        taken = 0
        with reading(self), self.open() as file:
            for number, line in enumerate(iter(partial(file.readline, LIMIT + 1), b""), 1):
                taken += len(line)
                if len(line) > LIMIT or (limit is not None and taken > limit):
                    raise self.too_large(limit or LIMIT)
                yield number, line

    def read(self, limit: int = LIMIT) -> bytes:
        """Return the whole content, unpacked, if it has at most `limit` bytes.

        Raises:
            UserError: the file can't be read, or is larger.
        """
        with reading(self), self.open() as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise self.too_large(limit)
        return content

    def too_large(self, limit: int) -> UserError:
        return UserError(
            f"{self.name}: it exceeds {limit / 1e9:g} GB{' unpacked' if self.size is None else ''}, too much to read at"
            " once; save it as JSON Lines, which is read line by line, or as several files"
        )


class Found(NamedTuple):
    """The inputs under some paths, and the number of ignored files of each kind."""

    inputs: list[Input]
    ignored: dict[str, int]


class Pieces(io.RawIOBase):
    """A stream over an iterator of bytes; closing it also closes the underlying file."""

    def __init__(self, file: IO[bytes], pieces: Iterator[bytes]) -> None:
        super().__init__()
        self.file, self.pieces, self.rest = file, pieces, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.rest = self.rest or next(filter(None, self.pieces), b"")
        size = min(len(buffer), len(self.rest))
        buffer[:size], self.rest = self.rest[:size], self.rest[size:]
        return size

    def close(self) -> None:
        self.file.close()
        super().close()


@contextmanager
def reading(name: object) -> Iterator[None]:
    """Turn errors in reading the file `name` into a `UserError`."""
    try:
        yield
    except NotRecognisedError as error:
        raise NotConversationsError(f"{name}: {error}") from None
    except FormatError as error:
        raise UserError(f"{name}: {error}", error.account) from None
    except FileNotFoundError:
        raise UserError(f"--data {name} does not exist; give the path of your conversation file") from None
    except DAMAGED as error:
        raise UserError(f"{name} is damaged or cut short: {error}; copy or download it again") from None
    except MemoryError:
        raise UserError(f"{name}: not enough memory to read it; split it into several files") from None
    except OSError as error:
        raise UserError(f"cannot read --data {name}: {reason(error)}") from error


def unpacked(input: Input) -> IO[bytes]:
    """Open a file or a member of an archive, unpacked; the stream is seekable."""
    file = input.path.open("rb") if input.member is None else open_member(input.path, input.member)
    magic = file.read(6)
    file.seek(0)
    unpack = next((unpack for start, unpack in PACKED.items() if magic.startswith(start)), None)
    return cast("IO[bytes]", unpack(file, "rb")) if unpack else file


def open_member(path: Path, member: str) -> IO[bytes]:
    with zipfile.ZipFile(path) as archive:
        if archive.getinfo(member).flag_bits & 1:
            raise FormatError("the archive is encrypted; unpack it")
        return archive.open(member)


def recoded(file: IO[bytes]) -> Iterator[bytes]:
    """Yield UTF-16 with a byte order mark as UTF-8 without one."""
    decoder = codecs.getincrementaldecoder("utf-16")()
    try:
        for piece in iter(partial(file.read, PIECE), b""):
            yield decoder.decode(piece).encode()
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        raise FormatError("it starts like UTF-16 but is not; save the file as UTF-8") from None


def find_inputs(paths: Iterable[Path]) -> Found:
    """Find the conversation files under some paths: files, folders, archives, patterns and pipes.

    The paths keep their order; the files under one path are in natural order (`message_2` before `message_10`).

    Raises:
        UserError: a path holds no conversation file, or holds a file that this program does not read.
    """
    inputs: dict[tuple[Path, str | None], Input] = {}
    ignored: Counter[str] = Counter()
    for path in paths:
        for each in inputs_of(path, ignored):
            key = each.path.resolve(), each.member
            if key in inputs:
                ignored["files given twice"] += 1
            inputs.setdefault(key, each)
    return Found(list(inputs.values()), dict(ignored))


def inputs_of(path: Path, ignored: Counter[str]) -> list[Input]:
    """Return the inputs under one path, and count the other files in `ignored`."""
    if is_pipe(path):
        if is_standard_input(path):
            return inputs_of_file(spool(PIPE), STANDARD_INPUT, ignored)
        return inputs_of_file(spool(path), str(path), ignored)
    with reading(path):
        if path.is_dir():
            return inputs_of_folder(path, ignored)
        if path.exists():
            return inputs_of_file(path, str(path), ignored)
    if glob.has_magic(str(path)):
        matches = sorted(map(Path, glob.glob(str(path), recursive=True)), key=as_people_count)  # noqa: PTH207
        found = [each for match in matches for each in inputs_of(match, ignored)]
        if not found:
            raise UserError(f"--data {path}: no file matches this pattern")
        return found
    raise UserError(f"--data {path} does not exist; {advice_for_missing(str(path))}")


def advice_for_missing(path: str) -> str:
    if ADDRESS.match(path) and "huggingface.co" not in path:
        return "it is a web address: download it, then give the path of the file"
    if ADDRESS.match(path) or (DATA_SET.fullmatch(path) and PurePath(path).suffix.lower() not in NAMES):
        name = re.sub(r".*huggingface\.co/(datasets/)?", "", path)
        return (
            "give the path of your conversation file; to use a Hugging Face dataset, download it first:"
            f" hf download {name} --repo-type dataset --local-dir FOLDER, then --data FOLDER"
        )
    return "give the path of your conversation file"


def inputs_of_folder(folder: Path, ignored: Counter[str]) -> list[Input]:
    """Return the inputs in a folder and its subfolders."""
    if is_of_a_model(folder):
        raise UserError(f"--data {folder} is a run or model folder; give a conversation file instead")
    found, others = [], []
    for path in sorted(files_below(folder, ignored), key=as_people_count):
        if kind := ignored_kind(path):
            ignored[kind] += 1
            others.append(path)
        else:
            found += inputs_of_file(path, printable(str(path)), ignored, found=True)
    if not found:
        for path in others[:1]:
            named_input(path, str(path)).open().close()  # a known kind raises an error with advice
        raise UserError(f"--data {folder} has no conversation file ({', '.join(sorted(NAMES))}); choose another folder")
    return found


def files_below(folder: Path, ignored: Counter[str]) -> Iterator[Path]:
    """Yield all files below a folder except those of models and runs; count hidden and skipped folders in `ignored`."""

    def fail(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(folder, onerror=fail):
        for name in list(folders):
            if is_hidden(name) or is_of_a_model(Path(parent, name)):
                ignored["hidden folders" if is_hidden(name) else "folders of models and runs"] += 1
                folders.remove(name)
        yield from (Path(parent, name) for name in names)


def ignored_kind(path: PurePath) -> str | None:
    """Return the kind of a file to ignore in a folder or archive, for the counts; None for a file to read."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if any(map(is_hidden, path.parts)):
        return "hidden files"
    if suffixes[-1:] and suffixes[-1] in MEDIA_NAMES:
        return "images, audio and video"
    last = suffixes[-2:-1] if suffixes and suffixes[-1] in PACKED_NAMES else suffixes[-1:]
    if NO_CONVERSATIONS.fullmatch(path.name) or not NAMES.union((".zip",)).intersection(last):
        return "other files"
    return None


def is_hidden(name: str) -> bool:
    return (name.startswith(".") and name not in (".", "..")) or name == "__MACOSX"


def is_of_a_model(folder: Path) -> bool:
    return any((folder / name).exists() for name in OF_A_MODEL)


def as_people_count(path: PurePath | str) -> tuple[tuple[int, str] | tuple[int, int], ...]:
    """Return a sort key for natural order: 2 before 10, ignoring case."""
    pieces = re.split(r"([0-9]+)", str(path).lower())
    return tuple((0, int(piece)) if number % 2 else (1, piece) for number, piece in enumerate(pieces))


def inputs_of_file(path: Path, name: str, ignored: Counter[str], found: bool = False) -> list[Input]:
    """Return a file as its only input, or an archive as its members."""
    with reading(name):
        with open(path, "rb") as file:
            head = file.read(HEAD)
        if not head.startswith(ARCHIVE):
            return [named_input(path, name)._replace(found=found)]
        with zipfile.ZipFile(path) as archive:
            names = [member.filename for member in archive.infolist() if not member.is_dir()]
    if kind := packed_document(names):
        raise UserError(f"{name} is {kind}")
    kinds = {member: ignored_kind(PurePath(member)) for member in names}
    members = [
        member for member in sorted(names, key=lambda each: as_people_count(PurePath(each))) if not kinds[member]
    ]
    if chats := [member for member in members if PurePath(member).name == IOS_CHAT]:
        kinds |= dict.fromkeys(set(members) - set(chats), "other files")
        members = chats
    ignored.update(kind for kind in kinds.values() if kind)
    if not members:
        raise UserError(f"{name} has no conversation file ({', '.join(sorted(NAMES))}); unpack it and give the file")
    return [Input(printable(f"{name}/{member}"), path, member, found=found or len(members) > 1) for member in members]


def named_input(path: Path, name: str) -> Input:
    """Return the input for a file that is not an archive."""
    with open(path, "rb") as file:
        head = file.read(6)
    changed = head.startswith((*PACKED, *UTF_16, *ARROW))
    return Input(name, path, size=None if changed else path.stat().st_size)


def is_standard_input(path: Path) -> bool:
    return path in (PIPE, Path("/dev/stdin"), Path("/dev/fd/0"), Path("/proc/self/fd/0"))


def is_pipe(path: Path) -> bool:
    """Whether a path is standard input or another stream that can be read only once."""
    if is_standard_input(path):
        return True
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or stat.S_ISCHR(mode)


@cache
def spool(path: Path) -> Path:
    """Copy a pipe to a temporary file on the first call, because inputs are opened several times.

    Raises:
        UserError: nothing is piped into standard input, or several processes would read it.
    """
    check_one_process(f"reading --data {path}, a pipe,")
    if path == PIPE and sys.stdin.isatty():
        raise UserError("--data -: nothing is piped in; try: cat talk.txt | python finetune.py --data - ...")
    with reading(path), tempfile.NamedTemporaryFile(dir=spool_folder().name, delete=False) as copy:
        if path == PIPE:
            shutil.copyfileobj(sys.stdin.buffer, copy)
        else:
            with open(path, "rb") as file:
                shutil.copyfileobj(file, copy)
    return Path(copy.name)


@cache
def spool_folder() -> "tempfile.TemporaryDirectory[str]":
    """Return the temporary folder for copies of pipes; it is removed when the program ends."""
    return tempfile.TemporaryDirectory(prefix="conversations-")
