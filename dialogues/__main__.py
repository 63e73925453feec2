"""`python -m dialogues FILE...`: print conversation files as JSON Lines, and a summary of what was read."""

if __name__ == "__main__":  # before the slow imports, so that Ctrl-C during them also prints just one line
    from support.errors import run_script

    run_script("dialogues.__main__")

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from dialogues.dialogue import INSTRUCTION, Dialogue
from dialogues.layouts.account import judge_turns
from dialogues.opening import open_paths
from dialogues.private import mask_dialogue
from dialogues.reading import Source
from settings import ReadSettings
from support.command_line import parse_command_line
from support.errors import UserError, amount, display, printable

MOST_NAMED = 6  # maximum number of speakers and of fields to list in the summary


def main(arguments: Sequence[str] | None = None) -> None:
    """Read all files; print their dialogues in the `turns` format, one per line, and then a summary on standard error.

    Nothing is printed on standard output unless every file can be read.
    """
    settings = parse_command_line(ReadSettings, arguments)
    lines: list[str] = []
    summary: list[str] = []
    try:
        opened = open_paths(settings.paths, settings)
        for source in opened.sources:
            dialogues, account = read_source(source, settings)
            lines += dialogues
            summary += account
    except UserError as error:  # standard output is for JSON only
        display(*summary, *error.account, file=sys.stderr)
        raise UserError(str(error)) from None
    sys.stdout.reconfigure(encoding="utf-8")  # pyright: ignore[reportAttributeAccessIssue]
    try:
        display(*lines)
    finally:  # even if the reader of a pipe, such as `head`, has ended
        display(*summary, *opened.notes, file=sys.stderr)


def read_source(source: Source, settings: ReadSettings) -> tuple[list[str], list[str]]:
    """Return the dialogues of one file as lines of JSON, and its summary.

    Raises:
        UserError: a record is damaged, the file has no conversation, or too many turns are skipped.
    """
    lines: list[str] = []
    speakers: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    for dialogue in read_dialogues(source):
        skipped.update(dialogue.skipped)
        if len(dialogue.turns) < 2:
            skipped["single turns"] += len(dialogue.turns)
            continue
        dialogue = mask_dialogue(dialogue)[0] if settings.mask else dialogue
        speakers.update(turn.speaker for turn in dialogue.turns)
        lines.append(printable(json.dumps(as_record(dialogue), ensure_ascii=False), json=True))
    summary = describe(source, len(lines), speakers, +skipped)
    problem = "" if settings.allow_loss else judge_turns(speakers.total(), skipped)
    if not lines:
        problem = f"no dialogue of two turns or more; it was read as {source.format} (see --format and --pause-hours)"
    elif not problem and len(speakers) == 1:
        problem = f"only {next(iter(speakers))} speaks; a conversation needs two speakers"
    if problem:
        raise UserError(f"{source.input}: {problem}", summary)
    return lines, summary


def read_dialogues(source: Source) -> Iterator[Dialogue]:
    for number, record in source.records:
        yield from source.dialogues(number, record, join=False)


def as_record(dialogue: Dialogue) -> dict[str, Any]:
    """Return a dialogue in the `turns` format, with its system prompt if it has one, and weight 0 for context turns."""
    turns: list[dict[str, Any]] = [turn._asdict() for turn in dialogue.turns]
    for place in dialogue.context:
        turns[place]["weight"] = 0
    return {"turns": turns} if dialogue.instruction == INSTRUCTION else {"system": dialogue.instruction, "turns": turns}


def describe(source: Source, dialogues: int, speakers: Counter[str], skipped: Counter[str]) -> list[str]:
    """Return the summary of a file as lines to print."""
    named = ", ".join(f"{name[:40]} {count:,}" for name, count in speakers.most_common(MOST_NAMED))
    more = f" and {len(speakers) - MOST_NAMED:,} more" if len(speakers) > MOST_NAMED else ""
    lines = [
        f"{source.input}: {source.format}, {amount(dialogues, 'dialogue')}, {amount(speakers.total(), 'turn')};"
        f" {named}{more}",
        *source.account,
    ]
    if skipped:
        lines.append(f"skipped: {', '.join(f'{why} ({count:,})' for why, count in skipped.most_common())}")
    if source.not_used:
        lines.append(f"not used: the fields {', '.join(map(repr, source.not_used[:MOST_NAMED]))}")
    return lines
