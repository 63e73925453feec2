"""Divide dialogues into training, validation and test parts, or into folds; no dialogue is in two parts."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np

from dialogues.conversations import Conversations
from support.errors import UserError, amount

FEWEST = 2  # minimum number of turns in a dialogue


class Split(NamedTuple):
    """Conversations, the numbers of the dialogues in each part, and notes to print."""

    conversations: Conversations
    parts: list[np.ndarray]
    notes: list[str]


def split_conversations(
    conversations: Conversations, order: np.ndarray, shares: Sequence[int], option: str, by_file: bool
) -> Split:
    """Divide dialogues into parts so that equal dialogues are in the same part.

    If a part would be empty, the dialogues at the boundaries between parts are cut between turns.

    Args:
        order: (dialogues,) the numbers of the dialogues to divide, in order.
        shares: the relative size of each part, such as 70 and 30, or 1 for each fold.
        option: the option that requested the parts, for messages.
        by_file: whether to divide each file separately, if it has enough dialogues.

    Raises:
        UserError: there are too few dialogues, and they have too few turns to be cut.
    """
    together = np.zeros(len(order), int)
    files = conversations.files[order] if by_file else together
    equal, notes = conversations.fingerprints[order], []
    parts = choose_parts(files, equal, shares)
    if len(np.unique(parts)) < len(shares):  # rounding can leave a fold empty if there are many small files
        parts = choose_parts(together, equal, shares)
    if len(np.unique(parts)) < len(shares):
        before, dialogues = len(conversations), len(first_of_each(equal)[0])
        conversations, order, parts = split_turns(conversations, order, shares, option)
        notes.append(
            f"split: dialogues are cut between turns, because {option} needs more than"
            f" {amount(dialogues, 'distinct dialogue')}: {before} became {len(conversations)}"
        )
    elif (small := small_files(files, equal, shares)) and len(runs(files)) > 2:
        notes.append(
            f"split: {small} of {len(runs(files)) - 1} files {'has' if small == 1 else 'have'} too few dialogues for"
            " every part; the percentages apply to all files together"
        )
    return Split(conversations, [order[parts == part] for part in range(len(shares))], notes)


def split_turns(
    conversations: Conversations, order: np.ndarray, shares: Sequence[int], option: str
) -> tuple[Conversations, np.ndarray, np.ndarray]:
    """Cut dialogues between turns; return the new conversations, the numbers of the dialogues used, and their parts."""
    firsts, first = first_of_each(conversations.fingerprints[order])
    turns = np.diff(conversations.turn_starts)[order[firsts]].tolist()
    divisions = divide_turns(turns, shares, option)
    divisions = [divisions[place] for place in first]  # equal dialogues get the same cuts
    cuts = {number: division.cuts for number, division in zip(order.tolist(), divisions, strict=True)}
    conversations, origins = conversations.divide(cuts)
    begins, learned = np.searchsorted(origins, order).tolist(), set(conversations.with_something_learned().tolist())
    pieces = [
        (begin + piece, part)
        for begin, division in zip(begins, divisions, strict=True)
        for piece, part in enumerate(division.parts)
        if begin + piece in learned
    ]
    numbers, parts = np.array(pieces).T
    firsts, first = first_of_each(conversations.fingerprints[numbers])
    parts = parts[firsts][first]
    if len(np.unique(parts)) < len(shares):
        raise UserError(
            f"too few dialogues for {option}: even after cutting them between turns, a part would have nothing to"
            " learn, or only duplicates of another part; add dialogues or change the option"
        )
    return conversations, numbers, parts


def choose_parts(files: np.ndarray, equal: np.ndarray, shares: Sequence[int]) -> np.ndarray:
    """Return the part of each dialogue, from 0: file by file, in order, and equal dialogues in the same part.

    The shares apply to distinct dialogues; a copy joins the part of the first one. Each part's quota is its share of
    all dialogues up to the end of the current file, and this file supplies the dialogues that are missing from the
    quota. So a single file is cut exactly at its shares (each cut rounded down, in integers: `int(100 * 0.57)` is 56),
    and many files that are too small for every part still have the right shares together.

    Args:
        files: (dialogues,) the file of each dialogue; dialogues of one file are adjacent.
        equal: (dialogues,) a number that is the same for equal dialogues.
        shares: the share of each part, such as 70 and 30, or 1 for each fold.
    """
    firsts, first = first_of_each(equal)
    bounds, whole = list(accumulate(shares))[:-1], sum(shares)
    parts, given = np.zeros(len(firsts), int), [0] * len(bounds)
    for start, end in pairwise(runs(files[firsts])):
        cuts, above = [], end - start
        for place in reversed(range(len(bounds))):
            above = min(above, end * bounds[place] // whole - given[place])
            given[place] += above
            cuts.insert(0, above)
        parts[start:end] = np.searchsorted(cuts, np.arange(end - start), side="right")
    return parts[first]


def first_of_each(equal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the index of the first item of each kind, in order, and for each item the index of its kind."""
    _, firsts, kind = np.unique(equal, return_index=True, return_inverse=True)
    order = np.argsort(firsts)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return firsts[order], rank[kind]


