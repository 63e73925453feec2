"""`--data` and its options: their effect on the examples, the counts and the printed data."""

import json
import re
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from transformers import AutoTokenizer, GPT2LMHeadModel

from conftest import PROJECT, refused, tiny_reference, write_layout, written
from dialogues.ledger import ledger_lines, make_ledger
from pipeline.prepare import Data, make_datasets, open_data, read_data
from settings import DataSettings, TrainingSettings

QUICK = ("--epochs", 1, "--max-new-tokens", 2)
SAMPLES = PROJECT / "tests" / "samples"
TALK = [{"Ann": f"Is it number {number}?", "Cem": "Yes, it is.", "Dora": "No."} for number in range(10)]


def read_parts(settings: DataSettings, seed: int) -> Data:
    """The data of a run with the bundled model."""
    return read_data(open_data(settings), PROJECT / "models" / "tiny", settings, seed)


def run_ledger(work, name: str = "run") -> dict:
    return json.loads((work / name / "ledger.json").read_text(encoding="utf-8"))


class TestPreview:
    def test_preview_shows_and_writes_the_data_and_stops(self, command, work):
        done = command("finetune.py", "--preview", "--learn", "replies")
        assert done.returncode == 0, done.stderr
        shown = done.stdout
        assert "example 2 of 7, learned text in brackets:" in shown
        assert (
            "### Bob:\n[I did! Her name is Pepper. She already sleeps at the foot of my bed every night.\n\n###] Alex"
            in shown
        )
        assert "would love to meet her.<|endoftext|>]" in shown
        assert "position  input target  piece of the input" in shown
        assert "train: 7 dialogues, 21 turns, 524 tokens" in shown
        assert re.search(r"4 steps per epoch, \d+% padding", shown)
        assert re.search(r"memory: about 0\.\d GB to train", shown)
        assert "template: prompt (the default); learned: replies; split 70/30, in file order" in shown
        assert written(work) == ["train_data.txt", "val_data.txt"]
        assert (work / "train_data.txt").read_text(encoding="utf-8").count("<|endoftext|>\n") == 7

    @pytest.mark.slow
    def test_a_run_writes_the_learned_text_like_the_preview(self, command, work):
        shown = command("finetune.py", "--preview", "--learn", "Bob").stdout
        done = command("finetune.py", "--learn", "Bob", "--max-steps", 1, "--cases", 1, "--run-dir", "run")
        assert done.returncode == 0, done.stderr
        learned = (work / "run" / "learned.txt").read_text(encoding="utf-8")
        second = learned.index("example 3 of 7")
        assert learned[:second].strip() in shown
        assert learned.count("learned text in brackets") == 7
        assert learned.count("[") == learned.count("###]") + learned.count("<|endoftext|>]") == 7

    def test_the_preview_table_equals_the_batch(self, command):
        """In the table, each target is the next row's input, or -100 if the target is not learned."""
        shown = command("finetune.py", "--preview", "--learn", "Bob", "--batch-size", 1).stdout
        rows = re.findall(r"^ *(\d+) +(\d+) +(-?\d+)  '", shown, re.MULTILINE)
        assert len(rows) >= 40
        learned = 0
        for (at, _, target), (after, following, _) in pairwise(rows):
            if int(after) == int(at) + 1:
                assert target in (following, "-100")
                learned += target != "-100"
        assert 0 < learned < len(rows) - 10

    def test_a_preview_needs_no_weights(self, command, work, model_folder):
        (model_folder / "model.safetensors").unlink()
        done = command("finetune.py", "--model", model_folder, "--preview", "--run-dir", "seen", "--split", "60/20/20")
        assert done.returncode == 0, done.stderr
        assert written(work) == ["seen", *(f"seen/{name}_data.txt" for name in ("test", "train", "val"))]
        assert "model.safetensors missing" in refused(command("finetune.py", "--model", model_folder))

    def test_a_preview_does_not_overwrite_the_data(self, command, work):
        (work / "train_data.txt").write_text("\n\n".join(f"A: {number}\nB: yes" for number in range(10)))
        line = refused(command("finetune.py", "--preview", "--data", "train_data.txt"))
        assert "would overwrite train_data.txt" in line

    def test_control_characters_do_not_reach_the_terminal(self, command, work):
        (work / "data.json").write_text(
            json.dumps([{"A": "\x1b[2Jboo\x9b", "B": f"b\tc{number}"} for number in range(10)])
        )
        done = command("finetune.py", "--preview", "--data", "data.json")
        assert "\\x1b[2Jboo\\x9b" in done.stdout
        assert not {"\x1b", "\x9b"} & set(done.stdout)


