"""The training loop: plain PyTorch, from batches to a better model."""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from dialogues.batches import IGNORED, DialogueDataset, collate, epoch_steps, round_up
from files import UserError
from settings import TrainingSettings
from training.checkpoint import load_checkpoint, save_checkpoint
from training.device import Machine
from training.optimizer import learning_rate_at
from training.tracking import Progress

EVALUATION_TOKENS = 2048  # in one batch, padding included: without gradients there is room for more than in training
CHECKPOINT_SECONDS = 300
TRAIN_SAMPLE = 100  # so many examples of the training part are evaluated, before and after


class Losses(NamedTuple):
    """Mean negative log-likelihood of a token, in nats; perplexity is its exponential."""

    train: float
    val: float


def train(
    model: nn.Module,
    optimizer: Optimizer,
    train_set: DialogueDataset,
    val_set: DialogueDataset,
    padding_id: int,
    settings: TrainingSettings,
    machine: Machine,
    run_folder: Path,
    checkpoint: Path | None = None,
) -> tuple[Losses, Losses]:
    """Train `model` in place; return the losses before and after. Those on the way go to screen and run folder.

    The loss of a step is the summed negative log-likelihood of all the learned tokens in all its batches divided by
    their number, so that every token counts the same: 8 examples together are 4 times 2.

    With `checkpoint`, the state of the run is kept in that file, and a run that finds it there goes on from it.
    """
    assert settings.epochs is not None  # `with_defaults` has filled it in
    steps_per_epoch = -(-len(train_set) // settings.step_size)
    steps = settings.epochs * steps_per_epoch
    steps = min(steps, settings.max_steps or steps)
    evaluate_every = settings.evaluate_every or steps_per_epoch
    torch.manual_seed(settings.seed)  # dropout
    finished = load_checkpoint(checkpoint, model, optimizer) if checkpoint else 0
    progress = Progress(run_folder, steps, steps_per_epoch, finished)
    lengths = train_set.lengths()
    saved = time.monotonic()

    before = evaluate_both(model, train_set, val_set, padding_id, machine)
    progress.evaluation(finished, before.val, before.train)
    for step, batches in enumerate(islice(all_steps(lengths, settings), steps), 1):
        if step <= finished:
            continue
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, steps, settings)
        made = [make_batch(train_set, numbers, padding_id, machine) for numbers in batches]
        try:
            loss, learned, norm = take_step(model, optimizer, made, settings.max_grad_norm, machine)
        except FloatingPointError as error:
            places = ", ".join(map(str, train_set.places([number for numbers in batches for number in numbers])))
            raise UserError(
                f"step {step}: {error}, on the dialogues {places} of the file;"
                " try a lower --learning-rate, more --warmup, or --precision fp32"
            ) from None

        progress.step(step, loss, learned, norm)
        if step % evaluate_every == 0 and step < steps:
            progress.evaluation(step, evaluate(model, val_set, padding_id, machine))
        if checkpoint and time.monotonic() - saved > CHECKPOINT_SECONDS:
            save_checkpoint(checkpoint, model, optimizer, step)
            saved = time.monotonic()
    after = evaluate_both(model, train_set, val_set, padding_id, machine)
    progress.evaluation(steps, after.val, after.train)
    progress.bar.close()
    return before, after


def take_step(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Sequence[tuple[Tensor, Tensor, int]],
    max_grad_norm: float,
    machine: Machine,
) -> tuple[float, int, float | None]:
    """One optimizer step over all of `batches`: its mean loss, its learned tokens, and the norm of its gradient.

    Raises:
        FloatingPointError: the loss is no number; the weights are as they were.
    """
    learned = sum(tokens for _, _, tokens in batches)
    loss = 0.0
    model.train()
    for inputs, targets, _ in batches:
        with machine.autocast():
            part = model(inputs, targets) / learned
        part.backward()
        loss += part.item()
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss}")
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm).item() if max_grad_norm else None
    optimizer.step()
    optimizer.zero_grad()
    return loss, learned, norm


def all_steps(lengths: Sequence[int], settings: TrainingSettings) -> Iterator[list[list[int]]]:
    """The batches of each step, as example numbers, epoch after epoch, without an end."""
    for epoch in count():
        yield from epoch_steps(lengths, settings.batch_size, settings.gradient_accumulation, settings.seed, epoch)


def make_batch(
    dataset: DialogueDataset, numbers: Iterable[int], padding_id: int, machine: Machine
) -> tuple[Tensor, Tensor, int]:
    """The examples `numbers` as inputs and targets (B, T) on the machine, and how many targets are learned.

    T is rounded up, as far as examples may go.
    """
    inputs, targets = collate([dataset[number] for number in numbers], padding_id)
    learned = int((targets != IGNORED).sum())
    missing = dataset.padded(inputs.size(1)) - inputs.size(1)
    inputs, targets = F.pad(inputs, (0, missing), value=padding_id), F.pad(targets, (0, missing), value=IGNORED)
    return inputs.to(machine.device), targets.to(machine.device), learned


@torch.inference_mode()
def evaluate(
    model: nn.Module, dataset: DialogueDataset, padding_id: int, machine: Machine, examples: int | None = None
) -> float:
    """Mean loss of a token over the first `examples` of `dataset` (none: all): one sum, one division."""
    model.eval()
    total, tokens = 0.0, 0
    for numbers in evaluation_batches(dataset.lengths()[:examples]):
        inputs, targets, learned = make_batch(dataset, numbers, padding_id, machine)
        with machine.autocast():
            total += model(inputs, targets).item()
        tokens += learned
    return total / tokens


def evaluation_batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Example numbers, shortest first, as many together as stay within `EVALUATION_TOKENS` when padded."""
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and round_up(lengths[number]) * (len(batch) + 1) > EVALUATION_TOKENS:
            yield batch
            batch = []
        batch.append(number)
    yield batch


def evaluate_both(
    model: nn.Module, train_set: DialogueDataset, val_set: DialogueDataset, padding_id: int, machine: Machine
) -> Losses:
    """Losses on both parts; of the training part, on its first `TRAIN_SAMPLE` examples."""
    return Losses(
        train=evaluate(model, train_set, padding_id, machine, TRAIN_SAMPLE),
        val=evaluate(model, val_set, padding_id, machine),
    )
