"""Find phone numbers, e-mail addresses, links and IBANs in what people say; count them, and replace them with --mask.

Regular expressions find them by their format, without a library. `--mask` replaces all matches, whether or not a
library confirms them: a mistyped number is as private as a correct one. It also replaces data that only the
libraries recognise. phonenumbers finds international numbers in any notation, and national numbers of countries
whose international numbers occur in the same dialogue (in a text, or as a speaker's name). python-stdnum finds
IBANs with unusual grouping. The result depends only on the dialogue and the versions of the libraries, not on
the machine.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from dialogues.dialogue import Dialogue, Turn
from support.errors import check_extra

KINDS = {  # singular and plural names
    "phone": ("phone number", "phone numbers"),
    "email": ("e-mail address", "e-mail addresses"),
    "link": ("link", "links"),
    "iban": ("IBAN", "IBANs"),
}
REQUIREMENTS = {"phonenumbers": "phonenumbers>=9,<10", "stdnum": "python-stdnum>=2,<3"}  # as in requirements-extra.txt
INSTRUCTION_LINE = "(instruction)"  # the speaker of the instruction, in the counts
NO_COUNTRY = "001"  # region of numbers that belong to no country, such as +800

SIX_DIGITS = re.compile(r"\d(?:\W{0,3}\d){5}")  # a phone number or an IBAN has at least this many
SPACE = r" \u00a0\u202f"  # spaces that may separate digits
MARK = r"\-\u2010\u2011\u2013/"
BEGIN, END = r"(?<![^\W_])", r"(?![^\W_])"  # word boundaries; _ is not part of a word: chats use it for italics
ALONE = rf"{BEGIN}(?<!\+)(?<!\d[.,/:-])"  # not the end of a date, a time, a price or another number
GAP = f"[{SPACE}]?[{MARK}{SPACE}]?[{SPACE}]?"
LOOKS = {
    "link": rf"""(?:(?<![^\W\d_])[a-z][a-z\d+.-]{{0,20}}://|{BEGIN}(?<![@.])www\.)[^\s<>"]*[^\s<>"'.,;:!?)\]}}…*_]""",
    "email": r"(?<![\w.+-])[\w.+-]+@(?:[\w-]+\.)+(?:xn--[\w-]+|[^\W\d_]{2,})",
    # Country, check digits and bank, seven digits, and optional letters and digits; in one piece, or in groups of four.
    "iban": rf"(?-i:{BEGIN}[A-Z]{{2}}\d\d[{SPACE}]?[A-Z\d]{{4}}[{SPACE}]?\d{{4}}[{SPACE}]?\d{{3}}"
    rf"(?:\d(?:[{SPACE}]?(?=[A-Z]*\d)[A-Z\d]{{4}})*(?:[A-Z\d]{{1,3}}|[{SPACE}]\d{{1,3}})?)?{END})",
    "phone": "|".join(
        (
            rf"{BEGIN}(?<!\+)(?:\(\+[1-9]\d{{0,2}}\)|\+[1-9])(?:[().{MARK}{SPACE}]{{0,3}}\d){{7,}}",  # international
            rf"{BEGIN}@\d{{8,15}}{END}",  # a mention of a person in exported chats
            rf"{ALONE}00[1-9](?:[{MARK}{SPACE}]?\d){{7,}}",
            rf"{ALONE}0[1-9]\d{{8,10}}(?!\d)",
            rf"{ALONE}0[1-9](?:\.\d\d){{4}}(?!\.?\d)",
            # Nine or more digits, with a separator after the first two to six, but not a date.
            rf"{ALONE}(?!\d\d(?P<mark>[{MARK}{SPACE}])\d\d(?P=mark)(?:(?:19|20)\d\d(?!\d)|\d\d(?!(?P=mark)?\d)))"
            rf"(?=\(?(?:[)]?{GAP}\d){{9}})(?:\(0[1-9]\d{{0,4}}\)|0[1-9]\d{{0,4}}(?=[{MARK}{SPACE}]))(?:{GAP}\d)+",
            # Groups of three, three and four digits, as in North America.
            rf"{ALONE}(?:1[.{MARK}{SPACE}])?(?:\([2-9]\d\d\)[{SPACE}]?|[2-9]\d\d[.{MARK}{SPACE}])"
            rf"[2-9]\d\d[.{MARK}{SPACE}]\d{{4}}(?!\w|[.,]\d)",
        )
    ),
}
LOOK = re.compile("|".join(f"(?P<{kind}>{look})" for kind, look in LOOKS.items()), re.IGNORECASE)
# Six digits or more in one piece, or three or more groups of four, as on cards. --mask does not replace them.
NUMBER = re.compile(rf"{ALONE}(?:\d{{4}}(?:[{MARK}{SPACE}]\d{{4}}){{2,}}|\d{{6,}}){END}")
PERHAPS_IBAN = re.compile(rf"{BEGIN}[A-Z]{{2}}[\W_]?\d\d(?:[\W_]?[A-Z\d]){{11,30}}", re.IGNORECASE)


class Span(NamedTuple):
    start: int
    end: int
    kind: str


