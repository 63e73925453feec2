"""What the numbers of an evaluation support, in sentences; and the short table of the terminal."""

from evaluation.metric_table import GROUPS, columns_of, make_cell
from evaluation.metrics import Estimate
from evaluation.results import Evaluation, Metrics, Overfitting, Size, value_of
from evaluation.run_files import Losses, Point

SHORT_TABLE = (
    *("loss", "perplexity", "bits_per_byte", "context_use", "context_use_beyond_other", "hits_at_1"),
    *("distinct_2", "repetition", "chrf", "copied_5grams"),
)
LARGE_GAP = 0.3  # growth, in nats, that is worth a sentence
REPETITIVE = 0.05  # more of a reply that stood in it before than in the true ones
UNIFORM = 0.05  # less of their pairs of words are new than in the true ones
ENOUGH_REPLIES = 10  # to compare their diversity
CHOSEN = ", which flatters this loss a little (--split 80/10/10 measures on a test part)"
FEW_DIALOGUES = 30  # the fewer, the wider the intervals


def measure_overfitting(losses: Losses) -> Overfitting | None:
    """The best evaluation of a run, and the gap at its end; none without an evaluation."""
    best = losses.best
    if best is None:
        return None
    last = next((point for point in losses.val if point.step == losses.kept_step), losses.val[-1])
    train = losses.train_set[-1].loss if losses.train_set else None
    if losses.kept_train_set is not None:
        train = losses.kept_train_set
    return Overfitting(
        best_step=best.step,
        best_epoch=best.epoch,
        best_val_loss=best.loss,
        last_val_loss=last.loss,
        train_set_loss=train,
        gap=None if train is None else last.loss - train,
    )


def find_out(evaluation: Evaluation, losses: Losses) -> list[str]:
    """A sentence for each thing that the numbers support, and for what they leave open."""
    model, base, true = (evaluation.metrics.get(name, Metrics()) for name in ("model", "base", "true_replies"))
    found = [
        *about_losses(losses, evaluation.overfitting, evaluation.size.part),
        *about_training(model, base),
        *about_context(model),
        *about_coherence(model),
        *about_replies(model, true, evaluation.size.answers),
        *about_copies(model, true),
    ]
    dialogues = evaluation.size.held_out
    if dialogues < FEW_DIALOGUES:
        one = "1 dialogue is" if dialogues == 1 else f"{dialogues} dialogues are"
        found.append(f"{one} few to measure on: with others the numbers may well differ")
    return found


def about_losses(losses: Losses, overfitting: Overfitting | None, part: str) -> list[str]:
    """Where the validation loss was lowest, and how far the training part has run ahead."""
    if overfitting is None:
        return []
    found, best, start = [], losses.best, losses.val[0]
    assert best is not None
    since = sum(point.step > best.step for point in losses.val)
    lowest = f"validation loss was lowest {place_of(best)} ({best.loss:.3f})"
    if losses.kept_step is not None:
        found.append(f"{lowest}; these weights are kept{'' if part == 'test' else CHOSEN}")
    elif since >= 2:
        advice = "--keep best keeps" if best.step else "a lower --learning-rate may find"
        found.append(f"{lowest}, and higher at all {since} evaluations since: {advice} better weights")
    gap, before = overfitting.gap, start.loss - losses.train_set[0].loss if losses.train_set else 0
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


def about_training(model: Metrics, base: Metrics) -> list[str]:
    """Whether what was measured on has become likelier; compared dialogue by dialogue."""
    before, after, change = base.loss, model.loss, model.loss_change
    if not (before and after and change):
        return []
    what = f"the loss on these conversations from {before.value:.3f} to {after.value:.3f}"
    if not change.interval or not excludes(0, change):
        return [f"fine-tuning changed {what}, which may be chance: {with_interval(change)}"]
    if change.value > 0:
        return [f"fine-tuning raised {what}: by {with_interval(change)}"]
    low, high = change.interval
    return [f"fine-tuning lowered {what}: by {with_interval(Estimate(-change.value, [-high, -low]))}"]


