"""Phone numbers, e-mail addresses, links and IBANs are found by their format, counted, and masked everywhere."""

import importlib.util
import json
import subprocess
import sys

import phonenumbers
import pytest
from hypothesis import given
from hypothesis import strategies as st
from phonenumbers import PhoneNumberFormat
from stdnum import iban

from conftest import PROJECT, run_in
from dialogues.conversations import Changes, Conversations, encode_block
from dialogues.dialogue import Dialogue, Turn
from dialogues.ledger import count_private, ledger_lines, make_ledger
from dialogues.private import INSTRUCTION_LINE, REQUIREMENTS, find_private, mask_dialogue
from dialogues.template import Renderer
from dialogues.tokenizer import load_tokenizer
from pipeline.prepare import make_datasets, open_data, read_data
from settings import DataSettings, TrainingSettings
from support.errors import UserError

IBAN = "DE89 3704 0044 0532 0130 00"
FOUND = [  # kind, text, the part of it that is found
    ("phone", "call +49 170 1234567 now", "+49 170 1234567"),
    ("phone", "+491701234567", "+491701234567"),
    ("phone", "(+49) 170 1234567", "(+49) 170 1234567"),
    ("phone", "+49 (0)30 / 123456, please", "+49 (0)30 / 123456"),
    ("phone", "+1.212.555.0123", "+1.212.555.0123"),
    ("phone", "\u202a+49\u00a0170\u00a01234567\u202c", "+49\u00a0170\u00a01234567"),
    ("phone", "@491701234567 are you there?", "@491701234567"),
    ("phone", "0033 6 12 34 56 78", "0033 6 12 34 56 78"),
    ("phone", "01701234567!", "01701234567"),
    ("phone", "0170/1234567", "0170/1234567"),
    ("phone", "(0171-123 45 67)", "0171-123 45 67"),
    ("phone", "06 12 34 56 78", "06 12 34 56 78"),
    ("phone", "06.12.34.56.78.", "06.12.34.56.78"),
    ("phone", "(030) 123 4567", "(030) 123 4567"),
    ("phone", "(212) 555-0123", "(212) 555-0123"),
    ("phone", "or 1-212-555-0123.", "1-212-555-0123"),
    ("phone", "_0170 1234567_", "0170 1234567"),
    ("email", "Write to anna.b+x@mail.example.co.uk.", "anna.b+x@mail.example.co.uk"),
    ("email", "mailto:ä_1@münchen.de", "ä_1@münchen.de"),
    ("email", "a@b.xn--p1ai", "a@b.xn--p1ai"),
    ("link", "see https://x.org/a?b=0170-1234567#d.", "https://x.org/a?b=0170-1234567#d"),
    ("link", "[this](ftp://x.org/c)", "ftp://x.org/c"),
    ("link", "WWW.x.org, then", "WWW.x.org"),
    ("link", "http://ann:secret@x.org/", "http://ann:secret@x.org/"),
    ("iban", f"to {IBAN}, thanks", IBAN),
    ("iban", "DE89370400440532013000", "DE89370400440532013000"),
    ("iban", "GB29 NWBK 6016 1331 9268 19 please", "GB29 NWBK 6016 1331 9268 19"),
    ("link", "_www.x.org_", "www.x.org"),
    ("iban", f"_{IBAN}_", IBAN),
    ("iban", "NO93 8601 1117 947", "NO93 8601 1117 947"),
    ("iban", "FR14 2004 1010 0505 0001 3M02 606", "FR14 2004 1010 0505 0001 3M02 606"),
    ("iban", "MU17BOMM0101101030300200000MUR", "MU17BOMM0101101030300200000MUR"),
]
NOTHING = [
    *("31.12.2023", "01.02.2023 10:15", "01.02.2023-05.02.2023", "01/02/2023", "01-02-2023 08:00", "01 02 2023"),
    *("01/02/23 1015", "2023-01-05 08:00:00", "2023-01-05T08:00:00+01:00", "20230105", "2023-12-31 22:15:40 +0100"),
    *("07.30-08.15", "09:00-17:00", "0900-1700", "09.00 - 17.00 Uhr", "1999-2003, 2005-2008"),
    *("1.250.000,50 €", "$1,000,000.00", "1 250 000 Euro", "0,99 and 1,99 and 2,99", "0.99 1.99 2.99 3.99"),
    *("order 1234567890", "4711-0815-33", "12345 67890", "order 000123456789", "3.14159265358979", "0.0123456789"),
    *("192.168.178.1", "ISBN 978-3-16-148410-0", "4111 1111 1111 1111", "1. 2. 3. 4. 5. 6. 7. 8. 9.", "+1 +2 +3 +4"),
    *("me @ home", "a@b", "@anna", "3 @ 12345678", "std::vector", "://", "www.", "MP40 WITH SOME GUNS AND 1234567"),
]


