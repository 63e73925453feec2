"""The command line: the whole job on a tiny model, and the one-line error for each mistake."""

import json
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
from dataclasses import fields, replace
from functools import partial

import pytest
import torch
from transformers import GPT2LMHeadModel, GPT2Tokenizer

from conftest import PROJECT, refused, tiny_reference, write_layout, written
from finetune import finetune
from pipeline.job import RunFacts
from pipeline.run_settings import parse_finetune_settings
from settings import (
    AnswerSettings,
    DataSettings,
    EvaluateSettings,
    FinetuneSettings,
    GenerationSettings,
    RunSettings,
    TrainingSettings,
)
from support.command_line import parse_command_line
from support.errors import UserError

QUICK = ("--epochs", 1, "--max-new-tokens", 2)
DATA = (
    '[{"A": "one", "B": "two"}, {"A": "three", "B": "four"}, {"A": "five", "B": "six"}, {"A": "seven", "B": "eight"}]'
)


class TestTheWholeJob:
    def test_a_run_writes_its_files_and_its_output(self, command, work, model_folder):
        done = command("finetune.py", "--model", model_folder, "--epochs", 3, "--max-new-tokens", 30)
        assert done.returncode == 0, done.stderr
        run = work / "runs" / "tiny-random-1"
        assert sorted(path.name for path in run.iterdir()) == [
            ".lock",
            "base_evaluation.json",
            "context_use.png",
            "evaluation.json",
            "generated_conversations.json",
            "learned.txt",
            "ledger.json",
            "loss.png",
            "metrics.jsonl",
            "model",
            "report.html",
            "settings.json",
            "timing.jsonl",
            "train_data.txt",
            "val_data.txt",
        ]
        cases = json.loads((work / "generated_conversations.json").read_text(encoding="utf-8"))
        bundled = json.loads((PROJECT / "llm_train_text.json").read_text(encoding="utf-8"), object_pairs_hook=list)
        for case, pairs in zip(cases, bundled[7:], strict=True):
            opening, *rest = [f"{speaker}: {text}" for speaker, text in pairs]
            assert list(case) == ["input", "response", "model_response"]
            assert (case["input"], case["response"]) == (opening, " ".join(rest))
            assert case["model_response"].startswith("Bob: ")
        assert (run / "train_data.txt").read_text(encoding="utf-8").count("<|endoftext|>\n") == 7
        assert not [name for name in written(work) if name.endswith(".tmp")]
        metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        epochs = [line["step"] for line in metrics if "val_loss" in line]
        per_epoch = epochs[1]
        assert epochs == [0, per_epoch, 2 * per_epoch, 3 * per_epoch]
        assert [line["step"] for line in metrics if "train_loss" in line] == list(range(1, 3 * per_epoch + 1))
        assert metrics[0]["train_set_loss"] > metrics[-1]["train_set_loss"]
        assert "precision: " in done.stdout
        assert "validation loss" in done.stdout

    def test_the_same_seed_writes_the_same_bytes(self, command, work, model_folder):
        for _ in range(2):
            done = command("finetune.py", "--model", model_folder, *QUICK, "--dropout", 0.1, "--temperature", 1)
            assert done.returncode == 0, done.stderr
        first, second = work / "runs" / "tiny-random-1", work / "runs" / "tiny-random-2"
        for name in ("model/model.safetensors", "metrics.jsonl", "generated_conversations.json", "val_data.txt"):
            assert (first / name).read_bytes() == (second / name).read_bytes(), name
        for name in ("evaluation.json", "report.html"):
            texts = [(run / name).read_text(encoding="utf-8").replace(run.name, "RUN") for run in (first, second)]
            assert texts[0] == texts[1], name
        done = command("finetune.py", "--model", model_folder, *QUICK, "--dropout", 0.1, "--seed", 5)
        assert (first / "metrics.jsonl").read_bytes() != (first.parent / "tiny-random-3/metrics.jsonl").read_bytes()

    def test_watching_shows_the_first_case_and_changes_nothing_else(self, command, work, model_folder):
        options = ("--model", model_folder, "--epochs", 2, "--max-new-tokens", 30, "--dropout", 0.1)
        assert command("finetune.py", *options, "--run-dir", "plain", "--lora-rank", 2).returncode == 0
        done = command("finetune.py", *options, "--lora-rank", 2, "--watch", "--run-dir", "watched")
        assert done.returncode == 0, done.stderr
        run = work / "watched"
        metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        watched = [line["watched"] for line in metrics if "watched" in line]
        assert len(watched) == 3
        written = json.loads((run / "generated_conversations.json").read_text())[0]["model_response"]
        assert watched[-1].startswith("Bob: ")
        assert written.startswith(watched[-1])  # greedy, so the reply shown is the start of the same text
        bundled = json.loads((PROJECT / "llm_train_text.json").read_text(), object_pairs_hook=list)[7]
        opening, reply = (" ".join(f"{speaker}: {text}".split())[:90] for speaker, text in bundled[:2])
        shown = done.stdout[: done.stdout.index("case 1")]
        assert shown.count(f"  input      {opening}") == 1
        assert shown.count(f"  true       {reply}") == 3
        assert shown.count("  generated  Bob:") == 3
        plain, same = ((work / run / "model" / "model.safetensors").read_bytes() for run in ("plain", "watched"))
        assert plain == same
        lines = [(work / run / "metrics.jsonl").read_text().splitlines() for run in ("plain", "watched")]
        assert lines[0] == [line for line in lines[1] if '"watched"' not in line]

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("options", "shown"),
        [
            (["--template", "labels", "--temperature", 1], "Ben: "),
            (["--template", "tokens", "--learn", "Ann"], "Ann: "),
            (["--data", "instructions.json"], ""),
        ],
    )
    def test_watch_works_with_every_template(self, command, work, model_folder, options, shown):
        turns = [{"speaker": speaker, "text": f"number {speaker}"} for speaker in ("Ann", "Ben", "Ann")]
        (work / "data.json").write_text(json.dumps([{"turns": turns + turns[1:] * number} for number in range(4)]))
        tasks = [{"instruction": "Add.", "input": str(number), "output": "2"} for number in range(4)]
        (work / "instructions.json").write_text(json.dumps(tasks))
        data = () if "--data" in options else ("--data", "data.json")
        options = (*data, *options, "--model", model_folder, *QUICK, "--watch", "--run-dir", "run")
        done = command("finetune.py", *options)
        assert done.returncode == 0, done.stderr
        metrics = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
        watched = [line["watched"] for line in metrics if "watched" in line]
        assert len(watched) == 2
        assert all(text.startswith(shown) for text in watched)
        assert shown or "  true       2\n" in done.stdout

    def test_transformers_writes_the_same_text(self, command, work, vocabulary, tmp_path):
        """Loaded by transformers, the run's model folder completes the validation cases with the same words."""
        folder = write_layout(tiny_reference(std=0.2), vocabulary, tmp_path / "m", "prefixed")
        options = ["--model", folder, "--epochs", 2, "--max-new-tokens", 40, "--run-dir", "run", "--precision", "fp32"]
        done = command("finetune.py", *options)
        assert done.returncode == 0, done.stderr
        model = GPT2LMHeadModel.from_pretrained(work / "run" / "model").eval()
        tokenizer = GPT2Tokenizer.from_pretrained(work / "run" / "model")
        rendered = (work / "run" / "val_data.txt").read_text(encoding="utf-8").split("<|endoftext|>\n")
        for case, text in zip(json.loads((work / "generated_conversations.json").read_text()), rendered, strict=False):
            prompt = text[: text.index("### Bob:\n") + len("### Bob:\n")]
            ids = torch.tensor([tokenizer(prompt)["input_ids"]])
            reply = model.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=399)[0, ids.size(1) :]
            theirs = tokenizer.decode(reply, skip_special_tokens=True).strip()
            assert case["model_response"] == f"Bob: {theirs}"

    def test_a_run_folder_can_be_fine_tuned_again(self, command, work, model_folder):
        assert command("finetune.py", "--model", model_folder, *QUICK, "--run-dir", "first").returncode == 0
        done = command("finetune.py", "--model", "first", *QUICK, "--split", "60/20/20", "--cases", 50)
        assert done.returncode == 0, done.stderr
        assert "model: first/model" in done.stdout.replace(os.sep, "/")
        assert (work / "runs" / "first-1" / "test_data.txt").exists()
        assert "replaced: generated_conversations.json" in done.stdout
        assert len(json.loads((work / "generated_conversations.json").read_text())) == 2  # the test part
        assert "--cases 50: only 2 available" in done.stdout

    def test_end_of_text_in_a_turn_is_plain_text(self, command, work, model_folder):
        (work / "data.json").write_text(DATA.replace("three", "a <|endoftext|> b").replace("seven", "<|endoftext|>"))
        done = command("finetune.py", "--model", model_folder, *QUICK, "--data", "data.json")
        assert done.returncode == 0, done.stderr
        case = json.loads((work / "generated_conversations.json").read_text())[1]
        assert case["input"] == "A: <|endoftext|>"

    def test_long_turns_are_counted(self, command, work, model_folder):
        (work / "data.json").write_text(DATA.replace("one", "so " * 300).replace("three", "and " * 20))
        done = command("finetune.py", "--model", model_folder, *QUICK, "--data", "data.json")
        assert done.returncode == 0, done.stderr
        assert "1 turn (or system prompts) longer than --max-length, truncated" in done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent the POSIX way")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)])
