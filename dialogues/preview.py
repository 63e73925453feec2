"""Show the text that the model sees and learns: `--preview`, and `learned.txt` in a run folder."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from dialogues.batches import DialogueDataset, collate, epoch_steps
from dialogues.template import Renderer
from support.errors import printable

EXAMPLES = 2  # number of examples to show in full
ROWS = 100  # maximum number of table rows per example; more are left out in the middle and counted
GREEN, PLAIN = "\033[32m", "\033[0m"


def show_examples(dataset: DialogueDataset, count: int, colour: bool = False) -> Iterator[str]:
    """Yield the first `count` examples as the model sees them, with learned spans in green or in brackets."""
    renderer = dataset.conversations.renderer
    before, after = (GREEN, PLAIN) if colour else ("[", "]")
    for number in range(min(count, len(dataset))):
        tokens, learned = dataset[number]
        cuts = [0, *(np.flatnonzero(np.diff(learned)) + 1).tolist(), len(tokens)]
        pieces = []
        for start, end in pairwise(cuts):
            text = printable(renderer.tokenizer.decode(tokens[start:end].tolist()))
            pieces.append(f"{before}{text}{after}" if learned[start] else text)
        marked = "in green" if colour else "in brackets"
        yield f"\nexample {number + 1} of {len(dataset):,}, learned text {marked}:\n\n{''.join(pieces)}"


def show_batch(dataset: DialogueDataset, batch_size: int, accumulation: int, seed: int) -> Iterator[str]:
    """Yield the first batch of the first epoch as a table, with a line for each position of its first examples."""
    renderer = dataset.conversations.renderer
    numbers = epoch_steps(dataset.lengths(), batch_size, accumulation, seed, epoch=0)[0][0]
    inputs, targets = collate([dataset[number] for number in numbers], renderer.tokenizer.eot_token)
    B, T = inputs.shape
    yield f"\nthe first batch: inputs and targets of {B} examples at {T} positions; -100 is not learned"
    for row in range(min(EXAMPLES, B)):
        length = dataset.lengths()[numbers[row]] - 1
        yield f"\nexample {numbers[row] + 1}: {length} positions and {T - length} of padding"
        yield f"{'position':>8} {'input':>6} {'target':>6}  piece of the input"
        for position in range(min(length + 1, T)):
            if length > ROWS and position == ROWS // 2:
                yield f"     ... ({length - ROWS} positions left out)"
            if length <= ROWS or not ROWS // 2 <= position < length - ROWS // 2:
                token, target = int(inputs[row, position]), int(targets[row, position])
                piece = show_piece(renderer, token) if position < length else "(padding, to the end)"
                yield f"{position:>8} {token:>6} {target:>6}  {piece}"


def show_piece(renderer: Renderer, token: int) -> str:
    """Return a token as text in quotes; an incomplete character is shown as its bytes."""
    content = renderer.tokenizer.decode_single_token_bytes(token)
    return repr(content.decode(errors="backslashreplace"))
