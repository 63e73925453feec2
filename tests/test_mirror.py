"""A tracker shows the numbers of a run, and never affects the run."""

import html
import json
import os
import re
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from conftest import PROJECT
from support.errors import UserError
from support.files import write_json
from training.mirror import (
    REQUIREMENTS,
    MetricsFile,
    check_tracker,
    markdown_cell,
    markdown_table,
    mirror,
    start_mirror,
)

SETTINGS = {"model": {"name": "tiny", "path": None}, "run_dir": "caf\udce9", "training": {"learning_rate": 1e-4}}
ODD = "a | b\n<b>`x` *y* _z_ # [l](u) \\| &amp; \x00\x02 é 😀 \ud800 $1$ ---"
CASES = [
    {"input": "A: hello", "response": "B: hi", "model_response": "B: ho"},
    {"input": ODD, "response": "", "model_response": "| | |\n|---|"},
]
# A fake wandb that logs its calls as JSON lines, and misbehaves on request.
FAKE_WANDB = """
import json, os, sys, time

def note(call, *values):
    with open(os.environ["FAKE_WANDB_CALLS"], "a", encoding="utf-8") as file:
        file.write(json.dumps([call, *values], default=vars) + "\\n")
    if call == os.environ.get("FAKE_WANDB_AT"):
        exec(os.environ["FAKE_WANDB_DOES"])

class Table:
    def __init__(self, columns, data):
        self.columns, self.data = columns, data

class Run:
    def define_metric(self, name, step_metric=None):
        note("define_metric", name, step_metric)
    def log(self, values, step):
        note("log", step, values)
    def finish(self, exit_code):
        note("finish", exit_code)

def init(**arguments):
    note("init", {**arguments, "dir": str(arguments["dir"])})
    return Run()
"""


def training(*steps: int) -> list[dict[str, float]]:
    return [{"step": step, "epoch": step / 4, "train_loss": 5 - step / 10, "grad_norm": 1.5} for step in steps]


def evaluation(step: int) -> dict[str, float]:
    return {"step": step, "epoch": step / 4, "val_loss": 5 - step / 20}


def watched(step: int) -> dict[str, Any]:
    return {"step": step, "epoch": step / 4, "watched": f"B: {step}" + (ODD if step == 2 else "")}


# Stopped during the evaluation of step 4, and resumed.
STOPPED = [evaluation(0), watched(0), *training(1, 2), evaluation(2), watched(2), *training(3, 4)]
KEPT_BEST = {"step": 6, "epoch": 1.5, "kept_step": 4, "kept_val_loss": 4.8}
WHOLE = [*STOPPED, evaluation(4), watched(4), *training(5, 6), evaluation(6), watched(6), KEPT_BEST]
KEPT = 6  # lines that remain after a truncation
WATCHED = [[step, watched(step)["watched"].replace("\ud800", "?")] for step in (0, 2, 4, 6)]


