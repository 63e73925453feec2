"""The report shows everything in a run folder, copes with missing and damaged files, and runs nothing."""

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from conftest import PROJECT, launch_browser, needs_browser
from evaluation import plots, report
from evaluation.report import write_report
from evaluation.run_files import READ, Losses, Point, number
from evaluation.shown_cases import Piece, split_copied, split_turns
from support.errors import UserError
from support.files import Json

HOSTILE = (
    "<script>window.ran = 1</script><img src=x onerror='window.ran = 2'></style></details></main>"
    '" onmouseover="window.ran = 3" {{ 7 * 7 }} &lt; \x00\x1b[31m\x85 \ud83d 🐕 שלום \u202e' + "long" * 500
)


def text_metrics(distinct: float, **changes) -> Json:
    return {
        "distinct_1": distinct,
        "distinct_2": 0.9,
        "repetition": 0.03,
        "words_per_reply": 12.8,
        "copied_5grams": 0.04,
        "longest_copied_span": {"words": 7, "text": "I am excited to start my day", "dialogue": 4},
        "intervals": {"distinct_1": [distinct - 0.05, distinct + 0.05]},
        "too_small": {},
        **changes,
    }


def metrics(loss: float) -> Json:
    return text_metrics(
        0.61,
        loss=loss,
        perplexity=12.03,
        bits_per_byte=0.857,
        loss_by_part={"train": {"loss": 1.515, "intervals": {"loss": [1.4, 1.6]}}, "val": {"loss": loss}},
        loss_by_speaker={"Alex": 2.41, "Bob": 2.53},
        loss_by_turn={"1": 2.9, "2": 2.3},
        context_use=0.19,
        context_use_by_turns={"1": 0.12, "2": 0.17, "all": 0.19},
        context_use_of_other_history=-0.004,
        context_use_beyond_other=0.19,
        hits_at_1=None,
        chance_hits_at_1=0.2,
        voice=0.7,
        chance_voice=0.5,
        voice_true={"Alex": 0.75, "Bob": 0.65},
        voice_generated={"Alex": 0.9, "Bob": 0.8},
        chrf=22.5,
        bleu=3.1,
        intervals={"loss": [2.355, 2.645], "context_use_by_turns": {"1": [0.08, 0.2], "all": [None, 0.3]}},
        too_small={"hits_at_1": "needs 5 other replies, but there are 2"},
    )


def evaluation(text: str = "It goes well.") -> Json:
    """A complete evaluation.json in which people say `text`."""
    turns = [{"speaker": "Bob", "text": text}, {"speaker": text[:40], "text": "Me too."}]
    return {
        "version": 1,
        "model": "runs/tiny-1/model",
        "base_model": "models/tiny",
        "data": {
            "file": "chats.json",
            "part": "val",
            "dialogues": {"train": 7, "val": 3},
            "replies": 6,
            "candidates": 5,
        },
        "settings": {"seed": 123, "template": "prompt", "resamples": 1000, "confidence": 0.95, "chrf": "nc:6"},
        "metrics": {"base": metrics(2.617), "model": metrics(2.485), "true_replies": text_metrics(0.74)},
        "overfitting": {"best_step": 8, "best_epoch": 2.0, "train_set_loss": 1.515, "gap": 0.97},
        "exposure": {
            "looked_through": 7,
            "dialogues": 7,
            "found": 2,
            "tried": 2,
            "completed": 1,
            "ranked": 2,
            "first": 1,
            "first_by_chance": 0.0625,
            "strings": [
                {
                    "kind": "phone",
                    "shown": "+4••••",
                    "completed": True,
                    "rank": 1,
                    "among": 32,
                    "exposure": 5.0,
                    "occurrences": 30,
                    "dialogue": 3,
                }
            ],
        },
        "findings": ["Validation loss was lowest after epoch 2."],
        "cases": [
            {
                "place": 8,
                "input": [{"speaker": "Alex", "text": "How is the new job?"}],
                "response": turns,
                "model_response": [{**turn, "copied": [[0, 7], [5, 9]]} for turn in turns],
                "base_response": turns,
            }
        ],
    }