def test_a_stopped_run_prints_one_line_and_no_traceback(work, model_folder, number):
    process = subprocess.Popen(
        [sys.executable, PROJECT / "finetune.py", "--model", model_folder, "--epochs", "100000", "--run-dir", "run"],
        cwd=work,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=partial(signal.signal, number, signal.SIG_DFL),  # not ignored, even if the tests run under nohup
    )
    deadline = time.monotonic() + 60
    log = work / "run" / "metrics.jsonl"  # has its first line once training has begun
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.fullmatch(r"stopped after step \d+ of 400000; resume with: .*finetune.py --resume run", stderr.strip())
    assert not (work / "run" / "model" / "model.safetensors").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX terminal")
def test_a_run_whose_terminal_closes_can_be_resumed(work, model_folder):
    import fcntl
    import pty
    import termios

    terminal, inside = pty.openpty()
    options = ("--model", str(model_folder), "--epochs", "100000", "--run-dir", "run")
    process = subprocess.Popen(
        [sys.executable, str(PROJECT / "finetune.py"), *options],
        cwd=work,
        stdin=inside,
        stdout=inside,
        stderr=inside,
        start_new_session=True,
        preexec_fn=lambda: [fcntl.ioctl(0, termios.TIOCSCTTY, 0), signal.signal(signal.SIGHUP, signal.SIG_DFL)],
    )
    os.close(inside)
    log = work / "run" / "metrics.jsonl"
    while not (log.exists() and log.read_bytes().count(b"\n") > 5):  # after a few steps
        assert process.poll() is None
        os.read(terminal, 4096)
    os.close(terminal)
    assert process.wait(60) == 130
    assert list((work / "run" / "checkpoint").glob("step-*"))


