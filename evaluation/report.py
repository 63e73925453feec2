"""The report of a run: a self-contained HTML page that shows its folder, and the plots as PNGs.

It is written at the end of each run and each evaluation. To rewrite it, run in the program's folder:

    python -m evaluation.report runs/tiny-1

The page runs no scripts and loads nothing. Text from the conversations is always escaped.
"""

import json
import math
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from evaluation.exposure_section import exposure_section
from evaluation.guesses import describe_guesses
from evaluation.metric_table import PARTS, Group, columns_of, interval_of, metric_groups, show
from evaluation.metrics import FEWEST_TO_DRAW
from evaluation.plots import (
    HALF,
    NARROW,
    WIDE,
    Chart,
    Curve,
    Picture,
    Series,
    highest_shown,
    lay_out,
    loss_chart,
    series_chart,
    thin_out,
    write_png,
)
from evaluation.run_files import (
    LARGEST,
    Losses,
    RunFiles,
    Watched,
    last_part,
    mapping,
    number,
    read_losses,
    read_run,
    read_watched,
    sequence,
)
from evaluation.shown_cases import Case, Cases, read_cases
from support.errors import UserError, amount, display, printable, run_command
from support.files import Json, write_text, writing

REPORT, LOSS_PLOT, CONTEXT_PLOT = "report.html", "loss.png", "context_use.png"
MOST_ROWS = 12  # maximum number of speakers, or of versions of the watched reply, to show


class Plot(NamedTuple):
    """A plot on the page: one image, or two for wide and narrow screens."""

    label: str
    """alternative text for screen readers"""
    pictures: list[Picture]
    curves: list[Curve]
    caption: str = ""


@dataclass(frozen=True)
class MetricTable:
    """The table of metrics, sentences on how they were `measured`, and the metrics missing from the evaluation."""

    groups: list[Group]
    columns: list[tuple[str, str]]
    absent: list[str]
    measured: str


@dataclass(frozen=True)
class SpeakerLosses:
    """The loss of each speaker's turns.

    Attributes:
        rows: name, and for each model its column, title, loss, and the length of its bar in percent of the longest.
        more: number of speakers that are not shown.
    """

    rows: list[tuple[str, list[tuple[str, str, str, str]]]]
    more: int


@dataclass(frozen=True)
class WatchedReply:
    """Versions of the reply to the first `case` during training: those to show, and the number of `all` versions."""

    entries: list[Watched]
    all: int
    case: Case | None


def write_report(folder: Path) -> Path:
    """Write `report.html` in a run folder, with `loss.png` and `context_use.png` if there is data for them.

    Only this folder is read. The page names missing files; malformed ones are also printed. The output depends only on
    the folder.

    Raises:
        UserError: the folder does not exist, it has no files of a run, or the report can't be written.
    """
    run = read_run(folder)
    losses = read_losses(run.metrics)
    metrics = mapping(run.evaluation.get("metrics"))
    loss = loss_chart(losses)
    context, turns = turn_series(metrics, "context_use_by_turns"), turn_series(metrics, "loss_by_turn")
    worth = series_chart(*context, "preceding turns", "gain (nats per token)", zero=True)
    by_turn = series_chart(*turns, "turn", "loss (nats per token)", zero=False)
    for chart, size, path in ((loss, WIDE, folder / LOSS_PLOT), (worth, HALF, folder / CONTEXT_PLOT)):
        if chart:
            write_png(chart, size, path)
        else:
            with writing(path):
                path.unlink(missing_ok=True)  # from an older evaluation
    cases = read_cases(run)
    page = render(
        title=model_name(run),
        folder=folder.resolve().name,
        facts=facts(run, losses),
        findings=[
            text[:1].upper() + text[1:] for text in sequence(run.evaluation.get("findings")) if isinstance(text, str)
        ],
        notes=run.notes,
        missing=run.missing,
        evaluate=f"python evaluate.py {shlex.quote(str(folder))}",
        repeat=repeat_command(run),
        loss=loss_section(losses, loss),
        overfitting=overfitting_text(mapping(run.evaluation.get("overfitting"))),
        metrics=metric_table(run, metrics),
        guesses=describe_guesses(run),
        exposure=exposure_section(run),
        context=series_section(*context, worth, "Context use by number of preceding turns"),
        by_turn=series_section(*turns, by_turn, "Loss by turn"),
        by_speaker=speaker_losses(metrics),
        watched=watched_reply(run, cases),
        cases=cases,
        settings=flat_settings(run.settings),
        evaluation_settings=flat_settings(mapping(run.evaluation.get("settings"))),
    )
    write_text(folder / REPORT, page)
    for note in run.notes:
        display(f"warning: {note}")
    return folder / REPORT


