"""What the numbers of an evaluation support, in sentences; and the short table of the terminal."""

from typing import Any

from evaluation.metric_table import GROUPS, columns_of, make_cell
from evaluation.run_files import Losses, Point

SHORT_TABLE = (
    *("loss", "perplexity", "bits_per_byte", "context_use", "context_use_beyond_other", "hits_at_1"),
    *("distinct_2", "repetition", "chrf", "copied_5grams"),
)
LARGE_GAP = 0.3  # growth, in nats, that is worth a sentence
REPETITIVE = 0.05  # more of a reply that stood in it before than in the true ones
UNIFORM = 0.05  # less of their pairs of words are new than in the true ones
ENOUGH_REPLIES = 10  # to compare their diversity
FEW_DIALOGUES = 30  # the fewer, the wider the intervals


def measure_overfitting(losses: Losses) -> dict[str, float | None] | None:
    """The best evaluation of a run, and the gap at its end; none without an evaluation."""
    best = losses.best
    if best is None:
        return None
    last = next((point for point in losses.val if point.step == losses.kept_step), losses.val[-1])
    train = losses.train_set[-1].loss if losses.train_set else None
    return {
        "best_step": best.step,
        "best_epoch": best.epoch,
        "best_val_loss": best.loss,
        "last_val_loss": last.loss,
        "train_set_loss": train,
        "gap": None if train is None else last.loss - train,
    }


def find_out(evaluation: dict[str, Any], losses: Losses) -> list[str]:
    """A sentence for each thing that the numbers support, and for what they leave open."""
    columns, data = evaluation["metrics"], evaluation["data"]
    model, base, dialogues = columns["model"], columns.get("base"), data["dialogues"][data["part"]]
    found = [
        *about_losses(losses, evaluation.get("overfitting")),
        *(about_training(model, base["loss"]) if base else ()),
        *about_context(model),
        *about_coherence(model),
        *about_replies(model, columns["true_replies"], data["answers"]),
        *about_copies(model, columns["true_replies"]),
    ]
    if dialogues < FEW_DIALOGUES:
        one = "1 dialogue is" if dialogues == 1 else f"{dialogues} dialogues are"
        found.append(f"{one} few to measure on: with others the numbers may well differ")
    return found


def about_losses(losses: Losses, overfitting: dict[str, Any] | None) -> list[str]:
    """Where the validation loss was lowest, and how far the training part has run ahead."""
    if overfitting is None:
        return []
    found, best, start = [], losses.best, losses.val[0]
    assert best is not None
    since = sum(point.step > best.step for point in losses.val)
    if losses.kept_step is None and since >= 2:
        found.append(
            f"validation loss was lowest {place_of(best)} ({best.loss:.3f}), and higher at all {since} evaluations"
            f" since: {shorten(best)} better weights"
        )
    gap, before = overfitting["gap"], start.loss - losses.train_set[0].loss if losses.train_set else 0
    if gap is not None and gap - before > LARGE_GAP:
        found.append(
            f"the gap between training and validation loss grew from {before:.3f} to {gap:.3f}: some of what it learned"
            " holds for the training conversations alone"
        )
    return found


def place_of(point: Point) -> str:
    if not point.step:
        return "before the training"
    return f"after epoch {point.epoch:g}" if point.epoch else f"after step {point.step}"


def shorten(best: Point) -> str:
    """What would have ended the run there."""
    if not best.step:
        return "a lower --learning-rate may find"
    whole = best.epoch is not None and best.epoch == int(best.epoch)
    return f"{f'--epochs {best.epoch:.0f}' if whole else f'--max-steps {best.step}'} or --early-stopping 2 keeps"


def about_training(model: dict[str, Any], before: float) -> list[str]:
    """Whether what was measured on has become likelier; compared dialogue by dialogue."""
    change, interval = model["loss_change"], model["intervals"].get("loss_change")
    what = f"the loss on these conversations from {before:.3f} to {model['loss']:.3f}"
    if not excludes(0, interval):
        return [f"fine-tuning changed {what}, which may be chance: {change:.3f}{within(interval)}"]
    verb, ends = ("raised", interval) if change > 0 else ("lowered", [-interval[1], -interval[0]])
    return [f"fine-tuning {verb} {what}: by {abs(change):.3f}{within(ends)}"]