class TestLedger:
    def test_everything_is_counted(self, command, work):
        """Duplicates on both sides of the split, turns that are left out, and a turn that is too long."""
        long = "word " * 700
        records = [
            {
                "messages": [
                    {"role": "user", "content": text},
                    {"role": "tool", "content": "x"},
                    {"role": "assistant", "content": "b"},
                ]
            }
            for text in ("a", "b", "c", long, "d", "e", "f", "a", "a", "g")
        ]
        records[2]["messages"].pop()
        (work / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
        done = command(
            "finetune.py", *QUICK, "--data", "data.jsonl", "--run-dir", "run", "--learn", "replies", "--max-steps", 1
        )
        assert done.returncode == 0, done.stderr
        ledger = run_ledger(work)
        assert (ledger["dialogues"], ledger["turns"], ledger["duplicates"]) == (9, 18, 2)
        assert ledger["skipped"] == {
            "tool calls": {"count": 10, "first": [1, 2, 3]},
            "questions without an answer": {"count": 1, "first": [3]},
        }
        train, val = ledger["parts"]["train"], ledger["parts"]["val"]
        assert (train["shortened_turns"], train["unlearned_examples"], train["examples"]) == (1, 1, 6)
        assert train["cut_off_tokens"] > 100
        assert 0 < train["learned_share"] < 0.1
        assert "skipped: tool calls (10; lines 1, 2, 3, …)" in done.stdout
        assert "duplicates: 2 dialogues equal to an earlier one; kept, in the same part" in done.stdout
        assert (train["dialogues"], val["dialogues"]) == (6, 3)
        assert "1 turn (or system prompts) longer than --max-length, truncated" in done.stdout

    def test_a_language_unsuited_to_the_vocabulary_is_reported(self, tmp_path):
        russian = tmp_path / "data.json"
        talk = [{"Аня": f"Как прошёл твой день номер {day}?", "Боря": "Спасибо, хорошо."} for day in range(10)]
        russian.write_text(json.dumps(talk))
        for path, warned in [(russian, True), (PROJECT / "llm_train_text.json", False)]:
            data = read_parts(DataSettings(paths=(path,)), seed=1)
            lines = ledger_lines(make_ledger(data.sources, make_datasets(data, 0, 512), TrainingSettings()))
            assert any(line.startswith("warning: many tokens per word") for line in lines) == warned

    def test_a_long_system_prompt_does_not_displace_the_first_turn(self, command, work):
        talks = [
            [
                {"role": "system", "content": "Be kind. " * 600},
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": f"Ho {number}"},
            ]
            for number in range(10)
        ]
        (work / "data.jsonl").write_text("\n".join(json.dumps({"messages": messages}) for messages in talks))
        done = command("finetune.py", "--preview", "--data", "data.jsonl", "--learn", "User")
        assert done.returncode == 0, done.stderr
        assert "train: 7 dialogues, 14 turns" in done.stdout
        assert "7 turns (or system prompts) longer than --max-length" in done.stdout
        assert "left out: 7 examples with nothing to learn" in done.stdout
        assert re.search(r"### User:\n\[Hi\n\n###\] Assistant:\nHo", done.stdout)

    def test_a_part_with_nothing_to_learn_is_refused(self, command, work):
        talk = [{"A" + "x" * 60: f"a{number}", "B" + "y" * 60: "b"} for number in range(10)]
        (work / "data.json").write_text(json.dumps(talk))
        line = refused(command("finetune.py", "--data", "data.json", "--max-length", 16, "--learn", "replies"))
        assert "train has nothing to learn in examples of 16 tokens; raise --max-length" in line

    def test_the_error_for_one_long_chat_advises_shorter_pauses(self, command, work):
        (work / "chat.txt").write_text("[01.03.24, 10:00] A: hi\n[01.03.24, 10:01] B: ho")
        line = refused(command("finetune.py", "--data", "chat.txt"))
        assert "chat.txt: too little data for --split 70/30: 1 distinct dialogue with 2 turns" in line
        assert "or cut the chat at shorter pauses with --pause-hours" in line


class TestLearnAndNames:
    def test_a_renamed_speaker_can_be_learned(self, command, work):
        (work / "data.json").write_text(json.dumps(TALK))
        done = command(
            "finetune.py",
            *QUICK,
            "--data",
            "data.json",
            "--rename",
            "Ann=Zoe",
            "Dora=Zoe",
            "--learn",
            "Zoe",
            "--run-dir",
            "run",
        )
        assert done.returncode == 0, done.stderr
        assert "### Zoe:\nNo." in (work / "run" / "train_data.txt").read_text()
        about = json.loads((work / "run" / "model" / "dialogue.json").read_text())
        assert (about["speakers"], about["learn"]) == (["Zoe", "Cem"], "Zoe")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                ["--learn", "Zoe"],
                "--learn Zoe: choose all, replies, or a speaker's name; the speakers are Ann (10 turns)",
            ),
            (
                ["--rename", "Zoe=Al"],
                "--rename Zoe=...: no speaker in data.json has that name; the speakers are Ann",
            ),
            (["--rename", "Zoe"], "--rename Zoe: expected OLD=NEW"),
            (["--rename", "Zoe=", "=Al"], "--rename =Al: expected OLD=NEW"),
            (["--rename", "Ann=Al", "Ann=Bo"], "an old name occurs twice"),
            (["--rename", "Ann=Al", "Cem=Al", "Dora=Al"], "only Al speaks; a conversation needs two"),
            (["--pause-hours", 0], "--pause-hours 0.0: must be above 0"),
            (["--template", "alpaca"], "--template alpaca is for instruction data"),
            (["--format", "chat-export"], "this is not an exported chat"),
            (["--format", "pairs"], "record 1: prompt and completion, or question and answer, are needed"),
            (["--format", "xml"], "--format"),
        ],
    )
    def test_a_wrong_value_is_refused(self, command, work, arguments, message):
        (work / "data.json").write_text(json.dumps(TALK))
        assert message in refused(command("finetune.py", "--data", "data.json", *arguments))
        assert written(work) == ["data.json"]

    def test_a_dialogue_with_nothing_to_learn_is_named(self, command, work):
        talk = [*TALK[:5], {"Ann": "Alone?", "Cem": "Yes."}, *TALK, {"Cem": "Hm?", "Ann": "Hm."}]
        (work / "data.json").write_text(json.dumps(talk))
        line = refused(command("finetune.py", "--data", "data.json", "--learn", "Dora"))
        assert "data.json: record 6: nothing to learn with --learn Dora (nor in 1 other dialogue)" in line

    def test_dialogues_with_nothing_to_learn_are_left_out_of_a_chat(self, command, work):
        days = [
            f"[{day:02}.03.24, 10:00] Ann: hi\n[{day:02}.03.24, 10:01] {name}: ho {day}"
            for day, name in enumerate(["Cem", "Dora"] * 6, 1)
        ]
        (work / "chat.txt").write_text("\n".join(days))
        done = command("finetune.py", "--preview", "--data", "chat.txt", "--learn", "Dora")
        assert done.returncode == 0, done.stderr
        assert "left out: 6 dialogues with nothing to learn" in done.stdout
        assert "train: 4 dialogues" in done.stdout

    def test_shuffle_follows_the_seed(self):
        orders = []
        for shuffle, seed in [(False, 1), (True, 1), (True, 1), (True, 7)]:
            data = read_parts(DataSettings(paths=(PROJECT / "llm_train_text.json",), shuffle=shuffle), seed)
            orders.append([number for part in data.parts.values() for number in part.tolist()])
        assert orders[0] == list(range(10))
        assert orders[1] == orders[2]
        assert len(set(map(tuple, orders))) == 3
        assert all(sorted(order) == orders[0] for order in orders)


