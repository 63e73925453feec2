"""Losses of tokens, of replies after other histories and of candidate replies equal those of transformers."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from conftest import CPU, bundled_dialogues, tiny_reference, write_layout
from dialogues.batches import DialogueDataset, Example
from dialogues.conversations import Conversations
from dialogues.dialogue import ALPACA_SPEAKERS, INSTRUCTION, Dialogue, Turn
from dialogues.template import TEMPLATES, Renderer
from dialogues.tokenizer import load_tokenizer
from evaluation import metrics
from evaluation.scoring import (
    HISTORIES,
    OTHERS,
    Reply,
    Scorer,
    choose_replies,
    make_candidates,
    make_histories,
    score_tokens,
)
from fast.loss import EVALUATED_ROWS
from gpt_model import GPTConfig, GPTModel
from load_gpt2_weights import load_model
from training.loop import evaluate

NAMES = (*HISTORIES, "other")
ANIMALS = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "jay", "koi", "owl", "pig", "rat", "seal", "wasp"]
COLOURS = ["red", "blue", "green", "black", "white", "pink", "grey", "brown", "gold", "teal"]


def score_candidates(scorer, conversations, replies, seed) -> list[np.ndarray]:
    """For each reply, the mean loss of its text's tokens, followed by those of the other candidates."""
    contexts, candidates = make_candidates(conversations, replies, scorer.model.config.n_positions, seed)
    return [np.array([part.mean() for part in parts]) for parts in scorer.continuation_losses(contexts, candidates, "")]


@pytest.fixture(scope="module")
def pair(vocabulary, tmp_path_factory) -> tuple[Scorer, GPT2LMHeadModel]:
    """A model with random weights and 128 positions, and the same model in transformers."""
    reference = tiny_reference(std=0.2)
    model = load_model(write_layout(reference, vocabulary, tmp_path_factory.mktemp("model"), "bare"))[0]
    return Scorer(model, CPU.autocast, 399), reference


@pytest.fixture(scope="module")
def tokenizer(vocabulary):
    return load_tokenizer(vocabulary)


def reference_losses(reference: GPT2LMHeadModel, tokens, learned) -> np.ndarray:
    """The loss of each learned token of one row in transformers, in fp32 and without padding."""
    ids = torch.as_tensor(tokens).long()
    with torch.inference_mode():
        log_probabilities = reference(ids[None, :-1]).logits[0].log_softmax(dim=-1)
    return -log_probabilities[torch.arange(len(ids) - 1), ids[1:]].numpy()[np.array(learned)[1:]]


def small_dialogue(number: int, turns: int, instruction: str = INSTRUCTION) -> Dialogue:
    """Three people who take turns, with texts that no other dialogue has; Carla opens the third dialogue."""
    said = [
        f"{ANIMALS[turn]} {COLOURS[number]}" + " and so on" * ((turn * 7 + number) % 4) + "." for turn in range(turns)
    ]
    speakers = itertools.cycle(("Carla", "Alex", "Bob") if number == 2 else ("Alex", "Bob", "Carla"))
    return Dialogue(tuple(map(Turn, speakers, said)), instruction)


def small_conversations(tokenizer, template: str = "prompt", instruction: str = INSTRUCTION, learn: str = "all"):
    """Dialogues of 7, 4 and 3 turns."""
    dialogues = [small_dialogue(number, turns, instruction) for number, turns in enumerate((7, 4, 3))]
    return dialogues, Conversations.of(Renderer(tokenizer, template), dialogues, learn)


