"""Find the lines of a file that have a time, and the position of the time in them."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from dialogues.layouts.notices import MARKS
from dialogues.layouts.stamps import FIND_CLOCK, FIND_DATE, STAMP, Stamp, parse_stamp

# A timestamp at the beginning of a line, and its separator from the rest.
CUE = r"\d{1,2}:\d{1,2}(?::\d{1,2})?(?:[.,]\d{1,3})?(?=\s?-->)"  # in captions
FIRST = re.compile(
    rf"(?P<open>[\[(<]?)(?P<stamp>{CUE}|{STAMP})(?P<close>[\])>]?)"
    r"(?P<gap>(?<=\])(?=[^\W\d])|\s-->\s.*$|\s?[-–—]\s+|\s*:\s+|,\s+|;\s?|\s?\|\s?|\t\s*|\s+|$)(?P<rest>.*)$"
)
# Name, then time: `Nora Berg  0:07`, `[Nora] [오후 8:00] text`, `Nora (20:01): text`, `Nora, [1 Jan 2024 at 20:00]:`
SECOND = re.compile(
    rf"(?P<name>[^\s\d\[(<][^\t\n]{{0,50}}?|\[[^\[\]\n]{{1,50}}\]|<[^<>\n]{{1,50}}>)"
    rf"(?P<open>,?\s*[\[(]|\s*[—–|·•-]+\s*|\s{{2,}}|\t|,?\s)(?P<stamp>{STAMP})(?P<close>[\])]?:?)"
    r"(?P<gap>\s+|$)(?P<rest>.*)$"
)
DIGITS = re.compile(r"\d[:.]\d\d|\d[:.]?\d\d\s?[AaPp]")
DAY_WORDS = re.compile(
    r"day changed( to)?|log (opened|closed|started|ended)|saved on|date|session (start|close|ident)\w*|begin|end(ed)?"
    r"|on|today|started|conversation|chat|with|at|of|the|\b[^\W\d]{2,9}day|\b[^\W\d]{1,3}\b"
    r"|[^\W\d]{1,10}(요일|曜日|期.)|[\W_]",
    re.IGNORECASE,
)
TWO_BRACKETS = re.compile(r"^\[([^\[\]]{6,40})\] \[(\d{1,2}:\d\d(?::\d\d)?)\]")
EDITED_AT = re.compile(r"(?<=\d) \| (?:Edited|Removed) [^\]]{4,30}\]")
FROM_TO = re.compile(r"^\[(\d\d:\d\d:\d\d)[.,]\d+ --> [\d:.,]+\]\s*")
SBV = re.compile(r"^(\d{1,2}:\d\d:\d\d\.\d{3}),(\d{1,2}:\d\d:\d\d\.\d{3})$")
ELAPSED = re.compile(r"^\( ?(?:(\d+)h )?(\d+)m (\d+)s ?\)")
DAYS_AGO = re.compile(  # "Nora — Today at 18:07", as Discord's window shows it
    r"\s*[—–|·•(\[,-]*\s*\b(?:today|yesterday|heute|gestern|hoy|ayer|aujourd'hui|hier|oggi|ieri|hoje|ontem|vandaag|gisteren"
    r"|(?:last )?(?:mon|tues|wednes|thurs|fri|satur|sun)day)(?:\s+(?:at|um|a las|à|alle|às|om))?$",
    re.IGNORECASE,
)
EDITS = re.compile(r"\s*\((?:edited|pinned|Read by .*|bearbeitet)\)\s*$")

REPLY = "This message responded to an earlier message."  # imessage-exporter writes this below a reply


class Line(NamedTuple):
    number: int
    text: str


class Timed(NamedTuple):
    """A line with a timestamp, and the texts before and after it."""

    place: int
    before: str
    stamp: str
    rest: str
    signature: tuple[str, ...]


def without_copies(lines: Sequence[Line]) -> Sequence[Line]:
    """Remove the indented copies of replies that imessage-exporter writes below the message they answer.

    A copy ends at the next time that is not indented: only the first line of its text is.
    """
    if not any(line.text.strip() == REPLY for line in lines):
        return lines
    kept, copied = [], False
    for line in lines:
        if (timed := match_first(0, line.text)) and "date" in timed.signature:
            copied = line.text.startswith("    ")
        if not copied and line.text != REPLY:
            kept.append(line)
    return kept


def find_timed(lines: Sequence[Line]) -> tuple[str, dict[int, Timed]] | None:
    """Find the lines with the file's usual timestamp, and whether it comes "first" or "second" (after a name)."""
    first = [timed for place, line in enumerate(lines) if (timed := match_first(place, line.text))]
    kept = keep_signatures(first, lines)
    if len(kept) > 1 and any(timed.rest for timed in kept.values()):
        return "first", kept
    second = [timed for place, line in enumerate(lines) if (timed := match_second(place, line.text))]
    recurring = Counter(timed.before for timed in second)
    named = keep_signatures([timed for timed in second if recurring[timed.before] > 1], lines)
    looks = {timed.signature for timed in named.values()}
    for timed in second:  # add people who speak only once if their lines look like the others
        if recurring[timed.before] == 1 and timed.signature in looks and can_be_name(timed):
            named[timed.place] = timed
    if named and len(named) >= len(kept):
        return "second", named
    return ("first", kept) if kept else None


