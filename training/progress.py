"""Progress reports of a run: logs in JSON Lines, and lines on the screen."""

import json
import math
import os
from pathlib import Path

from tqdm import tqdm

from support.errors import printable
from support.files import writing
from training.checkpoint import TrainingState

LOGS = ("metrics.jsonl", "timing.jsonl")
SHOWN = 100  # maximum number of characters of a reply on the screen


class Progress:
    """The progress bar, `metrics.jsonl` (without times: identical runs write identical bytes) and `timing.jsonl`.

    The training loss shown at an evaluation is the mean over all tokens learned since the previous one. Only the
    `primary` process prints and writes anything.
    """

    def __init__(self, run_folder: Path, state: TrainingState, steps_per_epoch: int, primary: bool = True) -> None:
        self.run_folder, self.state, self.steps_per_epoch, self.primary = run_folder, state, steps_per_epoch, primary
        self.bar = tqdm(
            total=state.steps,
            initial=state.step,
            unit="step",
            desc="training",
            dynamic_ncols=True,
            disable=None if primary else True,
        )
        self.step_seconds: list[float] = []
        self.asked = ""  # the input of `watched`, after it was shown
        if primary:
            self.cut_logs()

    def cut_logs(self) -> None:
        """Remove lines from the logs that are newer than the state from which the run resumes."""
        for name in LOGS:
            path, size = self.run_folder / name, self.state.sizes.get(name, 0)
            with writing(path):
                if (path.stat().st_size if path.exists() else 0) < size:
                    self.say(f"{path} has lost lines since the checkpoint was written")
                else:
                    path.touch()
                    os.truncate(path, size)

    def step(self, loss: float, tokens: int, grad_norm: float | None, seconds: float) -> None:
        """Record the last optimizer step; `loss` is the mean over its `tokens` learned tokens, in nats.

        `grad_norm` is the norm of the gradient before clipping; if it is NaN or infinite, the step was skipped.
        """
        step = self.state.step
        if grad_norm is None:
            self.log(train_loss=loss)
        elif math.isfinite(grad_norm):
            self.log(train_loss=loss, grad_norm=grad_norm)
        else:
            self.log(train_loss=loss, overflow=1)
        self.append("timing.jsonl", {"step": step, "seconds": round(seconds, 4), "tokens": tokens})
        self.step_seconds.append(seconds)
        self.state.tokens += tokens
        self.state.loss_sum += loss * tokens
        self.bar.set_postfix_str(f"loss {loss:.3f}, {tokens / seconds:.0f} tokens/s", refresh=False)
        self.bar.update()

    def evaluation(self, val_loss: float, train_set_loss: float | None = None) -> None:
        """Record an evaluation; `train_set_loss` is given if the training part was evaluated too."""
        state = self.state
        train_loss = state.loss_sum / state.tokens if train_set_loss is None else train_set_loss
        self.log(val_loss=val_loss, **({} if train_set_loss is None else {"train_set_loss": train_set_loss}))
        perplexity = math.exp(min(val_loss, 700))  # e ** 710 is too large for a float
        self.say(
            f"step {state.step:>5}  epoch {state.step / self.steps_per_epoch:>5.2f}  train loss {train_loss:.3f}"
            f"  validation loss {val_loss:.3f} (perplexity {perplexity:.1f})"
        )
        state.evaluations.append((state.step, val_loss))
        state.tokens, state.loss_sum = 0, 0.0

    def watched(self, case: dict[str, str]) -> None:
        """Record the model's reply at an evaluation; the first time, also show its input."""
        self.log(watched=case["model_response"])
        if not self.asked:
            self.asked = case["input"]
            self.say(f"  input      {shorten(self.asked)}")
        self.say(f"  true       {shorten(case['response'])}")
        self.say(f"  generated  {shorten(case['model_response'])}")

    def kept(self) -> None:
        """Print a line about the kept weights, and record their losses if they are not the last."""
        state, (step, loss) = self.state, self.state.evaluations[self.state.best_place]
        if not step:
            self.say(
                f"no training step lowered the validation loss of the base model ({loss:.3f}): the last weights are"
                " kept; try a lower --learning-rate"
            )
        elif step == state.step:
            self.say("kept: the last weights, which have the lowest validation loss")
        elif state.kept < 0:
            self.say(f"kept: the last weights; those of step {step} had a lower validation loss ({loss:.3f})")
        else:
            assert state.after is not None
            self.log(kept_step=step, kept_val_loss=loss, kept_train_set_loss=state.after.train)
            place = f"epoch {step / self.steps_per_epoch:.4g} (step {step} of {state.step})"
            self.say(f"kept: the weights of {place}, which have the lowest validation loss, {loss:.3f}")

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if self.primary:
            self.bar.write(printable(line))

    def log(self, **values: float | str) -> None:
        step = self.state.step
        self.append("metrics.jsonl", {"step": step, "epoch": round(step / self.steps_per_epoch, 4), **values})

    def append(self, name: str, values: dict[str, float | str]) -> None:
        if self.primary:
            path = self.run_folder / name
            # Open the file for each line, so that the line reaches the operating system immediately.
            with writing(path), open(path, "a", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps(values) + "\n")

    def flush(self) -> None:
        """Sync the logs to the disk, and store their sizes in the state."""
        if not self.primary:
            return
        for name in LOGS:
            path = self.run_folder / name
            with writing(path), open(path, "ab") as file:
                os.fsync(file.fileno())
                self.state.sizes[name] = file.tell()


def shorten(text: str) -> str:
    """`text` on one line, cut to `SHOWN` characters; `...` marks a cut."""
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else f"{line[: SHOWN - 4]} ..."


def show_losses(state: TrainingState) -> str:
    """The losses before and after training, as a line to print."""
    before, after = state.before, state.after
    assert before is not None
    assert after is not None
    return f"\ntrain loss {before.train:.3f} → {after.train:.3f}, validation loss {before.val:.3f} → {after.val:.3f}"
