"""Recognise notices, the lines that chat programs write instead of messages, in many languages.

All functions take linear time: regular expressions see at most `LONGEST` characters, and their repetitions are bounded.
"""

import re
import unicodedata
from functools import cache
from typing import NamedTuple

from dialogues.layouts import phrases, system_phrases

LEFT_TO_RIGHT = "\u200e"  # WhatsApp on iOS puts this before all its own text
MARKS = "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff"  # direction marks added by phones
BLANKS = MARKS + " \t\r\n\u00a0\u202f"
PLAIN = str.maketrans({**dict.fromkeys(MARKS), **dict.fromkeys("\u00a0\u202f", " "), "’": "'", "‹": "<", "›": ">"})
FULL_STOPS = " .。।۔"
LONGEST = 3000  # maximum characters in a poll: a question of 255, twelve options of 100, and their votes
MOST_FILES = 20  # maximum files in a message
LONGEST_LINE = 400  # maximum characters in a file name (255) and the words around it

FILE = r"[^\n]{1,255}\.\w{2,5}"
BYTES = r"\d{1,6}(?:[.,]\d{1,3})? ?(?:[kmg]i?b|[кмг]б|bytes?)"
PAGES = r"\d{1,5} [^\d\n]{1,12}"
CLOCK = r"\d{1,2}(?::\d{2}){1,2}"


def either(*families: tuple[str, ...]) -> str:
    """Return a regular-expression group with all alternatives of these families."""
    return f"(?:{'|'.join(piece for family in families for piece in family)})"


def split(family: tuple[str, ...]) -> tuple[str, ...]:
    """Return all phrases of a plain-text family."""
    return tuple(phrase for piece in family for phrase in piece.split("|"))


KIND, OMITTED, CALL, UNIT = map(either, (phrases.KINDS, phrases.OMITTED, phrases.CALLS, phrases.UNITS))
LASTED = rf"(?:{CLOCK}|\d{{1,3}} ?{UNIT}(?: ?\d{{1,2}} ?{UNIT})?)"  # 3:12, 3 min, 1 hr 5 min
CALL_END, TIMED_CALL = either(phrases.CALL_ENDS), either(phrases.TIMED_CALLS)
MAP = (
    r"https?://(?:maps\.google\.[a-z.]{2,6}/|www\.google\.[a-z.]{2,6}/maps|goo\.gl/maps|maps\.app\.goo\.gl/"
    r"|maps\.apple\.com/)\S{0,300}"
)
SOMEBODY = re.compile(rf"{either(phrases.PRONOUNS)}\b")
DEED = either(phrases.NAMED_DEEDS)
NAMED_DEED = re.compile(rf"(?:\S{{1,30}} ){{1,3}}{DEED}")
POLL = re.compile(rf"{either(phrases.POLL)} ?[:：]")
OPTION = re.compile(rf"{either(phrases.OPTION)} ?[:：]")
ATTACHED = re.compile(either(phrases.ATTACHED))
FILE_NAME = re.compile(rf"{FILE}(?: ?[•·] ?(?:{PAGES}|{BYTES})){{0,2}}")
COPIED_FILE = re.compile(  # imessage-exporter's paths
    rf"(?:(?:~|/[^\n]{{1,150}})/library/(?:messages|sms)/)?attachments/{FILE}"
)
WHATSAPP_FILE = re.compile(r"(?:img|vid|ptt|aud|doc|stk)-\d{8}-wa\d{4}\.\w{2,5}")
OMITTED_MARK = re.compile(rf"<? ?{OMITTED} ?>?")
ATTACHED_MARK = re.compile(
    rf"<[^<>:\n]{{1,25}}[:：] ?\d{{4,8}}-{FILE}>"
)  # <attached: 00000012-PHOTO.jpg>, in any language
EDITED_MARK = re.compile(rf"<{either(phrases.EDITED)}[.。।]?>")
STARTS, ENDS = split(system_phrases.STARTS), split(system_phrases.ENDS)
PART = re.compile("|".join(map(re.escape, split(system_phrases.PARTS))))
# irssi and WeeChat (-!-, -->, <--), XChat and mIRC (***).
LOG_MARK = re.compile(r"(?:-!-|\*{3}|-->|<--|←|→|---) ?[^\s*-]")
LOG_DEED = re.compile(
    r"(?:\* )?(?:(?:joins|parts|quits): |[^\s:]{1,40}(?: [\[(][^\])\n]{1,100}[\])])? "
    r"(?:\(?(?:has )?(?:joined|left|quit)\)?(?: ?[#&(\[]|$)|is now known as |sets? mode|was kicked|has kicked "
    r"|(?:has )?(?:changed|changes|set) (?:the )?topic))"
)