def test_the_summary_of_a_reading_follows_the_dialogues(work):
    """Otherwise the dialogues of a long chat would push it off the screen."""
    (work / "data.json").write_text(DATA)
    shown = subprocess.run(
        [sys.executable, "-m", "dialogues", work / "data.json"],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert shown[0].startswith('{"turns": ')
    assert shown[4].endswith("data.json: names, 4 dialogues, 8 turns; A 4, B 4")


class TestSettings:
    def test_help_does_not_import_torch(self):
        code = "import sys; sys.argv = ['finetune.py', '--help']\ntry: import finetune; finetune.main()\n"
        code += "except SystemExit: print('torch' in sys.modules, file=sys.stderr)"
        done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
        assert "--batch-size" in done.stdout
        assert done.stderr.strip() == "False"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--bathc-size", 2], "there is no option --bathc-size; did you mean --batch-size? ("),
            (["chat.zip"], "unexpected argument: chat.zip; give conversation files with --data ("),
            (["--temperature", "hot"], "--temperature hot: must be a number ("),
            (["--schedule", "steps"], "--schedule steps: must be one of constant, linear, cosine ("),
            (["--epochs"], "--epochs needs a value ("),
            (["--batch-size", "two"], "--batch-size two: must be a whole number"),
            (["--device", "tpu"], "--device"),
            (["--split", "90/20"], "--split 90/20: the parts sum to 110, not 100"),
            (["--split", "100/0"], "--split 100/0: expected two or three whole percentages"),
            (["--split", "seventy/thirty"], "expected two or three whole percentages, as in 70/30"),
            (["--learning-rate", "nan"], "--learning-rate nan"),
            (["--max-length", 3], "--max-length 3: must be 16 or more"),
            (["--top-p", 0.5], "add --temperature 0.7"),
            (["--temperature", "1e-40"], "--temperature 1e-40: must be 0, or between 0.01 and 100"),
            (["--repetition-penalty", 0.01], "--repetition-penalty 0.01: must be between 0.1 and 10"),
        ],
    )
    def test_an_invalid_value_is_an_error(self, command, work, arguments, message):
        assert message in refused(command("finetune.py", *arguments))
        assert written(work) == []

    @pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
    def test_errors_are_printed_in_any_console_encoding(self, command, encoding):
        done = command("finetune.py", "--batch-size", "x", PYTHONUTF8="0", PYTHONIOENCODING=encoding)
        assert "--batch-size x: must be a whole number" in refused(done)

    def test_all_problems_are_reported_together(self, command):
        line = refused(command("finetune.py", "--batch-size", 0, "--epochs", -1, "--split", "5/5", "--top-p", 2))
        for option in ("--batch-size 0", "--epochs -1", "--split 5/5", "--top-p 2.0"):
            assert option in line


