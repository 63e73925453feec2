"""README.md, docs/ and benchmarks/README.md agree with the program.

Their options, files, links and commands exist, the program reads their samples, and no page is long.
"""

import re
import shlex
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import write_options

import settings
from conftest import PROJECT, dialogues_of
from dialogues.__main__ import read_source
from dialogues.reading import open_source
from run import parse_options
from settings import ChatSettings, EvaluateSettings, ExportSettings, FinetuneSettings, ReadSettings
from support.command_line import parse_command_line
from support.errors import UserError

GUIDES = [*sorted((PROJECT / "docs").glob("*.md")), PROJECT / "benchmarks" / "README.md"]
PAGES = {
    path.relative_to(PROJECT).as_posix(): path.read_text(encoding="utf-8")
    for path in (PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *GUIDES)
}
README, DATA = PAGES["README.md"], PAGES["docs/data.md"]
COMMANDS = {
    "finetune.py": FinetuneSettings,
    "evaluate.py": EvaluateSettings,
    "chat.py": ChatSettings,
    "export.py": ExportSettings,
    "dialogues": ReadSettings,
}
FOREIGN_OPTIONS = {
    *("--project", "--extra", "--group", "--with"),  # uv
    *("--requirement", "--extra-index-url"),  # pip
    *("--model_dir", "--output_dir"),  # converters
    *("--logdir", "--repo-type", "--local-dir", "--private"),  # tensorboard, hf
    *("--model_args", "--tasks", "--include_path"),  # lm_eval
    *("--nnodes", "--node-rank", "--nproc-per-node", "--master-addr", "--master-port"),  # torchrun
    *("--parts", "--quick", "--leave-out"),  # benchmarks/run.py
    "--help",
}


def test_the_options_page_is_up_to_date():
    page = write_options.options_page()
    assert len(page.splitlines()) > 60
    assert PAGES["docs/options.md"] == page, "run: python tests/write_options.py"


def test_every_option_has_a_help_text():
    names = {name for name in vars(settings) if name.endswith("Settings") and is_dataclass(vars(settings)[name])}
    docstrings = write_options.field_docstrings()
    for name in names - {"ReadSettings"}:
        for field in fields(vars(settings)[name]):
            assert write_options.is_group(field) or docstrings.get((name, field.name)), f"{name}.{field.name}"


def test_the_readme_shows_the_true_defaults():
    generated = {tuple(row.split(" | ")[:2]) for row in write_options.option_rows(FinetuneSettings)}
    table = re.search(r"\| option \| default \|.*\n.*\n((?:\|.*\n)+)", README)
    assert table
    rows = [tuple(row.split(" | ")[:2]) for row in table[1].splitlines()]
    assert len(rows) == 10
    assert [row for row in rows if row not in generated] == []


@pytest.mark.parametrize("page", PAGES)
def test_pages_are_short(page):
    assert len(PAGES[page].splitlines()) <= (220 if page == "README.md" else 200)


@pytest.mark.parametrize("page", [page for page in PAGES if "/" in page])
def test_a_page_begins_by_saying_what_it_is_for(page):
    title, _, use = PAGES[page].splitlines()[:3]
    assert title.startswith("# ")
    assert use.startswith("This page shows ")


def shell_lines() -> list[str]:
    """Every line of the shell blocks, without comments, redirections and the commands before a pipe."""
    blocks = re.findall(r"```(?:sh|powershell)\n(.*?)```", "\n".join(PAGES.values()), re.DOTALL)
    lines = [re.split(r"  +#| > ", line)[0].split(" | ")[-1].strip() for block in blocks for line in block.splitlines()]
    return sorted(set(filter(None, lines)))


def own_commands() -> list[str]:
    """The lines that start a command of this project, not `python -m pytest` and the like."""
    return [line for line in shell_lines() if re.search(r"(?:^| )(?:[\w/]+\.py|-m dialogues)\b", line)]


@pytest.mark.parametrize("line", own_commands())
def test_a_documented_command_is_valid(line):
    words = shlex.split(line)
    place = next(number for number, word in enumerate(words) if word.endswith(".py") or word == "dialogues")
    script, options = words[place], words[place + 1 :]
    if script == "benchmarks/run.py":
        assert parse_options(options)  # exits if an option is wrong
    elif script.startswith("tests/"):
        assert (PROJECT / script).exists()
        assert not options
    elif "--help" not in options:
        assert isinstance(parse_command_line(COMMANDS[script], options), COMMANDS[script])