class Stripped(NamedTuple):
    """A text without markers, and whether it had the marker of a file or of an edit."""

    text: str
    file: bool
    edited: bool


def plain(text: str) -> str:
    """Normalise a short text like the phrases: lower case, NFC, without direction marks or a final full stop."""
    return unicodedata.normalize("NFC", text.translate(PLAIN)).lower().strip().rstrip(FULL_STOPS)


SIGTOP = re.compile(r"\[(?:\d+ attachments?|[\w-]+ (?:message|notification))\]")  # Signal, exported by sigtop


def is_notice(text: str) -> bool:
    """Whether a message's text, without the name, is only a notice from the program. An empty text is not.

    A text that begins with U+200E is always a notice, unless it is the caption of a file or was edited.
    """
    stripped = strip(text)
    if not stripped.text:
        return stripped.file or stripped.edited
    if stripped.file and len(stripped.text) <= LONGEST_LINE and FILE_NAME.fullmatch(plain(stripped.text)):
        return True
    if text.lstrip(" ").startswith(LEFT_TO_RIGHT) and not stripped.file and not stripped.edited:
        return True
    if len(stripped.text) > LONGEST:
        return False
    if SIGTOP.fullmatch(stripped.text) or stripped.text.startswith(("<?xml ", "<msg>")):  # WeChat's images
        return True
    bare = plain(stripped.text)
    return notice_pattern().fullmatch(bare) is not None or is_poll(bare) or is_named_deed(stripped.text)


@cache
def notice_pattern() -> re.Pattern[str]:
    """Return the pattern of notices in `plain` text; compiled on first use, because compiling takes 40 ms."""
    return re.compile(
        "|".join(
            (
                either(phrases.DELETED, phrases.LIVE_LOCATION, phrases.NOT_SHOWN, phrases.BARE, phrases.DEEDS),
                OMITTED,
                rf"{either(phrases.MISSED)}(?:[,.]? ?[^\n\d]{{0,9}}{CLOCK}(?: ?[ap]\.?m)?)?(?:[,.] ?{CALL_END})?",
                rf"(?:☎\ufe0f? ?(?:{CALL}|{TIMED_CALL})|{TIMED_CALL}) ?{CLOCK}|☎\ufe0f? ?{either(phrases.MISSED)}",
                rf"{CALL}(?:[,.·–-] ?(?:{LASTED}|{CALL_END})| ?\({LASTED}\))(?:[,.·] ?\d[^\n]{{0,30}})?",
                rf"(?:{either(phrases.LOCATION)} ?[:：] ?)?{MAP}|[^:]{{1,100}}\([^:]{{1,150}}\): https://foursquare\.com/\S{{1,200}}",
                rf"\[ ?{KIND}(?: ?[:：,] ?[^\]\n]{{1,200}})? ?\](?: ?{FILE}| ?{CLOCK})?",
                rf"[📷📸🎥📹🎤🎙🎵📄📍👤🎬🖼📎🎞🏷💬📊]\ufe0f? ?{KIND}(?: ?\({CLOCK}\)| {CLOCK})?",
                rf"{KIND}\nnot included, change data exporting settings to download[^\n]{{0,100}}(?:\n[^\n]{{0,100}})?",
                rf"{FILE}(?: ?[•·] ?(?:{PAGES}|{BYTES})){{1,2}}|{FILE} ?(?:[–-] ?{BYTES}|\({BYTES}\))|{FILE} {OMITTED}",
            )
        )
    )


