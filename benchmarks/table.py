"""The results as tables: on the screen while they come, and as Markdown; each goal beside its measured figure."""

from collections.abc import Callable, Iterator
from statistics import median
from typing import Any, NamedTuple

from measure import figure

Results = dict[str, Any]
Record = dict[str, Any]


class Column(NamedTuple):
    title: str
    scale: float  # from the unit of the samples to the one shown
    digits: int


COLUMNS = {
    "seconds": Column("seconds", 1, 2),
    "tokens_per_second": Column("tokens/s", 1, 0),
    "first_token_seconds": Column("first token, ms", 1e3, 0),
    "load_seconds": Column("loading, s", 1, 2),
    "dialogues_per_second": Column("dialogues/s", 1, 0),
    "flops_per_second": Column("TFLOP/s", 1e-12, 3),
    "bytes_per_second": Column("GB/s", 1e-9, 1),
    "share": Column("share of the limit, %", 100, 0),
    "peak_bytes": Column("peak memory, GB", 1e-9, 2),
    "gpu_peak_bytes": Column("GPU memory, GB", 1e-9, 2),
}


class Part(NamedTuple):
    title: str
    headline: str  # the value by which contestants are compared
    columns: tuple[str, ...]
    note: str = ""


TRAINING = ("tokens_per_second", "share", "flops_per_second", "peak_bytes", "gpu_peak_bytes")
PARTS = {
    "main": Part(
        "The main job, start to finish",
        "seconds",
        ("seconds", "peak_bytes"),
        "Ours also measures the model before and after, and writes a report, in the time given; the others don't.",
    ),
    "bundled": Part("The first run, with the bundled model", "seconds", ("seconds", "peak_bytes")),
    "throughput": Part(
        "Training throughput",
        "tokens_per_second",
        TRAINING,
        "Batch × length. Tokens that are padding do not count. A token costs 6 N + 12 L T C operations (N weights"
        " without the positions, L layers, T tokens of a dialogue, C channels; Chowdhery et al. 2022, appendix B); the limit is"
        " the rate of the model's own matrix products in that precision.",
    ),
    "lora": Part("Training adapters of rank 8", "tokens_per_second", TRAINING),
    "generation": Part(
        "Generation",
        "tokens_per_second",
        ("first_token_seconds", "tokens_per_second", "share", "bytes_per_second", "peak_bytes", "gpu_peak_bytes"),
        "The limit: for each token of all prompts together, every weight is read from memory once, in bf16.",
    ),
    "start": Part("Start", "seconds", ("seconds", "load_seconds", "bytes_per_second", "peak_bytes")),
    "reading": Part("Reading dialogues", "dialogues_per_second", ("dialogues_per_second", "seconds", "peak_bytes")),
    "constrained": Part("The main job on a smaller machine", "seconds", ("seconds", "peak_bytes")),
}


def operations_per_token(config: dict[str, Any], length: float) -> float:
    """Floating-point operations with which a token is trained, forward and backward: 6 N + 12 L T C."""
    return 6 * weights(config) + 12 * config["n_layer"] * length * config["n_embd"]


def weights(config: dict[str, Any]) -> int:
    """The weights of a GPT-2, without the positions, with which nothing is multiplied."""
    C, layers = config["n_embd"], config["n_layer"]
    block = 12 * C * C + 13 * C  # matrices 4 C² and 8 C²; biases 9 C; two norms 4 C
    return config["vocab_size"] * C + layers * block + 2 * C


def records_of(results: Results, part: str, case: str) -> list[Record]:
    return [record for record in results["records"] if (record["part"], record["case"]) == (part, case)]


def value(record: Record, name: str, others: list[Record]) -> tuple[float, float, float] | None:
    """Median, smallest and largest of what a column shows of a record; `others` are all records of its case."""
    if name != "share":
        return figure(record, name)
    rate, limit = figure(record, "tokens_per_second"), highest_rate(record, others)
    if rate is None or limit is None:
        return None
    median_rate, low, high = rate
    return median_rate / limit, low / limit, high / limit


