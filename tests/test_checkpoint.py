"""A resumed run is bit-identical to one that was never stopped, even if its files were damaged."""

import copy
import json
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_training import make_dataset

import training.loop
from conftest import CPU, fit, logged
from gpt_model import GPTConfig, GPTModel
from models.tiny.build import MuonAndAdamW
from settings import GenerationSettings, RunSettings, TrainingSettings
from support.errors import UserError
from talking.decoder import Decoder
from talking.generation import Bounds, generate
from training import best_weights, checkpoint
from training.optimizer import make_optimizer
from training.pace import Pace
from training.stopping import StopSignals

SETTINGS = TrainingSettings(epochs=3, batch_size=1, learning_rate=1e-2, schedule="cosine", warmup=0.3, seed=5)
EVERY_STEP = RunSettings(checkpoint_minutes=1e-9)


@pytest.fixture
def model() -> GPTModel:
    torch.manual_seed(0)
    return GPTModel(GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=101, n_positions=64), dropout=0.2)


def run(model: GPTModel, folder: Path, settings: TrainingSettings = SETTINGS, **options) -> dict[str, torch.Tensor]:
    """Take nine steps on three dialogues with a copy of `model`, and return its weights."""
    trained = copy.deepcopy(model)
    fit(trained, make_dataset(20, 30, 25), make_dataset(10), settings, folder, **options)
    return trained.state_dict()


