"""The table of an evaluation's metrics: meaning, direction (higher or lower is better), and values with intervals."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from evaluation.run_files import mapping, number
from support.files import Json

CHANCE = {"hits_at_1": "chance_hits_at_1"} | dict.fromkeys(("voice", "voice_true", "voice_generated"), "chance_voice")
MOST_PEOPLE = 4  # maximum number of people with rows of their own
LONGEST_NAME = 12  # longest name in the first column of the table, in characters
PARTS = {"val": "the validation part", "test": "the test part", "all": "the given conversations"}
COLUMNS = {"base": "Base model", "model": "Fine-tuned", "true_replies": "True replies"}
LOWER, HIGHER, NEAR = "lower is better", "higher is better", "should match true replies"


class Metric(NamedTuple):
    key: str
    name: str
    better: str
    meaning: str
    form: str = "{:.2f}"
    speaker: str | None = None
    """the person, for a metric with a value for each"""


class Cell(NamedTuple):
    value: str
    below: list[str]
    """the interval, or the reason why there is no value"""

    def __str__(self) -> str:
        """The value with its interval, on one line."""
        return f"{self.value} ({self.below[0]})" if self.below and self.value != "too few" else self.value


class Row(NamedTuple):
    metric: Metric
    cells: list[Cell]


class Group(NamedTuple):
    name: str
    question: str
    rows: list[Row]


GROUPS: dict[tuple[str, str], tuple[Metric, ...]] = {
    ("Likelihood", "How well does it predict the real conversations?"): (
        Metric("loss", "Loss", LOWER, "Nats per token: how much the real conversations surprise the model.", "{:.3f}"),
        Metric(
            "train_part_loss",
            "Loss on the training part",
            "",
            "The same on the training conversations. If it is far below the loss above, the model has memorised them.",
            "{:.3f}",
        ),
        Metric(
            "perplexity",
            "Perplexity",
            LOWER,
            "exp(loss): like choosing among this many equally likely tokens.",
            "{:,.1f}",
        ),
        Metric(
            "bits_per_byte",
            "Bits per byte",
            LOWER,
            "The loss per byte of text: comparable between models with different vocabularies.",
            "{:.3f}",
        ),
    ),
    ("Context", "Does it use what was said before?"): (
        Metric(
            "context_use",
            "Context use",
            HIGHER,
            "How much the dialogue so far lowers the loss of a reply, in nats per token.",
            "{:.3f}",
        ),
        Metric(
            "context_use_beyond_other",
            "Gain over a wrong context",
            HIGHER,
            "How much higher the loss is with another dialogue's history: the gain from what was actually said.",
            "{:.3f}",
        ),
        Metric(
            "context_use_of_other_history",
            "Use of a wrong context",
            "should be well below context use",
            "How much another dialogue's history lowers the loss of a reply: any history helps a little.",
            "{:.3f}",
        ),
    ),
    ("Coherence", "Can it tell the true reply from others?"): (
        Metric("hits_at_1", "Hits@1", HIGHER, "How often it ranks the true reply above all others.", "{:.0%}"),
    ),
    ("Voice", "Does it sound like each person?"): (  # followed by two rows for each person
        Metric("voice", "Voice", HIGHER, "How often it tells who wrote a true reply: the mean over people.", "{:.0%}"),
    ),
    ("Diversity", "How varied are its replies?"): (
        Metric("distinct_1", "Distinct-1", NEAR, "Distinct words as a share of all words in its replies."),
        Metric("distinct_2", "Distinct-2", NEAR, "The same for pairs of words."),
        Metric("repetition", "Repetition", LOWER, "The share of a reply's 4-grams that occur earlier in it.", "{:.1%}"),
        Metric("words_per_reply", "Words per reply", NEAR, "The mean length of a reply.", "{:.1f}"),
    ),
    ("Similarity", "How close are its replies to the true ones?"): (
        Metric("chrf", "chrF", HIGHER, "Character n-grams shared with the true reply, 0 to 100.", "{:.1f}"),
        Metric("bleu", "BLEU", HIGHER, "Word n-grams shared with the true reply, 0 to 100.", "{:.1f}"),
    ),
    ("Memorisation", "Does it repeat its training conversations?"): (
        Metric(
            "copied_5grams",
            "Copied 5-grams",
            NEAR,
            "The share of 5-grams in its replies that also occur in the training conversations.",
            "{:.1%}",
        ),
        Metric(
            "longest_copied_span",
            "Longest copied span",
            NEAR,
            "The longest passage that also occurs in a training conversation.",
        ),
    ),
}


def columns_of(metrics: Json) -> dict[str, str]:
    """The columns that have numbers, with their titles."""
    found = {column: title for column, title in COLUMNS.items() if mapping(metrics.get(column))}
    return found if "base" in found else {**found, **({"model": "The model"} if "model" in found else {})}


def metric_groups(metrics: Json) -> tuple[list[Group], list[str]]:
    """The table, and the names of the metrics that are missing from the evaluation.

    Args:
        metrics: the value of `metrics` in evaluation.json.
    """
    columns = [with_part_losses(mapping(metrics.get(column))) for column in columns_of(metrics)]
    groups, absent = [], []
    for (name, question), members in GROUPS.items():
        rows = []
        for metric in (*members, *(voices(columns) if name == "Voice" else ())):
            if any(metric.key in column or metric.key in mapping(column.get("too_small")) for column in columns):
                rows.append(Row(metric, [make_cell(metric, column) for column in columns]))
            else:
                absent.append(metric.name)
        if rows:
            groups.append(Group(name, question, rows))
    return groups, absent


def voices(columns: Sequence[Json]) -> Iterator[Metric]:
    """Rows for the first people whose voices were measured: true replies, and replies that the model wrote as them."""
    true, generated = (
        list(dict.fromkeys(name for column in columns for name in mapping(column.get(key))))
        for key in ("voice_true", "voice_generated")
    )
    for name in true[:MOST_PEOPLE]:
        short = name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"
        meaning = f"How often it attributes a true reply of {name} to {name}, not to another speaker."
        yield Metric("voice_true", f"Voice of {short}, true", HIGHER, meaning, "{:.0%}", name)
        if name in generated:
            meaning = f"The same for the replies that the model writes as {name}."
            yield Metric("voice_generated", f"Voice of {short}, generated", "", meaning, "{:.0%}", name)


def with_part_losses(values: Json) -> Json:
    """The metrics of one model, including the loss on the training part."""
    part = mapping(mapping(values.get("loss_by_part")).get("train"))
    if "loss" not in part:
        return values
    intervals = {**mapping(values.get("intervals")), "train_part_loss": mapping(part.get("intervals")).get("loss")}
    return {**values, "train_part_loss": part["loss"], "intervals": intervals}


def make_cell(metric: Metric, values: Json) -> Cell:
    """A metric's value in one column, with the note below it."""
    too_small = mapping(values.get("too_small")).get(metric.key)
    if isinstance(too_small, str):
        return Cell("too few", [too_small])
    if metric.key == "longest_copied_span":
        return span_cell(values)
    value, interval = values.get(metric.key), mapping(values.get("intervals")).get(metric.key)
    if metric.speaker is not None:
        value, interval = mapping(value).get(metric.speaker), mapping(interval).get(metric.speaker)
    value = number(value)
    if value is None:
        return Cell("–", [])
    ends = interval_of(interval)
    below = [f"{show(ends[0], metric.form)} to {show(ends[1], metric.form)}"] if ends else []
    chance = number(values.get(CHANCE.get(metric.key, "")))
    if chance is not None:
        below.append(f"by chance {chance:.0%}")
    return Cell(show(value, metric.form), below)


def span_cell(values: Json) -> Cell:
    """The longest copied span: number of words, text and source."""
    span = mapping(values.get("longest_copied_span"))
    words = number(span.get("words"))
    if words is None:
        return Cell("none" if "longest_copied_span" in values else "–", [])
    source = number(span.get("dialogue"))
    where = f", dialogue {source:.0f}" if source is not None else ""
    return Cell(f"{words:.0f} words", [f"“{span.get('text', '')}”{where}"])


def interval_of(value: Any) -> tuple[float, float] | None:
    """The ends of an interval; None unless there are two."""
    ends = [number(end) for end in value] if isinstance(value, list) else []
    if len(ends) != 2 or ends[0] is None or ends[1] is None:
        return None
    return ends[0], ends[1]


def show(value: float, form: str) -> str:
    """Format a number for reading: with a real minus sign, and in powers of ten if it is huge."""
    text = form.format(value) if abs(value) < 1e9 else f"{value:.2e}"
    text = text if any(digit in text for digit in "123456789") else text.removeprefix("-")  # no negative zero
    return text.replace("-", "−", 1) if text.startswith("-") else text