def is_poll(bare: str) -> bool:
    """Whether a text normalised by `plain` is a WhatsApp poll: its title, the question, and a line for each option."""
    return POLL.match(bare) is not None and any(OPTION.match(line.strip()) for line in bare.split("\n"))


def is_named_deed(text: str) -> bool:
    """Whether a text is a program's report of a named person's action."""
    if len(text) > LONGEST_LINE or text[:1].islower():
        return False
    lower = text.translate(PLAIN).lower()
    return NAMED_DEED.fullmatch(lower) is not None and not SOMEBODY.match(lower)


def is_deed_of(name: str, text: str) -> bool:
    """Whether a text is a program's report of an action by the person with this name."""
    deed = text.removeprefix(f"{name} ")
    return deed != text and re.fullmatch(DEED, deed.translate(PLAIN).lower()) is not None


def strip_marks(text: str) -> str:
    """Return a text without edit markers, lines for attached files, and direction marks at its ends or in mentions.

    Other notices are kept; see `is_notice`.
    """
    text = strip(text).text
    return text.replace("\u2068", "").replace("\u2069", "") if "\u2068" in text else text


def strip(text: str) -> Stripped:
    """Remove the markers of files and of edits from both ends."""
    text, file, edited = text.strip(BLANKS), False, False
    for _ in range(MOST_FILES):
        end = text.find("\n", 0, LONGEST_LINE)
        head = text[:end] if end >= 0 else text[: LONGEST_LINE + 1]
        if not is_file(head):
            break
        text, file = text[len(head) :].strip(BLANKS), True
    for _ in range(3):  # markers of a file and of an edit, from iOS and Android
        tail, rest = split_tail(text)
        if not tail:
            break
        bare = plain(tail)
        if EDITED_MARK.fullmatch(bare):
            edited = True
        elif ATTACHED_MARK.fullmatch(bare) or OMITTED_MARK.fullmatch(bare):
            file = True
        else:
            break
        text = rest.rstrip(BLANKS)
    return Stripped(text, file, edited)


def split_tail(text: str) -> tuple[str, str]:
    """Split off the end of a text that may be a marker (<...>, or all after U+200E); it is empty if there is none."""
    sign = "<" if text.endswith(">") else LEFT_TO_RIGHT
    start = text.rfind(sign, max(0, len(text) - LONGEST_LINE))
    return (text[start:], text[:start]) if start >= 0 else ("", text)


def is_file(line: str) -> bool:
    """Whether a first line names a file: `IMG-1.jpg (file attached)`, or <Media omitted>."""
    if len(line) > LONGEST_LINE:
        return False
    bare = plain(line)
    if COPIED_FILE.fullmatch(bare):
        return True
    if bare.startswith("<"):
        return bare.endswith(">") and bool(OMITTED_MARK.fullmatch(bare) or ATTACHED_MARK.fullmatch(bare))
    name, _, words = bare.removesuffix(")").rpartition(" (")
    if not bare.endswith(")") or not name:
        return False
    attached = ATTACHED.fullmatch(words) and re.fullmatch(FILE, name)
    return bool(attached or WHATSAPP_FILE.fullmatch(name))


def is_system_line(text: str) -> bool:
    """Whether a line without a name is about the chat itself, such as a join; `text` is the line after the timestamp.

    If the line has a colon, only the part before the first one is searched for such phrases.
    """
    if len(text) > LONGEST:
        return False
    bare = plain(text.strip(BLANKS))
    if LOG_MARK.match(bare) or bare.startswith(STARTS):
        return True
    if SOMEBODY.match(bare):
        return False
    if LOG_DEED.match(bare):
        return True
    if bare.startswith("* "):  # an action that a person typed
        return False
    head, colon, _ = bare.partition(":")
    if PART.search(head) or (not colon and head.endswith(ENDS)):
        return True
    return ": " not in bare and is_notice(bare)
