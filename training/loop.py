"""The training loop, in plain PyTorch."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from dialogues.batches import IGNORED, ROUND, DialogueDataset, collate, epoch_steps, evaluation_batches
from gpt_model import GPTModel
from settings import RunSettings, TrainingSettings
from support.errors import UserError
from training.captured import CapturedSteps, choose_lengths, why_eager
from training.checkpoint import Checkpoints, Damaged, Losses, TrainingState
from training.device import Machine, for_training
from training.optimizer import learning_rate_at
from training.pace import Pace
from training.progress import Progress
from training.step import Batch, Learner, set_learning_rate, take_step
from training.stopping import StopSignals

TRAIN_SAMPLE = 100  # training examples evaluated before and after training
COUNTED = 10_000  # number of steps whose batches determine the lengths of CUDA graphs


class Examples(NamedTuple):
    """The examples for training and evaluating a model."""

    train: DialogueDataset
    val: DialogueDataset
    padding_id: int


@dataclass(frozen=True)
class TrainingSetup:
    """Everything that a training run needs."""

    model: GPTModel
    optimizer: Optimizer
    examples: Examples
    settings: TrainingSettings
    saving: RunSettings
    machine: Machine
    checkpoints: Checkpoints  # in the run folder
    processes: int = 1  # process count at the first start, which determines the size of a step
    watch: Callable[[], dict[str, str]] | None = None  # returns the model's current reply, as in the output file


class Trainer:
    """A training run in progress (`state`), from its start or from its checkpoint."""

    def __init__(self, setup: TrainingSetup) -> None:
        self.setup, self.settings, self.machine, self.examples = setup, setup.settings, setup.machine, setup.examples
        settings, machine, checkpoints = setup.settings, setup.machine, setup.checkpoints
        self.steps_per_epoch, steps = settings.steps(len(setup.examples.train), setup.processes)
        self.evaluate_every = settings.evaluate_every or self.steps_per_epoch
        self.state = checkpoints.load(setup.model, setup.optimizer) or TrainingState()
        former = self.state.steps
        self.state.steps = former if self.state.measured else steps
        scaler = machine.gradient_scaler(self.state.scaler)
        shared = machine.share(for_training(setup.model, settings))
        self.learner = Learner(shared, setup.optimizer, scaler, settings.max_grad_norm)
        run_folder = checkpoints.folder.parent
        self.progress = Progress(run_folder, self.state, self.steps_per_epoch, machine.primary)
        self.pace = Pace(run_folder, settings, self.evaluate_every, machine)
        if 0 < former < self.state.steps:
            self.progress.say(
                f"extended from {former} to {steps} steps: the learning-rate schedule now spans {steps} steps,"
                f" and the evaluation after step {self.state.evaluations[-1][0]} counts like any other"
            )
        self.saved_step, self.saved_at = self.state.step, time.monotonic()
        self.take_step = self.choose_steps()
        self.pace.measure(self.state, self.progress)  # use the pace measured before the run was stopped

    def choose_steps(self) -> Callable[[Sequence[Batch]], tuple[float, int, float | None]]:
        """The function that takes a step; on a GPU, it replays CUDA graphs if possible. Prints the choice."""
        machine, settings, started = self.machine, self.settings, time.perf_counter()
        eager = partial(take_step, self.learner, machine=machine)
        if machine.device.type != "cuda":
            return eager
        if why := why_eager(machine, settings, self.setup.optimizer):
            self.progress.say(f"training steps: without CUDA graphs ({why})")
            return eager
        train_set, batches = self.examples.train, settings.step_batches(self.setup.processes)
        lengths = choose_lengths(self.batch_lengths(), train_set.padded(max(train_set.lengths()) - 1))
        steps = CapturedSteps(
            self.learner, machine, min(settings.batch_size, len(train_set)), lengths, accumulates=batches > 1
        )
        if steps.failure:
            self.progress.say(f"training steps: without CUDA graphs ({steps.failure})")
            return steps
        self.progress.say(
            f"training steps: {len(steps.graphs)} CUDA graphs, captured in {time.perf_counter() - started:.1f} s;"
            f" batches are padded to {', '.join(map(str, lengths))} tokens"
        )
        return steps

    def batch_lengths(self) -> Iterator[int]:
        """The padded length of each batch in the first `COUNTED` steps of the run."""
        lengths, padded = self.examples.train.lengths(), self.examples.train.padded
        steps = self.settings.steps(len(lengths), self.setup.processes)[1]
        for step in islice(all_steps(lengths, self.settings, processes=self.setup.processes), min(steps, COUNTED)):
            yield from (padded(max(lengths[number] for number in batch) - 1) for batch in step)

    @property
    def epoch_is_over(self) -> bool:
        return self.state.step > 0 and self.state.step % self.steps_per_epoch == 0

    def step(self, batches: Sequence[Sequence[int]]) -> None:
        """Take and log the next optimizer step, over batches of example numbers."""
        settings, machine = self.settings, self.machine
        step = self.state.step + 1
        started = time.perf_counter()  # after evaluations and checkpoints
        set_learning_rate(self.learner.optimizer, learning_rate_at(step, self.state.steps, settings))
        made = []
        for place, numbers in enumerate(machine.take_share(batches)):
            batch = make_batch(self.examples.train, numbers, self.examples.padding_id, machine)
            seed = batch_seed(settings.seed, step, machine.rank + place * machine.processes)
            made.append(batch._replace(seed=seed))
        try:
            loss, learned, norm = self.take_step(made)
        except FloatingPointError as error:
            numbers = [number for batch in batches for number in batch]
            places = ", ".join(map(str, self.examples.train.places(numbers)))
            precision = "" if machine.precision == "fp32" else ", or --precision fp32"
            raise UserError(
                f"step {step}: {error} on dialogues {places} of the data;"
                f" try a lower --learning-rate or more --warmup{precision}"
            ) from None
        self.state.step = step
        self.progress.step(loss, learned, norm, time.perf_counter() - started)

    def evaluation_is_due(self) -> bool:
        """Whether to evaluate now: at the start, every `evaluate_every` steps, and at the end; never twice per step."""
        step, done = self.state.step, self.state.evaluations
        due = step % self.evaluate_every == 0 or step >= self.state.steps
        return due and (not done or done[-1][0] != step)

    def measure(self) -> tuple[float, float | None, dict[str, str] | None]:
        """Measure the validation loss, plus the training loss at the start and end of the run; `--watch` adds a reply.

        Raises:
            UserError: a loss is NaN or infinite.
        """
        started = time.perf_counter()
        model, machine, (train_set, val_set, padding_id) = self.setup.model, self.machine, self.examples
        val_loss = evaluate(model, val_set, padding_id, machine)
        at_an_end = self.state.step == 0 or self.state.step >= self.state.steps or self.is_hopeless(val_loss)
        train_loss = evaluate(model, train_set, padding_id, machine, TRAIN_SAMPLE) if at_an_end else None
        if not math.isfinite(val_loss + (train_loss or 0)):
            precision = "" if self.machine.precision == "fp32" else ", or try --precision fp32"
            advice = "try a lower --learning-rate" if self.state.step else f"restore the base model{precision}"
            raise UserError(f"step {self.state.step}: the evaluation loss is not finite; {advice}")
        watched = self.setup.watch() if self.setup.watch else None
        self.pace.evaluation_seconds = time.perf_counter() - started
        return val_loss, train_loss, watched

    def record(self, val_loss: float, train_loss: float | None, watched: dict[str, str] | None) -> None:
        """Log the evaluation; with `--keep best`, save the weights if they are the best so far."""
        self.progress.evaluation(val_loss, train_loss)
        if watched:
            self.progress.watched(watched)
        if train_loss is not None:
            self.state.after = Losses(train_loss, val_loss)
            self.state.before = self.state.before or self.state.after
        if self.chooses and self.state.best == self.state.step > 0:
            try:
                self.setup.checkpoints.save_best(self.setup.model, self.state)
            except UserError as error:
                self.progress.say(f"the weights of step {self.state.step} are not kept: {error}")

    def is_hopeless(self, *newest: float) -> bool:
        """Whether `--early-stopping` has seen enough evaluations without improvement, up to the `newest` loss."""
        patience, losses = self.settings.early_stopping, [*(loss for _, loss in self.state.evaluations), *newest]
        return bool(patience) and len(losses) - 1 - losses.index(min(losses)) >= patience

    @property
    def chooses(self) -> bool:
        """Whether this process keeps the best weights."""
        return self.settings.keep == "best" and self.machine.primary

    def restore_best(self) -> bool:
        """Restore the best weights; if their file is damaged, print the error and return False."""
        try:
            self.setup.checkpoints.load_best(self.setup.model, self.state)
        except Damaged as error:
            self.progress.say(f"the best weights are lost: {error}")
            self.state.kept = -1
        return self.state.kept >= 0

    def choose_weights(self) -> None:
        """Restore the weights with the lowest validation loss, or keep the last; print the choice."""
        state = self.state
        if not self.chooses:
            return
        if state.kept not in (-1, state.step) and self.restore_best():
            alone = self.machine._replace(processes=1)  # the other processes are done
            train_set, _, padding_id = self.examples
            train_loss = evaluate(self.setup.model, train_set, padding_id, alone, TRAIN_SAMPLE)
            state.after = Losses(train_loss, state.evaluations[state.best_place][1])
        self.progress.kept()

    def save_is_due(self) -> bool:
        minutes = self.setup.saving.checkpoint_minutes
        if minutes == 0:
            return self.epoch_is_over
        # The clocks of processes differ, so the processes must agree.
        return self.machine.total(time.monotonic() - self.saved_at > 60 * minutes)[0] > 0

    def save(self) -> None:
        """Write a checkpoint unless it would contain nothing new. A full disk does not stop the run."""
        if self.state.step == self.saved_step:
            return
        self.saved_step = self.state.step  # even if writing fails, because all processes must take the same path
        self.state.scaler = self.learner.scaler.state_dict()
        self.progress.flush()
        try:
            self.progress.say(self.setup.checkpoints.save(self.setup.model, self.setup.optimizer, self.state))
        except UserError as error:
            self.progress.say(f"no checkpoint of step {self.state.step}: {error}")
        self.saved_at = time.monotonic()


def train(
    trainer: Trainer, signals: StopSignals, after_epoch: Callable[[int], None] = lambda epoch: None
) -> TrainingState:
    """Train the model in place, and return the final state: its losses, and the step whose weights are kept.

    Losses and evaluations go to the screen and into the run folder, which also holds the checkpoints.

    The loss of a step is the mean negative log-likelihood over all learned tokens of all its batches, so that every
    token counts the same: one batch of 8 examples equals 4 accumulated batches of 2.

    A run that finds a checkpoint resumes from it. A run that is stopped by a signal writes a checkpoint first. After
    the last step, signals are held back until the model is saved.

    Args:
        after_epoch: called with the number of each finished epoch; a resumed run may repeat the last call.

    Raises:
        UserError: the loss is NaN or infinite.
        KeyboardInterrupt: the run was stopped; the message says after which step.
    """
    state, processes = trainer.state, trainer.setup.processes
    plan = all_steps(trainer.examples.train.lengths(), trainer.settings, state.step, processes)
    try:
        while True:
            if trainer.epoch_is_over:
                after_epoch(state.step // trainer.steps_per_epoch)
            if trainer.evaluation_is_due():
                measured = trainer.measure()
                with signals.whole():
                    trainer.record(*measured)
            signals.check()
            if state.step >= state.steps or trainer.is_hopeless():
                break
            if trainer.save_is_due():
                with signals.whole():
                    trainer.save()
            with signals.whole():
                trainer.step(next(plan))
                trainer.pace.measure(state, trainer.progress)
    except KeyboardInterrupt:
        trainer.save()
        raise KeyboardInterrupt(f" after step {state.step} of {state.steps}") from None
    signals.hold()  # otherwise progress since the last checkpoint would be lost
    if trainer.setup.saving.keep_checkpoint:
        trainer.save()
    trainer.learner.optimizer.zero_grad()  # frees the gradients that captured steps keep in place
    trainer.choose_weights()
    trainer.progress.bar.close()
    return state


def all_steps(
    lengths: Sequence[int], settings: TrainingSettings, finished: int = 0, processes: int = 1
) -> Iterator[list[list[int]]]:
    """Yield the batches of each step after the first `finished`, as example numbers, epoch after epoch, forever."""
    first, done = divmod(finished, settings.steps(len(lengths), processes)[0])
    for epoch in count(first):
        steps = epoch_steps(lengths, settings.batch_size, settings.step_batches(processes), settings.seed, epoch)
        yield from steps[done:]
        done = 0


def batch_seed(seed: int, step: int, batch: int) -> int:
    """The dropout seed of a batch; it depends neither on earlier steps nor on the process that computes the batch."""
    return int(np.random.SeedSequence([seed, step, batch]).generate_state(1, np.uint64)[0])


def make_batch(dataset: DialogueDataset, numbers: Sequence[int], padding_id: int, machine: Machine) -> Batch:
    """The examples `numbers` as a batch on the device.

    Without examples, it is a batch of ignored targets.
    """
    if not numbers:
        inputs = torch.full((1, ROUND), padding_id, device=machine.device)
        return Batch(inputs, torch.full_like(inputs, IGNORED), 0)
    inputs, targets = collate([dataset[number] for number in numbers], padding_id, dataset.padded)
    learned = int((targets != IGNORED).sum())
    return Batch(inputs.to(machine.device), targets.to(machine.device), learned)


@torch.no_grad()
def evaluate(
    model: nn.Module, dataset: DialogueDataset, padding_id: int, machine: Machine, examples: int | None = None
) -> float:
    """Mean loss per token over the first `examples` of `dataset` (default: all); not a mean of batch means."""
    model.eval()
    total, tokens = 0.0, 0
    for numbers in machine.take_share(list(evaluation_batches(dataset.lengths()[:examples]))):
        inputs, targets, learned, _ = make_batch(dataset, numbers, padding_id, machine)
        with machine.autocast():
            total += model(inputs, targets).item()
        tokens += learned
    total, tokens = machine.total(total, tokens)
    return total / tokens
