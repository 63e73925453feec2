"""The metrics of an evaluation as a table: what each means, which way is better, and its value with its interval."""

from typing import Any, NamedTuple

from evaluation.run_files import mapping, number
from support.files import Json

COLUMNS = {"base": "Base model", "model": "Fine-tuned", "true_replies": "True replies"}
LOWER, HIGHER, NEAR = "lower is better", "higher is better", "best near the true replies"


class Metric(NamedTuple):
    key: str
    name: str
    better: str
    meaning: str
    form: str = "{:.2f}"


class Cell(NamedTuple):
    value: str
    below: list[str]
    """the interval, or the reason why there is no value"""


class Row(NamedTuple):
    metric: Metric
    cells: list[Cell]


class Group(NamedTuple):
    name: str
    question: str
    rows: list[Row]


GROUPS: dict[tuple[str, str], tuple[Metric, ...]] = {
    ("Likelihood", "How well does it foresee what was really said?"): (
        Metric("loss", "Loss", LOWER, "Nats a token: how much the real conversations surprise the model.", "{:.3f}"),
        Metric(
            "train_part_loss",
            "Loss on the training part",
            "",
            "The same where it has seen the answers. Far below the loss above: learned by heart.",
            "{:.3f}",
        ),
        Metric("perplexity", "Perplexity", LOWER, "Among how many equally likely tokens it hesitates.", "{:,.1f}"),
        Metric(
            "bits_per_byte",
            "Bits per byte",
            LOWER,
            "The loss per byte of text, so that models with other vocabularies compare.",
            "{:.3f}",
        ),
    ),
    ("Context", "Does it use what was said before?"): (
        Metric(
            "context_use",
            "Context use",
            HIGHER,
            "How many nats a token the dialogue so far is worth when a reply is foreseen.",
            "{:.3f}",
        ),
        Metric(
            "context_use_beyond_other",
            "More than a wrong context",
            HIGHER,
            "How much of that is lost with another dialogue's history in its place: what it takes from what was said.",
            "{:.3f}",
        ),
        Metric(
            "context_use_of_other_history",
            "Use of a wrong context",
            "should be well below the use of its own",
            "The same with another dialogue's history in its place: what mere talk before is worth.",
            "{:.3f}",
        ),
    ),
    ("Coherence", "Does it know which reply belongs?"): (
        Metric(
            "hits_at_1", "Hits@1", HIGHER, "How often it finds the true reply likelier than turns of others.", "{:.0%}"
        ),
        Metric("mrr", "Mean reciprocal rank", HIGHER, "1 if the true reply always comes first, ½ if second."),
    ),
    ("Diversity", "Does it say more than one thing?"): (
        Metric("distinct_1", "Distinct-1", NEAR, "The share of words that are new, in all its replies together."),
        Metric("distinct_2", "Distinct-2", NEAR, "The same of pairs of words."),
        Metric(
            "expectation_adjusted_distinct",
            "Expectation-adjusted distinct",
            NEAR,
            "Distinct words beside as many as chance would give: does not fall as texts grow long.",
        ),
        Metric(
            "self_bleu", "Self-BLEU", NEAR, "How much its replies resemble each other; high: always the same.", "{:.1f}"
        ),
        Metric("repetition", "Repetition", LOWER, "The share of a reply that it has said already.", "{:.1%}"),
        Metric("words_per_reply", "Words per reply", NEAR, "How much it says at a time.", "{:.1f}"),
    ),
    ("Likeness", "Is it what was really said?"): (
        Metric("chrf", "chrF", HIGHER, "Shared runs of letters with the true reply, 0 to 100.", "{:.1f}"),
        Metric("bleu", "BLEU", HIGHER, "Shared runs of words with the true reply, 0 to 100.", "{:.1f}"),
        Metric("word_f1", "Word F1", HIGHER, "Shared words with the true reply, 0 to 1. A good reply may share none."),
    ),
    ("Memorisation", "Does it repeat its training conversations?"): (
        Metric(
            "copied_5grams",
            "Copied runs of 5 words",
            NEAR,
            "The share of its runs of five words that stand in the training conversations.",
            "{:.1%}",
        ),
        Metric(
            "longest_copied_span", "Longest copied span", NEAR, "The most words in a row from a training conversation."
        ),
    ),
}


def columns_of(metrics: Json) -> dict[str, str]:
    """The columns for which there are numbers, with their titles."""
    found = {column: title for column, title in COLUMNS.items() if mapping(metrics.get(column))}
    return found if "base" in found else {**found, **({"model": "The model"} if "model" in found else {})}


def metric_groups(metrics: Json) -> tuple[list[Group], list[str]]:
    """The table, and the names of the metrics that the evaluation does not hold.

    Args:
        metrics: `metrics` of evaluation.json.
    """
    columns = [with_part_losses(mapping(metrics.get(column))) for column in columns_of(metrics)]
    groups, absent = [], []
    for (name, question), members in GROUPS.items():
        rows = []
        for metric in members:
            if any(metric.key in column or metric.key in mapping(column.get("too_small")) for column in columns):
                rows.append(Row(metric, [make_cell(metric, column) for column in columns]))
            else:
                absent.append(metric.name)
        if rows:
            groups.append(Group(name, question, rows))
    return groups, absent


def with_part_losses(values: Json) -> Json:
    """The metrics of one model, the loss of the training part among them."""
    part = mapping(mapping(values.get("loss_by_part")).get("train"))
    if "loss" not in part:
        return values
    intervals = {**mapping(values.get("intervals")), "train_part_loss": mapping(part.get("intervals")).get("loss")}
    return {**values, "train_part_loss": part["loss"], "intervals": intervals}


def make_cell(metric: Metric, values: Json) -> Cell:
    """A metric's value in one column, with what stands in small type below it."""
    too_small = mapping(values.get("too_small")).get(metric.key)
    if isinstance(too_small, str):
        return Cell("too few", [too_small])
    if metric.key == "longest_copied_span":
        return span_cell(values)
    value = number(values.get(metric.key))
    if value is None:
        return Cell("–", [])
    below = interval_text(mapping(values.get("intervals")).get(metric.key), metric.form)
    chance = number(values.get("chance_hits_at_1")) if metric.key == "hits_at_1" else None
    if chance is not None:
        below.append(f"by chance {chance:.0%}")
    return Cell(show(value, metric.form), below)


def span_cell(values: Json) -> Cell:
    """The longest copied span: how many words, which, and where they are from."""
    span = mapping(values.get("longest_copied_span"))
    words = number(span.get("words"))
    if words is None:
        return Cell("none" if "longest_copied_span" in values else "–", [])
    source = number(span.get("dialogue"))
    where = f", dialogue {source:.0f}" if source is not None else ""
    return Cell(f"{words:.0f} words", [f"“{span.get('text', '')}”{where}"])


def interval_of(value: Any) -> tuple[float, float] | None:
    """The two ends of an interval, if there are two."""
    ends = [number(end) for end in value] if isinstance(value, list) else []
    if len(ends) != 2 or ends[0] is None or ends[1] is None:
        return None
    return ends[0], ends[1]


def interval_text(value: Any, form: str) -> list[str]:
    ends = interval_of(value)
    return [] if ends is None else [f"{show(ends[0], form)} to {show(ends[1], form)}"]


def show(value: float, form: str) -> str:
    """A number as a reader wants it, with a real minus sign; huge ones in powers of ten."""
    text = form.format(value) if abs(value) < 1e9 else f"{value:.2e}"
    text = text if any(digit in text for digit in "123456789") else text.removeprefix("-")  # no minus zero
    return text.replace("-", "−", 1) if text.startswith("-") else text