def looks(text: str) -> list[tuple[str, str]]:
    return [(span.kind, text[span.start : span.end]) for span in find_private(text)]


def masked(*texts: str, speakers: tuple[str, str] = ("Nora", "Timo")) -> list[str]:
    """The masked texts of two speakers who alternate."""
    turns = tuple(Turn(speakers[number % 2], text) for number, text in enumerate(texts))
    return [turn.text for turn in mask_dialogue(Dialogue(turns))[0].turns]


class TestTheLook:
    @pytest.mark.parametrize(("kind", "text", "found"), FOUND)
    def test_private_data_is_found(self, kind, text, found):
        assert looks(text) == [(kind, found)]

    @pytest.mark.parametrize("text", NOTHING)
    def test_other_text_is_not_private(self, text):
        assert looks(text) == []

    def test_several_kinds_in_one_text_are_found(self):
        text = f"+49 170 1234567\n0170 1234567, a@b.de https://x.org {IBAN}."
        assert [kind for kind, _ in looks(text)] == ["phone", "phone", "email", "link", "iban"]

    @pytest.mark.parametrize("form", [PhoneNumberFormat.INTERNATIONAL, PhoneNumberFormat.E164])
    def test_international_numbers_of_every_country_are_found(self, form):
        examples = {region: phonenumbers.example_number(region) for region in phonenumbers.SUPPORTED_REGIONS}
        texts = {region: phonenumbers.format_number(number, form) for region, number in examples.items() if number}
        assert len(texts) > 200
        missed = {region for region, text in texts.items() if looks(f"at {text}, he said") != [("phone", text)]}
        assert missed <= {region for region, text in texts.items() if sum(map(str.isdigit, text)) < 8}, missed
        assert len(missed) < 10

    @given(st.text("0123456789", min_size=18, max_size=18))
    def test_every_german_iban_is_found(self, account):
        number = f"DE{iban.calc_check_digits('DE00' + account)}{account}"
        for text in (number, iban.format(number)):
            assert looks(text) == [("iban", text)]


