"""Ctrl-C and SIGTERM, so that they never tear a step, and a checkpoint can be written before the end."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from training.device import Machine


class StopSignals:
    """While it is entered, a first Ctrl-C or SIGTERM is a `KeyboardInterrupt` between two pieces of work, never inside
    one; a second one ends the process at once, with what has been saved until then.

    Several processes hear of a signal at different moments: they agree on it between two steps.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.asked = False
        self.busy = machine.processes > 1
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # signals go to no other
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self.hear)
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.asked and error is None:  # while it was held
            raise KeyboardInterrupt

    def hear(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise SystemExit(130)
        self.asked = True
        if not self.busy:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """What is inside is done to its end before a signal is heard."""
        busy, self.busy = self.busy, True
        yield
        self.busy = busy
        if self.asked and not busy:
            raise KeyboardInterrupt

    def hold(self) -> None:
        """From here on nothing may be lost any more: a signal waits until all is done."""
        self.busy = True

    def check(self) -> None:
        """Raise `KeyboardInterrupt` in all processes if one of them was asked to stop."""
        if self.machine.total(float(self.asked))[0]:
            raise KeyboardInterrupt
