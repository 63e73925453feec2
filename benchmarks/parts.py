"""The parts of the benchmark: the cases of each part, the contestants of each case, and how to start them."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from material import BUNDLED_DATA, SIDES
from measure import PROJECT, Case, Contestant, Sample, run_contestant, run_process
from table import FIRST_RUN

HERE = Path(__file__).resolve().parent
TRANSFORMERS, TRAINER, PEFT = ("transformers",), ("transformers", "accelerate"), ("transformers", "peft")
OURS, PLAIN = "ours", "plain recipe"
# Simulate a laptop without matrix units or AVX-512. PyTorch's kernels come from oneDNN, MKL and ATen.
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
ALLOWED = 8_000_000_000  # memory limit of the part `constrained`, in bytes
BUSY = 4096  # tokens in a batch that keep a GPU busy, so that `--compile` pays off
GROUPED_STEPS = 60  # steps of data to make if lengths vary, so that batches can be grouped by length
LORA_RANK = 8
PROMPT_LENGTHS = (12, 20)  # shortest and longest prompt, in tokens
THEIR_IMPORTS = "from transformers import GPT2LMHeadModel, Trainer"


class Plan(NamedTuple):
    """The parts and sizes of a benchmark run."""

    model: Path  # folder of the model that the main job trains
    small: Path  # folder of a second model for training throughput
    cache: Path  # folder of generated models and data
    device: str
    shapes: tuple[tuple[str, int, int], ...]  # kind of data, batch size, dialogue length
    steps: int  # measured steps in each run
    epochs: int
    prompts: tuple[int, ...]
    new_tokens: int
    dialogues: int  # number of dialogues to read
    precisions: tuple[str, ...]  # precisions that the hardware supports natively
    cases: tuple[str, ...]  # words; a throughput or generation case is measured if its name contains one of them

    def wants(self, case: str) -> bool:
        return any(word in case for word in self.cases)


def script(source: str, task: str, /, **values: Any) -> tuple[str, ...]:
    """The command that runs a task of a script in this folder."""
    return (sys.executable, str(HERE / source), task, json.dumps(values, default=str))


def python(*words: str) -> tuple[str, ...]:
    return (sys.executable, *words)


def make(*words: str) -> Sample:
    """Run a script without measuring it, and return the figures it reports. Its memory is freed when it ends."""
    made = run_contestant(Contestant("", words))
    assert not made["exit_code"], made["says"]
    return made


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def finetune(plan: Plan, *options: str) -> tuple[str, ...]:
    """Our command for the main job, as shipped."""
    sizes = ("--epochs", str(plan.epochs), "--max-new-tokens", str(plan.new_tokens))
    names = ("--model", str(plan.model), "--device", plan.device, "--run-dir", "run", "--output", "output.json")
    return python(str(PROJECT / "finetune.py"), *names, *sizes, *options)


def look_at_run(plan: Plan, precision: str, folder: Path, started: float, first: bool) -> Sample:
    """The time of each phase of our run, from its files' timestamps; for the first run, also the tokens written."""
    run = folder / "run"
    marks = {
        "loading": "ledger.json",
        "measuring the base model": "base_evaluation.json",
        "training, with its evaluations": "metrics.jsonl",
        "saving": "model/model.safetensors",
        "writing three cases, measuring the tuned model, and the report": "report.html",
    }
    times = [started, *((run / name).stat().st_mtime for name in marks.values())]
    phases = {name: end - start for name, start, end in zip(marks, times, times[1:], strict=False)}
    if not first:
        return {"phases": phases}
    values = {"data": BUNDLED_DATA, "new_tokens": plan.new_tokens, "device": plan.device, "precision": precision}
    counted = run_process(script("ours.py", "count_written", folder="run/model", **values), folder)
    assert not counted["exit_code"], counted["says"]
    return {"phases": phases, "tokens_written": counted["tokens_written"]}