class TestMasking:
    @pytest.mark.parametrize(("kind", "text", "found"), FOUND)
    def test_private_data_becomes_a_placeholder(self, kind, text, found):
        assert masked("Hello.", text) == ["Hello.", text.replace(found, f"<{kind}>")]

    @pytest.mark.parametrize("text", NOTHING)
    def test_other_text_stays_unchanged(self, text):
        assert masked("Hello.", text) == ["Hello.", text]

    def test_international_numbers_in_other_notations_are_masked(self):
        assert masked("+٩٧١ ٥٠ ١٢٣ ٤٥٦٧ or \uff0b\uff14\uff19 170 1234567", "+1 212 555 0123 ext. 45.") == [
            "<phone> or <phone>",
            "<phone>.",
        ]

    def test_national_numbers_are_masked_next_to_international_ones(self):
        spanish = ("612 345 679, or 912345678", "on 31.12.2023 at 10, for 100 200 300")
        assert masked(*spanish) == list(spanish)
        assert masked(*spanish, "+34 612 345 678") == ["<phone>, or <phone>", spanish[1], "<phone>"]
        assert masked(*spanish, speakers=("+34 612 345 678", "Timo")) == ["<phone>, or <phone>", spanish[1]]

    def test_a_date_is_not_a_french_number(self):
        assert masked("+33 6 12 34 56 78", "le 01.02.2023 10:15")[1] == "le 01.02.2023 10:15"

    def test_ibans_in_another_grouping_or_with_a_typo_are_masked(self):
        assert masked("de89-3704-0044-0532-0130-00 bitte", "DE 89 37040044 0532013000 or") == [
            "<iban> bitte",
            "<iban> or",
        ]
        assert masked(f"{IBAN[:-1]}1", "-") == ["<iban>", "-"]

    def test_the_instruction_is_masked_and_the_names_are_not(self):
        turns = (Turn("+49 170 1234567", "Hi."), Turn("Timo", "Ho."))
        dialogue, replaced = mask_dialogue(Dialogue(turns, "Answer for help@x.org."))
        assert dialogue == Dialogue(turns, "Answer for <email>.")
        assert replaced == [("email", INSTRUCTION_LINE)]

    @given(st.lists(st.sampled_from([text for _, text, _ in FOUND] + NOTHING + [" ", "\n", ", ", "0", "+"])))
    def test_nothing_that_looks_private_is_left(self, pieces):
        (text, _) = masked("".join(pieces), "-")
        assert looks(text) == []


PRIVATE = Dialogue(
    (Turn("Nora", "I am at 0170 1234567 or 0170 7654321."), Turn("Timo", "Write to t@x.org, see www.x.org.")),
    "Help is at help@x.org.",
)
HARMLESS = Dialogue((Turn("Nora", "Are you there?"), Turn("Timo", "At 18:30.")))


