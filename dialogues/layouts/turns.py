"""Read a list of turns as dialogues: messages with speaker and text, with the keys of many programs."""

import re
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from typing import Any

from dialogues.dialogue import INSTRUCTION, Dialogue
from dialogues.layouts.fields import (
    ME,
    UNKNOWN,
    find_profiles,
    is_other,
    is_outgoing,
    is_unlearned,
    mend_encoding,
    read_content,
    read_speaker,
    system_prompt,
    unescape,
    why_skipped,
)
from dialogues.layouts.messages import PAUSE, Message, cut, gather, without_numbers
from dialogues.layouts.order import are_chats, find_times, group_rows, put_rows_in_order
from dialogues.layouts.records import (
    FormatError,
    Pairs,
    is_container,
    is_list,
    is_object,
    keys_of,
    kind,
    make_turn,
    once,
    pairs_of,
)
from dialogues.layouts.trees import OTHER_BRANCH, rows_of_columns, unfold
from dialogues.layouts.words import (
    ASSISTANT,
    OTHER_KEYS,
    PAIRS,
    ROLES,
    SYSTEM,
    TEXT_KEYS,
    TURN_LISTS,
    USER,
    Columns,
    find_key,
    is_nothing,
    plain,
    turn_keys,
)

WRAPPERS = frozenset(("message", "data", "payload", "response", "msg", "event", "item", "node"))
NAMED_LINE = re.compile(r"\s*(?P<name>[^\s:：][^:：\n]{0,40}?)\s?[:：]\s+(?P<text>\S.*)$", re.DOTALL)


def turn_list(record: Any, columns: Columns = ()) -> tuple[str, list[Any], int]:
    """Return the turns of a record: their key (empty for a list), the turns, and the number of turns on other branches.

    Raises:
        FormatError: the record holds no turns.
    """
    if is_list(record):
        return "", record, 0
    if tree := unfold(record):
        return "", *tree
    if rows := rows_of_columns(record, columns):
        return "", rows, 0
    found = {plain(key): key for key in reversed([key for key, _ in pairs_of(record)])}
    values = dict(pairs_of(record))
    listed = [found[word] for word in TURN_LISTS if word in found]
    for key in listed:
        if rows := rows_of_columns(values[key], columns):
            return key, rows, 0
        if holds_turns(values[key], columns):
            return key, list(values[key].values()) if isinstance(values[key], dict) else values[key], 0
    for key in listed:
        if is_list(values[key]):
            return key, values[key], 0
    raise FormatError(f"a list of turns is needed ({', '.join(TURN_LISTS[:7])}); this has {keys_of(record)}")


def holds_turns(value: Any, columns: Columns = ()) -> bool:
    """Whether a value is a list of turns: messages, strings, pairs, or objects with one name each."""
    items = list(value.values()) if isinstance(value, dict) else value
    if not is_list(items) or not items or (isinstance(value, dict) and not all(map(is_object, items))):
        return False
    if all(is_object(item) and turn_keys(tuple(dict(pairs_of(item))), columns).text for item in items):
        return True  # two speakers alternate without names
    return any(kind_of_turn(item, columns) for item in items[:3])


def kind_of_turn(item: Any, columns: Columns = ()) -> str:
    """Return the kind of a turn: "message", "exchange", "named", "candidates", "text" or "pair"; "" if it is none."""
    if isinstance(item, str):
        return "text"
    if is_list(item):
        return "pair" if len(item) == 2 and isinstance(item[1], str) and not is_container(item[0]) else ""
    if not is_object(item):
        return ""
    values = unwrap(dict(pairs_of(item)), columns)
    keys = turn_keys(tuple(values), columns)
    words = set(map(plain, values))
    columns_inside = keys.speaker and is_list(values[keys.speaker[0]]) and len(values[keys.speaker[0]]) > 1
    if keys.speaker and (keys.text or words & {"toolcalls", "functioncall"}) and not columns_inside:
        return "message"
    flat = {plain(key) for key, value in values.items() if not is_container(value)}
    if any(left in flat and right in flat for left, right in PAIRS):
        return "exchange"
    if {"candidates", "history"} <= words:
        return "candidates"
    known = words & {*TURN_LISTS, *TEXT_KEYS, *OTHER_KEYS}
    return "named" if len(values) == 1 and not known and isinstance(next(iter(values.values())), str) else ""


