"""Format the results as tables, for the screen and as Markdown, and compare each goal with its measured figure."""

import textwrap
from collections.abc import Callable, Iterator
from operator import itemgetter
from statistics import median
from typing import Any, NamedTuple

from measure import figure

FIRST_RUN = "first run, all defaults"
Results = dict[str, Any]
Record = dict[str, Any]


class Column(NamedTuple):
    title: str
    scale: float  # factor from the unit of the samples to the displayed one
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
        "Our time includes metrics before and after training, and a report; the others compute neither.",
    ),
    "bundled": Part("The first run, with the bundled model", "seconds", ("seconds", "peak_bytes")),
    "throughput": Part(
        "Training throughput",
        "tokens_per_second",
        TRAINING,
        "Batch × length. Padding does not count as tokens. A token costs 6 N + 12 L T C operations (N weights without"
        " position embeddings, L layers, T tokens per dialogue, C channels; Chowdhery et al. 2022, appendix B);"
        " the limit is the rate of the model's own matrix products in the same precision.",
    ),
    "lora": Part("Training adapters of rank 8", "tokens_per_second", TRAINING),
    "generation": Part(
        "Generation",
        "tokens_per_second",
        ("first_token_seconds", "tokens_per_second", "share", "bytes_per_second", "peak_bytes", "gpu_peak_bytes"),
        "The limit: each decode step for all prompts together reads every weight from memory once, in bf16.",
    ),
    "start": Part("Start", "seconds", ("seconds", "load_seconds", "bytes_per_second", "peak_bytes")),
    "reading": Part("Reading dialogues", "dialogues_per_second", ("dialogues_per_second", "seconds", "peak_bytes")),
    "constrained": Part("The main job on a smaller machine", "seconds", ("seconds", "peak_bytes")),
}


def operations_per_token(config: dict[str, Any], length: float) -> float:
    """Floating-point operations per trained token, forward and backward: 6 N + 12 L T C."""
    return 6 * weights(config) + 12 * config["n_layer"] * length * config["n_embd"]


def weights(config: dict[str, Any]) -> int:
    """Number of weights in a GPT-2, without position embeddings, which are not part of any matrix product."""
    C, layers = config["n_embd"], config["n_layer"]
    block = 12 * C * C + 13 * C  # matrices 4 C² and 8 C²; biases 9 C; two norms 4 C
    return config["vocab_size"] * C + layers * block + 2 * C


def records_of(results: Results, part: str, case: str) -> list[Record]:
    return [record for record in results["records"] if (record["part"], record["case"]) == (part, case)]


def value(record: Record, name: str, others: list[Record]) -> tuple[float, float, float] | None:
    """Median, minimum and maximum of a record in the column `name`; `others` are all records of the same case."""
    if name != "share":
        return figure(record, name)
    rate, limit = figure(record, "tokens_per_second"), highest_rate(record, others)
    if rate is None or limit is None:
        return None
    median_rate, low, high = rate
    return median_rate / limit, low / limit, high / limit


def highest_rate(record: Record, others: list[Record]) -> float | None:
    """Tokens per second at the machine's limit, which was measured in the same run."""
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
    """A median, followed by the minimum and the maximum if they differ."""
    if value is None:
        return ""
    middle, low, high = (f"{number * column.scale:,.{column.digits}f}" for number in value)
    return middle if low == high else f"{middle} ({low}–{high})"


def rows(results: Results, part: str, case: str) -> Iterator[list[str]]:
    """Yield the rows of a case's table, starting with the titles."""
    records, about = records_of(results, part, case), PARTS[part]
    shown_somewhere = [name for name in about.columns if any(value(record, name, records) for record in records)]
    columns = shown_somewhere or [about.headline]  # when every contestant failed
    yield [case, *(COLUMNS[name].title for name in columns), "our speed-up"]
    for record in records:
        cells = [shown(value(record, name, records), COLUMNS[name]) for name in columns]
        failed = next((sample for sample in record["samples"] if sample["exit_code"]), None)
        if failed:
            says = textwrap.shorten(failed["says"], 100, placeholder=" …")  # the JSON file has the whole line
            cells[0] = f"exit code {failed['exit_code']}: {says}"
        alike = [one for one in of_ours(records) if one["who"][-6:] == record["who"][-6:]]  # with the same precision
        ratio = None if record["who"].startswith(("ours", "limit")) else advantage(alike or of_ours(records), record)
        yield [record["who"], *cells, f"{ratio:.2f} ×" if ratio else ""]


def of_ours(records: list[Record]) -> list[Record]:
    """Our records of a case: the program with its defaults, or all precisions if that was not measured."""
    shipped = [record for record in records if record["who"] == "ours"]
    return shipped or [record for record in records if record["who"].startswith("ours")]


def advantage(ours: list[Record], rival: Record) -> float | None:
    """The speed-up of our fastest record over a rival's median: a ratio of rates, or for times the inverse ratio."""
    headline = PARTS[rival["part"]].headline
    theirs = figure(rival, headline)
    best = [found[0] for found in (figure(record, headline) for record in ours) if found]
    if theirs is None or not best:
        return None
    return theirs[0] / min(best) if headline == "seconds" else max(best) / theirs[0]


