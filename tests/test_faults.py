"""Runs that are killed, stopped, started twice, or resumed with something changed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from conftest import PROJECT, refused, tiny_reference, write_layout
from hub.find import BUNDLED, weights_checksum
from load_gpt2_weights import load_model
from pipeline.job import RunFacts
from pipeline.run_folder import lock_run_folder
from pipeline.run_settings import (
    Record,
    check_record,
    parse_finetune_settings,
    read_facts,
    read_settings,
    write_settings,
)
from settings import FinetuneSettings, ModelSettings
from support.errors import UserError
from support.files import write_json

RUN = ("--epochs", 8, "--dropout", 0.1, "--max-new-tokens", 200)  # 32 steps
RESULTS = ("model/model.safetensors", "metrics.jsonl", "generated_conversations.json", "train_data.txt")
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")


def start(work: Path, *arguments: object, **options) -> subprocess.Popen[str]:
    """Start the command in the background."""
    return subprocess.Popen(
        [sys.executable, str(PROJECT / "finetune.py"), *map(str, arguments)],
        cwd=work,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUTF8": "1"},
        **options,
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)


def same_results(left: Path, right: Path) -> bool:
    evaluations = [json.loads((run / "evaluation.json").read_text(encoding="utf-8")) for run in (left, right)]
    measured = [{name: value for name, value in found.items() if name != "model"} for found in evaluations]
    return measured[0] == measured[1] and all(
        (left / name).read_bytes() == (right / name).read_bytes() for name in RESULTS
    )


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.fixture(scope="module")
def base(vocabulary, tmp_path_factory) -> Path:
    """A small model with random weights."""
    return write_layout(tiny_reference(), vocabulary, tmp_path_factory.mktemp("base"), "bare")


@pytest.fixture(scope="module")
def unbroken(base, tmp_path_factory) -> Path:
    """The folder of the same run without interruption."""
    folder = tmp_path_factory.mktemp("unbroken")
    output = start(folder, "--model", base, *RUN, "--run-dir", "run").communicate()[0]
    assert "s in total" in output
    return folder / "run"


@POSIX
@pytest.mark.parametrize("kills", [1, pytest.param(50, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_gives_the_same_results(work, command, kills):
    """SIGKILL arrives at any time from the creation of the run folder to the end, even during saving."""
    chance = random.Random(kills)
    short = ("--max-steps", 8, "--checkpoint-minutes", 1e-9, "--dropout", 0.1, "--max-new-tokens", 20, "--watch")
    assert command("finetune.py", *short, "--run-dir", "unbroken").returncode == 0
    unbroken = work / "unbroken"
    began = (unbroken / "settings.json").stat().st_mtime
    seconds = (unbroken / "generated_conversations.json").stat().st_mtime - began
    resumed = 0
    for number in range(kills):
        folder = work / f"killed-{number}"
        process = start(work, *short, "--run-dir", folder)
        wait_for((folder / "settings.json").exists, process)
        time.sleep(chance.uniform(number, number + 1) / kills * 0.9 * seconds)
        process.kill()
        process.communicate()
        if not (folder / "generated_conversations.json").exists():
            resumed += 1
            done = command("finetune.py", "--resume", folder)
            assert done.returncode == 0, done.stderr
        assert same_results(unbroken, folder), number
        assert not list(folder.rglob(".*tmp*"))
        assert not (folder / "checkpoint").exists()
        shutil.rmtree(folder)
    assert resumed > 0


@POSIX
@pytest.mark.slow
def test_a_run_killed_while_saving_gives_the_same_results(work, base, unbroken):
    """The run is killed twice while it has a half-written file; then it may finish."""
    saving = ("--checkpoint-minutes", 1e-9)
    folder, kills = work / "run", 0
    process = start(work, "--model", base, *RUN, *saving, "--run-dir", folder)
    while process.poll() is None:
        if kills < 2 and lines(folder / "metrics.jsonl") > 8 * kills + 2 and list(folder.rglob(".*.tmp")):
            process.kill()
            process.communicate()
            kills += 1
            process = start(work, "--resume", folder)
    assert "error" not in process.communicate()[0]
    assert process.returncode == 0
    assert kills > 0
    assert same_results(unbroken, folder)


@POSIX
@pytest.mark.slow
def test_a_run_resumed_from_the_older_checkpoint_gives_the_same_report(work, command, base, unbroken):
    """The newest checkpoint is damaged. The reports differ only in the path and the name of the current folder."""
    process = start(work, "--model", base, *RUN, "--checkpoint-minutes", 1e-9, "--run-dir", "run")
    wait_for(lambda: lines(work / "run" / "metrics.jsonl") > 10, process)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    steps = sorted(int(path.stem.removeprefix("step-")) for path in (work / "run" / "checkpoint").glob("step-*"))
    assert len(steps) == 2
    newest = work / "run" / "checkpoint" / f"step-{steps[1]}.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    done = command("finetune.py", "--resume", "run", "--checkpoint-minutes", 5)  # the report shows every option
    assert "removed a damaged checkpoint" in done.stdout, done.stderr
    assert f"resuming after step {steps[0]}: " in done.stdout
    assert same_results(unbroken, work / "run")
    for name in ("evaluation.json", "base_evaluation.json", "report.html"):
        texts = [(run / name).read_text(encoding="utf-8") for run in (work / "run", unbroken)]
        moved = texts[0].replace(str(work), str(unbroken.parent))
        assert moved.replace(f"{work.name}/run/", f"{unbroken.parent.name}/run/") == texts[1], name


def stop(work: Path, base: Path, number: int, moment: Callable[[Path], bool]) -> str:
    """Start a run, send it a signal at `moment`, and return its output."""
    process = start(work, "--model", base, *RUN, "--run-dir", "run")
    wait_for(lambda: moment(work / "run"), process)
    process.send_signal(number)
    return process.communicate()[0]


@POSIX
def test_a_run_stopped_by_a_signal_saves_and_prints_how_to_resume(work, command, base, unbroken):
    output = stop(work, base, signal.SIGTERM, lambda run: lines(run / "metrics.jsonl") > 6)
    assert "Traceback" not in output
    assert "checkpoint: step " in output
    assert "of 32; resume with: " in output
    assert "finetune.py --resume run" in output
    done = command("finetune.py", "--resume", "run")
    assert done.returncode == 0, done.stderr
    assert "resuming after step " in done.stdout
    assert same_results(unbroken, work / "run")


@pytest.mark.slow
@POSIX
def test_a_run_stopped_during_generation_repeats_only_the_generation(work, command, base, unbroken):
    """Training is over, so the trained model is kept."""
    output = stop(work, base, signal.SIGTERM, lambda run: (run / "checkpoint" / "trained.json").exists())
    assert "Traceback" not in output
    assert "stopped; resume with: " in output
    assert "finetune.py --resume run" in output
    done = command("finetune.py", "--resume", "run")
    assert "training already finished after 32 steps" in done.stdout
    assert same_results(unbroken, work / "run")


@POSIX
@pytest.mark.slow
def test_runs_with_adapters_can_be_resumed(work, command, base):
    """After a stop in training, adapters are in the checkpoint; after a kill in generation, in their own folder."""
    options = ("--model", base, *RUN, "--lora-rank", 4, "--template", "tokens")
    assert command("finetune.py", *options, "--run-dir", "unbroken").returncode == 0
    process = start(work, *options, "--run-dir", "run")
    wait_for(lambda: lines(work / "run" / "metrics.jsonl") > 6, process)
    process.send_signal(signal.SIGTERM)
    assert "checkpoint: step " in process.communicate()[0]
    checkpoint = next((work / "run" / "checkpoint").glob("step-*"))
    assert checkpoint.stat().st_size < (base / "model.safetensors").stat().st_size / 2  # only the trained parameters

    process = start(work, "--resume", "run")
    wait_for((work / "run" / "checkpoint" / "trained.json").exists, process)
    process.kill()
    process.communicate()
    done = command("finetune.py", "--resume", "run")
    assert "training already finished after 32 steps" in done.stdout, done.stderr
    assert same_results(work / "unbroken", work / "run")
    adapters = [(work / run / "adapter" / "adapter_model.safetensors").read_bytes() for run in ("unbroken", "run")]
    assert adapters[0] == adapters[1]


@pytest.mark.slow
@POSIX
def test_a_run_killed_before_the_first_checkpoint_starts_again(work, command, base, unbroken):
    stop(work, base, signal.SIGKILL, lambda run: lines(run / "metrics.jsonl") > 6)
    done = command("finetune.py", "--resume", "run")
    assert done.returncode == 0, done.stderr
    assert "resuming after" not in done.stdout
    assert same_results(unbroken, work / "run")


@POSIX
@pytest.mark.parametrize(("megabytes", "code"), [(60, 0), (10, 2)])
def test_a_full_disk_is_reported_and_leaves_no_partial_files(work, megabytes, code):
    """A limit of 60 MB for each file stops the checkpoints (91 MB); a limit of 10 MB also stops the model (30 MB)."""
    import resource

    limit = (megabytes << 20, megabytes << 20)
    options = ("--max-steps", 2, "--checkpoint-minutes", 1e-9, "--max-new-tokens", 5, "--run-dir", "run")
    process = start(work, *options, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    output = process.communicate()[0]
    assert process.returncode == code, output
    assert "no checkpoint of step 1: cannot write" in output
    assert "Traceback" not in output
    assert not list((work / "run").rglob(".*tmp*"))
    if code:
        assert "error: cannot write run/model/model.safetensors" in output.replace(os.sep, "/")


@pytest.fixture(scope="module")
def prepared(base, tmp_path_factory) -> Path:
    """A folder with a model, conversations, and a run of two epochs that was stopped before its generation."""
    folder = tmp_path_factory.mktemp("stopped")
    shutil.copytree(base, folder / "base")
    shutil.copy(PROJECT / "llm_train_text.json", folder / "data.json")
    options = ("--model", "base", "--data", "data.json", "--epochs", 2, "--max-new-tokens", 10, "--keep-checkpoint")
    process = start(folder, *options, "--run-dir", "run")
    assert "s in total" in process.communicate()[0]
    (folder / "run" / "generated_conversations.json").unlink()
    return folder


@pytest.fixture
def stopped(work, prepared) -> Path:
    """The run in a copy of the folder `prepared`."""
    shutil.copytree(prepared, work, dirs_exist_ok=True)
    settings = work / "run" / "settings.json"
    settings.write_text(settings.read_text().replace(str(prepared), str(work)))
    return work / "run"


def test_another_run_in_the_same_folder_is_refused(stopped, command):
    lock = lock_run_folder(stopped)
    assert "another run is using this folder" in refused(command("finetune.py", "--resume", stopped))
    assert lock
    lock.release()
    assert command("finetune.py", "--resume", stopped).returncode == 0


def test_an_error_names_the_option_that_was_changed(stopped):
    """This happens when the command line is parsed. Options in the run's settings need not be repeated."""

    def refuse(*arguments: str) -> str:
        with pytest.raises(UserError) as refused:
            parse_finetune_settings(["--resume", str(stopped), *arguments])
        return str(refused.value)

    line = refuse("--learning-rate", "0.001", "--shuffle", "--seed", "123")
    rate = json.loads((stopped / "settings.json").read_text())["training"]["learning_rate"]
    assert f"--shuffle: the run has it off; --learning-rate 0.001: the run has {rate}" in line
    assert "--seed" not in line
    assert "--epochs 1: the run has 2, and can only be made longer" in refuse("--epochs", "1")
    assert "--max-steps 3: the run has no limit, and can only be made longer" in refuse("--max-steps", "3")
    assert "--preview needs a new run" in refuse("--preview")
    settings = parse_finetune_settings(["--resume", str(stopped), "--epochs", "5", "--cases", "1", "--keep-epochs"])
    assert (settings.training.epochs, settings.generation.cases) == (5, 1)
    assert settings.run.keep_epochs
    assert not settings.run.watch
    assert parse_finetune_settings(["--resume", str(stopped), "--watch"]).run.watch
    recorded = json.loads((stopped / "settings.json").read_text())
    write_json(stopped / "settings.json", {**recorded, "run": {**recorded["run"], "watch": True}})
    assert parse_finetune_settings(["--resume", str(stopped)]).run.watch
    assert settings.run.keep_checkpoint  # from the recorded run
    assert settings.data.paths == (stopped.parent / "data.json",)


