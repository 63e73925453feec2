"""What a run reports about itself while it goes on: a JSON object a line, and the same on the screen."""

import json
import math
import time
from pathlib import Path

from tqdm import tqdm

from files import writing


class Progress:
    """The progress bar, `metrics.jsonl` (numbers only: the same run writes the same bytes) and `timing.jsonl`.

    The training loss shown at an evaluation is the mean over all tokens learned since the one before.
    """

    def __init__(self, run_folder: Path, steps: int, steps_per_epoch: int, finished: int = 0) -> None:
        self.metrics = run_folder / "metrics.jsonl"
        self.timing = run_folder / "timing.jsonl"
        self.steps_per_epoch = steps_per_epoch
        self.bar = tqdm(total=steps, initial=finished, unit="step", desc="training", dynamic_ncols=True, disable=None)
        self.step_ended = time.perf_counter()
        self.tokens, self.loss_sum = 0, 0.0

    def step(self, step: int, loss: float, tokens: int, grad_norm: float | None) -> None:
        """Record an optimizer step: mean loss of its `tokens` learned tokens, in nats."""
        self.log(step, train_loss=loss, **({} if grad_norm is None else {"grad_norm": grad_norm}))
        seconds = time.perf_counter() - self.step_ended
        append_line(self.timing, {"step": step, "seconds": round(seconds, 4), "tokens": tokens})
        self.tokens += tokens
        self.loss_sum += loss * tokens
        self.bar.set_postfix_str(f"loss {loss:.3f}, {tokens / seconds:.0f} tokens/s", refresh=False)
        self.bar.update()
        self.step_ended = time.perf_counter()

    def evaluation(self, step: int, val_loss: float, train_set_loss: float | None = None) -> None:
        """Record an evaluation; `train_set_loss` is given where the training part was evaluated too."""
        train_loss = self.loss_sum / self.tokens if train_set_loss is None else train_set_loss
        self.log(step, val_loss=val_loss, **({} if train_set_loss is None else {"train_set_loss": train_set_loss}))
        perplexity = math.exp(min(val_loss, 700))  # e ** 710 is no float
        epoch = step / self.steps_per_epoch
        self.bar.write(
            f"step {step:>5}  epoch {epoch:>5.2f}  train loss {train_loss:.3f}"
            f"  validation loss {val_loss:.3f} (perplexity {perplexity:.1f})"
        )
        self.tokens, self.loss_sum = 0, 0.0
        self.step_ended = time.perf_counter()  # evaluations are not training time

    def log(self, step: int, **values: float) -> None:
        append_line(self.metrics, {"step": step, "epoch": round(step / self.steps_per_epoch, 4), **values})


def append_line(path: Path, values: dict[str, float]) -> None:
    # Opened anew for each line: whatever happens next, what was logged is with the operating system.
    with writing(path), open(path, "a", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(values) + "\n")