def render(**variables: Any) -> str:
    """The page as HTML: every text is escaped, and characters that HTML does not allow are replaced."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def clean(value: Any) -> Any:
        if not isinstance(value, str) or isinstance(value, Markup):
            return value
        return printable(value.encode("utf-8", "replace").decode("utf-8"))  # lone surrogates become question marks

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=clean,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("report.html.jinja").render(variables)


def model_name(run: RunFiles) -> str:
    """The name of the base model if known, else of the evaluated model or folder."""
    if name := mapping(run.settings.get("model")).get("name"):
        return last_part(name)
    evaluated = run.evaluation.get("base_model") or run.evaluation.get("model")
    return last_part(re.sub(r"[\\/]model$", "", str(evaluated))) if evaluated else run.folder.resolve().name


def repeat_command(run: RunFiles) -> str:
    """The command that repeats the run; empty without its settings, and for a fold, which is a part of a run."""
    if not run.settings or mapping(run.settings.get("facts")).get("fold"):
        return ""
    here = run.folder.resolve()
    path = f"{here.parent.name}/{here.name}/settings.json"  # not absolute: a shared report should not show where it was
    return f"python finetune.py --settings {shlex.quote(path)}"


def facts(run: RunFiles, losses: Losses) -> list[str]:
    """The line below the title: data, template, size, length and seed, if known."""
    data, training = mapping(run.settings.get("data")), mapping(run.settings.get("training"))
    evaluated = mapping(run.evaluation.get("settings"))
    found: list[str] = []
    if file := run.ledger.get("file") or data.get("path") or mapping(run.evaluation.get("data")).get("file"):
        dialogues, turns = number(run.ledger.get("dialogues")), number(run.ledger.get("turns"))
        size = ""
        if dialogues is not None and turns is not None:
            size = f", {amount(int(dialogues), 'dialogue')}, {amount(int(turns), 'turn')}"
        found.append(f"{last_part(file)}{size}")
    templates = (place.get("template") for place in (run.dialogue, evaluated, data))
    if template := next((name for name in templates if isinstance(name, str) and name), None):
        found.append(f"template {template}")
    if run.parameters:
        found.append(f"{run.parameters:,} parameters")
    points = [*losses.train, *losses.val]
    if points:
        last = max(points, key=lambda point: point.step)
        found.append(f"{last.step:,} steps" + (f" ({last.epoch:g} epochs)" if last.epoch else ""))
    seed = training.get("seed", evaluated.get("seed"))
    if isinstance(seed, int):  # up to 2**63, which a float can't represent exactly
        found.append(f"seed {seed}")
    return found


def loss_section(losses: Losses, chart: Chart | None) -> Plot | None:
    """The loss curves, with sentences about the losses and about values that are not drawn."""
    if chart is None:
        return None
    sentences = []
    if losses.val and (best := losses.best):
        first, last = losses.val[0], losses.val[-1]
        sentences.append(
            f"Validation loss went from {show(first.loss, '{:.3f}')} to {show(last.loss, '{:.3f}')};"
            f" it was lowest, {show(best.loss, '{:.3f}')}, at step {best.step:,}"
            + (f" (epoch {best.epoch:g})." if best.epoch is not None else ".")
        )
    if losses.kept_step is not None:
        sentences.append(f"The weights of step {losses.kept_step:,} were kept.")
    drawn = thin_out(losses.train)
    if len(drawn) < len(losses.train):
        sentences.append(f"The plot averages neighbouring steps ({len(losses.train):,} steps in total).")
    if any(point.loss > highest_shown(losses) for point in drawn):
        highest = max(losses.train, key=lambda point: point.loss)
        sentences.append(
            f"Some training losses are above the plot, up to {show(highest.loss, '{:,.1f}')} at step {highest.step:,}."
        )
    if losses.no_numbers:
        values = "1 value is" if losses.no_numbers == 1 else f"{losses.no_numbers:,} values are"
        sentences.append(f"{values} not drawn: not a finite number, or beyond {LARGEST:,.0f}.")
    label = f"Loss by step. {sentences[0] if sentences else ''}"
    return Plot(label, [lay_out(chart, WIDE), lay_out(chart, NARROW)], chart.curves, " ".join(sentences))


def overfitting_text(values: Json) -> str:
    """A sentence that compares the loss on the training part with the validation loss, or an empty string."""
    train, gap = number(values.get("train_set_loss")), number(values.get("gap"))
    if train is None or gap is None:
        return ""
    return (
        f"The loss on the training part is {show(train, '{:.3f}')}, {show(abs(gap), '{:.3f}')} nats per token"
        f" {'below' if gap >= 0 else 'above'} the validation loss."
    )


def turn_series(metrics: Json, key: str) -> tuple[list[Series], list[str]]:
    """The base and the fine-tuned model's values by turn, and the labels of the turns, in order."""
    found = {column: mapping(mapping(metrics.get(column)).get(key)) for column in ("base", "model")}
    keys = {name for values in found.values() for name in values}
    numbered = re.compile(r"[0-9]{1,6}\+?")  # "21+" means all later turns
    places = sorted(filter(numbered.fullmatch, keys), key=lambda name: int(name.rstrip("+")))
    places += ["all"] if "all" in keys else []
    series = []
    for column, values in found.items():
        numbers = [number(values.get(place)) for place in places]
        shown = [value if value is not None and abs(value) <= LARGEST else None for value in numbers]
        ends = mapping(mapping(mapping(metrics.get(column)).get("intervals")).get(key))
        intervals = [interval_of(ends.get(place)) for place in places]
        intervals = [pair if pair and max(map(abs, pair)) <= LARGEST else None for pair in intervals]
        if any(value is not None for value in shown):
            series.append(Series(columns_of(metrics)[column], column, shown, intervals))
    return series, places