def test_changed_conversations_are_refused_but_moved_ones_are_not(stopped, command, work):
    data = (work / "data.json").read_bytes()
    (work / "data.json").write_bytes(data.replace(b"guitar", b"violin"))
    assert "since it began, the conversations have changed" in refused(command("finetune.py", "--resume", stopped))
    (work / "moved.json").write_bytes(data)
    done = command("finetune.py", "--resume", stopped, "--data", "moved.json")
    assert done.returncode == 0, done.stderr


def test_a_run_can_resume_in_a_different_precision_with_a_warning(stopped, command):
    used = json.loads((stopped / "settings.json").read_text())["machine"]["precision"]
    other = "fp32" if used == "bf16" else "bf16"
    done = command("finetune.py", "--resume", stopped, "--precision", other, "--epochs", 3, "--output", "else.json")
    assert done.returncode == 0, done.stderr
    line = f'resuming on another machine (precision "{used}" → "{other}"): results will not be bit-identical'
    assert done.stdout.count(line) == 1
    assert "resuming after step 8" in done.stdout
    assert json.loads((stopped / "settings.json").read_text())["machine"]["precision"] == other
    assert (stopped.parent / "else.json").exists()


@pytest.mark.slow
def test_options_that_no_longer_exist_are_reported_and_ignored(stopped, command):
    """Older versions wrote such options. Options at their defaults are not mentioned."""
    recorded = json.loads((stopped / "settings.json").read_text())
    del recorded["facts"]
    recorded["data"]["fold"] = 0
    recorded["training"] |= {"processes": 1, "padding_free": False, "shard": False}
    recorded["run"]["resume_inexactly"] = False
    write_json(stopped / "settings.json", recorded)
    done = command("finetune.py", "--resume", stopped)
    assert done.returncode == 0, done.stderr
    assert "no longer exist" not in done.stderr
    recorded["training"]["padding_free"] = True
    write_json(stopped / "settings.json", recorded)
    for script, *options in (("chat.py", "--seed", "1"), ("evaluate.py",)):
        done = command(script, stopped, *options)
        assert done.returncode == 0, done.stderr
        assert "options that no longer exist are ignored: --padding-free True" in done.stderr


