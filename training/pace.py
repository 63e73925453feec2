"""How long a run takes, told by its first steps, and how many steps fit into `--max-minutes`."""

import time
from pathlib import Path

from files import read_json_object, write_json
from settings import TrainingSettings
from training.checkpoint import RunState
from training.device import Machine
from training.tracking import Progress

MEASURED_STEPS = 5
LONG = 60  # seconds from which on one wants to know


class Pace:
    """Measures the first steps of a run, once.

    With `--max-minutes` they set the number of steps, which is kept in `pace.json`: a run that is killed before its
    first checkpoint and started again has as many.
    """

    def __init__(self, run_folder: Path, settings: TrainingSettings, evaluate_every: int, machine: Machine) -> None:
        self.path = run_folder / "pace.json"
        self.limit = 60 * settings.max_minutes
        self.evaluate_every = evaluate_every
        self.machine = machine
        self.started = time.perf_counter()
        self.evaluation_seconds = 0.0
        self.done = False

    def measure(self, state: RunState, progress: Progress) -> None:
        """After a step: tell, when enough of them are measured, how long the rest takes; perhaps set their number."""
        if self.done or state.measured:
            return
        recorded = read_json_object(self.path) if self.limit and self.path.exists() else {}
        elapsed = time.perf_counter() - self.started
        measured = len(progress.step_seconds)
        # The first step is slow: kernels are made and memory is touched.
        seconds = sum(progress.step_seconds[1:]) / max(1, measured - 1)
        per_step = seconds + self.evaluation_seconds / self.evaluate_every
        ready = measured == MEASURED_STEPS or (self.limit and measured > 1 and elapsed > self.limit / 10)
        # The clocks of several processes differ: the first one's word is everybody's.
        ready, per_step, elapsed = (
            float(word) for word in self.machine.agree(f"{float(ready)} {per_step} {elapsed}").split()
        )
        if recorded:
            ready = state.step == recorded["measured"]
        if not ready:
            return
        self.done = True
        if self.limit:
            fitting = int((self.limit - elapsed - self.evaluation_seconds) / per_step)
            steps = recorded.get("steps", min(state.steps, state.step + max(0, fitting)))
            progress.say(
                f"{per_step:.2f} s a step: {steps} of {state.steps} steps, to end after {self.limit / 60:g} minutes"
            )
            state.steps, state.measured = steps, state.step
            progress.bar.total = steps
            if self.machine.primary:
                write_json(self.path, {"measured": state.step, "steps": steps})
        elif (left := (state.steps - state.step) * per_step) > LONG:
            progress.say(f"{per_step:.2f} s a step: about {left / 60:.0f} min to go")
