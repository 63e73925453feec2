"""Handling of Ctrl-C, SIGTERM and a closed terminal: none interrupts a step, and the run can write a checkpoint."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from support.errors import ending_signals
from training.device import Machine


class StopSignals:
    """A context in which the first Ctrl-C, SIGTERM or SIGHUP raises `KeyboardInterrupt` between two units of work,
    never inside one; a second Ctrl-C or SIGTERM ends the process at once, and anything unsaved is lost.

    Several processes receive a signal at different moments, so they agree on it between two steps.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.asked = False
        self.busy = machine.processes > 1
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # only this thread gets signals
            for number in (signal.SIGINT, *ending_signals()):
                self.before[number] = signal.signal(number, self.hear)
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.asked and error is None:  # a signal arrived while signals were held back
            raise KeyboardInterrupt

    def hear(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            if number in (signal.SIGINT, signal.SIGTERM):
                raise SystemExit(130)
            return  # the shell, the terminal and `uv run` each send a SIGHUP
        self.asked = True
        if not self.busy:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Finish the work inside this context before a signal takes effect."""
        busy, self.busy = self.busy, True
        yield
        self.busy = busy
        if self.asked and not busy:
            raise KeyboardInterrupt

    def hold(self) -> None:
        """Hold signals back until all work is done."""
        self.busy = True

    def check(self) -> None:
        """Raise `KeyboardInterrupt` in all processes if one of them was asked to stop."""
        if self.machine.total(float(self.asked))[0]:
            raise KeyboardInterrupt
