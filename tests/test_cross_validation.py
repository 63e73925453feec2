"""Cross-validation: each fold is an ordinary run, every dialogue is held out once, and a stopped job resumes."""

import gc
import json
import re
import shlex
import subprocess
import sys
import time
import weakref
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from conftest import PROJECT, run_in, tiny_reference, write_layout
from dialogues.split import choose_parts
from evaluation.metrics import t_quantile
from finetune import finetune
from gpt_model import GPTModel
from load_gpt2_weights import load_model
from pipeline.folds import FoldsSummary, cross_validate, estimate, show_summary
from pipeline.job import RunFacts
from pipeline.prepare import open_data, read_data
from pipeline.rates import choose_rates, show_rates, try_rates
from pipeline.run_folder import find_run, resumable
from pipeline.run_settings import parse_finetune_settings
from settings import FinetuneSettings
from support.errors import UserError

EPOCHS = 8
QUICK = ("--max-new-tokens", 2, "--checkpoint-minutes", 0)
RESULTS = ("model/model.safetensors", "metrics.jsonl", "generated_conversations.json", "val_data.txt", "train_data.txt")


@pytest.fixture(scope="module")
def model(tmp_path_factory, vocabulary) -> Path:
    return write_layout(tiny_reference(), vocabulary, tmp_path_factory.mktemp("models") / "small", "bare")


@pytest.fixture(scope="module")
def job(tmp_path_factory, model) -> Path:
    """The folder of an undisturbed cross-validation with three folds."""
    work = tmp_path_factory.mktemp("job")
    done = run_in(work, "finetune.py", "--model", model, "--folds", 3, "--epochs", EPOCHS, *QUICK)
    assert done.returncode == 0, done.stderr
    assert "means of 3 folds" in done.stdout
    assert not (work / "generated_conversations.json").exists()
    return work / "runs" / "small-folds-1"


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parse(model: Path, *options: object) -> FinetuneSettings:
    return parse_finetune_settings(["--model", str(model), *map(str, options)])


def record_and_stop(settings: FinetuneSettings, facts: RunFacts) -> None:
    """Stand in for a run that is stopped after its first step."""
    with resumable(settings.run.resume or settings.run.run_dir):
        raise KeyboardInterrupt(" after step 1 of 9")


@pytest.mark.parametrize(("dialogues", "folds"), [(10, 5), (10, 3), (7, 7), (100, 57), (2, 2)])
def test_every_dialogue_is_held_out_once(dialogues, folds):
    numbers = np.random.default_rng(0).permutation(dialogues)
    folds_of = choose_parts(np.zeros(dialogues, int), numbers, [1] * folds)
    parts = [numbers[folds_of == fold] for fold in range(folds)]
    assert np.concatenate(parts).tolist() == numbers.tolist()
    for held_out in parts:
        assert dialogues // folds <= len(held_out) <= -(-dialogues // folds)


def test_the_folds_of_a_job_partition_its_file(job):
    held_out = "".join((job / f"fold-{fold}" / "val_data.txt").read_text(encoding="utf-8") for fold in (1, 2, 3))
    train, val = ((job / "fold-3" / f"{part}_data.txt").read_text(encoding="utf-8") for part in ("train", "val"))
    assert held_out == train + val  # in file order
    assert held_out.count("<|endoftext|>\n") == 10


def test_a_fold_is_an_ordinary_run(job, model, here):
    """The last of three folds equals an ordinary run with --split 60/40."""
    finetune(parse(model, "--split", "60/40", "--epochs", EPOCHS, *QUICK), RunFacts())
    for name in RESULTS:
        assert (here / "runs/small-1" / name).read_bytes() == (job / "fold-3" / name).read_bytes(), name
        differs = name != "generated_conversations.json"  # replies of two tokens are often equal
        assert not differs or (job / "fold-1" / name).read_bytes() != (job / "fold-3" / name).read_bytes(), name


