"""The judgement of who wrote a reply: hand-worked losses, ties, old turns, and the sample of replies."""

import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from conftest import CPU, bundled_dialogues
from dialogues.batches import DialogueDataset, Example
from dialogues.conversations import Conversations
from dialogues.dialogue import ALPACA_SPEAKERS, Dialogue, Turn
from dialogues.template import TEMPLATES, Renderer
from evaluation import voice
from evaluation.findings import about_voice, short_table
from evaluation.likelihood import Subject
from evaluation.metric_table import metric_groups
from evaluation.metrics import Estimate
from evaluation.results import Metrics, TooFew
from evaluation.scoring import Reply, Scorer, text_tokens
from evaluation.voice import attribute, candidates_of, choose_voices, measure_voice, share_of_first
from hub.find import BUNDLED
from load_gpt2_weights import add_embeddings, load_model
from settings import GenerationSettings
from support.files import Json
from talking.decoder import Decoder
from talking.generation import Case

ROUNDS = 9


@pytest.fixture(scope="module")
def bundled():
    return load_model(BUNDLED)


def shouting(rounds: int = ROUNDS) -> list[Dialogue]:
    """Ann shouts and Bob does not, except in the last dialogue, where it is the other way round."""
    quiet = [Turn("Ann", "Come!"), Turn("Bob", "No."), Turn("Ann", "Why not!")]
    return [Dialogue(tuple(quiet))] * (rounds - 1) + [
        Dialogue((Turn("Ann", "Hush."), Turn("Bob", "No!"), Turn("Ann", "Why.")))
    ]


def make_subject(tokenizer, dialogues, learn="all", template="prompt", length=512, most=200) -> Subject:
    conversations = Conversations.of(Renderer(tokenizer, template), dialogues, learn)
    numbers = np.arange(len(conversations))
    return Subject(
        conversations=conversations,
        datasets={"val": DialogueDataset(conversations, numbers, length)},
        part="val",
        replies=[],
        voices=choose_voices(conversations, numbers, most, seed=1),
        answered=[],
        training=None,
        generation=GenerationSettings(),
        reply_tokens=8,
        seed=0,
        autocast=CPU.autocast,
    )


class StubScorer:
    """A judge whose losses are known: under Ann's name a shout costs 1 nat per token and all else costs 2; under other
    names it is the other way round."""

    def __init__(self, subject: Subject) -> None:
        self.conversations, self.examples = subject.conversations, []

    def token_losses(self, examples: list[Example], what: str) -> list[np.ndarray]:
        self.examples = examples
        return [np.full(np.count_nonzero(example.learned), self.loss(*self.parts(example))) for example in examples]

    def loss(self, name: str, text: str) -> float:
        return 1.0 if (name == "Ann") == text.endswith("!") else 2.0

    def parts(self, example: Example) -> tuple[str, str]:
        """The name and the text of the turn that is judged."""
        start, tokens, renderer = int(example.learned.argmax()), example.tokens.tolist(), self.conversations.renderer
        assert example.learned[start:].all()
        labels = {name: renderer.label(name) for name in self.conversations.speakers}
        names = [name for name, label in labels.items() if tokens[:start][-len(label) :] == label]
        return (names or [""])[0], renderer.tokenizer.decode(tokens[start:])


def stub(subject: Subject) -> Any:
    return StubScorer(subject)


def measure(subject: Subject, scorer: Any = None, decoder: Any = None) -> Json:
    return measure_voice(decoder, scorer, subject).to_json()


def write(monkeypatch, text_of) -> list[tuple[str, int]]:
    """Let the model write `text_of` the speaker; return the list of the turns that it will be asked for."""
    asked = []

    def complete_turns(decoder, places, config):
        asked.extend((dialogue.turns[turn].speaker, config.sampling.max_new_tokens) for dialogue, turn in places)
        return [Case((), (), (Turn("", text_of(dialogue.turns[turn].speaker)),)) for dialogue, turn in places]

    monkeypatch.setattr(voice, "complete_turns", complete_turns)
    return asked


