"""Render a dialogue as text and tokens; training, generation and the parsing of replies share the same pieces.

Every template begins with an instruction line. Each turn has a *label* and a text; a *stop* comes between two turns and
ends the first of them. The end-of-text token comes last. This is `prompt`, with its stops in brackets:

    The following is a conversation between two people.[

    ###] Alex:
    Did you sleep well?[

    ###] Bob:
    Like a log.<|endoftext|>

Labels and texts are encoded separately. So generation starts with exactly the tokens of a label in training, and
everything in a text, even `<|endoftext|>`, is encoded as ordinary text.
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
    label: str  # with {} for the speaker
    space: str = ""  # precedes a text and is encoded with it, because BPE tokens begin with their space


TEMPLATES = {
    "prompt": Template("\n\n###", " {}:\n"),
    "labels": Template("\n", "{}:", " "),
    "alpaca": Template("\n\n###", " {}:\n"),  # the same format, with Alpaca's instruction lines and speakers
    "tokens": Template(END_OF_TURN, speaker_token("{}")),
}


class EncodedDialogue(NamedTuple):
    """Token ids of a dialogue, and `(start, end)` of each turn's text in them. Labels and stops are in between."""

    tokens: list[int]
    texts: list[tuple[int, int]]


def render(dialogue: Dialogue, template: str = "prompt") -> str:
    """Return the dialogue as one text, as the model sees it."""
    stop, label, space = TEMPLATES[template]
    turns = stop.join(label.format(speaker) + space + text for speaker, text in dialogue.turns)
    if template == "tokens":
        return dialogue.instruction + turns + stop + END_OF_TEXT
    return (dialogue.instruction + stop if dialogue.instruction else stop.lstrip()) + turns + END_OF_TEXT


class Renderer:
    """Converts dialogues to token ids and back, for one vocabulary and one template."""

    def __init__(self, tokenizer: tiktoken.Encoding, template: str = "prompt", speakers: Iterable[str] = ()) -> None:
        """With the `tokens` template, add tokens for `speakers` and for the end of a turn to the tokenizer.

        Raises:
            UserError: a speaker's token already has a different meaning.
        """
        self.name = template
        self.template = TEMPLATES[template]
        self.has_tokens = template == "tokens"
        if self.has_tokens:
            tokenizer = add_tokens(tokenizer, [END_OF_TURN])
            taken = {END_OF_TURN, END_OF_TEXT}
            tokens = list(map(speaker_token, speakers))
            if clashing := taken & set(tokens):
                raise UserError(f"the speaker token {clashing.pop()} clashes with a special token; use --rename")
            tokenizer = add_tokens(tokenizer, tokens)
        self.tokenizer = tokenizer
        self.stop = self.mark(self.template.stop)
        self.label = lru_cache(10_000)(self.encode_label)
        self.beginning = lru_cache(1000)(self.encode_beginning)

    def mark(self, text: str) -> list[int]:
        """Return the ids of a stop or label: in `tokens`, one special token (end of text if it does not exist yet)."""
        if self.has_tokens:
            return [self.tokenizer._special_tokens.get(text, self.tokenizer.eot_token)]
        return encode_text(self.tokenizer, text)

    def encode_label(self, speaker: str) -> list[int]:
        return self.mark(self.template.label.format(speaker))

    def encode_beginning(self, instruction: str) -> list[int]:
        """Return the tokens before the first label: the instruction and a stop, or a stop without its line breaks."""
        tokens = encode_text(self.tokenizer, instruction)
        if self.has_tokens:
            return tokens
        return tokens + self.stop if instruction else self.tokenizer.encode_ordinary(self.template.stop.lstrip())

    def encode(self, dialogue: Dialogue) -> EncodedDialogue:
        """Return the dialogue as token ids, encoded piece by piece."""
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
        """Return the tokens before the text of `dialogue.turns[turn]`; the model continues as that turn's speaker."""
        tokens, texts = self.encode(dialogue)
        return tokens[: texts[turn][0]]

    def parse_turns(self, generated: str, first_speaker: str, speakers: Iterable[str]) -> list[Turn]:
        """Read generated text back as turns; the text before the first label belongs to `first_speaker`.

        A label is recognised by the characters around the name. In `labels`, which has few of them, the name must also
        be one of `speakers`.
        """
        stop, label, space = self.template
        name = "|".join(map(re.escape, speakers)) if self.name == "labels" else "[^\n]+?"
        before, after = map(re.escape, label.split("{}"))
        labels = re.compile(f"{re.escape(stop)}{before}({name}){after}{space and '(?: |$)'}")
        unfinished = "[^\n]*" if label.endswith("\n") else ""  # a label cut off by the token limit
        first, *rest = labels.split(re.sub(f"{re.escape(stop)}{unfinished}\\Z", "", generated))
        turns = [Turn(first_speaker, first.strip())]
        return turns + [Turn(speaker, text.strip()) for speaker, text in zip(rest[::2], rest[1::2], strict=True)]

    def parse(self, rendered: str, speakers: Iterable[str]) -> Dialogue:
        """Read a dialogue back from the text that `render` returns; see `parse_turns`."""
        stop, label, _ = self.template
        if self.has_tokens:
            before = label.split("{}")[0]
            text = rendered.replace(before, stop + before, 1)  # no stop precedes the first label
        else:
            text = stop[: -len(stop.lstrip()) or None] + rendered  # without an instruction, the text has no line breaks
        instruction, *turns = self.parse_turns(text.removesuffix(END_OF_TEXT), "", speakers)
        return Dialogue(tuple(turns), instruction.text)

    def newest_turns(self, tokens: list[int], limit: int) -> list[int]:
        """Return the newest whole turns that fit in `limit` tokens, to continue a conversation beyond the context.

        If the whole turns would fill less than half of `limit`, because one turn is long, cut inside that turn.
        """
        if len(tokens) <= limit:
            return tokens
        oldest = len(tokens) - limit
        for start in range(oldest, len(tokens) - limit // 2):
            if tokens[start : start + len(self.stop)] == self.stop:
                return tokens[start:]
        return tokens[oldest:]