def test_the_summary_has_means_and_intervals_over_the_folds(job):
    summary = json.loads((job / "folds.json").read_text())
    runs = [json.loads((job / f"fold-{fold}" / "evaluation.json").read_text()) for fold in (1, 2, 3)]
    for column in ("base", "model"):
        loss, values = summary["metrics"][column]["loss"], [run["metrics"][column]["loss"] for run in runs]
        assert loss["values"] == values
        assert loss["mean"] == pytest.approx(np.mean(values))
        assert loss["standard_deviation"] == pytest.approx(np.std(values, ddof=1))
        reach = 4.302653 * np.std(values, ddof=1) / np.sqrt(3)
        assert loss["interval"] == pytest.approx([np.mean(values) - reach, np.mean(values) + reach])
    assert summary["best_epochs"] == [run["overfitting"]["best_epoch"] for run in runs]
    assert summary["median_best_epoch"] == sorted(summary["best_epochs"])[1]
    for column, estimates in summary["metrics"].items():
        assert all(len(each["values"]) == 3 for each in estimates.values())
        assert not set(summary["too_small"][column]) & set(estimates)
    assert "hits_at_1" in summary["too_small"]["model"]


def test_an_interval_equals_a_manual_calculation():
    assert asdict(estimate([1.0, 2.0, 3.0, 6.0])) == {
        "values": [1.0, 2.0, 3.0, 6.0],
        "mean": 3.0,
        "standard_deviation": pytest.approx((14 / 3) ** 0.5),
        "interval": pytest.approx([3 - 3.182446 * (14 / 3 / 4) ** 0.5, 3 + 3.182446 * (14 / 3 / 4) ** 0.5]),
    }


@pytest.mark.parametrize(
    ("freedom", "expected"),  # scipy.stats.t.ppf(0.975, freedom), as in printed tables
    [(1, 12.7062047), (2, 4.3026527), (3, 3.1824463), (4, 2.7764451), (9, 2.2621572), (30, 2.0422725), (99, 1.9842170)],
)
def test_quantiles_equal_those_of_students_distribution(freedom, expected):
    assert t_quantile(freedom) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize(
    ("best", "advice"),
    [([2.0, 3.0, 2.0], "(median 2): --epochs 2 for"), ([0.0, 0.0, 1.0], "a lower"), ([4.0, 3.0, 4.0], "more --epochs")],
)
def test_the_summary_gives_advice_on_epochs(best, advice):
    columns = {name: {"loss": estimate([1.0, 2.0]), "loss_change": estimate([1.0, 2.0])} for name in ("base", "model")}
    summary = FoldsSummary(3, columns, {"base": [], "model": ["hits_at_1"]}, best_epochs=best, last_epoch=4.0)
    assert advice in show_summary(summary)[-1]


@pytest.mark.slow
def test_a_job_that_is_killed_in_its_second_fold_resumes(job, model, here, capsys):
    """The finished fold is kept, the killed one resumes, and the results equal those of an uninterrupted job."""
    folder = here / "broken"
    options = list(map(str, ["--model", model, "--folds", 3, "--epochs", EPOCHS, *QUICK, "--run-dir", folder]))
    process = subprocess.Popen([sys.executable, PROJECT / "finetune.py", *options], stdout=subprocess.DEVNULL)
    while not list(folder.glob("fold-2/checkpoint/step-*.safetensors")):
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not (folder / "folds.json").exists()
    finished = (folder / "fold-1" / "report.html").stat().st_mtime_ns
    cross_validate(parse_finetune_settings(options), finetune)  # the same command
    shown = capsys.readouterr().out
    assert f"already finished: {folder / 'fold-1'}" in shown
    assert "resuming after step" in shown
    assert (folder / "fold-1" / "report.html").stat().st_mtime_ns == finished
    assert (folder / "folds.json").read_bytes() == (job / "folds.json").read_bytes()
    for fold in ("fold-1", "fold-2", "fold-3"):
        for name in RESULTS:
            assert (folder / fold / name).read_bytes() == (job / fold / name).read_bytes(), (fold, name)


def test_a_finished_job_only_rewrites_its_summary(job, capsys):
    def never(settings: FinetuneSettings) -> None:
        raise AssertionError(settings)

    before = (job / "folds.json").read_bytes()
    (job / "folds.json").unlink()
    cross_validate(parse_finetune_settings(["--resume", str(job)]), never)
    assert (job / "folds.json").read_bytes() == before
    assert capsys.readouterr().out.count("already finished: ") == 3
    with pytest.raises(UserError, match="choose one of them, such as .*fold-1"):
        find_run(str(job))