def rows_of(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that Weights & Biases should have for `lines`: a row with a reply has a table of all replies so far."""
    tables = {
        step: {"columns": ["step", "watched"], "data": WATCHED[: number + 1]}
        for number, (step, _) in enumerate(WATCHED)
    }
    return [{**line, "watched": tables[line["step"]]} if "watched" in line else line for line in lines]


def write_lines(folder: Path, lines: list[dict[str, Any]], mode: str = "w") -> None:
    with open(folder / "metrics.jsonl", mode, encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


@pytest.fixture
def run_folder(tmp_path) -> Path:
    folder = tmp_path / "tiny-1"
    folder.mkdir()
    write_json(folder / "settings.json", SETTINGS)
    return folder


def mirror_stopped_and_resumed(run_folder: Path, mirror_once) -> None:
    write_lines(run_folder, STOPPED)
    mirror_once()
    write_lines(run_folder, WHOLE)
    write_json(run_folder / "generated_conversations.json", CASES)
    mirror_once()


def mirror_in_a_process(kind: str, run_folder: Path) -> None:
    said = start_mirror(kind, run_folder).finish()
    assert said is None, (run_folder / f"{kind}.log").read_text()


def mirror_here(kind: str, run_folder: Path) -> None:
    ended = threading.Event()
    ended.set()
    mirror(kind, run_folder, ended)


@pytest.fixture
def fake_wandb(tmp_path, monkeypatch):
    """Replace `wandb` by the fake in new processes; return a function that lists the fake's calls by name."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "wandb.py").write_text(FAKE_WANDB)
    calls = tmp_path / "calls.jsonl"
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    monkeypatch.setenv("FAKE_WANDB_CALLS", str(calls))
    return lambda *names: [
        call for call in map(json.loads, calls.read_text().splitlines() if calls.exists() else []) if call[0] in names
    ]


def wait_for(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class TestWhatIsShown:
    def test_metrics_are_shown_during_the_run_and_cases_at_its_end(self, run_folder, fake_wandb, monkeypatch):
        monkeypatch.chdir(run_folder.parent)
        running = start_mirror("wandb", Path("tiny-1"))  # relative to the current folder, as users write it
        write_lines(run_folder, WHOLE[:3])
        wait_for(lambda: len(fake_wandb("log")) == 3)
        write_lines(run_folder, WHOLE[3:], "a")
        write_json(run_folder / "generated_conversations.json", CASES)
        assert running.finish() is None

        ((_, init),) = fake_wandb("init")
        assert (init["name"], init["dir"], init["resume"]) == ("tiny-1", str(run_folder), "allow")
        assert init["config"] == {**SETTINGS, "run_dir": "caf?"}
        *rows, (_, _, last) = fake_wandb("log")
        assert [{k: v for k, v in values.items() if k != "perplexity"} for _, _, values in rows] == rows_of(WHOLE)
        assert rows[0][2]["perplexity"] == pytest.approx(148.4131591)
        numbers = [number for _, number, _ in fake_wandb("log")]
        assert numbers == sorted(set(numbers))  # wandb drops rows that are out of order
        assert last["generated_conversations"]["columns"] == ["input", "response", "model_response"]
        assert last["generated_conversations"]["data"][1][0] == ODD.replace("\ud800", "?")
        assert fake_wandb("finish") == [["finish", 0]]

    def test_a_resumed_run_is_shown_without_duplicates(self, run_folder, fake_wandb):
        mirror_stopped_and_resumed(run_folder, lambda: mirror_in_a_process("wandb", run_folder))
        mirror_in_a_process("wandb", run_folder)  # nothing is new: nothing is shown twice
        assert len({call["id"] for _, call in fake_wandb("init")}) == 1
        rows = [values for _, _, values in fake_wandb("log")]
        assert ["generated_conversations" in row for row in rows] == [False] * len(WHOLE) + [True]
        assert [(row["step"], "val_loss" in row) for row in rows[:-1]] == [
            (line["step"], "val_loss" in line) for line in WHOLE
        ]
        assert [code for _, code in fake_wandb("finish")] == [1, 0, 0]  # the first run was stopped

    def test_a_file_truncated_while_it_is_read_is_read_again(self, run_folder, fake_wandb):
        """The table has each reply once."""
        running = start_mirror("wandb", run_folder)
        write_lines(run_folder, STOPPED)
        wait_for(lambda: len(fake_wandb("log")) == len(STOPPED))
        write_lines(run_folder, [{**line, "train_loss": 1} if line == STOPPED[-1] else line for line in WHOLE])
        assert running.finish() is None
        rows = [values for _, _, values in fake_wandb("log")]
        assert len(rows) == len(WHOLE)
        assert rows[-2] == rows_of(WHOLE)[-2]

    def test_cases_from_before_the_run_was_resumed_are_not_shown(self, run_folder, fake_wandb):
        write_json(run_folder / "generated_conversations.json", CASES)
        write_lines(run_folder, STOPPED)
        os.utime(run_folder / "generated_conversations.json", (1, 1))
        mirror_in_a_process("wandb", run_folder)
        assert len(fake_wandb("log")) == len(STOPPED)

    def test_a_killed_run_is_shown_up_to_its_end(self, run_folder, fake_wandb):
        """The mirror then exits on its own."""
        script = (
            "import sys, time, pathlib; from training.mirror import start_mirror\n"
            "print(start_mirror('wandb', pathlib.Path(sys.argv[1])), flush=True); time.sleep(60)"
        )
        parent = subprocess.Popen(
            [sys.executable, "-c", script, run_folder],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(PROJECT), os.environ["PYTHONPATH"]])},
        )
        assert parent.stdout is not None
        with parent.stdout as started:
            started.readline()
        write_lines(run_folder, STOPPED)
        parent.kill()
        parent.wait()
        wait_for(lambda: fake_wandb("finish"))
        assert len(fake_wandb("log")) == len(STOPPED)