def main_contestants(plan: Plan, precisions: Sequence[str], environment: dict[str, str]) -> list[Contestant]:
    """The main job: our program and transformers in each of `precisions`, and the textbook implementation in fp32."""
    job = {"folder": plan.model, "epochs": plan.epochs, "new_tokens": plan.new_tokens, "device": plan.device}
    ours = [
        Contestant(
            f"{OURS}, {precision}",
            finetune(plan, "--precision", precision),
            environment,
            look=partial(look_at_run, plan, precision),
        )
        for precision in precisions
    ]
    theirs = [
        Contestant(
            f"transformers Trainer, {precision}",
            script("peers.py", "main_job", **job, precision=precision),
            environment,
            TRAINER,
        )
        for precision in precisions
    ]
    return [*ours, *theirs, Contestant(PLAIN, script("textbook.py", "main_job", **job), environment)]


def main_job(plan: Plan) -> Iterator[Case]:
    shipped = Contestant(OURS, finetune(plan), look=partial(look_at_run, plan, "auto"))
    others = [one for one in main_contestants(plan, plan.precisions, {}) if one.who != f"{OURS}, bf16"]
    yield Case("main", plan.model.name, [shipped, *others])


def bundled(plan: Plan) -> Iterator[Case]:
    words = python(str(PROJECT / "finetune.py"), "--device", plan.device)
    yield Case("bundled", FIRST_RUN, [Contestant(OURS, words)])


def step_contestants(
    plan: Plan, job: dict[str, Any], needs: tuple[str, ...], compiles: bool = False
) -> list[Contestant]:
    """The contestants for training steps of `job` in each precision: our program, and a plain loop with transformers.

    If `compiles` is true, our program also runs with `--compile`.
    """
    ours = [(OURS, {})]
    if compiles:
        ours.append((f"{OURS} with --compile", {"compile": True}))
    theirs = "transformers with peft" if needs == PEFT else "transformers loop"
    contestants = []
    for precision in plan.precisions:
        values = {**job, "steps": plan.steps, "device": plan.device, "precision": precision}
        contestants += [
            Contestant(f"{who}, {precision}", script("ours.py", "training", **values, **options))
            for who, options in ours
        ]
        words = script("peers.py", "training", **values)
        contestants.append(Contestant(f"{theirs}, {precision}", words, needs=needs))
    return contestants


def throughput(plan: Plan) -> Iterator[Case]:
    for folder in dict.fromkeys((plan.model, plan.small)):
        config = read_config(folder)
        for kind, batch, wanted in plan.shapes:
            length = min(wanted, config["n_positions"])
            name = f"{folder.name}, {batch} × {length if kind == 'fixed' else f'{kind} dialogues'}"
            if not plan.wants(name):
                continue
            data = make_data(plan, folder, kind, batch, length)
            job = {"folder": folder, "data": data, "batch_size": batch, "lora_rank": 0}
            busy = plan.device == "cuda" and batch * length >= BUSY
            steps = step_contestants(plan, job, TRANSFORMERS, compiles=busy)
            size = {"rows": batch * length, "width": config["n_embd"], "device": plan.device}
            products = {one: script("limits.py", "products", **size, precision=one) for one in plan.precisions}
            limits = [Contestant(f"limit: products, {one}", words) for one, words in products.items()]
            yield Case("throughput", name, [*steps, *limits], {"config": config})


def lora(plan: Plan) -> Iterator[Case]:
    batch, length = 2, 45
    data = make_data(plan, plan.model, "fixed", batch, length)
    job = {"folder": plan.model, "data": data, "batch_size": batch, "lora_rank": LORA_RANK}
    yield Case("lora", f"{plan.model.name}, {batch} × {length}", step_contestants(plan, job, PEFT))


