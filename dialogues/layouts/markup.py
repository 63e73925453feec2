"""Texts in which a chat template's markers name the speakers: ChatML, Llama, Gemma, Vicuna, Alpaca and others."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from dialogues.dialogue import INSTRUCTION, Dialogue, Turn
from dialogues.layouts.account import Account
from dialogues.layouts.records import make_turn
from dialogues.layouts.words import ASSISTANT, ROLES, SYSTEM, TOOLS, USER, plain

WHO = (
    r"(?P<role>[Uu]ser|[Aa]ssistant|[Ss]ystem|[Hh]uman|[Bb]ot|[Pp]rompter|[Mm]odel|[Tt]ool|GPT|AI|USER"
    r"|ASSISTANT|SYSTEM)"
)


class Template(NamedTuple):
    """The patterns of a chat template for the start (with a group `role`) and the end of a turn."""

    start: re.Pattern[str]
    ends: re.Pattern[str]


TEMPLATES = (
    Template(re.compile(r"<\|im_start\|>\s?(?P<role>\w[\w ]{0,30})\n?"), re.compile(r"<\|im_end\|>|<\|endoftext\|>")),
    Template(
        re.compile(r"<\|start_header_id\|>(?P<role>\w{1,30})<\|end_header_id\|>"),
        re.compile(r"<\|eot_id\|>|<\|begin_of_text\|>|<\|end_of_text\|>"),
    ),
    Template(re.compile(r"<start_of_turn>(?P<role>\w{1,30})\n?"), re.compile(r"<end_of_turn>|<bos>|<eos>")),
    Template(re.compile(rf"<\|{WHO}\|>:?"), re.compile(r"<\|(?:end|eot|endoftext|end_of_text|im_end)\|>|</?s>")),
    Template(re.compile(r"(?P<role>\[/?INST\])"), re.compile(r"</?s>|<<SYS>>.{0,4000}?<</SYS>>", re.DOTALL)),
    Template(
        re.compile(rf"(?:(?<=\n)|^|(?<=[^#\n]))#{{2,4}}\s?{WHO}:\s?"),
        re.compile(r"</?s>|<\|endoftext\|>|<\|end\|>"),
    ),
    Template(
        re.compile(r"#{2,4}\s?(?P<role>Instruction|Input|Response|Question|Answer|Prompt|Output):?\s*\n"),
        re.compile(r"</?s>|<\|endoftext\|>|#{2,4}\s?End"),
    ),
    Template(re.compile(rf"(?:\n\n|^){WHO}:\s?"), re.compile(r"</?s>|<\|endoftext\|>")),
    Template(re.compile(r"(?:^|(?<=\s)|(?<=</s>))(?P<role>USER|ASSISTANT|SYSTEM):\s?"), re.compile(r"</?s>")),
)
BRACKETS = {"[INST]": USER, "[/INST]": ASSISTANT}
SEPARATED = re.compile(r"\s?__eou__\s?|\s?<(?:eou|EOU|turn|sep|SEP)>\s?|\s?\[SEP\]\s?|\s?<\|sep\|>\s?")  # DailyDialog


class Said(NamedTuple):
    role: str
    text: str
    behind: str  # the text after the end marker


def find_template(texts: list[str]) -> Template | None:
    """Return the template that finds two or more speakers in most of the texts; None if no template does."""
    for template in TEMPLATES:
        found = 0
        for text in texts:
            roles = {match["role"].lower() for match in template.start.finditer(text)}
            found += len(roles) > 1
        if found > 0.9 * len(texts):
            return template
    return None


def split_turns(text: str, template: Template) -> tuple[str, list[Said]]:
    """Return the text before the first marker, and the turns; a text without markers has no turns."""
    matches = list(template.start.finditer(text))
    if not matches:
        return text, []
    before = template.ends.sub(clean_system, text[: matches[0].start()]).strip()
    turns = []
    for match, following in zip(matches, [*matches[1:], None], strict=True):
        said = text[match.end() : following.start() if following else len(text)]
        end = None
        for end in template.ends.finditer(said):
            if not end[0].startswith("<<SYS"):
                break
        body = said[: end.start()] if end and not end[0].startswith("<<SYS") else said
        behind = said[end.end() :] if end else said[len(said.rstrip()) :]
        if system := re.match(r"\s*<<SYS>>(.*?)<</SYS>>", body, re.DOTALL):
            before, body = system[1].strip(), body[system.end() :]
        turns.append(Said(match["role"], body.strip(), behind))
    return before, turns


def clean_system(match: re.Match[str]) -> str:
    return match[0].removeprefix("<<SYS>>").removesuffix("<</SYS>>") if "SYS" in match[0] else ""


def name_of(role: str) -> str | None:
    """Return the speaker for a role; None for the system and for tools."""
    word = plain(role)
    if role in BRACKETS:
        return BRACKETS[role]
    if word in SYSTEM or word in TOOLS:
        return None
    return ROLES.get(word, role.strip())


def dialogues_of_template(text: str, template: Template, account: Account, whole: bool = False) -> Iterator[Dialogue]:
    """Yield the dialogues of a text in a chat template.

    Unless the text is a `whole` dialogue, a new dialogue begins at a system turn. One also begins after an end-of-text
    token or an empty line, if some turns are followed by one and others are not.
    """
    instruction, said = split_turns(text, template)
    gaps = [any(mark in turn.behind for mark in ("\n\n", "<|endoftext|>", "<s>")) for turn in said]
    apart = not whole and any(gaps[:-1]) and not all(gaps[:-1])
    turns: list[Turn] = []
    skipped: list[str] = []
    for turn, gap in zip(said, gaps, strict=True):
        name = name_of(turn.role)
        if name is None and plain(turn.role) in SYSTEM:
            if turns and not whole:
                yield Dialogue(tuple(turns), instruction or INSTRUCTION, tuple(skipped))
                turns, skipped = [], []
            instruction = turn.text
        elif name is None or not turn.text:
            skipped.append("tool calls" if name is None else "messages without text")
        else:
            turns.append(make_turn(name, turn.text, "a turn"))
            account.spoken += len(turn.text)
        if gap and apart and turns:
            yield Dialogue(tuple(turns), instruction or INSTRUCTION, tuple(skipped))
            turns, skipped = [], []
    if turns or skipped or whole:
        yield Dialogue(tuple(turns), instruction or INSTRUCTION, tuple(skipped))
