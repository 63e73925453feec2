"""Mirror a run to Weights & Biases or TensorBoard, from a separate process that reads the run folder.

The run only writes its folder and never waits for a tracker: an error, a hang or a delay here does not affect the run.
A finished run can also be mirrored, and mirroring it again adds no duplicate points. In the program's folder, run:

    python -m training.mirror wandb runs/gpt2-1 < /dev/null

Weights & Biases: run `wandb login` once. WANDB_PROJECT, WANDB_ENTITY and wandb's other variables work as usual. With
WANDB_MODE=offline no network is needed; `wandb sync <run folder>/wandb/offline-run-*` uploads later.
TensorBoard: `tensorboard --logdir runs` shows all runs side by side.
"""

import contextlib
import importlib
import json
import math
import os
import re
import secrets
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support.errors import check_extra, display, printable
from support.files import PROJECT, read_json_object, write_json, writing

REQUIREMENTS = {"wandb": "wandb>=0.22,<1", "tensorboard": "tensorboard>=2.18,<3"}  # as in requirements-extra.txt
POLL = 1.0  # seconds between reads of the run folder
WANDB_PROJECT = "gpt2-conversations"
WANDB_ENVIRONMENT = {  # not arguments: the user's variables take precedence, and old versions ignore unknown ones
    "WANDB_SILENT": "true",
    "WANDB_CONSOLE": "off",
    "WANDB_DISABLE_GIT": "true",
    "WANDB_DISABLE_CODE": "true",
    "WANDB_FINISH_TIMEOUT": "600",  # if the run is gone and there is no network, wandb would retry forever
    "WANDB_FINISH_TIMEOUT_RAISES": "true",
}


def check_tracker(kind: str) -> None:
    """Check before any other work that the tracker of `--track` can be loaded.

    Raises:
        UserError: its package is not installed.
    """
    if kind != "none":
        check_extra(kind, f"--track {kind}", REQUIREMENTS[kind])