def test_each_model_is_freed_after_its_fold(here, model):
    """This holds even for a reference cycle, such as PyTorch creates with the first optimizer of a process."""
    kept: list[weakref.ref[GPTModel]] = []

    def keep_in_a_ring(settings: FinetuneSettings, facts: RunFacts) -> None:
        assert not [reference for reference in kept if reference()]
        if len(kept) == 2:
            raise KeyboardInterrupt
        loaded = load_model(model)[0]
        loaded.ring = [loaded]
        kept.append(weakref.ref(loaded))

    gc.disable()  # otherwise a collection might run in between
    try:
        with pytest.raises(KeyboardInterrupt):
            cross_validate(parse(model, "--folds", 3), keep_in_a_ring)
    finally:
        gc.enable()
    assert len(kept) == 2


def test_a_stopped_job_prints_how_to_resume_the_whole_job(here, model):
    settings = parse(model, "--folds", 2)
    with pytest.raises(KeyboardInterrupt) as stop:
        cross_validate(settings, record_and_stop)
    assert str(stop.value).startswith(" after step 1 of 9; resume with: ")
    assert str(stop.value).endswith(f" --resume {Path('runs/small-folds-1')}")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--epochs", 2], "--epochs 2: the run has the default"),
        (["--temperature", 1], "--temperature 1.0: the run has 0.0"),
        (["--folds", 3], "--folds 3: the run has 2"),
    ],
)
def test_a_job_can_only_be_resumed_with_the_same_options(here, model, options, problem):
    with pytest.raises(KeyboardInterrupt):
        cross_validate(parse(model, "--folds", 2, "--run-dir", "job"), record_and_stop)
    with pytest.raises(UserError, match=problem):
        parse(model, "--resume", "job", *options)
    folds = [] if "--folds" in options else ["--folds", 2]
    with pytest.raises(UserError, match=problem):
        cross_validate(parse(model, *folds, "--run-dir", "job", *options), finetune)


def test_a_single_fold_cannot_be_resumed_as_a_job(job, model):
    recorded = (job / "fold-1" / "settings.json").read_bytes()
    with pytest.raises(UserError, match="fold-1 is one fold of a cross-validation"):
        cross_validate(parse(model, "--folds", 3, "--run-dir", job / "fold-1"), finetune)
    assert (job / "fold-1" / "settings.json").read_bytes() == recorded


def test_a_job_whose_conversations_have_changed_is_refused(here, model):
    path = here / "data.json"
    path.write_text(json.dumps([{"A": f"one {number}", "B": "two"} for number in range(4)]))
    settings = parse(model, "--folds", 2, "--run-dir", "job", "--data", path)
    with pytest.raises(KeyboardInterrupt):
        cross_validate(settings, record_and_stop)
    path.write_text(json.dumps([{"A": f"one {number}", "B": "three"} for number in range(4)]))
    with pytest.raises(UserError, match="since it began, the conversations have changed"):
        cross_validate(settings, finetune)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--folds", 1], "--folds 1: must be 0, or between 2 and 100"),
        (["--folds", 101], "--folds 101: must be 0, or between 2 and 100"),
        (["--folds", 5, "--split", "80/20"], "--split 80/20: --folds and --try make their own split"),
        (["--try", "learning-rate", "--split", "80/20"], "--folds and --try make their own split"),
        (["--folds", 5, "--preview"], "--preview shows a single run; leave out --folds"),
        (["--folds", 11], "too little data for --folds 11: 10 distinct dialogues with 30 turns"),
        (["--folds", 2, "--max-length", 999], "--max-length 999: must be at most 128, the model's context"),
    ],
)
def test_a_refused_option_leaves_nothing_behind(here, model, options, problem):
    with pytest.raises(UserError, match=problem):
        cross_validate(parse(model, *options, "--run-dir", "job"), finetune)
    assert list(here.iterdir()) == []


