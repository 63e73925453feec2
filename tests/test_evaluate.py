"""The evaluation at the end of a run and evaluate.py: their output, their agreement, and their errors."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import CPU, PROJECT, bundled_dialogues, logged, refused, run_in, tiny_reference, write_layout, written
from dialogues.conversations import Conversations
from dialogues.dialogue import Dialogue, Turn
from dialogues.reading import open_source
from dialogues.template import Renderer, render
from evaluation.comparison import Column, compare, measure_column
from evaluation.findings import find_out, measure_overfitting, short_table
from evaluation.metrics import Estimate
from evaluation.results import Evaluation, Metrics, Options, Origin, Size, TooFew
from evaluation.run_files import Losses, Point, read_losses
from hub.find import BUNDLED
from load_gpt2_weights import load_model
from pipeline.measure import write_evaluation
from pipeline.prepare import Data, read_turns
from pipeline.subject import Scope, choose_subject
from settings import GenerationSettings
from support.errors import UserError
from talking.decoder import Decoder

ORIGIN = Origin("model", None, "chats.json", "cpu", "fp32")
QUICK = ("--epochs", 2, "--max-new-tokens", 12, "--precision", "fp32")
METRICS = {
    *("loss", "perplexity", "bits_per_byte", "loss_by_part", "loss_by_speaker", "loss_by_turn", "loss_change"),
    *(
        "context_use",
        "context_use_by_turns",
        "context_use_of_other_history",
        "context_use_beyond_other",
        "hits_at_1",
        "chance_hits_at_1",
        "voice",
        "chance_voice",
    ),
    *("distinct_1", "distinct_2", "repetition", "words_per_reply"),
    *("empty_replies", "chrf", "bleu", "copied_5grams", "longest_copied_span", "intervals", "too_small"),
}
OTHERS = [
    {"Anna": f"Is it number {number}?", "Cem": f"No, it is {number + 1}.", "Tom": "I don't think so at all."}
    for number in range(12)
]


def evaluation(folder: Path) -> dict:
    return json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def finished(vocabulary, tmp_path_factory) -> Path:
    """A folder with a model, a finished run that started from it, and other conversations."""
    folder = tmp_path_factory.mktemp("finished")
    base = write_layout(tiny_reference(), vocabulary, folder / "base", "bare")
    done = run_in(folder, "finetune.py", "--model", base, *QUICK, "--run-dir", "runs/first")
    assert done.returncode == 0, done.stderr
    (folder / "others.json").write_text(json.dumps(OTHERS), encoding="utf-8")
    return folder


@pytest.fixture
def work_in(finished, work) -> Path:
    """A copy of the `finished` folder in which commands run."""
    shutil.copytree(finished, work, dirs_exist_ok=True)
    return work


class TestTheEndOfARun:
    def test_a_run_measures_every_metric_before_and_after_training(self, finished):
        run = finished / "runs" / "first"
        found = evaluation(run)
        base, model, true = (found["metrics"][name] for name in ("base", "model", "true_replies"))
        assert set(model) == METRICS
        assert set(base) == METRICS - {"loss_change"}
        assert {"distinct_1", "repetition", "copied_5grams"} <= set(true)
        assert "loss" not in true
        assert found["data"]["dialogues"] == {"train": 7, "val": 3}
        assert (found["data"]["part"], found["data"]["replies"], found["data"]["answers"]) == ("val", 3, 3)
        assert found["settings"]["seed"] == 123
        assert found["settings"]["chrf"].startswith("nrefs:1|")
        assert [case["place"] for case in found["cases"]] == [8, 9, 10]
        for name in ("loss.png", "context_use.png", "report.html"):
            assert (run / name).stat().st_size > 1000

    def test_the_losses_equal_those_of_training(self, finished):
        run = finished / "runs" / "first"
        found, losses = evaluation(run)["metrics"], logged(run, "val_loss")
        assert found["base"]["loss"] == pytest.approx(losses[0], rel=1e-6)
        assert found["model"]["loss"] == pytest.approx(losses[-1], rel=1e-6)
        assert found["model"]["loss_change"] == pytest.approx(losses[-1] - losses[0], rel=1e-4)
        assert found["model"]["loss_by_part"]["val"]["loss"] == found["model"]["loss"]
        low, high = found["model"]["intervals"]["loss"]
        assert low < found["model"]["loss"] < high
        assert evaluation(run)["overfitting"]["last_val_loss"] == losses[-1]

    def test_the_cases_equal_those_of_the_output(self, finished):
        run = finished / "runs" / "first"
        output = json.loads((run / "generated_conversations.json").read_text(encoding="utf-8"))
        for case, texts in zip(evaluation(run)["cases"], output, strict=True):
            for name in ("input", "response"):
                assert " ".join(f"{turn['speaker']}: {turn['text']}" for turn in case[name]) == texts[name]
            assert case["model_response"][0]["text"] in texts["model_response"]
            assert all("copied" in turn for turn in case["model_response"] + case["base_response"])

    def test_a_run_prints_the_main_metrics_and_the_findings(self, command, work, model_folder):
        done = command("finetune.py", "--model", model_folder, *QUICK, "--run-dir", "run")
        assert done.returncode == 0, done.stderr
        found = evaluation(work / "run")
        table = done.stdout[done.stdout.index("base model") :]
        assert f"{found['metrics']['model']['loss']:.3f}" in table
        assert all(finding in table for finding in found["findings"])
        assert "only 3 dialogues were measured" in found["findings"][-1]

    @pytest.mark.slow
    def test_a_resumed_run_measures_a_damaged_base_again(self, command, work, model_folder):
        options = ("--model", model_folder, *QUICK, "--keep-checkpoint", "--run-dir", "run")
        assert command("finetune.py", *options).returncode == 0
        base = evaluation(work / "run")["metrics"]["base"]
        (work / "run" / "base_evaluation.json").write_text("{")
        done = command("finetune.py", "--resume", "run", "--epochs", 3)
        assert done.returncode == 0, done.stderr
        found = evaluation(work / "run")["metrics"]
        assert found["base"] == base
        assert found["model"]["loss"] == pytest.approx(logged(work / "run", "val_loss")[-1], rel=1e-6)

    @pytest.mark.slow
    def test_a_run_with_adapters_speaker_tokens_and_a_test_part_is_measured(self, command, work, model_folder):
        options = ("--lora-rank", 2, "--template", "tokens", "--split", "50/20/30", "--learn", "Bob")
        done = command("finetune.py", "--model", model_folder, *QUICK, *options, "--run-dir", "run")
        assert done.returncode == 0, done.stderr
        found = evaluation(work / "run")
        assert found["data"]["part"] == "test"
        assert list(found["metrics"]["model"]["loss_by_part"]) == ["train", "val", "test"]
        assert list(found["metrics"]["model"]["loss_by_speaker"]) == ["Bob"]
        assert found["metrics"]["base"]["loss_by_part"]["val"]["loss"] == pytest.approx(
            logged(work / "run", "val_loss")[0], rel=1e-6
        )
        assert all(len(case["model_response"]) == 1 for case in found["cases"])
        # The merged model, and the base without rows for the new tokens, give the same numbers.
        done = command("evaluate.py", "run", "--report-dir", "again")
        assert done.returncode == 0, done.stderr
        for name in ("base", "model"):
            once, again = (evaluation(work / folder)["metrics"][name] for folder in ("run", "again"))
            for key in ("loss", "context_use", "bits_per_byte"):
                assert again[key] == pytest.approx(once[key], rel=1e-3), (name, key)


class TestEvaluate:
    def test_evaluating_a_run_again_gives_the_same_numbers(self, command, work_in):
        run = work_in / "runs" / "first"
        before, page = evaluation(run), (run / "report.html").read_bytes()
        (run / "evaluation.json").unlink()
        (run / "report.html").unlink()
        done = command("evaluate.py")  # by default, the newest run
        assert done.returncode == 0, done.stderr
        assert "the 3 held out by the run (val)" in done.stdout
        after = evaluation(run)
        for name, column in before["metrics"].items():
            for key, value in column.items():
                if isinstance(value, float) and not key.startswith("context_use"):  # these are measured on more replies
                    assert after["metrics"][name][key] == pytest.approx(value, rel=1e-5, abs=1e-9), (name, key)
        assert (before["data"]["replies"], after["data"]["replies"]) == (3, 6)
        assert after["cases"] == before["cases"]
        assert after["overfitting"] == before["overfitting"]
        assert len(page) == pytest.approx(len((run / "report.html").read_bytes()), rel=0.05)

    def test_a_run_is_measured_on_other_conversations(self, command, work_in):
        done = command("evaluate.py", "runs/first", "--data", "others.json", "--base", "base", "--cases", 1)
        assert done.returncode == 0, done.stderr
        assert (
            "speakers: the data has Anna, Cem, Tom, but the model was trained with Alex, Bob;"
            " to measure them under the model's names: --rename Anna=Alex Cem=Bob" in done.stdout
        )
        found = evaluation(work_in / "runs" / "first-evaluation-1")
        assert (found["data"]["part"], found["data"]["dialogues"]) == ("all", {"all": 12})
        assert found["metrics"]["model"]["hits_at_1"] is not None
        assert 1 / 20 <= found["metrics"]["model"]["chance_hits_at_1"] < 1 / 10
        assert found["data"]["answers"] == 12
        assert len(found["cases"]) == 1
        assert found["overfitting"] is None
        assert (work_in / "runs" / "first-evaluation-1" / "report.html").exists()
        assert sorted(path.name for path in (work_in / "runs").iterdir()) == ["first", "first-evaluation-1"]

    def test_a_model_folder_is_measured_without_a_base(self, command, work_in):
        done = command("evaluate.py", "base", "--data", "others.json", "--report-dir", "deep/er", "--dialogues", 5)
        assert done.returncode == 0, done.stderr
        found = evaluation(work_in / "deep" / "er")
        assert set(found["metrics"]) == {"model", "true_replies"}
        assert "copied_5grams" not in found["metrics"]["model"]
        assert found["base_model"] is None
        assert found["data"]["dialogues"] == {"all": 5}
        assert "fine-tuned" not in done.stdout

    def test_a_base_that_has_changed_is_left_out(self, command, work_in):
        config = json.loads((work_in / "base" / "config.json").read_text())
        settings = json.loads((work_in / "runs" / "first" / "settings.json").read_text())
        settings["model"]["name"] = str(work_in / "base")  # the run was copied with its model
        (work_in / "runs" / "first" / "settings.json").write_text(json.dumps(settings))
        (work_in / "base" / "config.json").write_text(json.dumps({**config, "layer_norm_epsilon": 1e-4}))
        done = command("evaluate.py", "runs/first")
        assert done.returncode == 0, done.stderr
        assert f"base model: left out ({work_in / 'base'} has changed since)" in done.stdout
        assert set(evaluation(work_in / "runs" / "first")["metrics"]) == {"model", "true_replies"}

    @pytest.mark.slow
    def test_speakers_without_a_token_need_other_names(self, command, work_in):
        options = ("--model", "base", *QUICK, "--max-steps", 1, "--template", "tokens", "--run-dir", "runs/tokens")
        assert command("finetune.py", *options).returncode == 0
        (work_in / "two.json").write_text(json.dumps([{"Anna": "Hi there.", "Cem": "Oh, hello!"}] * 4))
        message = refused(command("evaluate.py", "runs/tokens", "--data", "two.json"))
        assert "--rename Anna=Alex Cem=Bob" in message
        done = command("evaluate.py", "runs/tokens", "--data", "two.json", "--rename", "Anna=Alex", "Cem=Bob")
        assert done.returncode == 0, done.stderr

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["nothing"], "no model nothing: it is not a folder"),
            (["runs/first", "--data", "missing.json"], "missing.json"),
            (["runs/first", "--base", "tiny"], "its vocabulary differs from"),
            (["runs/first", "--base", "tiny", "--report-dir", "new/report"], "its vocabulary differs from"),
            (["runs/first", "--dialogues", "0"], "--dialogues 0: must be between 1 and 1e9"),
            (["runs/first", "--report-dir", "others.json"], "cannot write others.json"),
            (["runs/first", "--data", "others.json", "--learn", "Zoe"], "--learn Zoe"),
            (["base", "--data", "others.json", "--report-dir", "runs/first"], "belongs to another run"),
            (
                ["runs/first", "--template", "tokens", "--report-dir", "runs/first"],
                "the model has no speaker tokens",
            ),
            (["runs/first", "--max-length", "5000"], "--max-length 5000: must be at most 128, the model's context"),
        ],
    )
    def test_an_error_takes_one_line_and_writes_nothing(self, command, work_in, arguments, message):
        before = written(work_in)
        assert message in refused(command("evaluate.py", *arguments))
        assert written(work_in) == before

    @pytest.mark.slow
    def test_training_conversations_are_left_out(self, command, work_in):
        """Measure the run's model folder on a copy of the run's data file."""
        shutil.copy(PROJECT / "llm_train_text.json", work_in / "copy.json")
        done = command("evaluate.py", "runs/first/model", "--data", "copy.json", "--base", "none")
        assert done.returncode == 0, done.stderr
        assert "left out: 7 of 10 dialogues, because the model was trained on them" in done.stdout
        again = evaluation(work_in / "runs" / "first-evaluation-1")
        held_out = evaluation(work_in / "runs" / "first")["metrics"]["model"]["loss"]
        assert again["metrics"]["model"]["loss"] == pytest.approx(held_out, rel=1e-5)
        trained = json.loads((work_in / "copy.json").read_text(encoding="utf-8"), object_pairs_hook=list)[:7]
        turns = [{"turns": [{"speaker": name, "text": text} for name, text in each]} for each in trained]
        (work_in / "copy.json").write_text(json.dumps(turns), encoding="utf-8")
        assert "was trained on all of these" in refused(command("evaluate.py", "runs/first", "--data", "copy.json"))

    def test_several_processes_are_refused(self, command, work_in):
        assert "start it without torchrun" in refused(command("evaluate.py", WORLD_SIZE="2"))

    @pytest.mark.parametrize(("value", "where"), [(np.nan, "huge/model.safetensors: wte.weight"), (1e38, "huge: ")])
    def test_a_model_with_nan_or_huge_weights_is_refused(self, command, work, vocabulary, value, where):
        reference = tiny_reference()
        torch.nn.init.constant_(reference.transformer.wte.weight, value)
        write_layout(reference, vocabulary, work / "huge", "bare")
        (work / "others.json").write_text(json.dumps(OTHERS))
        before = written(work)
        assert where in refused(command("evaluate.py", "huge", "--data", "others.json"))
        assert written(work) == before

    def test_an_error_names_the_damaged_file(self, command, work_in):
        run = work_in / "runs" / "first"
        dialogue = json.loads((run / "model" / "dialogue.json").read_text())
        for change in (
            {"template": "bogus"},
            {"template": 5},
            {"template": ["prompt"]},
            {"speakers": 5},
            {"speakers": [1]},
            {"learn": None},
        ):
            (run / "model" / "dialogue.json").write_text(json.dumps({**dialogue, **change}))
            assert "dialogue.json" in refused(command("evaluate.py", "runs/first", "--data", "others.json"))
        (run / "model" / "dialogue.json").write_text(json.dumps(dialogue))
        settings = json.loads((run / "settings.json").read_text())
        for group, name, value in (
            ("generation", "cases", "3"),
            ("training", "precision", "fp99"),
            ("data", "rename", 1),
        ):
            changed = {**settings, group: {**settings[group], name: value}}
            (run / "settings.json").write_text(json.dumps(changed))
            assert f"({name} can't be {value!r})" in refused(command("evaluate.py"))

    def test_a_changed_or_unfinished_run_is_refused(self, command, work_in):
        run = work_in / "runs" / "first"
        settings = json.loads((run / "settings.json").read_text())
        shutil.copy(settings["data"]["paths"][0], work_in / "data.json")
        changed = (work_in / "data.json").read_text(encoding="utf-8").replace("coffee", "tea")
        (work_in / "data.json").write_text(changed, encoding="utf-8")
        settings["data"]["paths"][0] = str(work_in / "data.json")
        (run / "settings.json").write_text(json.dumps(settings))
        assert "has changed since runs/first was trained on it" in refused(command("evaluate.py", "runs/first"))
        (run / "settings.json").write_text(json.dumps({**settings, "newer": {"option": 1}}))
        assert "settings of another version of the program (there is no setting newer)" in refused(
            command("evaluate.py")
        )
        (run / "generated_conversations.json").unlink()
        assert "finetune.py --resume runs/first" in refused(command("evaluate.py", "runs/first"))
        assert "there is no finished run in runs/" in refused(command("evaluate.py"))


def make_subject(dialogues: list[Dialogue], template: str = "prompt"):
    model, tokenizer = load_model(BUNDLED)
    conversations = Conversations.of(Renderer(tokenizer, template), dialogues)
    source = open_source(BUNDLED.parent.parent / "llm_train_text.json")
    data = Data([source], conversations, {"all": np.arange(len(dialogues))})
    generation = GenerationSettings(max_new_tokens=10)
    return model, choose_subject(data, None, CPU, Scope(512, 100, 100, 3, generation, 1))


def test_an_evaluation_counts_empty_replies(tmp_path, capsys):
    model, subject = make_subject(bundled_dialogues()[:4])
    column = measure_column(Decoder(model), subject, whole=True)
    silent = [case._replace(written=(Turn("Bob", ""),)) for case in column.written]
    write_evaluation({"model": replace(column, written=silent)}, ORIGIN, subject, tmp_path, None)
    found = evaluation(tmp_path)["metrics"]["model"]
    assert found["empty_replies"] == len(silent)
    assert (found["distinct_1"], found["repetition"], found["chrf"]) == (None, None, 0)
    assert set(found["too_small"]) >= {"distinct_1", "distinct_2", "repetition"}
    assert f"empty replies: {len(silent)}" in capsys.readouterr().out
    assert (tmp_path / "report.html").exists()


def test_an_evaluation_of_one_dialogue_says_why_metrics_are_missing(tmp_path):
    model, subject = make_subject(bundled_dialogues()[:1])
    write_evaluation({"model": measure_column(Decoder(model), subject)}, ORIGIN, subject, tmp_path, None)
    found = evaluation(tmp_path)["metrics"]["model"]
    assert found["context_use_of_other_history"] is None
    assert found["hits_at_1"] is None
    assert "needs 9 other replies, but there are 0" in found["too_small"]["hits_at_1"]
    assert "loss" not in found["intervals"]
    assert found["loss"] > 0


def test_a_column_survives_a_round_trip_through_its_file():
    model, subject = make_subject(bundled_dialogues()[:3])
    column = measure_column(Decoder(model), subject)
    again = Column.from_json(json.loads(json.dumps(column.to_json())))
    assert again.written == column.written
    assert compare({"model": again}, subject) == compare({"model": column}, subject)


def test_a_nan_metric_is_written_as_null():
    nan = Estimate(math.nan, [math.nan, 1.0])
    values = Metrics(loss=Estimate(2.0), bits_per_byte=nan, loss_by_turn={"1": nan}, hits_at_1=TooFew("more")).to_json()
    again = json.loads(json.dumps(values, allow_nan=False))
    assert (again["bits_per_byte"], again["loss_by_turn"]) == (None, {"1": None})
    assert again["intervals"] == {"bits_per_byte": [None, 1.0], "loss_by_turn": {"1": [None, 1.0]}}
    assert Metrics.from_json(again).numbers() == {"loss": Estimate(2.0)}
    assert Metrics.from_json(again).too_small() == {"hits_at_1": "more"}


def test_a_model_with_infinite_logits_is_not_measured():
    model, subject = make_subject(bundled_dialogues()[:3])
    written = measure_column(Decoder(model), subject).written
    torch.nn.init.constant_(model.wte.weight, 1e38)
    with pytest.raises(UserError, match="the model's logits are NaN or infinite"):
        measure_column(Decoder(model), subject, written)


@pytest.mark.parametrize("template", ["prompt", "labels", "tokens", "alpaca"])
def test_the_training_dialogues_are_read_from_the_run_folder(template, tmp_path):
    _, tokenizer = load_model(BUNDLED)
    dialogues = [*bundled_dialogues(), Dialogue((Turn("Ann", "Two\n\nlines, ### Bob:"), Turn("Bo", "Yes.")), "")]
    renderer = Conversations.of(Renderer(tokenizer, template), dialogues).renderer
    path = tmp_path / "train_data.txt"
    path.write_text("".join(render(dialogue, template) + "\n" for dialogue in dialogues), encoding="utf-8")
    found = list(read_turns(path, renderer, ["Alex", "Bob", "Ann", "Bo"]))
    assert len(found) == len(dialogues)
    for texts, dialogue in zip(found, dialogues, strict=True):
        read = " ".join(texts)
        assert all(turn.text in read for turn in dialogue.turns)
        assert any(text.strip().endswith(dialogue.turns[1].text) for text in texts)


BEYOND = {"context_use_beyond_other": [0.2, 0.4]}


class TestFindings:
    def losses(self, *values: float, train: tuple[float, float] = (3.0, 1.0)) -> Losses:
        val = [Point(10 * place, float(place), value) for place, value in enumerate(values)]
        ends = [Point(0, 0.0, train[0]), Point(val[-1].step, val[-1].epoch, train[1])]
        return Losses(val=val, train_set=ends)

    def evaluation(self, losses: Losses, **changes) -> Evaluation:
        model = {
            "loss": 2.0,
            "context_use": 0.5,
            "context_use_beyond_other": 0.3,
            "hits_at_1": 0.4,
            "chance_hits_at_1": 0.05,
            "empty_replies": 0.0,
            "repetition": 0.0,
            "distinct_2": 0.9,
            "copied_5grams": 0.31,
            "loss_change": -0.5,
            "longest_copied_span": {"words": 12, "text": "", "dialogue": 4},
            "context_use_by_turns": {"1": 0.4},
            "intervals": {"context_use": [0.4, 0.6], "hits_at_1": [0.3, 0.5], "loss_change": [-0.6, -0.4]} | BEYOND,
            "too_small": {},
            **changes,
        }
        true = Metrics(repetition=Estimate(0.0), distinct_2=Estimate(0.95), copied_5grams=Estimate(0.02))
        return Evaluation(
            origin=ORIGIN,
            size=Size("val", {"val": 300}, replies=3, answers=3),
            options=Options(123, "prompt", "all", 512, 64, GenerationSettings(), {}),
            metrics={"model": Metrics.from_json(model), "base": Metrics(loss=Estimate(2.5)), "true_replies": true},
            cases=[],
            overfitting=measure_overfitting(losses),
        )

    def test_findings_state_the_conclusions_that_numbers_support(self):
        losses = self.losses(2.5, 2.2, 1.9, 1.95, 2.0)
        assert find_out(self.evaluation(losses), losses) == [
            "validation loss was lowest after epoch 2 (1.900) and higher in the 2 evaluations since: --keep"
            " best would keep better weights",
            "the gap between training and validation loss grew from −0.500 to 1.000: the model is starting to overfit",
            "fine-tuning lowered the loss on these conversations from 2.500 to 2.000, by 0.500 [0.400, 0.600]",
            "the dialogue so far lowers the loss of a reply by 0.500 nats per token [0.400, 0.600], 80% of it with the"
            " last turn alone; that is 0.300 [0.200, 0.400] more than another dialogue's history does",
            "the model ranks the true reply first 40% of the time [30%, 50%]; chance is 5%",
            "31% of the generated 5-grams occur in the training data (true replies: 2%); the longest copy has 12 words,"
            " from training dialogue 4",
        ]

    def test_findings_state_the_questions_that_numbers_leave_open(self):
        losses = self.losses(2.5, 2.4, train=(2.5, 2.4))
        intervals = {"context_use": [-0.1, 0.6], "hits_at_1": [0.0, 0.5], "loss_change": [-0.6, 0.1]}
        found = find_out(self.evaluation(losses, intervals=intervals, empty_replies=1.0, repetition=0.3), losses)
        assert "which may be chance: −0.500 [−0.600, 0.100]" in found[0]
        assert found[1].startswith("it is unclear whether the model uses the dialogue so far")
        assert found[2].endswith("so it may be guessing")
        assert found[3] == "empty replies: 1"
        assert found[4].startswith("the model repeats itself: 30%")

    def test_findings_treat_the_kept_evaluation_as_the_last(self):
        losses = self.losses(2.5, 1.9, 2.0, 2.1)
        losses.kept_step, losses.kept_train_set = 10, 1.5
        found = measure_overfitting(losses)
        assert found is not None
        assert (found.best_step, found.last_val_loss) == (10, 1.9)
        assert found.gap == pytest.approx(0.4)
        assert find_out(self.evaluation(losses), losses)[0] == (
            "validation loss was lowest after epoch 1 (1.900); these weights are kept, so this loss is slightly"
            " optimistic (--split 80/10/10 measures on a separate test part)"
        )

    def test_findings_without_a_run_say_nothing_about_training(self):
        losses = read_losses([])
        assert measure_overfitting(losses) is None
        assert find_out(self.evaluation(losses), losses)[0].startswith("fine-tuning")

    def test_the_short_table_has_only_measured_metrics(self):
        table = short_table({"model": Metrics(loss=Estimate(2.0, [1.5, 2.5]))})
        assert table[0] == ""
        assert table[1].split() == ["the", "model"]
        assert table[2].startswith("Loss ")
        assert "2.000 (1.500 to 2.500)" in table[2]
        assert len(table) == 3  # no rows for metrics that were not measured