def can_be_name(timed: Timed) -> bool:
    """Whether a text that occurs once before a timestamp is a name: short, with the time in brackets or at the end."""
    return len(timed.before.split()) < 5 and (not timed.rest or timed.signature[0] in ("(", "["))


def match_first(place: int, line: str) -> Timed | None:
    text = line.lstrip(MARKS + " ")
    if not text[:1].isdigit() and text[:1] not in "[(<" and not text[:3].isalpha() and not text[:2].strip().isalpha():
        return None
    match = FIRST.match(text)
    if not match or (match["open"] + match["close"]) not in ("", "[]", "()", "<>"):
        return None
    arrow = match["gap"].strip().startswith("-->")
    gap = "-->" if arrow else match["gap"].strip() or ("\t" if "\t" in match["gap"] else " ")
    about = ("", "") if match["open"] else (gap, "0" if match["stamp"][0].isdecimal() else "a")
    looks = (match["open"], "date" if parse_has_date(match["stamp"]) else "clock", *about)
    return Timed(place, "", match["stamp"], "" if arrow else EDITS.sub("", match["rest"]).strip(" "), looks)


def parse_has_date(stamp: str) -> bool:
    parsed = parse_stamp(stamp)
    return bool(parsed and parsed.date)


def match_second(place: int, line: str) -> Timed | None:
    text = line.lstrip(MARKS + " ")
    if not DIGITS.search(text[:120]):
        return None
    match = SECOND.match(text[:4000])
    if not match or not parse_stamp(match["stamp"]):
        return None
    name = re.sub(r"\s*\[[A-Z0-9]{4,}\]", "", match["name"])  # Slack's id
    name = DAYS_AGO.sub("", name).strip(" ,-–—|·•[]()<>*_@#\t").strip()
    if not name or ":" in name or parse_stamp(name):
        return None
    rest = text[match.start("rest") :].strip(" ")
    looks = (match["open"].strip()[-1:], "date" if parse_has_date(match["stamp"]) else "clock", "text" if rest else "")
    return Timed(place, name, match["stamp"], rest, looks)


def keep_signatures(found: list[Timed], lines: Sequence[Line]) -> dict[int, Timed]:
    """Keep the lines with the usual timestamp; if it is a date, also dates in brackets, before a dash, or frequent."""
    counts = Counter(timed.signature for timed in found)
    if not counts:
        return {}
    (most, count), *_ = counts.most_common(1)
    filled = sum(bool(line.text.strip()) for line in lines)
    if count < 0.04 * filled or (most[1] == "clock" and count < 2):
        return {}
    good = {
        looks
        for looks, number in counts.items()
        if looks == most
        or (looks[1] == "date" and most[1] == "date" and (looks[0] or looks[2] in "-–—" or number > 0.2 * count))
    }
    return {timed.place: timed for timed in found if timed.signature in good}


def read_day(text: str) -> tuple[tuple[int, int, int], str] | None:
    """Return the date in a line that holds little else, and the order of its numbers; None for other lines."""
    line = text.strip(MARKS + " ")
    if not 5 < len(line) < 90 or not any(map(str.isdigit, line)):
        return None
    stamp = parse_stamp(re.sub(r"^[^\w\[(]+", "", line))
    if not stamp or not stamp.date or not is_date(stamp):
        return None
    left = DAY_WORDS.sub("", FIND_CLOCK.sub("", FIND_DATE.sub("", line)))
    return (stamp.date, stamp.order) if len(left) < 12 and not any(map(str.isdigit, left)) else None


def is_date(stamp: Stamp) -> bool:
    """Whether a date is possible in some order of day, month and year."""
    first, middle, last = stamp.date or (0, 0, 0)
    return 0 < middle <= 31 and (0 < first <= 31 or first > 1900) and (0 < last <= 31 or last > 1900 or last < 100)


def timed_lines(lines: Sequence[str]) -> list[Line]:
    """Number the lines; remove line ends, and normalise spaces and timestamps."""
    return [Line(number, normalise(line)) for number, line in enumerate(lines, 1)]


def normalise(line: str) -> str:
    """Strip the newline from a line, normalise its spaces, and merge several timestamps into one."""
    line = line.rstrip("\r\n").replace("\u202f", " ").replace("\xa0", " ")
    if line[:1] == "[":
        line = TWO_BRACKETS.sub(r"[\1 \2]", line, count=1)  # Konversation
        line = EDITED_AT.sub("]", line, count=1)  # Skype
        line = FROM_TO.sub(r"[\1] ", line, count=1)  # whisper.cpp
        return re.sub(r"^\[\s+(.{6,60}?)\s*\]", r"[\1]", line, count=1)  # Viber
    if line[:1] == "(":
        return ELAPSED.sub(lambda found: f"[{int(found[1] or 0):02}:{int(found[2]):02}:{int(found[3]):02}]", line)
    return SBV.sub(r"\1 --> \2", line, count=1) if line[:1].isdigit() else line
