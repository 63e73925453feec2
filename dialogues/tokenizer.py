"""Load a model folder's vocabulary as a tiktoken Encoding, and write the vocabulary to new model folders."""

import functools
import json
import os
import re
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str

from support.errors import UserError, reason
from support.files import REPLACE, read_json_object, write_json, write_text, writing

END_OF_TEXT = "<|endoftext|>"
END_OF_TURN = "<|endofturn|>"
# Whitespace in GPT-2's pattern; Python's `\s` adds four characters. RUN matches a long run minus its last character.
SPACES = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
LONG_RUN = 1000  # cut longer runs of whitespace: tiktoken fails at several hundred thousand characters
RUN = re.compile(rf"(?<![{SPACES}])[{SPACES}]{{{LONG_RUN},}}(?=[{SPACES}][^{SPACES}])")


def load_tokenizer(folder: Path) -> tiktoken.Encoding:
    """Load GPT-2's byte-level BPE with the vocabulary of `folder`; nothing is downloaded.

    Raises:
        UserError: vocabulary files are missing or damaged, or don't match each other.
    """
    vocabulary, merges = read_vocabulary(folder)
    added = read_added_tokens(folder, vocabulary)
    check_ids([*vocabulary.values(), *added.values()], folder)
    if END_OF_TEXT not in vocabulary:
        raise UserError(f"{folder}: the vocabulary has no {END_OF_TEXT}, so it is not GPT-2's")
    try:
        ranks = read_ranks("\n".join(["#version: 0.2", *merges, ""]), json.dumps(vocabulary))
    except (AssertionError, KeyError, ValueError):
        raise UserError(f"{folder}: vocab.json and merges.txt are damaged or don't match; download both") from None
    specials = {END_OF_TEXT: vocabulary[END_OF_TEXT], **added}
    return tiktoken.Encoding(folder.name, pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=specials)


@functools.lru_cache(maxsize=2)  # for a model and its base
def read_ranks(merges: str, vocabulary: str) -> dict[bytes, int]:
    """Read a merges.txt and a vocab.json with this content in tiktoken; cached, because a run does this three times."""
    # Turn off tiktoken's cache, which is keyed by path: these files exist only for a moment.
    os.environ["TIKTOKEN_CACHE_DIR"] = ""
    with TemporaryDirectory() as scratch:
        for name, content in (("merges.txt", merges), ("vocab.json", vocabulary)):
            Path(scratch, name).write_text(content, encoding="utf-8", newline="\n")
        return data_gym_to_mergeable_bpe_ranks(f"{scratch}/merges.txt", f"{scratch}/vocab.json")


def encode_text(tokenizer: tiktoken.Encoding, text: str) -> list[int]:
    """Encode a text like `encode_ordinary`: nothing in it is a special token.

    `encode_ordinary` panics at a long run of whitespace before a word: its pattern ends a piece before the last space,
    so it backtracks. Cutting the run there prevents this.
    """
    if len(text) <= LONG_RUN:
        return tokenizer.encode_ordinary(text)
    cuts = [0, *(place for run in RUN.finditer(text) for place in run.span()), len(text)]
    return [token for start, end in pairwise(cuts) for token in tokenizer.encode_ordinary(text[start:end])]


def add_tokens(tokenizer: tiktoken.Encoding, tokens: Iterable[str]) -> tiktoken.Encoding:
    """Return `tokenizer` with the missing ones of `tokens` added as special tokens, numbered after all others."""
    specials = dict(tokenizer._special_tokens)
    for token in tokens:
        specials.setdefault(token, tokenizer.n_vocab + len(specials) - len(tokenizer._special_tokens))
    ranks = tokenizer._mergeable_ranks
    return tiktoken.Encoding(tokenizer.name, pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=specials)


def speaker_token(speaker: str) -> str:
    return f"<|{speaker}|>"


def copy_vocabulary(source: Path, target: Path, tokenizer: tiktoken.Encoding | None = None) -> None:
    """Write the vocabulary of the folder `source` to `target` as `vocab.json` and `merges.txt`.

    Added special tokens are written to `added_tokens.json`: those of `tokenizer` if it is given, else those of the
    folder.

    Raises:
        UserError: files are missing or contain no vocabulary, or the target can't be written.
    """
    vocabulary, merges = read_vocabulary(source)
    added = dict(tokenizer._special_tokens) if tokenizer else read_added_tokens(source, vocabulary)
    added.pop(END_OF_TEXT, None)
    check_ids([*vocabulary.values(), *added.values()], source)
    with writing(target):
        target.mkdir(parents=True, exist_ok=True)
    write_text(target / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
    write_text(target / "merges.txt", "\n".join(["#version: 0.2", *merges, ""]))
    if added:
        write_json(target / "added_tokens.json", added)


def check_ids(ids: list[int], folder: Path) -> None:
    """Raise `UserError` unless the ids are 0, 1, 2, ..., each used once."""
    if not all(type(number) is int for number in ids) or sorted(ids) != list(range(len(ids))):
        raise UserError(f"{folder}: the ids of its vocabulary are not 0 to {len(ids) - 1}; download it again")


def read_added_tokens(folder: Path, vocabulary: dict[str, int]) -> dict[str, int]:
    """Return the special tokens outside of `vocabulary` as token → id, from `added_tokens.json` or `tokenizer.json`.

    Raises:
        UserError: the file is damaged, or a token is not text.
    """
    path = folder / "added_tokens.json"
    apart = path.exists()
    if not apart and (folder / "vocab.json").exists():
        return {}
    path = path if apart else folder / "tokenizer.json"
    content = read_json_object(path)
    try:
        tokens = content if apart else {token["content"]: token["id"] for token in content.get("added_tokens", [])}
        "".join(tokens).encode()  # fails for half of a surrogate pair
    except (LookupError, TypeError, AttributeError, UnicodeEncodeError):
        raise UserError(f"{path}: its added tokens are damaged; download it again") from None
    return tokens if apart else {token: number for token, number in tokens.items() if token not in vocabulary}


def read_vocabulary(folder: Path) -> tuple[dict[str, int], list[str]]:
    """Return token → id, and the merges in order, from `vocab.json` and `merges.txt`, or from `tokenizer.json`.

    transformers 5 saves only `tokenizer.json`, which holds the same two lists.
    """
    if not (folder / "vocab.json").exists():
        path = folder / "tokenizer.json"
        try:
            bpe = read_json_object(path)["model"]
            return dict(bpe["vocab"]), [merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]]
        except (LookupError, TypeError, ValueError):
            raise UserError(f"{path} holds no byte-level BPE; put vocab.json and merges.txt next to it") from None
    path = folder / "merges.txt"
    try:
        merges = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from error
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; {REPLACE}") from None
    return read_json_object(folder / "vocab.json"), [
        line for line in merges if line and not line.startswith("#version:")
    ]
