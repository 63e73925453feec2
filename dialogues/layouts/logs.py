"""Chat exports, logs and transcripts: lines with times, in many layouts."""

import re
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta
from itertools import pairwise
from typing import NamedTuple

from dialogues.layouts.account import Account
from dialogues.layouts.messages import Message, without_numbers
from dialogues.layouts.notices import MARKS, is_notice, is_system_line, strip_marks
from dialogues.layouts.records import FormatError, make_turn
from dialogues.layouts.shapes import FOOTERS, HEADING, RULE, read_name
from dialogues.layouts.shapes import KINDS as UNTIMED
from dialogues.layouts.stamps import Stamp, moments, parse_stamp
from dialogues.layouts.timed import EDITS, Line, Timed, find_timed, read_day, without_copies

KINDS = {
    "angle": UNTIMED["angle"],
    "from": re.compile(
        r"\s*(?:From\s+|Von\s+|De\s+)(?P<name>.{1,60}?)\s+(?:to|an|à|a|para)\s+.{1,60}?\s?:\s*(?P<text>.*)$"
    ),
    "tab": re.compile(r"(?P<name>[^\t\n]{1,60}?)\s?\t\s*(?P<text>.*)$"),
    "bracket": re.compile(r"\[(?P<name>[^\[\]\n]{1,60})\]:?\s(?P<text>.*)$"),
    "paren": re.compile(r"\((?P<name>[^()\n]{1,40})\)\s?:?\s+(?P<text>.*)$"),
    "bold": UNTIMED["bold"],
    "voice": UNTIMED["voice"],
    "bar": re.compile(r"(?P<name>[^\s|][^|\n]{0,40}?)\s*\|\s(?P<text>.*)$"),
    "space": re.compile(r"(?P<name>\S{1,30})\s(?P<text>.*)$"),
    "colon": re.compile(r"(?P<name>[^:：\n]{1,100}?)\s?[:：](?!//)\s?(?P<text>.*)$"),
    "arrow": re.compile(r"(?P<name>[^\s>][^>\n]{0,40}?)>\s(?P<text>.*)$"),
}
NO_NAMES = {"-->", "<--", "--", "***", "*", "-!-", "=-=", "!", "-", "→", "←", "•", ">>", "<<", "system"}
BEGINNING = timedelta(minutes=6)
LEVELS = re.compile(
    r"\W?(?:[^\[\]]{0,40}/)?(?:INFO|WARN(?:ING)?|ERROR|DEBUG|TRACE|FATAL|NOTICE|CRITICAL)\b"
    r"|[\w.-]{1,60} [\w./-]{1,60}\[\d+\]: "
)  # lines of a program log
LOG_MARKS = re.compile(
    r"[*=-]*\s*(?:BEGIN LOGGING|ENDING LOGGING|Log (?:opened|closed)|Day changed|Session \w+:)", re.IGNORECASE
)
ATTACHED = re.compile(
    r"(?:^|\n)\s*(?:\{(?:Attachments|Reactions|Embed|Stickers|Inline Emojis?)\}|Tapbacks:)\s*\n.*", re.DOTALL
)  # Discord, imessage-exporter
EDITED = re.compile(r"(?:^|\n)\s*Edited [^\n:]{1,60} later: ")  # between the versions of a message (imessage-exporter)
SOUND = re.compile(r"\s*(?:-\s*)?(?:\[[^\[\]]*\]|\([^()]*\)|[♪♫].*)\s*$")  # [music] in captions
BARE_MEDIA = frozenset(("Photo", "Video", "Emoticons", "Sticker", "Voice Note", "Voice message"))  # KakaoTalk
TAG = re.compile(r"</?(?:v|b|i|u|c|lang|font)(?:[ .][^<>\n]{0,60})?>")  # markup in captions
TITLE = re.compile(r"\s*(?:#|([=~*-])\1\1)")  # marks before a heading
HEADER = 12  # maximum number of header lines before the first timestamp


