"""Does the model tell people apart? It judges who wrote a reply, by the likelihood of the text under each name."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from dialogues.batches import Example
from dialogues.conversations import Conversations
from dialogues.tokenizer import encode_text
from evaluation.likelihood import Subject, Sums
from evaluation.metrics import FEWEST_TO_DRAW, SHARE, Estimate
from evaluation.results import Metrics, TooFew
from evaluation.scoring import Pieces, Reply, Scorer, text_tokens
from talking.decoder import Decoder
from talking.generation import CompletionConfig, complete_turns

CANDIDATES = 5  # maximum number of speakers to choose between
TIE = 1e-3  # losses that differ by less are equal, in nats: rounding alone changes them


class Verdicts(NamedTuple):
    """Judged texts; each array is (texts,)."""

    dialogues: np.ndarray
    speakers: np.ndarray  # the true ones
    right: np.ndarray  # 1 if the text is attributed to its speaker, else 0; 1/n if n speakers are tied
    chances: np.ndarray  # 1 / number of candidates


def choose_voices(conversations: Conversations, dialogues: np.ndarray, most: int, seed: int) -> list[Reply]:
    """Choose up to `most` replies at random by `seed` from those of `dialogues` that have two or more speakers.

    Instruction data has no people, so nothing is chosen.
    """
    if conversations.renderer.name == "alpaca":
        return []
    starts, speakers = conversations.turn_starts, conversations.texts[:, 2]
    several = np.minimum.reduceat(speakers, starts[:-1]) < np.maximum.reduceat(speakers, starts[:-1])
    several &= np.isin(np.arange(len(conversations)), dialogues)
    owners = np.repeat(np.arange(len(conversations)), np.diff(starts))
    turns = np.flatnonzero(several[owners] & (np.arange(len(owners)) > starts[owners]))
    chosen: list[Reply] = []
    for turn in np.random.default_rng(seed).permutation(turns).tolist():
        reply = Reply(int(owners[turn]), turn - int(starts[owners[turn]]))
        if conversations.renderer.tokenizer.decode(text_tokens(conversations, reply)).strip():
            chosen.append(reply)
        if len(chosen) == most:
            break
    return sorted(chosen)


def measure_voice(decoder: Decoder, scorer: Scorer, subject: Subject) -> Metrics:
    """How often the model attributes each person's true replies, and those that it writes, to that person.

    It writes replies only if it tells people apart at all. `voice` is the mean over the people's true replies. A
    preference for one name cancels out in this mean, so it is at chance if the model learns nothing about the speaker
    from the text. People with fewer than eight replies count as one.

    Raises:
        UserError: the model's output is NaN or infinite.
    """
    conversations, replies = subject.conversations, subject.voices
    if conversations.renderer.name == "alpaca":
        return Metrics()
    if not replies:
        none = TooFew("needs replies by several people; after a short run, only evaluate.py measures it")
        return Metrics(voice=none, chance_voice=none)
    counts = Counter(speaker_of(conversations, reply) for reply in replies)
    known = [speaker for speaker, count in counts.most_common() if count >= FEWEST_TO_DRAW]
    most = max(counts.values(), default=0)
    if min(most, len(replies) - most) < FEWEST_TO_DRAW:
        few = TooFew(
            f"needs {FEWEST_TO_DRAW} replies by one person and {FEWEST_TO_DRAW} by others,"
            f" but there are {most} and {len(replies) - most}"
        )
        return Metrics(voice=few, chance_voice=few)
    found = attribute(scorer, subject, {reply: text_tokens(conversations, reply) for reply in replies})
    measured = replace(mean_voice(found, known, subject.seed), voice_true=by_speaker(found, known, subject))
    if not above_chance(measured):  # generating is slow, and a model at chance can't judge the generated replies
        return measured
    written = attribute(scorer, subject, write_replies(decoder, subject, known))
    return replace(measured, voice_generated=by_speaker(written, known, subject))


def above_chance(found: Metrics) -> bool:
    """Whether the interval of `voice` lies above chance."""
    assert isinstance(found.voice, Estimate)
    assert isinstance(found.chance_voice, Estimate)
    return found.voice.interval is not None and found.voice.interval[0] > found.chance_voice.value


def mean_voice(found: Verdicts, known: Sequence[int], seed: int) -> Metrics:
    """The mean over people, each with the same weight, and the value of a model that guesses."""
    people = np.array([known.index(speaker) if speaker in known else len(known) for speaker in found.speakers])
    counts = np.bincount(people)[people]
    weights = np.where(counts < FEWEST_TO_DRAW, 0, 1 / counts)
    return Metrics(
        voice=Sums(found.dialogues, seed).ratio(found.right * weights, weights, weights > 0, SHARE),
        chance_voice=Estimate(float((found.chances * weights).sum() / weights.sum())),
    )


def by_speaker(found: Verdicts, known: Sequence[int], subject: Subject) -> dict[str, Estimate] | None:
    """The share of each person's texts that are attributed to that person."""
    there = [speaker for speaker in known if speaker in found.speakers]
    if not there:
        return None
    sums, ones = Sums(found.dialogues, subject.seed), np.ones(len(found.right))
    return {
        subject.conversations.speakers[speaker]: sums.ratio(found.right, ones, found.speakers == speaker, SHARE)
        for speaker in there
    }


