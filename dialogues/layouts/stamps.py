"""Dates and times of day, as chat programs, logs and transcripts of many countries write them."""

import re
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

LATE = ("pm", "下午", "午後", "오후", "م", "ch", "μ.μ", "du", "ptg", "μμ", "ب.ظ", "em", "odp", "अपराह्न", "晚上", "中午")
HALVES_BEFORE = "上午|午前|오전|下午|午後|오후|早上|凌晨|晚上|中午|पूर्वाह्न|अपराह्न|SA|CH"
HALVES = rf"{HALVES_BEFORE}|[AaPp]\.?\s?[Mm]\b\.?|ص|م|π\.μ\.?|μ\.μ\.?|ق\.ظ\.?|ب\.ظ\.?|PG|PTG|fm|em"
MONTHS = {
    name: number
    for number, names in enumerate(
        (
            "jan ene gen oca янв січ sty led ian",
            "feb fev fév şub фев лют lut úno",
            "mar mär maa mrt мар бер márc bře",
            "apr abr avr nis апр кві kwi dub ápr",
            "may mai mag mei maj мая май тра kvě máj",
            "jun jui giu haz июн чер cze",
            "jul lug tem juil июл лип lip",
            "aug ago aoû aou ağu авг сер sie srp",
            "sep set eyl сен вер wrz zář sze",
            "oct okt out ott eki окт жов paź říj",
            "nov kas ноя лис noi",
            "dec dez dic déc des ara дек гру gru pro",
        ),
        1,
    )
    for name in names.split()
}
CLOCK = (
    rf"(?:(?P<before>{HALVES_BEFORE})\s?)?(?P<hour>\d{{1,2}})(?P<colon>[:.])(?P<minute>\d\d)"
    rf"(?:[:.](?P<second>\d\d))?(?:[.,]\d{{1,6}})?(?:\s?(?P<half>{HALVES}))?"
    r"(?:\s?(?:Z|UTC|GMT|[+-]\d\d:?\d\d)\b)?"
)
WEEKDAY = r"(?:[^\W\d]{2,12}\.?,?\s+)?"
DATE = (
    r"(?P<first>\d{1,4})(?P<separator>\.?\u200f?[ ./-]\s?|年\s?|년\s?)"
    r"(?P<middle>\d{1,2})(?:\.?\u200f?[ ./-]\s?|月\s?|월\s?)"
    r"(?P<last>\d{1,4})(?:\.(?!\d)|日|일)?(?:\s?\(?(?:[^\W\d]{1,3})\))?"
    rf"|{WEEKDAY}(?P<day>\d{{1,2}})(?:st|nd|rd|th|\.)?[ -](?:de )?(?P<month>[^\W\d]{{3,10}})\.?,?[ -](?:de )?"
    r"(?P<year>\d{2,4})(?: ?[рг]\.)?"
    rf"|{WEEKDAY}(?P<month2>[^\W\d]{{3,10}})\.?\s(?P<day2>\d{{1,2}})(?:st|nd|rd|th)?,?\s(?P<year2>\d{{4}})"
)
WORD = r"(?!上|午|下|오)[^\W\d]{1,4}"  # words around a time (à, klo, г., at), except words for a.m. and p.m.
BETWEEN = rf"(?:T|(?:\s?{WORD}\.?)?[,،:]?\s+(?:{WORD}\s+|@\s?)?|\s+[^\W\d]{{2,9}}\s+(?=[오上下午]))"


def unnamed(pattern: str) -> str:
    return re.sub(r"\?P<\w+>", "?:", pattern)


# No group names, so that one pattern can hold all alternatives: date and time, time and date, time alone.
DATED = rf"(?:{unnamed(DATE)}){BETWEEN}{unnamed(CLOCK)}"
# No year: HexChat's `Mar 12 20:15:00`, Teams' `3/12 7:41 PM`.
UNDATED = rf"(?:[^\W\d]{{3}}\s+\d{{1,2}}\s+\d\d:\d\d:\d\d|\d{{1,2}}[/.]\d{{1,2}}\.?,?\s+{unnamed(CLOCK)})"
STAMP = rf"(?:{DATED}|{UNDATED}|{unnamed(CLOCK)}(?:,\s?|\s+)(?:{unnamed(DATE)})|{unnamed(CLOCK)})"
FIND_DATE, FIND_CLOCK = re.compile(rf"(?<!\d)(?:{DATE})(?![\d:])"), re.compile(rf"(?<![\d.:]){CLOCK}(?!\d)")
LONGEST_STAMP = 60  # maximum characters in a timestamp
# SillyTavern's `@20h 00m`, Twitter's `Oct 31 22:10:47 +0000 2017`
ODD = re.compile(r"(?P<hours>(\d{1,2})h (\d\d)m)|(?P<year>(\w{3} \d\d) (\d\d:\d\d:\d\d) \+0000 (\d{4}))")
REWRITTEN = {"hours": "{1}:{2}", "year": "{4} {6} {5}"}


class Stamp(NamedTuple):
    """A date, with its numbers in the order of the text, and a time of day; either can be missing."""

    date: tuple[int, int, int] | None
    order: str  # of the date: "ymd", "dmy", "mdy", or "" if the text does not show it
    clock: timedelta | None
    half: bool  # True for a 12-hour clock
    elapsed: bool = False  # True for minutes and seconds since the start of a recording