def runs(files: np.ndarray) -> list[int]:
    """Return the index at which each run of equal file numbers begins, and the end."""
    return [0, *(np.flatnonzero(np.diff(files)) + 1).tolist(), len(files)]


def small_files(files: np.ndarray, equal: np.ndarray, shares: Sequence[int]) -> int:
    """Return the number of files that have too few dialogues for every part."""
    held = files[first_of_each(equal)[0]]
    bounds = [0, *accumulate(shares)]
    sizes = np.diff(runs(held))
    cuts = sizes[:, None] * np.array(bounds) // sum(shares)
    return int((np.diff(cuts) == 0).any(axis=1).sum())


class Division(NamedTuple):
    """The cuts of a dialogue (the number of turns before each), and the part of each piece."""

    cuts: list[int]
    parts: list[int]


def divide_turns(turns: Sequence[int], shares: Sequence[int], option: str) -> list[Division]:
    """Divide dialogues among parts by number of turns, in order; cut a dialogue if a part would otherwise be empty.

    Each cut is as close to its share as pieces of two or more turns allow.

    Args:
        option: the option that requested the parts, for the error.

    Raises:
        UserError: there are too few turns.
    """
    starts = [0, *accumulate(turns)]
    total = starts[-1]

    def fits(cut: int, before: int, after: int) -> bool:
        dialogue = bisect_right(starts, cut) - 1
        start, end = max(starts[dialogue], before), min(starts[dialogue + 1], after)
        return before < cut < after and (cut == starts[dialogue] or (cut - start >= FEWEST and end - cut >= FEWEST))

    latest = [total]  # the last position of each cut that leaves room for the following cuts
    for _ in shares[1:]:
        cut = next((cut for cut in range(latest[0] - 1, 0, -1) if fits(cut, 0, latest[0])), None)
        if cut is None:
            raise UserError(
                f"too little data for {option}: {amount(len(turns), 'distinct dialogue')} with"
                f" {amount(total, 'turn')}; each part needs a dialogue, or {FEWEST} turns of a longer one; add"
                " dialogues or change the option"
            )
        latest.insert(0, cut)
    cuts = [0]
    for bound, last, after in zip(accumulate(shares), latest, latest[1:], strict=False):
        wanted = min(max(total * bound // sum(shares), cuts[-1] + 1), last)
        near = (cut for away in range(total) for cut in (wanted - away, wanted + away))
        cuts.append(next(cut for cut in near if cut <= last and fits(cut, cuts[-1], after)))
    return [
        Division(
            [cut - start for cut in cuts if start < cut < end],
            [bisect_right(cuts, begin) - 1 for begin in [start, *(cut for cut in cuts if start < cut < end)]],
        )
        for start, end in pairwise(starts)
    ]