class Entry(NamedTuple):
    """A message as it occurs in the file; a notice has no name."""

    number: int
    stamp: Stamp | None
    name: str | None
    texts: list[str]
    known: bool = False  # whether it is certainly a notice if it has no name
    media: bool = False  # whether its program writes these words instead of media


def find_kind(rests: list[str]) -> str:
    """Return the way in which names follow timestamps: a key of `KINDS`, "bare" for a name alone, or "none"."""
    said = [rest for rest in rests if rest and not is_system_line(rest)] or [rest for rest in rests if rest]
    if not said:
        return "none"
    matched = {kind: sum(1 for rest in said if pattern.match(rest)) for kind, pattern in KINDS.items()}
    if matched["angle"] > 0.3 * len(said):  # the other lines come from the server
        return "angle"
    for kind in ("voice", "from", "tab", "bracket", "paren", "bold", "bar"):
        if matched[kind] > 0.6 * len(said):
            return kind
    names = Counter(EDITS.sub("", rest).strip() for rest in said)
    recurring = sum(count for count in names.values() if count > 1)
    ends = matched["colon"] < 0.8 * len(said) or all(rest.endswith(":") for rest in said)
    if ends and recurring > 0.6 * len(said) and len(names) < 0.5 * len(said) + 2:
        return "bare"
    if matched["colon"] < 0.3 * len(said) and matched["arrow"] > 0.6 * len(said):
        return "arrow"
    words = Counter(rest.split()[0] for rest in said)
    if matched["colon"] < 0.3 * len(said) and len(words) < 0.2 * len(said) + 3 and min(words.values()) > 1:
        return "space"
    return "colon"


def messages_of_log(lines: Sequence[Line], account: Account) -> list[Message] | None:
    """Return the messages of a file whose lines carry times; None for other files.

    Raises:
        FormatError: a date is invalid in every order of day, month and year.
    """
    copied = sum(len(line.text) for line in lines)
    lines = without_copies(lines)
    account.markup += copied - sum(len(line.text) for line in lines)
    found = find_timed(lines)
    if found is None:
        return None
    where, timed = found
    entries = collect(lines, timed, where, account)
    if entries is None:
        return None
    try:
        times = moments([entry.stamp for entry in entries])
    except ValueError as error:
        number = entries[error.args[0]].number
        raise FormatError(
            f"line {number}: no order of day, month and year fits this date and the earlier ones; correct it"
        ) from None
    if is_recording([entry.stamp for entry in entries]):
        times = [None] * len(entries)
    names = Counter(entry.name for entry in entries if entry.name)
    plain_names = without_numbers(set(names))
    entries = [entry._replace(name=plain_names.get(entry.name or "", entry.name)) for entry in entries]
    return [make_message(entry, time, names, account) for entry, time in zip(entries, times, strict=True)]


def is_recording(stamps: Sequence[Stamp | None]) -> bool:
    """Whether the times are relative to the start of a recording, in which silence does not separate dialogues."""
    clocks = [stamp.clock for stamp in stamps if stamp and stamp.clock is not None]
    if not clocks or any(stamp.date for stamp in stamps if stamp):
        return False
    if any(stamp.elapsed for stamp in stamps if stamp):
        return True
    return clocks[0] < BEGINNING and all(before <= after for before, after in pairwise(clocks))