class TestMeasuring:
    def test_shares_equal_those_worked_out_by_hand(self, bundled, monkeypatch):
        """Ten pairs of replies, one pair wrong. The model always shouts, so all it writes sounds like Ann."""
        subject = make_subject(bundled[1], shouting(10))
        asked = write(monkeypatch, lambda speaker: "Now!")
        found = measure(subject, stub(subject))
        assert found["voice_true"] == {"Ann": 0.9, "Bob": 0.9}
        assert found["voice_generated"] == {"Ann": 1, "Bob": 0}
        assert (found["voice"], found["chance_voice"]) == (pytest.approx(0.9), 0.5)
        low, high = found["intervals"]["voice"]
        assert 0.5 < low < 0.9 < high <= 1
        assert sorted(asked) == [("Ann", 8)] * 10 + [("Bob", 8)] * 10

    def test_empty_generated_replies_are_left_out(self, bundled, monkeypatch):
        subject = make_subject(bundled[1], shouting())
        write(monkeypatch, lambda speaker: "" if speaker == "Ann" else "No.")
        assert measure(subject, stub(subject))["voice_generated"] == {"Bob": 1}

    @pytest.mark.parametrize(("learn", "speakers"), [("Bob", {"Bob"}), ("replies", {"Ann", "Bob"})])
    def test_only_people_that_the_model_has_learned_are_written(self, learn, speakers, bundled, monkeypatch):
        subject = make_subject(bundled[1], shouting(), learn)
        asked = write(monkeypatch, lambda speaker: "No.")
        found = measure(subject, stub(subject))
        assert set(found["voice_true"]) == {"Ann", "Bob"}
        assert set(found["voice_generated"]) == {speaker for speaker, _ in asked} == speakers

    def test_a_preference_for_one_name_cancels_out_in_the_mean(self, bundled, monkeypatch):
        """The judge says Ann whatever the text is, and Ann has more replies."""
        dialogues = [each._replace(turns=(*each.turns, Turn("Ann", "Go!"))) for each in shouting()]
        subject = make_subject(bundled[1], dialogues)
        write(monkeypatch, lambda speaker: "No.")
        monkeypatch.setattr(StubScorer, "loss", lambda self, name, text: float(name != "Ann"))
        found = measure(subject, stub(subject))
        assert found["voice_true"] == {"Ann": 1, "Bob": 0}
        assert "voice_generated" not in found, "a judge at chance says nothing about generated replies"
        assert found["voice"] == pytest.approx(0.5)
        assert found["chance_voice"] == pytest.approx(0.5)

    def test_many_people_with_few_replies_count_as_one(self, bundled, monkeypatch):
        """Bob talks to somebody else in each dialogue, and the judge always says Bob."""
        dialogues = [Dialogue((Turn(f"P{n}", "Hm."), Turn("Bob", "No."), Turn(f"P{n}", "Go!"))) for n in range(9)]
        subject = make_subject(bundled[1], dialogues)
        write(monkeypatch, lambda speaker: "No.")
        monkeypatch.setattr(StubScorer, "loss", lambda self, name, text: float(name != "Bob"))
        found = measure(subject, stub(subject))
        assert found["voice_true"] == {"Bob": 1}
        assert (found["voice"], found["chance_voice"]) == (pytest.approx(0.5), pytest.approx(0.5))

    def test_too_few_replies_cost_nothing(self, bundled):
        subject = make_subject(bundled[1], shouting(7))
        needed = "needs 8 replies by one person and 8 by others, but there are 7 and 7"
        assert measure(subject)["too_small"] == {"voice": needed, "chance_voice": needed}
        assert "only evaluate.py measures it" in measure(subject._replace(voices=[]))["too_small"]["voice"]

    def test_instruction_data_has_no_voices(self, bundled):
        turns = tuple(Turn(speaker, "Sum 1 and 2.") for speaker in ALPACA_SPEAKERS)
        subject = make_subject(bundled[1], [Dialogue(turns)] * 9, template="alpaca")
        assert subject.voices == []
        assert measure(subject) == Metrics().to_json()