def about_context(model: Metrics) -> list[str]:
    """What the history is worth, and how much of that comes from what was said in it."""
    worth, by_turns, beyond = model.context_use, model.context_use_by_turns, model.context_use_beyond_other
    if not isinstance(worth, Estimate) or not by_turns:
        return []
    if not excludes(0, worth):
        return [f"whether it uses what was said before can't be told: {with_interval(worth, ' nats a token')}"]
    if worth.value < 0:
        return [f"what was said before misleads it: {with_interval(worth, ' nats a token')}"]
    last = by_turns["1"].value / worth.value
    share = f", {last:.0%} of it by the last turn alone" if 0 < last < 1 else ""
    found = f"what was said before is worth {with_interval(worth, ' nats a token to a reply')}{share}"
    if not isinstance(beyond, Estimate):
        return [found]
    unsure = "" if beyond.interval and beyond.interval[0] > 0 else ", so that any history may do as well"
    return [f"{found}; {with_interval(beyond)} more than another dialogue's history{unsure}"]


def about_coherence(model: Metrics) -> list[str]:
    hits, chance = model.hits_at_1, value_of(model.chance_hits_at_1)
    if not isinstance(hits, Estimate) or chance is None:
        return []
    verdict = "" if excludes(chance, hits) else ", which may be chance"
    low_high = f" [{hits.interval[0]:.0%}, {hits.interval[1]:.0%}]" if hits.interval else ""
    return [
        f"it finds the true reply among others in {hits.value:.0%} of the cases{low_high}, chance {chance:.0%}{verdict}"
    ]


def about_replies(model: Metrics, true: Metrics, replies: int) -> list[str]:
    """Empty, repetitive and uniform replies."""
    found = []
    if empty := value_of(model.empty_replies):
        found.append(f"{empty:.0f} of its replies are empty")
    repeated, usual = value_of(model.repetition), value_of(true.repetition) or 0
    if repeated is not None and repeated > usual + REPETITIVE:
        found.append(
            f"it repeats itself: {repeated:.0%} of the 4-grams of a reply stood in it before (true: {usual:.0%})"
        )
    varied, usual = value_of(model.distinct_2), value_of(true.distinct_2)
    if replies >= ENOUGH_REPLIES and varied is not None and usual is not None and varied < usual - UNIFORM:
        found.append(f"its replies are less varied than the true ones: distinct-2 {varied:.2f} against {usual:.2f}")
    return found


def about_copies(model: Metrics, true: Metrics) -> list[str]:
    copied, usual, span = value_of(model.copied_5grams), value_of(true.copied_5grams) or 0, model.longest_copied_span
    if copied is None:
        return []
    found = f"{copied:.0%} of the generated 5-grams stand in the training data (of the true replies' {usual:.0%})"
    if span is None:
        return [found]
    return [f"{found}; the longest copy has {span.words} words, from training dialogue {span.dialogue}"]


def excludes(value: float, estimate: Estimate) -> bool:
    """Whether `value` lies outside the interval; False without one, or with an end that is NaN."""
    return estimate.interval is not None and (value < estimate.interval[0] or value > estimate.interval[1])


def with_interval(estimate: Estimate, unit: str = "") -> str:
    interval = f" [{estimate.interval[0]:.3f}, {estimate.interval[1]:.3f}]" if estimate.interval else ""
    return f"{estimate.value:.3f}{unit}{interval}"


def describe_size(size: Size) -> str:
    """One line about the amount of data behind the metrics."""
    dialogues = f"{size.held_out:,} dialogue{'s' * (size.held_out != 1)}"
    return f"measured on {size.part}: {dialogues}; {size.replies:,} replies scored, {size.answers:,} written"


def short_table(metrics: dict[str, Metrics]) -> list[str]:
    """The main metrics beside each other, a line each, with their intervals."""
    columns = {name: column.to_json() for name, column in metrics.items()}
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
