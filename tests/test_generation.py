"""Sampling, batches of prompts, and texts that exceed the context."""

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from conftest import bundled_dialogues, tiny_reference, write_layout
from dialogues.dialogue import Dialogue, Turn
from dialogues.template import Renderer
from hub.find import BUNDLED
from load_gpt2_weights import load_model
from settings import GenerationSettings
from support.errors import UserError
from talking.decoder import Decoder
from talking.generation import BATCH, Bounds, CompletionConfig, complete_dialogues, draw, generate, penalize_repetition


@pytest.fixture
def model(vocabulary, tmp_path):
    return load_model(write_layout(tiny_reference(std=0.25), vocabulary, tmp_path / "m", "bare"))[0]


def test_a_batch_gives_the_same_text_as_each_prompt_alone(model):
    prompts = [[1, 2, 3], [50, 60, 70, 80, 90, 100, 110], [7]]
    settings = GenerationSettings(max_new_tokens=40)
    together = generate(Decoder(model), prompts, Bounds(399), settings, 0)
    alone = [generate(Decoder(model), [prompt], Bounds(399), settings, 0)[0] for prompt in prompts]
    assert together == alone


def test_generation_continues_beyond_the_context(model):
    """128 positions, 300 new tokens: equal to an uncached loop that keeps the newest 64 tokens on overflow."""
    prompts = [[1, 2, 3], list(range(200, 240))]
    replies = generate(Decoder(model), prompts, Bounds(-1), GenerationSettings(max_new_tokens=300), 0)
    for prompt, reply in zip(prompts, replies, strict=True):
        context, expected = list(prompt), []
        for _ in range(300):
            context = context if len(context) <= 128 else context[-64:]
            with torch.inference_mode():
                token = int(model(torch.tensor([context]))[0, -1].argmax())
            context.append(token)
            expected.append(token)
        assert reply == expected


def test_a_prompt_longer_than_the_context_is_shortened(model):
    prompt = [number % 390 for number in range(500)]
    settings = GenerationSettings(max_new_tokens=5)
    assert generate(Decoder(model), [prompt], Bounds(399), settings, 0) == generate(
        Decoder(model), [prompt[-64:]], Bounds(399), settings, 0
    )


def test_generation_stops_at_end_of_text(model):
    settings = GenerationSettings(max_new_tokens=30)
    (reply,) = generate(Decoder(model), [[1, 2, 3]], Bounds(399), settings, 0)
    end = reply[10]
    (ended,) = generate(Decoder(model), [[1, 2, 3]], Bounds(end), settings, 0)
    assert ended == reply[: reply.index(end)]


