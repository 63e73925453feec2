"""The chat template of a trained model in Jinja, for transformers and compatible tools, and its end-of-turn pattern."""

import json
import re
from collections.abc import Mapping
from typing import Any

from dialogues.dialogue import ALPACA, ALPACA_SPEAKERS, ALPACA_WITH_INPUT
from dialogues.layouts.words import ASSISTANT, SYSTEM, TOOLS, USER
from dialogues.template import TEMPLATES
from dialogues.tokenizer import END_OF_TEXT

# These lines are joined into one, and spaces between tags do not matter. `generation` marks the learned text: the whole
# dialogue, or some turns.
JINJA = """
{{%- set names = {names} -%}}
{{%- set seen = namespace(system=[], turns=[]) -%}}
{{%- for message in messages if message['role'] | lower not in {tools} -%}}
{{%- set content = message['content'] or '' -%}}
{{%- set parts = [content] if content is string else content | map(attribute='text') -%}}
{{%- set content = parts | join('\\n') | trim -%}}
{{%- if message['role'] | lower in {system} -%}}
{{%- if not seen.turns -%}}{{%- set seen.system = seen.system + [content] -%}}{{%- endif -%}}
{{%- elif content -%}}
{{%- set seen.turns = seen.turns + [{{'role': message['role'], 'content': content}}] -%}}
{{%- endif -%}}
{{%- endfor -%}}
{{%- set instruction = seen.system | join('\\n') if seen.system else {instruction} -%}}
{{%- macro opening(role) -%}}{{{{- {before} + names.get(role, role) + {after} -}}}}{{%- endmacro -%}}
{{%- macro text(turn, last) -%}}
{{{{- {space} + turn['content'] -}}}}
{{%- if not last or add_generation_prompt -%}}{{{{- {stop} -}}}}{{%- else -%}}{{{{- {end} -}}}}{{%- endif -%}}
{{%- endmacro -%}}
{all_on}
{{{{- instruction + {between} if instruction else {bare} -}}}}
{{%- for turn in seen.turns -%}}
{{{{- opening(turn['role']) -}}}}
{{%- if {learned} -%}}
{some_on}{{{{- text(turn, loop.last) -}}}}{some_off}
{{%- else -%}}
{{{{- text(turn, loop.last) -}}}}
{{%- endif -%}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}{{{{- opening('assistant') -}}}}{{%- endif -%}}
{all_off}
"""
ON, OFF = "{%- generation -%}", "{%- endgeneration -%}"


def chat_template(dialogue: Mapping[str, Any], marked: bool = True) -> str:
    """Return the Jinja template that renders messages as a model with this `dialogue.json` saw them in training.

    `user` is the first speaker and `assistant` the second; any other role is a speaker's name. If the model was
    trained on one speaker's turns, `assistant` is that speaker and `user` is the first of the others. Messages with the
    role `system` at the beginning replace the instruction line; an empty one removes it.

    Args:
        marked: mark the learned text with the `generation` tag, which not every program supports.
    """
    name, learn = dialogue["template"], dialogue["learn"]
    template = TEMPLATES[name]
    first, second = user_and_assistant(dialogue)
    instruction = literal(dialogue["instruction"])
    replies = "not loop.first"
    if name == "alpaca":
        has_input = f"messages | selectattr('role', 'equalto', {literal(ALPACA_SPEAKERS[1])}) | list"
        instruction = f"({literal(ALPACA_WITH_INPUT)} if {has_input} else {literal(ALPACA)})"
        replies = f"names.get(turn['role'], turn['role']) == {literal(second)}"
    before, after = template.label.split("{}")
    has_tokens = name == "tokens"
    return (
        JINJA.strip()
        .replace("\n", "")
        .format(
            names=literal({"user": first, "assistant": second}),
            system=literal(SYSTEM),
            tools=literal(TOOLS),
            instruction=instruction,
            before=literal(before),
            after=literal(after),
            space=literal(template.space),
            stop=literal(template.stop),
            end=literal(template.stop * has_tokens + END_OF_TEXT),
            between=literal("" if has_tokens else template.stop),
            bare=literal("" if has_tokens else template.stop.lstrip()),
            learned=replies
            if learn in ("all", "replies")
            else f"names.get(turn['role'], turn['role']) == {literal(learn)}",
            all_on=ON if marked and learn == "all" else "",
            all_off=OFF if marked and learn == "all" else "",
            some_on=ON if marked and learn != "all" else "",
            some_off=OFF if marked and learn != "all" else "",
        )
    )


def user_and_assistant(dialogue: Mapping[str, Any]) -> tuple[str, str]:
    """Return the speakers that correspond to the roles `user` and `assistant`."""
    if dialogue["template"] == "alpaca":
        return ALPACA_SPEAKERS[0], ALPACA_SPEAKERS[-1]
    names, learn = [*dialogue["speakers"], USER, ASSISTANT], dialogue["learn"]
    if learn in dialogue["speakers"] and learn not in ("all", "replies"):
        return next(name for name in names if name != learn), learn
    return names[0], names[1]


def response_template(dialogue: Mapping[str, Any], end_of_turn: str) -> dict[str, Any]:
    """Return the response template that makes transformers remove `end_of_turn` from the model's message."""
    _, second = user_and_assistant(dialogue)
    return {
        "defaults": {"role": "assistant", "content": ""},
        "start_anchor": TEMPLATES[dialogue["template"]].label.format(second),
        "fields": {"content": {"close_pattern": rf"(?:{re.escape(end_of_turn)}|{re.escape(END_OF_TEXT)})\Z"}},
    }


def literal(value: Any) -> str:
    """Return a value as a Jinja literal: JSON without `\\ud83d\\ude00`, which Jinja would read as two characters."""
    return json.dumps(value, ensure_ascii=False)