def test_documented_make_targets_exist():
    makefile = (PROJECT / "Makefile").read_text(encoding="utf-8")
    targets = {line.split()[1] for line in shell_lines() if line.startswith("make ")}
    targets |= set(re.findall(r"`make (\w+)", "\n".join(PAGES.values())))
    assert targets
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


def test_documented_extras_exist():
    project = (PROJECT / "pyproject.toml").read_text(encoding="utf-8")
    extras = set(re.findall(r"--extra (\w+)", "\n".join(PAGES.values())))
    assert extras
    assert [extra for extra in extras if not re.search(rf"^{extra} = \[", project, re.MULTILINE)] == []


def test_documented_options_exist():
    rows = write_options.option_rows(FinetuneSettings)
    for command in (EvaluateSettings, ChatSettings, ExportSettings):
        rows += write_options.own_rows(command)
    known = {row.split("`")[1] for row in rows}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", "\n".join(PAGES.values())))
    assert named - known - FOREIGN_OPTIONS == set()


def anchors(text: str) -> set[str]:
    """The ids that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_are_not_broken(page):
    text = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
    for link in [*re.findall(r"\]\(([^)]+)\)", text), *re.findall(r'src="([^"]+)"', text)]:
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (PROJECT / page).parent / path if path else PROJECT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("page", PAGES)
def test_code_files_named_in_a_page_exist(page):
    known = [path.relative_to(PROJECT).as_posix() for path in PROJECT.rglob("*.py") if ".venv" not in path.parts]
    for name in set(re.findall(r"`([\w/]+\.py)`", PAGES[page])):
        assert any(path == name or path.endswith(f"/{name}") for path in known), name


def test_the_code_tour_names_existing_files():
    tour = re.search(r"```text\n(finetune\.py .*?)```", README, re.DOTALL)
    assert tour
    names = [line.split()[0] for line in tour[1].splitlines()]
    assert len(names) == 13
    assert [name for name in names if not (PROJECT / name).exists()] == []


def table_below(header: str) -> list[list[str]]:
    """The cells of each row of the table in docs/data.md that has this header, without backticks."""
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


def test_every_format_has_a_sample():
    assert set(FORMATS) == set(get_args(get_type_hints(settings.DataSettings)["format"])) - {"auto", "tsv"}


@pytest.mark.parametrize("name", FORMATS)
def test_the_sample_of_a_format_can_be_read(name, tmp_path):
    check_sample(FORMATS[name], name, tmp_path / "data")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_sample_of_a_layout_can_be_read(layout, tmp_path):
    text, format = LAYOUTS[layout]
    check_sample(text, format, tmp_path / "data")


REFUSED = {
    "no speaker for this line": "Nora: Hello!\nTimo: Hello!\n\nIt rained.\n\nNora: Tea?\nTimo: Please.",
    "no known format has the keys": '[{"who_asks": "Nora", "what": 1}]',
    "this could be messages or pairs": '{"prompt": "Tea?", "completion": "Please.", "messages":'
    ' [{"role": "user", "content": "Tea?"}, {"role": "assistant", "content": "Please."}]}',
    "not UTF-8 text": "Nora: Café?\nTimo: Hello!",
    "only Nora speaks": "[31.12.23, 22:15:40] Nora: Tea?\n[31.12.23, 22:17:00] Nora: Milk?",
    "separators mark the turns but not the speakers": "Tea? __eou__ Please. __eou__",
    "no dialogue of two turns or more": "[31.12.23, 22:15:40] Nora: Tea?\n[02.01.24, 22:17:00] Timo: Please.",
    "line 3 has 1 column, but the header has 2": "speaker,text\nNora,Tea?\nTimo",
    "the key 'text' occurs 2 times": '{"turns": [{"speaker": "Nora", "text": "Tea?", "text": "Milk?"}]}',
}


def test_every_documented_error_has_a_test():
    assert set(REFUSED) == {cells[0] for cells in table_below("| the error says | do this |")}


@pytest.mark.parametrize("error", REFUSED)
def test_an_error_has_the_documented_wording(error, tmp_path, capsys):
    path = tmp_path / "data"
    path.write_text(REFUSED[error], encoding="latin-1")
    with pytest.raises(UserError, match=re.escape(error)):
        read_source(open_source(path), ReadSettings())


def test_documented_reasons_for_skipping_occur_in_the_code():
    sources = "".join(path.read_text(encoding="utf-8") for path in (PROJECT / "dialogues").rglob("*.py"))
    explained = [name for cells in table_below("| the account says |") for name in cells[0].split(", ")]
    assert len(explained) > 8
    assert [name for name in explained if name not in sources] == []
