"""The benchmark works from its command to its tables, and its counts are right."""

import json
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from transformers import GPT2Tokenizer

from conftest import PROJECT, bundled_dialogues
from dialogues.template import Renderer
from dialogues.tokenizer import load_tokenizer
from gpt_model import PUBLISHED, GPTConfig, count_parameters
from material import BUNDLED_DATA, END_OF_TEXT, VOCABULARY, make_vocabulary, read_dialogues, render
from parts import throughput
from run import make_plan, parse_options
from settings import TrainingSettings
from table import goal_rows, operations_per_token, render_markdown, weights
from textbook import Model, load

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the benchmark measures processes with POSIX calls")


@pytest.mark.slow
def test_the_command_writes_its_measurements(tmp_path):
    options = ["--quick", "--repeats", "1", "--parts", "lora", "reading"]
    folders = ["--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "results")]
    done = subprocess.run(
        [sys.executable, str(PROJECT / "benchmarks" / "run.py"), *options, *folders],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "results").glob("*.json")
    results = json.loads(path.read_text(encoding="utf-8"))
    assert not results["left_out"]
    for record in results["records"]:
        (sample,) = record["samples"]
        assert sample["exit_code"] == 0, sample
        assert sample["seconds"] > 0
        assert 30e6 < sample["peak_bytes"] < 3e9
    who = {record["who"] for record in results["records"]}
    assert {"ours, fp32", "transformers with peft, fp32", "ours", "transformers' tokenizer"} <= who
    read = {record["samples"][0]["tokens"] for record in results["records"] if record["part"] == "reading"}
    assert len(read) == 1, "both sides read the same tokens"
    table = path.with_suffix(".md").read_text(encoding="utf-8")
    assert table == render_markdown(results)
    assert "| ours, fp32 | " in table
    assert "dialogues/s" in done.stdout
    assert list((tmp_path / "cache" / "made").glob("*/model.safetensors"))


@pytest.mark.parametrize("config", [PUBLISHED["gpt2-medium"], GPTConfig(2, 2, 64)])
def test_the_operations_per_token_equal_a_manual_count(config):
    raw = vars(config)
    assert weights(raw) == count_parameters(config) - config.n_positions * config.n_embd
    attention = 2 * 2 * config.n_layer * 100 * config.n_embd  # two products of a token with 100 others
    assert operations_per_token(raw, 100) == 6 * weights(raw) + 3 * attention


def test_goals_are_reported_as_met_or_not():
    main = [("ours", 40.0), ("transformers Trainer, fp32", 110.0), ("transformers Trainer, bf16", 99.0)]
    records = [
        {
            "part": "main",
            "case": "gpt2-medium",
            "who": who,
            "facts": {},
            "samples": [{"exit_code": 0, "seconds": seconds, "peak_bytes": 7e9}],
        }
        for who, seconds in main
    ]
    rows = list(goal_rows({"model": "gpt2-medium", "device": "cpu", "records": records}))
    assert [row[1:] for row in rows[:3]] == [
        ["≥ 10 ×", "", "not measured"],
        ["≥ 2.5 ×", "2.48 ×", "not met"],
        ["≤ 6.4 GB", "7.00 GB", "not met"],
    ]


def test_large_batches_are_also_measured_with_compile_on_a_gpu(tmp_path):
    words = ["--quick", "--device", "cuda", "--cache", str(tmp_path), "--cases", "× 64"]
    shapes = (("short", 8, 73), ("fixed", 2, 64), ("fixed", 64, 64))
    plan = make_plan(parse_options(words), ("bf16",))._replace(shapes=shapes)
    small, case = throughput(plan)
    assert [one.who for one in small.contestants] == ["ours, bf16", "transformers loop, bf16", "limit: products, bf16"]
    assert case.name == "quick, 64 × 64"
    assert [one.who for one in case.contestants] == [
        "ours, bf16",
        "ours with --compile, bf16",
        "transformers loop, bf16",
        "limit: products, bf16",
    ]
    options = [json.loads(one.words[-1]) for one in case.contestants]
    assert [each.get("compile") for each in options[:2]] == [None, True]
    assert "compile" in {field.name for field in fields(TrainingSettings)}


def test_both_sides_tokenize_identically_with_the_generated_vocabulary(tmp_path):
    make_vocabulary(tmp_path)
    ours = load_tokenizer(tmp_path)
    theirs = GPT2Tokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    assert ours.n_vocab == VOCABULARY
    texts = [render(turns).removesuffix(END_OF_TEXT) for turns in read_dialogues(BUNDLED_DATA)]
    for text, dialogue in zip(texts, bundled_dialogues(), strict=True):
        assert theirs(text)["input_ids"] == ours.encode_ordinary(text)
        assert Renderer(ours).encode(dialogue).tokens == [*ours.encode_ordinary(text), ours.eot_token]
    hard = "naïve café — 東京 unheard-of  words\n\n"
    assert theirs(hard)["input_ids"] == ours.encode_ordinary(hard)


def test_the_textbook_implementation_computes_gpt2(model_folder):
    from transformers import GPT2LMHeadModel

    model: Model = load(model_folder)
    reference = GPT2LMHeadModel.from_pretrained(model_folder)
    ids = torch.arange(60).view(2, 30)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), reference(ids).logits, atol=1e-4, rtol=0)