class Mirror:
    """The parent's handle on the process that mirrors the run."""

    def __init__(self, kind: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self.kind, self.process, self.log = kind, process, log

    def finish(self, timeout: float = 60) -> str | None:
        """Tell the mirror that the run is over and wait for the last upload; return a line to print if that fails."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # even a killed process can hang on a disk
                self.process.wait(5)
            outcome = f"did not finish within {timeout:g} s and was stopped"
        else:
            outcome = f"failed with exit code {code}"
            if code == 0:
                return None
        return f"{self.kind}: logging {outcome} ({self.last_words()}; full log: {self.log}); the run is unaffected"

    def last_words(self) -> str:
        """The last line of the log: the error, if Python ended with one."""
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        except OSError:
            lines = []
        written = [line.strip() for line in lines if line.strip()]
        return printable(written[-1])[:300] if written else "no output"


def start_mirror(kind: str, run_folder: Path) -> Mirror:
    """Start the process that mirrors `run_folder`, which must already contain `settings.json`.

    Its standard input is an empty pipe that closes when the run ends for any reason.

    Raises:
        UserError: its log cannot be written.
    """
    log = run_folder / f"{kind}.log"
    with writing(log), open(log, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "training.mirror", kind, run_folder.resolve()],
            cwd=PROJECT,
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C stops only the run; the mirror then uploads the rest and ends
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # the same on Windows
        )
    return Mirror(kind, process, log)


@contextlib.contextmanager
def mirrored(kind: str, run_folder: Path) -> Iterator[None]:
    """Mirror the run inside this context; then wait for the last upload, and print a line if it failed.

    Raises:
        UserError: the mirror's log cannot be written.
    """
    mirror = None if kind == "none" else start_mirror(kind, run_folder)
    yield  # if the run is stopped here, the mirror uploads the progress so far and ends
    if mirror and (line := mirror.finish()):
        display(line)


class MetricsFile:
    """A `metrics.jsonl` that grows, and that a resumed run may truncate."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset, self.last_line = 0, b""

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """The lines completed since the last call, and whether a truncated file is being read again from its start."""
        if not self.path.exists():
            return [], False
        with open(self.path, "rb") as file:
            file.seek(self.offset - len(self.last_line))
            cut = file.read(len(self.last_line)) != self.last_line
            if cut:
                self.offset, self.last_line = file.seek(0), b""
            content = file.read()
        lines = content[: content.rfind(b"\n") + 1].splitlines(keepends=True)  # leave an incomplete line for later
        self.offset += sum(map(len, lines))
        self.last_line = lines[-1] if lines else self.last_line
        return [encodable(json.loads(line)) for line in lines], cut


class WandbTracker:
    """Logs each line of the metrics as a row, with `step` as the x axis of every chart.

    A row's number depends only on its position in the run, so that a resumed run logs no row twice.
    """

    def __init__(self, run_folder: Path, settings: dict[str, Any]) -> None:
        for name, value in WANDB_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self.wandb = importlib.import_module("wandb")
        self.state = run_folder / "wandb.json"
        known = read_json_object(self.state) if self.state.exists() else {"id": secrets.token_hex(4), "row": -1}
        self.id, self.row = known["id"], known["row"]
        self.save()
        self.run = self.wandb.init(
            project=os.environ.get("WANDB_PROJECT", WANDB_PROJECT),
            name=run_folder.name,
            dir=run_folder,
            config=settings,
            id=self.id,
            resume="allow",
        )
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")
        self.watched: list[list[Any]] = []

    def metrics(self, line: dict[str, Any]) -> None:
        kinds = ("train_loss", "val_loss", "watched")
        place = next((place for place, kind in enumerate(kinds) if kind in line), 3)  # the order within a step
        if "watched" in line:  # all replies so far: a panel shows only the newest table
            self.watched.append([line["step"], line["watched"]])
            line = {**line, "watched": self.wandb.Table(columns=["step", "watched"], data=list(self.watched))}
        self.log(5 * int(line["step"]) + place, line)

    def cases(self, step: int, cases: list[dict[str, str]]) -> None:
        table = self.wandb.Table(columns=list(cases[0]), data=[list(case.values()) for case in cases])
        self.log(5 * step + 4, {"step": step, "generated_conversations": table})

    def log(self, row: int, values: dict[str, Any]) -> None:
        if row > self.row:
            self.run.log(values, step=row)
            self.row = row

    def rewind(self) -> None:
        """Restart the table of replies; rows that are read again are recognised by their numbers."""
        self.watched.clear()

    def save(self) -> None:
        write_json(self.state, {"id": self.id, "row": self.row})

    def finish(self, complete: bool) -> None:
        self.run.finish(exit_code=0 if complete else 1)


class TensorBoardTracker:
    """Rewrites all metrics each time, after a marker that makes TensorBoard discard all earlier points."""

    def __init__(self, run_folder: Path, settings: dict[str, Any]) -> None:
        self.folder = run_folder / "tensorboard"
        indented = "\n".join("    " + line for line in json.dumps(settings, indent=2, ensure_ascii=False).split("\n"))
        self.settings = printable(indented)  # Markdown shows an indented block verbatim
        self.open()

    def open(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(self.folder, purge_step=0)
        self.writer.add_text("settings", self.settings, 0)

    def metrics(self, line: dict[str, Any]) -> None:
        for name, value in line.items():
            if isinstance(value, str):
                self.writer.add_text(name, markdown_cell(value), int(line["step"]))
            elif name not in ("step", "epoch"):
                self.writer.add_scalar(name, value, int(line["step"]))

    def cases(self, step: int, cases: list[dict[str, str]]) -> None:
        self.writer.add_text("generated_conversations", markdown_table(cases), step)

    def rewind(self) -> None:
        self.writer.close()
        self.open()

    def save(self) -> None:
        self.writer.flush()

    def finish(self, complete: bool) -> None:
        self.writer.close()


TRACKERS = {"wandb": WandbTracker, "tensorboard": TensorBoardTracker}


def markdown_table(cases: list[dict[str, str]]) -> str:
    """`cases` as a table that shows every text verbatim, even if it contains Markdown or HTML."""
    rows = [list(cases[0]), *(list(case.values()) for case in cases)]
    lines = ["| " + " | ".join(map(markdown_cell, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def markdown_cell(text: str) -> str:
    lines = (printable(line) for line in text.splitlines())
    return "<br>".join(re.sub(r"[^\w\s]|_", lambda symbol: f"&#{ord(symbol[0])};", line) for line in lines)


def read_unicode(path: Path) -> Any:
    """A JSON file's content, with all text in a form that a tracker can encode."""
    return encodable(json.loads(path.read_text(encoding="utf-8")))


def encodable(content: Any) -> Any:
    """JSON `content` with lone surrogates, which no tracker can encode, replaced by question marks."""
    return json.loads(json.dumps(content, ensure_ascii=False).encode("utf-8", "replace"))


def mirror(kind: str, run_folder: Path, ended: threading.Event) -> None:
    """Log the contents of `run_folder`, old and new, until the run has ended and everything is logged."""
    tracker = TRACKERS[kind](run_folder, read_unicode(run_folder / "settings.json"))
    metrics = MetricsFile(run_folder / "metrics.jsonl")
    step, over = 0, False
    while not over:
        over = ended.wait(POLL)  # check before reading, to read everything that was written before the end
        lines, cut = metrics.read()
        if cut:
            tracker.rewind()
        for line in lines:
            if "val_loss" in line:
                line["perplexity"] = math.exp(min(line["val_loss"], 700))  # e ** 710 is too large for a float
            tracker.metrics(line)
            step = int(line["step"])
        if lines:
            tracker.save()
    # Cases older than the last metrics are from before the run was resumed.
    cases = run_folder / "generated_conversations.json"
    complete = cases.exists() and cases.stat().st_mtime_ns >= metrics.path.stat().st_mtime_ns
    if complete and (content := read_unicode(cases)):
        tracker.cases(step, content)
        tracker.save()
    tracker.finish(complete)


def wait_for_end(ended: threading.Event) -> None:
    # Don't use sys.stdin: a waiting thread would hold its lock, which makes Python's shutdown fail.
    while os.read(0, 4096):
        pass
    ended.set()


def main() -> None:
    ended = threading.Event()
    threading.Thread(target=wait_for_end, args=(ended,), daemon=True).start()
    if hasattr(os, "nice"):
        os.nice(10)  # give training priority
    mirror(sys.argv[1], Path(sys.argv[2]), ended)


if __name__ == "__main__":
    main()
