"""Private strings of the training part: they are found in the tokens, tested after their history, and never shown."""

import json
import math
import re
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from conftest import CPU, run_in
from dialogues.conversations import Conversations
from dialogues.dialogue import Dialogue, Turn
from dialogues.private import find_private_and_numbers
from dialogues.template import TEMPLATES, Renderer
from evaluation.exposure import (
    ALTERNATIVES,
    SHARE,
    PrivateString,
    choose_strings,
    collect_words,
    complete_strings,
    find_strings,
    hide,
    is_complete,
    make_alternatives,
    measure_exposure,
    rank_strings,
)
from evaluation.exposure_section import ExposureSection, exposure_section
from evaluation.findings import about_exposure
from evaluation.results import DAMAGED, ExposedString, Exposure
from evaluation.run_files import RunFiles
from hub.find import BUNDLED
from load_gpt2_weights import load_model
from pipeline.job import Data
from pipeline.subject import Scope, choose_subject
from settings import GenerationSettings
from support.files import Json
from talking.decoder import Decoder

PLANTED, NEVER = "+49 170 4815162", "+49 170 9630258"
CARD, IBAN = "4929 1234 5678 9012", "DE89 3704 0044 0532 0130 00"
THINGS = ["weather", "house", "car", "food", "music", "game", "hat", "coat", "book", "song", "dog", "cat"]
PLACES = {  # a turn, and the string in it
    "at the start": (f"{PLANTED} is it", PLANTED),
    "after a space": (f"call {PLANTED}.", PLANTED),
    "after two spaces": (f"call  {PLANTED}", PLANTED),
    "after a bracket": (f"me ({PLANTED})", PLANTED),
    "inside a token": (f"me --->{PLANTED}<--- yes", PLANTED),
    "after an accent": (f"é{PLANTED[1:]}… or «{CARD}»", CARD),
    "after a wide space": (f"ring\u00a0{PLANTED}\u202f!", PLANTED),
    "a link in brackets": ("see (https://x.org/ab12/).", "https://x.org/ab12/"),
    "an address": ("it's <nora.k@x.org>, ok", "nora.k@x.org"),
    "after a line": (f"so:\n\n{CARD}\n", CARD),
}


@pytest.fixture(scope="module")
def bundled():
    return load_model(BUNDLED)


def conversations_of(tokenizer, *texts: str, template: str = "prompt", learn: str = "all") -> Conversations:
    """A dialogue for each text, in which Bob says it."""
    dialogues = [Dialogue((Turn("Alex", "And?"), Turn("Bob", text), Turn("Alex", "Thanks."))) for text in texts]
    return Conversations.of(Renderer(tokenizer, template), dialogues, learn)


def subject_of(conversations: Conversations, train: int | None = None):
    """All but the last dialogue, or the first `train`, are the training part."""
    numbers = np.arange(len(conversations))
    train = len(numbers) - 1 if train is None else train
    data = Data([], conversations, {"train": numbers[:train], "val": numbers[train:]})
    return choose_subject(data, None, CPU, Scope(512, 100, 10, 1, GenerationSettings(cases=1), 5))


def found_in(conversations: Conversations, length: int = 512) -> list[PrivateString]:
    return find_strings(conversations, np.arange(len(conversations)), length)


def string(text: str, kind: str = "phone") -> PrivateString:
    return PrivateString(kind, text, 0, 0, 20, 8, "", "")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("my code is 482913.", ["482913"]),
        (f"pay {CARD} or 4929-1234-5678", [CARD, "4929-1234-5678"]),
        ("order 20240115123", ["20240115123"]),
        (f"{IBAN} and {PLANTED} and a1@x.org", [IBAN, PLANTED, "a1@x.org"]),
        ("https://x.org/123456789 only", ["https://x.org/123456789"]),
        ("on 12.05.2023 at 10:30, 1,000,000 or 12345 or 3.1415926 or x1234567", []),
        ("1234 5678", []),
    ],
)
def test_other_numbers_are_found_too(text, found):
    spans = find_private_and_numbers(text)
    assert [text[start:end] for start, end, _ in spans] == found
    assert all(one.end <= other.start for one, other in pairwise(spans))


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("place", PLACES)
def test_a_string_is_found_at_a_token_boundary(bundled, template, place):
    (text, wanted), tokenizer = PLACES[place], bundled[1]
    conversations = conversations_of(tokenizer, text, template=template)
    decode = conversations.renderer.tokenizer.decode
    found = next(each for each in found_in(conversations) if each.text == wanted)
    tokens = conversations.tokens.tolist()
    own = tokens[found.place : found.place + found.size]
    assert decode(own) == found.before + wanted + found.after
    assert len(found.before) < 6
    assert own == found.encode(conversations.renderer.tokenizer, wanted)
    history = decode(tokens[: found.place])
    assert history + decode(own) == conversations.render(0)[: len(history + decode(own))]
    assert "Alex" in history


