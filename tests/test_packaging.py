"""pip, uv and error messages name the same dependencies."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import PROJECT
from dialogues import arrow, private
from pipeline import export
from support.errors import command_for, install_line
from talking import page
from training import mirror

tomllib = pytest.importorskip("tomllib", reason="new in Python 3.11")
ADVICE = "pyproject.toml and the requirements files differ; give both the same lines in the same order"


def of_uv(path: str) -> dict:
    return tomllib.loads((PROJECT / path).read_text(encoding="utf-8"))


def of_pip(path: str) -> list[str]:
    """The requirements of a file, without comments and references to other files."""
    lines = (PROJECT / path).read_text(encoding="utf-8").splitlines()
    return [text for line in lines if (text := line.partition("#")[0].strip()) and not text.startswith("-r ")]


UV = of_uv("pyproject.toml")
EXTRAS = UV["project"]["optional-dependencies"]
FILES = {
    "requirements.txt": UV["project"]["dependencies"],
    "requirements-extra.txt": list(itertools.chain(*EXTRAS.values())),
    "requirements-dev.txt": UV["dependency-groups"]["dev"],
}


@pytest.mark.parametrize("file", FILES)
def test_pip_and_uv_install_the_same_packages(file):
    assert FILES[file] == of_pip(file), ADVICE


def test_a_package_has_the_same_version_range_everywhere():
    ranges = {line.partition(">=")[0].partition("==")[0]: line for line in itertools.chain(*FILES.values())}
    assert set(ranges.values()) == set(itertools.chain(*FILES.values()))


def test_errors_name_the_packages_of_the_extras():
    assert {
        "track": list(mirror.REQUIREMENTS.values()),
        "web": [page.REQUIREMENT],
        "data": [arrow.REQUIREMENT],
        "mask": list(private.REQUIREMENTS.values()),
        "export": [export.REQUIREMENT],
    } == EXTRAS


def test_the_project_for_the_cpu_differs_only_in_torch():
    cpu = of_uv("cpu/pyproject.toml")["project"]
    name = UV["project"]["name"]
    assert cpu["dependencies"] == [name, "torch"]
    assert cpu["optional-dependencies"] == {extra: [f"{name}[{extra}]"] for extra in EXTRAS}
    assert cpu["requires-python"] == UV["project"]["requires-python"]


def test_the_tools_check_against_the_oldest_supported_python():
    """Ruff reads the version from `requires-python`; pyright does not."""
    assert UV["project"]["requires-python"].startswith(f">={UV['tool']['pyright']['pythonVersion']},")
    assert "target-version" not in UV["tool"]["ruff"]


@pytest.mark.parametrize(
    ("folder", "started_in", "python"),
    [
        ("project", "project", Path(".venv") / "python"),
        ("project", "elsewhere", "{}"),
        ("my project", "elsewhere", '"{}"'),
    ],
)
def test_the_install_command_targets_the_running_python(folder, started_in, python, tmp_path, monkeypatch):
    executable = tmp_path / folder / ".venv" / "python"
    (tmp_path / started_in).mkdir()
    monkeypatch.chdir(tmp_path / started_in)
    monkeypatch.setattr(sys, "executable", str(executable))
    name = str(python).format(executable)
    lines = {True: f'{name} -m pip install "a>=1,<2"', None: f'uv pip install --python {name} "a>=1,<2"'}
    for pip, line in lines.items():  # uv creates environments without pip
        monkeypatch.setattr("importlib.util.find_spec", lambda _, pip=pip: pip)
        assert install_line("a>=1,<2") == line


@pytest.mark.parametrize(
    ("environment", "prefix", "expected"),
    [
        ({"UV_RUN_RECURSION_DEPTH": "1"}, "/clone/.venv", "uv run chat.py"),
        ({"UV_RUN_RECURSION_DEPTH": "1"}, "/clone/cpu/.venv", "uv run --project cpu chat.py"),
        ({"PATH": "/clone/.venv/bin"}, "/clone/.venv", "python chat.py"),
        ({"PATH": "/usr/bin"}, "/clone/.venv", ".venv/bin/python chat.py"),
    ],
)
def test_a_command_is_named_as_the_user_starts_it(environment, prefix, expected, tmp_path, monkeypatch):
    clone = tmp_path / "clone"
    python = clone / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch(mode=0o755)
    monkeypatch.chdir(clone)
    monkeypatch.delenv("UV_RUN_RECURSION_DEPTH", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value.replace("/clone", str(clone)))
    monkeypatch.setattr(sys, "prefix", prefix.replace("/clone", str(clone)))
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(sys, "argv", ["finetune.py"])
    assert command_for("chat.py") == expected
    assert command_for() == expected.replace("chat.py", "finetune.py")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "my tools" / "finetune.py")])
    assert command_for("chat.py").endswith(f'"{tmp_path / "my tools" / "chat.py"}"')


def test_a_missing_package_is_an_error_of_one_line(tmp_path):
    """Python's own, without the packages that the project needs."""
    done = subprocess.run(
        [sys.executable, "-S", str(PROJECT / "finetune.py")], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: the package tyro is not installed for this Python; start with uv run finetune.py"
    )
    assert done.stderr.count("\n") == 1