def from_turns(record: Any, columns: Columns = (), pause: timedelta = PAUSE) -> list[Dialogue]:
    """Return the dialogues in a list of turns, or in an object that holds one.

    A system message at the beginning, or a system prompt outside the list, becomes the instruction; an empty one means
    no instruction. The roles user and assistant, and their synonyms, become User and Assistant; any other role is a
    name. Tool calls, thoughts and messages without text are skipped and counted. Messages with ids, turn numbers or
    times are grouped, sorted, and cut at pauses of `pause` or longer.
    """
    key, items, others = turn_list(record, columns)
    beside = {} if is_list(record) else {name: value for name, value in once(record).items() if name != key}
    system = system_prompt(beside)
    instruction = [] if system is None else [system]
    what = next((found for item in items[:3] if (found := kind_of_turn(item, columns))), "unnamed")
    if what == "unnamed" and items and not all(map(is_object, items)):
        what = "message"
    if what == "message":
        if plain(key) == "chosen" and is_list(prompt := beside.get("prompt")):
            items = [*prompt, *items]
        dialogues = read_messages(items, columns, pause, instruction)
    else:
        listed = list(read_simple(items, what))
        said = [turn for turn in listed if not is_nothing(turn[1])]
        turns = tuple(make_turn(*turn, f"turn {number}") for number, turn in enumerate(said, 1))
        empty = ("messages without text",) * (len(listed) - len(said))
        dialogues = [Dialogue(turns, instruction[0] if instruction else INSTRUCTION, empty)]
    if others:
        dialogues[0] = dialogues[0]._replace(skipped=(*dialogues[0].skipped, *[OTHER_BRANCH] * others))
    return dialogues


def read_simple(items: Sequence[Any], what: str) -> Iterator[tuple[str, Any]]:
    """Yield the speakers and texts of turns that are not messages; `what` is their kind."""
    if what == "candidates":  # each item repeats the turns before it
        last = once(items[-1])
        items = [*last[find_key(last, ("history",)) or ""], *last[find_key(last, ("candidates",)) or ""][-1:]]
        what = "text"
    if what == "unnamed":
        values = [once(item) for item in items]
        items = [read_content(value, turn_keys(tuple(value))) for value in values]
        what = "text"
    if what == "text":
        yield from read_strings(items)
        return
    firsts = [str(item[0]) for item in items if is_list(item) and len(item) == 2]
    recurring = 1 < len(set(firsts)) <= len(firsts) / 2 and max(map(len, firsts)) < 40
    for number, item in enumerate(items, 1):
        if what == "pair" and is_list(item) and len(item) == 2:
            first, second = item
            named = recurring or not isinstance(first, str)
            yield from [(str(first), second)] if named else [(USER, first), (ASSISTANT, second)]
        elif what == "named" and is_object(item):
            yield from pairs_of(item)
        elif what == "exchange" and is_object(item):
            values = once(item)
            words = {plain(key): key for key in values}
            left, right = next(pair for pair in PAIRS if pair[0] in words and pair[1] in words)
            yield from ((USER, values[words[left]]), (ASSISTANT, values[words[right]]))
        else:
            raise FormatError(f"turn {number} is {kind(item)}, unlike the first turn")


