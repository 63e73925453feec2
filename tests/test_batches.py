"""Examples and batches equal literal tensors, and every turn is learned exactly once."""

from itertools import pairwise

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import encoded, make_examples
from dialogues.batches import (
    DialogueDataset,
    Example,
    collate,
    cut_into_examples,
    epoch_batches,
    epoch_steps,
    evaluation_batches,
    padding_share,
)

END = 9


def test_collate_pads_shifts_and_masks():
    """Row 0 sets the length; row 1 is padded with the id of its own learned end of text; row 2 has context."""
    examples = [
        Example(np.array([1, 2, 3, 4, END], np.uint16), np.array([True] * 5)),
        Example(np.array([5, 6, END], np.uint16), np.array([True] * 3)),
        Example(np.array([1, 2, 7, END], np.uint16), np.array([False, False, True, True])),
    ]
    inputs, targets = collate(examples, padding_id=END)
    assert inputs.tolist() == [[1, 2, 3, 4], [5, 6, END, END], [1, 2, 7, END]]
    assert targets.tolist() == [[2, 3, 4, END], [6, END, -100, -100], [-100, 7, END, -100]]
    assert inputs.dtype == targets.dtype == torch.int64


def test_an_end_of_text_inside_a_row_is_learned():
    _, targets = collate([Example(np.array([1, END, 2, END], np.uint16), np.array([True] * 4))], padding_id=END)
    assert targets.tolist() == [[END, 2, END]]


def test_a_short_dialogue_is_one_example():
    assert list(cut_into_examples([3, 6, 10], max_length=9)) == [(0, 0, 10)]


def test_a_long_dialogue_is_cut_between_turns_with_context():
    """Turns have 4 tokens and examples 13: first three new turns, then one new turn at a time after two of context."""
    assert list(cut_into_examples([4, 8, 12, 16, 20], max_length=12)) == [(0, 0, 12), (4, 12, 16), (8, 16, 20)]


def test_only_the_end_of_an_overlong_turn_is_cut():
    # The turn of 30 tokens follows the last token of the turn before it, and is cut off after 11 tokens in all.
    assert list(cut_into_examples([5, 35, 40], max_length=10)) == [(0, 0, 5), (4, 5, 15), (34, 35, 40)]


@given(lengths=st.lists(st.integers(2, 60), min_size=1, max_size=30), max_length=st.integers(16, 80))
def test_every_turn_is_learned_exactly_once(lengths, max_length):
    bounds = [0, *np.cumsum(lengths).tolist()]
    examples = list(cut_into_examples(bounds[1:], max_length))
    learned = []
    for start, learn_from, end in examples:
        assert 0 < end - start <= max_length + 1  # the last token is only a target
        assert start in bounds or start == learn_from - 1
        assert learn_from in bounds
        assert start < learn_from or start == 0  # every first token except the very first has context
        learned += range(learn_from, end)
    assert len(learned) == len(set(learned))
    dropped = set(range(bounds[-1])) - set(learned)
    for first, last in pairwise(bounds):
        if last - first <= max_length:
            assert not dropped & set(range(first, last))
    assert all(end in bounds for _, _, end in examples) or dropped


@given(lengths=st.lists(st.integers(2, 8), min_size=6, max_size=30))
def test_examples_carry_as_much_context_as_fits(lengths):
    bounds = [0, *np.cumsum(lengths).tolist()]
    for start, learn_from, end in cut_into_examples(bounds[1:], 20):
        earlier = [bound for bound in bounds if bound < start]
        assert not earlier or end - earlier[-1] > 21 or learn_from == 0


def test_the_dataset_counts_what_it_drops():
    dataset = make_examples((list(range(40)), [5, 35, 40]), (list(range(50, 56)), [3, 6]), max_length=10)
    assert (len(dataset), dataset.shortened, dataset.cut_off, dataset.unlearned) == (4, 1, 20, 0)
    assert dataset[1].tokens.tolist() == list(range(4, 15))
    assert dataset[1].learned.tolist() == [False] + [True] * 10
    assert dataset[3].tokens.tolist() == list(range(50, 56))
    assert dataset.lengths() == [5, 11, 6, 6]
    assert dataset.count_learned() == sum(example.learned.sum() for example in map(dataset.__getitem__, range(4))) == 24


def test_an_example_with_nothing_to_learn_is_left_out_and_counted():
    """Of three examples, the second has no learned tokens."""
    conversations = encoded((list(range(30)), [10, 20, 30]))
    conversations.learned[:] = False
    conversations.learned[[5, 25, 26]] = True
    dataset = DialogueDataset(conversations, np.arange(1), 10)
    assert (len(dataset), dataset.unlearned, dataset.count_learned()) == (2, 1, 3)
    assert dataset[1].tokens.tolist() == list(range(19, 30))
    assert dataset[1].learned.nonzero()[0].tolist() == [6, 7]


def test_the_padding_share_counts_rounded_lengths():
    """In a batch of two, inputs of 20 and 10 tokens are both padded to 32."""
    dataset = make_examples((list(range(21)), [21]), (list(range(11)), [11]), max_length=64)
    assert padding_share(dataset, epoch_steps(dataset.lengths(), 2, 1, seed=1, epoch=0)) == 1 - 30 / 64
    assert padding_share(dataset, epoch_steps(dataset.lengths(), 1, 2, seed=1, epoch=0)) == 1 - 30 / 48


def test_accumulated_batches_equal_one_large_batch():
    lengths = list(range(10, 31))
    steps = epoch_steps(lengths, 2, 3, seed=1, epoch=4)
    assert [[number for batch in step for number in batch] for step in steps] == epoch_batches(
        lengths, 6, seed=1, epoch=4
    )
    assert [list(map(len, step)) for step in steps] == [[2, 2, 2]] * 3 + [[2, 1]]


def test_epochs_are_shuffled_by_seed_and_number():
    first = epoch_batches([5] * 10, 3, seed=1, epoch=0)
    assert [len(batch) for batch in first] == [3, 3, 3, 1]
    assert sorted(number for batch in first for number in batch) == list(range(10))
    assert first == epoch_batches([5] * 10, 3, seed=1, epoch=0)
    assert first != epoch_batches([5] * 10, 3, seed=1, epoch=1)
    assert first != epoch_batches([5] * 10, 3, seed=2, epoch=0)


def test_many_examples_are_grouped_by_length():
    lengths = np.random.default_rng(0).integers(10, 500, 1000).tolist()
    batches = epoch_batches(lengths, 8, seed=1, epoch=0)
    assert sorted(number for batch in batches for number in batch) == list(range(1000))
    padded = sum(len(batch) * max(lengths[number] for number in batch) for batch in batches)
    assert padded < 1.05 * sum(lengths)
    means = [np.mean([lengths[number] for number in batch]) for batch in batches]
    assert abs(np.mean(means[:60]) - np.mean(means[60:])) < 60  # short and long ones are mixed


def test_evaluation_batches_do_not_exceed_their_token_limit():
    assert list(evaluation_batches([500, 500, 1024, 300, 3000, 10])) == [[5, 3, 0, 1], [2], [4]]
    assert list(evaluation_batches([10] * 100)) == [list(range(100))]
    assert [len(batch) for batch in evaluation_batches([18] * 100)] == [64, 36]  # each is padded to 32
