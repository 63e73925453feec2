"""Text is escaped for the terminal, and a run survives a closed output."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import PROJECT, refused
from support.errors import UserError, display, printable, run_command
from support.screen import lasting_screen, log_lost_screen

HARMFUL = "\x1b[31m\x07\r\x7f\x9b\u202e\u2066"
SHOWN = r"\x1b[31m\x07\x0d\x7f\x9b\u202e\u2066"


def harmless(text: str) -> bool:
    return not set("\x1b\x07\r\x7f\x9b\u202e\u2066") & set(text)


def test_harmful_characters_are_escaped():
    assert printable(f"Ann{HARMFUL}!") == f"Ann{SHOWN}!"
    assert printable("a\tb\nZoë 🪵 👩‍👧 أهلا \u200f") == "a\tb\nZoë 🪵 👩‍👧 أهلا \u200f"
    line = json.dumps([HARMFUL], ensure_ascii=False)
    assert json.loads(printable(line, json=True)) == [HARMFUL]
    assert harmless(printable(line, json=True))


def test_display_escapes_its_lines_and_prints_nothing_for_none(capsys):
    display()
    display(f"Ann{HARMFUL}", 2)
    display(HARMFUL, end="", file=sys.stderr)
    assert tuple(capsys.readouterr()) == (f"Ann{SHOWN}\n2\n", SHOWN)


def test_errors_are_escaped(capsys):
    def fail():
        raise UserError("no \x1b[31m\x07\u202e.json\nthere", account=[HARMFUL])

    with pytest.raises(SystemExit):
        run_command(fail)
    assert tuple(capsys.readouterr()) == (f"{SHOWN}\n", "error: no \\x1b[31m\\x07\\u202e.json there\n")


def test_the_file_name_in_a_system_error_is_escaped(capsys):
    with pytest.raises(SystemExit):
        run_command(lambda: print(Path(f"{HARMFUL}.json").read_text()))
    assert capsys.readouterr().err == f"error: {SHOWN}.json: No such file or directory\n"


@pytest.mark.skipif(os.name == "nt", reason="Windows does not allow such file names")
class TestNames:
    NAME = "Ann\u202e"  # names with other control characters are not accepted

    def write(self, work, speakers: list[str]) -> str:
        file = work / "talk\x1b[31m\x07\r\u202e.jsonl"
        with open(file, "w") as lines:
            for number in range(20):
                turns = [{"speaker": name, "text": f"Hi {number}!"} for name in speakers * 2]
                lines.write(json.dumps({"turns": turns}) + "\n")
        return file.name

    def test_the_reader_escapes_names(self, command, work):
        file = self.write(work, [self.NAME, "Bo"])
        done = command("dialogues/__main__.py", file, PYTHONPATH=str(PROJECT))
        assert done.returncode == 0, done.stderr
        assert harmless(done.stdout + done.stderr)
        assert json.loads(done.stdout.splitlines()[0])["turns"][0]["speaker"].startswith("Ann")

    def test_an_error_escapes_names(self, command, work):
        line = refused(command("finetune.py", "--preview", "--data", self.write(work, [self.NAME])))
        assert harmless(line)

    def test_file_names_and_the_run_folder_are_escaped(self, command, work):
        file = self.write(work, [self.NAME, "Bo"])
        done = command("finetune.py", "--preview", "--data", file, "--run-dir", "run\x1b[31m\x07\u202e")
        assert done.returncode == 0, done.stderr
        assert harmless(done.stdout + done.stderr)
        assert "talk\\x1b[31m\\x07\\x0d\\u202e.jsonl" in done.stdout

    def test_the_name_of_a_model_folder_is_escaped(self, command, work):
        (work / "m\x1b[31m\u202e").mkdir()
        for script, *options in (("chat.py",), ("evaluate.py",), ("finetune.py", "--model")):
            assert harmless(refused(command(script, *options, "m\x1b[31m\u202e")))


@pytest.mark.skipif(os.name == "nt", reason="closes pipes in the POSIX way")
class TestNobodyReads:
    def test_output_to_a_closed_pipe_is_dropped_and_the_loss_is_logged(self, tmp_path, monkeypatch):
        """Both before and after the log file is known."""
        for early in (True, False):
            folder = tmp_path / f"early-{early}"
            folder.mkdir()
            reading, writing = os.pipe()
            with open(writing, "w") as pipe, monkeypatch.context() as patch:
                patch.setattr(sys, "stdout", pipe)
                with lasting_screen():
                    os.close(reading)
                    for act in (display, log_lost_screen)[:: 1 if early else -1]:
                        act(folder)
                    display("and more")
                assert sys.stdout is pipe
            assert (folder / "log.txt").read_text().count("standard output was closed;") == 1

    def test_nothing_is_logged_while_the_output_is_open(self, tmp_path, capsys):
        with lasting_screen():
            log_lost_screen(tmp_path)
            display("Hi!")
        assert capsys.readouterr().out == "Hi!\n"
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("script", "options", "code"),
        [
            ("finetune.py", ("--preview",), 0),
            ("dialogues/__main__.py", (str(PROJECT / "llm_train_text.json"),), 0),
            ("evaluate.py", ("nowhere",), 2),
            ("chat.py", ("nowhere",), 2),
        ],
    )
    def test_streams_closed_before_the_start_are_not_an_error(self, work, script, options, code):
        command = shlex.join([sys.executable, str(PROJECT / script), *options])
        environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
        run = ["sh", "-c", f"{command} <&- >&-"]
        done = subprocess.run(run, cwd=work, env=environment, stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode == code
        assert "Traceback" not in done.stderr
        assert subprocess.run(["sh", "-c", f"{command} <&- >&- 2>&-"], cwd=work, env=environment).returncode == code
