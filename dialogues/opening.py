"""Find and recognise the files of `--data`, and report files that are not read."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from dialogues.inputs import NotConversationsError, find_inputs
from dialogues.private import check_masking
from dialogues.reading import Source, open_source
from settings import FormatSettings
from support.errors import amount

NAMED = 3  # maximum number of unread files to name with the reason


class Opened(NamedTuple):
    """Recognised sources, and sentences about files that are not read."""

    sources: list[Source]
    notes: list[str]


def open_paths(paths: Iterable[Path], settings: FormatSettings) -> Opened:
    """Recognise the files, folders, archives and pipes under some paths.

    A file without conversations is left out if it was found in a folder or an archive; if it was named, it is an error.

    Raises:
        UserError: a path holds no conversations, or a package that an option needs is not installed.
    """
    if settings.mask:
        check_masking()
    open_one = partial(
        open_source,
        format=settings.format,
        pause_hours=settings.pause_hours,
        columns=settings.named_columns,
        allow_loss=settings.allow_loss,
    )
    found, sources, failures = find_inputs(paths), [], []
    for input in found.inputs:
        try:
            sources.append(open_one(input))
        except NotConversationsError as error:
            if not input.found:
                raise
            failures.append(error)
    if not sources:
        raise failures[0]
    notes = [f"not read: {failure}" for failure in failures[:NAMED]]
    if len(failures) > NAMED:
        notes.append(f"not read: {amount(len(failures) - NAMED, 'more file')} without conversations")
    if found.ignored:
        notes.append("not read: " + ", ".join(f"{kind} ({count:,})" for kind, count in found.ignored.items()))
    return Opened(sources, notes)