def make_data(plan: Plan, folder: Path, kind: str, batch: int, length: int) -> Path:
    """Return a dialogue file for training steps; see `material.make_dialogues`."""
    path = plan.cache / f"{folder.name}-{kind}-{batch}-{length}.jsonl"
    steps = max(plan.steps, GROUPED_STEPS) if kind != "fixed" else plan.steps
    count = SIDES * batch * (steps + 2)  # two warm-up steps are not measured
    make(*script("material.py", "data", kind=kind, count=count, folder=folder, length=length, path=path))
    return path


def generation(plan: Plan) -> Iterator[Case]:
    config = read_config(plan.model)
    longest, shortest = max(PROMPT_LENGTHS), min(PROMPT_LENGTHS)
    for count in plan.prompts:
        name = f"{plan.model.name}, {count} prompt{'s' * (count > 1)}"
        if not plan.wants(name):
            continue
        lengths = [longest - number % (longest - shortest + 1) for number in range(count)]
        # Token ids spread over the vocabulary.
        prompts = [[(997 * (row + 1) * (place + 1)) % 40_000 for place in range(T)] for row, T in enumerate(lengths)]
        job = {"folder": plan.model, "prompts": prompts, "new_tokens": plan.new_tokens, "device": plan.device}
        theirs = [
            Contestant(
                f"transformers generate, {precision}",
                script("peers.py", "generation", **job, precision=precision),
                needs=TRANSFORMERS,
            )
            for precision in plan.precisions
        ]
        limit = Contestant("limit: reading memory", script("limits.py", "memory", device=plan.device))
        ours = Contestant(OURS, script("ours.py", "generation", **job))
        facts = {"config": config, "prompts": count, "mean_prompt": fmean(lengths)}
        yield Case("generation", name, [ours, *theirs, limit], facts)


def start(plan: Plan) -> Iterator[Case]:
    yield Case("start", "--help", [Contestant(OURS, python(str(PROJECT / "finetune.py"), "--help"))])
    yield Case(
        "start",
        "imports",
        [
            Contestant(OURS, python("-c", "import pipeline.train, pipeline.measure")),
            Contestant("transformers", python("-c", THEIR_IMPORTS), needs=TRAINER),
            Contestant("limit: import torch", python("-c", "import torch")),
        ],
    )
    yield Case(
        "start",
        f"loading {plan.model.name}",
        [
            Contestant(OURS, script("ours.py", "loading", folder=plan.model)),
            Contestant("transformers", script("peers.py", "loading", folder=plan.model), needs=TRANSFORMERS),
            Contestant("limit: reading the file", script("limits.py", "file", path=plan.model / "model.safetensors")),
        ],
    )


def reading(plan: Plan) -> Iterator[Case]:
    path = plan.cache / f"read-{plan.dialogues}.jsonl"
    values = {"kind": "short", "count": plan.dialogues, "folder": plan.model, "length": 0, "path": path}
    make(*script("material.py", "data", **values))
    job = {"folder": plan.model, "data": path}
    yield Case(
        "reading",
        f"{plan.dialogues:,} dialogues, {path.stat().st_size / 1e6:.1f} MB",
        [
            Contestant(OURS, script("ours.py", "reading", **job)),
            Contestant("transformers' tokenizer", script("peers.py", "reading", **job), needs=TRANSFORMERS),
        ],
    )


def constrained(plan: Plan) -> Iterator[Case]:
    yield Case("constrained", f"{plan.model.name}, AVX2, fp32", main_contestants(plan, ["fp32"], AVX2))
    ours = Contestant(OURS, finetune(plan), memory_limit=ALLOWED)
    yield Case("constrained", f"{plan.model.name}, {ALLOWED / 1e9:.0f} GB of memory allowed", [ours])


PARTS: dict[str, Callable[[Plan], Iterator[Case]]] = {
    "main": main_job,
    "bundled": bundled,
    "throughput": throughput,
    "lora": lora,
    "generation": generation,
    "start": start,
    "reading": reading,
    "constrained": constrained,
}
