"""Put rows of messages in order: group them into dialogues, and sort them by turn number or time."""

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import islice, pairwise
from typing import Any

from dialogues.layouts.trees import threads
from dialogues.layouts.words import CHAT_IDS, TurnKeys, plain

ISO = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d")


def group_rows(rows: list[dict[str, Any]], keys: TurnKeys) -> tuple[list[list[dict[str, Any]]], int]:
    """Group the rows into dialogues by replies or by dialogue id; also return the number of rows left out."""
    if found := threads(rows, keys):
        return found
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    changes, last = 0, None
    for row in rows:
        identity = tuple(str(row.get(key)) for key in keys.identity)
        groups.setdefault(identity, []).append(row)
        changes, last = changes + (identity != last), identity
    if not keys.identity and (found := split_at_restarts(rows, keys)):
        return found, 0
    alone = sum(len(group) == 1 for group in groups.values()) > len(groups) / 2
    scattered = (changes > len(groups) or alone) and [plain(key) for key in keys.identity] == ["id"]
    if len(groups) == len(rows) or scattered:  # the id numbers rows or people, not dialogues
        return [rows], 0
    return list(groups.values()), 0


def are_chats(row: Mapping[str, Any], keys: TurnKeys) -> bool:
    """Whether the ids of rows are of whole chats, such as Android's thread for each phone number, not of dialogues."""
    return bool(CHAT_IDS & set(map(plain, keys.identity))) or "address" in row


def split_at_restarts(rows: list[dict[str, Any]], keys: TurnKeys) -> list[list[dict[str, Any]]]:
    """Split rows where their turn numbers restart; return no groups if the numbers do not count up and restart."""
    orders = [read_order(row.get(keys.order)) for row in rows] if keys.order else [None]
    if None in orders:
        return []
    starts = [place for place, order in enumerate(orders) if order == orders[0]]
    found = [rows[start:end] for start, end in pairwise([*starts, len(rows)])]
    grows = all(
        before is not None and after is not None and (after > before or after == orders[0])
        for before, after in pairwise(orders)
    )
    return found if grows and len(found) > 1 and min(map(len, found)) > 1 else []


def put_rows_in_order(
    rows: list[dict[str, Any]], keys: TurnKeys
) -> tuple[list[dict[str, Any]], Sequence[datetime | None]]:
    """Sort rows by turn number, or else by time; return the rows and their times."""
    if not keys.time and not keys.order:
        return rows, [None] * len(rows)
    from dialogues.layouts.stamps import read_times

    times = read_times([read_cells(row, keys.time) for row in rows]) if keys.time else [None] * len(rows)
    orders = [read_order(row.get(keys.order)) for row in rows] if keys.order else [None]
    places = list(range(len(rows)))
    if None not in orders and len(set(orders)) == len(orders):
        places.sort(key=lambda place: orders[place] or 0)
    elif any(times):
        known = [time for time in times if time]
        if sum((later > earlier) - (later < earlier) for earlier, later in pairwise(known)) < 0:
            places.reverse()
        last = known[0] if places[0] == 0 else known[-1]
        # A row without a time takes the time of the row before it.
        moments = {place: (last := times[place] or last) for place in places}
        places.sort(key=lambda place: moments[place])
    return [rows[place] for place in places], [times[place] for place in places]


def find_times(rows: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """Return the first key, of any name, with an ISO time in every row; empty if there is none."""
    isos = (key for key in rows[0] if all(isinstance(row.get(key), str) and ISO.match(row[key]) for row in rows))
    return tuple(islice(isos, 1))


def read_cells(row: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """Return the time in a row; a date and a time of day in two cells are joined."""
    return row.get(keys[0]) if len(keys) == 1 else " ".join(str(row.get(key) or "") for key in keys)


def read_order(value: Any) -> float | None:
    """Return a turn number, which may be too large for a float; None if the value is not a number."""
    if isinstance(value, str):
        digits = re.search(r"\d+(?:\.\d+)?$", value.strip())
        return float(digits[0]) if digits else None
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