@dataclass
class PrivateCounts:
    """Counts of each kind of private data.

    Attributes:
        found: (kind, speaker) → number of occurrences.
        dialogues: kind → number of dialogues that contain it.
        masked: whether placeholders have replaced the data.
    """

    found: Counter[tuple[str, str]] = field(default_factory=Counter)
    dialogues: Counter[str] = field(default_factory=Counter)
    masked: bool = False

    def add(self, found: list[tuple[str, str]]) -> None:
        """Count the private data found in one dialogue."""
        self.found.update(found)
        self.dialogues.update({kind for kind, _ in found})

    def merge(self, other: "PrivateCounts") -> None:
        """Add the counts of other dialogues."""
        self.found.update(other.found)
        self.dialogues.update(other.dialogues)
        self.masked |= other.masked


def check_masking() -> None:
    """Check that the libraries for `--mask` are installed.

    Raises:
        UserError: a library is missing.
    """
    for package in REQUIREMENTS:
        check_extra(package, "--mask", '" "'.join(REQUIREMENTS.values()))


def may_hold(text: str) -> bool:
    """Whether a text is worth searching: a quick check, because most texts contain nothing private."""
    if "@" in text or "://" in text or "www." in text.lower():
        return True
    # Ten searches for single characters take a tenth of the time of one search for a pattern.
    digits = not text.isascii() or any(digit in text for digit in "0123456789")
    return digits and SIX_DIGITS.search(text) is not None


def find_private(text: str) -> list[Span]:
    """Return the spans of everything that looks private, in order and without overlaps.

    Phone numbers that are separated only by spaces are found as one.
    """
    if not may_hold(text):
        return []
    return [Span(*match.span(), match.lastgroup or "") for match in LOOK.finditer(text)]


def find_private_and_numbers(text: str) -> list[Span]:
    """Return the spans of `find_private`, and of other numbers of six digits or more, in order and without overlaps."""
    if not may_hold(text):
        return []
    found = find_private(text)
    numbers = (Span(*match.span(), "number") for match in NUMBER.finditer(text))
    found += [new for new in numbers if not any(new.start < old.end and old.start < new.end for old in found)]
    return sorted(found)


def list_private(dialogue: Dialogue) -> list[tuple[str, str]]:
    """Return (kind, speaker) for everything in a dialogue that looks private."""
    spoken = (Turn(INSTRUCTION_LINE, dialogue.instruction), *dialogue.turns)
    if not may_hold("\n\n\n\n".join([text for _, text in spoken])):
        return []
    return [(span.kind, speaker) for speaker, text in spoken for span in find_private(text)]


def mask_dialogue(dialogue: Dialogue) -> tuple[Dialogue, list[tuple[str, str]]]:
    """Replace private data with placeholders such as `<phone>`; also return (kind, speaker) for each replacement.

    Speakers' names are not changed.
    """
    spoken = (Turn(INSTRUCTION_LINE, dialogue.instruction), *dialogue.turns)
    if not any(may_hold(text) for _, text in spoken):
        return dialogue, []
    regions = find_regions([*(text for _, text in spoken), *{speaker for speaker, _ in spoken}])
    masked, replaced = [], []
    for speaker, text in spoken:
        # Text next to a number may only look private once that number is replaced.
        while spans := unite([*find_private(text), *find_confirmed(text, regions)]):
            for start, end, kind in reversed(spans):
                text = f"{text[:start]}<{kind}>{text[end:]}"
            replaced += [(span.kind, speaker) for span in spans]
        masked.append(Turn(speaker, text))
    return dialogue._replace(turns=tuple(masked[1:]), instruction=masked[0].text), replaced


def find_regions(texts: Iterable[str]) -> list[str]:
    """Return the sorted codes of the countries (such as DE) whose valid international numbers occur in the texts."""
    import phonenumbers

    with_digits = filter(SIX_DIGITS.search, texts)
    found = {
        phonenumbers.region_code_for_number(match.number)
        for text in with_digits
        for match in phonenumbers.PhoneNumberMatcher(text, None)
    }
    return sorted(region for region in found if region and region != NO_COUNTRY)


def find_confirmed(text: str, regions: Iterable[str]) -> Iterator[Span]:
    """Yield what the libraries recognise: IBANs, international numbers, and national numbers of `regions`."""
    import phonenumbers

    if not SIX_DIGITS.search(text):
        return
    yield from find_ibans(text)
    # Require the country's standard grouping, or none; otherwise 01.02.2023 10 would be a French number.
    exact = phonenumbers.Leniency.EXACT_GROUPING
    searches = [(None, phonenumbers.Leniency.VALID), *((region, exact) for region in regions)]
    for region, leniency in searches:
        for match in phonenumbers.PhoneNumberMatcher(text, region, leniency=leniency):
            yield Span(match.start, match.end, "phone")


def find_ibans(text: str) -> Iterator[Span]:
    """Yield IBANs of the right length and with the right check digits, in upper or lower case and any grouping."""
    from stdnum import iban

    for match in PERHAPS_IBAN.finditer(text):
        start, longest = match.span()
        ends = (end for end in range(longest, start + 14, -1) if not text[end : end + 1].isalnum())
        for end in ends:  # words after the IBAN may look like a part of it
            if iban.is_valid(text[start:end]):
                yield Span(start, end, "iban")
                break


def unite(spans: Iterable[Span]) -> list[Span]:
    """Join overlapping spans, in order; the first one (the longest of those with the same start) gives the kind."""
    united: list[Span] = []
    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        if united and span.start < united[-1].end:
            united[-1] = united[-1]._replace(end=max(united[-1].end, span.end))
        else:
            united.append(span)
    return united
