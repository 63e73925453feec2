"""Estimate a run's duration, and the number of steps that fit in `--max-minutes`, from its first steps."""

import time
from pathlib import Path

from settings import TrainingSettings
from support.errors import UserError
from support.files import read_json_object, write_json
from training.checkpoint import TrainingState
from training.device import Machine
from training.progress import Progress

MEASURED_STEPS = 5
LONG = 60  # show an ETA for runs longer than this, in seconds


class Pace:
    """Measures the first steps of a run, once.

    With `--max-minutes`, the measurement sets the number of steps. It is stored in `pace.json`, so that a run that is
    killed before its first checkpoint and started again has the same number.

    Raises:
        UserError: `pace.json` is damaged.
    """

    def __init__(self, run_folder: Path, settings: TrainingSettings, evaluate_every: int, machine: Machine) -> None:
        self.path = run_folder / "pace.json"
        self.limit = 60 * settings.max_minutes
        self.evaluate_every = evaluate_every
        self.compiles = settings.compile
        self.machine = machine
        self.started = time.perf_counter()
        self.evaluation_seconds = 0.0
        self.done = False
        advice = "delete it to set the number of steps again"
        self.recorded = read_json_object(self.path, advice) if self.limit and self.path.exists() else {}
        if self.recorded and {type(self.recorded.get(name)) for name in ("measured", "steps")} != {int}:
            raise UserError(f"{self.path} is damaged; {advice}")

    def measure(self, state: TrainingState, progress: Progress) -> None:
        """Call after each step: once enough are measured, print the remaining time, or set the number of steps."""
        if self.done or state.measured:
            return
        if self.recorded:
            if state.step >= self.recorded["measured"]:
                self.set_steps(state, progress, self.recorded["steps"], self.recorded["measured"])
            return
        elapsed = time.perf_counter() - self.started
        measured = len(progress.step_seconds)
        # The first step is slow because it compiles kernels and touches memory.
        usual = sorted(progress.step_seconds[1:])
        if self.compiles:  # one more may be slow: a loss over more tokens, or a batch of one example, is recompiled
            usual = usual[:-1]
        per_step = sum(usual) / max(1, len(usual)) + self.evaluation_seconds / self.evaluate_every
        ready = measured == MEASURED_STEPS or (self.limit and len(usual) > 0 and elapsed > self.limit / 10)
        # The clocks of processes differ: all use the primary's measurements.
        word = self.machine.agree(f"{float(ready)} {per_step} {elapsed + self.evaluation_seconds}").split()
        ready, per_step, needed = map(float, word)
        if not ready:
            return
        self.done = True
        if self.limit:
            fitting = int((self.limit - needed) / per_step)
            progress.say(f"{per_step:.2f} s per step; time limit: {self.limit / 60:g} minutes")
            self.set_steps(state, progress, min(state.steps, state.step + max(0, fitting)), state.step)
        elif (left := (state.steps - state.step) * per_step) > LONG:
            progress.say(f"{per_step:.2f} s per step: about {left / 60:.0f} min left")

    def set_steps(self, state: TrainingState, progress: Progress, steps: int, measured: int) -> None:
        progress.say(f"enough time for {steps} of {state.steps} steps")
        state.steps, state.measured = steps, measured
        progress.bar.total = steps
        if self.machine.primary and not self.recorded:
            write_json(self.path, {"measured": measured, "steps": steps})