def notes(results: Results, part: str, case: str) -> Iterator[str]:
    """Yield the other figures of a case as sentences."""
    for record in records_of(results, part, case):
        samples = [sample for sample in record["samples"] if "phases" in sample]
        if samples:
            spent = {name: median(sample["phases"][name] for sample in samples) for name in samples[0]["phases"]}
            yield f"{record['who']}: {', '.join(f'{name} {seconds:.1f} s' for name, seconds in spent.items())}"
        written = next((sample["tokens_written"] for sample in record["samples"] if "tokens_written" in sample), None)
        if written:
            yield f"{record['who']}: {' + '.join(map(str, written))} tokens written"


def block(results: Results, part: str, case: str) -> str:
    """Format a case for the screen, with aligned columns."""
    table = list(rows(results, part, case))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join(["", f"{PARTS[part].title}", *lines, *notes(results, part, case)])


def markdown_row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def render_markdown(results: Results) -> str:
    """Format all results as Markdown: the machine, the goals, and the tables of all parts."""
    machine, packages = results["machine"], results["versions"]
    lines = [
        f"# {results['date']}: {machine.get('gpu') or machine['processor']}, {machine['cores']} cores",
        "",
        f"{machine['memory_gb']} GB of memory; {machine['system']}; {machine['threads']} threads;"
        f" {machine['instructions']}{', AMX' if machine['amx'] else ''};"
        f" {', '.join(f'{name} {version}' for name, version in packages.items())}.",
        "",
        f"`{results['command']}`: medians of {results['repeats']} runs, with minimum and maximum in brackets;"
        f" the model is {results['model']} with random weights; it writes {results['new_tokens']} tokens per prompt.",
    ]
    if not machine["bf16"]:
        lines += ["", "This machine has no native bf16: everything is in fp32."]
    if results["left_out"]:
        gone = "; ".join(results["left_out"])
        lines += ["", f"Left out by --leave-out, or because a package is not installed: {gone}."]
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
    unit: str
    measured: Callable[[Results], float | None]
    at_most: bool = False


def goal_rows(results: Results) -> Iterator[list[str]]:
    """Yield each goal for the device that was measured, its measured figure, and whether it is met."""
    for goal in goals(results):
        measured = goal.measured(results)
        wanted = f"{'≤' if goal.at_most else '≥'} {goal.wanted:g} {goal.unit}"
        if measured is None:
            yield [goal.what, wanted, "", "not measured"]
        else:
            met = measured <= goal.wanted if goal.at_most else measured >= goal.wanted
            yield [goal.what, wanted, f"{measured:.2f} {goal.unit}", "met" if met else "not met"]


def against(part: str, case: str, rivals: str) -> Callable[[Results], float | None]:
    """Our speed-up over the fastest contestant whose name begins with `rivals`."""

    def measured(results: Results) -> float | None:
        records = records_of(results, part, case)
        ratios = [advantage(of_ours(records), record) for record in records if record["who"].startswith(rivals)]
        return min((ratio for ratio in ratios if ratio), default=None)

    return measured


def shows(part: str, case: str, name: str) -> Callable[[Results], float | None]:
    """Our figure in a table's column; if there are several precisions, that of the fastest."""

    def measured(results: Results) -> float | None:
        records, headline = records_of(results, part, case), PARTS[part].headline
        sign = -1 if headline == "seconds" else 1
        rated = [(sign * rate[0], record) for record in of_ours(records) if (rate := figure(record, headline))]
        found = value(max(rated, key=itemgetter(0))[1], name, records) if rated else None
        return found[0] * COLUMNS[name].scale if found else None

    return measured


def goals(results: Results) -> list[Goal]:
    """The goals for the device that was measured."""
    model = results["model"]
    if results["device"] == "cuda":
        return [
            *(Goal(f"training at {size} × 1024, share of the matrix-product rate", wanted, "%",
                   shows("throughput", f"{model}, {size} × 1024", "share")) for size, wanted in ((4, 40), (16, 58))),
            *(Goal(f"training on {size} short dialogues at a time, vs. transformers at its best", wanted, "×",
                   against("throughput", f"{model}, {size} × short dialogues", "transformers"))
              for size, wanted in ((8, 5), (32, 2.5))),
            Goal("main job", 10, "s", shows("main", model, "seconds"), at_most=True),
            Goal("main job, vs. transformers at its best", 1.5, "×", against("main", model, "transformers")),
            Goal("generation for 16 prompts, vs. transformers at its best", 5, "×",
                 against("generation", f"{model}, 16 prompts", "transformers")),
        ]  # fmt: skip
    middle, short, prompts = f"{model}, 8 × 200", f"{model}, 2 × 45", f"{model}, 3 prompts"
    return [
        Goal("main job, vs. the plain recipe", 10, "×", against("main", model, "plain recipe")),
        Goal("main job, vs. transformers at its best", 2.5, "×", against("main", model, "transformers")),
        Goal("peak memory of the main job", 6.4, "GB", shows("main", model, "peak_bytes"), at_most=True),
        Goal("training at 8 × 200, vs. a transformers loop at its best", 3, "×",
             against("throughput", middle, "transformers")),
        Goal("training at 8 × 200, share of the matrix-product rate", 60, "%", shows("throughput", middle, "share")),
        Goal("LoRA rank 8 at 2 × 45, vs. transformers with peft at its best", 2, "×",
             against("lora", short, "transformers")),
        Goal("generation for 3 prompts, vs. transformers at its best", 2.5, "×",
             against("generation", prompts, "transformers")),
        Goal("first run with the bundled model", 12, "s", shows("bundled", FIRST_RUN, "seconds"), at_most=True),
    ]  # fmt: skip
