"""From a file's records to `Conversations`: a large file on all cores, and never as objects all at once."""

import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache, partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from dialogues.conversations import UNCHANGED, Block, Changes, Conversations, encode_block
from dialogues.formats import FORMATS
from dialogues.reading import Source
from dialogues.template import Renderer
from dialogues.tokenizer import load_tokenizer
from support.errors import UserError

BLOCK = 1000  # records that travel to another process together
LARGE = 16_000_000  # bytes of a file of lines from which on other processes are worth their start

Item = TypeVar("Item")
Result = TypeVar("Result")


@cache
def make_renderer(vocabulary: Path, template: str) -> Renderer:
    return Renderer(load_tokenizer(vocabulary), template)


def encode_source(
    source: Source, vocabulary: Path, template: str, learn: str = "all", changes: Changes = UNCHANGED
) -> Conversations:
    """Read, render and tokenize a whole file with the vocabulary of a model folder.

    Raises:
        UserError: a broken record, no dialogues at all, or a name that nobody has.
    """
    records = iter(source.records)
    blocks = iter(lambda: list(islice(records, BLOCK)), [])
    encode = partial(encode_records, source._replace(records=()), vocabulary, template, changes)
    large = source.unit == "line" and source.input.path.stat().st_size > LARGE
    encoded = map_in_processes(encode, blocks) if large else map(encode, blocks)
    conversations = Conversations(make_renderer(vocabulary, template), shown(encoded, source), learn, changes.rename)
    if not len(conversations):
        raise UserError(f"{source.input}: no dialogue of two turns or more; it was read as {source.format}")
    if unknown := changes.rename.keys() - conversations.renamed:
        names = conversations.name_speakers()
        raise UserError(f"--rename {unknown.pop()}=...: nobody in {source.input} has that name; there are {names}")
    if len(conversations.speakers) == 1:
        raise UserError(f"{source.input}: only {conversations.speakers[0]} speaks; a conversation needs two")
    return conversations


def encode_records(
    source: Source,
    vocabulary: Path,
    template: str,
    changes: Changes,
    records: list[tuple[int, Any]],
) -> tuple[Block, int]:
    """Some records as arrays, and their size in the unit of `source.size`."""
    dialogues = ((number, dialogue) for number, record in records for dialogue in source.dialogues(number, record))
    block = encode_block(make_renderer(vocabulary, template), dialogues, changes)
    return block, sum(len(record) if isinstance(record, bytes) else 1 for _, record in records)


def shown(encoded: Iterable[tuple[Block, int]], source: Source) -> Iterator[Block]:
    """The blocks, while a bar shows how far they are; reading that takes a moment shows none."""
    unit = "B" if source.unit == "line" and source.format in FORMATS else " dialogues"
    with tqdm(desc="reading", total=source.size, unit=unit, unit_scale=True, delay=1, leave=False, disable=None) as bar:
        for block, size in encoded:
            bar.update(size)
            yield block


def map_in_processes(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`map` on all cores, in order, with a few items under way at a time."""
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
            raise UserError("a process that reads the data was killed; was there memory enough?") from None
        finally:
            for future in pending:
                future.cancel()


def ignore_interrupts() -> None:
    """Ctrl-C reaches every process of a terminal; the first one alone answers it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