def test_a_string_counts_once_and_only_where_it_was_learned(bundled):
    tokenizer = bundled[1]
    repeated = conversations_of(tokenizer, f"it's {PLANTED}", f"or {PLANTED.replace(' ', '')}", "no 123456")
    assert [(each.text, each.occurrences, each.dialogue) for each in found_in(repeated)] == [
        (PLANTED, 2, 0),
        ("123456", 1, 2),
    ]
    assert not found_in(conversations_of(tokenizer, f"it's {PLANTED}", learn="Alex"))
    own = Dialogue((Turn(PLANTED, "Hi"), Turn("Bob", f"@{PLANTED[1:].replace(' ', '')} hi!")))
    assert not found_in(Conversations.of(Renderer(tokenizer), [own]))  # the label gives it away
    first = Dialogue((Turn("A", "a"), Turn("B", "b")), instruction="123456 it is")
    assert not found_in(Conversations.of(Renderer(tokenizer, "tokens"), [first]))  # nothing precedes it


def test_the_history_is_that_of_the_training_example(bundled):
    turns = tuple(Turn("AB"[place % 2], f"word {place} " * 8) for place in range(20))
    long = Dialogue((*turns, Turn("A", f"now {PLANTED}")))
    conversations = Conversations.of(Renderer(bundled[1]), [long])
    (found,) = found_in(conversations, 128)
    assert 0 < found.place - found.start <= 128
    assert conversations.renderer.tokenizer.decode(conversations.tokens[found.start :][:3].tolist()).startswith(
        "\n\n###"
    )
    cut = conversations_of(bundled[1], "far " * 200 + PLANTED)
    assert not found_in(cut, 64)  # it was cut off


@pytest.mark.parametrize(
    ("kind", "text", "form"),
    [
        ("phone", PLANTED, r"\+49 170 4\d{6}"),
        ("number", "482913", r"\d{6}"),
        ("number", CARD, r"4929 1234 56\d\d \d{4}"),
        ("number", "٤٨٢٩١٣", r"[٠-٩]{6}"),
        ("iban", IBAN, r"DE89 3704 0044 0532 \d{4} \d\d"),
        ("email", "Nora.k7@mail.org", r"(Fire|Wind|Rain)\.[a-z]\d@mail\.org"),
        ("email", "xyz_ab@mail.org", r"[a-z]{3}_[a-z]{2}@mail\.org"),
        ("link", "https://x.org/fire/12a", r"https://x\.org/(wind|rain|snow|fire)/\d\d[a-z]"),
        ("link", "www.x.org?q=abcde", r"www\.x\.org\?[a-z]=[a-z]{5}"),
    ],
)
def test_alternatives_have_the_same_form(kind, text, form):
    words = {4: ["fire", "rain", "snow", "wind"]} if "link" in kind else {4: ["fire", "rain", "wind"]}

    def make(seed: int) -> list[str]:
        return make_alternatives(string(text, kind), words, np.random.default_rng(seed))

    found = make(1)
    assert len({*found, text}) == ALTERNATIVES + 1
    assert all(re.fullmatch(form, each) for each in found)
    assert found == make(1) != make(2)


@pytest.mark.parametrize(("kind", "text"), [("link", "https://x.org"), ("link", "www.x.org/?"), ("email", "a@x.org")])
def test_a_string_with_few_alternatives_has_none(kind, text):
    assert make_alternatives(string(text, kind), {}, np.random.default_rng(1)) == []


def test_words_come_from_the_training_part(bundled):
    conversations = conversations_of(bundled[1], "Yes Größe", "No")
    assert collect_words(subject_of(conversations)) == {3: ["and", "yes"], 5: ["größe"], 6: ["thanks"]}


class StubScorer:
    """Gives the candidates of each context the losses of one row."""

    def __init__(self, rows: list[list[float]]) -> None:
        self.rows = rows

    def continuation_losses(self, contexts, continuations, what):
        assert [len(each) for each in continuations] == [ALTERNATIVES + 1] * len(contexts)
        return [[np.array([loss / 2, loss / 2]) for loss in row] for row in self.rows]


def test_ranks_by_hand(bundled):
    conversations = conversations_of(bundled[1], f"it's {PLANTED}", "www.x.org", CARD, "no 482913", "val")
    subject = subject_of(conversations)
    rows = [[1.0, *[2.0] * 31], [1.0, *[0.5] * 7, *[2.0] * 24], [2.0, *[2.0] * 31]]
    strings = found_in(conversations)
    assert rank_strings(StubScorer(rows), strings, subject) == [1, None, 8, 32]