def test_the_facts_in_older_settings_are_read(tmp_path):
    write_json(tmp_path / "settings.json", {"data": {"fold": 2, "folds": 3}, "training": {"processes": 4}})
    assert read_facts(tmp_path) == RunFacts(fold=2, processes=4)
    write_json(tmp_path / "settings.json", {"facts": {"fold": "x"}})
    with pytest.raises(UserError, match="settings of another version"):
        read_facts(tmp_path)
    assert read_facts(None) == RunFacts()


@pytest.mark.slow
def test_a_finished_run_can_only_be_resumed_with_more_epochs(stopped, command):
    assert command("finetune.py", "--resume", stopped, "--keep-checkpoint").returncode == 0
    assert "has finished; more --epochs" in refused(command("finetune.py", "--resume", stopped))
    done = command("finetune.py", "--resume", stopped, "--epochs", 3)
    assert done.returncode == 0, done.stderr
    assert "resuming after step 8" in done.stdout
    assert json.loads((stopped / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 12


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "is not valid JSON"),
        ("[]", "does not hold a JSON object"),
        ('{"model": 3}', "settings of another version"),
        ('{"training": {"epochs": "x"}}', "settings of another version"),
    ],
)
def test_damaged_settings_are_refused(tmp_path, content, reason):
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(UserError, match=reason):
        parse_finetune_settings(["--resume", str(tmp_path)])