def series_section(series: list[Series], places: list[str], chart: Chart | None, label: str) -> Plot | None:
    if chart is None:
        return None
    spoken = "; ".join(
        f"{each.name}: "
        + ", ".join(f"{place}: {v:.3f}" for place, v in zip(places, each.values, strict=True) if v is not None)
        for each in series
    )
    return Plot(f"{label}. {spoken}", [lay_out(chart, HALF)], chart.curves)


def metric_table(run: RunFiles, metrics: Json) -> MetricTable:
    groups, absent = metric_groups(metrics)
    data, settings = mapping(run.evaluation.get("data")), mapping(run.evaluation.get("settings"))
    dialogues = number(mapping(data.get("dialogues")).get(str(data.get("part"))))
    replies, resamples = number(data.get("replies")), number(settings.get("resamples"))
    confidence = number(settings.get("confidence"))
    measured = f"Measured on {PARTS.get(str(data.get('part')), 'held-out conversations')}"
    measured += f": {amount(int(dialogues), 'dialogue')}" if dialogues is not None else ""
    measured += f", {amount(int(replies), 'reply', 'replies')}." if replies is not None else "."
    if confidence is not None:
        measured += f" Below each value is its {confidence:.0%} interval over dialogues"
        if dialogues is not None and dialogues < FEWEST_TO_DRAW:
            measured += " (Student's t, or the range for chrF and BLEU: there are too few to bootstrap)."
        else:
            few = f"Student's t, or the range for chrF and BLEU, for fewer than {FEWEST_TO_DRAW} dialogues"
            measured += f" ({resamples:,.0f} bootstrap resamples; {few})." if resamples is not None else "."
    return MetricTable(groups, list(columns_of(metrics).items()), absent, measured)


def speaker_losses(metrics: Json) -> SpeakerLosses:
    losses = {
        column: {name: number(value) for name, value in mapping(values.get("loss_by_speaker")).items()}
        for column in ("base", "model")
        if (values := mapping(metrics.get(column)))
    }
    names = list(dict.fromkeys(name for values in losses.values() for name in values))
    known = [value for values in losses.values() for value in values.values() if value is not None]
    longest = max([value for value in known if value > 0], default=1.0)
    rows = []
    for name in names[:MOST_ROWS]:
        bars = [
            (column, columns_of(metrics)[column], show(value, "{:.3f}"), f"{max(0.0, value / longest):.1%}")
            for column, values in losses.items()
            if (value := values.get(name)) is not None
        ]
        if bars:
            rows.append((name, bars))
    return SpeakerLosses(rows, len(names) - MOST_ROWS)


def watched_reply(run: RunFiles, cases: Cases) -> WatchedReply | None:
    entries = read_watched(run.metrics)
    if not entries:
        return None
    every = max(1, (len(entries) - 1) / (MOST_ROWS - 1))
    shown = [entries[round(place * every)] for place in range(min(MOST_ROWS, len(entries)))]
    return WatchedReply(shown, len(entries), cases.shown[0] if cases.shown else None)


def flat_settings(settings: Json, above: str = "") -> list[tuple[str, str]]:
    """Every option with its value; options in a group are prefixed with the group's name."""
    found = []
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            found += flat_settings(value, f"{above}{name} / ")
        else:
            is_none = isinstance(value, float) and not math.isfinite(value)  # from a damaged file
            text = value if isinstance(value, str) else "–" if is_none else json.dumps(value, ensure_ascii=False)
            found.append((f"{above}{name}", text))
    return found


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise UserError("give a run folder: python -m evaluation.report runs/tiny-1")
    display(f"written: {write_report(Path(sys.argv[1]))}")


if __name__ == "__main__":
    run_command(main)