class TestAttribution:
    @pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "alpaca"])
    def test_names_are_exchanged_in_the_whole_dialogue(self, template, bundled):
        """Three people: an example for each candidate, in which the speaker and the candidate swap names."""
        turns = tuple(Turn(name, f"I am number {n}.") for n, name in enumerate(["Ann", "Bob", "Carla", "Ann", "Bob"]))
        subject = make_subject(bundled[1], [Dialogue(turns)], template=template)
        renderer, scorer, reply = subject.conversations.renderer, stub(subject), Reply(0, 3)
        attribute(scorer, subject, {reply: text_tokens(subject.conversations, reply)})
        for example, name in zip(scorer.examples, ("Ann", "Bob", "Carla"), strict=True):
            names = {"Ann": name, name: "Ann"}
            swapped = Dialogue(tuple(Turn(names.get(each.speaker, each.speaker), each.text) for each in turns))
            tokens, texts = renderer.encode(swapped)
            assert example.tokens.tolist() == tokens[: texts[3][1]]
            assert np.flatnonzero(example.learned).tolist() == list(range(*texts[3]))

    @pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "alpaca"])
    def test_the_oldest_turns_are_dropped_if_the_dialogue_is_too_long(self, template, bundled):
        turns = tuple(Turn(("Ann", "Bob")[n % 2], f"I said the number {n}.") for n in range(20))
        subject = make_subject(bundled[1], [Dialogue(turns)], template=template, length=64)
        renderer, scorer = subject.conversations.renderer, stub(subject)
        attribute(scorer, subject, {reply: text_tokens(subject.conversations, reply) for reply in subject.voices})
        for (_, turn), example in zip(subject.voices, scorer.examples[::2], strict=True):
            text = renderer.tokenizer.decode(example.tokens.tolist())
            first = next(n for n in range(turn) if f"number {n}." in text)
            tokens, texts = renderer.encode(Dialogue(turns[first:]))
            assert example.tokens.tolist() == tokens[: texts[turn - first][1]]
            assert len(example.tokens) <= 65
            assert first == 0 or len(example.tokens) > 65 - 20

    def test_a_text_longer_than_the_context_is_cut(self, bundled):
        long = Dialogue((Turn("Ann", "word " * 90), Turn("Bob " * 40, "word " * 90)))
        subject, reply = make_subject(bundled[1], [long], length=16), Reply(0, 1)
        scorer = stub(subject)
        found = attribute(scorer, subject, {reply: text_tokens(subject.conversations, reply)})
        assert found.chances.tolist() == [0.5]
        assert [(len(tokens), learned.sum()) for tokens, learned in scorer.examples] == [(17, 8), (17, 8)]

    def test_speaker_tokens_of_an_untrained_model_are_tied(self, bundled):
        """All speaker tokens start from the same embedding, so the model is at chance exactly."""
        dialogues = [Dialogue(each.turns) for each in bundled_dialogues()]
        subject = make_subject(bundled[1], dialogues, template="tokens")
        tokenizer = subject.tokenizer
        model = load_model(BUNDLED)[0]
        add_embeddings(model, tokenizer.n_vocab)
        found = measure(subject, Scorer(model, CPU.autocast, tokenizer.eot_token), Decoder(model))
        assert found["voice_true"] == {"Alex": 0.5, "Bob": 0.5}
        assert (found["voice"], found["chance_voice"]) == (0.5, 0.5)

    def test_ties_are_shared(self):
        assert share_of_first(np.array([1.0, 2.0])) == 1
        assert share_of_first(np.array([2.0, 1.0])) == 0
        assert share_of_first(np.array([1.0, 1.0, 3.0])) == 0.5
        assert share_of_first(np.array([1.0, 1.0 + 1e-5, 1.0])) == pytest.approx(1 / 3)
        assert share_of_first(np.array([2.0, 1.0, 1.0])) == 0

    def test_at_most_five_candidates_are_compared(self, bundled):
        """The reply's own speaker first, then the most talkative others."""
        turns = [Turn(name, "Hm.") for name in "ABCDEFGGFFEEDD"]
        conversations = Conversations.of(Renderer(bundled[1]), [Dialogue(tuple(turns))])
        names = [conversations.speakers[each] for each in candidates_of(conversations, Reply(0, 1))]
        assert names[0] == "B"
        assert sorted(names[1:]) == ["D", "E", "F", "G"]


