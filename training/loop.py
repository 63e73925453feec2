"""The training loop: plain PyTorch, from batches to a better model."""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dialogues.batches import IGNORED, DialogueDataset, collate, epoch_batches
from settings import TrainingSettings
from training.device import Machine
from training.optimizer import make_optimizer
from training.tracking import Progress

EVALUATION_TOKENS = 2048  # in one batch, padding included: without gradients there is room for more than in training
TRAIN_SAMPLE = 100  # so many examples of the training part are evaluated, before and after, or as validation has


class Losses(NamedTuple):
    """Mean negative log-likelihood of a token, in nats; perplexity is its exponential."""

    train: float
    val: float


def train(
    model: nn.Module,
    train_set: DialogueDataset,
    val_set: DialogueDataset,
    padding_id: int,
    settings: TrainingSettings,
    machine: Machine,
    run_folder: Path,
) -> tuple[Losses, Losses]:
    """Train `model` in place; return the losses before and after. Those on the way go to screen and run folder.

    The loss of a step is the summed negative log-likelihood of all its learned tokens divided by their number, so that
    every token counts the same, whatever the batch.
    """
    steps_per_epoch = math.ceil(len(train_set) / settings.batch_size)
    steps = settings.epochs * steps_per_epoch
    evaluate_every = settings.evaluate_every or steps_per_epoch
    torch.manual_seed(settings.seed)  # dropout
    optimizer = make_optimizer(model, settings)
    progress = Progress(run_folder, steps, steps_per_epoch)

    before = evaluate_both(model, train_set, val_set, padding_id, machine)
    progress.evaluation(0, before.val, before.train)
    step = 0
    for epoch in range(settings.epochs):
        for numbers in epoch_batches(len(train_set), settings.batch_size, settings.seed, epoch):
            inputs, targets, learned = make_batch(train_set, numbers, padding_id, machine)
            model.train()
            with machine.autocast():
                loss = model(inputs, targets) / learned
            loss.backward()
            norm = None
            if settings.max_grad_norm:
                norm = nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm).item()
            optimizer.step()
            optimizer.zero_grad()

            step += 1
            progress.step(step, loss.item(), learned, norm)
            if step % evaluate_every == 0 and step < steps:
                progress.evaluation(step, evaluate(model, val_set, padding_id, machine))
    after = evaluate_both(model, train_set, val_set, padding_id, machine)
    progress.evaluation(steps, after.val, after.train)
    progress.bar.close()
    return before, after


def make_batch(
    dataset: DialogueDataset, numbers: Iterable[int], padding_id: int, machine: Machine
) -> tuple[Tensor, Tensor, int]:
    """The examples `numbers` as inputs and targets (B, T) on the machine, and how many targets are learned."""
    inputs, targets = collate([dataset[number] for number in numbers], padding_id)
    learned = int((targets != IGNORED).sum())
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


def evaluation_batches(lengths: Sequence[int]) -> Iterator[range]:
    """Consecutive example numbers, as many together as stay within `EVALUATION_TOKENS` when padded."""
    start, longest = 0, 0
    for number, length in enumerate(lengths):
        longest = max(longest, length)
        if number > start and longest * (number + 1 - start) > EVALUATION_TOKENS:
            yield range(start, number)
            start, longest = number, length
    yield range(start, len(lengths))


def evaluate_both(
    model: nn.Module, train_set: DialogueDataset, val_set: DialogueDataset, padding_id: int, machine: Machine
) -> Losses:
    """Losses on both parts; of a large training part, on as many examples as validation has."""
    sample = max(len(val_set), TRAIN_SAMPLE)
    return Losses(
        train=evaluate(model, train_set, padding_id, machine, sample),
        val=evaluate(model, val_set, padding_id, machine),
    )
