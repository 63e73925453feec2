"""Each metric against a manual calculation, a slow and simple one, or its original implementation."""

import itertools
import math
import statistics
import unicodedata
from statistics import NormalDist

import numpy as np
import pytest
import sacrebleu
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2LMHeadModel

from conftest import CPU, bundled_dialogues
from dialogues.batches import DialogueDataset
from dialogues.conversations import Conversations
from dialogues.dialogue import Dialogue, Turn
from dialogues.template import Renderer
from evaluation import metrics
from evaluation.findings import excludes
from evaluation.likelihood import Subject, Sums, context_use, measure_likelihood
from evaluation.metrics import COPIED_WORDS, Copied
from evaluation.scoring import Reply, Scorer, choose_replies, make_histories
from gpt_model import GPTModel
from hub.find import BUNDLED
from load_gpt2_weights import load_model
from settings import GenerationSettings
from support.files import Json
from training.loop import evaluate


def interval_of(estimate: metrics.Estimate | None) -> list[float]:
    assert estimate
    assert estimate.interval
    return estimate.interval


def tail(dialogues: int) -> float:
    """The share outside each end of the interval: under 2.5% for few dialogues (Hesterberg 2015); t is from tables."""
    t = {3: 4.3027, 4: 3.1824, 5: 2.7764, 10: 2.2622}[dialogues]
    return NormalDist().cdf(-math.sqrt(dialogues / (dialogues - 1)) * t)