class TestTheRunIsUnaffected:
    @pytest.mark.parametrize(
        ("at", "does", "said"),
        [
            ("init", "raise OSError('no key; wandb login')", "failed with exit code 1 (OSError: no key; wandb login;"),
            ("log", "raise KeyError('x')", "failed with exit code 1 (KeyError: 'x';"),
            ("log", "os._exit(7)", "failed with exit code 7 (no output;"),
            ("log", "print('still \\x1b[2J trying', flush=True); time.sleep(60)", "(still \\x1b[2J trying;"),
            ("finish", "time.sleep(60)", "did not finish within 1 s and was stopped (no output;"),
        ],
    )
    def test_a_tracker_that_fails_is_reported_in_one_line(self, run_folder, fake_wandb, monkeypatch, at, does, said):
        monkeypatch.setenv("FAKE_WANDB_AT", at)
        monkeypatch.setenv("FAKE_WANDB_DOES", does)
        write_lines(run_folder, STOPPED)
        started = time.monotonic()
        line = start_mirror("wandb", run_folder).finish(1)
        assert time.monotonic() - started < 10
        assert line is not None
        assert said in line
        assert f"{run_folder / 'wandb.log'}); the run is unaffected" in line
        assert line.startswith("wandb: logging ")
        assert "\n" not in line

    def test_a_killed_mirror_is_reported(self, run_folder, fake_wandb):
        running = start_mirror("wandb", run_folder)
        running.process.kill()
        running.process.wait()
        running.log.unlink()
        assert "(no output;" in str(running.finish())

    def test_importing_the_mirror_loads_no_tracker(self):
        script = "import sys, training.mirror; sys.exit(bool({'torch', 'wandb', 'tensorboard'} & set(sys.modules)))"
        assert subprocess.run([sys.executable, "-c", script], cwd=PROJECT, check=False).returncode == 0


class TestAPackageThatIsNotInstalled:
    def test_the_error_says_how_to_install_the_tracker(self, tmp_path, monkeypatch):
        monkeypatch.setitem(REQUIREMENTS, "nosuchtracker", "nosuchtracker>=1,<2")
        monkeypatch.syspath_prepend(tmp_path)
        for _ in range(2):
            with pytest.raises(UserError, match='^--track nosuchtracker: .* pip install "nosuchtracker>=1,<2"$'):
                check_tracker("nosuchtracker")
            (tmp_path / "nosuchtracker").mkdir(exist_ok=True)  # a plain folder is not a package

    def test_an_installed_package_is_accepted(self, tmp_path, monkeypatch):
        monkeypatch.setitem(REQUIREMENTS, "sometracker", "sometracker>=1,<2")
        (tmp_path / "sometracker.py").touch()
        monkeypatch.syspath_prepend(tmp_path)
        check_tracker("sometracker")


