"""A model folder's own vocabulary as a tiktoken Encoding, and the same vocabulary into the folders written here."""

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
from support.files import read_json_object, write_json, write_text, writing

END_OF_TEXT = "<|endoftext|>"
END_OF_TURN = "<|endofturn|>"
# A run of what GPT-2's pattern calls white space (Python's `\\s` has four characters more), its last one left over.
SPACES = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
LONG_RUN = 1000  # characters of white space from which on a text is cut there: at some hundred thousand tiktoken fails
RUN = re.compile(rf"(?<![{SPACES}])[{SPACES}]{{{LONG_RUN},}}(?=[{SPACES}][^{SPACES}])")


def load_tokenizer(folder: Path) -> tiktoken.Encoding:
    """GPT-2's byte-level BPE with the vocabulary of `folder`; nothing is fetched.

    Raises:
        UserError: vocabulary files that are missing, damaged or don't belong together.
    """
    # tiktoken keeps a copy of what it reads, by path, in a folder of its own: these files are at hand and may change.
    os.environ["TIKTOKEN_CACHE_DIR"] = ""
    with TemporaryDirectory() as scratch:
        vocabulary = copy_vocabulary(folder, Path(scratch))
        if END_OF_TEXT not in vocabulary:
            raise UserError(f"{folder}: the vocabulary has no {END_OF_TEXT}, so it is not one of GPT-2's form")
        try:
            ranks = data_gym_to_mergeable_bpe_ranks(f"{scratch}/merges.txt", f"{scratch}/vocab.json")
        except (AssertionError, KeyError, ValueError):
            raise UserError(
                f"{folder}: vocab.json and merges.txt are damaged or not a pair; fetch both again"
            ) from None
    specials = {END_OF_TEXT: vocabulary[END_OF_TEXT], **read_added_tokens(folder, vocabulary)}
    return tiktoken.Encoding(folder.name, pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=specials)


def encode_text(tokenizer: tiktoken.Encoding, text: str) -> list[int]:
    """The tokens of a text in which nothing is a special token: those of `encode_ordinary`.

    That one panics at a long run of white space in front of a word, by the backtracking of its pattern, which ends a
    piece before the last space. Cut there, a run is matched without.
    """
    if len(text) <= LONG_RUN:
        return tokenizer.encode_ordinary(text)
    cuts = [0, *(place for run in RUN.finditer(text) for place in run.span()), len(text)]
    return [token for start, end in pairwise(cuts) for token in tokenizer.encode_ordinary(text[start:end])]


def add_tokens(tokenizer: tiktoken.Encoding, tokens: Iterable[str]) -> tiktoken.Encoding:
    """`tokenizer` with those of `tokens` that it lacks as further special tokens, numbered after all others."""
    specials = dict(tokenizer._special_tokens)
    for token in tokens:
        specials.setdefault(token, tokenizer.n_vocab + len(specials) - len(tokenizer._special_tokens))
    ranks = tokenizer._mergeable_ranks
    return tiktoken.Encoding(tokenizer.name, pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=specials)


def speaker_token(speaker: str) -> str:
    return f"<|{speaker}|>"


def copy_vocabulary(source: Path, target: Path, tokenizer: tiktoken.Encoding | None = None) -> dict[str, int]:
    """Write the vocabulary of the folder `source` to `target` as `vocab.json` and `merges.txt`; return token → id.

    Special tokens that came later, those of the folder or, when there is one, those of `tokenizer`, are written to
    `added_tokens.json`.

    Raises:
        UserError: files that are missing or do not hold a vocabulary, or a target that can't be written.
    """
    vocabulary, merges = read_vocabulary(source)
    added = dict(tokenizer._special_tokens) if tokenizer else read_added_tokens(source, vocabulary)
    added.pop(END_OF_TEXT, None)
    ids = [*vocabulary.values(), *added.values()]
    if not all(type(number) is int for number in ids) or sorted(ids) != list(range(len(ids))):
        raise UserError(f"{source}: the ids of its vocabulary are not 0 to {len(ids) - 1}; fetch it again")
    with writing(target):
        target.mkdir(parents=True, exist_ok=True)
    write_text(target / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
    write_text(target / "merges.txt", "\n".join(["#version: 0.2", *merges, ""]))
    if added:
        write_json(target / "added_tokens.json", added)
    return vocabulary


def read_added_tokens(folder: Path, vocabulary: dict[str, int]) -> dict[str, int]:
    """The special tokens outside of `vocabulary`, as token → id: from `added_tokens.json`, or from `tokenizer.json`.

    Raises:
        UserError: the file is damaged, or a token is no text.
    """
    path = folder / "added_tokens.json"
    apart = path.exists()
    if not apart and (folder / "vocab.json").exists():
        return {}
    path = path if apart else folder / "tokenizer.json"
    content = read_json_object(path)
    try:
        tokens = content if apart else {token["content"]: token["id"] for token in content.get("added_tokens", [])}
        "".join(tokens).encode()  # half a surrogate pair is no text
    except (LookupError, TypeError, AttributeError, UnicodeEncodeError):
        raise UserError(f"{path}: its added tokens are damaged; fetch it again") from None
    return tokens if apart else {token: number for token, number in tokens.items() if token not in vocabulary}


def read_vocabulary(folder: Path) -> tuple[dict[str, int], list[str]]:
    """Token → id, and the merges in order, from `vocab.json` and `merges.txt`, or from `tokenizer.json`.

    transformers 5 saves `tokenizer.json` alone; the same two lists stand inside it.
    """
    if not (folder / "vocab.json").exists():
        path = folder / "tokenizer.json"
        try:
            bpe = read_json_object(path)["model"]
            return dict(bpe["vocab"]), [merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]]
        except (LookupError, TypeError, ValueError):
            raise UserError(f"{path} holds no byte-level BPE; put vocab.json and merges.txt beside it") from None
    path = folder / "merges.txt"
    try:
        merges = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from error
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; delete it and fetch it again") from None
    return read_json_object(folder / "vocab.json"), [
        line for line in merges if line and not line.startswith("#version:")
    ]
