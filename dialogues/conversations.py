"""Encoded dialogues in a few compact arrays, the representation that all later stages use."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from itertools import islice, pairwise
from typing import NamedTuple

import numpy as np

from dialogues.dialogue import ALPACA_SPEAKERS, Dialogue, Turn
from dialogues.layouts.words import ASSISTANT, USER
from dialogues.private import PrivateCounts, list_private, mask_dialogue
from dialogues.template import Renderer
from dialogues.tokenizer import speaker_token
from support.errors import UserError, amount

FIRST = 3  # number of locations to keep per reason for skipping
SAMPLE = 1000  # number of dialogues to sample for estimates
MOST_SPEAKERS = 1000  # maximum number of speakers that can get tokens


class Changes(NamedTuple):
    """Changes to make in dialogues before they are encoded."""

    rename: Mapping[str, str] = {}  # old name → new name
    mask: bool = False  # replace private data with placeholders


UNCHANGED = Changes()


class Block(NamedTuple):
    """A block of dialogues as arrays, as returned by a worker process."""

    tokens: array  # ids
    texts: array  # per turn: start and end of its text in its dialogue's tokens, and its index in `speakers`
    context: array  # per turn: 1 if the file marks it as context, which is not learned
    sizes: array  # per dialogue: number of tokens, number of turns
    numbers: array  # per dialogue: its record or line number
    fingerprints: array  # per dialogue: a 64-bit hash, the same for equal dialogues
    speakers: list[str]
    skipped: list[tuple[int, str, int]]  # record or line number, reason, number of turns
    renamed: set[str]  # old names that were found
    private: PrivateCounts
    file: int = 0  # index of the file among the sources

    @classmethod
    def empty(cls, renderer: Renderer) -> "Block":
        """Return a block without dialogues; tokens take two bytes each if the vocabulary is small enough."""
        small = renderer.tokenizer.n_vocab + MOST_SPEAKERS <= 1 << 16
        tokens = array("H" if small else "I")
        return cls(tokens, array("I"), array("B"), array("I"), array("Q"), array("Q"), [], [], set(), PrivateCounts())


def encode_block(renderer: Renderer, dialogues: Iterable[tuple[int, Dialogue]], changes: Changes = UNCHANGED) -> Block:
    """Encode numbered dialogues; skip and count those with fewer than two turns, and count private data."""
    block, rename = Block.empty(renderer), changes.rename
    places: dict[str, int] = {}
    block.private.masked = changes.mask
    for number, dialogue in dialogues:
        if dialogue.skipped:
            block.skipped.extend((number, why, count) for why, count in Counter(dialogue.skipped).items())
        if len(dialogue.turns) < 2:
            if dialogue.turns:
                block.skipped.append((number, "single turns", 1))
            elif not dialogue.skipped:
                block.skipped.append((number, "dialogues without a turn", 1))
            continue
        if rename:
            block.renamed.update(turn.speaker for turn in dialogue.turns if turn.speaker in rename)
            turns = tuple(Turn(rename.get(speaker, speaker), text) for speaker, text in dialogue.turns)
            dialogue = dialogue._replace(turns=turns)
        dialogue, private = mask_dialogue(dialogue) if changes.mask else (dialogue, list_private(dialogue))
        if private:
            block.private.add(private)
        tokens, texts = renderer.encode(dialogue)
        block.tokens.extend(tokens)
        for (start, end), (speaker, _) in zip(texts, dialogue.turns, strict=True):
            block.texts.extend((start, end, places.setdefault(speaker, len(places))))
        block.context.extend([place in dialogue.context for place in range(len(texts))])
        block.sizes.extend((len(tokens), len(texts)))
        block.numbers.append(number)
        block.fingerprints.append(fingerprint(dialogue))
    block.speakers.extend(places)
    return block


def fingerprint(dialogue: Dialogue) -> int:
    content = repr((dialogue.instruction, *map(tuple, dialogue.turns)))
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "little")


class Conversations:
    """The encoded dialogues of one or more files, in the order of the files.

    Attributes:
        renderer: encodes dialogues as tokens and decodes them.
        tokens: (tokens,) the token ids of all dialogues, concatenated.
        learn: the learned part: all, replies, or a speaker's name.
        learned: (tokens,) whether a token counts in the loss.
        starts: (dialogues + 1,) where each dialogue begins in `tokens`.
        texts: (turns, 3) start and end of a turn's text within its dialogue, and its index in `speakers`.
        context: (turns,) whether the file marks a turn as context, which is not learned.
        turn_starts: (dialogues + 1,) where each dialogue begins in `texts`.
        numbers: (dialogues,) the record or line number of each dialogue in its file.
        files: (dialogues,) the index of its file among the sources.
        origins: for several files, the name of each and the unit of its numbers.
        fingerprints: (dialogues,) hashes, the same for equal dialogues.
        skipped: reason → number of skipped turns, and the first locations, each a file index and a number.
        rename: old name → new name, as requested; `renamed` holds the old names that were found.
        private: counts of the phone numbers and other private data that were found or masked.
    """

    def __init__(
        self,
        renderer: Renderer,
        blocks: Iterable[Block],
        learn: str = "all",
        rename: Mapping[str, str] | None = None,
    ) -> None:
        """Join blocks, in order.

        Raises:
            UserError: no speaker is named `learn`, or there are too many speakers to give each a token.
        """
        whole = Block.empty(renderer)
        places: dict[str, int] = {}
        self.skipped: dict[str, tuple[int, list[tuple[int, int]]]] = {}
        self.origins: Sequence[str] = ()
        files = array("I")
        self.renamed: set[str] = set()
        self.private = PrivateCounts()
        for block in blocks:
            new = np.array([places.setdefault(speaker, len(places)) for speaker in block.speakers], np.uint32)
            texts = np.array(block.texts, np.uint32).reshape(-1, 3)
            texts[:, 2] = new[texts[:, 2]] if len(texts) else 0
            whole.texts.frombytes(texts.tobytes())
            for name in ("tokens", "context", "sizes", "numbers", "fingerprints"):
                getattr(whole, name).extend(getattr(block, name))
            files.extend([block.file] * len(block.numbers))
            self.renamed |= block.renamed
            self.private.merge(block.private)
            for number, why, count in block.skipped:
                total, first = self.skipped.get(why, (0, []))
                self.skipped[why] = total + count, [*first, (block.file, number)][:FIRST]
        self.speakers = list(places)
        self.tokens = np.frombuffer(whole.tokens, whole.tokens.typecode)
        self.texts = np.frombuffer(whole.texts, np.uint32).reshape(-1, 3)
        self.context = np.frombuffer(whole.context, bool)
        self.numbers = np.frombuffer(whole.numbers, np.uint64)
        self.files = np.frombuffer(files, np.uint32)
        self.fingerprints = np.frombuffer(whole.fingerprints, np.uint64)
        sizes = np.frombuffer(whole.sizes, np.uint32).reshape(-1, 2)
        self.starts, self.turn_starts = np.zeros((2, len(sizes) + 1), np.int64)
        np.cumsum(sizes[:, 0], out=self.starts[1:])
        np.cumsum(sizes[:, 1], out=self.turn_starts[1:])
        self.renderer = self.place_speaker_tokens(renderer) if renderer.has_tokens else renderer
        self.learn, self.rename = learn, rename or {}
        self.learned = self.choose_learned(learn)

    @classmethod
    def of(cls, renderer: Renderer, dialogues: Iterable[Dialogue], learn: str = "all") -> "Conversations":
        """Encode dialogues, numbered from 1."""
        return cls(renderer, [encode_block(renderer, enumerate(dialogues, 1))], learn)

    def place(self, file: int, number: int) -> int | str:
        """Format a record or line number as a location; with several files, the file name comes first."""
        return f"{self.origins[file]} {number}" if self.origins else number

    def place_of(self, dialogue: int) -> int | str:
        """Return the location of a dialogue; see `place`."""
        return self.place(int(self.files[dialogue]), int(self.numbers[dialogue]))

    def divide(self, cuts: Mapping[int, Sequence[int]]) -> "tuple[Conversations, np.ndarray]":
        """Cut dialogues between turns; every piece becomes a dialogue with the same instruction and location.

        Args:
            cuts: dialogue number → the number of turns before each cut.

        Returns:
            The conversations after the cuts, and (dialogues,) the number of the original dialogue of each piece.
        """
        pieces, origins = [], []
        for number in range(len(self)):
            dialogue = self[number]
            for start, end in pairwise([0, *cuts.get(number, ()), len(dialogue.turns)]):
                context = tuple(place - start for place in dialogue.context if start <= place < end)
                pieces.append(dialogue._replace(turns=dialogue.turns[start:end], context=context))
                origins.append(number)
        made, divided = Conversations.of(self.renderer, pieces, self.learn), copy(self)
        for name in ("tokens", "texts", "context", "starts", "turn_starts", "fingerprints", "learned"):
            setattr(divided, name, getattr(made, name))
        divided.numbers, divided.files = self.numbers[origins], self.files[origins]
        return divided, np.array(origins)

    def __len__(self) -> int:
        return len(self.numbers)

    def text_starts(self) -> np.ndarray:
        """Return (turns,) where the text of each turn starts in `tokens`."""
        return self.texts[:, 0] + np.repeat(self.starts[:-1], np.diff(self.turn_starts))

    def turn_spans(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (turns,) where the text of each turn starts in `tokens`, and (turns,) where the stop after it ends.

        The last turn of a dialogue ends after the end-of-text token.
        """
        starts = self.text_starts()
        ends = starts + (self.texts[:, 1] - self.texts[:, 0]) + len(self.renderer.stop)
        ends[self.turn_starts[1:] - 1] = self.starts[1:]
        return starts, ends

    def place_speaker_tokens(self, renderer: Renderer) -> Renderer:
        """Give every speaker a token, and return the renderer that knows these tokens.

        All files must have been read before this call, because only then are all speakers known.
        """
        if len(self.speakers) > MOST_SPEAKERS:
            raise UserError(
                f"{len(self.speakers):,} speakers are too many to give each a token (at most {MOST_SPEAKERS:,});"
                " choose another --template"
            )
        renderer = Renderer(renderer.tokenizer, renderer.name, self.speakers)
        specials = renderer.tokenizer._special_tokens
        ids = np.array([specials[speaker_token(speaker)] for speaker in self.speakers], self.tokens.dtype)
        self.tokens[self.text_starts() - 1] = ids[self.texts[:, 2]]
        return renderer

    def choose_learned(self, learn: str) -> np.ndarray:
        """Return (tokens,) whether a token is learned: all tokens, the replies, or the texts of one speaker.

        The stop or end of text after a learned text is learned too, so that the model learns to end its turn. Turns
        that the file marks as context are never learned.
        """
        if learn == "all":
            return ~self.tokens_in(self.context)
        if learn == "replies" and self.renderer.name == "alpaca":
            learn = ALPACA_SPEAKERS[-1]
        if learn == "replies":
            chosen = np.ones(len(self.texts), bool)
            chosen[self.turn_starts[:-1]] = False
        elif learn in self.speakers:
            chosen = self.texts[:, 2] == self.speakers.index(learn)
        else:
            raise UserError(
                f"--learn {learn}: choose all, replies, or a speaker's name; the speakers are {self.name_speakers()}"
            )
        return self.tokens_in(chosen & ~self.context)

    def tokens_in(self, chosen: np.ndarray) -> np.ndarray:
        """Return (tokens,) whether a token belongs to one of the turns in `chosen`, a mask (turns,)."""
        starts, ends = self.turn_spans()
        steps = np.zeros(len(self.tokens) + 1, np.int8)
        steps[starts[chosen]] += 1
        steps[ends[chosen]] -= 1
        return np.cumsum(steps, dtype=np.int8, out=steps)[:-1].view(bool)

    def with_something_learned(self) -> np.ndarray:
        """Return the numbers of the dialogues in which at least one token is learned."""
        if not len(self):
            return np.arange(0)
        return np.flatnonzero(np.logical_or.reduceat(self.learned, self.starts[:-1]))

    def tokens_of(self, dialogue: int) -> np.ndarray:
        return self.tokens[self.starts[dialogue] : self.starts[dialogue + 1]]

    def texts_of(self, dialogue: int) -> np.ndarray:
        return self.texts[self.turn_starts[dialogue] : self.turn_starts[dialogue + 1]]

    def turn_ends(self, dialogue: int) -> list[int]:
        """Return the positions where a dialogue may be cut: after each text, and at its end.

        The instruction belongs to the first turn, a stop and a label belong to the turn after them, and the end of text
        belongs to the last turn.
        """
        return [*self.texts_of(dialogue)[:-1, 1].tolist(), int(self.starts[dialogue + 1] - self.starts[dialogue])]

    def instruction_end(self, dialogue: int) -> int:
        """Return the number of tokens of the instruction."""
        start, _, speaker = self.texts_of(dialogue)[0].tolist()
        stop = 0 if self.renderer.has_tokens else len(self.renderer.stop)
        return max(start - len(self.renderer.label(self.speakers[speaker])) - stop, 0)

    def render(self, dialogue: int) -> str:
        """Return a dialogue as one text, as the model sees it."""
        return self.renderer.tokenizer.decode(self.tokens_of(dialogue).tolist())

    def __getitem__(self, dialogue: int) -> Dialogue:
        """Return a dialogue as it was read, decoded from its tokens."""
        decode, tokens = self.renderer.tokenizer.decode, self.tokens_of(dialogue).tolist()
        texts = self.texts_of(dialogue).tolist()
        space = len(self.renderer.template.space)
        turns = tuple(Turn(self.speakers[speaker], decode(tokens[start:end])[space:]) for start, end, speaker in texts)
        context = np.flatnonzero(self.context[self.turn_starts[dialogue] : self.turn_starts[dialogue + 1]])
        return Dialogue(turns, decode(tokens[: self.instruction_end(dialogue)]), context=tuple(context.tolist()))

    def name_speakers(self) -> str:
        """Return the speakers and their numbers of turns as text, in descending order."""
        turns = np.bincount(self.texts[:, 2], minlength=len(self.speakers))
        named = [
            f"{self.speakers[place][:40]} ({amount(int(turns[place]), 'turn')})"
            for place in np.argsort(-turns, kind="stable")[:6]
        ]
        more = len(self.speakers) - len(named)
        return ", ".join(named) + (f" and {more:,} more" if more else "")

    def describe(self, dialogues: Iterable[int]) -> dict[str, object]:
        """Return the content of `dialogue.json`: the format in which a model trained on `dialogues` saw them."""
        instructions = Counter(self[dialogue].instruction for dialogue in islice(dialogues, SAMPLE))
        spoken = np.unique(np.concatenate([self.texts_of(dialogue)[:, 2] for dialogue in dialogues]))
        speakers = [self.speakers[place] for place in spoken]  # in the order of the file
        roles = [self.rename.get(role, role) for role in (USER, ASSISTANT)]
        if set(roles) <= set(speakers):  # in this order, whoever speaks first
            speakers = list(dict.fromkeys([*roles, *speakers]))
        return {
            "template": self.renderer.name,
            "instruction": instructions.most_common(1)[0][0],
            "speakers": speakers,
            "learn": self.learn,
        }