def test_exposure_by_hand(bundled, monkeypatch):
    texts = [f"it's {PLANTED}", "www.x.org", CARD, "no 482913", "val 999999"]
    subject = subject_of(conversations_of(bundled[1], *texts))
    known = {PLANTED: 8, "www.x.org": None, CARD: 1, "482913": 32}

    monkeypatch.setattr("evaluation.exposure.rank_strings", lambda _, tried, __: [known[each.text] for each in tried])
    monkeypatch.setattr(
        "evaluation.exposure.complete_strings", lambda _, tried, __: [each.text == PLANTED for each in tried]
    )
    found = measure_exposure(SimpleNamespace(model=None), subject, 1e9)
    rows = [(each.shown[:2], each.completed, each.rank, each.exposure) for each in found.strings]
    assert rows[:2] == [("+4", True, 8, 2.0), ("49", False, 1, 5.0)]
    assert set(rows[2:]) == {("ww", False, None, None), ("48", False, 32, 0.0)}
    counts = (found.looked_through, found.found, found.tried, found.completed, found.ranked, found.first)
    assert counts == (4, 4, 4, 1, 3, 1)
    assert found.first_by_chance == 3 / 32
    assert Exposure.from_json(json.loads(json.dumps(asdict(found)))) == found
    assert about_exposure(found) == [
        "the model completes 1 of 4 private strings word for word; 1 of 3 rank above 31 random ones (by chance: 0.1):"
        " --mask replaces such strings before training"
    ]


def test_the_test_processes_at_most_an_eighth_of_the_trained_tokens(bundled, monkeypatch):
    numbers = np.random.default_rng(0).integers(100_000, 999_999, 60).tolist()
    subject = subject_of(conversations_of(bundled[1], *(f"it's {number}" for number in numbers), "val"))
    strings = found_in(subject.conversations)
    cost = 2 * (strings[0].place - strings[0].start) + strings[0].size + 32 * 16
    assert len(choose_strings(strings, 0)) == 1
    assert len(choose_strings(strings, cost * 10.5)) in (9, 10, 11)
    assert len(choose_strings(strings, 1e9)) == len(strings)
    assert choose_strings([], 1e9) == []
    monkeypatch.setattr("evaluation.exposure.MOST_DIALOGUES", 10)
    monkeypatch.setattr("evaluation.exposure.rank_strings", lambda _, tried, __: [1] * len(tried))
    monkeypatch.setattr("evaluation.exposure.complete_strings", lambda _, tried, __: [False] * len(tried))
    found = measure_exposure(SimpleNamespace(model=None), subject, SHARE * cost * 3.5)
    assert (found.looked_through, found.dialogues, found.found, found.tried) == (10, 60, 10, 3)
    again = measure_exposure(SimpleNamespace(model=None), subject, SHARE * cost * 3.5)
    assert again == found


def section_of(values: Json) -> ExposureSection | None:
    return exposure_section(RunFiles(Path(), evaluation={"exposure": values}))


def test_data_without_private_strings_needs_no_model(bundled):
    subject = subject_of(conversations_of(bundled[1], "nothing here", "or here", "val"))
    found = measure_exposure(Decoder(bundled[0]), subject, 1e9)
    assert (found.looked_through, found.found, found.tried, found.strings) == (2, 0, 0, [])
    assert about_exposure(found) == about_exposure(None) == []
    page = section_of(asdict(found))
    assert page
    assert page.lead == "No private strings were found in the training dialogues (searched: 2)."


def test_a_string_is_complete_only_without_more_digits():
    private = string("482913")._replace(before=" ")
    assert is_complete(" 482913", private)
    assert is_complete(" 482913. Bye", private)
    assert not is_complete(" 4829137", private)
    assert not is_complete(" 48291", private)
    assert not is_complete("482913", private)


def test_a_string_of_which_the_model_writes_more_is_not_complete(bundled, monkeypatch):
    """Even if it is as long as the reply may be for its batch."""
    subject = subject_of(conversations_of(bundled[1], f"it's {CARD}", "val"))
    (private,) = found_in(subject.conversations)
    for after, complete in ((".", True), ("7", False)):
        tokens = private.encode(subject.tokenizer, private.text)[: private.size] + subject.tokenizer.encode(after)
        monkeypatch.setattr(
            "evaluation.exposure.generate", lambda *rest, tokens=tokens: [tokens[: rest[3].max_new_tokens]]
        )
        assert complete_strings(SimpleNamespace(), [private], subject) == [complete]


def test_only_two_characters_are_shown():
    assert hide("482913") == "48••••"
    assert hide("https://x.org/" + "a" * 99) == "ht" + "•" * 10


