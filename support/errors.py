"""Report user errors in one line, and print only text that is safe for a terminal."""

import contextlib
import importlib
import importlib.util
import os
import shutil
import signal
import sys
import time
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TextIO

TURNING = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")  # bidi classes that change the text direction
SPEAKING_SECONDS = 3  # time for the first process to fail with the same error and report it


class UserError(Exception):
    """An error that the user can fix. The message is one line: the problem, its location, and the remedy.

    `account` holds lines about the data in question, printed to standard output before the message.
    """

    def __init__(self, message: str, account: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.account = tuple(account)


def run_script(module: str) -> NoReturn:
    """Import `module`, run its `main` and exit; `module` may be the script itself. See `run_command`."""
    run_command(lambda: importlib.import_module(module).main())
    sys.exit()


def ending_signals() -> list[signal.Signals]:
    """SIGTERM, and SIGHUP, which a closing terminal sends, unless it is ignored (`nohup`). Windows has no SIGHUP."""
    hangup = getattr(signal, "SIGHUP", None)
    return [signal.SIGTERM, *([hangup] if hangup and signal.getsignal(hangup) != signal.SIG_IGN else [])]


def run_command(command: Callable[[], None]) -> None:
    """Run a command of the project and turn its outcome into an exit code.

    0: success. 1: a bug in the program, with a traceback. 2: a `UserError`, `OSError`, `MemoryError` or missing
    package, printed as one line. 130: stopped by Ctrl-C or one of `ending_signals`.

    Under torchrun, the first process reports for all.
    """
    open_streams()
    # On a console with a legacy encoding, an emoji in the data must not end the run.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    for number in ending_signals():
        signal.signal(number, signal.default_int_handler)  # treat it like Ctrl-C
    try:
        command()
    except ModuleNotFoundError as error:
        if not is_missing_package(error):
            raise
        display(
            f"error: the package {error.name} is not installed for this Python; start with"
            f" uv run {Path(sys.argv[0]).name}, or see docs/first-run.md for other ways",
            file=sys.stderr,
        )
        sys.exit(2)
    except UserError as error:
        if is_first_process():
            display(*error.account)
            display(f"error: {' '.join(map(str.strip, str(error).splitlines()))}", file=sys.stderr)
        else:
            time.sleep(SPEAKING_SECONDS)  # torchrun kills the other processes when one exits
        sys.exit(2)
    except OSError as error:  # not handled elsewhere, such as a closed pipe
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise the flush at exit would fail too
        display(f"error: {error.filename or 'output'}: {reason(error)}", file=sys.stderr)
        sys.exit(2)
    except MemoryError:
        display("error: out of memory; close other programs, or process less data at a time", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        if is_first_process():
            with contextlib.suppress(OSError):  # the terminal has closed
                display(f"\nstopped{stop}", file=sys.stderr)
        sys.exit(130)


def is_missing_package(error: ModuleNotFoundError) -> bool:
    """Whether the missing module is a third-party library, not ours and not part of the standard library."""
    name = (error.name or "").partition(".")[0]
    project = Path(__file__).resolve().parent.parent
    ours = (project / name).exists() or (project / f"{name}.py").exists()
    return bool(name) and name not in sys.stdlib_module_names and not ours


def open_streams() -> None:
    """Open the null device for each standard stream that the parent process closed.

    In this order, each gets its usual file descriptor; otherwise the next file that is opened would get it.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - open until the process exits


def is_first_process() -> bool:
    """Whether this process prints and writes: it is the first one under torchrun, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def check_one_process(job: str) -> None:
    """Raise `UserError` under torchrun, for a job that needs a single process."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(f"{job} needs a single process; start it without torchrun")


def reason(error: OSError) -> str:
    """The operating system's message for `error`, without path and number."""
    return error.strerror or str(error)


def display(*lines: object, file: TextIO | None = None, end: str = "\n") -> None:
    """Print `lines`, made safe by `printable`, and flush; without lines, print nothing.

    Names and texts come from other people's files, so print them only with this function, or after `printable`.
    """
    if lines:
        print(*(printable(str(line)) for line in lines), sep="\n", end=end, file=file, flush=True)


def amount(number: int, one: str, many: str = "") -> str:
    """A number with its noun: `1 turn`, `1,200 turns`, and with `many` for irregular plurals, `2 replies`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def printable(text: str, json: bool = False) -> str:
    """Escape what could manipulate a terminal: control characters, and characters that change the text direction.

    `json`: use JSON escapes.
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
    """Check up front that the package needed for `option` is installed.

    Raises:
        UserError: the package is not installed; the message says how to install it.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:  # a plain folder, such as wandb's leftovers, has no origin
        raise UserError(f"{option}: the package {package} is not installed; {install_line(requirement)}")


def install_line(requirement: str) -> str:
    """The command that installs `requirement` for the running Python, whichever environment is active."""
    name = from_here(Path(sys.executable))
    if importlib.util.find_spec("pip"):
        return f'{name} -m pip install "{requirement}"'
    return f'uv pip install --python {name} "{requirement}"'  # environments made by uv have no pip


def command_for(script: str = "") -> str:
    """The command that starts a script of the project in the way this process was started, for messages.

    Args:
        script: a file in the project's folder; by default, the running one.
    """
    path = Path(sys.argv[0]).with_name(script) if script else Path(sys.argv[0])
    module = f"-m {path.parent.name}" if path.name == "__main__.py" else ""
    if "UV_RUN_RECURSION_DEPTH" in os.environ:  # set by `uv run`
        project = " --project cpu" if Path(sys.prefix).parent.name == "cpu" else ""
        return f"uv run{project} {f'python {module}' if module else from_here(path)}"
    found = shutil.which("python")
    active = found and Path(found).parent == Path(sys.executable).parent
    return f"{'python' if active else from_here(Path(sys.executable))} {module or from_here(path)}"


def from_here(path: Path) -> str:
    """`path`, quoted for a shell: relative if it lies below the current folder."""
    path = Path.cwd() / path
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return f'"{path}"' if " " in str(path) else str(path)