class TestRatio:
    def test_the_value_is_a_ratio_of_sums(self):
        """The value is not the mean of the dialogues' means, 1.5."""
        assert metrics.ratio(np.array([1.0, 20.0]), np.array([1.0, 10.0]), seed=0).value == 21 / 11

    @pytest.mark.parametrize("dialogues", [3, 4, 7])
    def test_few_dialogues_get_students_interval(self, dialogues):
        """If all dialogues are equally long, this is the interval of a mean, with t from tables."""
        t = {3: 4.3027, 4: 3.1824, 7: 2.4469}[dialogues]
        losses = np.random.default_rng(dialogues).uniform(10, 90, dialogues)
        value, interval = metrics.ratio(losses, np.full(dialogues, 10.0), seed=1)
        mean, error = statistics.fmean(losses / 10), statistics.stdev(losses / 10) / math.sqrt(dialogues)
        assert value == pytest.approx(mean)
        assert interval == pytest.approx([mean - t * error, mean + t * error], rel=1e-3)

    def test_the_interval_of_a_share_stays_between_0_and_1(self):
        assert interval_of(
            metrics.ratio(np.array([0, 0, 3.0]), np.array([3.0, 3, 3]), seed=0, bounds=metrics.SHARE)
        ) == [0, 1]

    @pytest.mark.parametrize(("size", "least"), [(3, 0.92), (5, 0.92), (10, 0.92), (30, 0.92)])
    def test_intervals_have_their_nominal_coverage(self, size, least):
        """For 400 samples of a normal distribution. For ten dialogues, the plain middle 95% would contain it in 89%."""
        random = np.random.default_rng(size)
        samples = random.normal(1, 1, (400, size))
        intervals = [interval_of(metrics.ratio(sample, np.ones(size), seed=7, resamples=300)) for sample in samples]
        assert np.mean([low <= 1 <= high for low, high in intervals]) >= least

    def test_the_interval_of_many_dialogues_equals_the_normal_one(self):
        """For 500 dialogues, with the variance of a ratio of means (Cochran 1977, "Sampling Techniques", 2.11)."""
        random = np.random.default_rng(2)
        tokens = random.integers(5, 80, 500).astype(float)
        losses = tokens * random.normal(3, 0.5, 500)
        value, interval = metrics.ratio(losses, tokens, seed=3, resamples=8000)
        error = np.sqrt(((losses - value * tokens) ** 2).sum()) / tokens.sum()
        assert interval == pytest.approx([value - 1.96 * error, value + 1.96 * error], abs=0.15 * error)

    def test_fewer_than_three_dialogues_have_no_interval(self):
        for size, has in ((1, False), (2, False), (3, True)):
            assert (metrics.ratio(np.ones(size), np.ones(size), seed=0).interval is not None) == has

    def test_the_seed_determines_the_interval(self):
        numbers = np.random.default_rng(4).uniform(1, 5, 20)
        found = [metrics.ratio(numbers, np.ones(20), seed).interval for seed in (5, 5, 6)]
        assert found[0] == found[1] != found[2]

    def test_resamples_with_a_zero_denominator_do_not_count(self):
        """One resample in three has only dialogues with a denominator of 0: 0/0 is neither 0 nor large."""
        found = metrics.ratio(np.array([0, 0, 0, 4.0]), np.array([0, 0, 0, 2.0]), seed=0)
        assert found == (2, [2, 2])
        above, below = np.array([1, 0, 0, 0, 0, 0, 0, 4.0]), np.array([0, 0, 0, 0, 0, 0, 0, 2.0])
        low, high = interval_of(metrics.ratio(above, below, seed=0))
        assert 2 <= low < high <= 6  # k draws of the first and m of the last: 2 + k / (2 * m)

    def test_the_tokens_of_a_dialogue_stay_together(self):
        """20 dialogues of 50 tokens with almost equal losses are 20 independent samples, not 1000."""
        random = np.random.default_rng(7)
        dialogues = np.repeat(np.arange(20), 50)
        losses = random.normal(3, 1, 20)[dialogues] + random.normal(0, 0.01, 1000)
        order = random.permutation(1000)  # the order of the tokens does not matter
        together = Sums(dialogues[order] + 300, 0).ratio(losses[order], np.ones(1000))
        apart = metrics.ratio(losses, np.ones(1000), 0)
        assert together.value == pytest.approx(apart.value)
        assert np.ptp(interval_of(together)) > 4 * np.ptp(interval_of(apart))
        whole = metrics.ratio(np.bincount(dialogues, losses), np.full(20, 50.0), 0)
        assert interval_of(together) == pytest.approx(interval_of(whole))

    def test_a_selection_drops_only_dialogues_without_selected_items(self):
        """A dialogue without selected items is not resampled; one whose denominator is 0 is."""
        sums = Sums(np.array([0, 0, 1, 2]), 0)
        found = sums.ratio(np.array([1.0, 2, 3, 4]), np.array([1.0, 1, 0, 1]), np.array([True, False, True, False]))
        assert found == (4, None)  # (1 + 3) / (1 + 0)

    def test_map_changes_the_value_and_the_interval(self):
        estimate = metrics.Estimate(0.0, [-1.0, 1.0]).map(math.exp)
        assert estimate == (1, [math.exp(-1), math.e])
        assert metrics.Estimate(1.0, None).map(math.exp) == (math.e, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't! Stop, O’Neill's dog-house…", ["don't", "stop", "o'neill's", "dog", "house"]),
        ("Über 3,5 Äpfel", ["über", "3", "5", "äpfel"]),
        (unicodedata.normalize("NFD", "Für Ändré"), ["für", "ändré"]),
        ("'quoted' snake_case", ["quoted", "snake", "case"]),
        ("我们走吧。", ["我", "们", "走", "吧"]),
        ("今日はTokyoへ", ["今", "日", "は", "tokyo", "へ"]),
        ("สวัสดี", list("สวัสดี")),
        ("안녕하세요 여러분", ["안녕하세요", "여러분"]),
        ("हिन्दी में बात।", ["हिन्दी", "में", "बात"]),
        ("שָׁלוֹם עולם", ["שָׁלוֹם", "עולם"]),
        ("مَرحَبًا", ["مَرحَبًا"]),
        ("Привет, ёж", ["привет", "ёж"]),
        ("😀 👍🏽 ❤️ 👩‍👩‍👧", []),
        (" … — !", []),
        ("", []),
    ],
)
def test_a_text_is_split_into_words_in_any_script(text, expected):
    same = [unicodedata.normalize("NFC", word) for word in expected]
    assert metrics.words(text) == same


def test_a_rank_counts_the_candidates_that_are_at_least_as_likely():
    """Rank 1 if likeliest, 3 after two likelier ones, last if all are equal, 1 without others."""
    losses = [[1.0, 2, 3], [3.0, 1, 2, 4], [2.0, 2, 2, 2], [2.0, 2, 1], [5.0]]
    assert metrics.ranks(map(np.array, losses)).tolist() == [1, 3, 4, 3, 1]


