"""A model, the one it began as, and the true replies, measured on held-out conversations."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from dialogues.dialogue import Turn
from evaluation import metrics
from evaluation.likelihood import Metrics, Subject, measure_likelihood
from evaluation.metrics import Copied, Estimate
from evaluation.scoring import Scorer
from talking.decoder import Decoder
from talking.generation import Case, complete_dialogues

REPLY_TOKENS = 64  # of a reply that are measured, at most


def measure_replies(replies: Sequence[str], subject: Subject, copies: Sequence[Copied] | None) -> Metrics:
    """Diversity, repetition and memorisation of one reply for each dialogue.

    Args:
        copies: what of each stands in the training dialogues.
    """
    found = Metrics()
    spoken, few = [metrics.words(reply) for reply in replies], "needs more words than the replies have"
    for n in (1, 2):
        found.add(f"distinct_{n}", metrics.distinct(spoken, n), few)
    tokens = list(map(subject.tokenizer.encode_ordinary, replies))
    adjusted = metrics.expectation_adjusted_distinct(tokens, subject.tokenizer.n_vocab)
    found.add("expectation_adjusted_distinct", adjusted, few)
    found.add("self_bleu", metrics.self_bleu(replies), "needs two replies with words")
    found.add("repetition", share([metrics.repetition(reply) for reply in spoken], subject.seed), few)
    found.add("words_per_reply", share([(len(reply), 1) for reply in spoken], subject.seed, most=math.inf))
    found.add("empty_replies", float(sum(not reply.strip() for reply in replies)))
    if copies is not None:
        found.add("copied_5grams", share([(each.copied, each.ngrams) for each in copies], subject.seed), few)
    return found


def share(counts: Sequence[tuple[int, int]], seed: int, most: float = 1) -> Estimate | None:
    """Σ firsts / Σ seconds over dialogues; none where there is nothing to divide by."""
    above, below = np.array(counts, float).reshape(-1, 2).T
    return metrics.ratio(above[below > 0], below[below > 0], seed, (0, most)) if below.any() else None


def first_texts(cases: Sequence[Case], subject: Subject, true: bool = False) -> list[str]:
    """The first turn of each completion, as much of it as is measured."""
    texts = [(case.true if true else case.written)[0].text for case in cases]
    encode, decode = subject.tokenizer.encode_ordinary, subject.tokenizer.decode
    return [decode(encode(text)[: subject.reply_tokens]).rstrip("\ufffd") for text in texts]


class Column(NamedTuple):
    """What was measured of one model.

    Attributes:
        losses: (held-out dialogues, 2) the summed loss of each, in nats, and its tokens.
        written: what it has written in the dialogues that are answered.
    """

    metrics: Metrics
    losses: np.ndarray
    written: list[Case]

    def as_json(self) -> dict[str, Any]:
        return {"metrics": self.metrics.as_json(), "losses": self.losses.tolist(), "written": self.written}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Column":
        """What `as_json` and a file made of it.

        Raises:
            KeyError, TypeError, ValueError: `value` is not of that form.
        """
        written = [Case(*(tuple(Turn(*turn) for turn in turns) for turns in case)) for case in value["written"]]
        return cls(Metrics(**value["metrics"]), np.array(value["losses"]), written)


def measure_column(
    decoder: Decoder, subject: Subject, written: list[Case] | None = None, whole: bool = False
) -> Column:
    """Measure a model.

    Args:
        written: what it has written already; none: it writes now, and in the dialogues that are shown, if asked for the
            `whole`, all of the rest.
    """
    if written is None:
        conversations, shown = subject.conversations, subject.generation.cases if whole else 0
        dialogues = [conversations[number] for number in subject.answered]
        short = replace(subject.generation, max_new_tokens=min(subject.reply_tokens, subject.generation.max_new_tokens))
        renderer, learn, seed = conversations.renderer, conversations.learn, subject.seed
        written = complete_dialogues(decoder, renderer, dialogues[:shown], learn, subject.generation, seed)
        written += complete_dialogues(decoder, renderer, dialogues[shown:], learn, short, seed, one_turn=True)
    scorer = Scorer(decoder.model, subject.autocast, subject.tokenizer.eot_token)
    return Column(*measure_likelihood(scorer, subject), written)


def compare(columns: dict[str, Column], subject: Subject) -> dict[str, Any]:
    """Measure what the models of `columns` ("model", and "base" for the one it began as) and people have written.

    Returns:
        `metrics` and `cases` of `evaluation.json`, and the `signatures` of sacrebleu.
    """
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
        if copied_turns:
            measured.values["longest_copied_span"] = longest_span(said[name], copied_turns[name])
        if name in columns:
            signatures = add_likeness(measured, replies[name], true, subject)
            if name == "model" and "base" in columns:
                tokens, change = columns[name].losses[:, 1], columns[name].losses[:, 0] - columns["base"].losses[:, 0]
                measured.add("loss_change", metrics.ratio(change, tokens, subject.seed))
            measured = columns[name].metrics.joined(measured)
        found[name] = measured.as_json()
    return {"metrics": found, "cases": show_cases(said, cases, copied_turns, subject), "signatures": signatures}


def add_likeness(found: Metrics, texts: Sequence[str], true: Sequence[str], subject: Subject) -> dict[str, str]:
    """chrF, BLEU and the words in common with the true replies; returns the signatures of the first two."""
    estimates, signatures = metrics.likeness(texts, true, subject.seed)
    pairs = zip(map(metrics.words, texts), map(metrics.words, true), strict=True)
    f1 = np.array([metrics.word_f1(*pair) for pair in pairs])
    estimates["word_f1"] = metrics.ratio(f1, np.ones(len(f1)), subject.seed, metrics.SHARE)
    for name, estimate in estimates.items():
        found.add(name, estimate)
    return signatures


def find_copies(
    replies: dict[str, list[str]], said: dict[str, list[tuple[Turn, ...]]], subject: Subject
) -> tuple[dict[str, list[Copied]], dict[str, list[list[Copied]]]] | None:
    """What the replies, and all turns that were said, have from the training dialogues, in one reading of these."""
    if subject.training is None:
        return None
    texts = [text for column in replies.values() for text in column]
    texts += [turn.text for column in said.values() for turns in column for turn in turns]
    found = iter(metrics.find_copies(texts, subject.training()))
    of_replies = {name: [next(found) for _ in column] for name, column in replies.items()}
    return of_replies, {name: [[next(found) for _ in turns] for turns in column] for name, column in said.items()}


def longest_span(said: Sequence[Sequence[Turn]], copies: Sequence[Sequence[Copied]]) -> dict[str, Any] | None:
    """The longest run of words that stands in a training dialogue, and in which."""
    found = [
        (copied.longest.words, turn.text[copied.longest.start : copied.longest.end], copied.longest.dialogue)
        for turns, each in zip(said, copies, strict=True)
        for turn, copied in zip(turns, each, strict=True)
        if copied.longest
    ]
    return dict(zip(("words", "text", "dialogue"), max(found), strict=True)) if found else None


def show_cases(
    said: dict[str, list[tuple[Turn, ...]]],
    cases: Sequence[Case],
    copies: dict[str, list[list[Copied]]] | None,
    subject: Subject,
) -> list[dict[str, Any]]:
    """The first dialogues turn by turn: how they went on, and how each model went on, with what is copied marked."""
    shown = []
    numbers = subject.answered[: subject.generation.cases]
    for place, (number, case) in enumerate(zip(numbers, cases, strict=False)):
        entry: dict[str, Any] = {
            "place": int(subject.conversations.numbers[number]),
            "input": [turn._asdict() for turn in case.asked],
            "response": [turn._asdict() for turn in case.true],
        }
        for name in ("model", "base") if "base" in said else ("model",):
            turns = [turn._asdict() for turn in said[name][place]]
            for turn, copied in zip(turns, copies[name][place] if copies else (), strict=copies is not None):
                turn["copied"] = copied.marks
            entry[f"{name}_response"] = turns
        shown.append(entry)
    return shown