class TestTokenLosses:
    def test_each_loss_equals_that_of_transformers(self, pair):
        """Rows of 2 to 129 tokens in several batches, learned in part, entirely or not at all."""
        scorer, reference = pair
        random = np.random.default_rng(1)
        lengths = [2, 129, 17, 18, 16, 128, 3, *random.integers(2, 130, 40).tolist()]
        rows = [Example(random.integers(400, size=size), random.random(size) < 0.5) for size in lengths]
        rows[5].learned[:] = True
        rows[8].learned[:] = False
        found = scorer.token_losses(rows, "test")
        for row, losses in zip(rows, found, strict=True):
            np.testing.assert_allclose(losses, reference_losses(reference, *row), atol=1e-4)
        assert len(found[5]) == 127  # all but the first token, which has no context
        assert len(found[8]) == 0

    @pytest.mark.parametrize("learn", ["all", "replies", "Bob"])
    def test_long_dialogues_count_every_learned_token_once(self, learn, pair, tokenizer):
        scorer, reference = pair
        long = Dialogue(tuple(turn for dialogue in bundled_dialogues() for turn in dialogue.turns))
        dialogues = [small_dialogue(0, 4), long, small_dialogue(1, 7), Dialogue(long.turns[5:20])]
        conversations = Conversations.of(Renderer(tokenizer), dialogues, learn)
        dataset = DialogueDataset(conversations, np.arange(4), 128)
        assert len(dataset) > 8
        assert dataset.shortened == 0
        places, nats = score_tokens(scorer, dataset, "test")
        expected = conversations.learned.copy()
        expected[conversations.starts[:-1]] = False  # nothing predicts the first token of a dialogue
        assert sorted(places.tolist()) == np.flatnonzero(expected).tolist()
        assert nats.sum() / len(nats) == pytest.approx(evaluate(scorer.model, dataset, 399, CPU), rel=1e-6)
        alone = np.concatenate([reference_losses(reference, *dataset[number]) for number in range(len(dataset))])
        np.testing.assert_allclose(nats, alone, atol=1e-4)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("learned", [0, 1, 15, 16, 17, EVALUATED_ROWS, EVALUATED_ROWS + 1, 3 * EVALUATED_ROWS - 5])
def test_unreduced_losses_add_up_to_the_loss(learned, gradients, pair):
    model, reference = pair[0].model, pair[1]
    generator = torch.Generator().manual_seed(learned)
    ids = torch.randint(400, (4, 101), generator=generator)
    targets = torch.full((400,), -100)
    chosen = torch.randperm(400, generator=generator)[:learned]
    targets[chosen] = ids[:, 1:].flatten()[chosen]
    with torch.set_grad_enabled(gradients):
        one_by_one = model(ids[:, :-1], targets.view(4, 100), reduction="none")
        summed = model(ids[:, :-1], targets.view(4, 100))
    rows = [reference_losses(reference, ids[row], np.ones(101, bool)) for row in range(4)]
    expected = np.concatenate(rows)[(targets != -100).numpy()]
    assert one_by_one.shape == (400,)
    assert not one_by_one[targets == -100].any()
    one_by_one = one_by_one[targets != -100]
    assert one_by_one.requires_grad == summed.requires_grad == gradients
    np.testing.assert_allclose(one_by_one.detach(), expected, atol=1e-4)
    assert summed.item() == pytest.approx(expected.sum(), rel=1e-5, abs=1e-6)


class TestContinuations:
    def check(self, pair, contexts, continuations):
        scorer, reference = pair
        found = scorer.continuation_losses(contexts, continuations, "test")
        for context, branches, parts in zip(contexts, continuations, found, strict=True):
            for branch, part in zip(branches, parts, strict=True):
                learned = np.arange(len(context) + len(branch)) >= len(context)
                np.testing.assert_allclose(part, reference_losses(reference, context + branch, learned), atol=1e-4)

    def test_each_continuation_has_the_same_loss_as_alone(self, pair):
        """Contexts of 1 to 100 tokens, each with 1 to 20 continuations of 1 to 29 tokens."""
        random = np.random.default_rng(2)
        draw = lambda size: random.integers(400, size=size).tolist()  # noqa: E731
        contexts = [draw(size) for size in (1, 2, 17, 100, 60, 61, 33, *random.integers(1, 100, 30))]
        counts = [1, 20, 3, 5, 1, *random.integers(1, 8, 32)]
        continuations = [[draw(size) for size in random.integers(1, 30, count)] for count in counts]
        self.check(pair, contexts, continuations)

    def test_continuations_reach_the_last_position(self, pair):
        """They may exceed the positions by one token, which is only predicted. Long and short ones share a batch."""
        random = np.random.default_rng(3)
        contexts = [random.integers(400, size=size).tolist() for size in (1, 5, 64, 65, 100, 120, 128)]
        continuations = [
            [random.integers(400, size=size).tolist() for size in (129 - len(context), 1)] for context in contexts
        ]
        self.check(pair, contexts, continuations)

    def test_a_context_may_have_one_token(self, pair):
        self.check(pair, [[7], [8]], [[[1, 2, 3], [4]], [[5]]])

    def test_a_continuation_beyond_the_positions_is_refused(self, pair):
        with pytest.raises(AssertionError):
            pair[0].continuation_losses([[1] * 100], [[[2] * 30]], "test")