def highest_rate(record: Record, others: list[Record]) -> float | None:
    """The tokens a second that the machine's limit, measured in the same run, would allow."""
    limits = {other["who"]: other for other in others}
    config = record["facts"].get("config")
    if record["part"] == "throughput":
        products = limits.get(f"limit: products, {record['who'][-4:]}")
        rate = figure(products, "flops_per_second") if products else None
        length = figure(record, "mean_length")
        return rate[0] / operations_per_token(config, length[0]) if rate and length else None
    if record["part"] == "generation":
        memory = limits.get("limit: reading memory")
        rate = figure(memory, "bytes_per_second") if memory else None
        return rate[0] / (2 * weights(config)) * record["facts"]["prompts"] if rate else None
    return None


def shown(value: tuple[float, float, float] | None, column: Column) -> str:
    """A median and, behind it, the smallest and the largest, where these differ."""
    if value is None:
        return ""
    middle, low, high = (f"{number * column.scale:,.{column.digits}f}" for number in value)
    return middle if low == high else f"{middle} ({low}–{high})"


def rows(results: Results, part: str, case: str) -> Iterator[list[str]]:
    """A case as a table, its titles first."""
    records, about = records_of(results, part, case), PARTS[part]
    columns = [name for name in about.columns if any(value(record, name, records) for record in records)]
    yield [case, *(COLUMNS[name].title for name in columns), "ours against it"]
    ours = next((figure(record, about.headline) for record in records if record["who"].startswith("ours")), None)
    for record in records:
        cells = [shown(value(record, name, records), COLUMNS[name]) for name in columns]
        failed = next((sample for sample in record["samples"] if sample["exit_code"]), None)
        if failed:
            cells[0] = f"exit code {failed['exit_code']}: {failed['says']}"
        theirs = None if record["who"].startswith(("ours", "limit")) else figure(record, about.headline)
        yield [record["who"], *cells, times(advantage(ours, theirs, about.headline)) if ours and theirs else ""]


def advantage(ours: tuple[float, ...], theirs: tuple[float, ...], headline: str) -> float:
    """How many times as fast ours is, by the medians: of times the inverse counts."""
    return theirs[0] / ours[0] if headline == "seconds" else ours[0] / theirs[0]


def times(ratio: float) -> str:
    return f"{ratio:.2f} ×"


def notes(results: Results, part: str, case: str) -> Iterator[str]:
    """What else was measured of a case, in words."""
    for record in records_of(results, part, case):
        samples = [sample for sample in record["samples"] if "phases" in sample]
        if samples:
            spent = {name: median(sample["phases"][name] for sample in samples) for name in samples[0]["phases"]}
            yield f"{record['who']}: {', '.join(f'{name} {seconds:.1f} s' for name, seconds in spent.items())}"
        written = next((sample["tokens_written"] for sample in record["samples"] if "tokens_written" in sample), None)
        if written:
            yield f"{record['who']}: {' + '.join(map(str, written))} tokens written"


def block(results: Results, part: str, case: str) -> str:
    """A case for the screen: columns in line."""
    table = list(rows(results, part, case))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join(["", f"{PARTS[part].title}", *lines, *notes(results, part, case)])


def markdown_row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def render_markdown(results: Results) -> str:
    """The whole of the results: machine, goals, and the tables of all parts."""
    machine, packages = results["machine"], results["versions"]
    lines = [
        f"# {results['date']}: {machine.get('gpu') or machine['processor']}, {machine['cores']} cores",
        "",
        f"{machine['memory_gb']} GB of memory; {machine['system']}; {machine['threads']} threads;"
        f" {machine['instructions']}{', AMX' if machine['amx'] else ''};"
        f" {', '.join(f'{name} {version}' for name, version in packages.items())}.",
        "",
        f"`{results['command']}`: medians of {results['repeats']} runs each, the smallest and the largest in brackets;"
        f" the model is {results['model']}, with random weights; {results['new_tokens']} tokens are written for each"
        " prompt.",
    ]
    if results["left_out"]:
        lines += ["", "Left out, since the packages are not installed: " + "; ".join(results["left_out"]) + "."]
    lines += ["", "## Goals", "", markdown_row(["what", "goal", "measured", ""]), "|---|--:|--:|---|"]
    lines += [markdown_row(row) for row in goal_rows(results)]
    for part, about in PARTS.items():
        cases = dict.fromkeys(record["case"] for record in results["records"] if record["part"] == part)
        if cases:
            lines += ["", f"## {about.title}", *(["", about.note] if about.note else [])]
        for case in cases:
            titles, *others = rows(results, part, case)
            lines += ["", markdown_row(titles), f"|---|{'--:|' * (len(titles) - 1)}", *map(markdown_row, others)]
            lines += [line for note in notes(results, part, case) for line in ("", note + ".")]
    return "\n".join(lines) + "\n"


