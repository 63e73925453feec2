"""The model card, `model/README.md`: a description of the model in the Hugging Face hub's format.

It depends only on the run folder. So that the folder can be published, it contains no names, paths or conversations.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evaluation.findings import SHORT_TABLE
from evaluation.metric_table import GROUPS, columns_of, make_cell
from evaluation.run_files import RunFiles, mapping, number, read_run
from hub.find import BUNDLED, HUB_IDS
from support.files import write_text

CARD = "README.md"
REPOSITORY = "YOUR-NAME/YOUR-MODEL"
TRAINING = (
    *("epochs", "max_steps", "batch_size", "gradient_accumulation", "learning_rate", "weight_decay", "schedule"),
    *("warmup", "dropout", "lora_rank", "keep", "seed"),
)
USE = f"""```python
from transformers import pipeline

model = pipeline("text-generation", model="{REPOSITORY}")
chat = [{{"role": "user", "content": "How was your day?"}}]
print(model(chat, do_sample=False)[0]["generated_text"][-1]["content"])
```

`user` is the first speaker of the conversations, and the model answers as the second. If it was trained on one
speaker's turns, it answers as that speaker. The chat template and the end-of-turn tokens are in this folder."""
LIMITS = """- If it was trained on the conversations of real people, it imitates them.
- It may repeat its training conversations word for word, and it makes up facts.
- It was measured on held-out conversations from the same data only, and not for safety."""


def write_card(folder: Path) -> None:
    """Write the model card of the finished run in `folder`.

    Raises:
        UserError: it can't be written.
    """
    run = read_run(folder)
    sections = {
        "Use": USE,
        "Training data": "\n".join(describe_data(run)),
        "Training": "\n".join(describe_training(run)),
        "Evaluation": "\n".join(describe_metrics(run)),
        "Limits": LIMITS,
    }
    text = "".join(f"\n## {title}\n\n{content}\n" for title, content in sections.items())
    write_text(folder / "model" / CARD, f"---\n{metadata(run)}\n---\n\n{introduce(run)}\n{text}")


def metadata(run: RunFiles) -> str:
    """The YAML that the hub reads: the base model, the task, and the main results."""
    from huggingface_hub import EvalResult, ModelCardData

    values = mapping(mapping(run.evaluation.get("metrics")).get("model"))
    measured = {name: number(values.get(name)) for name in ("loss", "perplexity", "bits_per_byte")}
    results = [
        EvalResult(
            "text-generation", "conversations", "held-out conversations", metric_type=name, metric_value=round(value, 3)
        )
        for name, value in measured.items()
        if value is not None
    ]
    return ModelCardData(
        base_model=base_model(run) or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2", "conversational"],
        model_name="GPT-2 fine-tuned on conversations" if results else None,
        eval_results=results or None,
    ).to_yaml()


def base_model(run: RunFiles) -> str:
    """The hub's id of the base model; empty for a local one."""
    name = str(mapping(run.settings.get("model")).get("name", ""))
    owner, slash, _ = name.partition("/")
    return HUB_IDS.get(name, name if slash and owner else "")  # the paths of local models are absolute


def introduce(run: RunFiles) -> str:
    name = mapping(run.settings.get("model")).get("name")
    base = base_model(run) or ("a small bundled model" if name == BUNDLED.name else "a local model")
    size = f" It has {run.parameters:,} parameters." if run.parameters else ""
    return f"# GPT-2 fine-tuned on conversations\n\nFine-tuned from {base}.{size}"


def describe_data(run: RunFiles) -> Iterator[str]:
    """The amount of data, without its content."""
    ledger, evaluated = run.ledger, mapping(run.evaluation.get("settings"))
    for name, part in mapping(ledger.get("parts")).items():
        counts = (f"{number(mapping(part).get(what)) or 0:,.0f} {what}" for what in ("dialogues", "turns", "tokens"))
        yield f"- {name}: {', '.join(counts)}"
    learned = {"all": "all turns", "replies": "the replies"}.get(str(evaluated.get("learn")), "one speaker's turns")
    yield f"- Learned: {learned}. Template: `{evaluated.get('template', 'prompt')}`."
    masked = mapping(run.settings.get("data")).get("mask")
    private = "were replaced by placeholders" if masked else "were not removed"
    yield f"- Phone numbers, e-mail addresses, links and IBANs {private}."
    yield "- The conversations are not part of this folder."


def describe_training(run: RunFiles) -> Iterator[str]:
    training = mapping(run.settings.get("training"))
    yield from table(["option", "value"], [[name, show(training[name])] for name in TRAINING if name in training])


def describe_metrics(run: RunFiles) -> Iterator[str]:
    """The metrics of the terminal's table, with their intervals."""
    metrics = mapping(run.evaluation.get("metrics"))
    columns = columns_of(metrics)
    rows = []
    for metric in (metric for group in GROUPS.values() for metric in group if metric.key in SHORT_TABLE):
        cells = [make_cell(metric, mapping(metrics.get(column))) for column in columns]
        if any(cell.value != "–" for cell in cells):
            rows.append([metric.name, *map(str, cells)])
    yield from table(["", *columns.values()], rows)
    replies = number(mapping(run.evaluation.get("data")).get("replies"))
    yield ""
    yield f"The ranges are 95% intervals. {replies or 0:,.0f} true replies in held-out conversations were scored."


def table(heading: list[str], rows: list[list[str]]) -> list[str]:
    lines = [heading, ["---"] * len(heading), *rows]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines]


def show(value: Any) -> str:
    return "–" if value is None else str(value)