def test_every_number_has_a_maximum():
    """The exceptions are the seed, which has a separate maximum, and --max-length, which the model's context limits."""
    tried = 0
    for group in (TrainingSettings, GenerationSettings, RunSettings, DataSettings, AnswerSettings, EvaluateSettings):
        for field in fields(group):
            if field.type in (int, float, int | None, float | None) and field.name not in ("seed", "max_length"):
                for value in (10**10, 1e308, 10**400):
                    (problem, *_) = replace(group(), **{field.name: value}).problems()
                    assert problem.startswith(f"--{field.name.replace('_', '-')} {value}: ")
                    tried += 1
    assert tried > 3 * 25


class TestConversations:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("[]", "the file holds no conversations: its list is empty"),
            (
                '[{"A": "b", "B": "c"}, {"A": "d", "B": 5}]',
                "data.json: record 2: turn 2: the text of 'B' must be",
            ),
            ('[{"A": "b", "B": "c"}]', "too little data for --split 70/30: 1 distinct dialogue with 2 turns"),
        ],
    )
    def test_a_file_without_usable_conversations_is_an_error(self, command, work, model_folder, content, message):
        (work / "data.json").write_text(content, encoding="utf-8")
        line = refused(command("finetune.py", "--model", model_folder, "--data", "data.json"))
        assert message in line
        assert written(work) == ["data.json"]

    def test_a_missing_file_or_a_folder_without_conversations_is_an_error(self, command, model_folder, work):
        line = refused(command("finetune.py", "--model", model_folder, "--data", "nowhere.json"))
        assert "--data nowhere.json does not exist" in line
        line = refused(command("finetune.py", "--model", model_folder, "--data", "."))
        assert "--data . has no conversation file" in line
        assert written(work) == []


