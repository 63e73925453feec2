"""Measure a process: its wall time, its peak memory, and the figures that it reports.

Each measurement runs in a new process, so that none inherits warm memory or compiled kernels. Contestants run
round-robin (ours, theirs, ours, theirs), so that a temporary slowdown of the machine affects all of them.

The parent process must not import PyTorch: Linux counts a parent's memory towards its child's peak.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

PROJECT = Path(__file__).resolve().parent.parent
MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes; Linux reports kilobytes
RESULT = "result: "  # prefix of the line on which a measured script reports its figures

Sample = dict[str, Any]


class Contestant(NamedTuple):
    """One of several programs that do the same job, and how to start it."""

    who: str
    words: tuple[str, ...]  # the command; it runs in an empty folder that is removed afterwards
    environment: Mapping[str, str] = {}
    needs: tuple[str, ...] = ()  # required packages; if one is not installed, the contestant is left out
    memory_limit: int = 0  # bytes of address space; 0: no limit
    look: Callable[[Path, float, bool], Sample] | None = None  # (folder, start time, whether it is the first run)


class Case(NamedTuple):
    """A job that several contestants do."""

    part: str
    name: str
    contestants: Sequence[Contestant]
    facts: Mapping[str, Any] = {}  # facts about the job, for computing figures


def measure_case(case: Case, repeats: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Measure the contestants of a case round-robin; return a record for each, with all its samples."""
    samples: list[list[Sample]] = [[] for _ in case.contestants]
    for repeat in range(repeats):
        for contestant, taken in zip(case.contestants, samples, strict=True):
            say(f"{case.part}, {case.name}: {contestant.who} ({repeat + 1} of {repeats})")
            taken.append(run_contestant(contestant, repeat == 0))
    return [
        {
            "part": case.part,
            "case": case.name,
            "who": contestant.who,
            "facts": dict(case.facts),
            "command": [
                *(f"{name}={value}" for name, value in contestant.environment.items()),
                *(word.replace(sys.executable, "python").replace(f"{PROJECT}/", "") for word in contestant.words),
            ],
            "samples": taken,
        }
        for contestant, taken in zip(case.contestants, samples, strict=True)
    ]


def run_contestant(contestant: Contestant, first: bool = True) -> Sample:
    """One sample: `seconds` of wall time, `peak_bytes`, `exit_code`, and the figures that the process reports."""
    folder = Path(tempfile.mkdtemp(prefix="benchmark-"))
    try:
        started = time.time()
        sample = run_process(contestant.words, folder, contestant.environment, contestant.memory_limit)
        if contestant.look and not sample["exit_code"]:
            sample |= contestant.look(folder, started, first)
        return sample
    finally:
        shutil.rmtree(folder)


def run_process(
    words: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None, memory_limit: int = 0
) -> Sample:
    """Run a command in `folder` until it exits; the system measures the peak memory of its largest process."""

    def limit_memory() -> None:
        import resource  # Windows lacks it, but can import the rest of this file

        resource.setrlimit(resource.RLIMIT_AS, (memory_limit, memory_limit))

    offline = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(PROJECT)}
    with open(folder / "stdout", "wb") as stdout, open(folder / "stderr", "wb") as stderr:
        started = time.perf_counter()
        process = subprocess.Popen(
            words,
            cwd=folder,
            env={**os.environ, **offline, **(environment or {})},
            stdout=stdout,
            stderr=stderr,
            preexec_fn=limit_memory if memory_limit else None,
        )
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except KeyboardInterrupt:
            process.kill()
            raise
        seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)  # tell Popen that the process has ended
    sample: Sample = {
        "seconds": seconds,
        "peak_bytes": usage.ru_maxrss * MAXRSS_UNIT,
        "page_faults": usage.ru_minflt,
        "exit_code": process.returncode,
    }
    if process.returncode:
        errors = (folder / "stderr").read_text(encoding="utf-8", errors="replace").split("\n")
        return {**sample, "says": next((line for line in reversed(errors) if line.strip()), "")}
    output = (folder / "stdout").read_text(encoding="utf-8", errors="replace").splitlines()
    said = [line.removeprefix(RESULT) for line in output if line.startswith(RESULT)]
    return sample | (json.loads(said[-1]) if said else {})


def tell(**values: Any) -> None:
    """Report figures to the process that measures this script."""
    print(RESULT + json.dumps(values), flush=True)


def run_task(tasks: Mapping[str, Callable[..., dict[str, Any]]], arguments: Sequence[str]) -> None:
    """Parse the command line of a measured script: the name of a task, and its arguments as one JSON object."""
    name, values = arguments
    tell(**tasks[name](**json.loads(values)))


def figure(record: dict[str, Any], name: str) -> tuple[float, float, float] | None:
    """Median, minimum and maximum of a value over the samples of a record; None if it was not measured."""
    values = [sample[name] for sample in record["samples"] if not sample["exit_code"] and name in sample]
    return (median(values), min(values), max(values)) if values else None
