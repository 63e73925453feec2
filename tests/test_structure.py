"""The rooms of the house and which of them may see which."""

import ast
from pathlib import Path

from conftest import PROJECT

ROOMS = (
    "files",
    "settings",
    "attention",
    "linear",
    "kv_cache",
    "gpt_model",
    "dialogues",
    "download_model",
    "find_model",
    "load_gpt2_weights",
    "prepare",
    "run_folder",
    "train_model",
    "measure_model",
    "cross_validation",
    "training",
    "results",
    "talking",
    "command_line",
    "finished_model",
    "benchmarks",
)
COMMANDS = ("finetune", "evaluate", "chat")
BENCHMARKS = {path.stem for path in (PROJECT / "benchmarks").glob("*.py")}  # they import each other by these names
MAY_SEE = {
    "files": set(),
    "settings": {"files"},
    "command_line": {"files"},
    "attention": set(),
    "linear": set(),
    "kv_cache": {"gpt_model"},  # its types alone, for which nothing is imported
    "gpt_model": {"attention", "linear", "kv_cache"},
    "dialogues": {"files"},
    "download_model": {"files"},
    "find_model": {"files", "download_model"},
    "load_gpt2_weights": {"files", "gpt_model", "dialogues", "download_model"},
    "prepare": {"files", "settings", "gpt_model", "dialogues", "training"},
    "run_folder": {"files", "settings", "command_line"},
    "finished_model": {"files", "settings", "dialogues", "find_model", "run_folder"},
    "train_model": {
        *("files", "settings", "gpt_model", "dialogues", "find_model", "load_gpt2_weights"),
        *("prepare", "run_folder", "training", "results"),
    },
    "measure_model": {
        *("files", "settings", "gpt_model", "dialogues", "load_gpt2_weights", "prepare"),
        *("train_model", "training", "results"),
    },
    "cross_validation": {
        *("files", "settings", "gpt_model", "find_model", "load_gpt2_weights"),
        *("prepare", "run_folder", "training", "results"),
    },
    "training": {"files", "settings", "attention", "linear", "gpt_model", "dialogues"},
    "results": {"files", "settings", "kv_cache", "gpt_model", "dialogues"},
    "talking": {"files", "settings", "kv_cache", "gpt_model", "dialogues", "results"},
    "benchmarks": {*ROOMS},
}


def sources() -> list[Path]:
    folders = [PROJECT, *(PROJECT / room for room in ROOMS if (PROJECT / room).is_dir())]
    return sorted(path for folder in folders for path in folder.glob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PROJECT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """The top-level names that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add((node.module or "").split(".")[0])
    return names


def test_imports_point_one_way():
    found = 0
    for path in sources():
        room = room_of(path)
        ours = imports(path) & {*ROOMS, *COMMANDS}
        assert not ours & set(COMMANDS), f"{path} imports a command"
        assert room == "benchmarks" or not imports(path) & {*BENCHMARKS, "benchmarks"}, f"{path} imports a benchmark"
        if room not in COMMANDS:
            assert ours - {room} <= MAY_SEE[room], f"{path} imports {ours - {room} - MAY_SEE[room]}"
            found += len(ours)
    assert found > 20


def test_every_room_is_known():
    assert {room_of(path) for path in sources()} <= {*ROOMS, *COMMANDS}


def test_importing_a_module_does_nothing():
    """At the top of a module stand definitions only: no calls for their effect, no loops, no conditions."""
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    for path in sources():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            guard = isinstance(node, ast.If) and "__main__" in ast.dump(node.test)
            guard |= isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
            assert isinstance(node, allowed) or docstring or guard, f"{path}:{node.lineno}"


def test_sizes():
    for path in sources():
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 60, f"{path}: {node.name}"
            if isinstance(node, ast.ExceptHandler):
                assert "Exception'" not in ast.dump(node.type or ast.Name("Exception")), path
