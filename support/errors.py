"""The user's mistakes as one line, and what reaches a terminal."""

import contextlib
import importlib
import importlib.util
import os
import signal
import sys
import time
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TextIO

TURNING = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")  # kinds of characters that turn what follows
SPEAKING_SECONDS = 3  # that the first of several processes has to come to the same end and say so


class UserError(Exception):
    """Something the user can mend. The message is one line: what is wrong, where, what to do.

    `account` are lines that are printed before it on standard output: what became of the data that it is about.
    """

    def __init__(self, message: str, account: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.account = tuple(account)


def run_script(module: str) -> NoReturn:
    """Import `module`, run its `main` and end the process; `module` may be the script itself. See `run_command`."""
    run_command(lambda: importlib.import_module(module).main())
    sys.exit()


def run_command(command: Callable[[], None]) -> None:
    """Run a command of the project and turn its outcome into an exit code.

    0: done. 2: a `UserError`, printed as one line. A refusal by the system (`OSError`, `MemoryError`) is
    the user's too. 130: stopped by Ctrl-C or SIGTERM. Anything else is our bug:
    Python prints the traceback and exits with 1.

    Of several processes that torchrun has started the first one speaks for all.
    """
    open_streams()
    # A console in a legacy encoding must not end a run because somebody wrote an emoji.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill is a Ctrl-C
    try:
        command()
    except UserError as error:
        if is_first_process():
            display(*error.account)
            display(f"error: {' '.join(map(str.strip, str(error).splitlines()))}", file=sys.stderr)
        else:
            time.sleep(SPEAKING_SECONDS)  # torchrun ends all processes when one has ended
        sys.exit(2)
    except OSError as error:  # the system's refusal where nobody expected it, as a pipe that was closed
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python flushes it once more
        display(f"error: {error.filename or 'output'}: {reason(error)}", file=sys.stderr)
        sys.exit(2)
    except MemoryError:
        display("error: there is too little memory; close other programs, or give it less at a time", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        if is_first_process():
            display(f"\nstopped{stop}", file=sys.stderr)
        sys.exit(130)


def open_streams() -> None:
    """Open standard streams that the parent process closed on the null device.

    Opened in this order, each gets its usual file descriptor; otherwise the next file to be opened would get it.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - as long as the process


def is_first_process() -> bool:
    """Whether this is the one that prints and writes, of those that torchrun has started; without torchrun it is."""
    return os.environ.get("RANK", "0") == "0"


def check_one_process(job: str) -> None:
    """Raise `UserError` under torchrun, for a job that one process does."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(f"{job} is done by one process; start it without torchrun")


def reason(error: OSError) -> str:
    """The operating system's own words for `error`, without the path and the number."""
    return error.strerror or str(error)


def display(*lines: object, file: TextIO | None = None, end: str = "\n") -> None:
    """Print each of `lines` as `printable` makes it, at once; nothing for none.

    Everything the program prints goes through here, because names and texts come from other people's files.
    """
    if lines:
        print(*(printable(str(line)) for line in lines), sep="\n", end=end, file=file, flush=True)


def printable(text: str, json: bool = False) -> str:
    """`text` without what could take over a terminal: control characters, and those that turn the reading direction.

    `json`: write them as JSON escapes.
    """
    harmful = (
        symbol
        for symbol in set(text)
        if (unicodedata.category(symbol) == "Cc" and symbol not in "\n\t")
        or unicodedata.bidirectional(symbol) in TURNING
    )
    return text.translate({ord(symbol): escape(ord(symbol), json) for symbol in harmful})


def escape(code: int, json: bool) -> str:
    return f"\\u{code:04x}" if json or code > 0xFF else f"\\x{code:02x}"


def check_extra(package: str, option: str, requirement: str) -> None:
    """Find out before the work, not after it, whether a package can be loaded that only `option` needs.

    Raises:
        UserError: it is not installed, with the line that installs it.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:  # a mere folder has no origin: wandb leaves one of its name behind
        raise UserError(f"{option}: the package {package} is not installed; {install_line(requirement)}")


def install_line(requirement: str) -> str:
    """The command that installs `requirement` for the Python that runs, whichever environment is activated."""
    python = Path(sys.executable)
    if python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    name = f'"{python}"' if " " in str(python) else python
    if importlib.util.find_spec("pip"):
        return f'{name} -m pip install "{requirement}"'
    return f'uv pip install --python {name} "{requirement}"'  # an environment of uv's has no pip