def shortened(renderer: Renderer, turns, turn: int, first: int, instruction: str) -> tuple[list[int], int]:
    """The tokens of a dialogue from its turn `first` to the end of `turn`, and the start index of that turn's text."""
    tokens, texts = renderer.encode(Dialogue(tuple(turns[first : turn + 2]), instruction))
    start = texts[turn - first][0]
    if turn + 1 < len(turns):
        tokens = tokens[: texts[turn - first + 1][0] - len(renderer.label(turns[turn + 1].speaker))]
    return tokens, start


@pytest.mark.parametrize("instruction", [INSTRUCTION, ""])
@pytest.mark.parametrize("template", TEMPLATES)
class TestHistories:
    def test_a_reply_and_its_history_are_rendered_as_a_shorter_dialogue(self, template, instruction, tokenizer):
        dialogues, conversations = small_conversations(tokenizer, template, instruction)
        replies = [Reply(number, turn) for number in range(3) for turn in range(1, len(dialogues[number].turns))]
        examples, places = make_histories(conversations, replies, 10_000, seed=4)
        assert list(places) == list(NAMES)
        for name, recent in HISTORIES.items():
            for (number, turn), place in zip(replies, places[name], strict=True):
                first = 0 if recent is None else max(0, turn - recent)
                turns = dialogues[number].turns
                tokens, start = shortened(conversations.renderer, turns, turn, first, instruction)
                example = examples[place]
                assert example.tokens.tolist() == tokens
                assert np.flatnonzero(example.learned).tolist() == list(range(start, len(tokens)))
        assert len({tuple(tokens.tolist()) for tokens, _ in examples}) == len(examples), "no example is computed twice"

    def test_another_dialogues_history_has_the_labels_of_the_reply(self, template, instruction, tokenizer):
        dialogues, conversations = small_conversations(tokenizer, template, instruction)
        replies = [Reply(number, turn) for number in range(3) for turn in range(1, len(dialogues[number].turns))]
        examples, places = make_histories(conversations, replies, 10_000, seed=4)
        others: dict[int, set[int]] = {0: set(), 1: set(), 2: set()}
        for (number, turn), place in zip(replies, places["other"], strict=True):
            own = dialogues[number].turns
            for other in range(3):
                texts = [text for _, text in dialogues[other].turns[:-1]][
                    :turn
                ]  # a dialogue's last turn is not used as a beginning
                said = [Turn(speaker, text) for (speaker, _), text in zip(own, texts, strict=False)]
                turns = [*said, *own[turn:]]
                tokens, start = shortened(conversations.renderer, turns, len(said), 0, instruction)
                if examples[place].tokens.tolist() == tokens:
                    assert np.flatnonzero(examples[place].learned).tolist() == list(range(start, len(tokens)))
                    others[number].add(other)
        assert all(len(found) == 1 for found in others.values()), "all replies of a dialogue share one other dialogue"
        assert all(number not in found for number, found in others.items())
        assert len(set.union(*others.values())) == 3, "each dialogue is used once"

    def test_a_reply_after_its_whole_history_is_the_same_as_in_training(self, template, instruction, tokenizer):
        _, conversations = small_conversations(tokenizer, template, instruction)
        trained = small_conversations(tokenizer, template, instruction, learn="Bob")[1]
        replies = [Reply(0, 1), Reply(0, 4), Reply(1, 1), Reply(2, 2)]  # all turns of Bob
        examples, places = make_histories(conversations, replies, 10_000, seed=4)
        learned = []
        for (number, _), place in zip(replies, places["all"], strict=True):
            tokens, chosen = examples[place]
            assert tokens.tolist() == trained.tokens_of(number)[: len(tokens)].tolist()
            learned += (trained.starts[number] + np.flatnonzero(chosen)).tolist()
        assert learned == np.flatnonzero(trained.learned).tolist()

    def test_a_history_that_does_not_fit_loses_its_oldest_turns(self, template, instruction, tokenizer):
        dialogues, conversations = small_conversations(tokenizer, template, instruction)
        turns = dialogues[0].turns
        full = len(shortened(conversations.renderer, turns, 6, 0, instruction)[0])
        kept = set()
        for positions in range(full + 5, len(shortened(conversations.renderer, turns, 6, 6, instruction)[0]), -1):
            examples, places = make_histories(conversations, [Reply(0, 6)], positions, seed=4)
            text = len(examples[places["all"][0]].tokens[examples[places["all"][0]].learned])
            if text >= positions // 2:  # the reply itself is cut: see the next test
                continue
            rows = (shortened(conversations.renderer, turns, 6, first, instruction)[0] for first in range(7))
            first, expected = next((n, row) for n, row in enumerate(rows) if len(row) <= positions + 1)
            assert examples[places["all"][0]].tokens.tolist() == expected
            kept.add(first)
        assert len(kept) > 3
        assert 0 in kept


