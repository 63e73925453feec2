"""Conclusions from an evaluation's numbers, in sentences; and the short table for the terminal."""

from evaluation.metric_table import PARTS, columns_of, metric_groups, show
from evaluation.metrics import Estimate
from evaluation.results import Evaluation, Exposure, Metrics, Overfitting, Size, value_of
from evaluation.run_files import Losses, Point
from support.errors import amount

SHORT_TABLE = (
    *("loss", "perplexity", "bits_per_byte", "context_use", "context_use_beyond_other", "hits_at_1"),
    *("voice", "voice_true", "voice_generated"),
    *("distinct_2", "repetition", "chrf", "copied_5grams"),
)
LARGE_GAP = 0.3  # report a gap that grew by more than this, in nats
REPETITIVE = 0.05  # report repetition that exceeds that of the true replies by more than this
UNIFORM = 0.05  # report a distinct-2 that is below that of the true replies by more than this
ENOUGH_REPLIES = 10  # minimum number of replies for comparing diversity
CHOSEN = ", so this loss is slightly optimistic (--split 80/10/10 measures on a separate test part)"
MOST_NAMED = 2  # number of people to name in a finding
FEW_DIALOGUES = 30  # warn about wide intervals below this number of dialogues


def measure_overfitting(losses: Losses) -> Overfitting | None:
    """The best evaluation of a run, and the gap of the saved weights; None if the run has no evaluation."""
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
    """A sentence for each conclusion that the numbers support, and for each question they leave open."""
    model, base, true = (evaluation.metrics.get(name, Metrics()) for name in ("model", "base", "true_replies"))
    found = [
        *about_losses(losses, evaluation.overfitting, evaluation.size.part),
        *about_training(model, base),
        *about_context(model),
        *about_coherence(model),
        *about_voice(model),
        *about_replies(model, true, evaluation.size.answers),
        *about_copies(model, true),
        *about_exposure(evaluation.exposure),
    ]
    dialogues = evaluation.size.held_out
    if dialogues < FEW_DIALOGUES:
        one = "only 1 dialogue was" if dialogues == 1 else f"only {dialogues} dialogues were"
        found.append(f"{one} measured: the numbers may be quite different on others")
    return found


def about_losses(losses: Losses, overfitting: Overfitting | None, part: str) -> list[str]:
    """The step of the lowest validation loss, and any growth of the gap to the training loss."""
    if overfitting is None:
        return []
    found, best, start = [], losses.best, losses.val[0]
    assert best is not None
    since = sum(point.step > best.step for point in losses.val)
    lowest = f"validation loss was lowest {place_of(best)} ({best.loss:.3f})"
    if losses.kept_step is not None:
        found.append(f"{lowest}; these weights are kept{'' if part == 'test' else CHOSEN}")
    elif since >= 2:
        advice = "--keep best would keep" if best.step else "a lower --learning-rate may find"
        found.append(f"{lowest} and higher in the {since} evaluations since: {advice} better weights")
    gap, before = overfitting.gap, start.loss - losses.train_set[0].loss if losses.train_set else 0
    if gap is not None and gap - before > LARGE_GAP:
        found.append(
            f"the gap between training and validation loss grew from {show(before, '{:.3f}')} to {gap:.3f}: the model"
            " is starting to overfit"
        )
    return found


def place_of(point: Point) -> str:
    if not point.step:
        return "before training"
    return f"after epoch {point.epoch:g}" if point.epoch else f"after step {point.step}"


def about_training(model: Metrics, base: Metrics) -> list[str]:
    """The effect of fine-tuning on the likelihood of the held-out dialogues, compared dialogue by dialogue."""
    before, after, change = base.loss, model.loss, model.loss_change
    if not (before and after and change):
        return []
    what = f"the loss on these conversations from {before.value:.3f} to {after.value:.3f}"
    if not change.interval or not excludes(0, change):
        return [f"fine-tuning changed {what}, which may be chance: {with_interval(change)}"]
    if change.value > 0:
        return [f"fine-tuning raised {what}, by {with_interval(change)}"]
    low, high = change.interval
    return [f"fine-tuning lowered {what}, by {with_interval(Estimate(-change.value, [-high, -low]))}"]


def about_context(model: Metrics) -> list[str]:
    """The gain from the history, and the part of it that comes from the history's content."""
    worth, by_turns, beyond = model.context_use, model.context_use_by_turns, model.context_use_beyond_other
    if not isinstance(worth, Estimate) or not by_turns:
        return []
    if not excludes(0, worth):
        return [f"it is unclear whether the model uses the dialogue so far: {with_interval(worth, ' nats per token')}"]
    if worth.value < 0:
        return [f"the dialogue so far misleads the model: {with_interval(worth, ' nats per token')}"]
    last = by_turns["1"].value / worth.value
    share = f", {last:.0%} of it with the last turn alone" if 0 < last < 1 else ""
    found = f"the dialogue so far lowers the loss of a reply by {with_interval(worth, ' nats per token')}{share}"
    if not isinstance(beyond, Estimate):
        return [found]
    unsure = "" if beyond.interval and beyond.interval[0] > 0 else ", so any history might do as well"
    return [f"{found}; that is {with_interval(beyond)} more than another dialogue's history does{unsure}"]


