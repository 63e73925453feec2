"""README and docs/data.md are promises: their options, files and commands exist, and their samples are read."""

import ast
import re
import shlex
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import tyro

import settings
from conftest import PROJECT, dialogues_of
from dialogues.__main__ import read_source
from dialogues.reading import open_source
from run import parse_options
from settings import ChatSettings, EvaluateSettings, FinetuneSettings, ReadSettings
from support.command_line import parse_command_line
from support.errors import UserError

README = (PROJECT / "README.md").read_text(encoding="utf-8")
DATA = (PROJECT / "docs" / "data.md").read_text(encoding="utf-8")
COMMANDS = {
    "finetune.py": FinetuneSettings,
    "evaluate.py": EvaluateSettings,
    "chat.py": ChatSettings,
    "dialogues": ReadSettings,
}


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


def documented_commands() -> list[str]:
    """Every line of a shell block that starts one of our commands, without what follows it in the shell."""
    blocks = re.findall(r"```(?:sh|powershell)\n(.*?)```", README + DATA, re.DOTALL)
    lines = [re.split(r"  #| > ", line)[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if re.search(r"\bpython\S* (?:\S+\.py|-m dialogues)\b", line)]


@pytest.mark.parametrize("line", documented_commands())
def test_a_documented_command_is_understood(line):
    words = shlex.split(line)
    script = next(number for number, word in enumerate(words) if word.endswith(".py") or word == "dialogues")
    if words[script] == "benchmarks/run.py":
        assert parse_options(words[script + 1 :])  # or it exits
        return
    command = COMMANDS[words[script]]
    assert isinstance(parse_command_line(command, words[script + 1 :]), command)


def table_below(header: str) -> list[list[str]]:
    """The cells of each row of the table in docs/data.md that has this header, without code marks."""
    table = re.search(rf"{re.escape(header)}.*\n.*?\n((?:\|.*\n)+)", DATA)
    assert table
    rows = [row.strip("| ").split(" | ") for row in table[1].splitlines()]
    return [[cell.replace("<br>", "\n").replace("`", "") for cell in row] for row in rows]


FORMATS = {cells[0].split(",")[0]: cells[1] for cells in table_below("| `--format` | looks like |")}
LAYOUTS = {cells[0]: (cells[1], re.split(r"[:;]", cells[2])[0]) for cells in table_below("| layout | looks like |")}


def check_sample(text: str, format: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")
    source = open_source(path)
    assert source.format == format
    dialogue = next(dialogues_of(source))
    assert dialogue.turns[-1].text in ("Since Friday.", "Then stay in.", "friend")
    assert 2 <= len(dialogue.turns) <= 4
    assert len({turn.speaker for turn in dialogue.turns}) > 1


def test_every_format_has_its_sample():
    assert set(FORMATS) == set(get_args(get_type_hints(settings.DataSettings)["format"])) - {"auto", "tsv"}


@pytest.mark.parametrize("name", FORMATS)
def test_a_sample_of_a_format_is_read(name, tmp_path):
    check_sample(FORMATS[name], name, tmp_path / "data")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sample_of_a_layout_is_read(layout, tmp_path):
    text, format = LAYOUTS[layout]
    check_sample(text, format, tmp_path / "data")


def test_options_named_in_the_documents_exist():
    help_of_others = {"--logdir", "--nproc-per-node", "--index-url", "--version", "--requirement", "--outfile"}
    help_of_others |= {"--repo-type", "--local-dir"}  # of hf download
    help_of_others |= {"--parts", "--quick", "--leave-out"}  # of the benchmark
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README + DATA)) - help_of_others
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


REFUSED = {
    "nobody says this": "Nora: Hello!\nTimo: Hello!\n\nIt rained.\n\nNora: Tea?\nTimo: Please.",
    "no known form of a conversation has the keys": '[{"who_asks": "Nora", "what": 1}]',
    "this could be messages or pairs": '{"prompt": "Tea?", "completion": "Please.", "messages":'
    ' [{"role": "user", "content": "Tea?"}, {"role": "assistant", "content": "Please."}]}',
    "not UTF-8 text": "Nora: Café?\nTimo: Hello!",
    "only Nora speaks": "[31.12.23, 22:15:40] Nora: Tea?\n[31.12.23, 22:17:00] Nora: Milk?",
    "its marks separate turns, and nothing says who speaks": "Tea? __eou__ Please. __eou__",
    "no dialogue of two turns or more": "[31.12.23, 22:15:40] Nora: Tea?\n[02.01.24, 22:17:00] Timo: Please.",
    "line 3 has 1 columns, the header 2": "speaker,text\nNora,Tea?\nTimo",
    "the key 'text' occurs 2 times": '{"turns": [{"speaker": "Nora", "text": "Tea?", "text": "Milk?"}]}',
}


def test_every_refusal_that_is_explained_is_tried():
    assert set(REFUSED) == {cells[0] for cells in table_below("| the error says | do this |")}


@pytest.mark.parametrize("error", REFUSED)
def test_a_refusal_is_worded_as_explained(error, tmp_path, capsys):
    path = tmp_path / "data"
    path.write_text(REFUSED[error], encoding="latin-1")
    with pytest.raises(UserError, match=re.escape(error)):
        read_source(open_source(path), ReadSettings())


def test_the_reasons_to_leave_out_are_the_programs_own():
    sources = "".join(path.read_text(encoding="utf-8") for path in (PROJECT / "dialogues").rglob("*.py"))
    explained = [name for cells in table_below("| the account says |") for name in cells[0].split(", ")]
    assert len(explained) > 8
    assert [name for name in explained if name not in sources] == []
