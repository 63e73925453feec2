"""A model folder works in other programs: transformers' pipeline and CTranslate2."""

import json
import os
import socket
import subprocess
import sys

import ctranslate2
import pytest
import torch
from ctranslate2.converters import TransformersConverter
from transformers import GenerationConfig, LogitsProcessor, TextGenerationPipeline, pipeline

from conftest import save_conversation, tiny_reference, write_layout
from dialogues.conversations import Conversations
from dialogues.dialogue import ALPACA, Dialogue, Turn
from dialogues.template import Renderer
from dialogues.tokenizer import copy_vocabulary
from hub.find import BUNDLED
from load_gpt2_weights import load_model, save_model
from settings import GenerationSettings
from talking.decoder import Decoder
from talking.generation import Bounds, generate

TALK = Dialogue((Turn("Alex", "Did you sleep well?"), Turn("Bob", "A <|endofturn|> log."), Turn("Alex", "(Me too.)")))
ALPACA_TALK = Dialogue((Turn("Instruction", "Add 1 and 2."), Turn("Response", "3"), *TALK.turns), ALPACA)
DIALOGUES = {"prompt": TALK, "labels": TALK, "tokens": TALK, "alpaca": ALPACA_TALK}


class Dictation(LogitsProcessor):
    """Makes a model generate the given tokens, regardless of its weights."""

    def __init__(self, prompt: int, tokens: list[int]) -> None:
        self.prompt, self.tokens = prompt, tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        said = input_ids.size(1) - self.prompt
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([self.tokens[said]]), 0.0)


@pytest.fixture(params=DIALOGUES)
def talker(request, vocabulary, tmp_path) -> tuple[TextGenerationPipeline, Conversations]:
    """A pipeline around a saved model, and the one dialogue whose format it was saved with."""
    base = write_layout(tiny_reference(), vocabulary, tmp_path / "base", "bare")
    conversations = save_conversation(base, tmp_path / "model", DIALOGUES[request.param], request.param)
    return pipeline("text-generation", model=str(tmp_path / "model")), conversations


def say(talker: TextGenerationPipeline, conversations: Conversations, reply: list[int]) -> dict[str, str]:
    """The pipeline's message if the model generates `reply` and then continues with the whole dialogue."""
    dialogue = conversations[0]
    prompt = conversations.renderer.encode_prompt(dialogue, 1)
    dictation = Dictation(len(prompt), reply + conversations.tokens_of(0).tolist())
    messages = [{"role": "user", "content": dialogue.turns[0].text}]
    (answer,) = talker(messages, logits_processor=[dictation], max_new_tokens=len(reply) + 10)
    assert answer["generated_text"][:-1] == messages
    return answer["generated_text"][-1]


def test_a_message_ends_at_the_end_of_its_turn(talker):
    model, conversations = talker
    renderer, second = conversations.renderer, conversations[0].turns[1].text
    said = renderer.tokenizer.encode_ordinary(renderer.template.space + second)
    for end in (renderer.stop, [renderer.tokenizer.eot_token]):
        assert say(model, conversations, said + end) == {"role": "assistant", "content": second}
        assert say(model, conversations, end) == {"role": "assistant", "content": ""}


def test_one_token_ends_a_turn_in_programs_that_accept_only_one(talker):
    model, conversations = talker
    renderer = conversations.renderer
    ends = model.model.config.eos_token_id, renderer.tokenizer.eot_token
    assert ends[0] == renderer.stop[-1]
    assert sorted(ends) == sorted(model.model.generation_config.eos_token_id)
    text = {"prompt": "###", "labels": "\n", "tokens": "<|endofturn|>", "alpaca": "###"}[renderer.name]
    assert renderer.tokenizer.decode([ends[0]]) == text


def test_the_config_has_the_keys_that_llama_cpp_needs(model_folder, tmp_path):
    model, _ = load_model(model_folder)
    copy_vocabulary(model_folder, tmp_path / "saved")
    save_model(model, tmp_path / "saved", {"template": "prompt", "instruction": "", "speakers": [], "learn": "all"})
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert config["n_ctx"] == config["n_positions"] == 128
    assert {"n_embd", "n_head", "n_layer", "layer_norm_epsilon", "vocab_size"} <= config.keys()


@pytest.mark.parametrize("question", ["Do you have any pets?", "What do you like to eat for breakfast?"])
def test_the_bundled_model_gives_the_same_reply_everywhere(question, tmp_path):
    """Greedy decoding in fp32 gives the same turn here, in the pipeline and in CTranslate2."""
    model, tokenizer = load_model(BUNDLED)
    renderer = Renderer(tokenizer)
    dialogue = Dialogue((Turn("User", question), Turn("Assistant", "")))
    prompt = renderer.encode_prompt(dialogue, 1)
    limits = GenerationSettings(max_new_tokens=60)
    bounds = Bounds(tokenizer.eot_token, renderer.newest_turns, renderer.stop)
    (ours,) = generate(Decoder(model), [prompt], bounds, limits, 0)
    (turn,) = renderer.parse_turns(tokenizer.decode(ours), "Assistant", [])
    assert 0 < len(ours) < 60

    talker = pipeline("text-generation", model=str(BUNDLED), dtype=torch.float32)
    assert talker.tokenizer
    messages = [{"role": "user", "content": question}]
    (answer,) = talker(messages, do_sample=False, max_new_tokens=60)
    assert answer["generated_text"][-1] == {"role": "assistant", "content": turn.text}

    TransformersConverter(str(BUNDLED)).convert(str(tmp_path / "ct2"))
    ends = GenerationConfig.from_pretrained(BUNDLED).eos_token_id
    (result,) = ctranslate2.Generator(str(tmp_path / "ct2"), intra_threads=1).generate_batch(
        [talker.tokenizer.convert_ids_to_tokens(prompt)],
        max_length=60,
        include_prompt_in_result=False,
        end_token=ends,
    )
    assert renderer.parse_turns(tokenizer.decode(result.sequences_ids[0]), "Assistant", []) == [turn]


@pytest.mark.extra
def test_transformers_serves_a_model_like_openai(tmp_path):
    """Needs transformers[serving], and answers as transformers' own pipeline does, to the end of the turn."""
    openai = pytest.importorskip("openai")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(BUNDLED), "--port", str(port)]
    messages = [{"role": "user", "content": "How is the new job going so far?"}]
    (expected,) = pipeline("text-generation", model=str(BUNDLED))(messages, do_sample=False, max_new_tokens=40)
    server = subprocess.Popen(words, env={**os.environ, "HF_HUB_OFFLINE": "1"}, cwd=tmp_path)
    try:
        client = openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=20)
        chat = {"model": str(BUNDLED), "messages": messages, "temperature": 0, "max_tokens": 40}
        answer = client.chat.completions.create(**chat).choices[0]
        pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**chat, stream=True)]
    finally:
        server.terminate()
        server.wait()
    assert answer.message.content.strip() == expected["generated_text"][-1]["content"].strip() != ""
    assert answer.finish_reason == "stop"
    assert "".join(pieces).strip() == answer.message.content.strip()