class TestTemplates:
    @pytest.mark.parametrize("template", ["labels", "tokens"])
    def test_transformers_writes_the_same_text(self, command, work, vocabulary, tmp_path, template):
        """It needs only the run's model folder: the chat template, the tokens and the weights."""
        folder = write_layout(tiny_reference(std=0.2), vocabulary, tmp_path / "m", "prefixed")
        options = ["--model", folder, "--template", template, "--epochs", 2, "--max-new-tokens", 30, "--run-dir", "run"]
        done = command("finetune.py", *options, "--precision", "fp32")
        assert done.returncode == 0, done.stderr
        saved = work / "run" / "model"
        tokenizer, model = AutoTokenizer.from_pretrained(saved), GPT2LMHeadModel.from_pretrained(saved).eval()
        assert model.config.vocab_size == 400 + 3 * (template == "tokens")
        for case in json.loads((work / "generated_conversations.json").read_text()):
            message = {"role": "user", "content": case["input"].removeprefix("Alex: ")}
            prompt = tokenizer.apply_chat_template([message], add_generation_prompt=True, return_tensors="pt")
            ids = prompt["input_ids"]
            reply = model.generate(ids, max_new_tokens=30, do_sample=False, pad_token_id=399)[0, ids.size(1) :]
            text = tokenizer.decode(reply).removesuffix("<|endoftext|>").removesuffix("<|endofturn|>")
            for name in ("Alex", "Bob"):
                text = text.replace(f"<|endofturn|><|{name}|>", f" {name}: ").replace(f"\n{name}: ", f" {name}: ")
            assert " ".join(case["model_response"].split()) == " ".join(f"Bob: {text}".split())

    def test_a_model_with_speaker_tokens_can_be_trained_further(self, command, work, model_folder):
        """The new conversations have one known and one new speaker."""
        (work / "data.json").write_text(json.dumps([{"Bob": f"a{number}", "Cem": "b"} for number in range(10)]))
        options = [*QUICK, "--template", "tokens"]
        assert command("finetune.py", "--model", model_folder, *options, "--run-dir", "one").returncode == 0
        done = command("finetune.py", "--model", "one", *options, "--data", "data.json", "--run-dir", "two")
        assert done.returncode == 0, done.stderr
        first, second = (
            json.loads((work / name / "model" / "added_tokens.json").read_text()) for name in ("one", "two")
        )
        assert first == {"<|endofturn|>": 400, "<|Alex|>": 401, "<|Bob|>": 402}
        assert second == {**first, "<|Cem|>": 403}

    def test_instructions_get_the_same_answers_as_in_transformers(self, command, work, vocabulary, tmp_path):
        folder = write_layout(tiny_reference(std=0.2, n_positions=512), vocabulary, tmp_path / "m", "bare")
        records = [
            {"instruction": f"Double {number}.", "input": "now" * (number % 2), "output": str(2 * number)}
            for number in range(20)
        ]
        (work / "data.json").write_text(json.dumps(records))
        done = command(
            "finetune.py", "--model", folder, "--data", "data.json", "--split", "85/5/10", "--learn", "replies",
            "--epochs", 1, "--max-new-tokens", 25, "--run-dir", "run", "--precision", "fp32",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "template: alpaca (the default)" in done.stdout
        assert "### Input:\nnow\n\n### Response:\n" in (work / "run" / "train_data.txt").read_text()
        cases = json.loads((work / "generated_conversations.json").read_text())
        assert [(case["input"], case["response"]) for case in cases] == [
            ("Double 18.", "36"),
            ("Double 19.\n\nnow", "38"),
        ]
        tokenizer = AutoTokenizer.from_pretrained(work / "run" / "model")
        model = GPT2LMHeadModel.from_pretrained(work / "run" / "model").eval()
        for case, text in zip(
            cases, (work / "run" / "test_data.txt").read_text().split("<|endoftext|>\n"), strict=False
        ):
            prompt = text[: text.index("### Response:\n") + len("### Response:\n")]
            ids = torch.tensor([tokenizer(prompt)["input_ids"]])
            reply = model.generate(ids, max_new_tokens=25, do_sample=False, pad_token_id=399)[0, ids.size(1) :]
            theirs = tokenizer.decode(reply, skip_special_tokens=True)
            assert case["model_response"] == theirs.split("\n\n###")[0].strip()

    def test_pairs_can_be_used_as_instructions(self, command, work):
        answers = ["a", "", *"bcdefgh"]
        records = [{"prompt": f"q{number}", "completion": answer} for number, answer in enumerate(answers)]
        (work / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
        options = ["--data", "data.jsonl", "--template", "alpaca"]
        done = command("finetune.py", "--preview", *options)
        assert done.returncode == 0, done.stderr
        assert "8 dialogues, 16 turns" in done.stdout
        assert "skipped: turns of records without an answer (2; line 2)" in done.stdout
        assert (work / "val_data.txt").read_text().startswith("Below is an instruction that describes a task. Write a")
        line = refused(command("finetune.py", *options, "--rename", "Response=Answer"))
        assert "--rename: the alpaca template has fixed speakers" in line


def test_a_chat_without_pauses_is_learned_completely(command, work):
    """20,000 tokens without a pause become many examples of 512 positions, and no turn is lost."""
    lines = [
        f"[01.03.24, {10 + n // 300:02}:{n // 5 % 60:02}] {'AB'[n % 2]}: this is message number {n} of today"
        for n in range(2100)
    ]
    chats = [f"[{day:02}.04.24, 10:00] A: hi\n[{day:02}.04.24, 10:01] B: ho {day}" for day in range(1, 4)]
    (work / "chat.txt").write_text("\n".join([*lines, *chats]))
    done = command("finetune.py", "--preview", "--data", "chat.txt", "--split", "50/50", "--run-dir", "out")
    assert done.returncode == 0, done.stderr
    found = re.search(r"train: 2 dialogues in (\d+) examples, 2,102 turns, ([\d,]+) tokens, 100% learned", done.stdout)
    assert found, done.stdout
    assert int(found[2].replace(",", "")) > 20_000
    assert int(found[1]) > 40
    assert "truncated" not in done.stdout


def test_a_large_file_is_read_by_several_processes(work, tmp_path):
    """They return the same arrays as one process, and the same error for a broken record far from the first."""
    code = f"""
import sys
sys.path.insert(0, {str(PROJECT)!r})
from pathlib import Path
import numpy as np
import dialogues.encoding as encoding
from dialogues.reading import open_source
from support.errors import UserError

TINY = Path({str(PROJECT / "models" / "tiny")!r})
if __name__ == "__main__":
    results = []
    for encoding.LARGE in (1 << 40, 1000):
        results.append(encoding.encode_source(open_source(Path("data.jsonl")), TINY, "tokens", "replies"))
    one, many = results
    assert one.speakers == many.speakers and len(one) == len(many) == 2500
    for name in ("tokens", "texts", "starts", "turn_starts", "numbers", "fingerprints", "learned"):
        assert np.array_equal(getattr(one, name), getattr(many, name)), name
    with open("data.jsonl", "a") as file:
        file.write('{{"A": "b", "B": 5}}\\n')
    try:
        encoding.encode_source(open_source(Path("data.jsonl")), TINY, "prompt")
    except UserError as error:
        print(error)
"""
    talks = [{f"A{n % 7}": f"number {n}", "B": "yes " * (n % 50 + 1), f"C{n % 11}": "no"} for n in range(2500)]
    (work / "data.jsonl").write_text("\n".join(map(json.dumps, talks)) + "\n")
    (tmp_path / "script.py").write_text(code)
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py"], cwd=work, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "data.jsonl: line 2501: turn 2: the text of 'B' must be a string, not a number" in done.stdout