def test_a_reply_longer_than_half_the_positions_loses_its_end(tokenizer):
    dialogue = Dialogue((Turn("Alex", "Hm?"), Turn("Bob", "no " * 100)))
    conversations = Conversations.of(Renderer(tokenizer), [dialogue])
    examples, places = make_histories(conversations, [Reply(0, 1)], 64, seed=0)
    (start, _, _) = conversations.texts_of(0)[1].tolist()
    for place in places["all"] + places["none"]:
        tokens, learned = examples[place]
        assert len(tokens) <= 65
        assert tokens[learned].tolist() == conversations.tokens_of(0)[start : start + 32].tolist()


def test_the_summed_losses_equal_those_of_transformers(pair, tokenizer):
    scorer, reference = pair
    dialogues, conversations = small_conversations(tokenizer)
    replies = [Reply(0, 3), Reply(0, 2)]
    histories = make_histories(conversations, replies, 128, seed=0)
    sums = histories.sums(scorer.token_losses(histories.examples, "test"))
    assert set(sums) == {*NAMES, "tokens"}
    for name, recent in HISTORIES.items():
        for place, (_, turn) in enumerate(replies):
            first = 0 if recent is None else max(0, turn - recent)
            tokens, start = shortened(conversations.renderer, dialogues[0].turns, turn, first, INSTRUCTION)
            expected = reference_losses(reference, tokens, np.arange(len(tokens)) >= start)
            assert sums[name][place] == pytest.approx(expected.sum(), abs=1e-3)
            assert sums["tokens"][place] == len(tokens) - start
    assert (
        len({round(float(sums[name][0]), 3) for name in ("none", "1", "2", "all")}) == 4
    )  # the histories make a difference
    assert sums["4"].tolist() == sums["all"].tolist()
    assert sums["other"].tolist() == sums["all"].tolist()  # a single dialogue is paired with itself


class Recorder:
    """A scorer that only records its arguments."""

    def __init__(self, positions: int) -> None:
        self.model = SimpleNamespace(config=SimpleNamespace(n_positions=positions))

    def continuation_losses(self, contexts, continuations, what):
        self.contexts, self.continuations = contexts, continuations
        return [[np.arange(len(branch)) + float(place) for place, branch in enumerate(each)] for each in continuations]


