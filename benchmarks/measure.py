"""A process measured: how long it takes from start to finish, the most memory it holds, and what it says of itself.

Everything is measured in a process of its own, so that none inherits warm memory or made kernels from another. Those
that are compared take turns (ours, theirs, ours, theirs): a machine that slows down slows all of them.

This and whatever runs in the same process stays without PyTorch: Linux counts the memory of the process that starts
another one into the peak of that other one.
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
MAXRSS_UNIT = 1024  # bytes: Linux reports kilobytes
RESULT = "result: "  # begins the line with which a measured script says what it has measured inside

Sample = dict[str, Any]


class Contestant(NamedTuple):
    """One of those that do the same job, and how it is started."""

    who: str
    words: tuple[str, ...]  # the command; it runs in an empty folder that is removed afterwards
    environment: Mapping[str, str] = {}
    needs: tuple[str, ...] = ()  # packages; where one is not installed, this one is left out
    memory_limit: int = 0  # bytes of address space; 0: none
    look: Callable[[Path, float, bool], Sample] | None = None  # (folder, when it was started, whether it is the first)


class Case(NamedTuple):
    """A job that contestants do side by side."""

    part: str
    name: str
    contestants: Sequence[Contestant]
    facts: Mapping[str, Any] = {}  # what a reader of the figures has to know of the job


def measure_case(case: Case, repeats: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Measure the contestants of a case in turns; a record for each, with all of its samples."""
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
    """One sample: `seconds` of wall time, `peak_bytes`, `exit_code`, and what the process itself has measured."""
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
    """Run a command in `folder` to its end; its peak is that of the largest process in it, measured by the system."""

    def limit_memory() -> None:
        import resource  # not on Windows, where the rest of this file can be imported

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
    process.returncode = os.waitstatus_to_exitcode(status)  # Popen has not seen its process end
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
    """Called in a measured script: hand over what it has measured."""
    print(RESULT + json.dumps(values), flush=True)


def run_task(tasks: Mapping[str, Callable[..., dict[str, Any]]], arguments: Sequence[str]) -> None:
    """The command line of a measured script: the name of a task, and its arguments as one JSON object."""
    name, values = arguments
    tell(**tasks[name](**json.loads(values)))


def figure(record: dict[str, Any], name: str) -> tuple[float, float, float] | None:
    """Median, smallest and largest of a value over the samples of a record; None where it was not measured."""
    values = [sample[name] for sample in record["samples"] if not sample["exit_code"] and name in sample]
    return (median(values), min(values), max(values)) if values else None
