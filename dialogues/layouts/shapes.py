"""Find the kind of line by which a text names its speakers, and the names in these lines."""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import NamedTuple
from unicodedata import category

from dialogues.layouts.stamps import parse_stamp
from dialogues.layouts.words import ROLES, SYSTEM, has_sentences, plain

CODE = "\0"  # begins a line of code
CUT = "\0cut"  # a line between dialogues, inserted by a reader
RULE = re.compile(r"\s*([-=_*~#•·])\1{2,}\s*$|\s*[%§]\s*$|\s*(?:[-=_*~#] ){2,}[-=_*~#]\s*$")
END_MARKS = re.compile(r"<\|(?:start|end)oftext\|>")
HEADING = re.compile(
    r"(?P<mark>[=~#*-])(?P=mark)+\s?[^=~\n]{1,60}\s?(?P=mark){2,}\s*$|[\W_]*(?:(?:dialog(?:ue)?|conversation|chat|scene|episode|example|sample|session|transcript|part|story|gespräch|szene"
    r"|unterhaltung|diálogo|conversación|conversa|escena|scène|act|topic)s?\s*(?:n[o°]\.?\s*|#\s*)?(?:\d{1,6}|[ivxlc]{1,6})\b"
    r"[^\n]{0,60}|(?:first|second|third|(?:four|fif|six|seven|eigh|nin|ten)th|\d{1,4}(?:st|nd|rd|th)|next|new)"
    r" (?:dialog(?:ue)?|conversation|chat|scene|example))[\W_]*$",
    re.IGNORECASE,
)
# Words that begin a line of an answer and are followed by a colon; they are not names.
LABELS = frozenset(
    re.findall(
        r"\S+",
        """participants attendees speakers present recorded recording transcriber duration channel members language
note notes nb ps tip tips example examples warning caution hint step option part day ingredients instructions
directions method summary title subject re fwd date time location place address price total result results
output code http https ftp file source sources reference references edit update conclusion solution pros cons
important remember reminder question answer problem explanation reason steps preparation serves servings
introduction overview background definition chapter week phase section goal goals cost link links url email
phone tel mailto todo task plan option figure table line item first second third finally todo fact advantages
disadvantages benefits features requirements materials tools hinweis achtung wichtig zutaten schritt beispiel
tipp anmerkung nota importante ejemplo paso ingredientes consejo exemple étape ingrédients remarque conseil
attention esempio passo ingredienti esempio dica exemplo observação voorbeeld stap opmerking let op
info warn error debug trace fatal""",
    )
)
NAME = r"(?P<name>(?:[^\W_]|[@+#~$&(]|[^\x00-\x7f\s])[^:：\n]{0,60}?)"
ODD = r"(?!//)(?<!\d:(?=\d))"  # not a URL, not a time of day
KINDS = {
    "angle": re.compile(r"<\s?[@+%&~!. ]?(?P<name>(?![|/])[^<>\n]{1,60}?)>:?\s*(?P<text>.*)$"),
    "voice": re.compile(r"<v(?:\.\w+)?\s(?P<name>[^<>\n]{1,60})>(?P<text>.*?)(?:</v>)?$"),
    "bold": re.compile(
        r"(?:[-*•>]\s+|\d{1,5}[.)]\s+)?(?P<mark>\*\*|__|\*|_)(?P<name>[^*_\n:：][^*\n:：]{0,60}?)\s?(?::(?P=mark)|(?P=mark)\s?:)\s*(?P<text>.*)$"
    ),
    "hash": re.compile(r"(?:\#{1,6}\s+(?P<name>[^:\n#]{1,60}):|\#(?P<name2>[^:\n#]{1,60})\#\s?:)\s*(?P<text>.*)$"),
    "bracket": re.compile(r"\[(?P<name>[^\[\]\n]{1,60})\]\s?:?\s*(?P<text>.*)$"),
    "numbered": re.compile(rf"(?:\(?\d{{1,5}}[.):]|>{{1,3}}|[-*•–—+])\s+{NAME}\s?[:：]{ODD}(?:\s+(?P<text>.*))?$"),
    "colon": re.compile(rf"{NAME}\s?(?::(?=\s|$)|：){ODD}\s*(?P<text>.*)$"),
    "tight": re.compile(rf"{NAME}\s?[:：]{ODD}\s*(?P<text>.*)$"),
    "heading": re.compile(r"(?:\#{1,6}\s+(?P<name>[^\n#]{1,60}?)|_?\*\*(?P<name2>[^*\n]{1,60})\*\*_?)\s*:?(?P<text>)$"),
    "tab": re.compile(r"(?P<name>[^\t\n]{1,40}?)\s?\t\s*(?P<text>.*)$"),
    "arrow": re.compile(r"(?P<name>[^\s>|][^>|\n]{0,40}?)\s?(?:>+|\||»|→|=>)\s+(?P<text>.*)$"),
    "play": re.compile(r"(?P<name>[QA](?=\.\s)|[^\W\d_a-zß-ÿ](?:[^\W\d_a-zß-ÿ]|[' ]){1,40})\.\s+(?P<text>.*)$"),
    "dash": re.compile(r"(?P<name>[^\W\d_][^\n–—-]{0,40}?)\s+[–—-]+\s+(?P<text>.*)$"),
    "bare": re.compile(r"(?P<name>[^\W\d_][^\n.!?,;]{0,40})(?P<text>)$"),
}
STRICT = ("play", "tight", "heading", "tab", "arrow", "dash", "bare")  # kinds that require every name to recur
# A.1 and B.2 in Switchboard, and numbered questions and answers
NUMBERED_NAME = re.compile(r"(?P<name>[A-Z](?=\.)|[QA](?=\d)|(?:Question|Answer|Frage|Antwort)(?=\W?\d))[.\W]?\d{1,5}$")
LEADING_ROLES = re.compile(r"(?P<name>[^\n:]{1,40}?) said:?$")