class TestMetricsFile:
    def test_an_incomplete_line_is_left_for_later(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        file = MetricsFile(path)
        assert file.read() == ([], False)
        path.write_text('{"step": 1}\n{"st')
        assert file.read() == ([{"step": 1}], False)
        assert file.read() == ([], False)
        path.write_text('{"step": 1}\n{"step": 2}\n')
        assert file.read() == ([{"step": 2}], False)

    @pytest.mark.parametrize("now", [[1], [1, 7], [1, 7, 8, 9, 10], [], [7, 8, 9]])
    def test_a_truncated_file_is_read_from_its_start(self, tmp_path, now):
        """Even if it has grown again, beyond the last position."""
        write_lines(tmp_path, [{"step": step} for step in (1, 2, 3)])
        file = MetricsFile(tmp_path / "metrics.jsonl")
        assert len(file.read()[0]) == 3
        write_lines(tmp_path, [{"step": step} for step in now])
        assert file.read() == ([{"step": step} for step in now], True)
        assert file.read() == ([], False)


class TestTensorBoard:
    @pytest.fixture(autouse=True)
    def _installed(self):
        pytest.importorskip("tensorboard")

    @staticmethod
    def shown(run_folder: Path) -> dict[str, list[tuple[int, Any]]]:
        """The points of every tag, as TensorBoard gathers them from all files."""
        reading = pytest.importorskip("tensorboard.backend.event_processing.plugin_event_accumulator")
        numbers = pytest.importorskip("tensorboard.util.tensor_util")
        events = reading.EventAccumulator(str(run_folder / "tensorboard"), size_guidance={"tensors": 0}).Reload()
        return {
            tag.removesuffix("/text_summary"): [
                (event.step, numbers.make_ndarray(event.tensor_proto).reshape(-1)[0]) for event in events.Tensors(tag)
            ]
            for tag in events.Tags()["tensors"]
        }

    def check(self, run_folder: Path) -> None:
        shown = self.shown(run_folder)
        assert sorted(shown) == sorted(
            [
                *("train_loss", "grad_norm", "val_loss", "perplexity", "watched", "kept_step", "kept_val_loss"),
                *("settings", "generated_conversations"),
            ]
        )
        for tag in ("train_loss", "grad_norm", "val_loss"):
            assert shown[tag] == [(line["step"], pytest.approx(line[tag])) for line in WHOLE if tag in line]
        assert [step for step, _ in shown["perplexity"]] == [0, 2, 4, 6]
        assert shown["watched"] == [(step, markdown_cell(text).encode()) for step, text in WATCHED]
        table = markdown_table(json.loads(json.dumps(CASES).replace("\\ud800", "?")))
        assert shown["generated_conversations"] == [(6, table.encode())]
        ((_, settings),) = shown["settings"]
        assert b'"learning_rate": 0.0001' in settings

    def test_a_resumed_run_is_shown_without_duplicates(self, run_folder):
        mirror_stopped_and_resumed(run_folder, lambda: mirror_here("tensorboard", run_folder))
        self.check(run_folder)

    def test_a_file_truncated_while_it_is_read_is_read_again(self, run_folder):
        write_lines(run_folder, STOPPED)
        ended = threading.Event()
        reader = threading.Thread(target=mirror, args=("tensorboard", run_folder, ended), daemon=True)
        reader.start()
        wait_for(lambda: (run_folder / "tensorboard").exists() and "val_loss" in self.shown(run_folder))
        write_lines(run_folder, WHOLE[: KEPT + 1])
        wait_for(lambda: [step for step, _ in self.shown(run_folder)["train_loss"]] == [1, 2, 3])
        write_lines(run_folder, WHOLE[KEPT + 1 :], "a")
        write_json(run_folder / "generated_conversations.json", CASES)
        ended.set()
        reader.join()
        self.check(run_folder)

    def test_a_mirror_process_shows_everything(self, run_folder):
        write_lines(run_folder, WHOLE)
        write_json(run_folder / "generated_conversations.json", CASES)
        mirror_in_a_process("tensorboard", run_folder)
        self.check(run_folder)

    def test_unusual_texts_are_shown_verbatim(self):
        shown_by = pytest.importorskip("tensorboard.plugin_util")
        page = shown_by.markdown_to_safe_html(markdown_table(CASES).encode("utf-8", "replace"))
        rows = [re.findall(r"<t[dh]>(.*?)</t[dh]>", row, re.DOTALL) for row in page.split("<tr>")[1:]]
        shown = [[html.unescape(re.sub(r"<br ?/?>", "\n", cell)) for cell in row] for row in rows]
        odd = ODD.replace("\x00", "\\x00").replace("\x02", "\\x02").replace("\ud800", "\ufffd")
        assert shown == [list(CASES[0]), list(CASES[0].values()), [odd, *list(CASES[1].values())[1:]]]


class TestWandb:
    def test_a_resumed_run_is_logged_offline_without_duplicates(self, run_folder, monkeypatch):
        pytest.importorskip("wandb")
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("WANDB_MODE", "offline")
        mirror_stopped_and_resumed(run_folder, lambda: mirror_in_a_process("wandb", run_folder))
        files = sorted((run_folder / "wandb").glob("offline-run-*/*.wandb"))
        records = [record for file in files for record in read_records(file)]
        rows = [
            {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for record in records
            if record.HasField("history")
        ]
        added = {"perplexity", "_step", "_timestamp", "_runtime"}
        assert [{name: row[name] for name in row.keys() - added if "/" not in name} for row in rows[:-1]] == [
            {name: value for name, value in line.items() if name != "watched"} for line in WHOLE
        ]
        steps = [row["_step"] for row in rows]
        assert steps == sorted(set(steps))
        tables = [row["watched/path"] for row in rows if "watched/path" in row]
        assert len(tables) == len(WATCHED)
        newest = json.loads((files[1].parent / "files" / tables[-1]).read_text())
        assert (newest["columns"], newest["data"]) == (["step", "watched"], WATCHED)
        table = json.loads((files[1].parent / "files" / rows[-1]["generated_conversations/path"]).read_text())
        assert table["data"] == json.loads(json.dumps([list(case.values()) for case in CASES]).replace("\\ud800", "?"))
        assert {record.run.run_id for record in records if record.HasField("run")} == {
            json.loads((run_folder / "wandb.json").read_text())["id"]
        }
        config = {item.key: item.value_json for record in records for item in record.run.config.update}
        assert json.loads(config["model"]) == SETTINGS["model"]


def read_records(path: Path):
    """The records of a `.wandb` file: LevelDB's log format, blocks of 32 KiB after a header of 7 bytes."""
    messages = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    content, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        length, kind = struct.unpack_from("<HB", content, place + 4)
        if kind:
            record += content[place + 7 : place + 7 + length]
            place += 7 + length
        if 32768 - place % 32768 < 7 or not kind:
            place += 32768 - place % 32768
        if kind in (1, 4):  # complete, or the last part
            yield messages.Record.FromString(record)
            record = b""