def test_machines_are_compared_on_resume(tmp_path, capsys):
    machine = {"torch": "2.13", "threads": 2, "processes": 1}
    record = Record(RunFacts(), machine, {"model": "a", "conversations": "b"})
    whole = asdict(record)
    for damaged in ({**whole, "machine": [1]}, {**whole, "fingerprints": None}, {}):
        write_json(tmp_path / "settings.json", damaged)
        with pytest.raises(UserError, match="lacks the record of the run's data, model and machine"):
            check_record(tmp_path, record)
    write_json(tmp_path / "settings.json", whole)
    check_record(tmp_path, record)
    assert capsys.readouterr().out == ""
    two = replace(record, machine={**machine, "processes": 2, "threads": 1})
    note = "started with 1 processes, resuming with 2: results will be equal up to rounding\n"
    check_record(tmp_path, two)
    assert capsys.readouterr().out == note
    check_record(tmp_path, replace(two, machine={**two.machine, "torch": "2.11"}))
    other = 'resuming on another machine (torch "2.13" → "2.11"): results will not be bit-identical\n'
    assert capsys.readouterr().out == note + other


def test_a_folder_without_a_run_is_refused(command, work):
    assert "no settings.json there" in refused(command("finetune.py", "--resume", "nowhere"))
    line = refused(command("finetune.py", "--resume", ".", "--run-dir", "x", "--checkpoint-minutes", -1))
    assert "--resume continues in its own folder" in line
    assert "--checkpoint-minutes -1.0" in line


