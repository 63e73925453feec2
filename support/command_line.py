"""The command line as the settings of a command; what is wrong with it as one line."""

import contextlib
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from support.errors import UserError

Settings = TypeVar("Settings")


def parse_command_line(
    command: type[Settings], arguments: Sequence[str] | None = None, default: Any = None
) -> Settings:
    """The settings that `arguments` (none: the process's own) describe; what they leave open is as in `default`.

    Raises:
        UserError: an option that doesn't exist, a value of the wrong kind, or values out of range: all of them at once.
        SystemExit: after `--help`.
    """
    complaint = io.StringIO()
    try:
        # tyro draws its errors as boxes; their words become our one line.
        with contextlib.redirect_stderr(complaint):
            settings = tyro.cli(
                command,
                args=arguments,
                default=default,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
            )
    except SystemExit as stop:
        if stop.code == 0:
            raise
        lines = [line.strip("│| ") for line in complaint.getvalue().splitlines() if line[:1] not in "╭╰+"]
        inside = re.split(r"Argument helptext:|For full helptext", " ".join(lines))[0]
        words = re.sub(r"\s*(─{2,}|-{3,})", ";", inside).strip(" ;")
        raise UserError(f"{words} (python {Path(sys.argv[0]).name} --help lists the options)") from None
    groups = [settings, *vars(settings).values()]
    if problems := [problem for group in groups if hasattr(group, "problems") for problem in group.problems()]:
        raise UserError("; ".join(problems))
    return settings
