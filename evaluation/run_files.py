"""Read a run folder; a missing, malformed or older file affects only its own section of the report."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from support.errors import UserError, reason
from support.files import Json, read_json

EVALUATION_VERSION = 1  # format of evaluation.json
READ = ("settings.json", "ledger.json", "metrics.jsonl", "evaluation.json", "generated_conversations.json")
LEFT_OUT = "it is left out of the report"
NAMED_LINES = 5  # maximum number of malformed lines to name in a note
LAST_STEP = 1e12  # lines with a later step are ignored
LARGEST = 1e6  # larger losses are left out of the plots


class Point(NamedTuple):
    step: int
    epoch: float | None
    loss: float


@dataclass
class Losses:
    """The curves of metrics.jsonl, in nats per token."""

    train: list[Point] = field(default_factory=list)
    """loss of each optimizer step"""
    train_set: list[Point] = field(default_factory=list)
    """loss on the whole training part"""
    val: list[Point] = field(default_factory=list)
    no_numbers: int = 0
    """number of values that are not finite, or too large for a loss"""
    kept_step: int | None = None
    """the step whose weights were kept, if not the last"""
    kept_train_set: float | None = None
    """the loss of these weights on the training part"""

    @property
    def best(self) -> Point | None:
        return min(self.val, key=lambda point: point.loss, default=None)


class Watched(NamedTuple):
    step: int
    last_step: int
    """the reply stayed the same until this step"""
    text: str


@dataclass
class RunFiles:
    """The content of a run folder; a missing or malformed file is empty here, and `missing` has the reason."""

    folder: Path
    settings: Json = field(default_factory=dict)
    ledger: Json = field(default_factory=dict)
    dialogue: Json = field(default_factory=dict)
    """dialogue.json of the model folder: template, speakers"""
    evaluation: Json = field(default_factory=dict)
    generated: list[Any] = field(default_factory=list)
    metrics: list[Json] = field(default_factory=list)
    parameters: int | None = None
    missing: dict[str, str] = field(default_factory=dict)
    """file name → the reason, as a sentence"""
    notes: list[str] = field(default_factory=list)
    """a sentence on each broken or unknown piece of content"""


def number(value: Any) -> float | None:
    """`value` if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer too large for a float
        return None


def mapping(value: Any) -> Json:
    """`value` if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def sequence(value: Any) -> list[Any]:
    """`value` if it is a JSON list, else an empty one."""
    return value if isinstance(value, list) else []


def objects(value: Any) -> list[Json]:
    """The JSON objects in a list."""
    return [item for item in sequence(value) if isinstance(item, dict)]


def last_part(path: Any) -> str:
    """The last component of a path, which may come from a different operating system."""
    return re.split(r"[\\/]", str(path).rstrip("\\/"))[-1]


def read_run(folder: Path) -> RunFiles:
    """Read the files of a run folder that a report needs.

    Raises:
        UserError: the folder does not exist, or has no files of a run.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a run folder, such as runs/tiny-1")
    if not any((folder / name).is_file() for name in READ):
        raise UserError(
            f"{folder} is not a run folder (it has none of {', '.join(READ)}); give a run folder, such as runs/tiny-1"
        )
    run = RunFiles(folder)
    run.settings = read_file(run, "settings.json", dict)
    run.ledger = read_file(run, "ledger.json", dict)
    run.metrics = read_file(run, "metrics.jsonl", list, lambda path: read_lines(path, run.notes))
    run.evaluation = read_file(run, "evaluation.json", dict)
    run.generated = read_file(run, "generated_conversations.json", list)
    if (folder / "model" / "dialogue.json").is_file():
        run.dialogue = read_file(run, "model/dialogue.json", dict)
    run.parameters = count_parameters(folder / "model" / "model.safetensors")
    version = run.evaluation.get("version", EVALUATION_VERSION)
    if version != EVALUATION_VERSION:
        run.notes.append(
            f"evaluation.json has version {str(version)[:20]}, but this program knows version {EVALUATION_VERSION}:"
            " unknown content is not shown"
        )
    return run


def read_file(run: RunFiles, name: str, kind: type, read: Callable[[Path], Any] | None = None) -> Any:
    """Read a file of the run with `read`, or as JSON of a `kind`; on failure, return an empty one and add a note."""
    path = run.folder / name
    if not path.is_file():
        run.missing[name] = f"There is no {name} in this folder."
        return kind()
    try:
        return read(path) if read else read_json(path, kind, LEFT_OUT)
    except UserError as error:
        run.missing[name] = f"{name} could not be read."
        run.notes.append(str(error))
        return kind()


def read_lines(path: Path, notes: list[str]) -> list[Json]:
    """The JSON objects of metrics.jsonl that have a step; add a note about the other lines.

    Raises:
        UserError: the file can't be read.
    """
    try:
        content = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from error
    lines, broken = [], []
    for place, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        step = number(mapping(value).get("step"))
        if step is not None and 0 <= step < LAST_STEP:
            lines.append(value)
        else:
            broken.append(place)
    if broken:
        named = f"{', '.join(map(str, broken[:NAMED_LINES]))}{', …' if len(broken) > NAMED_LINES else ''}"
        one = len(broken) == 1
        what = f"line {named} is not a JSON object" if one else f"{len(broken):,} lines ({named}) are not JSON objects"
        notes.append(f"metrics.jsonl: {what} with a step and {'was' if one else 'were'} skipped")
    return lines


def count_parameters(path: Path) -> int | None:
    """The number of weights in a safetensors file, from its header; None if the file is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except (OSError, SafetensorError):
        return None


def read_losses(metrics: list[Json]) -> Losses:
    """The loss curves in the lines of metrics.jsonl."""
    losses = Losses()
    curves = {"train_loss": losses.train, "train_set_loss": losses.train_set, "val_loss": losses.val}
    for line in metrics:
        step = step_of(line)
        for name, curve in curves.items():
            value = number(line.get(name))
            if value is not None and abs(value) <= LARGEST:
                curve.append(Point(step, number(line.get("epoch")), value))
            elif name in line:
                losses.no_numbers += 1
        if (kept := number(line.get("kept_step"))) is not None:
            losses.kept_step = int(kept)
            losses.kept_train_set = number(line.get("kept_train_set_loss"))
    return losses


def read_watched(metrics: list[Json]) -> list[Watched]:
    """The versions of the watched reply; successive equal texts share an entry."""
    entries: list[Watched] = []
    for line in metrics:
        if isinstance(text := line.get("watched"), str):
            if entries and entries[-1].text == text:
                entries[-1] = entries[-1]._replace(last_step=step_of(line))
            else:
                entries.append(Watched(step_of(line), step_of(line), text))
    return entries


def step_of(line: Json) -> int:
    return int(number(line["step"]) or 0)
