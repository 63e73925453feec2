"""docs/colab.ipynb is a valid notebook, its commands are valid, and its cells run."""

import json
import os
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest

from conftest import PROJECT
from settings import ChatSettings, FinetuneSettings
from support.command_line import parse_command_line

NOTEBOOK = json.loads((PROJECT / "docs" / "colab.ipynb").read_text(encoding="utf-8"))
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
COMMANDS = {"finetune.py": FinetuneSettings, "chat.py": ChatSettings}


def test_the_notebook_is_short_and_holds_no_output():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert len(NOTEBOOK["cells"]) <= 12
    assert len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(NOTEBOOK["cells"])
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in NOTEBOOK["cells"])


def test_the_notebooks_commands_are_valid():
    lines = [line for cell in CODE for line in cell.splitlines() if line.startswith("!python ")]
    assert len(lines) == 4
    for line in lines:
        _, script, *options = shlex.split(line)
        assert isinstance(parse_command_line(COMMANDS[script], options), COMMANDS[script])


@pytest.mark.slow
def test_the_notebooks_cells_run_in_order(tmp_path, monkeypatch):
    """With the bundled model in place of the large one, and without cloning, installing and a browser."""
    downloads = []
    colab = SimpleNamespace(files=SimpleNamespace(upload=dict, download=downloads.append))
    for name in ("google", "google.colab"):
        monkeypatch.setitem(sys.modules, name, colab)
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(HTML=str))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}

    def shell(line: str) -> None:
        line = re.sub(r"^python (\w+\.py)", rf"{sys.executable} {PROJECT}/\1", line)
        line = line.replace("--model gpt2-medium", "--epochs 1")
        environment = {**os.environ, **{name: value for name, value in names.items() if isinstance(value, str)}}
        subprocess.run(line, shell=True, check=True, env=environment, input="Hello!\n", text=True, timeout=300)

    names["shell"] = shell
    for cell in CODE:
        lines = [line for line in cell.splitlines() if not line.startswith(("!git clone", "!pip install", "%cd"))]
        exec("\n".join(re.sub(r"^!(.*)$", lambda match: f"shell({match[1]!r})", line) for line in lines), names)
    assert downloads == ["mine.zip"]
    assert (tmp_path / "mine.zip").exists()