def read_strings(items: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Yield texts that begin with the speaker's name, or else texts of two speakers who alternate."""
    named = [NAMED_LINE.match(item) for item in items if isinstance(item, str)]
    names = {match["name"] for match in named if match}
    if items and all(named) and len(named) == len(items) and len(names) <= max(2, len(items) / 2):
        yield from ((match["name"], match["text"]) for match in named if match)
    else:
        for number, item in enumerate(items):
            yield (USER, ASSISTANT)[number % 2], item


def read_messages(items: Sequence[Any], columns: Columns, pause: timedelta, instruction: list[str]) -> list[Dialogue]:
    """Return the dialogues of messages with speaker and text."""
    rows = [item if isinstance(item, dict) else once_turn(item, number) for number, item in enumerate(items, 1)]
    rows = [unwrap(row, columns) for row in rows]
    if not rows:
        return [Dialogue((), instruction[0] if instruction else INSTRUCTION)]
    keys = turn_keys(tuple(rows[min(1, len(rows) - 1)]), columns)
    if not keys.time:
        keys = keys._replace(time=find_times(rows))
    found, others = group_rows(rows, keys)
    pause = pause if len(found) == 1 or are_chats(rows[0], keys) else timedelta.max
    dialogues = []
    for group in found:
        ordered, times = put_rows_in_order(group, keys)
        dialogues += read_group(ordered, times, columns, pause, list(instruction))
    if others:
        dialogues[0] = dialogues[0]._replace(skipped=(*dialogues[0].skipped, *[OTHER_BRANCH] * others))
    return dialogues


def unwrap(row: dict[str, Any], columns: Columns) -> dict[str, Any]:
    """Unwrap a message from its enclosing object (`{"type": "user", "message": {...}, "timestamp": ...}`)."""
    row = shown_version(row)
    if not any(isinstance(value, dict) for value in row.values()):
        return row
    for key, inner in row.items():
        if isinstance(inner, dict) and plain(key) in WRAPPERS:
            keys = turn_keys(tuple(inner), columns)
            typed = isinstance(row.get("type"), str) and plain(row["type"]) in ROLES
            if keys.text and (keys.speaker or typed):
                outer = {name: value for name, value in row.items() if name != key and name not in inner}
                return {**({"role": row["type"]} if typed and not keys.speaker else {}), **inner, **outer}
    return row


def shown_version(row: dict[str, Any]) -> dict[str, Any]:
    """Return the version of a message that LM Studio shows, with its steps joined; other rows unchanged."""
    versions, chosen = row.get("versions"), row.get("currentlySelected", 0)
    if not is_list(versions) or not isinstance(chosen, int) or not 0 <= chosen < len(versions):
        return row
    version = dict(pairs_of(versions[chosen]))
    if not is_list(version.get("steps")):
        return version
    contents = [content for step in version["steps"] if is_list(content := dict(pairs_of(step)).get("content"))]
    return {**version, "content": [part for content in contents for part in content]}


def once_turn(item: Any, number: int) -> dict[str, Any]:
    """Return the object of a turn.

    Raises:
        FormatError: the turn is not an object, or a key occurs more than once.
    """
    if not isinstance(item, Pairs):
        raise FormatError(f"turn {number} must be an object with speaker and text, not {kind(item)}")
    try:
        return once(item)
    except FormatError as error:
        raise FormatError(f"turn {number}: {error}") from None


def read_group(
    rows: Sequence[dict[str, Any]],
    times: Sequence[datetime | None],
    columns: Columns,
    pause: timedelta,
    instruction: list[str],
) -> list[Dialogue]:
    """Return the dialogues of sorted messages: one for messages with roles; a chat between people is cut at pauses."""
    messages: list[Message] = []
    roles, unanswered = True, False
    guessed = turn_keys(tuple(rows[0]), columns).guessed
    encoded_twice = any("timestamp_ms" in row for row in rows[:3])
    names = find_profiles(rows) | find_discriminators(rows, columns)
    owner = is_other(rows, columns)
    for number, (values, time) in enumerate(zip(rows, times, strict=True), 1):
        keys = turn_keys(tuple(values), columns)
        name, role = read_speaker(values, keys)
        text = read_content(values, keys) if keys.guessed == guessed else None
        why = why_skipped(values, name, role, text)
        if role in SYSTEM and why in ("", "messages without text"):
            if any(message.turn for message in messages):
                messages.append(Message(None, "system messages inside a conversation", time))
            else:
                instruction.append("" if is_nothing(text) else make_turn("system", text, "the system message").text)
            continue
        if unanswered and role and name == ASSISTANT and not why:
            why = "answers to multimodal messages"
        unanswered = bool(role) and (why == "multimodal messages" or (unanswered and why == "tool calls"))
        if why:
            messages.append(Message(None, why, time))
            continue
        roles = roles and bool(role)
        if not name and (time or keys.identity):
            name = UNKNOWN
        if not name:
            raise FormatError(f"turn {number} has no speaker (no key such as speaker, sender, author, role or from)")
        name = ME if owner and is_outgoing(values) else names.get(name, name)
        if isinstance(text, str):
            text = unescape(values, text)
            if encoded_twice:
                name, text = mend_encoding(name), mend_encoding(text)
        turn = make_turn(name, text, f"turn {number}")
        messages.append(Message(turn, "", time, is_unlearned(values, keys)))
    unknown = sum(message.turn is not None and message.turn.speaker == UNKNOWN for message in messages)
    if unknown > 3 and 2 * unknown > len(messages):
        raise FormatError(f"{unknown} of {len(messages)} messages have no speaker; name its key: --columns speaker=...")
    line = "\n".join(instruction) if instruction else INSTRUCTION
    if times and times[0] and not roles:
        return list(cut(map(without_notice, messages), pause, line)) or [Dialogue((), line)]
    return [one_dialogue(messages, line)]


def without_notice(message: Message) -> Message:
    """Return a message of a chat, without its turn if it is only a notice from the program."""
    from dialogues.layouts.notices import is_deed_of, is_notice, strip_marks

    if message.turn is None:
        return message
    name, text = message.turn
    if is_notice(text) or is_deed_of(name, text):
        return message._replace(turn=None, skipped="media and notices")
    text = strip_marks(message.turn.text)
    if not text:
        return message._replace(turn=None, skipped="messages without text")
    return message._replace(turn=message.turn._replace(text=text))


def find_discriminators(rows: Sequence[dict[str, Any]], columns: Columns) -> dict[str, str]:
    """Map Discord's names with numbers to names without them."""
    keys = turn_keys(tuple(rows[0]), columns)
    named = [row.get(keys.speaker[0]) for row in rows] if keys.speaker else []
    return without_numbers({name for name in named if isinstance(name, str)})


def one_dialogue(messages: Sequence[Message], instruction: str) -> Dialogue:
    """Make one dialogue from all messages; if only the user speaks, it has no turns.

    Raises:
        FormatError: only the user speaks, and nothing was skipped.
    """
    dialogue = gather(messages, instruction)
    if {turn.speaker for turn in dialogue.turns} != {USER}:
        return dialogue
    if not dialogue.skipped:
        raise FormatError("only the user speaks here; the answers are missing")
    unanswered = ["questions without an answer"] * len(dialogue.turns)
    return Dialogue((), instruction, (*dialogue.skipped, *unanswered))