def test_a_nan_loss_counts_against_the_true_reply():
    losses = [[math.nan, 1, 2], [math.nan] * 3, [1.0, math.nan, 2]]
    assert metrics.ranks(map(np.array, losses)).tolist() == [3, 3, 2]
    assert not excludes(0, metrics.Estimate(math.nan, [math.nan, math.nan]))


class TestDiversity:
    def test_distinct_divides_distinct_ngrams_by_all_ngrams(self):
        replies = [["a", "b", "a"], ["b"], []]
        assert metrics.distinct(replies, 1) == 2 / 4
        assert metrics.distinct(replies, 2) == 2 / 2  # (a b) and (b a); no 2-gram spans two replies
        assert metrics.distinct([["a", "b"], ["a", "b"]], 2) == 1 / 2
        assert metrics.distinct([["a"], ["b"]], 2) is None
        assert metrics.distinct([], 1) is None

    def test_repetition_counts_4_grams_that_occurred_before(self):
        assert metrics.repetition(["a", "b", "c", "d"]) == (0, 1)
        assert metrics.repetition(["a", "b", "c", "d", "a", "b", "c", "d"]) == (1, 5)
        assert metrics.repetition(["no", "no", "no", "no", "no", "no"]) == (2, 3)
        assert metrics.repetition(["a", "b", "c"]) == (0, 0)


class TestLikeness:
    def test_bleu_and_chrf_equal_sacrebleus(self):
        random = np.random.default_rng(9)
        true = [" ".join(random.choice(list("abcdefgh"), 12)) for _ in range(30)]
        replies = [" ".join(word if random.random() < 0.7 else "x" for word in text.split()) for text in true]
        estimates, signatures = metrics.likeness(replies, true, seed=10)
        for name, score in (("bleu", sacrebleu.corpus_bleu), ("chrf", sacrebleu.corpus_chrf)):
            value, (low, high) = estimates[name].value, interval_of(estimates[name])
            assert value == score(replies, [true]).score
            assert low < value < high
            # A plain bootstrap of replies with their references, one resample at a time.
            draws = [random.integers(30, size=30) for _ in range(300)]
            scores = [score([replies[n] for n in draw], [[true[n] for n in draw]]).score for draw in draws]
            assert high - low == pytest.approx(np.ptp(np.quantile(scores, [0.025, 0.975])), rel=0.25)
            assert f"version:{sacrebleu.__version__}" in signatures[name]
        assert metrics.likeness(replies, true, seed=10)[0] == estimates
        assert metrics.likeness(replies, true, seed=11)[0] != estimates

    def test_two_replies_have_no_interval(self):
        estimates, _ = metrics.likeness(["a b c d", "e"], ["a b c d", "f"], seed=0)
        assert all(estimate.interval is None for estimate in estimates.values())


# Concatenated pieces of one alphabet: such texts share runs of many lengths, some of them adjacent.
piece = st.tuples(st.integers(0, 6), st.integers(4, 9)).map(
    lambda piece: list("abcdefghijklmno"[piece[0] :][: piece[1]])
)
said = st.lists(piece, max_size=3).map(lambda pieces: list(itertools.chain(*pieces)))
punctuated = st.tuples(said, st.lists(st.sampled_from([" ", ", ", "! ", "\n"]), min_size=27, max_size=27))


def write(text: tuple[list[str], list[str]]) -> str:
    words, gaps = text
    return "".join(itertools.chain(*zip([word.upper() if word == "b" else word for word in words], gaps, strict=False)))