def stop_at(monkeypatch, name: str, call: int) -> None:
    """Simulate Ctrl-C at the `call`th call of `training.loop.<name>`."""
    real, calls = getattr(training.loop, name), 0

    def interrupted(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(training.loop, name, interrupted)


def broken_off(model: GPTModel, folder: Path, monkeypatch, name: str, call: int, **options) -> None:
    """Run until Ctrl-C."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="after step"):
        stop_at(patch, name, call)
        run(model, folder, **options)


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_runs_with_different_seeds_differ(model, tmp_path):
    assert not same(run(model, tmp_path / "a"), run(model, tmp_path / "b", replace(SETTINGS, seed=6)))


@pytest.mark.parametrize("make", [make_optimizer, lambda model, settings: MuonAndAdamW(model, settings.weight_decay)])
@pytest.mark.parametrize(("name", "call"), [("take_step", 1), ("take_step", 5), ("evaluate", 3), ("evaluate", 5)])
def test_a_resumed_run_is_bit_identical(model, tmp_path, monkeypatch, make: Callable, name, call):
    """A run stopped before a step or during an evaluation ends with the same weights and the same log."""

    def optimized(folder: Path) -> dict[str, torch.Tensor]:
        trained = copy.deepcopy(model)
        optimizer = make(trained, SETTINGS)
        fit(trained, make_dataset(20, 30, 25), make_dataset(10), SETTINGS, folder, optimizer=optimizer)
        return trained.state_dict()

    unbroken = optimized(tmp_path / "unbroken")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match=r"after step [0-9] of 9"):
        stop_at(patch, name, call)
        optimized(tmp_path / "broken")
    assert same(unbroken, optimized(tmp_path / "broken"))
    metrics = [(tmp_path / folder / "metrics.jsonl").read_bytes() for folder in ("unbroken", "broken")]
    assert metrics[0] == metrics[1]
    assert logged(tmp_path / "broken", "train_loss")[8:]


def test_the_two_newest_checkpoints_are_kept_and_their_cost_is_printed(model, tmp_path, capsys):
    run(model, tmp_path / "run", saving=EVERY_STEP)
    assert [path.name for path in (tmp_path / "run" / "checkpoint").glob("step-*")] == unordered(
        "step-7.safetensors", "step-8.safetensors"
    )
    assert "checkpoint: step 8, " in capsys.readouterr().out


def unordered(*names: str):
    class Unordered(list):
        def __eq__(self, other: object) -> bool:
            return sorted(self) == sorted(other)

        __hash__ = None

    return Unordered(names)


def test_a_kept_checkpoint_resumes_with_more_epochs(model, tmp_path, capsys):
    settings = replace(SETTINGS, schedule="constant", warmup=0)
    long = run(model, tmp_path / "long", settings)
    run(model, tmp_path / "short", replace(settings, epochs=2), saving=RunSettings(keep_checkpoint=True))
    assert same(long, run(model, tmp_path / "short", settings))
    assert "extended from 6 to 9 steps" in capsys.readouterr().out
    assert logged(tmp_path / "short", "train_loss") == logged(tmp_path / "long", "train_loss")


def flip_a_bit(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def cut_short(path: Path, chance: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])


def test_a_damaged_checkpoint_is_removed(model, tmp_path, monkeypatch, capsys):
    """A flipped bit or a cut anywhere in the file is detected, and the previous checkpoint gives the same result."""
    unbroken = run(model, tmp_path / "unbroken")
    broken_off(model, tmp_path / "run", monkeypatch, "take_step", 7, saving=EVERY_STEP)
    newest = tmp_path / "run" / "checkpoint" / "step-6.safetensors"
    whole, metrics = newest.read_bytes(), (tmp_path / "run" / "metrics.jsonl").read_bytes()
    chance = random.Random(0)
    checkpoints = checkpoint.Checkpoints(newest.parent, {"model": "a test's"})
    for damage in [flip_a_bit] * 40 + [cut_short] * 20:
        newest.write_bytes(whole)
        damage(newest, chance)
        with pytest.raises(checkpoint.Damaged):
            checkpoints.read(newest)
    capsys.readouterr()
    assert same(unbroken, run(model, tmp_path / "run"))
    out = capsys.readouterr().out
    assert f"removed a damaged checkpoint: {newest}" in out
    assert "resuming after step 5: " in out
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes().startswith(metrics)


def test_a_run_without_an_intact_checkpoint_starts_again(model, tmp_path, monkeypatch, capsys):
    unbroken = run(model, tmp_path / "unbroken")
    broken_off(model, tmp_path / "run", monkeypatch, "take_step", 7, saving=EVERY_STEP)
    for path in (tmp_path / "run" / "checkpoint").iterdir():
        path.write_bytes(b"")
    assert same(unbroken, run(model, tmp_path / "run"))
    assert capsys.readouterr().out.count("removed a damaged checkpoint") == 2
    assert logged(tmp_path / "run", "train_loss") == logged(tmp_path / "unbroken", "train_loss")


def test_a_log_with_missing_lines_is_reported(model, tmp_path, monkeypatch, capsys):
    broken_off(model, tmp_path, monkeypatch, "take_step", 7)
    (tmp_path / "metrics.jsonl").write_text("")
    run(model, tmp_path)
    assert "metrics.jsonl has lost lines" in capsys.readouterr().out


def test_a_checkpoint_of_a_different_model_run_or_version_is_refused(model, tmp_path, monkeypatch):
    broken_off(model, tmp_path, monkeypatch, "take_step", 4)
    small = GPTModel(GPTConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=101, n_positions=64))
    with pytest.raises(UserError, match="step-3.safetensors belongs to another model"):
        run(small, tmp_path)
    other = checkpoint.Checkpoints(tmp_path / "checkpoint", {"model": "another"})
    with pytest.raises(UserError, match="step-3.safetensors belongs to another run"):
        other.load(model, make_optimizer(model, SETTINGS))
    monkeypatch.setattr(checkpoint, "VERSION", 99)
    with pytest.raises(UserError, match="step-3.safetensors was written by another version"):
        run(model, tmp_path)


def test_a_full_disk_prevents_a_checkpoint_but_does_not_stop_the_run(model, tmp_path, monkeypatch, capsys):
    real, saved = checkpoint.save_file, 0

    def full(*arguments):
        nonlocal saved
        saved += 1
        if saved > 2:
            raise OSError(28, "No space left on device")
        real(*arguments)

    unbroken = run(model, tmp_path / "unbroken")
    monkeypatch.setattr(checkpoint, "save_file", full)
    assert same(unbroken, run(model, tmp_path / "run", saving=EVERY_STEP))
    out = capsys.readouterr().out
    assert "no checkpoint of step 8: cannot write" in out
    assert "No space left on device" in out
    folder = tmp_path / "run" / "checkpoint"
    assert [path.name for path in folder.glob("step-*")] == ["step-2.safetensors"]
    monkeypatch.setattr(checkpoint, "save_file", real)
    assert same(unbroken, run(model, tmp_path / "run"))  # the old checkpoint still loads


class TestWatching:
    """Sampling and dropout are on, so that both use the random generator."""

    @staticmethod
    def reply(model: GPTModel) -> dict[str, str]:
        settings = GenerationSettings(max_new_tokens=8, temperature=1)
        (tokens,) = generate(Decoder(model), [[1, 2, 3]], Bounds(100), settings, 7)
        return {
            "input": "A: 1 2 3",
            "response": "B: 4\x1b\n5",
            "model_response": f"B: {model.wpe.weight.sum()} {tokens * 9}",
        }

    def test_watching_changes_nothing_else(self, model, tmp_path, capsys):
        plain = run(model, tmp_path / "plain")
        shown = len(capsys.readouterr().out.splitlines())
        assert same(plain, run(model, tmp_path / "watched", watch=self.reply))
        lines = (tmp_path / "watched" / "metrics.jsonl").read_text().splitlines()
        assert [line for line in lines if '"watched"' not in line] == (
            (tmp_path / "plain" / "metrics.jsonl").read_text().splitlines()
        )
        values = [json.loads(line) for line in lines]
        pairs = [(a, b) for a, b in pairwise(values) if "watched" in b]
        assert [(a["step"], b["step"], "val_loss" in a) for a, b in pairs] == [(n, n, True) for n in (0, 3, 6, 9)]
        said = [b["watched"] for _, b in pairs]
        assert len(set(said)) > 1  # the reply is the current model's
        out = capsys.readouterr().out.splitlines()
        assert len(out) == shown + 1 + 2 * 4
        place = next(place for place, line in enumerate(out) if line.startswith("step     0"))
        assert out[place + 1 : place + 3] == ["  input      A: 1 2 3", "  true       B: 4\\x1b 5"]
        assert out[place + 3] == f"  generated  {said[0][:96]} ..."

    @pytest.mark.parametrize("call", [1, 2, 3, 4])
    @pytest.mark.parametrize("at", ["watching", "take_step", "save"])
    def test_a_resumed_run_neither_loses_nor_repeats_a_reply(self, model, tmp_path, monkeypatch, at, call):
        run(model, tmp_path / "unbroken", watch=self.reply)
        calls = 0

        def stopped(model: GPTModel) -> dict[str, str]:
            nonlocal calls
            calls += 1
            if calls == call:
                raise KeyboardInterrupt
            return self.reply(model)

        if at == "watching":
            with pytest.raises(KeyboardInterrupt, match="after step"):
                run(model, tmp_path / "run", watch=stopped)
        elif at == "take_step":
            broken_off(model, tmp_path / "run", monkeypatch, at, 2 * call, watch=self.reply)
        else:  # killed: the logs are ahead of the checkpoint
            broken_off(model, tmp_path / "run", monkeypatch, "take_step", 2 * call, watch=self.reply, saving=EVERY_STEP)
            next((tmp_path / "run" / "checkpoint").glob(f"step-{2 * call - 1}.*")).unlink()
        run(model, tmp_path / "run", watch=self.reply)
        metrics = [(tmp_path / folder / "metrics.jsonl").read_bytes() for folder in ("run", "unbroken")]
        assert metrics[0] == metrics[1]
        assert metrics[0].count(b"watched") == 4

    def test_watching_counts_as_evaluation_time(self, model, tmp_path, monkeypatch):
        seconds = []
        measure = training.loop.Trainer.measure

        def noted(self: training.loop.Trainer):
            result = measure(self)
            seconds.append(self.pace.evaluation_seconds)
            return result

        def slowly(model: GPTModel) -> dict[str, str]:
            time.sleep(0.5)
            return self.reply(model)

        monkeypatch.setattr(training.loop.Trainer, "measure", noted)
        run(model, tmp_path / "run", replace(SETTINGS, max_steps=1), watch=slowly)
        assert len(seconds) == 2
        assert min(seconds) >= 0.5


class TestBestWeights:
    """Training on one kind of dialogue makes the model worse at a different kind."""

    SETTINGS = replace(SETTINGS, epochs=40, schedule="constant", early_stopping=2)

    @pytest.fixture(params=[False, True])
    def copies_best(self, request, monkeypatch) -> bool:
        """Whether the best weights stay in main memory until a checkpoint, as on a GPU."""
        monkeypatch.setattr(checkpoint.Checkpoints.__init__, "__defaults__", (True, request.param))
        return request.param

    def test_the_best_weights_are_kept(self, model, tmp_path, capsys, copies_best):
        trained = copy.deepcopy(model)
        state = fit(trained, make_dataset(20, 30, 25), make_dataset(40), self.SETTINGS, tmp_path)
        losses = logged(tmp_path, "val_loss")
        assert len(losses) - 1 - losses.index(min(losses)) == 2
        assert state.step < state.steps == 120
        assert state.after
        assert state.after.val == pytest.approx(min(losses), abs=1e-6)
        measured = training.loop.evaluate(trained, make_dataset(40), 100, CPU)
        assert measured == state.after.val
        assert logged(tmp_path, "kept_step") == [state.kept] == [state.best]
        place = f"epoch {state.best / 3:.4g} (step {state.best} of {state.step})"
        assert f"kept: the weights of {place}, which have the lowest validation loss" in capsys.readouterr().out
        assert bool(list(tmp_path.glob("checkpoint/best-*"))) != copies_best

    def test_keep_last_keeps_the_last_weights(self, model, tmp_path, capsys):
        settings = replace(self.SETTINGS, keep="last")
        last = copy.deepcopy(model)
        state = fit(last, make_dataset(20, 30, 25), make_dataset(40), settings, tmp_path)
        assert state.best < state.step < state.steps
        assert training.loop.evaluate(last, make_dataset(40), 100, CPU) == state.evaluations[-1][1]
        train_loss = training.loop.evaluate(last, make_dataset(20, 30, 25), 100, CPU)
        assert state.after == checkpoint.Losses(train_loss, state.evaluations[-1][1])
        assert logged(tmp_path, "train_set_loss")[-1] == train_loss
        assert "kept" not in capsys.readouterr().out
        assert not list(tmp_path.glob("checkpoint/best-*"))

    def test_the_last_weights_are_kept_if_the_base_model_is_best(self, model, tmp_path, capsys):
        trained = copy.deepcopy(model)
        settings = replace(self.SETTINGS, learning_rate=0.5, max_grad_norm=0, max_steps=2, evaluate_every=1)
        state = fit(trained, make_dataset(20, 30, 25), make_dataset(40), settings, tmp_path)
        assert state.best == 0
        assert training.loop.evaluate(trained, make_dataset(40), 100, CPU) == state.evaluations[-1][1]
        assert "no training step lowered the validation loss of the base model" in capsys.readouterr().out
        assert not logged(tmp_path, "kept_step")

    def test_a_full_disk_loses_the_best_weights_but_does_not_stop_the_run(self, model, tmp_path, monkeypatch, capsys):
        def refuse(*_):
            raise UserError("cannot write best-3.bin: No space left on device")

        monkeypatch.setattr(checkpoint, "save_best", refuse)
        last = copy.deepcopy(model)
        state = fit(last, make_dataset(20, 30, 25), make_dataset(40), self.SETTINGS, tmp_path)
        out = capsys.readouterr().out
        assert "the weights of step 3 are not kept: cannot write best-3.bin: No space left on device" in out
        assert f"kept: the last weights; those of step {state.best} had a lower validation loss" in out
        assert training.loop.evaluate(last, make_dataset(40), 100, CPU) == state.evaluations[-1][1]

    def test_a_copy_of_the_best_weights_survives_a_full_disk(self, model, tmp_path, monkeypatch, capsys):
        def refuse(*_):
            raise UserError("cannot write best-3.bin: No space left on device")

        monkeypatch.setattr(checkpoint, "save_best", refuse)
        monkeypatch.setattr(checkpoint.Checkpoints.__init__, "__defaults__", (True, True))
        trained = copy.deepcopy(model)
        dataset = make_dataset(20, 30, 25)
        state = fit(trained, dataset, make_dataset(40), self.SETTINGS, tmp_path, saving=EVERY_STEP)
        assert "no checkpoint of step 3: cannot write best-3.bin" in capsys.readouterr().out
        assert training.loop.evaluate(trained, make_dataset(40), 100, CPU) == min(loss for _, loss in state.evaluations)

    @pytest.mark.parametrize("damage", [Path.unlink, lambda path: cut_short(path, random.Random(0))])
    def test_the_last_weights_are_kept_if_the_best_are_damaged(self, model, tmp_path, monkeypatch, capsys, damage):
        real = training.loop.Trainer.choose_weights

        def choose(self: training.loop.Trainer) -> None:
            damage(next(tmp_path.glob("checkpoint/best-*")))
            real(self)

        monkeypatch.setattr(training.loop.Trainer, "choose_weights", choose)
        last = copy.deepcopy(model)
        state = fit(last, make_dataset(20, 30, 25), make_dataset(40), self.SETTINGS, tmp_path)
        assert "the best weights are lost: " in capsys.readouterr().out
        assert training.loop.evaluate(last, make_dataset(40), 100, CPU) == state.evaluations[-1][1]

    def test_a_kill_while_the_best_weights_are_written_changes_nothing(self, model, tmp_path, monkeypatch):
        """No checkpoint needs the file that is overwritten, and the resumed run overwrites the leftover file."""
        unbroken = run(model, tmp_path / "unbroken", self.SETTINGS)
        losses = logged(tmp_path / "unbroken", "val_loss")
        writes = sum(loss < min(losses[:place]) for place, loss in enumerate(losses) if place)
        real = best_weights.as_bytes
        for number in (1, writes):
            calls = 0

            def killed(tensor: torch.Tensor, number: int = number):
                nonlocal calls
                calls += 1
                if calls == 5 + (number - 1) * len(list(model.parameters())):
                    raise SystemExit
                return real(tensor)

            folder = tmp_path / f"run-{number}"
            with monkeypatch.context() as patch, pytest.raises(SystemExit):
                patch.setattr(best_weights, "as_bytes", killed)
                run(model, folder, self.SETTINGS, saving=EVERY_STEP)
            assert list(folder.glob("checkpoint/best-*.tmp"))
            assert same(unbroken, run(model, folder, self.SETTINGS, saving=EVERY_STEP))
            assert not list(folder.glob("checkpoint/best-*.tmp"))

    def test_a_resumed_run_keeps_the_same_weights(self, model, tmp_path, monkeypatch, copies_best):
        unbroken = run(model, tmp_path / "unbroken", self.SETTINGS)
        steps = len(logged(tmp_path / "unbroken", "train_loss"))
        broken_off(model, tmp_path / "run", monkeypatch, "take_step", steps, settings=self.SETTINGS, saving=EVERY_STEP)
        assert same(unbroken, run(model, tmp_path / "run", self.SETTINGS))
        assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (
            tmp_path / "unbroken" / "metrics.jsonl"
        ).read_bytes()

    def test_checkpoints_with_damaged_best_weights_are_removed(self, model, tmp_path, monkeypatch, capsys):
        unbroken = run(model, tmp_path / "unbroken", self.SETTINGS)
        broken_off(model, tmp_path / "run", monkeypatch, "take_step", 5, settings=self.SETTINGS, saving=EVERY_STEP)
        best = next((tmp_path / "run" / "checkpoint").glob("best-*"))
        cut_short(best, random.Random(0))
        assert same(unbroken, run(model, tmp_path / "run", self.SETTINGS))
        assert "removed a damaged checkpoint" in capsys.readouterr().out


def test_the_end_of_training_is_recorded(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path / "checkpoint", {})
    assert checkpoints.trained(9) is None
    losses = checkpoint.Losses(1.5, 2.5)
    state = checkpoint.TrainingState(step=9, steps=9, evaluations=[(0, 2.0), (9, 2.5)], before=losses, after=losses)
    checkpoints.mark_trained(state)
    assert checkpoints.trained(9) == state
    assert checkpoints.trained(12) is None  # more epochs
    checkpoints.remove()
    assert not (tmp_path / "checkpoint").exists()
    checkpoints.remove()


def test_max_minutes_sets_the_number_of_steps_once(model, tmp_path, monkeypatch, capsys):
    """The schedule uses that number, and a resumed run keeps it."""
    settings = replace(SETTINGS, epochs=10**6, schedule="linear", max_minutes=0.02)
    run(model, tmp_path / "run", settings)
    pace = json.loads((tmp_path / "run" / "pace.json").read_text())
    steps = len(logged(tmp_path / "run", "train_loss"))
    assert 5 < steps == pace["steps"] < 10**5
    out = capsys.readouterr().out
    assert "s per step; time limit: 0.02 minutes" in out
    assert f"enough time for {steps} of 3000000 steps" in out

    broken_off(model, tmp_path / "broken", monkeypatch, "take_step", 3, settings=settings)
    (tmp_path / "broken" / "pace.json").write_text(json.dumps(pace))
    broken_off(model, tmp_path / "broken", monkeypatch, "take_step", pace["measured"] - 1, settings=settings)
    weights = run(model, tmp_path / "broken", settings)
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "pace.json").write_text(json.dumps(pace))
    assert same(weights, run(model, tmp_path / "again", settings))
    assert len(logged(tmp_path / "broken", "train_loss")) == steps


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no such signal")
def test_a_second_hangup_does_not_interrupt_a_step(monkeypatch):
    monkeypatch.setattr("training.stopping.ending_signals", lambda: [signal.SIGHUP])
    done = False
    with pytest.raises(KeyboardInterrupt), StopSignals(CPU) as signals, signals.whole():
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
        done = True
    assert done


def test_all_processes_set_the_number_of_steps_from_the_measurements_of_the_first(tmp_path):
    words: list[str] = []

    def agree(word: str) -> str:
        words.append(word)
        return words[0]

    machine = SimpleNamespace(agree=agree, primary=False)
    progress = SimpleNamespace(step_seconds=[1.0] * 5, say=print, bar=SimpleNamespace(total=0))
    found = set()
    for evaluation_seconds in (300, 2):  # only the first generates the replies of --watch
        pace = Pace(tmp_path, TrainingSettings(max_minutes=60), 100, machine)
        pace.evaluation_seconds = evaluation_seconds
        state = checkpoint.TrainingState(step=5, steps=10**6)
        pace.measure(state, progress)
        found.add(state.steps)
    assert len(found) == 1
    assert 5 < found.pop() < 10**4


def test_a_signal_after_the_last_step_waits_until_the_model_is_saved(model, tmp_path, monkeypatch):
    """Otherwise progress since the last checkpoint would be lost."""
    settings = replace(TestBestWeights.SETTINGS, max_steps=9)
    saved = False

    def choose(self: training.loop.Trainer) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(training.loop.Trainer, "choose_weights", choose)
    with pytest.raises(KeyboardInterrupt), StopSignals(CPU) as signals:
        setup = training.loop.TrainingSetup(
            model=model,
            optimizer=make_optimizer(model, settings),
            examples=training.loop.Examples(make_dataset(20, 30, 25), make_dataset(10), 100),
            settings=settings,
            saving=RunSettings(),
            machine=CPU,
            checkpoints=checkpoint.Checkpoints(tmp_path / "checkpoint", {}),
        )
        training.loop.train(training.loop.Trainer(setup), signals)
        saved = True
    assert saved


def test_a_damaged_pace_file_is_refused(model, tmp_path):
    (tmp_path / "pace.json").write_text('{"measured": 5, "steps": "x"}')
    with pytest.raises(UserError, match="pace.json is damaged; delete it to set the number of steps again"):
        run(model, tmp_path, replace(SETTINGS, max_minutes=1))


def test_a_second_signal_ends_the_run_at_once(model):
    with pytest.raises(SystemExit) as stopped, StopSignals(CPU) as signals, signals.whole():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    assert stopped.value.code == 130
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_damaged_trained_json_is_refused(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path, {})
    for content in ("{}", "[]", '{"before": 3}', '{"before'):
        (tmp_path / "trained.json").write_text(content)
        with pytest.raises(UserError, match="delete it to resume the run from its checkpoint"):
            checkpoints.trained(3)


def test_an_intact_checkpoint_exists_at_every_moment(model, tmp_path, monkeypatch):
    """This holds even after a damaged checkpoint was found."""
    broken_off(model, tmp_path, monkeypatch, "take_step", 7, saving=EVERY_STEP)
    (tmp_path / "checkpoint" / "step-6.safetensors").write_bytes(b"")
    real = checkpoint.save_file

    def watched(*arguments):
        checkpoints = checkpoint.Checkpoints(tmp_path / "checkpoint", {"model": "a test's"})
        for path in checkpoints.paths():
            checkpoints.read(path)  # raises Damaged
        assert checkpoints.paths()
        real(*arguments)

    monkeypatch.setattr(checkpoint, "save_file", watched)
    run(model, tmp_path, saving=EVERY_STEP)