class TestCounts:
    def blocks(self, vocabulary, mask: bool) -> Conversations:
        renderer = Renderer(load_tokenizer(vocabulary))
        changes = Changes({"Timo": "Tim"}, mask)
        dialogues = [PRIVATE, HARMLESS, PRIVATE, PRIVATE._replace(turns=PRIVATE.turns[:1])]
        numbered = list(enumerate(dialogues, 1))
        parts = (numbered[:2], numbered[2:])
        return Conversations(renderer, [encode_block(renderer, part, changes) for part in parts])

    @pytest.mark.parametrize("mask", [False, True])
    def test_private_data_is_counted_by_speaker_and_dialogue(self, vocabulary, mask):
        """Skipped dialogues do not count; a renamed speaker has the new name."""
        private = self.blocks(vocabulary, mask).private
        assert private.found == {
            ("phone", "Nora"): 4,
            ("email", "Tim"): 2,
            ("email", INSTRUCTION_LINE): 2,
            ("link", "Tim"): 2,
        }
        assert private.dialogues == {"phone": 2, "email": 2, "link": 2}
        assert private.masked == mask
        assert list(count_private(private)) == ["phone", "email", "link"]
        assert count_private(private)["phone"].speakers == {"Nora": 4}

    def test_the_masked_texts_are_encoded(self, vocabulary):
        plain, hidden = self.blocks(vocabulary, False), self.blocks(vocabulary, True)
        assert plain[0].turns[0].text == PRIVATE.turns[0].text
        assert hidden[0].turns[0].text == "I am at <phone> or <phone>."
        assert hidden[0].turns[1].text == "Write to <email>, see <link>."
        assert hidden[0].instruction == "Help is at <email>."
        assert hidden.fingerprints[0] == hidden.fingerprints[2] != plain.fingerprints[0]
        assert hidden[1] == plain[1]

    @pytest.mark.parametrize("mask", [False, True])
    def test_several_processes_give_the_same_counts_as_one(self, work, tmp_path, mask):
        code = f"""
import sys
sys.path.insert(0, {str(PROJECT)!r})
from pathlib import Path
import dialogues.encoding as encoding
from dialogues.conversations import Changes
from dialogues.reading import open_source

if __name__ == "__main__":
    read = []
    for encoding.LARGE in (1 << 40, 1000):
        source = open_source(Path("data.jsonl"))
        tiny = Path({str(PROJECT / "models" / "tiny")!r})
        read.append(encoding.encode_source(source, tiny, "prompt", changes=Changes(mask={mask})))
    one, many = read
    assert one.private == many.private and (one.tokens == many.tokens).all()
    print(sorted(one.private.found.items()), sorted(one.private.dialogues.items()))
"""
        numbers = [f"+49 170 {number:07}" if number % 3 else "Hm?" for number in range(2500)]
        talks = [{"Nora": number, "Timo": "a@b.de c@d.de"} for number in numbers]
        (work / "data.jsonl").write_text("\n".join(map(json.dumps, talks)) + "\n")
        (tmp_path / "script.py").write_text(code)
        done = subprocess.run(
            [sys.executable, tmp_path / "script.py"], cwd=work, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        found, dialogues = [(("email", "Timo"), 5000), (("phone", "Nora"), 1666)], [("email", 2500), ("phone", 1666)]
        assert done.stdout == f"{found} {dialogues}\n"


class TestTheAccount:
    def lines(self, tmp_path, talks: list[dict[str, str]], **options) -> list[str]:
        path = tmp_path / "data.json"
        path.write_text(json.dumps(talks))
        settings = DataSettings(paths=(path,), **options)
        data = read_data(open_data(settings), PROJECT / "models" / "tiny", settings, 1)
        ledger = make_ledger(data.sources, make_datasets(data, 0, 512), TrainingSettings())
        return [line for line in ledger_lines(ledger) if line.startswith(("private", "masked"))]

    def test_one_line_lists_the_kinds_and_speakers(self, tmp_path):
        talks = [{"Nora": f"0170 12345{number:02}", "Timo": "So?"} for number in range(9)]
        talks += [{"Timo": "0170 1234567, 0170 1234568", "Nora": "www.x.org"}]
        told = "11 phone numbers in 10 dialogues (Nora 9, Timo 2), 1 link in 1 (Nora 1)"
        assert self.lines(tmp_path, talks) == [f"private: {told}; --mask replaces them"]
        assert self.lines(tmp_path, talks, mask=True) == [f"masked: {told}; names are not masked"]

    def test_a_line_with_many_speakers_is_shortened(self, tmp_path):
        talks = [{name: "a@b.de", "Timo": "So?"} for name in ("Al", "Bo", "Cy", "Di", "Al")]
        talks[0]["Timo"] = "Ok."
        line = "private: 5 e-mail addresses in 5 dialogues (Al 2, Bo 1, Cy 1, 1 more); --mask replaces them"
        assert self.lines(tmp_path, talks) == [line]

    def test_nothing_is_printed_without_private_data(self, tmp_path):
        talks = [{"Nora": f"Number {number}?", "Timo": "Yes."} for number in range(5)]
        assert self.lines(tmp_path, talks) == []
        assert self.lines(tmp_path, talks, mask=True) == ["masked: nothing found; names are not masked"]

    def test_speakers_named_by_a_phone_number_are_reported(self, tmp_path):
        talks = [{"+49 170 1234567": "Hi!", "Timo": f"Yes, {number}?"} for number in range(5)]
        (line,) = self.lines(tmp_path, talks)
        assert line.startswith("private: speakers whose name is a phone number, an address or a link: 1;")
        assert self.lines(tmp_path, talks, rename=("+49 170 1234567=Nora",)) == []


@pytest.fixture(scope="module")
def run_of_masked(tmp_path_factory):
    """A folder with conversations, a masked run of them, and its output."""
    folder = tmp_path_factory.mktemp("masked")
    talks = [
        {"Nora": f"I am at +49 170 12345{number:02}, {IBAN}.", "Timo": f"t@x.org, https://x.org {number}"}
        for number in range(10)
    ]
    (folder / "data.json").write_text(json.dumps(talks))
    options = ("--data", "data.json", "--max-steps", 1, "--cases", 1, "--max-new-tokens", 2, "--keep-checkpoint")
    return folder, run_in(folder, "finetune.py", *options, "--mask", "--run-dir", "run")


class TestARun:
    def test_every_written_file_has_the_placeholders(self, run_of_masked):
        folder, done = run_of_masked
        assert done.returncode == 0, done.stderr
        kinds = ("phone numbers", "Nora"), ("e-mail addresses", "Timo"), ("links", "Timo"), ("IBANs", "Nora")
        for kind, speaker in kinds:
            assert f"10 {kind} in 10" in done.stdout
            assert f"({speaker} 10)" in done.stdout
        text = (folder / "run" / "train_data.txt").read_text(encoding="utf-8")
        assert text.count("### Nora:\nI am at <phone>, <iban>.\n") == 7
        assert text.count("### Timo:\n<email>, <link> ") == 7
        files = [path for path in folder.rglob("*") if path.is_file() and path.name != "data.json"]
        assert len(files) > 10
        for path in files:
            content = path.read_bytes()
            assert not any(private in content for private in (b"+49 170", b"3704 0044", b"t@x.org")), path
        ledger = json.loads((folder / "run" / "ledger.json").read_text(encoding="utf-8"))
        assert ledger["masked"]
        assert ledger["private"]["phone"] == {"count": 10, "dialogues": 10, "speakers": {"Nora": 10}}

    @pytest.mark.slow
    def test_a_masked_run_is_evaluated_and_chatted_with_masked(self, run_of_masked):
        folder, _ = run_of_masked
        for options in ((), ("--mask",)):
            done = run_in(folder, "evaluate.py", "run", *options, "--max-new-tokens", 2)
            assert done.returncode == 0, done.stderr
            assert "t@x.org" not in (folder / "run" / "report.html").read_text(encoding="utf-8")
        done = run_in(folder, "chat.py", "run", "--me", "Nora", "--seed", 1, "--max-new-tokens", 2)
        assert done.returncode == 0, done.stderr

    @pytest.mark.slow
    def test_a_masked_run_is_resumed_masked(self, run_of_masked):
        folder, _ = run_of_masked
        done = run_in(folder, "finetune.py", "--resume", "run", "--max-steps", 2)
        assert done.returncode == 0, done.stderr
        assert "resuming after step 1" in done.stdout
        assert "masked: 10 phone numbers" in done.stdout
        assert json.loads((folder / "run" / "settings.json").read_text(encoding="utf-8"))["data"]["mask"]

    @pytest.mark.slow
    def test_an_older_run_is_read_and_stays_unmasked(self, run_of_masked, tmp_path):
        """Older versions wrote settings without the option."""
        from pipeline.run_settings import parse_finetune_settings

        folder, _ = run_of_masked
        recorded = json.loads((folder / "run" / "settings.json").read_text(encoding="utf-8"))
        del recorded["data"]["mask"]
        (tmp_path / "settings.json").write_text(json.dumps(recorded))
        assert not parse_finetune_settings(["--resume", str(tmp_path)]).data.mask
        with pytest.raises(UserError, match="--mask: the run has it off"):
            parse_finetune_settings(["--resume", str(tmp_path), "--mask"])


class TestWithoutTheLibraries:
    @pytest.mark.parametrize("missing", REQUIREMENTS)
    def test_the_error_says_how_to_install_the_libraries(self, missing, monkeypatch):
        find = importlib.util.find_spec
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == missing else find(name))
        line = f'--mask: the package {missing} is not installed; .* pip install "phonenumbers>=.*" "python-stdnum>=.*"'
        with pytest.raises(UserError, match=f"^{line}$"):
            open_data(DataSettings(mask=True))
        assert open_data(DataSettings())

    def test_counting_needs_no_library(self):
        script = (
            "import sys; from dialogues.private import find_private; found = find_private('+49 170 1234567 a@b.de');"
            "sys.exit(len(found) != 2 or bool({'phonenumbers', 'stdnum'} & set(sys.modules)))"
        )
        assert subprocess.run([sys.executable, "-c", script], cwd=PROJECT, check=False).returncode == 0
