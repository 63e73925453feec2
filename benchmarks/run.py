"""Measure this program and its peers side by side: python benchmarks/run.py

One run measures everything under the same conditions, alternating between our program and the peers. Tables appear on
the screen during the run. All samples are saved as JSON, and all tables as Markdown next to it. Linux, macOS only.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

from material import make_vocabulary
from measure import PROJECT, measure_case
from parts import PARTS, Plan, make, script
from table import block, render_markdown

SHAPES = (("fixed", 2, 45), ("fixed", 8, 200), ("fixed", 4, 1024), ("short", 8, 73), ("long", 4, 450))
GPU_SHAPES = (("short", 8, 73), ("fixed", 4, 1024), ("fixed", 16, 1024), ("short", 32, 73), ("short", 2, 73))
ON_GPU = ("main", "bundled", "throughput", "lora", "generation")
PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "tiktoken", "numpy", "safetensors")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def main() -> None:
    options = parse_options()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # treat SIGTERM as Ctrl-C, so that folders are removed
    machine = describe_machine(options.device)
    plan = make_plan(options, ("fp32", "bf16") if machine["bf16"] else ("fp32",))
    results: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "command": f"python benchmarks/run.py {shlex.join(sys.argv[1:])}".strip(),
        "model": plan.model.name,
        "device": plan.device,
        "repeats": options.repeats,
        "new_tokens": plan.new_tokens,
        "machine": machine,
        "versions": versions(),
        "left_out": [],
        "records": [],
    }
    path = free_path(options.output, f"{results['date']}-{hardware(machine)}")
    for part in options.parts or (ON_GPU if plan.device == "cuda" else PARTS):
        for case in PARTS[part](plan):
            able = [one for one in case.contestants if not lacking(one.needs) and not leaves_out(options, one.who)]
            gone = [f"{case.part}, {case.name}: {one.who}" for one in case.contestants if one not in able]
            results["left_out"] += gone
            records = measure_case(case._replace(contestants=able), options.repeats, show_progress)
            results["records"] += records
            show_progress("")
            print(block(results, case.part, case.name), flush=True)
            write_results(results, path)  # keep the results so far, even if a later case fails
    print(f"written: {path}.json and {path}.md")


def leaves_out(options: argparse.Namespace, who: str) -> bool:
    """Whether to skip a contestant: the textbook implementation alone takes longer than all the others together."""
    return any(word in who for word in options.leave_out)


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure this program and its peers side by side.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="parts to measure (default: all for the device)")
    parser.add_argument("--model", default="gpt2-medium", help="a published model (default: gpt2-medium)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=3, help="runs of each contestant (default: 3)")
    parser.add_argument(
        "--leave-out", nargs="+", default=[], help="skip contestants with one of these words in their names"
    )
    parser.add_argument(
        "--cases",
        nargs="+",
        default=[""],
        help="measure only throughput and generation cases with one of these words in their names",
    )
    parser.add_argument("--vocabulary", type=Path, help="folder of the published vocab.json and merges.txt")
    parser.add_argument("--quick", action="store_true", help="a tiny model and a few steps, as a smoke test")
    parser.add_argument(
        "--cache", type=Path, default=PROJECT / "runs" / "benchmarks", help="folder for generated models and data"
    )
    parser.add_argument("--output", type=Path, default=PROJECT / "benchmarks", help="folder for the results")
    return parser.parse_args(arguments)


def make_plan(options: argparse.Namespace, precisions: tuple[str, ...]) -> Plan:
    """The plan for `options`, in the precisions that the hardware supports natively.

    Generates the model and the vocabulary unless an earlier run did.
    """
    name = "quick" if options.quick else options.model
    vocabulary = options.vocabulary or options.cache / "vocabulary"
    if not (vocabulary / "merges.txt").exists():
        make_vocabulary(vocabulary)
    model = options.cache.resolve() / ("published" if options.vocabulary else "made") / name
    if not (model / "model.safetensors").exists():
        make(*script("material.py", "model", name=name, vocabulary=vocabulary.resolve(), folder=model))
    plan = Plan(
        model=model,
        small=PROJECT / "models" / "tiny",
        cache=model.parent,
        device=options.device,
        shapes=GPU_SHAPES if options.device == "cuda" else SHAPES,
        steps=8,
        epochs=10,
        prompts=(1, 3, 16),
        new_tokens=128,
        dialogues=20_000,
        precisions=precisions,
        cases=tuple(options.cases),
    )
    quick = {"small": model, "shapes": SHAPES[:1], "steps": 2, "epochs": 1, "prompts": (3,), "new_tokens": 8}
    return plan._replace(**quick, dialogues=200) if options.quick else plan


def lacking(packages: tuple[str, ...]) -> bool:
    return any(importlib.util.find_spec(package) is None for package in packages)


def describe_machine(device: str) -> dict[str, Any]:
    """Describe the processor, the memory, and the features that PyTorch detects."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text(encoding="utf-8")) if info.exists() else []
    seen = make(*script("limits.py", "describe", device=device))
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "environment": {name: os.environ[name] for name in THREADS if name in os.environ},
        **{name: seen[name] for name in ("threads", "instructions", "amx", "bf16", "gpu") if name in seen},
    }


def versions() -> dict[str, str]:
    installed = {package: importlib.metadata.version(package) for package in PACKAGES if not lacking((package,))}
    return {"python": platform.python_version(), **installed}


def hardware(machine: dict[str, Any]) -> str:
    """The machine's name, for a file name."""
    name = machine.get("gpu") or f"{machine['cores']}-cores-{machine['processor']}"
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(.*?\)|@.*|cpu|processor", "", name.lower())).strip("-")


def free_path(folder: Path, name: str) -> Path:
    """`folder/name`, with a number appended if results of that name exist."""
    folder.mkdir(parents=True, exist_ok=True)
    names = (folder / (name if number == 1 else f"{name}-{number}") for number in count(1))
    return next(path for path in names if not Path(f"{path}.json").exists())


def write_results(results: dict[str, Any], path: Path) -> None:
    Path(f"{path}.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    Path(f"{path}.md").write_text(render_markdown(results), encoding="utf-8")


def show_progress(line: str) -> None:
    """Show the current measurement on a line of the screen that the next call replaces."""
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