def collect(lines: Sequence[Line], timed: dict[int, Timed], where: str, account: Account) -> list[Entry] | None:
    """Return the messages, each with its timestamp, name and texts; None if no names are found."""
    stacked = where == "first" and sum(bool(line.rest) for line in timed.values()) <= 0.2 * len(timed)
    if sum(1 for line in timed.values() if LEVELS.match(line.rest)) > 0.5 * len(timed):
        return None
    kind = "second" if where == "second" else "none" if stacked else find_kind([line.rest for line in timed.values()])
    heads = find_heads(lines, timed) if kind == "none" else {}
    if kind == "none" and not heads:
        return None
    # A time between a name and its text is that of an edited message's first version.
    timed = {place: line for place, line in timed.items() if not (line.rest and place - 1 in heads)}
    names = find_names(timed, kind) if kind != "none" else set()
    entries: list[Entry] = []
    kakao = any("KakaoTalk" in line.text or "카카오톡" in line.text for line in lines[:5])
    dated = next(iter(timed.values())).signature[1] == "date"
    titles = find_titles(lines, timed, dated) if kind not in ("none", "bare") else set()
    people = {head[0] for head in heads.values() if head[1]}
    day: tuple[tuple[int, int, int], str] | None = None
    for place, (number, text) in enumerate(lines):
        line = timed.get(place)
        if place in heads and (name := heads[place][0]) is not None and line is None:
            stamp = heads[place][2]
            entries.append(Entry(number, with_day(stamp, day), name, [heads[place][1]]))
            account.markup += len(text) - len(heads[place][1])
        elif line is not None and kind == "none":
            account.markup += len(text) - len(line.rest)
            if is_system_line(line.rest):
                account.markup += len(line.rest)
            elif line.rest:
                account.lose(f"line {number}: {text[:40]!r}", len(line.rest))
        elif line is not None:
            name, said = read_rest(line, kind, names)
            stamp = with_day(parse_stamp(line.stamp), day)
            known = kind in ("angle", "voice", "from", "tab", "bar") or not entries
            entries.append(Entry(number, stamp, name, [said], known, kakao and said in BARE_MEDIA))
            account.markup += len(text) - len(said)
        elif (
            not is_cue(lines, place, timed)
            and (found := read_day(text))
            and (not dated or begins_day(place, found[0], timed, entries))
        ):
            day = found
            account.markup += len(text)
        elif place in titles or is_separator(lines, place, timed):
            account.markup += len(text)
        elif kind == "none" and (head := read_inner(text, people)):  # a second speaker in a caption
            entries.append(entries[-1]._replace(number=number, name=head[0], texts=[head[1]]))
            account.markup += len(text) - len(head[1])
        elif kind == "none" and SOUND.match(text):
            account.markup += len(text)
        elif entries:
            entries[-1].texts.append(text.strip(MARKS) if not text.strip(MARKS + " ") else text)
        elif text.strip(MARKS + " "):
            skip_header(number, text, account)
    if any("-->" in lines[place].text for place in timed):
        entries = [entry._replace(texts=[TAG.sub("", text) for text in entry.texts]) for entry in entries]
    return entries


def skip_header(number: int, text: str, account: Account) -> None:
    """Count a line before the first message; the first few lines may be a header."""
    if number <= HEADER and len(text) < 200:
        account.markup += len(text)
    else:
        account.lose(f"line {number}: {text[:40]!r}", len(text))


def read_inner(text: str, people: set[str]) -> tuple[str, str] | None:
    """Return the name and the text of a line that begins with the name of a known speaker; None for other lines."""
    for kind in ("numbered", "colon"):
        if (match := UNTIMED[kind].match(text.strip())) and read_name(match) in people:
            return read_name(match) or "", match["text"] or ""
    return None


def begins_day(place: int, date: tuple[int, int, int], timed: dict[int, Timed], entries: list[Entry]) -> bool:
    """Whether a date in a chat with dated messages is a heading: the message below is the first one of that day."""
    below = timed.get(place + 1) or timed.get(place + 2)
    stamp = parse_stamp(below.stamp) if below else None
    if stamp is None or stamp.date is None or {each % 100 for each in stamp.date} != {each % 100 for each in date}:
        return False
    return not entries or entries[-1].stamp is None or entries[-1].stamp.date != stamp.date


