"""Several processes under torchrun give the numbers of one with a larger batch, and one prints and writes."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import PROJECT, logged, written
from finetune import finetune
from pipeline.job import RunFacts
from pipeline.run_settings import parse_finetune_settings
from settings import TrainingSettings
from training.loop import all_steps, batch_seed

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo is untested on Windows")
OPTIONS = ("--epochs", 2, "--precision", "fp32", "--dropout", 0.1, "--max-new-tokens", 10)


def torchrun(work: Path, processes: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    return subprocess.run(
        [sys.executable, *launch, str(PROJECT / "finetune.py"), *map(str, arguments)],
        cwd=work,
        env={**os.environ, "PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def two_machines(first: Path, second: Path, *arguments: object) -> list[str]:
    """Run the command with one process on each of two machines, as two agents of torchrun; return what each prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = ("--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(port))
    agents = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *launch, "--node-rank", str(rank)]
            + [str(PROJECT / "finetune.py"), *map(str, arguments)],
            cwd=folder,
            env={**os.environ, "PYTHONUTF8": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, folder in enumerate((first, second))
    ]
    printed = [agent.communicate(timeout=300)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], printed
    return printed


def in_this_process(*arguments: object) -> None:
    """Run the command without starting a process, which saves the seconds to import PyTorch."""
    finetune(parse_finetune_settings([*map(str, arguments)]), RunFacts())


def test_two_machines_equal_one_with_twice_the_batch(work, model_folder, tmp_path, monkeypatch):
    """8 x 1 = 4 x 2 = two processes on two machines, of which only the first prints and writes."""
    options = ("--model", model_folder, "--epochs", 4, "--precision", "fp32", "--max-new-tokens", 10)
    monkeypatch.chdir(work)
    in_this_process(*options, "--batch-size", 8, "--run-dir", "one")
    in_this_process(*options, "--batch-size", 4, "--gradient-accumulation", 2, "--run-dir", "accumulated")
    second = tmp_path / "second"
    second.mkdir()
    printed = two_machines(work, second, *options, "--batch-size", 4, "--run-dir", "two", "--watch")
    assert "2 processes, 1 threads" in printed[0]
    assert ["run folder: " in each for each in printed] == [True, False]
    assert not written(second)
    for name in ("train_loss", "val_loss", "train_set_loss", "grad_norm"):
        one = logged(work / "one", name)
        assert logged(work / "two", name) == pytest.approx(one, rel=1e-4)
        assert logged(work / "accumulated", name) == pytest.approx(one, rel=1e-4)
    assert len(logged(work / "two", "train_loss")) == 4  # not one per process
    assert len(logged(work / "two", "watched")) == len(logged(work / "two", "val_loss")) == 5


@pytest.mark.slow
def test_a_checkpoint_resumes_with_any_number_of_processes(work, command, model_folder):
    """With the same number, results are bit-identical; with a different number, equal up to rounding. (Batches differ.)

    Dropout depends on the batch, not on the process. The last step of an epoch has only one of the 7 examples, and
    leaves one of two processes idle.
    """
    options = ("--model", model_folder, *OPTIONS, "--batch-size", 1)
    assert torchrun(work, 2, *options, "--run-dir", "unbroken").returncode == 0
    done = torchrun(work, 2, *options, "--epochs", 1, "--run-dir", "run", "--keep-checkpoint")
    assert done.returncode == 0, done.stderr
    shutil.copytree(work / "run", work / "other")

    done = torchrun(work, 2, "--resume", "run", "--epochs", 2)
    assert "resuming after step 4" in done.stdout, done.stderr
    assert "equal up to rounding" not in done.stdout
    losses = logged(work / "unbroken", "train_loss")
    assert len(losses) == 8
    assert logged(work / "run", "train_loss") == losses
    weights = [(work / folder / "model" / "model.safetensors").read_bytes() for folder in ("run", "unbroken")]
    assert weights[0] == weights[1]

    done = command("finetune.py", "--resume", "other", "--epochs", 2)
    assert "started with 2 processes, resuming with 1: results will be equal up to rounding" in done.stdout, done.stderr
    assert logged(work / "other", "train_loss") == pytest.approx(losses, rel=1e-4)


def test_a_user_error_is_reported_in_one_line(work):
    done = torchrun(work, 2, "--epochs", 0)
    assert done.returncode != 0
    assert done.stderr.count("error: --epochs 0") == 1


def test_every_batch_belongs_to_one_process(tmp_path):
    """Two processes together take every example once."""
    settings = TrainingSettings(epochs=1, batch_size=2)
    steps = all_steps([10] * 7, settings, processes=2)
    epoch = [next(steps) for _ in range(settings.steps(7, processes=2)[0])]
    shares = [[step[rank::2] for step in epoch] for rank in (0, 1)]
    taken = [number for share in shares for step in share for batch in step for number in batch]
    assert sorted(taken) == list(range(7))


def test_every_batch_has_its_own_seed():
    seeds = {batch_seed(seed, step, batch) for seed in range(3) for step in range(20) for batch in range(4)}
    assert len(seeds) == 240
