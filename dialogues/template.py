"""How a dialogue becomes text and tokens: the same pieces for training, for generation and for reading it back.

Every template is an instruction line, then for each turn a *stop* (what stands between two turns, and by which a
speaker ends), a *label* and the text, and at last the end-of-text token. `prompt`, with its stops in brackets:

    The following is a conversation between two people.[

    ###] Alex:
    Did you sleep well?[

    ###] Bob:
    Like a log.<|endoftext|>

Labels and texts are encoded on their own. Where training ends a label, generation starts with the very same tokens;
and what stands in somebody's text, `<|endoftext|>` included, can only ever be text.
"""

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import tiktoken

from dialogues.dialogue import Dialogue, Turn
from dialogues.tokenizer import END_OF_TEXT, END_OF_TURN, add_tokens, encode_text, speaker_token
from support.errors import UserError


class Template(NamedTuple):
    stop: str
    label: str  # of a speaker {}
    space: str = ""  # before a text and encoded with it, since BPE's tokens begin with their space


TEMPLATES = {
    "prompt": Template("\n\n###", " {}:\n"),
    "labels": Template("\n", "{}:", " "),
    "alpaca": Template("\n\n###", " {}:\n"),  # the same form; its instruction lines and speakers are Alpaca's
    "tokens": Template(END_OF_TURN, speaker_token("{}")),
}


class EncodedDialogue(NamedTuple):
    """Token ids of a dialogue, and `(start, end)` of each turn's text in them. Labels and stops lie in between."""

    tokens: list[int]
    texts: list[tuple[int, int]]


def render(dialogue: Dialogue, template: str = "prompt") -> str:
    """The dialogue as one text, as the model sees it."""
    stop, label, space = TEMPLATES[template]
    turns = stop.join(label.format(speaker) + space + text for speaker, text in dialogue.turns)
    if template == "tokens":
        return dialogue.instruction + turns + stop + END_OF_TEXT
    return (dialogue.instruction + stop if dialogue.instruction else stop.lstrip()) + turns + END_OF_TEXT


class Renderer:
    """Dialogues to token ids and back, for one vocabulary and one template."""

    def __init__(self, tokenizer: tiktoken.Encoding, template: str = "prompt", speakers: Iterable[str] = ()) -> None:
        """With the `tokens` template, the tokenizer gets the tokens of `speakers` and of the end of a turn.

        Raises:
            UserError: a speaker's token has a meaning already.
        """
        self.name = template
        self.template = TEMPLATES[template]
        self.has_tokens = template == "tokens"
        if self.has_tokens:
            tokenizer = add_tokens(tokenizer, [END_OF_TURN])
            taken = {END_OF_TURN, END_OF_TEXT}
            tokens = list(map(speaker_token, speakers))
            if clashing := taken & set(tokens):
                raise UserError(f"a speaker's token would be {clashing.pop()}, which has a meaning already; --rename")
            tokenizer = add_tokens(tokenizer, tokens)
        self.tokenizer = tokenizer
        self.stop = self.mark(self.template.stop)
        self.label = lru_cache(10_000)(self.encode_label)
        self.beginning = lru_cache(1000)(self.encode_beginning)

    def mark(self, text: str) -> list[int]:
        """The ids of a stop or label: one special token in `tokens` (the end of text's, if there is none yet)."""
        if self.has_tokens:
            return [self.tokenizer._special_tokens.get(text, self.tokenizer.eot_token)]
        return encode_text(self.tokenizer, text)

    def encode_label(self, speaker: str) -> list[int]:
        return self.mark(self.template.label.format(speaker))

    def encode_beginning(self, instruction: str) -> list[int]:
        """What stands before the first label: the instruction and a stop, or for no instruction what is left of it."""
        tokens = encode_text(self.tokenizer, instruction)
        if self.has_tokens:
            return tokens
        return tokens + self.stop if instruction else self.tokenizer.encode_ordinary(self.template.stop.lstrip())

    def encode(self, dialogue: Dialogue) -> EncodedDialogue:
        """The dialogue as token ids, piece by piece."""
        space = self.template.space
        tokens = list(self.beginning(dialogue.instruction))
        texts = []
        for speaker, text in dialogue.turns:
            if texts:
                tokens += self.stop
            tokens += self.label(speaker)
            start = len(tokens)
            tokens += encode_text(self.tokenizer, space + text)
            texts.append((start, len(tokens)))
        if self.has_tokens:
            tokens += self.stop
        tokens.append(self.tokenizer.eot_token)
        return EncodedDialogue(tokens, texts)

    def encode_prompt(self, dialogue: Dialogue, turn: int) -> list[int]:
        """The tokens before the text of `dialogue.turns[turn]`: the model speaks next, as that turn's speaker."""
        tokens, texts = self.encode(dialogue)
        return tokens[: texts[turn][0]]

    def parse_turns(self, generated: str, first_speaker: str, speakers: Iterable[str]) -> list[Turn]:
        """Read generated text back as turns; what stands before the first label is said by `first_speaker`.

        A label is recognised by what stands around the name; in `labels`, where that is little, it must be of one of
        `speakers`.
        """
        stop, label, space = self.template
        name = "|".join(map(re.escape, speakers)) if self.name == "labels" else "[^\n]+?"
        before, after = map(re.escape, label.split("{}"))
        labels = re.compile(f"{re.escape(stop)}{before}({name}){after}{space and '(?: |$)'}")
        unfinished = "[^\n]*" if label.endswith("\n") else ""  # a label that was cut off by the limit
        first, *rest = labels.split(re.sub(f"{re.escape(stop)}{unfinished}\\Z", "", generated))
        turns = [Turn(first_speaker, first.strip())]
        return turns + [Turn(speaker, text.strip()) for speaker, text in zip(rest[::2], rest[1::2], strict=True)]

    def newest_turns(self, tokens: list[int], limit: int) -> list[int]:
        """The newest whole turns of `tokens` that fit in `limit`: where a conversation that outgrew the model goes on.

        Where whole turns would leave less than half of `limit` (one long turn), the cut is made inside a turn instead.
        """
        if len(tokens) <= limit:
            return tokens
        oldest = len(tokens) - limit
        for start in range(oldest, len(tokens) - limit // 2):
            if tokens[start : start + len(self.stop)] == self.stop:
                return tokens[start:]
        return tokens[oldest:]
