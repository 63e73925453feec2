"""Compare a model, its base model and the true replies on held-out conversations."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dialogues.dialogue import Turn
from dialogues.tokenizer import encode_text
from evaluation import metrics
from evaluation.likelihood import Subject, measure_likelihood
from evaluation.metrics import Copied, Estimate
from evaluation.results import CopiedSpan, Exposure, Metrics, ShownCase, ShownTurn, TooFew
from evaluation.scoring import Scorer
from evaluation.voice import measure_voice
from support.files import Json
from talking.decoder import Decoder
from talking.generation import Case, CompletionConfig, complete_dialogues

REPLY_TOKENS = 64  # maximum number of tokens of a reply to measure


def measure_replies(replies: Sequence[str], subject: Subject, copies: Sequence[Copied] | None) -> Metrics:
    """Diversity, repetition and memorisation of one reply per dialogue.

    Args:
        copies: the parts of each reply that also occur in the training dialogues; None if they were not searched for.
    """
    spoken, few = [metrics.words(reply) for reply in replies], "needs more words than the replies have"
    found = Metrics(
        distinct_1=or_too_few(metrics.distinct(spoken, 1), few),
        distinct_2=or_too_few(metrics.distinct(spoken, 2), few),
        repetition=or_too_few(share([metrics.repetition(reply) for reply in spoken], subject.seed), few),
        words_per_reply=share([(len(reply), 1) for reply in spoken], subject.seed, most=math.inf),
        empty_replies=Estimate(float(sum(not reply.strip() for reply in replies))),
    )
    if copies is None:
        return found
    copied = share([(each.copied, each.ngrams) for each in copies], subject.seed)
    return replace(found, copied_5grams=or_too_few(copied, few))


def or_too_few(found: Estimate | float | None, needed: str) -> Estimate | TooFew:
    """Return the estimate, or `TooFew` if there is none."""
    if found is None:
        return TooFew(needed)
    return found if isinstance(found, Estimate) else Estimate(found)


def share(counts: Sequence[tuple[int, int]], seed: int, most: float = 1) -> Estimate | None:
    """The sum of the first counts divided by the sum of the second ones; None if the latter is 0."""
    above, below = np.array(counts, float).reshape(-1, 2).T
    return metrics.ratio(above[below > 0], below[below > 0], seed, (0, most)) if below.any() else None


def first_texts(cases: Sequence[Case], subject: Subject, true: bool = False) -> list[str]:
    """The first turn of each completion, cut to the tokens that are measured."""
    texts = [(case.true if true else case.written)[0].text for case in cases]
    tokens = [encode_text(subject.tokenizer, text)[: subject.reply_tokens] for text in texts]
    return [subject.tokenizer.decode(each).rstrip("\ufffd") for each in tokens]


@dataclass(frozen=True)
class Column:
    """The measurements of one model.

    Attributes:
        losses: (held-out dialogues, 2) the summed loss of each dialogue, in nats, and its number of tokens.
        written: the model's completions of the answered dialogues.
        exposure: the private strings that it gives away; only of a fine-tuned model, and not part of the JSON.
    """

    metrics: Metrics
    losses: np.ndarray
    written: list[Case]
    exposure: Exposure | None = None

    def to_json(self) -> Json:
        return {"metrics": self.metrics.to_json(), "losses": self.losses.tolist(), "written": self.written}

    @classmethod
    def from_json(cls, value: Json) -> "Column":
        """Read the output of `to_json`.

        Raises:
            one of `DAMAGED`: `value` has a different structure.
        """
        written = [Case(*(tuple(Turn(*turn) for turn in turns) for turns in case)) for case in value["written"]]
        return cls(Metrics.from_json(value["metrics"]), np.array(value["losses"]), written)


def measure_column(
    decoder: Decoder, subject: Subject, written: list[Case] | None = None, whole: bool = False
) -> Column:
    """Measure a model.

    Args:
        written: existing completions; None to generate them.
        whole: whether to complete the shown dialogues to their end, not just by one turn.

    Raises:
        UserError: the model's output is NaN or infinite.
    """
    if written is None:
        conversations, shown = subject.conversations, subject.generation.cases if whole else 0
        dialogues = [conversations[number] for number in subject.answered]
        config = CompletionConfig(conversations.renderer, conversations.learn, subject.generation, subject.seed)
        written = complete_dialogues(decoder, dialogues[:shown], config)
        written += complete_dialogues(
            decoder, dialogues[shown:], replace(config, sampling=subject.short_sampling, one_turn=True)
        )
    scorer = Scorer(decoder.model, subject.autocast, subject.tokenizer.eot_token)
    found, losses = measure_likelihood(scorer, subject)
    return Column(found.joined(measure_voice(decoder, scorer, subject)), losses, written)


@dataclass(frozen=True)
class Comparison:
    """The metrics of each model and of the true replies, the shown cases, and sacrebleu's `signatures`."""

    metrics: dict[str, Metrics]
    cases: list[ShownCase]
    signatures: dict[str, str]