class TestCopies:
    @settings(max_examples=200, deadline=None)
    @given(texts=st.lists(punctuated, max_size=3), training=st.lists(st.lists(said, max_size=3), max_size=3))
    def test_copies_equal_those_of_an_exhaustive_search(self, texts, training):
        found = metrics.find_copies(list(map(write, texts)), [[" ".join(turn) for turn in each] for each in training])
        for (words, _), copied, text in zip(texts, found, map(write, texts), strict=True):
            turns = [(number, turn) for number, turns in enumerate(training, 1) for turn in turns]

            def holders(run, turns=turns):
                n = len(run)
                return [d for d, turn in turns if any(turn[at : at + n] == run for at in range(len(turn) - n + 1))]

            runs = [
                (start, end)
                for start in range(len(words))
                for end in range(start + COPIED_WORDS, len(words) + 1)
                if holders(words[start:end])
            ]
            fives = [start for start, end in runs if end - start == COPIED_WORDS]
            covered = {place for start in fives for place in range(start, start + COPIED_WORDS)}
            places = [place for place, letter in enumerate(text) if letter.isalpha()]  # each word is a letter
            marked = [place for place, at in enumerate(places) if any(a <= at < b for a, b in copied.marks)]
            assert copied.ngrams == max(0, len(words) - COPIED_WORDS + 1)
            assert copied.copied == len(fives)
            assert set(marked) == covered
            # Adjacent runs that don't overlap stay separate.
            assert len(copied.marks) == sum(not {start - n for n in range(1, 5)} & set(fives) for start in fives)
            assert all(text[a].isalpha() and text[b - 1].isalpha() for a, b in copied.marks)
            longest = max((end - start for start, end in runs), default=0)
            assert (copied.longest is not None) == bool(longest)
            if copied.longest:
                start, end, size, dialogue = copied.longest
                run = metrics.words(text[start:end])
                assert size == len(run) == longest
                same = [holders(words[start:end]) for start, end in runs if end - start == longest]
                assert dialogue in holders(run)
                assert dialogue == min(itertools.chain(*same))

    def test_a_copy_does_not_span_two_turns(self):
        text = ["one two three four five"]
        assert metrics.find_copies(text, [["one two three", "four five"], ["four five one two three"]])[0].copied == 0
        assert metrics.find_copies(text, [["zero one two three four five six"]])[0] == Copied(
            1, 1, [(0, 23)], metrics.Span(0, 23, 5, 1)
        )

    def test_case_and_punctuation_do_not_matter(self):
        text = "Well — I DON’T know, what to say?!"
        (found,) = metrics.find_copies([text], [["Hm."], ["No", "i don't know what... to say"]])
        assert found.copied == 2
        assert [text[a:b] for a, b in found.marks] == ["I DON’T know, what to say"]
        assert found.longest == (7, 32, 6, 2)

    def test_two_runs_separated_by_a_word_are_marked_separately(self):
        text = "a b c d e X f g h i j"
        (found,) = metrics.find_copies([text], [["f g h i j"], ["a b c d e"]])
        assert [text[a:b] for a, b in found.marks] == ["a b c d e", "f g h i j"]
        assert found.longest == (12, 21, 5, 1)  # the first in the training dialogues, if several are equally long

    def test_copies_are_found_in_chinese(self):
        (found,) = metrics.find_copies(["他说我们明天走。"], [["我们明天走吧"]])
        assert (found.ngrams, found.copied, found.marks) == (3, 1, [(2, 7)])


@pytest.fixture(scope="module")
def bundled():
    model, tokenizer = load_model(BUNDLED)
    return model.eval(), Conversations.of(Renderer(tokenizer), bundled_dialogues())


def make_subject(conversations: Conversations, numbers, replies: list[Reply] | None = None, max_length=512) -> Subject:
    numbers = np.array(list(numbers))
    parts = {"train": np.setdiff1d(np.arange(len(conversations)), numbers), "val": numbers}
    datasets = {name: DialogueDataset(conversations, part, max_length) for name, part in parts.items() if len(part)}
    return Subject(
        conversations=conversations,
        datasets=datasets,
        part="val",
        replies=choose_replies(conversations, numbers, 100, 0) if replies is None else replies,
        voices=[],
        answered=[],
        training=None,
        generation=GenerationSettings(),
        reply_tokens=64,
        seed=0,
        autocast=CPU.autocast,
    )


def measure(model: GPTModel, subject: Subject) -> Json:
    return measure_likelihood(Scorer(model, CPU.autocast, subject.tokenizer.eot_token), subject)[0].to_json()