def test_sampling_depends_only_on_the_seed(model):
    settings = GenerationSettings(max_new_tokens=30, temperature=1.0)
    first, again, other = (generate(Decoder(model), [[1, 2, 3]], Bounds(399), settings, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    ("settings", "warpers"),
    [
        (dict(temperature=0.7), []),
        (dict(temperature=1.0, top_k=5), [TopKLogitsWarper(5)]),
        (dict(temperature=1.0, top_k=5000), []),
        (dict(temperature=1.3, top_p=0.8), [TopPLogitsWarper(0.8)]),
        (dict(temperature=0.9, top_k=20, top_p=0.5), [TopKLogitsWarper(20), TopPLogitsWarper(0.5)]),
    ],
)
def test_sampling_follows_the_probabilities_of_transformers(settings, warpers):
    """Compare 10,000 samples with the probabilities after transformers' own logits processors."""
    logits = 2 * torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    processors = LogitsProcessorList([TemperatureLogitsWarper(settings["temperature"]), *warpers])
    expected = processors(torch.zeros(1, 1, dtype=torch.long), logits.clone()).softmax(-1)[0]  # pyright: ignore
    draws = draw(logits.expand(10_000, -1), GenerationSettings(**settings), torch.Generator().manual_seed(0))
    observed = draws.flatten().bincount(minlength=50) / 10_000
    assert observed[expected == 0].sum() == 0
    assert (observed - expected).abs().max() < 0.02


@pytest.mark.parametrize("top_p", [1e-300, 5e-324, 1e-38])
def test_the_most_likely_token_is_kept_however_small_top_p_is(top_p):
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    settings = GenerationSettings(temperature=1, top_p=top_p)
    drawn = draw(logits, settings, torch.Generator().manual_seed(0))
    assert drawn.tolist() == logits.argmax(-1, keepdim=True).tolist()


def test_large_logits_do_not_overflow_at_a_low_temperature():
    logits = torch.tensor([[3e38, -3e38, 2e38]])
    drawn = draw(logits, GenerationSettings(temperature=0.01), torch.Generator().manual_seed(0))
    assert drawn.tolist() == [[0]]


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_nan_and_infinite_logits_are_an_error(temperature, number):
    logits = torch.zeros(2, 50)
    logits[1, 7] = number
    with pytest.raises(UserError, match="logits are NaN or infinite: its weights are damaged"):
        draw(logits, GenerationSettings(temperature=temperature), torch.Generator())


def test_repetition_penalty_equals_transformers():
    logits = torch.randn(2, 30, generator=torch.Generator().manual_seed(0))
    texts = [[1, 2, 3, 3], [29, 0, 0, 5]]
    processor = RepetitionPenaltyLogitsProcessor(1.7)
    expected = processor(torch.tensor(texts), logits.clone())  # pyright: ignore[reportArgumentType]
    penalize_repetition(logits, texts, 1.7)
    torch.testing.assert_close(logits, expected)


def test_cases_hold_the_opening_the_true_reply_and_the_models_reply(vocabulary, tmp_path):
    model, tokenizer = load_model(write_layout(tiny_reference(std=0.25), vocabulary, tmp_path / "m", "bare"))
    dialogues = [
        Dialogue((Turn("Ann", "Hi."), Turn("Cem", "Hey!"), Turn("Cem", "You?"))),
        Dialogue((Turn("Ann", "Is it still raining over there?"), Turn("Bo", "Yes."))),
    ]
    settings = GenerationSettings(max_new_tokens=20)
    completed = complete_dialogues(Decoder(model), dialogues, CompletionConfig(Renderer(tokenizer), "all", settings, 1))
    cases = [case.as_texts("prompt") for case in completed]
    assert [case["input"] for case in cases] == ["Ann: Hi.", "Ann: Is it still raining over there?"]
    assert cases[0]["response"] == "Cem: Hey! Cem: You?"
    assert cases[0]["model_response"].startswith("Cem: ")
    assert cases[1]["model_response"].startswith("Bo: ")
    assert len(cases[1]["model_response"]) > 10


def test_a_model_that_learned_one_speaker_writes_a_turn_of_that_speaker(vocabulary, tmp_path):
    model, tokenizer = load_model(write_layout(tiny_reference(std=0.25), vocabulary, tmp_path / "m", "bare"))
    dialogue = Dialogue((Turn("Ann", "Hi."), Turn("Cem", "Hey!"), Turn("Ann", "You?"), Turn("Cem", "Me.")))
    settings = GenerationSettings(max_new_tokens=20)
    (case,) = complete_dialogues(Decoder(model), [dialogue], CompletionConfig(Renderer(tokenizer), "Ann", settings, 1))
    assert (case.asked, case.true) == (dialogue.turns[:2], dialogue.turns[2:])
    assert [turn.speaker for turn in case.written] == ["Ann"]
    (case,) = complete_dialogues(
        Decoder(model), [dialogue], CompletionConfig(Renderer(tokenizer), "replies", settings, 1)
    )
    assert (case.asked, case.true) == (dialogue.turns[:1], dialogue.turns[1:])
    assert [turn.speaker for turn in case.written] == ["Cem"]


def test_one_turn_equals_the_first_turn_of_a_whole_completion():
    """Generation ends with the turn: nothing is generated after a stop."""
    model, tokenizer = load_model(BUNDLED)
    dialogues, renderer = bundled_dialogues()[7:], Renderer(tokenizer)
    settings = GenerationSettings(max_new_tokens=100)
    whole = complete_dialogues(Decoder(model), dialogues, CompletionConfig(renderer, "all", settings, 1))
    alone = complete_dialogues(Decoder(model), dialogues, CompletionConfig(renderer, "all", settings, 1, one_turn=True))
    assert any(len(case.written) > 1 for case in whole)
    assert [case.written for case in alone] == [case.written[:1] for case in whole]
    prompts = [renderer.encode_prompt(dialogue, 1) for dialogue in dialogues]
    bounds = Bounds(tokenizer.eot_token, renderer.newest_turns, renderer.stop)
    replies = generate(Decoder(model), prompts, bounds, settings, 1)
    assert any(reply[-len(renderer.stop) :] == renderer.stop for reply in replies)
    assert not any(tokenizer.decode(reply).count("###") > 1 for reply in replies)


def test_a_dialogue_that_outgrows_the_context_continues_from_whole_turns(vocabulary, tmp_path):
    """Equal to an uncached loop that keeps the newest whole turns in half of the 128 positions."""
    model, tokenizer = load_model(write_layout(tiny_reference(std=0.25), vocabulary, tmp_path / "m", "bare"))
    turns = [Turn("AB"[number % 2], "so far so good") for number in range(30)]
    renderer = Renderer(tokenizer)
    prompt = context = renderer.encode_prompt(Dialogue(tuple(turns)), 29)
    assert len(context) > 128
    expected = []
    for _ in range(150):
        context = context if len(context) <= 128 else renderer.newest_turns(context, 64)
        with torch.inference_mode():
            token = int(model.eval()(torch.tensor([context]))[0, -1].argmax())
        context = [*context, token]
        expected.append(token)
    start = renderer.newest_turns(prompt, 64)
    assert tokenizer.decode(start).startswith("\n\n### ")
    assert start != prompt[-64:]
    settings = GenerationSettings(max_new_tokens=150)
    assert generate(Decoder(model), [prompt], Bounds(-1, renderer.newest_turns), settings, 0) == [expected]


def test_cases_in_batches_equal_single_cases(vocabulary, tmp_path):
    model, tokenizer = load_model(write_layout(tiny_reference(std=0.25), vocabulary, tmp_path / "m", "bare"))
    dialogues = [Dialogue((Turn("A", f"number {number}"), Turn("B", "yes"))) for number in range(BATCH + 3)]
    config = CompletionConfig(Renderer(tokenizer), "all", GenerationSettings(max_new_tokens=8), seed=1)
    together = complete_dialogues(Decoder(model), dialogues, config)
    alone = [complete_dialogues(Decoder(model), [dialogue], config)[0] for dialogue in dialogues]
    assert together == alone


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7}, {"temperature": 1, "top_k": 2}, {"temperature": 1, "top_p": 0.5}]
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinite_logits_are_an_error_with_every_option(options, value):
    logits = torch.zeros(2, 9)
    logits[1, 4] = value
    with pytest.raises(UserError, match="the model's logits are NaN or infinite"):
        draw(logits, GenerationSettings(**options), torch.Generator())