FOOTERS = re.compile(
    r"exported \d+ message|transcribed (?:by|with)|end of (?:transcript|conversation|chat)|meeting ended"
    r"|this editable transcript|.{1,60} (?:started|stopped) transcription",
    re.IGNORECASE,
)
MOST_FIELDS = 20  # maximum number of fields in a record
SAMPLE = 20_000  # number of lines to look at when choosing the kind of line


class Start(NamedTuple):
    """A line that looks like the start of a turn."""

    place: int  # index of the line
    name: str
    text: str


class Shape(NamedTuple):
    """The kind of line by which a file names its speakers, and the turns found with it."""

    kind: str
    starts: dict[int, Start]
    rejected: list[Start]  # lines that look like the start of a turn, but do not name a speaker

    @property
    def names(self) -> Counter[str]:
        return Counter(start.name for start in self.starts.values())

    @property
    def strength(self) -> int:
        """Return the number of turns of people who speak more than once."""
        return sum(count for count in self.names.values() if count > 1)


def prepare(lines: Sequence[str]) -> list[tuple[int, str]]:
    """Strip and number the lines; put begin- and end-of-text tokens on separate lines."""
    prepared: list[tuple[int, str]] = []
    fences = [number for number, line in enumerate(lines, 1) if line.lstrip().startswith("```")]
    marks = set(fences[: len(fences) // 2 * 2])  # an unclosed fence would hide all turns after it
    fenced = False
    for number, line in enumerate(lines, 1):
        fence = number in marks
        fenced ^= fence
        if fenced and not fence:  # code keeps its indentation and holds no turns
            prepared.append((number, CODE + line.rstrip()))
            continue
        parts = END_MARKS.split(line) if "<|" in line else [line]
        for part, piece in enumerate(parts):
            if part:
                prepared.append((number, CUT))
            if len(parts) == 1 or piece.strip():
                prepared.append((number, piece.strip()))
    return prepared


def find_shape(lines: list[tuple[int, str]], forced: bool = False) -> Shape | None:
    """Find the kind of line that gives the most turns to people who speak more than once; None if there is none.

    A more specific kind wins if its result is close. Only the beginning of a long file is used.
    """
    sample = lines[:SAMPLE]
    blocks = split_blocks(sample, set())
    shapes = [make_shape(kind, sample, blocks) for kind in KINDS]
    shapes = [
        shape
        for shape in shapes
        if shape.strength or (shape.kind != "bracket" and len(shape.names) > (0 if forced else 1))
    ]  # [words] in brackets can also be headings of a settings file
    if not shapes:
        return None
    most = max((shape.strength for shape in shapes if shape.kind not in STRICT), default=0)
    best = max(shape.strength for shape in shapes)
    best = most if most > 0.6 * best else best
    chosen = next(shape for shape in shapes if shape.strength >= 0.95 * best)
    if is_of_fields(chosen, sample) and not forced:
        return None
    return chosen if len(sample) == len(lines) else make_shape(chosen.kind, lines, split_blocks(lines, set()))


def is_of_fields(shape: Shape, lines: list[tuple[int, str]]) -> bool:
    """Whether the words that begin lines are fields of records, or words of a list, rather than names.

    Fields recur in each block in the same order; a list is one block of many words that never recur.
    """
    blocks = [
        [shape.starts[place].name for place in block if place in shape.starts]
        for block in split_blocks(lines, set(shape.starts))
    ]
    named = [named for block in blocks if (named := tuple(name for name in block if plain(name) not in SYSTEM))]
    once = all(len(set(block)) == len(block) for block in named)
    if not once or not named:
        return False
    if not shape.strength and max(map(len, named)) > 3:
        return True
    if len(set(named)) > 1 or not 2 < len(named[0]) <= MOST_FIELDS or len(named) < 2:
        return False
    said = {name: [start.text for start in shape.starts.values() if start.name == name] for name in named[0]}
    return not all(map(has_sentences, said.values()))


def make_shape(kind: str, lines: list[tuple[int, str]], blocks: list[list[int]]) -> Shape:
    """Find the turns of a file by one kind of line."""
    pattern, found = KINDS[kind], []
    for place, (_, line) in enumerate(lines):
        if line and (match := pattern.match(line)) and (name := read_name(match)):
            found.append(Start(place, name, (match["text"] or "").strip()))
    if kind == "bare":
        found = [start for start in found if is_bare(start, lines)]
    people = choose_people(found, lines, kind, blocks)
    starts = {start.place: start for start in found if start.place in people}
    return Shape(kind, starts, [start for start in found if start.place not in people])


def read_name(match: re.Match[str]) -> str | None:
    """Return the name in a matched line; None if it can't be one."""
    groups = match.groupdict()
    name = (groups.get("name") or groups.get("name2") or "").strip()
    if said := LEADING_ROLES.match(name):
        name = said["name"]
    if counted := NUMBERED_NAME.match(name):
        name = counted["name"]
    if (stamp := parse_stamp(name) if any(map(str.isdigit, name)) else None) and (stamp.date or name[:1].isdigit()):
        return None
    return name if has_name(name) and not name.lower().endswith(("http", "https")) else None


def has_name(text: str) -> bool:
    """Whether a text has letters, digits or pictographs; 🐻 can be a name."""
    return any(character.isalnum() or category(character) == "So" for character in text)


def is_bare(start: Start, lines: list[tuple[int, str]]) -> bool:
    """Whether a name on its own line has text below it, and, unless in capitals, a blank line or nothing above it."""
    above = lines[start.place - 1][1] if start.place else ""
    below = lines[start.place + 1][1] if start.place + 1 < len(lines) else ""
    return (above in ("", CUT) and below not in ("", CUT)) or bool(start.name.isupper() and below)


def choose_people(found: list[Start], lines: list[tuple[int, str]], kind: str, blocks: list[list[int]]) -> set[int]:
    """Return the positions of the lines that begin a turn.

    A name counts if it recurs at the beginning of turns; if most turns follow blank lines, so must the turns of this
    name. A name that occurs once counts if its block would otherwise have only one speaker or begin without a speaker.
    """
    counts = Counter(start.name for start in found)
    openings = {start.place for start in found if start.place == 0 or lines[start.place - 1][1] in ("", CUT)}
    recurring = {name for name, count in counts.items() if count > 1 and not is_label(name)}
    if kind in STRICT:
        texts = sum(counts[name] for name in recurring)
        return (
            {start.place for start in found if start.name in recurring}
            if len(recurring) > 1 and texts >= 4 * (len(recurring) - 1) and len(recurring) < 12 + texts / 20
            else set()
        )
    spaced = [start for start in found if start.name in recurring]
    behind_blank = len(spaced) > 3 and sum(start.place in openings for start in spaced) > 0.8 * len(spaced)
    if behind_blank:
        recurring = {
            name
            for name in recurring
            if 2 * sum(start.place in openings for start in found if start.name == name) > counts[name]
        }
    recurring -= find_followers(found, recurring, openings) | find_listed(found, lines)
    people = {
        start.place for start in found if start.name in recurring and not (behind_blank and start.place not in openings)
    }
    return people | find_guests(found, lines, recurring, behind_blank, blocks)


def is_label(name: str) -> bool:
    """Whether a word before a colon is a label inside an answer, such as `Note` or `Step 2`."""
    word = plain(re.sub(r"[\d.]+$", "", name.strip("*_#[]() ")))
    return word in LABELS or not (word or has_name(name))


def find_followers(found: list[Start], recurring: set[str], openings: set[int]) -> set[str]:
    """Find labels inside answers: between a user and an assistant, a name that never begins a block is a label."""
    roles = {name for name in recurring if is_role(name)}
    opening = {start.name for start in found if start.place in openings}
    return recurring - roles - opening if len(roles) > 1 else set()


def find_listed(found: list[Start], lines: list[tuple[int, str]]) -> set[str]:
    """Find names that occur only in a list: below a line that ends with a colon, or below another line of the list."""
    by_place = {start.place: start for start in found}
    listed: set[int] = set()
    for place in sorted(by_place):
        above = by_place.get(place - 1)
        alone = above is not None and not above.text  # a name on a separate line
        if place and (place - 1 in listed or (lines[place - 1][1].endswith((":", "：")) and not alone)):
            listed.add(place)
    return {by_place[place].name for place in listed} - {start.name for start in found if start.place not in listed}


def is_role(name: str) -> bool:
    return plain(name) in ROLES or plain(name) in ("q", "a", "question", "answer", "you", "system")


def find_guests(
    found: list[Start], lines: list[tuple[int, str]], recurring: set[str], behind_blank: bool, blocks: list[list[int]]
) -> set[int]:
    """Find names that occur only once but are still speakers."""
    guests: set[int] = set()
    by_place = {start.place: start for start in found}
    for block in blocks:
        starts = [by_place[place] for place in block if place in by_place]
        if not starts:
            continue
        first = next(place for place in block if lines[place][1])
        names = {start.name for start in starts if start.name in recurring}
        if (
            not behind_blank
            and starts[0].place == first
            and starts[0].name not in recurring
            and not is_label(starts[0].name)
        ):
            guests.add(first)
            names.add(starts[0].name)
        others = [start for start in starts if start.name not in recurring and not is_label(start.name)]
        if len(names) < 2 and not behind_blank and len({start.name for start in others} | names) < 3:
            guests |= {start.place for start in others}
    return guests


def split_blocks(lines: list[tuple[int, str]], starts: set[int]) -> list[list[int]]:
    """Return the line positions of each dialogue, as separated by tokens, headings, rules or else blank lines."""
    places = range(len(lines))
    marked = {place for place in places if lines[place][1] == CUT}
    filled = [place for place in places if lines[place][1]]
    headings = find_headings(lines) - starts
    rules = {place for place in filled if RULE.match(lines[place][1])}
    for separators in (marked, headings, rules):
        if separators:
            blocks = runs(places, separators | marked | headings | rules)
            blocks = [block for block in blocks if any(lines[place][1] for place in block)]
            turns = [sum(place in starts for place in block) for block in blocks]
            if not starts or len(blocks) < 2 or max(turns) > 1:
                return blocks
            break
    blank = {place for place in places if not lines[place][1]} | marked | headings | rules
    blocks = runs(places, blank)
    if starts and blocks and all(sum(place in starts for place in block) == 1 for block in blocks):
        return join_blocks(blocks, lines)
    behind_blank = [place for place in sorted(starts)[1:] if not lines[place - 1][1]]
    if starts and len(behind_blank) == len(starts) - 1 and len(starts) > 2:
        return join_blocks(blocks, lines)
    return blocks


def find_headings(lines: list[tuple[int, str]]) -> set[int]:
    """Find headings. `Example 2: a cat` directly below text is part of an answer, unless the file begins so."""
    labels = {place: label_of(line) for place, (_, line) in enumerate(lines) if line and HEADING.match(line)}
    first = next((label_of(line) for _, line in lines if line and line != CUT), "")
    return {
        place
        for place, label in labels.items()
        if label in ("", first) or not place or lines[place - 1][1] in ("", CUT)
    }


def label_of(line: str) -> str:
    """Return the label in a line that also has text, such as `Example 2: a cat`; empty for other lines."""
    name, _, text = line.partition(":")
    return plain(re.sub(r"[\d.]+", "", name)) if text.strip() and is_label(name) else ""


def join_blocks(blocks: list[list[int]], lines: list[tuple[int, str]]) -> list[list[int]]:
    """Join blocks separated by a single blank line; several blank lines separate dialogues."""
    joined = [blocks[0]]
    for before, block in pairwise(blocks):
        apart = range(before[-1] + 1, block[0])
        if len(apart) > 1 or any(lines[place][1] for place in apart):
            joined.append(block)
        else:
            joined[-1] += [*apart, *block]
    # If two blank lines follow every turn, they do not separate dialogues either.
    if len(joined) == 1 or any(len(block) > 2 for block in joined):
        return joined
    return [[place for block in joined for place in block]]


def runs(places: Sequence[int], separators: set[int]) -> list[list[int]]:
    """Return the runs of places between separators."""
    return [list(run) for apart, run in groupby(places, separators.__contains__) if not apart]