def compare(columns: dict[str, Column], subject: Subject) -> Comparison:
    """Compute the metrics of the true replies and of the models in `columns`: "model" and optionally "base"."""
    cases = columns["model"].written
    said = {name: [case.written for case in column.written] for name, column in columns.items()}
    said["true_replies"] = [case.true for case in cases]
    true = first_texts(cases, subject, true=True)
    replies = {name: first_texts(columns[name].written, subject) if name in columns else true for name in said}
    copied_replies, copied_turns = find_copies(replies, said, subject) or (None, None)
    signatures, found = {}, {}
    for name in ("base", "model", "true_replies"):
        if name not in said:
            continue
        measured = measure_replies(replies[name], subject, copied_replies[name] if copied_replies else None)
        if copied_replies:
            measured = replace(measured, longest_copied_span=longest_span(replies[name], copied_replies[name]))
        if name in columns:
            likeness, signatures = metrics.likeness(replies[name], true, subject.seed)
            measured = (
                columns[name].metrics.joined(measured).joined(Metrics(chrf=likeness["chrf"], bleu=likeness["bleu"]))
            )
            if name == "model" and "base" in columns:
                tokens, change = columns[name].losses[:, 1], columns[name].losses[:, 0] - columns["base"].losses[:, 0]
                measured = replace(measured, loss_change=metrics.ratio(change, tokens, subject.seed))
        found[name] = measured
    return Comparison(found, show_cases(said, cases, copied_turns, subject), signatures)


def find_copies(
    replies: dict[str, list[str]], said: dict[str, list[tuple[Turn, ...]]], subject: Subject
) -> tuple[dict[str, list[Copied]], dict[str, list[list[Copied]]]] | None:
    """Find copies of the training dialogues in the replies and in all turns, reading the training dialogues once."""
    if subject.training is None:
        return None
    texts = [text for column in replies.values() for text in column]
    texts += [turn.text for column in said.values() for turns in column for turn in turns]
    found = iter(metrics.find_copies(texts, subject.training()))
    of_replies = {name: [next(found) for _ in column] for name, column in replies.items()}
    return of_replies, {name: [[next(found) for _ in turns] for turns in column] for name, column in said.items()}


def longest_span(replies: Sequence[str], copies: Sequence[Copied]) -> CopiedSpan | None:
    """The longest run of words that also occurs in a training dialogue."""
    found = [
        CopiedSpan(span.words, text[span.start : span.end], span.dialogue)
        for text, copied in zip(replies, copies, strict=True)
        if (span := copied.longest)
    ]
    return max(found, default=None)


def show_cases(
    said: dict[str, list[tuple[Turn, ...]]],
    cases: Sequence[Case],
    copies: dict[str, list[list[Copied]]] | None,
    subject: Subject,
) -> list[ShownCase]:
    """The first dialogues turn by turn, with the true continuation and that of each model; copies are marked."""

    def written(name: str, place: int) -> list[ShownTurn]:
        marks = [copied.marks for copied in copies[name][place]] if copies else [None] * len(said[name][place])
        return [ShownTurn(*turn, marked) for turn, marked in zip(said[name][place], marks, strict=True)]

    return [
        ShownCase(
            place=number + 1,
            input=[ShownTurn(*turn) for turn in case.asked],
            response=[ShownTurn(*turn) for turn in case.true],
            model_response=written("model", place),
            base_response=written("base", place) if "base" in said else None,
        )
        for place, (number, case) in enumerate(zip(subject.answered[: subject.generation.cases], cases, strict=False))
    ]
