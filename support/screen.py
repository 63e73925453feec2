"""Let a training run continue after its standard output or standard error is closed."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from support.files import writing

LOG = "log.txt"
STREAMS = {"stdout": "standard output", "stderr": "standard error"}


class LastingStream:
    """A standard stream that discards output once it is closed, and logs when that happened."""

    def __init__(self, stream: Any, name: str) -> None:
        self.stream, self.name = stream, name
        self.lost = ""  # the time when the stream was closed
        self.log: Path | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self.attempt(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self.attempt(self.stream.flush)

    def attempt(self, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError:  # the process reading the pipe has ended, or the terminal was closed
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())  # also discards the buffer
            os.close(nowhere)
            self.lost = time.strftime("%Y-%m-%d %H:%M:%S")
            self.note()

    def note(self) -> None:
        """Add a line to the log, once there is a log and a closed stream."""
        if self.log and self.lost:
            with writing(self.log), open(self.log, "a", encoding="utf-8", newline="\n") as file:
                file.write(f"{self.lost}: {self.name} was closed; the run continues without it\n")


@contextlib.contextmanager
def lasting_screen() -> Iterator[None]:
    """Keep the process alive if its output is closed."""
    before = {name: getattr(sys, name) for name in STREAMS}
    try:
        for name, words in STREAMS.items():
            setattr(sys, name, LastingStream(before[name], words))
        yield
    finally:
        for name, stream in before.items():
            setattr(sys, name, stream)


def log_lost_screen(folder: Path) -> None:
    """Log each closed output in `log.txt` of `folder`, including one that is already closed.

    Raises:
        UserError: the file can't be written.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, LastingStream):
            stream.log = folder / LOG
            stream.note()
