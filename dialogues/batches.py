"""Encoded dialogues as compact arrays, the examples cut from them, and the batches made of these."""

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dialogues.template import EncodedDialogue

GROUPED = 50  # batches whose examples are sorted by length together
IGNORED = -100  # the target of a position where there is nothing to learn; PyTorch's own default


class Example(NamedTuple):
    """One row of a batch: token ids, and the index of the first of them that is learned (those before are context)."""

    tokens: np.ndarray
    learn_from: int


class DialogueDataset(Dataset[Example]):
    """Dialogues as examples of at most `max_length` inputs.

    All tokens stand in one array (two bytes each when the vocabulary allows) and an example is three numbers that
    point into it: a million short dialogues take about 150 MB, and a turn that serves as context is not stored twice.

    `shortened` counts the turns that were too long for the model, `dropped` the tokens that they lost.
    """

    def __init__(self, dialogues: Iterable[EncodedDialogue], max_length: int, vocab_size: int) -> None:
        tokens = array("H" if vocab_size <= 1 << 16 else "I")
        spans = array("q")
        self.max_length = max_length
        self.dialogues = self.shortened = self.dropped = 0
        for dialogue in dialogues:
            offset = len(tokens)
            tokens.extend(dialogue.tokens)
            learned, ends = 0, set(dialogue.turn_ends)
            for start, learn_from, end in cut_into_examples(dialogue.turn_ends, max_length):
                spans.extend((offset + start, offset + learn_from, offset + end))
                learned += end - learn_from
                self.shortened += end not in ends
            self.dropped += len(dialogue.tokens) - learned
            self.dialogues += 1
        self.tokens = np.frombuffer(tokens, dtype=np.dtype(tokens.typecode))
        self.spans = np.frombuffer(spans, dtype=np.int64).reshape(-1, 3)  # (examples, 3): start, learn_from, end

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> Example:
        start, learn_from, end = self.spans[index]
        return Example(self.tokens[start:end], int(learn_from - start))

    def describe(self) -> str:
        """What became of the dialogues, in one line."""
        cut = f"; {self.shortened} turns too long, {self.dropped:,} tokens dropped" if self.shortened else ""
        examples = "" if len(self) == self.dialogues else f" in {len(self)} examples"
        return f"{self.dialogues} dialogues{examples}, {len(self.tokens):,} tokens, longest {max(self.lengths())}{cut}"

    def lengths(self) -> list[int]:
        """Tokens of each example, context included."""
        return (self.spans[:, 2] - self.spans[:, 0]).tolist()


def cut_into_examples(turn_ends: Sequence[int], max_length: int) -> Iterator[tuple[int, int, int]]:
    """Yield `(start, learn_from, end)` for each example of a dialogue whose turns end at `turn_ends`.

    A dialogue of at most `max_length` inputs is one example. A longer one is cut between turns, so that every turn is
    learned exactly once: after the first example, new turns take up to half of the length, and as many earlier turns as
    fit come before them as context. Only a single turn that is longer than the whole length loses its end.
    """
    room = max_length + 1  # the last token of an example is only ever a target, so one more than the inputs fits
    bounds = [0, *turn_ends]
    turn, turns = 0, len(turn_ends)
    while turn < turns:
        learn_from = bounds[turn]
        new_room = room if turn == 0 else room // 2
        last = turn + 1  # at least one new turn
        while last < turns and bounds[last + 1] - learn_from <= new_room:
            last += 1
        end = bounds[last]
        start = bounds[bisect_left(bounds, end - room, hi=turn)]
        if 0 < start == learn_from:
            start -= 1  # no earlier turn fits, but its last token does: something must predict the first new one
        yield start, learn_from, min(end, start + room)
        turn = last


def collate(examples: Sequence[Example], padding_id: int) -> tuple[Tensor, Tensor]:
    """Pad a batch to its own longest example and shift the targets one to the left.

    Returns:
        inputs (B, T) and targets (B, T), int64, where `targets[b, t]` is the token after `inputs[b, t]`, or -100 where
        there is nothing to learn: context and padding. Padding is known by its position, never by its id, since
        `padding_id` is the end-of-text token, which is learned wherever a dialogue ends.
    """
    T = max(len(example.tokens) for example in examples) - 1
    inputs = torch.full((len(examples), T), padding_id)
    targets = torch.full((len(examples), T), IGNORED)
    for row, (tokens, learn_from) in enumerate(examples):
        ids = torch.from_numpy(tokens.astype(np.int64))
        inputs[row, : len(ids) - 1] = ids[:-1]
        first = max(learn_from, 1)  # nothing comes before token 0, so nothing predicts it
        targets[row, first - 1 : len(ids) - 1] = ids[first:]
    return inputs, targets


def epoch_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The example numbers of each batch of one epoch, shuffled by `(seed, epoch)` alone.

    Where there are many batches, examples of similar length come together, so that little of a batch is padding:
    `GROUPED` batches' worth of shuffled examples is sorted by length, cut into batches, and these are shuffled again.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths)).tolist()
    pool = GROUPED * batch_size
    if len(order) > pool:
        for start in range(0, len(order), pool):
            order[start : start + pool] = sorted(order[start : start + pool], key=lengths.__getitem__)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [batches[number] for number in random.permutation(len(batches))] if len(order) > pool else batches