def write_run(folder: Path, text: str = "It goes well.") -> Path:
    """A run folder with every file that a report reads."""
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[Json] = [{"step": 0, "epoch": 0.0, "val_loss": 2.6171, "train_set_loss": 2.8023}]
    for step in range(1, 13):
        lines.append({"step": step, "epoch": step / 4, "train_loss": 3 - step / 10, "grad_norm": 2.0})
        if step % 4 == 0:
            lines.append({"step": step, "epoch": step / 4, "val_loss": {4: 2.4985, 8: 2.4713, 12: 2.4847}[step]})
            lines.append({"step": step, "epoch": step / 4, "watched": f"Bob: {text} {step // 8}"})
    files = {
        "settings.json": {
            "model": {"name": "tiny", "model_path": "/m"},
            "data": {"path": "/d/chats.json", "template": "auto", "rename": []},
            "training": {"seed": 123, "learning_rate": 0.00012},
            "output": text,
        },
        "ledger.json": {"file": "/d/chats.json", "dialogues": 10, "turns": 30},
        "evaluation.json": evaluation(text),
        "generated_conversations.json": [
            {"input": "Alex: Old?", "response": "Bob: Yes.", "model_response": "Bob: No."}
        ],
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def run(tmp_path) -> Path:
    return write_run(tmp_path / "tiny-1")


class Page(HTMLParser):
    """The elements and the visible text of a report."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.said: list[str] = []
        self.ignored = False
        self.feed(html)
        self.text = " ".join(" ".join(self.said).split())

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ignored = tag == "style"

    def handle_data(self, data):
        if not self.ignored:
            self.said.append(data)


def page_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


@pytest.fixture
def no_plots(monkeypatch):
    """Skip the PNGs, each of which takes a tenth of a second, in tests of the page."""
    monkeypatch.setattr(report, "write_png", lambda chart, size, path: None)


def test_a_report_shows_the_content_of_the_folder(run, capsys):
    assert write_report(run) == run / "report.html"
    page = page_of(run)
    for text in (
        "tiny chats.json, 10 dialogues, 30 turns template prompt 12 steps (3 epochs) seed 123",
        "Findings Validation loss was lowest after epoch 2.",
        "Validation loss went from 2.617 to 2.485; it was lowest, 2.471, at step 8 (epoch 2).",
        "The loss on the training part is 1.515, 0.970 nats per token below the validation loss.",
        "Measured on the validation part: 3 dialogues, 6 replies. Below each value is its 95% interval over dialogues",
        "Metric Base model Fine-tuned True replies",
        "2.617 2.355 to 2.645 2.485 2.355 to 2.645 –",
        "0.61 0.61 0.74 0.69 to 0.79",  # only the true replies have an interval
        "too few needs 5 other replies, but there are 2 by",
        "−0.004",
        "7 words “I am excited to start my day”, dialogue 4",
        "Alex Base model 2.410 Fine-tuned 2.410 Bob",
        "step 4 Bob: It goes well. 0 step 8 to 12 Bob: It goes well. 1",
        "Case 1 dialogue 8 of the data Alex How is the new job? True continuation Bob It goes well.",
        "Generated continuation Bob It goes w ell.",
        "The base model's next turn Bob It goes well.",
        "training / learning_rate 0.00012",
        "chrf nc:6",
    ):
        assert text.replace(" by", "") in page.text, text
    for group in ("Likelihood", "Context", "Coherence", "Diversity", "Similarity", "Memorisation"):
        assert f"{group} " in page.text
    assert page.tags["svg"] == 4  # two of the loss: for wide and narrow screens
    assert page.tags["mark"] == 3  # one in each turn, and one in the explanation
    assert not capsys.readouterr().out
    for name, size in (("loss.png", (1720, 660)), ("context_use.png", (840, 560))):
        with Image.open(run / name) as image:
            assert image.size == size
            assert sum(map(bool, image.convert("L").histogram())) > 10
    assert not list(run.glob(".*"))


def test_the_page_is_self_contained_and_runs_nothing(run):
    page = page_of(run)
    html = (run / "report.html").read_text(encoding="utf-8")
    assert "script" not in page.tags
    assert not any(name.startswith("on") or name == "src" for _, name, _ in page.attributes)
    links = [value for _, name, value in page.attributes if name.endswith("href")]
    assert links
    assert all(value.startswith(("#", "data:,")) for value in links)
    assert not any(word in html for word in ("http:", "https:", "@import", "url(http", '<link rel="style'))
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert html.index(policy) < html.index("<style>")
    names = [value for _, name, value in page.attributes if name == "id"]
    assert len(names) == len(set(names))
    targets = {f"#{name}" for name in names}
    assert {value for value in links if value != "data:,"} <= targets
    assert len(html) < 150_000


def test_the_same_folder_gives_the_same_bytes(run, tmp_path):
    names = ("report.html", "loss.png", "context_use.png")
    write_report(run)
    first = [(run / name).read_bytes() for name in names]
    write_report(run)
    assert [(run / name).read_bytes() for name in names] == first
    assert str(tmp_path).encode() not in first[0]


MISSING = {
    "settings.json": "There is no settings.json in this folder.",
    "ledger.json": "There is no ledger.json in this folder.",
    "metrics.jsonl": "Loss There is no metrics.jsonl in this folder.",
    "evaluation.json": "Findings No evaluation yet: python evaluate.py ",
}


@pytest.mark.parametrize("name", MISSING)
def test_the_page_names_a_missing_file(name, run, no_plots, capsys):
    (run / name).unlink()
    assert MISSING[name] in page_of(run).text
    assert not capsys.readouterr().out


@pytest.mark.parametrize("name", READ)
def test_one_file_is_enough_for_a_report(name, run, no_plots):
    for other in READ:
        if other != name:
            (run / other).unlink()
    page = page_of(run)
    assert page.text.count("There is no ") >= 2
    assert page.tags["section"] >= 5


def test_an_outdated_plot_is_removed(run):
    write_report(run)
    (run / "evaluation.json").unlink()
    (run / "metrics.jsonl").write_text("")
    assert "metrics.jsonl contains no losses." in page_of(run).text
    assert not list(run.glob("*.png"))


@pytest.mark.parametrize("content", [b"", b"{", b"3", b"\xff\xfe", b"[" * 100_000, b'{"a": ' * 5000])
@pytest.mark.parametrize("name", sorted(set(READ) - {"metrics.jsonl"}))
def test_a_broken_file_affects_only_its_section(name, content, run, no_plots, capsys):
    (run / name).write_bytes(content)
    page = page_of(run)
    assert "Validation loss went from 2.617" in page.text
    warning = capsys.readouterr().out
    assert warning.startswith("warning: ")
    assert warning.count("\n") == 1
    assert name in warning
    assert f"{name} " in page.text
    if name == "evaluation.json":
        assert "evaluation.json could not be read. Evaluate again: python evaluate.py" in page.text
        assert "Alex: Old?" in page.text  # from generated_conversations.json


def test_a_note_names_broken_lines_of_the_metrics(run, no_plots, capsys):
    with open(run / "metrics.jsonl", "a") as file:
        file.write('[1]\n\n{"train_loss": 1}\n{"step": null}\n{"step": 1e999}\n{"step": 13, "train_lo')
    place = (run / "metrics.jsonl").read_text().split("\n").index("[1]") + 1
    note = (
        f"metrics.jsonl: 5 lines ({place}, {place + 2}, {place + 3}, {place + 4}, {place + 5})"
        " are not JSON objects with a step and were skipped"
    )
    assert note in page_of(run).text
    assert capsys.readouterr().out == f"warning: {note}\n"


def test_a_note_names_a_single_broken_line(run, no_plots, capsys):
    (run / "metrics.jsonl").write_text('{"step": 1, "epoch": 0.5, "train_loss": 1.5}\n{"step": 2, "tr')
    page_of(run)
    assert capsys.readouterr().out == (
        "warning: metrics.jsonl: line 2 is not a JSON object with a step and was skipped\n"
    )


def test_nan_infinite_and_huge_losses_do_not_break_the_plot(run):
    with open(run / "metrics.jsonl", "a") as file:
        for step, value in enumerate(("NaN", "Infinity", "1e300", "1" + "0" * 400, "null", '"x"', "5000"), start=13):
            file.write(f'{{"step": {step}, "epoch": null, "train_loss": {value}}}\n')
    page = page_of(run)
    html = (run / "report.html").read_text(encoding="utf-8")
    assert "6 values are not drawn: not a finite number, or beyond 1,000,000." in page.text
    assert "Some training losses are above the plot, up to 5,000.0 at step 19." in page.text
    labels = [float(text) for text in re.findall(r"<text[^>]*>([\d.]+)</text>", html)]
    assert labels
    assert max(labels) < 100  # the axis ends where the curves do


def test_the_plot_of_a_long_run_averages_its_steps(run):
    lines = [json.dumps({"step": step, "train_loss": 2 + step % 7, "epoch": 1}) for step in range(1, 5_001)]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    assert "The plot averages neighbouring steps (5,000 steps in total)." in page_of(run).text
    assert (run / "report.html").stat().st_size < 250_000


def test_thinning_averages_neighbouring_points():
    points = [Point(step, None, float(step)) for step in range(1, 1501)]
    thin = plots.thin_out(points)
    assert len(thin) == 500
    assert thin[0] == Point(3, None, 2.0)
    assert plots.thin_out(points[:600]) == points[:600]
    assert plots.thin_out([]) == []


def test_a_line_is_drawn_at_the_right_coordinates():
    """This holds for the wide and the narrow picture."""
    losses = Losses(val=[Point(0, 0, 3.0), Point(4, 1, 2.0), Point(8, 2, 2.5)], train=[Point(1, 0, 2.5)])
    chart = plots.loss_chart(losses)
    assert chart
    for size in (plots.WIDE, plots.NARROW):
        picture = plots.lay_out(chart, size)
        marks = {text.text: text for text in picture.texts}
        assert {"0", "8", "step", "loss (nats per token)", "lowest: 2.000"} <= marks.keys()
        line = next(line for line in picture.lines if line.colour == "model")
        assert [x for x, _ in line.points] == pytest.approx([marks[step].x for step in "048"])
        assert line.points[2][1] + 4 == pytest.approx(marks["2.50"].y)
        assert line.path.startswith(f"M{line.points[0][0]:.1f} {line.points[0][1]:.1f}L")
        everything = [*line.points, *((text.x, text.y) for text in picture.texts), *((d.x, d.y) for d in picture.dots)]
        assert all(0 <= x <= size[0] and 0 <= y <= size[1] for x, y in everything)


def test_a_png_has_the_colours_of_the_page(run):
    write_report(run)
    css = (PROJECT / "evaluation" / "report.css").read_text(encoding="utf-8").partition("@media")[0]
    with Image.open(run / "loss.png") as image:
        pixels = image.tobytes()
    found = {f"#{pixels[place : place + 3].hex()}" for place in range(0, len(pixels), 3)}
    assert set(plots.LIGHT.values()) <= found
    drawn = {name: colour for name, colour in plots.LIGHT.items() if name != "page"}
    assert drawn.items() <= dict(re.findall(r"--(\w+): (#\w+);", css)).items()


@pytest.mark.parametrize(
    ("low", "high", "whole", "texts"),
    [
        (-0.3, 12.2, False, ["0.0", "2.5", "5.0", "7.5", "10.0"]),
        (-0.12, 0.1, False, ["−0.10", "−0.05", "0.00", "0.05", "0.10"]),
        (-0.1, 3.1, True, ["0", "1", "2", "3"]),
        (-1, 41, True, ["0", "10", "20", "30", "40"]),
        (1999.9999, 2000.0001, False, ["1999.99990", "1999.99995", "2000.00000", "2000.00005", "2000.00010"]),
    ],
)
def test_an_axis_has_round_numbers(low, high, whole, texts):
    assert [text for _, text in plots.round_numbers(low, high, 5, whole)] == texts


@pytest.mark.parametrize("values", [[0.0], [5.0], [-1e6], [0.0, 1e-9], [1e6, 1e6 + 1e-3], [-1e6, 1e6]])
def test_the_range_of_an_axis_extends_beyond_its_values(values):
    low, high = plots.widened(values, 0.1)
    assert low < min(values) <= max(values) < high
    assert plots.round_numbers(low, high, 5)


def test_a_dashed_line_has_gaps():
    parts = list(plots.dashes([(0, 0), (10, 0), (10, 20)]))
    assert parts == [[(0, 0), (6, 0)], [(9, 0), (10, 0)], [(10, 0), (10, 5)], [(10, 8), (10, 14)], [(10, 17), (10, 20)]]


def test_the_lowest_loss_is_a_validation_loss():
    losses = Losses(val=[Point(0, 0, 3.0), Point(4, 1, 2.0), Point(8, 2, 2.5)], train=[Point(1, 0, 0.1)])
    assert losses.best == Point(4, 1, 2.0)
    assert Losses().best is None


def test_the_kind_of_interval_is_named(run, no_plots):
    content = evaluation()
    assert "Student's t, or the range for chrF and BLEU: there are too few to bootstrap" in page_of(run).text
    content["data"]["dialogues"]["val"] = 9
    (run / "evaluation.json").write_text(json.dumps(content))
    assert (
        "1,000 bootstrap resamples; Student's t, or the range for chrF and BLEU, for fewer than 8" in page_of(run).text
    )


def test_the_title_is_the_name_of_the_run_if_the_base_model_is_not_known(run, no_plots):
    content = {**evaluation(), "base_model": None, "model": "runs/bob-1/model"}
    (run / "evaluation.json").write_text(json.dumps(content))
    (run / "settings.json").unlink()
    assert page_of(run).text.startswith("bob-1")


def test_known_fields_of_a_newer_version_are_shown(run, no_plots, capsys):
    content = evaluation()
    content.update(version=7, extra={"x": 1})
    del content["metrics"]["base"], content["metrics"]["model"]["chrf"], content["data"], content["overfitting"]
    (run / "evaluation.json").write_text(json.dumps(content))
    page = page_of(run)
    assert "version 7, but this program knows version 1" in capsys.readouterr().out
    assert "Not in this evaluation: chrF." in page.text
    assert "This evaluation has no base model to compare with." in page.text
    assert "Metric The model True replies" in page.text


def nodes(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from nodes(inner, (*path, key))


ODD = (
    None,
    "x",
    -3,
    1e300,
    float("nan"),
    float("-inf"),
    10**400,
    True,
    [],
    {},
    [None],
    {"x": None},
    [[1, 2, 3]],
    HOSTILE,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(list(nodes(evaluation()))), st.sampled_from(ODD)), min_size=1, max_size=4))
def test_malformed_evaluations_do_not_break_the_report(run, no_plots, changes):
    content = evaluation()
    for path, value in changes:
        inside: Any = content
        for key in path[:-1]:
            inside = inside[key] if isinstance(inside, dict | list) and len(inside) and has(inside, key) else {}
        if isinstance(inside, dict | list) and has(inside, path[-1]):
            inside[path[-1]] = value
    (run / "evaluation.json").write_text(json.dumps(content))
    page = page_of(run)
    assert "script" not in page.tags
    assert "nan" not in page.text.lower().split()


@pytest.mark.slow
def test_the_page_never_shows_nan(run, no_plots):
    """Replace the values of an evaluation by NaN, one at a time."""
    shown = []
    for path in nodes(evaluation()):
        content = evaluation()
        inside: Any = content
        for key in path[:-1]:
            inside = inside[key]
        inside[path[-1]] = float("nan")
        (run / "evaluation.json").write_text(json.dumps(content))
        if "nan" in page_of(run).text.lower().split():
            shown.append(path)
    assert shown == []


def has(inside: dict | list, key: Any) -> bool:
    return key in inside if isinstance(inside, dict) else isinstance(key, int) and key < len(inside)


def test_unusual_numbers_do_not_break_the_plots(run):
    content = evaluation()
    content["metrics"]["model"]["context_use_by_turns"] = {
        "1": 1e300,
        "$\\frac": 1,
        "02": -1e5,
        "9" * 9: 1,
        "all": 10**400,
    }
    content["metrics"]["model"]["intervals"]["context_use_by_turns"] = {"02": [-1e307, 1e307], "1": [float("nan"), 1]}
    content["metrics"]["base"]["context_use_by_turns"] = {"1": None}
    content["metrics"]["base"]["loss_by_turn"] = {str(turn): turn / 7 for turn in range(300)}
    (run / "evaluation.json").write_text(json.dumps(content))
    assert page_of(run).tags["svg"] == 4


@pytest.mark.parametrize("value", [None, True, "1", [], float("nan"), float("inf"), 10**400])
def test_number_returns_none_for_anything_but_a_finite_number(value):
    assert number(value) is None


def test_hostile_text_is_escaped(tmp_path, no_plots):
    plain, hostile = write_run(tmp_path / "plain"), write_run(tmp_path / "hostile", HOSTILE)
    one, other = page_of(plain), page_of(hostile)
    assert one.tags == other.tags
    assert sorted(name for _, name, _ in one.attributes) == sorted(name for _, name, _ in other.attributes)
    shown = HOSTILE.replace("\ud83d", "?").replace("\x00", "\\x00").replace("\x1b", "\\x1b").replace("\x85", "\\x85")
    shown = shown.replace("\u202e", "\\u202e")
    assert " ".join(shown.split()) in other.text
    assert not any(symbol in (hostile / "report.html").read_text(encoding="utf-8") for symbol in "\x00\x1b\x85")


def test_a_run_without_an_evaluation_shows_its_generated_conversations(run, no_plots):
    (run / "evaluation.json").unlink()
    (run / "model").mkdir()
    (run / "model" / "dialogue.json").write_text('{"speakers": ["Bob", "Alex"], "template": "labels"}')
    page = page_of(run)
    assert "Case 1 Alex Old? True continuation Bob Yes. Generated continuation Bob No." in page.text
    assert "template labels" in page.text


def test_a_text_is_split_into_turns_at_the_speakers_names():
    assert split_turns("Al: Hi. Al B: Who: me? Al: No", ["Al", "Al B"]) == [
        {"speaker": "Al", "text": "Hi."},
        {"speaker": "Al B", "text": "Who: me?"},
        {"speaker": "Al", "text": "No"},
    ]
    assert split_turns("Nobody: Hi", ["Al"]) == [{"speaker": "", "text": "Nobody: Hi"}]
    assert split_turns("Hi", []) == [{"speaker": "", "text": "Hi"}]
    assert split_turns(None, ["Al"]) == []


def test_a_text_is_split_at_its_copied_spans():
    assert split_copied("one two three", [[4, 7]]) == [Piece("one ", False), Piece("two", True), Piece(" three", False)]
    assert split_copied("one two three", [[0, 5], [4, 7]]) == [Piece("one two", True), Piece(" three", False)]
    assert split_copied("one", [[-9, 99]]) == [Piece("one", True)]
    for odd in (None, "x", [[2, 1]], [[9, 12]], [[0, -2]], [[None, 2]], [[1]], [7]):
        assert split_copied("one", odd) == [Piece("one", False)]
    assert split_copied("", [[0, 1]]) == []


def test_a_page_shows_at_most_100_cases(run, no_plots):
    content = evaluation()
    content["cases"] *= 120
    (run / "evaluation.json").write_text(json.dumps(content))
    page = page_of(run)
    assert page.tags["article"] == 100
    assert "The first 100 of 120 cases. All of them are in the folder's JSON files." in page.text


def test_a_page_shows_12_of_many_watched_replies(run, no_plots):
    lines = [json.dumps({"step": step, "epoch": step, "watched": f"answer {step}"}) for step in range(50)]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    page = page_of(run)
    assert "step 0 answer 0" in page.text
    assert "step 49 answer 49 12 of 50 different replies. All of them are in metrics.jsonl." in page.text


def test_a_folder_without_a_run_gives_a_user_error(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no such folder; give a run folder"):
        write_report(tmp_path / "none")
    with pytest.raises(UserError, match="is not a run folder"):
        write_report(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report"])
    with pytest.raises(UserError, match="python -m evaluation.report runs/tiny-1"):
        report.main()


def test_a_command_rewrites_the_report_without_torch(run):
    code = (
        "import sys, evaluation.report as report; heavy = {'torch', 'PIL', 'jinja2'} & set(sys.modules);"
        " assert not heavy, heavy; report.main(); assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run)], cwd=PROJECT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == f"written: {run / 'report.html'}\n", done.stderr


@needs_browser
def test_a_browser_shows_the_report_and_runs_nothing(tmp_path):
    from playwright.sync_api import sync_playwright

    page_file = write_report(write_run(tmp_path / "tiny-1", HOSTILE))
    loud: list[str] = []
    asked: list[str] = []
    with sync_playwright() as playwright:
        browser = launch_browser(playwright)
        page = browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme="light")
        page.on("console", lambda message: loud.append(message.text))
        page.on("pageerror", lambda error: loud.append(str(error)))
        page.on("dialog", lambda dialog: loud.append(dialog.message))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(page_file.as_uri())
        assert page.get_by_role("heading", name="Findings").is_visible()
        assert page.get_by_role("cell", name="2.485").first.is_visible()
        assert page.get_by_text("window.ran = 1").first.is_visible()
        plot, turns = page.get_by_role("img", name="Loss by step."), page.locator("article .turn")
        assert (plot.bounding_box() or {})["height"] > 250
        asked_at, answered_at = (turns.nth(place).bounding_box() or {} for place in (0, 1))
        assert asked_at["x"] < answered_at["x"]  # the first speaker is on the left, the second on the right
        true, written = (page.locator("article .columns > div").nth(place).bounding_box() or {} for place in (0, 1))
        assert true["y"] == written["y"]

        background = "getComputedStyle(document.body).backgroundColor"
        line = "getComputedStyle(document.querySelector('.plot path[style*=\"--model\"]')).stroke"
        light = page.evaluate(background), page.evaluate(line)
        page.emulate_media(color_scheme="dark")
        dark = page.evaluate(background), page.evaluate(line)
        assert light[0] != dark[0]
        assert light[1] != dark[1]

        page.set_viewport_size({"width": 360, "height": 700})
        page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        true, written = (page.locator("article .columns > div").nth(place).bounding_box() or {} for place in (0, 1))
        assert true["y"] + true["height"] <= written["y"]
        page.emulate_media(media="print", color_scheme="dark")
        assert page.evaluate(background) == "rgb(255, 255, 255)"
        assert page.evaluate("window.ran") is None
        browser.close()
    assert loud == []
    assert asked == [page_file.as_uri()]