def find_titles(lines: Sequence[Line], timed: dict[int, Timed], dated: bool) -> set[int]:
    """Find headings above messages: they follow a blank line and all look alike, such as `## Wednesday`.

    In a chat with dated messages, which needs no headings, lines without a heading's marks belong to a message.
    """
    found: list[list[int]] = []
    for place, line in enumerate(lines):
        if not line.text.strip(MARKS + " ") and place + 1 not in timed:
            at = next((at for at in range(place + 1, min(place + 9, len(lines))) if at in timed), None)
            if at is not None:
                found.append([each for each in range(place + 1, at) if lines[each].text.strip()])
    looks = Counter(tuple(look_of(lines[each].text) for each in places) for places in found)
    alike = {
        look for look, count in looks.items() if look and count > 1 and (count > 0.6 * len(found) or look[0][:1] == "#")
    }
    return {
        each
        for places in found
        for each in places
        if tuple(look_of(lines[each].text) for each in places) in alike
        and (not dated or TITLE.match(lines[each].text) or HEADING.match(lines[each].text))
    }


def look_of(text: str) -> str:
    """Reduce each word and each number to one letter, so that lines of the same kind become equal."""
    return re.sub(r"\d+", "0", re.sub(r"[^\W\d]+", "a", text.strip()))


def is_separator(lines: Sequence[Line], place: int, timed: dict[int, Timed]) -> bool:
    """Whether a line without a timestamp is not part of a message: a rule, a cue number, a footer."""
    text = lines[place].text.strip(MARKS + " ")
    if not text:
        return False
    if RULE.match(text) or LOG_MARKS.match(text) or (place >= len(lines) - 6 and FOOTERS.match(text)):
        return True
    if (
        text.startswith("NOTE ")
        and not lines[place - 1].text.strip()
        and "-->" in "".join(line.text for line in lines[place + 1 : place + 4])
    ):
        return True
    return is_cue(lines, place, timed) and (text.isdigit() or not place or not lines[place - 1].text.strip())


def is_cue(lines: Sequence[Line], place: int, timed: dict[int, Timed]) -> bool:
    """Whether the next line contains the times of a caption."""
    return place + 1 in timed and "-->" in lines[place + 1].text


def with_day(stamp: Stamp | None, day: tuple[tuple[int, int, int], str] | None) -> Stamp | None:
    if stamp is None or stamp.date or day is None:
        return stamp
    return stamp._replace(date=day[0], order=day[1])


def find_names(timed: dict[int, Timed], kind: str) -> set[str]:
    """Return the names that recur where turns begin."""
    if kind in ("second", "bare"):
        counts = Counter(
            line.before if kind == "second" else EDITS.sub("", line.rest).strip() for line in timed.values()
        )
    else:
        matches = (KINDS[kind].match(line.rest) for line in timed.values())
        counts = Counter(clean_name(match["name"]) for match in matches if match)
    return {name for name, count in counts.items() if count > 1}


def clean_name(name: str) -> str:
    return name.strip(MARKS + "~ \t").strip()


def read_rest(line: Timed, kind: str, names: set[str]) -> tuple[str | None, str]:
    """Return the name (None for a notice) and the text of a line with a timestamp."""
    if kind == "second":
        return line.before, line.rest
    if kind == "bare":
        name = EDITS.sub("", line.rest).strip().rstrip(":")
        return (name, "") if name and (name in names or len(name) < 40) else (None, line.rest)
    match = KINDS[kind].match(line.rest)
    if not match:
        return None, line.rest
    name = clean_name(match["name"])
    if not name or name in NO_NAMES or is_open(name) or (name not in names and not is_plausible(name, line.rest)):
        return None, line.rest
    return name, match["text"]


def is_plausible(name: str, rest: str) -> bool:
    """Whether words that occur only once before a colon can be a name instead of a notice."""
    return not is_system_line(rest) and len(name.split()) < 7


def is_open(name: str) -> bool:
    """Whether a quotation opens before the colon and closes after it, so that the words before it are not a name."""
    if name.count('"') % 2 or any(name.count(left) != name.count(right) for left, right in ("«»", "「」", "『』")):
        return True
    low, high, closed = (name.count(mark) for mark in "„“”")
    return low not in (high, closed) if low else high != closed