def test_each_epoch_gets_a_model_folder(command, work, model_folder):
    options = ("--model", model_folder, "--epochs", 2, "--max-new-tokens", 5, "--run-dir", "run", "--keep-epochs")
    assert command("finetune.py", *options).returncode == 0
    last, first = work / "run" / "epochs" / "2", work / "run" / "epochs" / "1"
    weights = [folder / "model.safetensors" for folder in (first, last, work / "run" / "model")]
    assert weights[1].read_bytes() == weights[2].read_bytes() != weights[0].read_bytes()
    assert load_model(first)[0].config == load_model(last)[0].config


def test_an_output_that_could_not_be_written_is_written_on_resume(stopped, work, command):
    """The run is finished only when its last file exists."""
    (work / "output").mkdir()
    process = start(work, "--resume", stopped, "--epochs", 9, "--output", "output/x.json")
    wait_for(lambda: lines(stopped / "metrics.jsonl") > 20, process)
    (work / "output").rmdir()
    assert "error: cannot write output/x.json" in process.communicate()[0].replace(os.sep, "/")
    (work / "output").mkdir()
    done = command("finetune.py", "--resume", stopped)
    assert "training already finished after 36 steps" in done.stdout, done.stderr
    assert (work / "output" / "x.json").exists()


@POSIX
@pytest.mark.slow
def test_a_longer_run_that_stops_after_training_is_not_finished(stopped, command):
    """The conversations and the report of the shorter run are still there, but not of this model."""
    assert command("finetune.py", "--resume", stopped, "--keep-checkpoint").returncode == 0
    (stopped / "report.html").unlink()
    process = start(stopped.parent, "--resume", stopped, "--epochs", 9)
    wait_for(lambda: '"step": 36' in (stopped / "checkpoint" / "trained.json").read_text(), process)
    process.kill()
    process.communicate()
    assert not (stopped / "generated_conversations.json").exists()
    done = command("finetune.py", "--resume", stopped)
    assert "training already finished after 36 steps" in done.stdout, done.stderr
    assert (stopped / "report.html").exists()


