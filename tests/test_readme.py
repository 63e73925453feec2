"""The README is a promise: its options, files and commands exist, and its table is the dataclass."""

import ast
import re
import shlex
from dataclasses import fields, is_dataclass
from typing import get_args, get_type_hints

import pytest
import tyro

import settings
from conftest import PROJECT, dialogues_of
from dialogues.reading import open_source
from run import parse_options
from settings import ChatSettings, EvaluateSettings, FinetuneSettings
from support.command_line import parse_command_line

README = (PROJECT / "README.md").read_text(encoding="utf-8")
COMMANDS = {"finetune.py": FinetuneSettings, "evaluate.py": EvaluateSettings, "chat.py": ChatSettings}


def field_docstrings() -> dict[tuple[str, str], str]:
    """(class, field) → the text under the field in settings.py."""
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


def option_table(group: type, docstrings: dict[tuple[str, str], str]) -> list[str]:
    """A Markdown row for each option of `group`, in order."""
    rows = []
    for field in fields(group):
        if field.default_factory is not None and is_dataclass(field.default_factory):
            rows += option_table(field.default_factory, docstrings)  # pyright: ignore[reportArgumentType]
            continue
        metadata = getattr(field.type, "__metadata__", ())
        if tyro.conf.Suppress in metadata:  # recorded, and no option
            continue
        name = next((marker.name for marker in metadata if getattr(marker, "name", None)), field.name)
        value = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        default = {None: "", "": "", False: "off"}.get(value, f"`{value}`")
        positional = next((marker.metavar for marker in metadata if getattr(marker, "metavar", None)), None)
        option = positional or f"--{name.replace('_', '-')}"
        rows.append(f"| `{option}` | {default} | {docstrings[group.__name__, field.name]} |")
    return rows


def test_the_option_table_is_the_dataclass():
    rows = option_table(FinetuneSettings, field_docstrings())
    assert len(rows) > 20
    table = "\n".join(["| option | default | meaning |", "|---|---|---|", *rows])
    assert table in README, f"the table in README.md should be:\n{table}"


@pytest.mark.parametrize("command", [EvaluateSettings, ChatSettings])
def test_the_options_of_another_command_are_its_dataclass(command):
    table = "\n".join(["| option | default | meaning |", "|---|---|---|", *own_rows(command)])
    assert table in README, f"the table in README.md should be:\n{table}"


def own_rows(command: type) -> list[str]:
    """The options of a command that finetune.py does not have."""
    known = set(option_table(FinetuneSettings, field_docstrings()))
    return [row for row in option_table(command, field_docstrings()) if row not in known]


def readme_commands() -> list[str]:
    """Every line of a shell block that starts one of our commands, comments and prompts off."""
    blocks = re.findall(r"```(?:sh|powershell)\n(.*?)```", README, re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if re.search(r"\bpython\S* \S+\.py\b", line)]


@pytest.mark.parametrize("line", readme_commands())
def test_a_command_of_the_readme_is_understood(line):
    words = shlex.split(line)
    script = next(number for number, word in enumerate(words) if word.endswith(".py"))
    if words[script] == "benchmarks/run.py":
        assert parse_options(words[script + 1 :])  # or it exits
        return
    command = COMMANDS[words[script]]
    assert isinstance(parse_command_line(command, words[script + 1 :]), command)


def format_samples() -> dict[str, str]:
    """Format → its sample in the table."""
    table = re.search(r"\| `--format` \| looks like \|\n.*?\n((?:\|.*\n)+)", README)
    assert table
    rows = (re.fullmatch(r"\| `([\w-]+)`(?:, `tsv`)? \| (.*) \|", row) for row in table[1].splitlines())
    return {row[1]: row[2].replace("<br>", "\n").replace("`", "") for row in rows if row}


def test_every_format_has_its_sample():
    known = set(get_args(get_type_hints(settings.DataSettings)["format"])) - {"auto", "tsv"}
    assert set(format_samples()) == known


@pytest.mark.parametrize("name", format_samples())
def test_a_sample_of_the_readme_is_read(name, tmp_path):
    path = tmp_path / "data"
    path.write_text(format_samples()[name], encoding="utf-8")
    source = open_source(path)
    assert source.format == name
    dialogue = next(dialogues_of(source))
    assert dialogue.turns[-1].text in ("Since Friday.", "Then stay in.", "friend")
    assert len(dialogue.turns) in (2, 3)


def test_options_named_in_the_readme_exist():
    help_of_others = {"--logdir", "--nproc-per-node", "--index-url", "--version", "--requirement", "--outfile"}
    help_of_others |= {"--parts", "--quick", "--leave-out"}  # of the benchmark
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) - help_of_others
    rows = option_table(FinetuneSettings, field_docstrings()) + own_rows(EvaluateSettings) + own_rows(ChatSettings)
    table = "\n".join(rows)
    assert {option for option in named if f"`{option}`" not in table} == {"--help"}


def test_files_named_in_the_tree_exist():
    tree = re.search(r"```text\n(finetune\.py.*?)```", README, re.DOTALL)
    assert tree
    folder = ""
    for line in tree[1].splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
        assert (PROJECT / (folder if line.startswith(" ") else "") / name).exists(), line


def test_every_option_has_its_help():
    names = {name for name in vars(settings) if name.endswith("Settings") and is_dataclass(vars(settings)[name])}
    docstrings = field_docstrings()
    for name in names:
        for field in fields(vars(settings)[name]):
            is_group = field.default_factory is not None and is_dataclass(field.default_factory)
            assert is_group or docstrings.get((name, field.name)), f"{name}.{field.name}"
