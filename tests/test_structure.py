"""The rooms of the project (its folders and top-level modules), and which may import which."""

import ast
from pathlib import Path

from conftest import PROJECT

# Each room may import only the rooms before it.
ROOMS = (
    "support",
    "settings",
    "dialogues",
    "fast",
    "gpt_model",
    "hub",
    "load_gpt2_weights",
    "talking",
    "training",
    "evaluation",
    "pipeline",
    "commands",
    "benchmarks",
)
COMMANDS = ("finetune", "evaluate", "chat", "export")
BENCHMARKS = {path.stem for path in (PROJECT / "benchmarks").glob("*.py")}  # they import each other by these names


def sources() -> list[Path]:
    folders = [PROJECT / room for room in ROOMS if (PROJECT / room).is_dir()]
    return sorted([*PROJECT.glob("*.py"), *(path for room in folders for path in room.rglob("*.py"))])


def room_of(name: str) -> str | None:
    """The room of a top-level module or folder; None for a library."""
    room = "commands" if name in COMMANDS else "benchmarks" if name in BENCHMARKS else name
    return room if room in ROOMS else None


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


def test_imports_run_one_way():
    found = 0
    for path in sources():
        top = path.relative_to(PROJECT).parts[0].removesuffix(".py")
        room = room_of(top)
        assert room, f"{path} is in no room"
        for seen in filter(None, map(room_of, imports(path))):
            assert ROOMS.index(seen) < ROOMS.index(room) or (seen == room != "commands"), f"{path} imports {seen}"
            found += 1
    assert found > 100


def test_modules_have_no_import_cycles():
    graph = {}
    for path in sources():
        name = ".".join(path.relative_to(PROJECT).with_suffix("").parts)
        modules = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        graph[name] = modules
    while leaves := {name for name, seen in graph.items() if not seen & graph.keys()}:
        graph = {name: seen - leaves for name, seen in graph.items() if name not in leaves}
    assert not graph, f"an import cycle among {sorted(graph)}"


def test_importing_a_module_has_no_side_effects():
    """The top level of a module has only definitions: no calls for side effects, no loops, no conditions."""
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    for path in sources():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            guard = isinstance(node, ast.If) and "__main__" in ast.dump(node.test)
            guard |= isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
            assert isinstance(node, allowed) or docstring or guard, f"{path}:{node.lineno}"


def test_everything_is_printed_by_display():
    """`display` escapes names and texts for the terminal. Only the preview prints directly, for its colours."""
    printing = [
        path.relative_to(PROJECT).as_posix()
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Name) and node.id == "print" and PROJECT / "benchmarks" not in path.parents
    ]
    assert printing == ["pipeline/prepare.py", "support/errors.py"]


def test_files_and_functions_are_short():
    for path in sources():
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 60, f"{path}: {node.name}"
            if isinstance(node, ast.ExceptHandler):
                assert "Exception'" not in ast.dump(node.type or ast.Name("Exception")), path