class TestCandidates:
    @pytest.fixture
    def conversations(self, tokenizer) -> Conversations:
        """30 dialogues that often repeat "Yes." and "No."."""
        random = np.random.default_rng(5)
        said = ["Yes.", "No.", *(f"The {animal} is {colour}." for animal in ANIMALS[:8] for colour in COLOURS[:4])]
        texts = random.choice(said, (30, 4), p=[0.3, 0.3] + [0.4 / 32] * 32)
        speakers = ("Alex", "Bob", "Alex", "Bob")
        return Conversations.of(
            Renderer(tokenizer), [Dialogue(tuple(map(Turn, speakers, map(str, row)))) for row in texts]
        )

    def texts(self, conversations: Conversations, replies: list[Reply]) -> list[tuple[int, ...]]:
        dialogues = [conversations[dialogue].turns[turn] for dialogue, turn in replies]
        return [tuple(conversations.renderer.tokenizer.encode_ordinary(turn.text)) for turn in dialogues]

    @pytest.mark.parametrize("dialogues", [4, 30])
    def test_the_true_reply_comes_first_and_candidates_are_distinct(self, dialogues, conversations):
        replies = [Reply(dialogue, turn) for dialogue in range(dialogues) for turn in (1, 2, 3)]
        texts, recorder = self.texts(conversations, replies), Recorder(1024)
        losses = score_candidates(recorder, conversations, replies, 6)
        for (dialogue, turn), true, context, branches, means in zip(
            replies, texts, recorder.contexts, recorder.continuations, losses, strict=True
        ):
            found = list(map(tuple, branches))
            elsewhere = {text for text, reply in zip(texts, replies, strict=True) if reply.dialogue != dialogue}
            assert found[0] == true
            assert len(set(found)) == len(found)
            assert set(found[1:]) <= elsewhere - {true}
            assert len(found) - 1 == min(OTHERS, len(elsewhere - {true}))
            assert context == conversations.renderer.encode_prompt(conversations[dialogue], turn)
            expected = [place + (len(text) - 1) / 2 for place, text in enumerate(found)]
            assert means.tolist() == pytest.approx(expected)  # the mean over each text's tokens
        assert (max(map(len, losses)) == 1 + OTHERS) == (dialogues == 30)

    def test_the_seed_determines_the_candidates(self, conversations):
        replies, chosen = [Reply(dialogue, turn) for dialogue in range(30) for turn in (1, 2)], []
        for seed in (6, 6, 7):
            recorder = Recorder(1024)
            score_candidates(recorder, conversations, replies, seed)
            chosen.append(recorder.continuations)
        assert chosen[0] == chosen[1] != chosen[2]

    def test_contexts_and_texts_are_cut_to_fit_few_positions(self, pair, tokenizer):
        """This also holds for an odd number of positions."""
        random = np.random.default_rng(8)
        dialogues = [
            Dialogue(
                tuple(
                    Turn("Alex" if size == 2 else "Bob", " ".join(random.choice(ANIMALS, size))) for size in (2, 40, 2)
                ),
                "",
            )
            for _ in range(6)
        ]
        for template in TEMPLATES:  # if a label is one token, it may be the whole context
            conversations = Conversations.of(Renderer(tokenizer, template), dialogues)
            torch.manual_seed(0)
            model = GPTModel(GPTConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=410, n_positions=41))
            replies = [Reply(number, turn) for number in range(6) for turn in (1, 2)]
            losses = score_candidates(Scorer(model, CPU.autocast, 399), conversations, replies, 0)
            assert [len(each) for each in losses] == [11] * 12
            assert np.isfinite(losses).all()

    def test_an_untrained_model_ranks_at_chance_level(self, conversations, tokenizer):
        """The replies are unrelated to their context, so every rank is equally likely."""
        random = np.random.default_rng(9)
        dialogues = [
            Dialogue(tuple(Turn(name, " ".join(random.choice(ANIMALS, 4))) for name in ("Alex", "Bob")))
            for _ in range(150)
        ]
        conversations = Conversations.of(Renderer(tokenizer), dialogues)
        torch.manual_seed(0)
        model = GPTModel(GPTConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=400, n_positions=128))
        replies = choose_replies(conversations, np.arange(150), 150, 0)
        losses = score_candidates(Scorer(model, CPU.autocast, 399), conversations, replies, 0)
        ranks = metrics.ranks(losses)
        assert {len(each) for each in losses} == {20}
        assert (ranks == 1).mean() < 0.05 + 5 * (0.05 * 0.95 / 150) ** 0.5
        assert ranks.mean() == pytest.approx(10.5, abs=5 * 5.77 / 150**0.5)  # 5.77: standard deviation of 20 ranks