@lru_cache(maxsize=1 << 16)
def parse_stamp(text: str) -> Stamp | None:
    """Return the date and time in a text; None if it has neither."""
    text = text[:LONGEST_STAMP].replace("\u202f", " ").replace("\xa0", " ")
    if without_year := re.match(r"([^\W\d]{3})\s+(\d{1,2})\s+(\d\d:\d\d:\d\d)$", text):
        text = "{} {} 2000 {}".format(*without_year.groups())
    elif without_year := re.match(r"(\d{1,2})[/.](\d{1,2})\.?,?\s+(\d{1,2}:.*)$", text):
        text = "{}/{}/2000 {}".format(*without_year.groups())
    date, rest = FIND_DATE.search(text), text
    numbers, order = None, ""
    if date:
        numbers, order = read_date(date)
        if numbers:
            rest = text[: date.start()] + "|" + text[date.end() :]
    clock = FIND_CLOCK.search(rest)
    if clock is None:
        return Stamp(numbers, order, None, False) if numbers else None
    hour, minute, second = (int(clock[name] or 0) for name in ("hour", "minute", "second"))
    half = re.sub(r"[\s.]", "", (clock["before"] or clock["half"] or "")).lower()
    if half:
        late = half in {word.replace(".", "") for word in LATE}
        hour = hour % 12 + 12 * late
    if hour > 23 and clock["second"] is None and not numbers and minute < 60:
        return Stamp(None, "", timedelta(minutes=hour, seconds=minute), False, elapsed=True)
    if hour > 23 or minute > 59 or second > 59:
        return None
    return Stamp(numbers, order, timedelta(hours=hour, minutes=minute, seconds=second), bool(half))


def read_date(match: re.Match[str]) -> tuple[tuple[int, int, int] | None, str]:
    """Return the numbers of a date in the order of the text, and that order if it is known."""
    if name := match["month"] or match["month2"]:
        month = MONTHS.get(name[:4].lower()) or MONTHS.get(name[:3].lower())
        day, year = match["day"] or match["day2"], match["year"] or match["year2"]
        return ((int(day), month, int(year)), "dmy") if month else (None, "")
    order = "ymd" if len(match["first"]) == 4 or match["separator"].strip() in ("年", "년") else ""
    return (int(match["first"]), int(match["middle"]), int(match["last"])), order


def moments(stamps: Sequence[Stamp | None]) -> list[datetime | None]:
    """Return the times of a file's timestamps. All those with an unknown order of day, month and year share one order.

    That order has no invalid dates, and the fewest steps back in time. A timestamp without a date becomes a time on the
    first day of the calendar.

    Raises:
        ValueError: every order has an invalid date; the argument is the index of a timestamp.
    """
    american = all(stamp.half for stamp in stamps if stamp and stamp.date and not stamp.order)
    best: list[datetime | None] | None = None
    fewest, reached = len(stamps) + 1, 0
    for order in ("mdy", "dmy", "ymd") if american else ("dmy", "mdy", "ymd"):
        times = []
        for place, stamp in enumerate(stamps):
            try:
                times.append(stamp and moment(stamp, stamp.order or order))
            except ValueError:  # a thirteenth month
                reached = max(reached, place)
                break
        known = [time for time in times if time]
        backwards = sum(earlier - later > timedelta(days=1) for earlier, later in pairwise(known))
        if len(times) == len(stamps) and backwards < fewest:
            best, fewest = times, backwards
        if all(stamp is None or stamp.order or not stamp.date for stamp in stamps):
            break
    if best is None:
        raise ValueError(reached)
    return best


def moment(stamp: Stamp, order: str) -> datetime:
    """Return the time of a timestamp whose date has day, month and year in `order`, such as "dmy".

    Raises:
        ValueError: the date does not exist.
    """
    if stamp.date is None:
        return datetime(1, 1, 1) + (stamp.clock or timedelta())
    date = dict(zip(order, stamp.date, strict=True))
    year = date["y"] + 2000 if date["y"] < 100 else date["y"]
    return datetime(year, date["m"], date["d"]) + (stamp.clock or timedelta())


def read_time(value: Any) -> Stamp | datetime | None:
    """Return the time in a JSON value or a cell: (milli- or micro)seconds since 1970, an ISO date, or a timestamp."""
    if isinstance(value, str):
        value = value.strip()
        try:
            return datetime.fromisoformat(value).replace(tzinfo=None) if not value.isdigit() else read_time(int(value))
        except ValueError:
            pass
        try:
            return read_time(float(value))
        except ValueError:
            return parse_stamp(ODD.sub(lambda odd: REWRITTEN[odd.lastgroup or ""].format(*odd.groups()), value))
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e18:
        return None
    while value > 1e11:  # milliseconds, microseconds
        value /= 1000
    return datetime.fromtimestamp(value, timezone.utc).replace(tzinfo=None)


def read_times(values: Sequence[Any]) -> list[datetime | None]:
    """Return the times of several such values; all None if a date is invalid in every order."""
    found = [read_time(value) for value in values]
    try:
        times = iter(moments([value for value in found if isinstance(value, Stamp)]))
    except ValueError:
        return [None] * len(found)
    return [next(times) if isinstance(value, Stamp) else value for value in found]