def about_context(model: dict[str, Any]) -> list[str]:
    """What the history is worth, and how much of that comes from what was said in it."""
    worth, interval = model["context_use"], model["intervals"].get("context_use")
    if worth is None:
        return []
    if not excludes(0, interval):
        return [f"whether it uses what was said before can't be told: {worth:.3f} nats a token{within(interval)}"]
    if worth < 0:
        return [f"what was said before misleads it: {worth:.3f} nats a token{within(interval)}"]
    last = model["context_use_by_turns"]["1"] / worth
    share = f", {last:.0%} of it by the last turn alone" if 0 < last < 1 else ""
    found = f"what was said before is worth {worth:.3f} nats a token to a reply{within(interval)}{share}"
    beyond, interval = model["context_use_beyond_other"], model["intervals"].get("context_use_beyond_other")
    if beyond is None:
        return [found]
    unsure = "" if interval and interval[0] > 0 else ", so that any history may do as well"
    return [f"{found}; {beyond:.3f}{within(interval)} more than another dialogue's history{unsure}"]


def about_coherence(model: dict[str, Any]) -> list[str]:
    hits, interval = model["hits_at_1"], model["intervals"].get("hits_at_1")
    if hits is None:
        return []
    chance = model["chance_hits_at_1"]
    verdict = "" if excludes(chance, interval) else ", which may be chance"
    low_high = f" [{interval[0]:.0%}, {interval[1]:.0%}]" if interval else ""
    return [f"it finds the true reply among others in {hits:.0%} of the cases{low_high}, chance {chance:.0%}{verdict}"]


def about_replies(model: dict[str, Any], true: dict[str, Any], replies: int) -> list[str]:
    """Empty, repetitive and uniform replies."""
    found = []
    if model["empty_replies"]:
        found.append(f"{model['empty_replies']:.0f} of its replies are empty")
    repeated, usual = model["repetition"], true["repetition"] or 0
    if repeated is not None and repeated > usual + REPETITIVE:
        found.append(
            f"it repeats itself: {repeated:.0%} of the 4-grams of a reply stood in it before (true: {usual:.0%})"
        )
    varied, usual = model["distinct_2"], true["distinct_2"]
    if replies >= ENOUGH_REPLIES and varied is not None and usual is not None and varied < usual - UNIFORM:
        found.append(f"its replies are less varied than the true ones: distinct-2 {varied:.2f} against {usual:.2f}")
    return found


def about_copies(model: dict[str, Any], true: dict[str, Any]) -> list[str]:
    copied, usual = model.get("copied_5grams"), true.get("copied_5grams") or 0
    if copied is None:
        return []
    found = f"{copied:.0%} of the generated 5-grams stand in the training data (of the true replies' {usual:.0%})"
    span = model["longest_copied_span"]
    return [
        f"{found}; the longest copy has {span['words']} words, from training dialogue {span['dialogue']}"
        if span
        else found
    ]


def excludes(value: float, interval: list[float] | None) -> bool:
    return interval is not None and not interval[0] <= value <= interval[1]


def within(interval: list[float] | None) -> str:
    return f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""


def describe_size(data: dict[str, Any]) -> str:
    """What was measured on."""
    dialogues = data["dialogues"][data["part"]]
    size = f"{dialogues:,} dialogue{'s' * (dialogues != 1)}"
    return f"measured on {data['part']}: {size}; {data['replies']:,} replies scored, {data['answers']:,} written"


def short_table(columns: dict[str, Any]) -> list[str]:
    """The main metrics beside each other, a line each, with their intervals."""
    titles = columns_of(columns)
    known = {metric.key: metric for group in GROUPS.values() for metric in group}
    rows = [["", *(title.lower() for title in titles.values())]]
    for key in SHORT_TABLE:
        cells = [make_cell(known[key], columns[name]) for name in titles]
        shown = [
            cell.value + (f" ({cell.below[0]})" if cell.below and cell.value != "too few" else "") for cell in cells
        ]
        if any(cell.value != "–" for cell in cells):
            rows.append([known[key].name, *shown])
    widths = [max(len(row[column]) for row in rows) for column in range(len(titles) + 1)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return ["", *lines]