def find_heads(lines: Sequence[Line], timed: dict[int, Timed]) -> dict[int, tuple[str, str, Stamp | None]]:
    """For timestamps on separate lines, map the position of each name to the name, its text and its timestamp.

    The name is in `Name: text` below the timestamp (captions), or on a separate line below or above it.
    """
    below: dict[int, tuple[str, Stamp | None]] = {}
    for place, line in timed.items():
        following = next((at for at in range(place + 1, min(place + 3, len(lines))) if lines[at].text.strip()), None)
        if following is not None and following not in timed and not line.rest:
            below[following] = (lines[following].text.strip(), parse_stamp(line.stamp))
    for kind in ("voice", "numbered", "colon", "angle", "bracket", "bold"):
        matches = {place: UNTIMED[kind].match(text) for place, (text, _) in below.items()}
        found = {
            place: (name, match["text"] or "", below[place][1])
            for place, match in matches.items()
            if match and (name := read_name(match))
        }
        counts = Counter(name for name, _, _ in found.values())
        if sum(counts[name] > 1 for name, _, _ in found.values()) > 0.4 * len(below):
            once = kind == "voice" or len(found) > 0.8 * len(below)  # then also accept names that occur once
            heads = {place: head for place, head in found.items() if once or counts[head[0]] > 1}
            return heads | find_more_heads(lines, timed, kind, heads)
    counts = Counter(text for text, _ in below.values())
    if sum(counts[text] > 1 for text, _ in below.values()) > 0.8 * len(below) and len(counts) < 0.5 * len(below) + 2:
        return {place: (text, "", stamp) for place, (text, stamp) in below.items()}
    above = {
        place - 1: (lines[place - 1].text.strip(), "", parse_stamp(line.stamp))
        for place, line in timed.items()
        if place and lines[place - 1].text.strip()
    }
    counts = Counter(name for name, _, _ in above.values())
    if above and sum(counts[name] > 1 for name, _, _ in above.values()) > 0.8 * len(timed):
        return above
    return {}


def find_more_heads(
    lines: Sequence[Line], timed: dict[int, Timed], kind: str, heads: dict[int, tuple[str, str, Stamp | None]]
) -> dict[int, tuple[str, str, Stamp | None]]:
    """Find the other lines below a timestamp on which one of these people begins to speak."""
    names, found, stamp = {name for name, _, _ in heads.values()}, {}, None
    for place, line in enumerate(lines):
        if place in timed:
            stamp = parse_stamp(timed[place].stamp)
            continue
        match = UNTIMED[kind].match(line.text.strip()) if stamp and place not in heads else None
        if match and (name := read_name(match)) in names:
            found[place] = (name, match["text"] or "", stamp)
    return found


def make_message(entry: Entry, time: datetime | None, names: Counter[str], account: Account) -> Message:
    """Return the message of an entry, or the reason to skip it."""
    whole = "\n".join(entry.texts)
    text = EDITED.split(ATTACHED.sub("", whole))[-1]
    account.markup += len(whole) - len(text)
    if len(entry.texts) > 1 and text[:1] == text[-1:] == '"':  # LINE puts quotes around messages of several lines
        text = text[1:-1].replace('""', '"')
    if entry.name is None:
        known = is_system_line(text) or any(name and name in text for name, _ in names.most_common(20))
        if known or entry.known:
            account.markup += len(text)
        else:
            account.lose(f"line {entry.number}: {text[:40]!r}", len(text))
        return Message(None, "system lines", time)
    if entry.media or text.startswith("\u200e") or is_notice(text):
        account.markup += len(text)
        return Message(None, "media and notices", time)
    bare = strip_marks(text)
    if not bare:
        return Message(None, "messages without text", time)
    account.spoken += len(bare)
    account.markup += max(len(text) - len(bare), 0)
    return Message(make_turn(entry.name, bare, f"line {entry.number}"), "", time)