def bootstrap(above: list[float], below: list[float]) -> list[float]:
    random, samples = np.random.default_rng(99), []
    for _ in range(4000):
        drawn = random.integers(len(above), size=len(above)).tolist()
        samples.append(sum(above[n] for n in drawn) / sum(below[n] for n in drawn))
    return np.quantile(samples, [tail(len(above)), 1 - tail(len(above))]).tolist()


class TestLikelihood:
    def test_the_loss_equals_that_of_the_training_loop(self, bundled):
        model, conversations = bundled
        subject = make_subject(conversations, [7, 8, 9])
        found = measure(model, subject)
        for name, dataset in subject.datasets.items():
            expected = evaluate(model, dataset, subject.tokenizer.eot_token, CPU)
            assert found["loss_by_part"][name]["loss"] == pytest.approx(expected, rel=1e-6)
        assert found["loss"] == found["loss_by_part"]["val"]["loss"]
        assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
        assert found["intervals"]["perplexity"] == pytest.approx(np.exp(found["intervals"]["loss"]).tolist())
        assert found["hits_at_1"] is found["chance_hits_at_1"] is None
        assert found["too_small"]["hits_at_1"] == "needs 9 other replies, but there are 4"
        assert set(found["loss_by_part"]["val"]["intervals"]) == {"loss", "perplexity", "bits_per_byte"}

    @pytest.mark.parametrize("learn", ["all", "Bob"])
    def test_bits_per_byte_equal_those_of_transformers(self, learn, bundled):
        """A dialogue's first token has no loss, so its bytes do not count. Bob's texts include their stop."""
        model, _ = bundled
        reference, dialogues = GPT2LMHeadModel.from_pretrained(BUNDLED, dtype=torch.float32), bundled_dialogues()
        dialogues[0] = Dialogue((Turn("Alex", "Größe?"), Turn("Bob", "Übergröße 🙂, 大")))  # letters of several bytes
        conversations = Conversations.of(Renderer(bundled[1].renderer.tokenizer), dialogues, learn)
        found = measure(model, make_subject(conversations, range(10)))
        bits, sizes = [], []
        for number, dialogue in enumerate(dialogues):
            ids = torch.tensor(conversations.tokens_of(number).astype(np.int64))
            with torch.inference_mode():
                log_probabilities = reference(ids[None]).logits[0, :-1].log_softmax(dim=-1)
            learned = torch.from_numpy(conversations.learned[conversations.starts[number] :][: len(ids)])[1:]
            nats = -log_probabilities[torch.arange(len(ids) - 1), ids[1:]][learned]
            bits.append(nats.sum().item() / math.log(2))
            if learn == "all":
                text = conversations.render(number).removesuffix("<|endoftext|>").removeprefix("The")
                sizes.append(len(text.encode()))
            else:
                stops = ["\n\n###"] * (len(dialogue.turns) - 1) + [""]  # the end-of-text token has no bytes
                turns = zip(dialogue.turns, stops, strict=True)
                sizes.append(sum(len((text + stop).encode()) for (name, text), stop in turns if name == "Bob"))
        assert found["bits_per_byte"] == pytest.approx(sum(bits) / sum(sizes), rel=1e-5)
        assert found["intervals"]["bits_per_byte"] == pytest.approx(bootstrap(bits, sizes), rel=0.02)

    def test_the_losses_by_speaker_and_by_turn_add_up_to_the_loss(self, bundled):
        model, _ = bundled
        renderer, dialogues = bundled[1].renderer, bundled_dialogues()
        long = Dialogue(tuple(turn for dialogue in dialogues for turn in dialogue.turns))
        conversations = Conversations.of(renderer, [*dialogues[:5], long])
        subject = make_subject(conversations, range(6), replies=[])
        found = measure(model, subject)
        tokens, encode = {"Alex": 0, "Bob": 0}, renderer.tokenizer.encode_ordinary
        by_turn = dict.fromkeys([*map(str, range(1, 21)), "21+"], 0)
        for dialogue in [*dialogues[:5], long]:
            for place, (speaker, text) in enumerate(dialogue.turns):
                ending = 1 if place == len(dialogue.turns) - 1 else len(encode("\n\n###"))
                size = len(encode(text)) + ending
                tokens[speaker] += size
                by_turn[str(place + 1) if place < 20 else "21+"] += size
        # Learn only the texts, so that the training loop counts the same tokens.
        conversations.learned = np.zeros(len(conversations.tokens), bool)
        for start, end in zip(*conversations.turn_spans(), strict=True):
            conversations.learned[start:end] = True
        expected = evaluate(model, DialogueDataset(conversations, np.arange(6), 512), 4095, CPU)
        for name, sizes in (("loss_by_speaker", tokens), ("loss_by_turn", by_turn)):
            assert list(found[name]) == list(sizes)
            total = sum(found[name][key] * size for key, size in sizes.items())
            assert total / sum(sizes.values()) == pytest.approx(expected, rel=1e-5)
        assert found["loss_by_speaker"]["Alex"] != pytest.approx(found["loss_by_speaker"]["Bob"], rel=1e-3)

    def test_context_use_equals_a_calculation_with_transformers(self, bundled):
        """For one dialogue: the losses of its two replies with and without history."""
        model, conversations = bundled
        found = measure(model, make_subject(conversations, [3]))
        reference = GPT2LMHeadModel.from_pretrained(BUNDLED, dtype=torch.float32)
        renderer, turns = conversations.renderer, conversations[3].turns
        stop, sums, count = renderer.tokenizer.encode_ordinary("\n\n###"), {"none": 0.0, "1": 0.0, "all": 0.0}, 0
        for turn in (1, 2):
            for name, first in (("none", turn), ("1", turn - 1), ("all", 0)):
                context = renderer.encode_prompt(Dialogue(turns[first:]), turn - first)
                text = renderer.tokenizer.encode_ordinary(turns[turn].text) + (stop if turn == 1 else [4095])
                ids = torch.tensor([context + text])
                labels = ids.clone()
                labels[:, : len(context)] = -100
                with torch.inference_mode():
                    sums[name] += reference(ids, labels=labels).loss.item() * len(text)
            count += len(text)
        assert found["context_use"] == pytest.approx((sums["none"] - sums["all"]) / count, abs=1e-4)
        worth = found["context_use_by_turns"]
        assert worth["1"] == pytest.approx((sums["none"] - sums["1"]) / count, abs=1e-4)
        assert worth["2"] == worth["4"] == worth["all"] == found["context_use"]
        assert found["context_use_of_other_history"] is None
        assert found["too_small"]["context_use_of_other_history"] == "needs two dialogues, but there is one"
        assert not found["intervals"].get("context_use"), "one dialogue has no interval"

    def test_context_metrics_need_a_learned_turn_that_answers(self, bundled):
        """Only the opening turns are learned."""
        model, _ = bundled
        pairs = [Dialogue(dialogue.turns[:2]) for dialogue in bundled_dialogues()]
        conversations = Conversations.of(bundled[1].renderer, pairs, learn="Alex")
        found = measure(model, make_subject(conversations, range(10)))
        assert found["loss"] > 0
        for name in ("context_use", "context_use_of_other_history", "hits_at_1"):
            assert found[name] is None
            assert "needs a reply, but every learned turn" in found["too_small"][name]

    @pytest.mark.slow
    def test_a_trained_model_uses_context_and_random_weights_do_not(self, bundled):
        """The bundled model gains from a history, and most from the reply's own; random weights gain nothing.

        Some 95% intervals miss, so two of three must contain 0.
        """
        model, conversations = bundled
        subject = make_subject(conversations, range(10))
        trained = measure(model, subject)
        assert trained["intervals"]["context_use"][0] > 0
        assert trained["context_use"] > trained["context_use_of_other_history"]
        assert trained["chance_hits_at_1"] == pytest.approx(1 / 19)
        assert trained["hits_at_1"] > 2 / 19
        histories, intervals = make_histories(conversations, subject.replies, 512, 0), []
        for seed in range(3):
            torch.manual_seed(seed)
            scorer = Scorer(GPTModel(model.config), CPU.autocast, 4095)
            sums = histories.sums(scorer.token_losses(histories.examples, "test"))
            found = context_use(sums, subject).to_json()
            assert found["context_use"] == pytest.approx(0, abs=0.05)
            intervals.append(found["intervals"]["context_use"])
        assert sum(low <= 0 <= high for low, high in intervals) >= 2
