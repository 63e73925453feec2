"""Text files without times: `Name: text` in many variants."""

import re

from dialogues.dialogue import INSTRUCTION, Dialogue
from dialogues.layouts.account import Account
from dialogues.layouts.records import FormatError, make_turn
from dialogues.layouts.shapes import CODE, CUT, FOOTERS, RULE, Shape, Start, find_headings, is_label, split_blocks
from dialogues.layouts.words import ROLES, SYSTEM, plain

TIME_MARK = re.compile(r"^\[\d\d?:\d\d(?::\d\d)?\]\s|\s\#\d\d:\d\d:\d\d-\d\#$")  # times around each text (Descript, f4)
TITLE = 5  # maximum number of lines above the first turn that may form a title


def dialogues_of_lines(lines: list[tuple[int, str]], shape: Shape, account: Account) -> list[tuple[int, Dialogue]]:
    """Return the dialogues of a text, each with the number of its first line.

    Raises:
        FormatError: a dialogue begins with a line without a speaker.
    """
    found, title = [], find_title(lines, shape.starts)
    account.markup += sum(len(lines[place][1]) for place in title)
    for block in split_blocks(lines, set(shape.starts)):
        block = [place for place in block if place not in title]
        numbered = read_block(block, lines, shape, account)
        if numbered:
            found.append(numbered)
    headings = find_headings(lines)
    for place, (_, line) in enumerate(lines):
        if line == CUT:
            account.markup += len("<|startoftext|>")
        elif RULE.match(line) or place in headings:
            account.markup += len(line)
    account.as_text.update(start.name for start in shape.rejected)
    return found


def find_title(lines: list[tuple[int, str]], starts: dict[int, Start]) -> set[int]:
    """Return the positions of the title: a few lines at the top, with a blank line below."""
    first = min(starts, default=0)
    filled = [place for place in range(first) if lines[place][1] not in ("", CUT)]
    if not filled or len(filled) > TITLE or lines[first - 1][1] or any(len(lines[place][1]) > 120 for place in filled):
        return set()
    return set(filled)


def read_block(
    block: list[int], lines: list[tuple[int, str]], shape: Shape, account: Account
) -> tuple[int, Dialogue] | None:
    turns: list[tuple[int, str, list[str]]] = []
    for place in block:
        number, line = lines[place]
        if start := shape.starts.get(place):
            turns.append((number, start.name, [start.text]))
            account.markup += len(line) - len(start.text)
        elif (
            turns
            and line
            and shape.kind == "bare"
            and turns[-1][1].isupper()
            and turns[-1][2][-1:] == [""]
            and turns[-1][2][1:]
        ):
            account.lose(f"line {number}: {line[:40]!r}", len(line))  # a stage direction between the speeches of a play
        elif turns and place > len(lines) - 5 and FOOTERS.match(line):
            account.markup += len(line)
        elif turns:
            turns[-1][2].append(line.removeprefix(CODE))
        elif line and is_label(line.partition(":")[0]) and ":" in line:
            account.markup += len(line)  # `Date: ...` above a dialogue
        elif line:
            raise FormatError(
                f"line {number}: no speaker for this line; a dialogue begins with `Name: text`"
                " (if texts contain blank lines, separate dialogues by a line of ---)"
            )
    said = [(number, name, TIME_MARK.sub("", "\n".join(texts).strip()).strip()) for number, name, texts in turns]
    instruction = INSTRUCTION
    if len(said) > 2 and plain(said[0][1]) in SYSTEM and all(plain(name) in ROLES for _, name, _ in said[1:]):
        instruction = said.pop(0)[2] or INSTRUCTION
        account.spoken += len(instruction)
    kept = [make_turn(name, text, f"line {number}") for number, name, text in said if text]
    account.spoken += sum(len(turn.text) for turn in kept)
    skipped = ("empty turns",) * (len(said) - len(kept))
    return (turns[0][0], Dialogue(tuple(kept), instruction, skipped)) if turns else None
