"""Parse a command line into the settings of a command, and report its errors in one line."""

import contextlib
import io
import re
import sys
from collections.abc import Sequence
from typing import Any, TypeVar, get_type_hints

import tyro

from support.errors import UserError, command_for

Settings = TypeVar("Settings")
UNEXPECTED = "unexpected argument: "
ADDING = ("--data", "--rename")  # multi-value options that accumulate when repeated


def parse_command_line(
    command: type[Settings], arguments: Sequence[str] | None = None, default: Any = None, check: bool = True
) -> Settings:
    """Parse `arguments` (None: those of the process); missing options have the values of `default`.

    Args:
        check: also check the values; without it, `check_settings` must follow.

    Raises:
        UserError: an unknown option, a value of the wrong type, or values out of range (all reported together).
        SystemExit: after `--help`.
    """
    complaint = io.StringIO()
    try:
        # tyro draws boxes around its errors; keep only the words, on one line.
        with contextlib.redirect_stderr(complaint):
            settings = tyro.cli(
                command,
                args=join_repeated(sys.argv[1:] if arguments is None else arguments),
                default=default,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
            )
    except SystemExit as stop:
        if stop.code == 0:
            raise
        words = explain(complaint.getvalue())
        if words.startswith(UNEXPECTED) and "data" in get_type_hints(command):
            words += "; give conversation files with --data"
        raise UserError(f"{words} ({command_for()} --help lists all options)") from None
    if check:
        check_settings(settings)
    return settings


def check_settings(settings: Any) -> None:
    """Raise a `UserError` that reports all values out of range."""
    groups = [settings, *vars(settings).values()]
    if problems := [problem for group in groups if hasattr(group, "problems") for problem in group.problems()]:
        raise UserError("; ".join(problems))


def explain(complaint: str) -> str:
    """Summarise the error in tyro's box of text in a few words."""
    lines = [line.strip("│| ") for line in complaint.splitlines() if line[:1] not in "╭╰+"]
    inside = re.split(r"Argument helptext:|For full helptext", " ".join(lines))[0]
    words = re.sub(r"\s*(─{2,}|-{3,})", ";", inside).strip(" ;")
    if unknown := re.search(r"Unrecognized options: (.*?)(?:;|$)", words):
        option = next((word for word in unknown[1].split(", ") if word.startswith("-")), None)
        if option is None:
            return UNEXPECTED + unknown[1]
        nearest = re.search(r"Perhaps you meant: (--[\w-]+)", words)
        return f"there is no option {option}" + (f"; did you mean {nearest[1]}?" if nearest else "")
    if wrong := re.search(r"Error parsing (--[\w-]+): .*?(?:from \[|: )'(.*?)'", words):
        kind = "a whole number" if "int()" in words else "a number"
        return f"{wrong[1]} {wrong[2]}: must be {kind}"
    if choice := re.search(r"invalid choice '(.*?)' for argument '(.*?)'. Expected one of \((.*?)\)", words):
        return f"{choice[2]} {choice[1]}: must be one of {choice[3]}".replace("'", "").rstrip(",")
    if missing := re.search(r"Missing value for argument '(.*?)'", words):
        return f"{missing[1]} needs a value"
    return words


def join_repeated(arguments: Sequence[str]) -> list[str]:
    """Collect the values of each repeated option in `ADDING` after its first occurrence.

    Everything up to the next option counts as a value, so the positional `MODEL` must come first.
    """
    groups: list[list[str]] = [[]]  # an option and its values
    for argument in arguments:
        if argument.partition("=")[0] in ADDING:
            groups.append(argument.split("=", 1))
        elif argument.startswith("--"):
            groups.append([argument])
        else:
            groups[-1].append(argument)
    joined: dict[object, list[str]] = {}
    for number, group in enumerate(groups):
        key = group[0] if group and group[0] in ADDING else number
        joined.setdefault(key, group[:1]).extend(group[1:])
    return [argument for group in joined.values() for argument in group]
