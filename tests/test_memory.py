"""A run prints the memory it needs before it starts, and options that need less if it does not fit."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch

from conftest import CPU, PROJECT, refused
from settings import TrainingSettings
from support.errors import UserError
from training import memory
from training.memory import Size, available_memory, check_memory, expected_memory, explain_lack_of_memory

MEDIUM = Size(354_823_168, 24, 1024, 50257, 80, 100)
FULL = TrainingSettings()
BF16 = CPU._replace(precision="bf16")
GIGABYTE = 10**9


def give(monkeypatch, free: float, swap: float = 0) -> None:
    monkeypatch.setattr(
        memory, "available_memory", lambda device: (int(free * GIGABYTE), int((free + swap) * GIGABYTE))
    )


@pytest.mark.parametrize(
    ("settings", "measured"),
    [
        (FULL, 6.3),  # peaks of gpt2-medium, start to finish, from /usr/bin/time
        (replace(FULL, lora_rank=8), 1.8),
    ],
)
def test_the_estimate_is_close_to_measured_peaks(settings, measured):
    assert sum(expected_memory(MEDIUM, settings, "bf16")) == pytest.approx(
        measured * GIGABYTE, rel=memory.TOLERANCE - 1
    )


def test_each_option_lowers_the_estimate():
    long = MEDIUM._replace(longest=1024)

    def takes(precision: str = "bf16", **options) -> float:
        return sum(expected_memory(long, replace(FULL, **{"batch_size": 4, **options}), precision))

    assert takes(batch_size=1) < takes()
    assert takes(gradient_checkpointing=True) < takes()
    assert takes(lora_rank=8) < takes()
    assert takes("fp32") > takes()


def test_advice_names_options_that_fit_and_their_memory(monkeypatch):
    size, settings = MEDIUM._replace(longest=1024), replace(FULL, batch_size=8)
    give(monkeypatch, 100)
    line = check_memory(size, settings, BF16)
    assert re.fullmatch(
        r"memory: about [\d.]+ GB to train \(weights 1.4, gradients 1.4, optimizer 2.8, activations .*\)", line
    )
    give(monkeypatch, 9)
    with pytest.raises(UserError, match=r"about .*program 0.6\), but only 9\.0 GB are free; to fit, use ") as no:
        check_memory(size, settings, BF16)
    assert "--batch-size 1 --gradient-accumulation 8 (" in str(no.value)
    assert "--lora-rank 8 (" in str(no.value) or "--lora-rank 8 --gradient-checkpointing (" in str(no.value)
    for part in str(no.value).split("GB)")[:-1]:
        assert float(part.rsplit("(")[-1]) <= 9
    give(monkeypatch, 9, swap=20)  # swapping may be slow, but is allowed
    assert check_memory(size, settings, BF16).startswith(str(no.value).split(", but")[0])
    give(monkeypatch, 1)
    with pytest.raises(UserError, match="to fit, use a smaller model or a shorter --max-length"):
        check_memory(size, settings, BF16)


def test_a_run_that_is_certain_to_fail_is_refused(monkeypatch):
    """Weights, gradients and moments take 16 bytes per parameter, in addition to everything else."""
    give(monkeypatch, 5.6)
    with pytest.raises(UserError, match="5.6 GB are free"):
        check_memory(MEDIUM, FULL, BF16)
    give(monkeypatch, 5.7)
    assert "5.7 GB are free; to fit, use --lora-rank 8" in check_memory(MEDIUM, FULL, BF16)


def test_processes_on_one_machine_share_its_memory(monkeypatch):
    give(monkeypatch, 10)
    assert check_memory(MEDIUM, FULL, BF16).endswith("program 0.6)")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"to fit, use --lora-rank 8 \("):
        check_memory(MEDIUM, FULL, BF16._replace(processes=2))


def test_the_memory_limit_of_a_container_is_respected(monkeypatch, tmp_path):
    free, _ = available_memory(torch.device("cpu"))
    assert 0 < free <= psutil.virtual_memory().total
    (tmp_path / "max").write_text("3000000000\n")
    (tmp_path / "current").write_text("1000000000\n")
    (tmp_path / "memory.stat").write_text("file 0\ninactive_file 0\nactive_file 0\n")
    monkeypatch.setattr(memory, "CONTAINER", ((str(tmp_path / "max"), str(tmp_path / "current")),))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=8 * GIGABYTE))
    assert available_memory(torch.device("cpu")) == (2 * GIGABYTE, 2 * GIGABYTE)
    cached = "inactive_file 1\nactive_file 2\ntotal_inactive_file 300000000\ntotal_active_file 200000000\n"
    for lines, free in (("inactive_file 300000000\nactive_file 200000000\n", 2.5), (cached, 2.5), ("rss 1\n", 2)):
        (tmp_path / "memory.stat").write_text(lines)
        assert available_memory(torch.device("cpu"))[0] == free * GIGABYTE  # cached files are freed when needed
    (tmp_path / "memory.stat").unlink()
    assert available_memory(torch.device("cpu"))[0] == 2 * GIGABYTE
    (tmp_path / "max").write_text("max\n")
    assert available_memory(torch.device("cpu"))[0] == 8 * GIGABYTE


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_running_out_of_memory_gives_the_same_advice(error):
    with (
        pytest.raises(UserError, match=r"out of memory; the checkpoints are intact; to fit, use --lora-rank 8"),
        explain_lack_of_memory(MEDIUM, FULL, BF16),
    ):
        raise error


def test_a_process_other_than_the_first_reports_that_it_is_out_of_memory(capsys):
    with pytest.raises(UserError), explain_lack_of_memory(MEDIUM, FULL, BF16._replace(processes=2, rank=1)):
        raise MemoryError
    assert capsys.readouterr().err == "process 1 is out of memory\n"


def test_other_errors_are_not_changed():
    with pytest.raises(RuntimeError, match="shape"), explain_lack_of_memory(MEDIUM, FULL, BF16):
        raise RuntimeError("shape")
    with pytest.raises(NotImplementedError), explain_lack_of_memory(MEDIUM, FULL, BF16):
        raise NotImplementedError("an operator that the device lacks")


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
def test_a_run_that_cannot_fit_is_refused_before_it_starts(work):
    """The bundled model with 700 long dialogues in a batch and 12 GB of address space."""
    import resource

    text = "So that is how it went. " * 80
    (work / "data.json").write_text(json.dumps([{"A": text, "B": f"{text}{number}"} for number in range(1000)]))
    limit = (12 * GIGABYTE, 12 * GIGABYTE)
    done = subprocess.run(
        [sys.executable, PROJECT / "finetune.py", "--batch-size", "700", "--data", "data.json"],
        cwd=work,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, limit),
    )
    line = refused(done)
    assert "GB are free; to fit, use --batch-size 1 --gradient-accumulation 700 (" in line
    assert not (work / "runs").exists()
