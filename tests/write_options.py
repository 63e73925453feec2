"""Write docs/options.md from settings.py: python tests/write_options.py

`test_readme.py` fails while the page and the settings differ.
"""

import ast
import sys
from dataclasses import Field, fields, is_dataclass
from pathlib import Path

import tyro

PROJECT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT)] * (str(PROJECT) not in sys.path)  # when run as a script

import settings  # noqa: E402

PAGE = PROJECT / "docs" / "options.md"
HEADER = ["| option | default | meaning |", "|---|---|---|"]
GROUPS = {  # field of FinetuneSettings → heading
    "model": "Model",
    "data": "Conversations",
    "training": "Training",
    "generation": "Generated replies",
    "run": "The run",
}
START = """\
# Every option

This page shows what each option does, and its default. The tables are generated from
[`settings.py`](../settings.py) by `python tests/write_options.py`. `--help` prints the same:

```sh
uv run finetune.py --help
```

The bundled conversations and `tiny` are found wherever you start the program. All other paths are relative to the
current folder. Where no default is shown, the text says what happens.

## finetune.py
"""
EVALUATE = """\
## evaluate.py

It takes these options, and those of `finetune.py` for the model folder, the conversations (without splits and folds),
the machine (`--device`, `--precision`, `--seed`) and the generated replies.
"""
CHAT = """\
## chat.py

It takes these options, and `--model-path`, `--top-k`, `--device` and `--precision` of `finetune.py`.
"""
EXPORT = """\
## export.py

It takes these options, and `--model-path` of `finetune.py`. See
[llama.cpp and Ollama](elsewhere.md#llamacpp-and-ollama).
"""
READ = """\
## python -m dialogues

It takes `FILE...`, and these options of `finetune.py`: {}.
"""


def field_docstrings() -> dict[tuple[str, str], str]:
    """Return (class, field) → the docstring of the field in settings.py."""
    found = {}
    for node in ast.parse((PROJECT / "settings.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            for statement, after in zip(node.body, node.body[1:], strict=False):
                if isinstance(statement, ast.AnnAssign) and isinstance(after, ast.Expr):
                    text = ast.literal_eval(after.value)
                    found[node.name, ast.unparse(statement.target)] = " ".join(text.split())
            for base in node.bases:
                inherited = {field: text for (name, field), text in found.items() if name == ast.unparse(base)}
                found = {(node.name, field): text for field, text in inherited.items()} | found
    return found


def is_group(field: Field) -> bool:
    return field.default_factory is not None and is_dataclass(field.default_factory)


def option_rows(group: type) -> list[str]:
    """Return a Markdown row for each option of `group` and of its nested groups, in order."""
    docstrings, rows = field_docstrings(), []
    for field in fields(group):
        if is_group(field):
            rows += option_rows(field.default_factory)  # pyright: ignore[reportArgumentType]
            continue
        metadata = getattr(field.type, "__metadata__", ())
        if tyro.conf.Suppress in metadata:  # recorded, but not an option
            continue
        name = next((marker.name for marker in metadata if getattr(marker, "name", None)), field.name)
        positional = next((marker.metavar for marker in metadata if getattr(marker, "metavar", None)), None)
        option = positional or f"--{name.replace('_', '-')}"
        text = docstrings.get((group.__name__, field.name), "").replace("<", "\\<")  # <n> would be an HTML tag
        rows.append(f"| `{option}` | {as_default(field.default)} | {text} |")
    return rows


def as_default(value: object) -> str:
    """Format a default for the tables."""
    if value is None or value == () or value == "":
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{' '.join(map(str, value)) if isinstance(value, tuple) else value}`"


def own_rows(command: type) -> list[str]:
    """Return the rows of the options that only this command has, not finetune.py."""
    known = set(option_rows(settings.FinetuneSettings))
    return [row for row in option_rows(command) if row not in known]


def options_page() -> str:
    """Return the text of docs/options.md."""
    grouped = {field.name: field for field in fields(settings.FinetuneSettings) if is_group(field)}
    assert grouped.keys() == GROUPS.keys()
    lines, shown = START.splitlines(), set()
    for name, heading in GROUPS.items():
        rows = option_rows(grouped[name].default_factory)  # pyright: ignore[reportArgumentType]
        shown.update(rows)
        lines += ["", f"### {heading}", "", *HEADER, *rows]
    rest = [row for row in option_rows(settings.FinetuneSettings) if row not in shown]
    lines += ["", "### Preview and output", "", *HEADER, *rest]
    pairs = (
        (EVALUATE, settings.EvaluateSettings),
        (CHAT, settings.ChatSettings),
        (EXPORT, settings.ExportSettings),
    )
    for text, command in pairs:
        lines += ["", *text.splitlines(), "", *HEADER, *own_rows(command)]
    read = [row.split(" | ")[0].strip("| ") for row in option_rows(settings.ReadSettings)[1:]]
    lines += ["", *READ.format(", ".join(read)).splitlines()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(options_page(), encoding="utf-8")
    print(f"written: {PAGE.relative_to(PROJECT)}")
