"""The examples that are cut from dialogues, and the batches made of these."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dialogues.conversations import Conversations

EVALUATION_TOKENS = 2048  # in one batch, padding included: without gradients there is room for more than in training
GROUPED = 50  # batches whose examples are sorted by length together
IGNORED = -100  # the target where nothing is learned, padding included; PyTorch's own default
ROUND = 16  # pad batch lengths to a multiple of this


class Example(NamedTuple):
    """One row of a batch: token ids, (T + 1,), and which of them are learned, (T + 1,)."""

    tokens: np.ndarray
    learned: np.ndarray


class DialogueDataset(Dataset[Example]):
    """Some of the dialogues as examples of at most `max_length` inputs.

    An example is three numbers that point into the tokens of all conversations: what serves twice is stored once.

    Attributes:
        spans: (examples, 3) start, where the learning begins (what comes before is context), and end, in `tokens`.
        shortened: turns, or instruction lines, that were too long for the model.
        cut_off: the tokens that they lost.
        unlearned: examples left out since there is nothing to learn in them.
    """

    def __init__(self, conversations: Conversations, dialogues: np.ndarray, max_length: int) -> None:
        self.conversations, self.dialogues, self.max_length = conversations, dialogues, max_length
        self.shortened = self.cut_off = self.unlearned = 0
        starts, ends = conversations.starts[dialogues], conversations.starts[dialogues + 1]
        whole = np.stack([starts, starts, ends], axis=1)
        too_long = ends - starts > max_length + 1
        spans, done = [], 0
        for place in np.flatnonzero(too_long).tolist():
            spans += [whole[done:place], self.cut(int(dialogues[place]))]
            done = place + 1
        self.spans = np.concatenate([*spans, whole[done:]])

    def cut(self, dialogue: int) -> np.ndarray:
        """(examples, 3) the spans of a dialogue that is too long for one."""
        offset, cuts = int(self.conversations.starts[dialogue]), self.conversations.turn_ends(dialogue)
        instruction = self.conversations.instruction_end(dialogue)
        if instruction > self.max_length // 2:  # then it may be cut from the first turn, rather than cost its end
            cuts.insert(0, instruction)
        spans, kept, ends = [], 0, set(cuts)
        for start, learn_from, end in cut_into_examples(cuts, self.max_length):
            self.shortened += end not in ends
            kept += end - learn_from
            if self.conversations.learned[offset + learn_from : offset + end].any():
                spans.append((offset + start, offset + learn_from, offset + end))
            else:
                self.unlearned += 1
        self.cut_off += cuts[-1] - kept
        return np.array(spans, np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> Example:
        start, learn_from, end = self.spans[index].tolist()
        learned = self.conversations.learned[start:end].copy()
        learned[: max(learn_from - start, 1)] = (
            False  # context; and nothing comes before token 0, so nothing predicts it
        )
        return Example(self.conversations.tokens[start:end], learned)

    def count_learned(self) -> int:
        """How many targets all examples have together."""
        learned = self.conversations.learned
        spans = ((max(start + 1, learn_from), end) for start, learn_from, end in self.spans.tolist())
        return sum(int(np.count_nonzero(learned[first:end])) for first, end in spans)

    def padded(self, T: int) -> int:
        """How long a batch is made whose longest example has T inputs."""
        return min(round_up(T), self.max_length)

    def places(self, examples: Sequence[int]) -> list[int | str]:
        """The record or line numbers of the dialogues that examples are cut from, of several files with their names."""
        starts = self.conversations.starts
        dialogues = np.unique(np.searchsorted(starts, self.spans[list(examples), 1], side="right") - 1)
        return list(map(self.conversations.place_of, dialogues.tolist()))

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


def collate(
    examples: Sequence[Example], padding_id: int, padded: Callable[[int], int] = lambda longest: longest
) -> tuple[Tensor, Tensor]:
    """Pad a batch to its own longest example, shift the targets one to the left, and mask padding with -100.

    Args:
        padded: from the inputs of the longest example to T, as `DialogueDataset.padded`, which rounds up.

    Returns:
        inputs (B, T) and targets (B, T), int64, where `targets[b, t]` is the token after `inputs[b, t]`, or -100 where
        there is nothing to learn: context and padding. Padding is known by its position, never by its id, since
        `padding_id` is the end-of-text token, which is learned wherever a dialogue ends.
    """
    T = padded(max(len(example.tokens) for example in examples) - 1)
    inputs = torch.full((len(examples), T), padding_id)
    targets = torch.full((len(examples), T), IGNORED)
    for row, (tokens, learned) in enumerate(examples):
        ids = torch.from_numpy(tokens.astype(np.int64))
        inputs[row, : len(ids) - 1] = ids[:-1]
        targets[row, : len(ids) - 1] = ids[1:].where(torch.from_numpy(learned[1:]), IGNORED)
    return inputs, targets


def round_up(length: int) -> int:
    """The next multiple of `ROUND`.

    oneDNN compiles and caches a kernel for every new shape: a quarter of a small model's time went there when every
    batch had a length of its own.
    """
    return -(-length // ROUND) * ROUND


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


def epoch_steps(
    lengths: Sequence[int], batch_size: int, accumulation: int, seed: int, epoch: int
) -> list[list[list[int]]]:
    """The optimizer steps of one epoch, each as the batches whose gradients are added up in it."""
    steps = epoch_batches(lengths, batch_size * accumulation, seed, epoch)
    return [[step[start : start + batch_size] for start in range(0, len(step), batch_size)] for step in steps]


def evaluation_batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Example numbers, shortest first, as many together as stay within `EVALUATION_TOKENS` when padded."""
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and round_up(lengths[number]) * (len(batch) + 1) > EVALUATION_TOKENS:
            yield batch
            batch = []
        batch.append(number)
    yield batch


def padding_share(dataset: DialogueDataset, steps: Sequence[list[list[int]]]) -> float:
    """How much of the batches of these steps is padding."""
    every = [length - 1 for length in dataset.lengths()]
    batches = [[every[number] for number in batch] for step in steps for batch in step]
    return 1 - sum(every) / sum(dataset.padded(max(lengths)) * len(lengths) for lengths in batches)
