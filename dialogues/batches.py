"""Cut dialogues into examples, and make batches of examples."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dialogues.conversations import Conversations

EVALUATION_TOKENS = 2048  # per batch, including padding; evaluation stores no activations, so its batches can be larger
GROUPED = 50  # examples are sorted by length in groups of this many batches
IGNORED = -100  # target of a token that is not learned, such as padding; PyTorch's default
ROUND = 16  # pad batch lengths to a multiple of this


class Example(NamedTuple):
    """A training example: token ids (T + 1,), and the mask (T + 1,) of the tokens that are learned."""

    tokens: np.ndarray
    learned: np.ndarray


class DialogueDataset(Dataset[Example]):
    """Examples of at most `max_length` inputs each, cut from dialogues.

    An example is stored as three positions in the tokens of all conversations, so that shared context is not copied.

    Attributes:
        spans: (examples, 3) start, first learned position (the tokens before it are context) and end, in `tokens`.
        shortened: number of turns or instruction lines that were too long and were truncated.
        cut_off: number of tokens removed by this truncation.
        unlearned: number of examples left out because they have no learned tokens.
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
        """Return the spans (examples, 3) of a dialogue that is too long for one example."""
        offset, cuts = int(self.conversations.starts[dialogue]), self.conversations.turn_ends(dialogue)
        instruction = self.conversations.instruction_end(dialogue)
        if instruction > self.max_length // 2:  # cut after a long instruction, so that the first turn is not truncated
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
        learned[: max(learn_from - start, 1)] = False  # context, and token 0, which has no context to be predicted from
        return Example(self.conversations.tokens[start:end], learned)

    def count_learned(self) -> int:
        """Return the number of learned targets in all examples."""
        learned = self.conversations.learned
        spans = ((max(start + 1, learn_from), end) for start, learn_from, end in self.spans.tolist())
        return sum(int(np.count_nonzero(learned[first:end])) for first, end in spans)

    def padded(self, T: int) -> int:
        """Return the padded length of a batch whose longest example has T inputs."""
        return min(round_up(T), self.max_length)

    def places(self, examples: Sequence[int]) -> list[int | str]:
        """Return the locations of the examples' dialogues: numbers, after the file name if there are several files."""
        starts = self.conversations.starts
        dialogues = np.unique(np.searchsorted(starts, self.spans[list(examples), 1], side="right") - 1)
        return list(map(self.conversations.place_of, dialogues.tolist()))

    def lengths(self) -> list[int]:
        """Return the number of tokens of each example, context included."""
        return (self.spans[:, 2] - self.spans[:, 0]).tolist()


def cut_into_examples(turn_ends: Sequence[int], max_length: int) -> Iterator[tuple[int, int, int]]:
    """Yield `(start, learn_from, end)` for each example of a dialogue whose turns end at `turn_ends`.

    A dialogue of at most `max_length` inputs is one example. A longer one is cut between turns, so that every turn is
    learned exactly once. In each example after the first, new turns take up to half of the length; the rest is filled
    with earlier turns as context. A turn is truncated only if it alone exceeds the length.
    """
    room = max_length + 1  # one more than the inputs, since the last token is only a target
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
            start -= 1  # no earlier turn fits, so take its last token as context for the first new token
        yield start, learn_from, min(end, start + room)
        turn = last


def collate(
    examples: Sequence[Example], padding_id: int, padded: Callable[[int], int] = lambda longest: longest
) -> tuple[Tensor, Tensor]:
    """Pad a batch to its longest example, shift the targets left by one, and mask unlearned targets with -100.

    Args:
        padded: maps the number of inputs in the longest example to T; `DialogueDataset.padded` rounds it up.

    Returns:
        inputs (B, T) and targets (B, T), int64: `targets[b, t]` is the token after `inputs[b, t]`, or -100 for context
            and padding. Padding is identified by position, not by id: `padding_id` is the end-of-text token, which
            is learned at the end of every dialogue.
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
    """Return the next multiple of `ROUND`.

    oneDNN compiles and caches a kernel for every new shape. Without rounding, nearly every batch had a new length, and
    compiling took a quarter of a small model's training time.
    """
    return -(-length // ROUND) * ROUND


def epoch_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return the example numbers of each batch in an epoch; the order depends only on `(seed, epoch)`.

    If there are many batches, examples of similar length are grouped to reduce padding: the shuffled examples are
    sorted by length in groups of `GROUPED` batches and cut into batches, and the batches are shuffled.
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
    """Return the optimizer steps of an epoch, each as the list of batches whose gradients are accumulated."""
    steps = epoch_batches(lengths, batch_size * accumulation, seed, epoch)
    return [[step[start : start + batch_size] for start in range(0, len(step), batch_size)] for step in steps]


def evaluation_batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield batches of example numbers, shortest first, each filled up to `EVALUATION_TOKENS` after padding."""
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and round_up(lengths[number]) * (len(batch) + 1) > EVALUATION_TOKENS:
            yield batch
            batch = []
        batch.append(number)
    yield batch


def padding_share(dataset: DialogueDataset, steps: Sequence[list[list[int]]]) -> float:
    """Return the fraction of padding in the batches of these steps."""
    every = [length - 1 for length in dataset.lengths()]
    batches = [[every[number] for number in batch] for step in steps for batch in step]
    return 1 - sum(every) / sum(dataset.padded(max(lengths)) * len(lengths) for lengths in batches)