class Goal(NamedTuple):
    what: str
    wanted: float
    at_most: bool
    unit: str
    measured: Callable[[Results], float | None]


def goal_rows(results: Results) -> Iterator[list[str]]:
    """Each goal for the device of the results, what was measured, and whether that is enough."""
    for goal in goals(results):
        measured = goal.measured(results)
        wanted = f"{'≤' if goal.at_most else '≥'} {goal.wanted:g} {goal.unit}"
        if measured is None:
            yield [goal.what, wanted, "", "not measured"]
        else:
            met = measured <= goal.wanted if goal.at_most else measured >= goal.wanted
            yield [goal.what, wanted, f"{measured:.2f} {goal.unit}", "met" if met else "not met"]


def against(part: str, case: str, rivals: str, ours: str = "ours") -> Callable[[Results], float | None]:
    """How many times as fast `ours` is as the fastest of the contestants whose names begin with `rivals`."""

    def measured(results: Results) -> float | None:
        headline, records = PARTS[part].headline, records_of(results, part, case)
        best = next((figure(record, headline) for record in records if record["who"] == ours), None)
        theirs = [figure(record, headline) for record in records if record["who"].startswith(rivals)]
        ratios = [advantage(best, one, headline) for one in theirs if best and one]
        return min(ratios, default=None)

    return measured


def shows(part: str, case: str, who: str, name: str) -> Callable[[Results], float | None]:
    """What a table shows of a contestant in one of its columns."""

    def measured(results: Results) -> float | None:
        records = records_of(results, part, case)
        found = next((value(record, name, records) for record in records if record["who"] == who), None)
        return found[0] * COLUMNS[name].scale if found else None

    return measured


def goals(results: Results) -> list[Goal]:
    """The goals of the device."""
    model = results["model"]
    if results["device"] == "cuda":
        rows, prompts, dialogues = f"{model}, 4 × 1024", f"{model}, 16 prompts", f"{model}, 8 × short dialogues"
        return [
            Goal("rows of 1024 tokens, share of the matrix-product rate", 55, False, "%",
                 shows("throughput", rows, "ours, bf16", "share")),
            Goal("short dialogues, against transformers", 3, False, "×",
                 against("throughput", dialogues, "transformers", "ours, bf16")),
            Goal("16 prompts, against transformers at its best", 5, False, "×",
                 against("generation", prompts, "transformers")),
        ]  # fmt: skip
    middle, short = f"{model}, 8 × 200", f"{model}, 2 × 45"
    return [
        Goal("main job, against the plain recipe", 10, False, "×", against("main", model, "plain recipe")),
        Goal("main job, against transformers at its best", 2.5, False, "×", against("main", model, "transformers")),
        Goal("peak memory of the main job", 6.4, True, "GB", shows("main", model, "ours", "peak_bytes")),
        Goal("training at 8 × 200, against a transformers bf16 loop", 3, False, "×",
             against("throughput", middle, "transformers loop, bf16", "ours, bf16")),
        Goal("training at 8 × 200, share of the matrix-product rate", 60, False, "%",
             shows("throughput", middle, "ours, bf16", "share")),
        Goal("LoRA rank 8 at 2 × 45, against transformers with peft at its best", 2, False, "×",
             against("lora", short, "transformers", "ours, bf16")),
        Goal("generation for 3 prompts, against transformers at its best", 2.5, False, "×",
             against("generation", f"{model}, 3 prompts", "transformers")),
        Goal("the bundled model's whole first run", 12, True, "seconds",
             shows("bundled", "first run, all defaults", "ours", "seconds")),
    ]  # fmt: skip
