"""How a dialogue becomes text and tokens: the same pieces for training, for generation and for reading it back.

The `prompt` template, one blank line between the turns:

    The following is a conversation between two people.

    ### Alex:
    Did you sleep well?

    ### Bob:
    Like a log.<|endoftext|>

Every label and every text is encoded on its own. Where training ends a label, generation starts with the very same
tokens; and what stands in somebody's text, `<|endoftext|>` included, can only ever be text.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import tiktoken

from dialogues.dialogue import INSTRUCTION, Dialogue, Turn
from dialogues.tokenizer import END_OF_TEXT

LABEL = re.compile(r"\n\n### ([^\n]+):\n")


class EncodedDialogue(NamedTuple):
    """Token ids of a dialogue, and where each turn ends in them.

    The instruction belongs to the first turn, the end-of-text token to the last: turn n is
    `tokens[turn_ends[n - 1]:turn_ends[n]]`, and together the turns are all of it.
    """

    tokens: list[int]
    turn_ends: list[int]


def label(speaker: str) -> str:
    return f"\n\n### {speaker}:\n"


def pieces(dialogue: Dialogue) -> list[str]:
    """The texts that are encoded on their own: the instruction, then label and text of each turn."""
    turns = [piece for turn in dialogue.turns for piece in (label(turn.speaker), turn.text)]
    return [dialogue.instruction, *turns] if dialogue.instruction else ["", turns[0].lstrip(), *turns[1:]]


def render(dialogue: Dialogue) -> str:
    """The dialogue as one text, as the model sees it."""
    return "".join(pieces(dialogue)) + END_OF_TEXT


def encode(dialogue: Dialogue, tokenizer: tiktoken.Encoding) -> EncodedDialogue:
    """Token ids of `render(dialogue)`, piece by piece."""
    tokens, ends = [], []
    for piece in pieces(dialogue):
        tokens += tokenizer.encode_ordinary(piece)
        ends.append(len(tokens))
    tokens.append(tokenizer.eot_token)
    return EncodedDialogue(tokens, turn_ends=[*ends[2:-1:2], len(tokens)])


def encode_prompt(dialogue: Dialogue, turn: int, tokenizer: tiktoken.Encoding) -> list[int]:
    """The tokens before the text of `dialogue.turns[turn]`: the model speaks next, as that turn's speaker."""
    before = pieces(dialogue)[: 2 + 2 * turn]  # the instruction, the turns before, and the label
    return [token for piece in before for token in tokenizer.encode_ordinary(piece)]


def parse_turns(generated: str, first_speaker: str) -> list[Turn]:
    """Read generated text back as turns; what stands before the first label is said by `first_speaker`."""
    first, *rest = LABEL.split(generated)
    turns = [Turn(first_speaker, first.strip())]
    turns += [Turn(speaker, text.strip()) for speaker, text in zip(rest[::2], rest[1::2], strict=True)]
    return turns


def describe(dialogues: Sequence[Dialogue]) -> dict[str, Any]:
    """What `dialogue.json` says: how a model trained on `dialogues` has learned to see a conversation."""
    speakers = list(dict.fromkeys(turn.speaker for dialogue in dialogues for turn in dialogue.turns))
    return {"template": "prompt", "instruction": INSTRUCTION, "speakers": speakers, "learn": "all"}


def newest_turns(tokens: list[int], limit: int, tokenizer: tiktoken.Encoding) -> list[int]:
    """The newest whole turns of `tokens` that fit in `limit`: where a conversation that outgrew the model goes on.

    Where whole turns would leave less than half of `limit` (one long turn), the cut is made inside a turn instead.
    """
    if len(tokens) <= limit:
        return tokens
    marker = tokenizer.encode_ordinary("\n\n###")
    oldest = len(tokens) - limit
    for start in range(oldest, len(tokens) - limit // 2):
        if tokens[start : start + len(marker)] == marker:
            return tokens[start:]
    return tokens[oldest:]