class TestChoosing:
    def test_replies_are_drawn_from_dialogues_with_two_speakers(self, bundled):
        alone = Dialogue((Turn("Ann", "Hm."), Turn("Ann", "Well.")))
        empty = Dialogue((Turn("Ann", "Hm."), Turn("Bob", ""), Turn("Ann", "So?")))
        for template in ("prompt", "labels"):
            conversations = Conversations.of(Renderer(bundled[1], template), [alone, *shouting(3), empty])
            chosen = choose_voices(conversations, np.array([0, 1, 3, 4]), 100, seed=1)
            assert chosen == [Reply(1, 1), Reply(1, 2), Reply(3, 1), Reply(3, 2), Reply(4, 2)]
            few = choose_voices(conversations, np.array([0, 1, 3, 4]), 3, seed=1)
            assert len(set(few)) == 3
            assert set(few) < set(chosen)
            assert few == choose_voices(conversations, np.array([0, 1, 3, 4]), 3, seed=1)


MEASURED = Metrics(
    voice=Estimate(0.7, [0.6, 0.8]),
    chance_voice=Estimate(0.5),
    voice_true={"Bob": Estimate(0.71, [0.6, 0.82]), "Bartholomew the Elder": Estimate(0.69)},
    voice_generated={"Bob": Estimate(0.85, [0.7, 0.9])},
)


class TestShowing:
    def test_metrics_survive_a_round_trip(self):
        assert Metrics.from_json(json.loads(json.dumps(MEASURED.to_json()))) == MEASURED
        few = Metrics(voice=TooFew("more"), chance_voice=TooFew("more"))
        assert Metrics.from_json(json.loads(json.dumps(few.to_json()))) == few

    def test_the_table_has_rows_for_each_person(self):
        base = replace(MEASURED, voice=Estimate(0.5, [0.4, 0.6]), voice_generated=None)
        table = short_table({"base": base, "model": MEASURED, "true_replies": Metrics(bleu=Estimate(1.0))})
        assert [re.split("  +", line) for line in table[2:]] == [
            ["Voice", "50% (40% to 60%)", "70% (60% to 80%)", "–"],
            ["Voice of Bob, true", "71% (60% to 82%)", "71% (60% to 82%)", "–"],
            ["Voice of Bob, generated", "–", "85% (70% to 90%)", "–"],
            ["Voice of Bartholomew…, true", "69% (by chance 50%)", "69% (by chance 50%)", "–"],
        ]
        (group,) = metric_groups({"base": base.to_json(), "model": MEASURED.to_json()})[0]
        assert [row.cells[1].below for row in group.rows][:2] == [["60% to 80%", "by chance 50%"]] + [
            ["60% to 82%", "by chance 50%"]
        ]
        assert "Bartholomew the Elder" in group.rows[3].metric.meaning

    def test_the_table_says_that_there_is_too_little(self):
        few = {"model": Metrics(loss=Estimate(1.0), voice=TooFew("more"), chance_voice=TooFew("more"))}
        assert short_table(few)[-1].split() == ["Voice", "too", "few"]

    def test_a_finding_compares_with_chance(self):
        assert about_voice(MEASURED) == [
            "the model attributes 70% [60%, 80%] of the true replies to the right speaker (chance is 50%),"
            " and 85% of the replies it writes as Bob to Bob"
        ]
        assert about_voice(replace(MEASURED, voice=Estimate(0.55, [0.45, 0.65]))) == [
            "there is no clear sign that the model tells the speakers apart: it attributes 55% [45%, 65%] of the true"
            " replies to the right speaker; chance is 50%"
        ]
        assert about_voice(Metrics(voice=TooFew("more"), chance_voice=TooFew("more"))) == []