class TestChooseReplies:
    def test_all_replies_of_few_dialogues_or_one_of_each_of_many_are_chosen(self, tokenizer):
        _, conversations = small_conversations(tokenizer)
        everything = [(0, turn) for turn in range(1, 7)] + [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2)]
        assert choose_replies(conversations, np.arange(3), 100, 0) == everything
        for most, each in ((9, 3), (6, 2), (4, 1), (3, 1)):
            found = choose_replies(conversations, np.arange(3), most, 0)
            turns = [sum(dialogue == number for dialogue, _ in found) for number in range(3)]
            assert turns == [each, each, min(each, 2)]
            assert set(found) <= set(everything)
            assert found == sorted(set(found))
        found = choose_replies(conversations, np.array([0, 2]), 100, 0)
        assert {dialogue for dialogue, _ in found} == {0, 2}

    def test_more_dialogues_than_replies_are_sampled_by_seed(self, tokenizer):
        conversations = Conversations.of(Renderer(tokenizer), [small_dialogue(n % 10, 5) for n in range(40)])
        chosen = [choose_replies(conversations, np.arange(40), 12, seed) for seed in (0, 0, 1)]
        assert chosen[0] == chosen[1] != chosen[2]
        assert len({dialogue for dialogue, _ in chosen[0]}) == len(chosen[0]) == 12
        assert (
            len({turn for seed in range(4) for _, turn in choose_replies(conversations, np.arange(40), 12, seed)}) == 4
        )

    def test_only_learned_replies_are_chosen(self, tokenizer):
        _, conversations = small_conversations(tokenizer, learn="Bob")
        assert choose_replies(conversations, np.arange(3), 100, 0) == [(0, 1), (0, 4), (1, 1), (2, 2)]
        _, conversations = small_conversations(tokenizer, learn="Alex")  # Alex's opening turns answer nothing
        assert choose_replies(conversations, np.arange(3), 100, 0) == [(0, 3), (0, 6), (1, 3), (2, 1)]
        _, conversations = small_conversations(tokenizer, learn="replies")
        assert len(choose_replies(conversations, np.arange(3), 100, 0)) == 11

    def test_the_reply_in_instruction_data_is_the_response(self, tokenizer):
        asked, given, response = ALPACA_SPEAKERS
        dialogues = [
            Dialogue((Turn(asked, "Spell it."), Turn(given, "freind"), Turn(response, "friend"))),
            Dialogue((Turn(asked, "Sing."), Turn(response, "La."))),
        ]
        conversations = Conversations.of(Renderer(tokenizer, "alpaca"), dialogues)
        assert choose_replies(conversations, np.arange(2), 100, 0) == [(0, 2), (1, 1)]

    @pytest.mark.parametrize("template", TEMPLATES)
    def test_an_empty_turn_is_not_a_reply(self, template, tokenizer):
        silent = Dialogue((Turn("Alex", "Well?"), Turn("Bob", "")))
        dialogues = [silent, Dialogue((*silent.turns, Turn("Alex", "Hm.")))]
        conversations = Conversations.of(Renderer(tokenizer, template), dialogues)
        assert choose_replies(conversations, np.arange(2), 100, 0) == [(1, 2)]