class TestTryingLearningRates:
    OPTIONS = ("--try", "learning-rate", "--folds", 2, "--run-dir", "job")

    @pytest.mark.slow
    def test_each_rate_is_cross_validated_and_the_command_for_the_best_is_printed(self, here, model):
        done = run_in(here, "finetune.py", "--model", model, *self.OPTIONS, "--max-steps", 2, *QUICK)
        assert done.returncode == 0, done.stderr
        rates = json.loads((here / "job" / "rates.json").read_text())
        assert list(rates) == ["3e-05", "6e-05", "0.00012", "0.00024", "0.00048"]
        for rate, losses in rates.items():
            folds = json.loads((here / "job" / f"rate-{rate}" / "folds.json").read_text())
            assert folds["metrics"]["model"]["loss"]["values"] == losses
        best = min(rates, key=lambda rate: sum(rates[rate]))
        command = done.stdout.partition("train with the best: ")[2].splitlines()[0].partition("finetune.py ")[2]
        settings = parse_finetune_settings(shlex.split(command))
        assert settings.training.learning_rate == float(best)
        assert (settings.training.max_steps, settings.data.folds, settings.data.try_) == (2, 0, "nothing")

    def test_a_stopped_job_is_resumed_with_all_its_rates(self, here, model):
        settings = parse(model, *self.OPTIONS)
        with pytest.raises(KeyboardInterrupt, match=" --resume job$"):
            try_rates(settings, record_and_stop)
        asked = []

        def stop_later(settings: FinetuneSettings, facts: RunFacts) -> None:
            asked.append(settings)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            try_rates(parse_finetune_settings(["--resume", "job"]), stop_later)
        assert asked[0].training.learning_rate == 3e-5
        assert asked[0].run.run_dir == Path("job/rate-3e-05/fold-1")
        with pytest.raises(UserError, match="--folds 5: the run has 2"):
            try_rates(parse(model, "--try", "learning-rate", "--run-dir", "job"), stop_later)

    def test_a_refused_option_leaves_nothing_behind(self, here, model):
        with pytest.raises(UserError, match="--max-length 999: must be at most 128, the model's context"):
            try_rates(parse(model, *self.OPTIONS, "--max-length", 999), finetune)
        assert list(here.iterdir()) == []

    def test_a_best_rate_at_the_end_of_the_range_is_reported(self):
        losses = {rate: estimate([2 + rate, 2.5 + rate]) for rate in (0.1, 0.2, 0.4)}
        lines = show_rates(losses, FinetuneSettings())
        assert [line.split()[0] for line in lines[2:5]] == ["0.1", "0.2", "0.4"]
        assert lines[2].endswith("the best")
        assert lines[3].endswith("0.100 (0.100 to 0.100)")
        assert lines[5].startswith("0.1 is at the end of the range")
        assert re.fullmatch(r"train with the best: .*finetune.py --learning-rate 0.1", lines[6])

    def test_learning_rates_above_one_are_left_out(self, here, model):
        settings = parse(model, "--learning-rate", 0.6)
        data = read_data(open_data(settings.data), model, settings.data, 1)
        assert choose_rates(settings, data) == (settings, [0.15, 0.3, 0.6])

    def test_the_rates_are_multiples_of_the_default_of_a_single_run(self, here, model, monkeypatch):
        monkeypatch.setattr("training.defaults.MUCH", 100)
        settings = parse(model)
        data = read_data(open_data(settings.data), model, settings.data, 1)
        chosen, rates = choose_rates(settings, data)
        assert (chosen.training.batch_size, chosen.training.schedule) == (8, "linear")
        assert rates == [1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3]

    def test_the_folder_of_a_job_is_not_a_model(self, here):
        (here / "job" / "rate-3e-05" / "fold-1").mkdir(parents=True)
        for name in ("settings.json", "rates.json"):
            (here / "job" / name).write_text("{}")
        with pytest.raises(UserError, match="the runs of a cross-validation; choose one of them, such as .*fold-1"):
            find_run("job")

    def test_indistinguishable_rates_are_reported(self):
        losses = {1e-5: estimate([3.0, 3.1, 3.2]), 2e-5: estimate([2.0, 2.1, 2.2]), 4e-5: estimate([2.1, 2.1, 2.15])}
        lines = show_rates(losses, FinetuneSettings())
        assert lines[5] == "no clear difference between 2e-05 and 4e-05"


def test_several_processes_are_refused(here, model, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without torchrun"):
        cross_validate(parse(model, "--folds", 2), finetune)


def test_a_fold_that_was_killed_before_it_began_starts_again(here, model):
    """The kill comes after its folder is created, before its settings are written."""
    settings = parse(model, "--folds", 2, "--run-dir", "job")
    with pytest.raises(KeyboardInterrupt):
        cross_validate(settings, record_and_stop)
    (here / "job" / "fold-1" / ".lock").touch()
    asked = []

    def stop(settings: FinetuneSettings, facts: RunFacts) -> None:
        asked.append(settings)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cross_validate(settings, stop)
    assert asked[0].run.run_dir == Path("job/fold-1")
    assert list((here / "job" / "fold-1").iterdir()) == []
