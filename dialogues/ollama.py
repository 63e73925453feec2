"""Write an Ollama Modelfile: the chat template in Go's syntax, the end of a turn, and the chat's sampling settings."""

from collections.abc import Mapping
from shlex import quote
from typing import Any

from dialogues.chat_template import literal, user_and_assistant
from dialogues.dialogue import ALPACA
from dialogues.template import TEMPLATES
from dialogues.tokenizer import END_OF_TEXT
from settings import AnswerSettings

# Every text is a Go literal, so that spaces and lines around the actions do not matter. Ollama also keeps the system
# messages, which `.System` joins, in `.Messages`.
TEMPLATE = """
{{{{- if .System }}}}{{{{ .System }}}}{{{{ {between} }}}}{{{{ else }}}}{{{{ {beginning} }}}}{{{{ end }}}}
{{{{- range .Messages }}}}
{{{{- if or (eq .Role "user") (eq .Role "assistant") }}}}
{{{{- $text := .Content }}}}{trim}
{{{{- if eq .Role "user" }}}}{{{{ {first} }}}}{{{{ else }}}}{{{{ {second} }}}}{{{{ end }}}}
{{{{- {space} }}}}{{{{ $text }}}}{{{{ {stop} }}}}
{{{{- end }}}}
{{{{- end }}}}
{{{{- {second} }}}}"""
# Ollama keeps an answer in the history as generated. With some templates, it begins with a space, or ends with the stop
# without its last token. Go's templates can't subtract, so `len (slice $text size)` computes the length minus `size`.
TRIM_START = """
{{{{- if $text }}}}{{{{ if eq (slice $text 0 1) {space} }}}}{{{{ $text = slice $text 1 }}}}{{{{ end }}}}{{{{ end }}}}"""
TRIM_END = """
{{{{- if ge (len $text) {size} }}}}{{{{ $rest := len (slice $text {size}) }}}}
{{{{- if eq (slice $text $rest) {tail} }}}}{{{{ $text = slice $text 0 $rest }}}}{{{{ end }}}}{{{{ end }}}}"""
MODELFILE = '''\
# Create the model in this folder: ollama create NAME -f {itself}
FROM ./{weights}
TEMPLATE """{template}"""
PARAMETER stop """{stop}"""
PARAMETER stop {end}
PARAMETER num_ctx {positions}
PARAMETER num_predict {answer.max_new_tokens}
PARAMETER temperature {answer.temperature}
PARAMETER top_k {answer.top_k}
PARAMETER top_p {answer.top_p}
PARAMETER repeat_penalty {answer.repetition_penalty}
'''


def modelfile(dialogue: Mapping[str, Any], end_of_turn: str, positions: int, weights: str, itself: str) -> str:
    """Return the Modelfile of a model with this `dialogue.json`.

    Args:
        end_of_turn: the text of the token that ends a turn.
        positions: the context length.
        weights: the name of the GGUF file, in the same folder.
        itself: the name of the Modelfile.
    """
    return MODELFILE.format(
        itself=quote(itself),
        weights=weights,
        template=go_template(dialogue, end_of_turn),
        stop=TEMPLATES[dialogue["template"]].stop,
        end=END_OF_TEXT,
        positions=positions,
        answer=AnswerSettings(),
    )


def go_template(dialogue: Mapping[str, Any], end_of_turn: str) -> str:
    """Return the template that renders Ollama's messages as `chat_template` renders those of other programs.

    Ollama has only the roles `system`, `user`, `assistant` and `tool`; tool messages are left out.
    """
    name = dialogue["template"]
    stop, label, space = TEMPLATES[name]
    first, second = (go_literal(label.format(speaker)) for speaker in user_and_assistant(dialogue))
    instruction = ALPACA if name == "alpaca" else dialogue["instruction"]
    between, bare = ("", "") if name == "tokens" else (stop, stop.lstrip())
    tail = stop.removesuffix(end_of_turn)
    trim = TRIM_START.format(space=go_literal(space)) if space else ""
    trim += TRIM_END.format(size=len(tail), tail=go_literal(tail)) if tail else ""
    return TEMPLATE.format(
        beginning=go_literal(instruction + between if instruction else bare),
        between=go_literal(between),
        first=first,
        second=second,
        space=go_literal(space),
        stop=go_literal(stop),
        trim=trim,
    )


def go_literal(text: str) -> str:
    """Return a text as a Go literal. Ollama drops unprintable characters, such as joiners in emoji, so escape them."""
    return "".join(symbol if symbol.isprintable() else f"\\U{ord(symbol):08x}" for symbol in literal(text))