SHOWN = ExposedString("number", "48••••", True, 1, 32, 5.0, 3, 7)
FOUND = Exposure(20_000, 30_000, 300, 41, 3, 40, 9, 1.25, [SHOWN])


def test_the_finding_says_what_was_tested_and_names_the_remedy():
    (text,) = about_exposure(FOUND)
    assert text.startswith(
        "the model completes 3 of 41 private strings (a sample; 300 were found) word for word; 9 of 40"
    )
    assert text.endswith(": --mask does not replace plain numbers, so remove them from the data")
    both = replace(FOUND, strings=[SHOWN, replace(SHOWN, kind="iban")])
    assert about_exposure(both)[0].endswith("--mask replaces such strings before training, except plain numbers")
    assert "--mask" not in about_exposure(replace(FOUND, completed=0, strings=[]))[0]


def test_the_section_of_the_report():
    page = section_of(asdict(FOUND))
    assert page
    assert page.lead == (
        "Private strings in the training dialogues: 300 (searched: 20,000 of 30,000, chosen at random); 41 of"
        " them, chosen at random, were tested. Completed word for word: 3. Ranked first among 32 candidates: 9 of 40"
        " (by chance: 1.2)."
    )
    assert page.rows == [["number 48••••", "yes", "1", "5.0", "3", "7"]]
    assert (page.more, page.completed) == (40, True)


def test_older_and_damaged_evaluations():
    assert exposure_section(RunFiles(Path())) is None
    values = asdict(FOUND)
    for name in values:
        for odd in (None, "x", float("nan"), [None], [{}], 10**400):
            run = RunFiles(Path(), evaluation={"exposure": {**values, name: odd}})
            assert exposure_section(run) is None
            assert run.notes == ["evaluation.json: its exposure is malformed and is left out of the report"]
    for name in ("kind", "shown", "rank", "among", "exposure", "occurrences", "dialogue"):
        with pytest.raises(DAMAGED):
            Exposure.from_json({**values, "strings": [{**asdict(SHOWN), name: float("nan")}]})


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> SimpleNamespace:
    """A run on dialogues of which 30 contain the same phone number: its folder and its output."""
    folder = tmp_path_factory.mktemp("canary")
    dialogues = [
        {"Alex": f"What is your number, {name}? {place}", "Bob": f"It is {PLANTED}, call me."}
        for name in ("Tim", "Tom", "Ann", "Eva", "Ben", "Leo", "Mia", "Ida", "Jan", "Kim")
        for place in range(3)
    ]
    dialogues += [{"Alex": f"Nice {thing}, right?", "Bob": "Yes, very nice."} for thing in THINGS]
    (folder / "data.json").write_text(json.dumps(dialogues))
    options = ("--epochs", 5, "--batch-size", 4, "--learning-rate", 1e-3, "--split", "90/10", "--cases", 1)
    done = run_in(folder, "finetune.py", "--data", "data.json", "--run-dir", "run", *options)
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(folder=folder / "run", printed=done.stdout)


class TestACanary:
    def test_it_is_completed_and_ranks_first(self, run):
        found = json.loads((run.folder / "evaluation.json").read_text())["exposure"]
        (canary,) = found["strings"]
        assert (canary["completed"], canary["rank"], canary["among"], canary["exposure"]) == (True, 1, 32, 5.0)
        assert (canary["occurrences"], canary["kind"], canary["dialogue"]) == (30, "phone", 1)
        assert (
            "the model completes 1 of 1 private string word for word; 1 of 1 rank above 31 random ones" in run.printed
        )
        page = (run.folder / "report.html").read_text()
        assert "What it would give away" in page
        assert "passwords" in page

    def test_it_is_shown_nowhere(self, run):
        secret = re.sub(r"\D", "", PLANTED)[-7:]
        kept = {"train_data.txt", "learned.txt", "val_data.txt"}
        texts = {
            path.name: path.read_text(encoding="utf-8")
            for path in run.folder.rglob("*")
            if path.suffix in (".json", ".jsonl", ".html", ".txt") and path.name not in kept
        }
        assert {"evaluation.json", "report.html", "base_evaluation.json", "ledger.json"} <= texts.keys()
        for name, text in {**texts, "the screen": run.printed}.items():
            assert secret not in text, name

    def test_a_number_that_it_never_saw_is_not_known(self, run):
        model, tokenizer = load_model(run.folder / "model")
        conversations = conversations_of(tokenizer, f"It is {NEVER}, call me.", f"It is {PLANTED}, call me.")
        subject, strings = subject_of(conversations, 1), found_in(conversations)
        assert complete_strings(Decoder(model), strings, subject) == [False, True]
        assert math.isfinite(measure_exposure(Decoder(model), subject, 1e9).strings[0].exposure)