def speaker_of(conversations: Conversations, reply: Reply) -> int:
    return int(conversations.texts_of(reply.dialogue)[reply.turn, 2])


def candidates_of(conversations: Conversations, reply: Reply) -> list[int]:
    """The reply's speaker, then the other speakers of its dialogue with the most turns."""
    own = speaker_of(conversations, reply)
    turns = Counter(conversations.texts_of(reply.dialogue)[:, 2].tolist())
    return [own, *(speaker for speaker, _ in turns.most_common() if speaker != own)][:CANDIDATES]


def write_replies(decoder: Decoder, subject: Subject, speakers: Sequence[int]) -> dict[Reply, list[int]]:
    """Generate a text for each reply of these `speakers`, and return its tokens.

    Empty texts are left out, and so are speakers whose turns the model has not learned.
    """
    conversations, renderer = subject.conversations, subject.conversations.renderer
    if conversations.learn not in ("all", "replies"):
        speakers = [speaker for speaker in speakers if conversations.speakers[speaker] == conversations.learn]
    replies = [reply for reply in subject.voices if speaker_of(conversations, reply) in speakers]
    config = CompletionConfig(renderer, conversations.learn, subject.short_sampling, subject.seed, one_turn=True)
    places = [(conversations[dialogue], turn) for dialogue, turn in replies]
    texts = [case.written[0].text for case in complete_turns(decoder, places, config)]
    return {
        reply: encode_text(subject.tokenizer, renderer.template.space + text)
        for reply, text in zip(replies, texts, strict=True)
        if text
    }


def attribute(scorer: Scorer, subject: Subject, texts: dict[Reply, list[int]]) -> Verdicts:
    """Judge the speaker of each text from its likelihood under the name of each candidate.

    To try a candidate, exchange the names of the candidate and the speaker in the whole dialogue, so that the order of
    the speakers makes sense for every candidate. Only the loss of the text counts; its tokens are the same for all.

    Args:
        texts: for each reply, the tokens of the text to judge: its own, or a generated one.
    """
    conversations = subject.conversations
    candidates = [candidates_of(conversations, reply) for reply in texts]
    pieces = {dialogue: Pieces(conversations, dialogue) for dialogue, _ in texts}
    examples = []
    for reply, speakers in zip(texts, candidates, strict=True):
        text = texts[reply][: subject.length // 2]
        for speaker in speakers:
            *before, label = exchanged_labels(conversations, reply, speaker)
            history = [each + said for each, said in zip(before, pieces[reply.dialogue].texts, strict=False)]
            context = pieces[reply.dialogue].context(label, history, subject.length + 1 - len(text))
            learned = np.arange(len(context) + len(text)) >= len(context)
            examples.append(Example(np.array(context + text), learned))
    losses = iter(scorer.token_losses(examples, "voice") if examples else [])
    sums = [np.array([next(losses).sum() for _ in speakers]) for speakers in candidates]
    return Verdicts(
        dialogues=np.array([dialogue for dialogue, _ in texts], int),
        speakers=np.array([speakers[0] for speakers in candidates], int),
        right=np.array([share_of_first(nats) for nats in sums]),
        chances=np.array([1 / len(speakers) for speakers in candidates]),
    )


def exchanged_labels(conversations: Conversations, reply: Reply, candidate: int) -> list[list[int]]:
    """The labels of the turns up to `reply`, if its speaker and `candidate` had each other's names."""
    own, label = speaker_of(conversations, reply), conversations.renderer.label
    exchanged = {own: candidate, candidate: own}
    speakers: list[int] = conversations.texts_of(reply.dialogue)[: reply.turn + 1, 2].tolist()
    return [label(conversations.speakers[exchanged.get(speaker, speaker)]) for speaker in speakers]


def share_of_first(losses: np.ndarray) -> float:
    """Return 1 if the first loss is the lowest, 1/n if it ties with n - 1 others, and 0 if another one is lower."""
    lowest = losses <= losses.min() + TIE
    return float(lowest[0] / lowest.sum())