class TestModels:
    def test_an_unknown_model_name_is_an_error(self, command, work):
        assert "did you mean gpt2-medium?" in refused(command("finetune.py", "--model", "gpt2-meduim"))
        assert "no model bert: it is not a folder" in refused(command("finetune.py", "--model", "bert"))
        assert "no model ./no/such/folder: " in refused(command("finetune.py", "--model", "./no/such/folder"))
        assert written(work) == []

    @pytest.mark.parametrize("name", ["config.json", "vocab.json", "merges.txt", "model.safetensors"])
    def test_an_incomplete_model_folder_is_an_error(self, command, work, model_folder, name):
        (model_folder / name).unlink()
        assert f"incomplete: {name} missing" in refused(command("finetune.py", "--model", model_folder))
        assert written(work) == []

    def test_a_tensorflow_checkpoint_is_an_error(self, command, tmp_path):
        folder = tmp_path / "355M"
        folder.mkdir()
        for name in ("checkpoint", "model.ckpt.index", "hparams.json", "encoder.json", "vocab.bpe"):
            (folder / name).write_text("x")
        assert "holds a TensorFlow checkpoint" in refused(command("finetune.py", "--model", folder))

    @pytest.mark.parametrize(
        "damage",
        [
            lambda content: content[: len(content) // 2],
            lambda content: struct.pack("<Q", 1 << 60) + content[8:],
            lambda content: content[:8] + b"not a header" + content[20:],
            lambda content: b"",
        ],
    )
    def test_damaged_weights_are_an_error(self, command, work, model_folder, damage):
        path = model_folder / "model.safetensors"
        path.write_bytes(damage(path.read_bytes()))
        assert "is damaged or cut short" in refused(command("finetune.py", "--model", model_folder))
        assert written(work) == []

    @pytest.mark.parametrize("name", ["vocab.json", "config.json", "merges.txt"])
    def test_damaged_text_files_are_an_error(self, command, model_folder, name):
        content = (model_folder / name).read_bytes()
        (model_folder / name).write_bytes(content[: len(content) // 2])
        assert name in refused(command("finetune.py", "--model", model_folder))

    def test_weights_of_a_different_shape_are_an_error(self, command, model_folder, vocabulary, tmp_path):
        other = write_layout(tiny_reference(n_embd=32, n_layer=4), vocabulary, tmp_path / "other", "bare")
        shutil.copy(other / "model.safetensors", model_folder)
        line = refused(command("finetune.py", "--model", model_folder))
        assert "wte.weight has shape (400, 32), not (400, 48)" in line
        assert "h.0.ln_1.weight has shape (32,), not (48,)" in line
        assert "35 more of a different shape" in line
        assert "h.3.attn.c_attn.weight unexpected" in line
        assert "7 more unexpected" in line
        assert len(line) < 2000
        shutil.copy(model_folder / "config.json", other)
        shutil.copy(
            write_layout(tiny_reference(n_layer=1), vocabulary, tmp_path / "o", "bare") / "model.safetensors", other
        )
        line = refused(command("finetune.py", "--model", other))
        assert "h.1.ln_1.weight missing" in line
        assert "19 more missing" in line

    def test_a_vocabulary_of_a_different_model_is_an_error(self, command, vocabulary, tmp_path):
        folder = write_layout(tiny_reference(vocab_size=500), vocabulary, tmp_path / "m", "bare")
        line = refused(command("finetune.py", "--model", folder))
        assert "the vocabulary has 400 tokens and the weights 500" in line

    def test_an_unsupported_configuration_is_an_error(self, command, vocabulary, tmp_path):
        reference = tiny_reference(scale_attn_by_inverse_layer_idx=True, activation_function="relu")
        line = refused(command("finetune.py", "--model", write_layout(reference, vocabulary, tmp_path / "m", "bare")))
        assert "activation_function is 'relu'" in line
        assert "scale_attn_by_inverse_layer_idx is True" in line

    def test_a_pickle_that_would_run_code_is_rejected(self, command, model_folder, tmp_path):
        class Evil:
            def __reduce__(self):
                return (os.system, (f"touch {tmp_path / 'owned'}",))

        (model_folder / "model.safetensors").unlink()
        torch.save({"wte.weight": Evil()}, model_folder / "pytorch_model.bin")
        assert "could run code" in refused(command("finetune.py", "--model", model_folder))
        assert not (tmp_path / "owned").exists()

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("n_inner", "x"),
            ("layer_norm_epsilon", None),
            ("activation_function", []),
            ("n_embd", 1 << 60),
            ("n_head", 5),
        ],
    )
    def test_a_damaged_configuration_is_an_error(self, command, model_folder, key, value):
        config = json.loads((model_folder / "config.json").read_text())
        (model_folder / "config.json").write_text(json.dumps({**config, key: value}))
        line = refused(command("finetune.py", "--model", model_folder))
        assert "is not a supported GPT-2 configuration" in line
        assert key in line or "heads" in line

    @pytest.mark.parametrize("size", [18, 200, 3000])
    def test_a_truncated_pickle_is_an_error(self, command, vocabulary, tmp_path, size):
        folder = write_layout(tiny_reference(), vocabulary, tmp_path / "m", "old bin")
        path = folder / "pytorch_model.bin"
        path.write_bytes(path.read_bytes()[:size])
        assert "pytorch_model.bin is" in refused(command("finetune.py", "--model", folder))

    @pytest.mark.parametrize("number", ["399", -1, None, 1 << 40])
    def test_an_out_of_range_token_id_is_an_error(self, command, model_folder, number):
        path = model_folder / "vocab.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "<|endoftext|>": number}))
        assert "the ids of its vocabulary are not 0 to 399" in refused(command("finetune.py", "--model", model_folder))

    @pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04broken zip"])
    def test_a_damaged_pickle_is_an_error(self, command, model_folder, content):
        (model_folder / "model.safetensors").unlink()
        (model_folder / "pytorch_model.bin").write_bytes(content)
        assert "pytorch_model.bin is" in refused(command("finetune.py", "--model", model_folder))

    def test_an_untied_head_is_an_error(self, command, vocabulary, tmp_path):
        from safetensors.torch import load_file, save_file

        folder = write_layout(tiny_reference(), vocabulary, tmp_path / "m", "head beside")
        tensors = load_file(folder / "model.safetensors")
        save_file({**tensors, "lm_head.weight": tensors["lm_head.weight"] + 1}, folder / "model.safetensors")
        assert "untied output head is not supported" in refused(command("finetune.py", "--model", folder))

    def test_a_duplicate_tensor_is_an_error(self, command, vocabulary, tmp_path):
        from safetensors.torch import load_file, save_file

        folder = write_layout(tiny_reference(), vocabulary, tmp_path / "m", "bare")
        tensors = load_file(folder / "model.safetensors")
        save_file({**tensors, "transformer.ln_f.bias": tensors["ln_f.bias"].clone()}, folder / "model.safetensors")
        assert "ln_f.bias twice" in refused(command("finetune.py", "--model", folder))

    def test_a_max_length_beyond_the_context_is_an_error(self, command, model_folder, work):
        line = refused(command("finetune.py", "--model", model_folder, "--max-length", 129))
        assert "--max-length 129: must be at most 128, the model's context" in line
        assert written(work) == []


class TestPlacesThatCannotBeWritten:
    """Errors found before training. None relies on permissions, because the tests may run as root."""

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--output", "no/such/out.json"], "does not exist; create it or choose another"),
            (["--output", "."], "is not a file that can be replaced"),
            (["--output", "data.json/out.json"], "does not exist"),
            (["--output", "data.json"], "would overwrite data.json, which this run reads"),
            (["--output", "x" * 300], "File name too long"),
            (["--output", "x" * 250], "File name too long"),
            (["--run-dir", "r", "--output", "r"], "the run creates a folder of that name; give a file name"),
            (["--run-dir", "r/s", "--output", "r"], "the run creates a folder of that name; give a file name"),
            (
                ["--run-dir", "r", "--output", "r/settings.json"],
                "settings.json: the run folder gets its own copy",
            ),
            (["--output", "runs"], "--output runs: the run creates a folder of that name; give a file name"),
            (["--output", "runs/tiny-random-1"], "--output runs/tiny-random-1: the run creates a folder of that name"),
            (["--run-dir", "data.json/run"], "cannot create the run folder data.json"),
            (["--run-dir", "full"], "--run-dir full is not empty; choose a new folder"),
        ],
    )
    def test_an_unusable_output_or_run_folder_is_an_error(self, command, work, model_folder, arguments, message):
        (work / "data.json").write_text(DATA)
        (work / "full").mkdir()
        (work / "full" / "model").touch()
        before = written(work)
        done = command("finetune.py", "--model", model_folder, "--data", "data.json", *arguments)
        assert message in refused(done).replace(os.sep, "/")
        assert "training" not in done.stderr
        assert written(work) == before

    def test_a_model_is_not_overwritten(self, command, model_folder):
        line = refused(command("finetune.py", "--model", model_folder, "--output", model_folder / "config.json"))
        assert "which this run reads" in line

    @pytest.mark.slow
    @pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege on Windows")
    def test_links_are_followed_and_a_dangling_one_is_an_error(self, command, work, model_folder):
        """A dangling `runs` is an error, not an endless search. An output that is a link writes its target."""
        (work / "runs").symlink_to(work / "nowhere" / "else")
        assert "cannot create the run folder runs" in refused(command("finetune.py", "--model", model_folder, *QUICK))
        (work / "link.json").symlink_to(work / "target.json")
        options = (*QUICK, "--run-dir", "run", "--output", "link.json")
        assert command("finetune.py", "--model", model_folder, *options).returncode == 0
        assert (work / "link.json").is_symlink()
        assert len(json.loads((work / "target.json").read_text())) == 3

    @pytest.mark.skipif(sys.platform != "linux", reason="closes a pipe in the POSIX way")
    def test_a_closed_output_ends_a_preview_but_not_a_training_run(self, work, model_folder):
        options = shlex.join(["--model", str(model_folder), *map(str, QUICK), "--run-dir", "run"])
        for more, code in (("--preview", 2), ("", 0)):
            script = f'"{sys.executable}" "{PROJECT}/finetune.py" {options} {more} | true; exit ${{PIPESTATUS[0]}}'
            done = subprocess.run(["bash", "-c", script], cwd=work, capture_output=True, text=True, check=False)
            assert done.returncode == code, done.stderr
            assert done.stderr == ("error: output: Broken pipe\n" if code else "")
        assert (work / "run" / "generated_conversations.json").exists()
        log = (work / "run" / "log.txt").read_text()
        assert re.fullmatch(r"[-:\d ]+: standard output was closed; the run continues .*\n", log)

    @pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes")
    def test_file_names_need_not_be_utf8(self, command, work, model_folder):
        name = os.fsdecode(b"caf\xe9")
        done = command("finetune.py", "--model", model_folder, *QUICK, "--run-dir", name, "--output", f"{name}.json")
        assert done.returncode == 0, done.stderr
        settings = json.loads((work / name / "settings.json").read_text())
        assert settings["output"].endswith(f"{name}.json")

    @pytest.mark.slow
    def test_the_source_folder_may_be_deleted_during_the_run(self, work, model_folder, tmp_path):
        """The files of the source folder that the result needs are copied before training."""
        shutil.copytree(model_folder, work / "gone")
        options = ["--model", "gone", "--epochs", "60", "--max-new-tokens", "2", "--run-dir", "run"]
        process = subprocess.Popen(
            [sys.executable, PROJECT / "finetune.py", *options], cwd=work, stdout=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while not (work / "run" / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        shutil.rmtree(work / "gone")
        assert process.wait(timeout=120) == 0
        assert (work / "run" / "model" / "model.safetensors").exists()

    @pytest.mark.skipif(sys.platform != "linux", reason="uses ulimit")
    def test_a_full_disk_leaves_no_partial_file(self, tmp_path, work, model_folder):
        """A limit on file size stands in for a full disk: the error names the file that did not fit."""
        script = f'ulimit -f 100; exec "{sys.executable}" "{PROJECT}/finetune.py" "$@"'
        options = ["--model", str(model_folder), "--epochs", "1", "--run-dir", "run"]
        done = subprocess.run(
            ["bash", "-c", script, "-", *options], cwd=work, capture_output=True, text=True, check=False
        )
        assert "cannot write run/model/model.safetensors" in refused(done)
        assert (work / "run" / "metrics.jsonl").exists()
        assert not [name for name in written(work) if "safetensors" in name or name.endswith(".tmp")]
        assert not (work / "generated_conversations.json").exists()

    @pytest.mark.skipif(sys.platform != "linux", reason="needs a tmpfs")
    def test_a_disk_too_small_for_the_run_is_an_error(self, command, tmp_path, work, model_folder):
        small = tmp_path / "small"
        small.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", small], capture_output=True).returncode:
            pytest.skip("no right to mount a tmpfs")
        try:
            line = refused(command("finetune.py", "--model", model_folder, "--run-dir", small / "run"))
            assert "is too full for the fine-tuned model" in line
            assert written(small) == []
        finally:
            subprocess.run(["umount", small], check=True)


def test_repeated_options_accumulate():
    def paths(*arguments: str) -> list[str]:
        return list(map(str, parse_command_line(FinetuneSettings, arguments).data.paths))

    assert (
        paths("--data", "a", "b") == paths("--data", "a", "--data", "b") == paths("--data=a", "--data=b") == ["a", "b"]
    )
    assert paths("--data", "a", "--seed", "1", "--data", "-", "c") == ["a", "-", "c"]
    settings = parse_command_line(FinetuneSettings, ["--rename", "a=b", "--seed", "1", "--rename=c=d", "--seed", "2"])
    assert settings.data.new_names == {"a": "b", "c": "d"}
    assert settings.training.seed == 2
    assert parse_command_line(EvaluateSettings, ["runs/x", "--data", "a"]).model == "runs/x"


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent the POSIX way")
@pytest.mark.parametrize("script", ["finetune.py", "chat.py", "evaluate.py", "dialogues/__main__.py"])
def test_ctrl_c_during_imports_prints_one_line(command, work, script):
    """Every command imports the settings; this version of them sends the signal to its own process."""
    (work / "settings.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    paths = f"import runpy, sys; sys.path[:0] = ['{work}', '{PROJECT}']\n"
    (work / "start.py").write_text(f"{paths}runpy.run_path('{PROJECT / script}', {{}}, '__main__')\n")
    done = command(work / "start.py")
    assert (done.returncode, done.stderr) == (130, "\nstopped\n")


class TestSettingsFile:
    def test_a_run_can_be_repeated_from_its_settings(self, work, model_folder, monkeypatch):
        monkeypatch.chdir(work)
        options = ("--model", model_folder, *QUICK, "--batch-size", 3, "--watch")
        for each in (options, ("--settings", "runs/tiny-random-1/settings.json")):
            finetune(parse_finetune_settings([*map(str, each)]), RunFacts())
        first, again = (work / "runs" / f"tiny-random-{number}" for number in (1, 2))
        for name in ("settings.json", "metrics.jsonl", "model/model.safetensors"):
            assert (first / name).read_bytes() == (again / name).read_bytes()
        report = (first / "report.html").read_text(encoding="utf-8")
        assert (
            "To repeat this run: <code>python finetune.py --settings runs/tiny-random-1/settings.json</code>" in report
        )

    def test_a_file_with_some_settings_gives_defaults_that_options_override(self, tmp_path):
        path = tmp_path / "mine.json"
        path.write_text('{"training": {"epochs": 4, "seed": 7}, "data": {"mask": true}, "machine": {"gpu": "any"}}')
        settings = parse_finetune_settings(["--settings", str(path), "--epochs", "2"])
        assert (settings.training.epochs, settings.training.seed, settings.data.mask) == (2, 7, True)
        assert settings.training.batch_size == TrainingSettings().batch_size

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            ('{"training": {"epoch": 3}}', "there is no setting epoch; did you mean epochs?"),
            ('{"epochs": 3}', "there is no setting epochs; did you mean epochs in training?"),
            ('{"training": {"epochs": "x"}}', "epochs can't be 'x'"),
            ('{"training": {"epochs": 0}}', "--epochs 0: must be between"),
            ("[]", "does not hold a JSON object; correct it, or leave out --settings"),
        ],
    )
    def test_a_wrong_file_is_refused(self, tmp_path, content, reason):
        path = tmp_path / "mine.json"
        path.write_text(content)
        with pytest.raises(UserError) as refusal:
            parse_finetune_settings(["--settings", str(path)])
        assert reason in str(refusal.value)

    def test_values_made_for_another_model_are_named(self, tmp_path, capsys):
        path = tmp_path / "lora.json"
        path.write_text('{"training": {"learning_rate": 0.002, "epochs": 3, "lora_rank": 8}}')
        parse_finetune_settings(["--settings", str(path), "--lora-rank", "16"])
        assert capsys.readouterr().out == ""
        parse_finetune_settings(["--settings", str(path), "--lora-rank", "0", "--epochs", "5"])
        out = capsys.readouterr().out
        assert out == f"--lora-rank changed; kept from {path}: --learning-rate 0.002\n"

    def test_options_are_checked_together_with_the_file(self, tmp_path):
        path = tmp_path / "mine.json"
        path.write_text('{"generation": {"temperature": 0.7}}')
        assert parse_finetune_settings(["--settings", str(path), "--top-p", "0.9"]).generation.top_p == 0.9
        with pytest.raises(UserError, match="no effect at temperature 0"):
            parse_finetune_settings(["--settings", str(path), "--top-p", "0.9", "--temperature", "0"])

    def test_a_resumed_run_takes_no_other_settings(self):
        with pytest.raises(UserError, match="--settings a.json: a resumed run has its own settings"):
            parse_finetune_settings(["--settings", "a.json", "--resume", "runs/tiny-1"])