def test_the_name_of_the_bundled_model_takes_precedence_over_a_folder(tmp_path, monkeypatch):
    """`tiny` is the bundled model even if a folder has this name; other folders are recorded with absolute paths."""
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "mine", "theirs/model"):
        (tmp_path / name).mkdir(parents=True)
    settings = FinetuneSettings()
    found = {"tiny": BUNDLED, "mine": Path("mine"), "theirs": Path("theirs/model")}
    for name, source in found.items():
        write_settings(tmp_path, replace(settings, model=ModelSettings(name)), source, Record(RunFacts(), {}, {}))
        recorded = read_settings(tmp_path).model.name
        assert recorded == (name if name == "tiny" else str(tmp_path / name))


def test_the_checksum_of_a_model_covers_its_shape(base, tmp_path):
    shutil.copytree(base, tmp_path / "m")
    checksums = {weights_checksum(tmp_path / "m")}
    for name in ("config.json", "model.safetensors"):
        content = bytearray((tmp_path / "m" / name).read_bytes())
        content[-1] ^= 1
        (tmp_path / "m" / name).write_bytes(content)
        checksums.add(weights_checksum(tmp_path / "m"))
    assert len(checksums) == 3


def test_a_changed_model_is_refused(tmp_path):
    record = Record(RunFacts(), {}, {"model": "a", "conversations": "b"})
    write_json(tmp_path / "settings.json", asdict(record))
    for name, words in (("model", "the model has changed"), ("conversations", "the conversations have changed")):
        changed = replace(record, fingerprints={**record.fingerprints, name: "c"})
        with pytest.raises(UserError, match=f"since it began, {words}; restore"):
            check_record(tmp_path, changed)


@pytest.mark.slow
def test_a_run_with_piped_conversations_needs_them_again_on_resume(work):
    data = (PROJECT / "llm_train_text.json").read_text(encoding="utf-8")

    def run(script: str, *options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, PROJECT / script, *map(str, options)],
            cwd=work, input=data, capture_output=True, text=True, encoding="utf-8", check=False,
        )  # fmt: skip

    begun = run("finetune.py", "--data", "-", "--epochs", 1, "--cases", 1, "--run-dir", "run", "--keep-checkpoint")
    assert begun.returncode == 0, begun.stderr
    assert "data: standard input (names), 10 dialogues" in begun.stdout
    assert begun.stdout.count("read from a pipe: to resume or evaluate this run, give the conversations") == 1
    assert json.loads((work / "run" / "settings.json").read_text())["data"]["paths"] == ["-"]
    assert "its conversations came from a pipe" in refused(run("finetune.py", "--resume", "run", "--epochs", 2))
    assert "was trained on conversations from a pipe" in refused(run("evaluate.py", "run"))
    measured = run("evaluate.py", "run", "--base", "none", "--data", "-")
    assert "standard input (names), 10 dialogues, measured on the 3 held out by the run (val)" in measured.stdout
    for name in ("-", PROJECT / "llm_train_text.json"):
        epochs = 2 if name == "-" else 3
        resumed = run("finetune.py", "--resume", "run", "--epochs", epochs, "--keep-checkpoint", "--data", name)
        assert resumed.returncode == 0, resumed.stderr


def test_older_settings_with_a_single_file_are_read(stopped, work):
    recorded = json.loads((stopped / "settings.json").read_text())
    recorded["data"]["path"] = recorded["data"].pop("paths")[0]
    write_json(stopped / "settings.json", recorded)
    settings = parse_finetune_settings(["--resume", str(stopped)])
    assert settings.data.paths == (work / "data.json",)
