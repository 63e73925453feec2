"""Encode the records of files as `Conversations`, block by block; large files on all cores."""

import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache, partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tqdm import tqdm

from dialogues.conversations import UNCHANGED, Block, Changes, Conversations, encode_block
from dialogues.layouts.formats import FORMATS
from dialogues.reading import Source, name_formats, name_sources
from dialogues.template import Renderer
from dialogues.tokenizer import load_tokenizer
from support.errors import UserError, amount

BLOCK = 1000  # records to send to a worker process at a time
LARGE = 16_000_000  # start worker processes for files above this size, in bytes

Item = TypeVar("Item")
Result = TypeVar("Result")


@cache
def make_renderer(vocabulary: Path, template: str) -> Renderer:
    return Renderer(load_tokenizer(vocabulary), template)


class Piece(NamedTuple):
    """A block of a file's records, as sent to a worker process.

    `file` is the index of the file among the sources; `source` comes without its records.
    """

    file: int
    source: Source
    records: list[tuple[int, Any]]


def encode_source(
    source: Source | Sequence[Source],
    vocabulary: Path,
    template: str,
    learn: str = "all",
    changes: Changes = UNCHANGED,
) -> Conversations:
    """Read, render and tokenize whole files, one after another, with the vocabulary of a model folder.

    Raises:
        UserError: a record is broken, there is no dialogue or only one speaker, or --rename names nobody.
    """
    sources = [source] if isinstance(source, Source) else source
    name = name_sources(sources)
    encode = partial(encode_piece, vocabulary, template, changes)
    lines = {each.input.path for each in sources if each.unit == "line"}
    large = sum(path.stat().st_size for path in lines) > LARGE
    encoded = (map_in_processes if large else map)(encode, pieces_of(sources))
    conversations = Conversations(make_renderer(vocabulary, template), shown(encoded, sources), learn, changes.rename)
    if len(sources) > 1:
        conversations.origins = [f"{each.input} {each.unit}" for each in sources]
    account = account_of(sources, conversations)
    if not len(conversations):
        raise UserError(
            f"{name}: no dialogue of two turns or more; it was read as {name_formats(sources)}"
            " (see --format and --pause-hours)",
            account,
        )
    if unknown := changes.rename.keys() - conversations.renamed:
        names = conversations.name_speakers()
        raise UserError(f"--rename {unknown.pop()}=...: no speaker in {name} has that name; the speakers are {names}")
    if len(conversations.speakers) == 1:
        raise UserError(f"{name}: only {conversations.speakers[0]} speaks; a conversation needs two speakers", account)
    return conversations


def account_of(sources: Sequence[Source], conversations: Conversations) -> list[str]:
    """Return a summary of files that can't be used for training, as lines to print."""
    lines = [f"{source.input}: {line}" for source in sources for line in source.account]
    lines += [f"skipped: {why} ({count:,})" for why, (count, _) in conversations.skipped.items()]
    if len(conversations):
        lines.append(f"read: {amount(len(conversations), 'dialogue')}; {conversations.name_speakers()}")
    return lines


def pieces_of(sources: Sequence[Source]) -> Iterator[Piece]:
    """Yield the records of all files, one block at a time."""
    for file, source in enumerate(sources):
        records = iter(source.records)
        for block in iter(lambda records=records: list(islice(records, BLOCK)), []):
            yield Piece(file, source._replace(records=()), block)


def encode_piece(vocabulary: Path, template: str, changes: Changes, piece: Piece) -> tuple[Block, int, int]:
    """Return a block of records as arrays, with their number, and their size in bytes if they are lines."""
    file, source, records = piece
    dialogues = ((number, dialogue) for number, record in records for dialogue in source.dialogues(number, record))
    block = encode_block(make_renderer(vocabulary, template), dialogues, changes)._replace(file=file)
    return block, len(records), sum(len(record) for _, record in records if isinstance(record, bytes))


def shown(encoded: Iterable[tuple[Block, int, int]], sources: Sequence[Source]) -> Iterator[Block]:
    """Yield the blocks and show a progress bar if reading takes longer than a second."""
    lines = [source.unit == "line" and source.format in FORMATS for source in sources]
    sizes = [source.size for source in sources if source.size is not None]
    in_bytes, known = all(lines), len(sizes) == len(sources) and all(lines) == any(lines)
    total, unit = sum(sizes) if known else None, "B" if in_bytes else " dialogues"
    with tqdm(desc="reading", total=total, unit=unit, unit_scale=True, delay=1, leave=False, disable=None) as bar:
        for block, count, size in encoded:
            bar.update(size if in_bytes else count)
            yield block


def map_in_processes(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Apply `function` on all cores and yield the results in order, processing only a few items at a time."""
    processes = os.cpu_count() or 1
    pending = deque()
    with ProcessPoolExecutor(processes, get_context("spawn"), ignore_interrupts) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > 2 * processes:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise UserError("a process reading the data was killed; if memory ran out, use less data") from None
        finally:
            for future in pending:
                future.cancel()


def ignore_interrupts() -> None:
    """Ignore Ctrl-C: the terminal sends it to every process, and only the main process should handle it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
