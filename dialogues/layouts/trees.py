"""Read conversations stored as trees or columns: ChatGPT, Open WebUI, OpenAssistant, threads of posts, pandas."""

from collections.abc import Sequence
from typing import Any

from dialogues.layouts.records import is_container, is_list, is_object, pairs_of
from dialogues.layouts.words import PAIRS, TURN_LISTS, Columns, TurnKeys, find_key, plain, turn_keys

PARENT = "parent_message_uuid"  # the message before, in Claude's exports
OTHER_BRANCH = "messages of other branches"


def unfold(record: Any) -> tuple[list[Any], int] | None:
    """Return the messages of the branch that a tree shows, and the number of others; None without a tree."""
    values = dict(pairs_of(record))
    if isinstance(values.get("mapping"), dict):
        return branch_of_nodes(values["mapping"], values.get("current_node"), "parent")
    history = values.get("history")
    if isinstance(history, dict) and isinstance(history.get("messages"), dict):
        return branch_of_nodes(history["messages"], history.get("currentId"), "parentId")
    messages = values.get("chat_messages")
    if is_list(messages) and messages and all(PARENT in dict(pairs_of(message)) for message in messages):
        nodes = {str(dict(pairs_of(message)).get("uuid")): message for message in messages}
        return branch_of_nodes(nodes, values.get("current_leaf_message_uuid"), PARENT)
    prompt = values.get("prompt")
    if is_object(prompt) and is_list(dict(pairs_of(prompt)).get("replies")):
        return best_branch(prompt)
    if is_list(values.get("replies")) and find_key(values, ("text", "content", "body")):
        return best_branch(record)
    return None


def branch_of_nodes(nodes: dict[str, Any], current: Any, parent: str) -> tuple[list[Any], int]:
    """Return the messages from the root to the node `current` (or to the last node), and the number of others."""
    objects = {name: dict(pairs_of(node)) for name, node in nodes.items()}
    at = current if isinstance(current, str) and current in objects else next(reversed(objects), None)
    branch: list[Any] = []
    seen: set[str] = set()
    while isinstance(at, str) and at in objects and at not in seen:
        seen.add(at)
        branch.append(objects[at])
        at = objects[at].get(parent)
    messages = [read_fragments(node.get("message", node) if "message" in node else node) for node in reversed(branch)]
    messages = [message for message in messages if is_object(message) and says_something(message)]
    others = sum(
        1
        for name, node in objects.items()
        if name not in seen and says_something(node.get("message", node) if "message" in node else node)
    )
    return messages, others


def read_fragments(message: Any) -> Any:
    """Turn a message with fragments (DeepSeek) into one with role and content; leave others unchanged."""
    fragments = dict(pairs_of(message)).get("fragments")
    if not is_list(fragments):
        return message
    kinds = {"REQUEST": "user", "RESPONSE": "assistant"}
    said = [values for part in fragments if (values := dict(pairs_of(part))).get("type") in kinds]
    return {"role": kinds[said[0]["type"]], "content": said[0].get("content")} if said else {}


def says_something(message: Any) -> bool:
    """Whether a message holds text or a tool call, which roots and hidden nodes do not."""
    values = dict(pairs_of(message))
    content = values.get("content", values.get("text"))
    if isinstance(content, str):
        return bool(content.strip())
    parts = dict(pairs_of(content)).get("parts")
    return any(parts) if is_list(parts) else is_object(content) or is_list(content)


def best_branch(root: Any) -> tuple[list[Any], int]:
    """Return the messages from the root along the best or first replies, and the number of others."""
    branch, others, node = [], 0, root
    while True:
        values = dict(pairs_of(node))
        branch.append(node)
        replies = [reply for reply in values.get("replies") or [] if is_object(reply)]
        if not replies:
            return branch, others
        node = min(replies, key=lambda reply: rank_of(dict(pairs_of(reply))))
        others += sum(count_messages(reply) for reply in replies if reply is not node)


def rank_of(values: dict[str, Any]) -> float:
    rank = values.get("rank")
    return rank if isinstance(rank, int | float) else 1e9  # an integer may be too large for a float


def count_messages(node: Any) -> int:
    replies = dict(pairs_of(node)).get("replies") or []
    return 1 + sum(map(count_messages, replies))


def threads(rows: Sequence[dict[str, Any]], keys: TurnKeys) -> tuple[list[list[dict[str, Any]]], int] | None:
    """Follow rows that refer to the row they answer: one thread from each root, along the best or first replies.

    Returns the threads and the number of rows on other branches; None if few rows refer to another.
    """
    if keys.parent is None or keys.message is None:
        return None
    parent, identity = keys.parent, keys.message
    known = {str(row[identity]): row for row in rows if row.get(identity) not in (None, "")}
    replies: dict[str, list[dict[str, Any]]] = {}
    roots = []
    for row in rows:
        above = str(row.get(parent) or "")
        if above in known and known[above] is not row:
            replies.setdefault(above, []).append(row)
        else:
            roots.append(row)
    if len(known) < len(rows) or len(roots) > 0.5 * len(rows):  # a chat in which some messages quote others
        return None
    found, used = [], 0
    for root in roots:
        thread = [root]
        while following := replies.get(str(thread[-1][identity])):
            thread.append(min(following, key=lambda row: rank_of(row)))
        found.append(thread)
        used += len(thread)
    return found, len(rows) - used


def rows_of_columns(value: Any, columns: Columns = ()) -> list[dict[str, Any]] | None:
    """Return the rows of an object that stores columns (lists of one length, or objects); None for other objects."""
    if not isinstance(value, dict):
        return None
    # pandas: to_json(orient="split")
    if is_list(value.get("columns")) and is_list(value.get("data")) and all(map(is_list, value["data"])):
        return [dict(zip(map(str, value["columns"]), row, strict=False)) for row in value["data"]] or None
    held = {key: list(column.values()) if isinstance(column, dict) else column for key, column in value.items()}
    lists = {key: column for key, column in held.items() if is_list(column) and column}
    keys = turn_keys(tuple(lists), columns)
    words = {plain(key): key for key in lists}
    pair = next(((words[left], words[right]) for left, right in PAIRS if left in words and right in words), None)
    speakers = next((key for key in keys.speaker if is_flat(lists[key])), None)
    listed = (words[word] for word in TURN_LISTS if word in words)
    texts = next((key for key in (*keys.text, *listed) if is_flat(lists[key]) and key != speakers), None)
    wanted = (speakers, texts) if speakers and texts else pair
    if wanted is None or len(lists[wanted[0]]) != len(lists[wanted[1]]):
        return None
    if speakers and texts and texts not in keys.text:
        lists["text"] = lists.pop(texts)
    length = len(lists[wanted[0]])
    rows = {key: column for key, column in lists.items() if len(column) == length}
    if wanted == pair:
        rows = {key: [text_of(item) for item in rows[key]] for key in wanted}
    return [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]


def is_flat(items: list[Any]) -> bool:
    return not any(map(is_container, items[:3]))


def text_of(item: Any) -> Any:
    """Return the text of a question or answer that is an object (CoQA)."""
    values = {plain(key): value for key, value in pairs_of(item)}
    return next((values[word] for word in ("inputtext", "text", "content") if word in values), item)