def about_coherence(model: Metrics) -> list[str]:
    hits, chance = model.hits_at_1, value_of(model.chance_hits_at_1)
    if not isinstance(hits, Estimate) or chance is None:
        return []
    verdict = "" if excludes(chance, hits) else ", so it may be guessing"
    low_high = f" [{hits.interval[0]:.0%}, {hits.interval[1]:.0%}]" if hits.interval else ""
    return [
        f"the model ranks the true reply first {hits.value:.0%} of the time{low_high}; chance is {chance:.0%}{verdict}"
    ]


def about_voice(model: Metrics) -> list[str]:
    """Whether the model tells the speakers apart, and whether its own replies sound like the right one."""
    voice, chance = model.voice, value_of(model.chance_voice)
    if not isinstance(voice, Estimate) or chance is None:
        return []
    low_high = f" [{voice.interval[0]:.0%}, {voice.interval[1]:.0%}]" if voice.interval else ""
    share = f"attributes {voice.value:.0%}{low_high} of the true replies to the right speaker"
    if not voice.interval or voice.interval[0] <= chance:
        return [f"there is no clear sign that the model tells the speakers apart: it {share}; chance is {chance:.0%}"]
    own = [
        f"{found.value:.0%} of the replies it writes as {name} to {name}"
        for name, found in list((model.voice_generated or {}).items())[:MOST_NAMED]
    ]
    share = f"the model {share} (chance is {chance:.0%})"
    return [", ".join([share, *own[:-1]]) + f", and {own[-1]}" if own else share]


def about_replies(model: Metrics, true: Metrics, replies: int) -> list[str]:
    """Findings on empty, repetitive and uniform replies."""
    found = []
    if empty := value_of(model.empty_replies):
        found.append(f"empty replies: {empty:.0f}")
    repeated, usual = value_of(model.repetition), value_of(true.repetition) or 0
    if repeated is not None and repeated > usual + REPETITIVE:
        found.append(
            f"the model repeats itself: {repeated:.0%} of a reply's 4-grams occur earlier in it"
            f" (true replies: {usual:.0%})"
        )
    varied, usual = value_of(model.distinct_2), value_of(true.distinct_2)
    if replies >= ENOUGH_REPLIES and varied is not None and usual is not None and varied < usual - UNIFORM:
        found.append(f"the replies are less varied than the true ones: distinct-2 is {varied:.2f}, not {usual:.2f}")
    return found


def about_copies(model: Metrics, true: Metrics) -> list[str]:
    copied, usual, span = value_of(model.copied_5grams), value_of(true.copied_5grams) or 0, model.longest_copied_span
    if copied is None:
        return []
    found = f"{copied:.0%} of the generated 5-grams occur in the training data (true replies: {usual:.0%})"
    if span is None:
        return [found]
    return [f"{found}; the longest copy has {span.words} words, from training dialogue {span.dialogue}"]


def about_exposure(found: Exposure | None) -> list[str]:
    """The private strings that the model gives away; nothing if the training part has none."""
    if found is None or not found.found:
        return []
    sample = f" (a sample; {found.found:,} were found)" if found.tried < found.found else ""
    text = f"the model completes {found.completed:,} of {amount(found.tried, 'private string')}{sample} word for word"
    if found.ranked:
        ranked = f"{found.first:,} of {found.ranked:,}"
        text += f"; {ranked} rank above 31 random ones (by chance: {found.first_by_chance:.1f})"
    return [text + advise(found)]


def advise(found: Exposure) -> str:
    """The remedy for completed strings, if there are any."""
    kinds = {each.kind for each in found.strings if each.completed}
    if not kinds:
        return ""
    if kinds == {"number"}:
        return ": --mask does not replace plain numbers, so remove them from the data"
    return f": --mask replaces such strings before training{', except plain numbers' * ('number' in kinds)}"


def excludes(value: float, estimate: Estimate) -> bool:
    """Whether `value` lies outside the interval; False if there is no interval or one of its ends is NaN."""
    return estimate.interval is not None and (value < estimate.interval[0] or value > estimate.interval[1])


def with_interval(estimate: Estimate, unit: str = "") -> str:
    interval = " [{}, {}]".format(*(show(end, "{:.3f}") for end in estimate.interval)) if estimate.interval else ""
    return f"{show(estimate.value, '{:.3f}')}{unit}{interval}"


def describe_size(size: Size) -> str:
    """One line about the amount of data behind the metrics."""
    scored = amount(size.replies, "true reply", "true replies")
    generated = amount(size.answers, "reply", "replies")
    return (
        f"measured on {PARTS[size.part]}: {amount(size.held_out, 'dialogue')}; {scored} scored, {generated} generated"
    )


def short_table(metrics: dict[str, Metrics]) -> list[str]:
    """The main metrics with their intervals: a line for each metric, a column for each model."""
    columns = {name: column.to_json() for name, column in metrics.items()}
    rows = [["", *(title.lower() for title in columns_of(columns).values())]]
    for metric, cells in (row for group in metric_groups(columns)[0] for row in group.rows):
        if metric.key in SHORT_TABLE and any(cell.value != "–" for cell in cells):
            rows.append([metric.name, *map(str, cells)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return ["", *lines]
