"""A model folder's own vocabulary as a tiktoken Encoding, and the same vocabulary into the folders written here."""

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str

from files import UserError, read_json_object, reason, write_text

END_OF_TEXT = "<|endoftext|>"


def load_tokenizer(folder: Path) -> tiktoken.Encoding:
    """GPT-2's byte-level BPE with the vocabulary of `folder`; nothing is fetched.

    Raises:
        UserError: vocabulary files that are missing, damaged or don't belong together.
    """
    # tiktoken keeps a copy of what it reads, by path, in a folder of its own: these files are at hand and may change.
    os.environ["TIKTOKEN_CACHE_DIR"] = ""
    with TemporaryDirectory() as scratch:
        vocabulary = copy_vocabulary(folder, Path(scratch))
        try:
            ranks = data_gym_to_mergeable_bpe_ranks(f"{scratch}/merges.txt", f"{scratch}/vocab.json")
        except (AssertionError, KeyError, ValueError):
            raise UserError(
                f"{folder}: vocab.json and merges.txt are damaged or not a pair; fetch both again"
            ) from None
    if END_OF_TEXT not in vocabulary:
        raise UserError(f"{folder}: the vocabulary has no {END_OF_TEXT}, so it is not one of GPT-2's form")
    specials = {END_OF_TEXT: vocabulary[END_OF_TEXT]}
    return tiktoken.Encoding(folder.name, pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=specials)


def copy_vocabulary(source: Path, target: Path) -> dict[str, int]:
    """Write the vocabulary of the folder `source` to `target` as `vocab.json` and `merges.txt`; return token → id.

    transformers 5 saves `tokenizer.json` alone; the same two lists stand inside it.
    """
    if (source / "vocab.json").exists():
        vocabulary = read_json_object(source / "vocab.json")
        try:
            merges = (source / "merges.txt").read_text(encoding="utf-8").split("\n")
        except OSError as error:
            raise UserError(f"cannot read {source / 'merges.txt'}: {reason(error)}") from error
        except UnicodeDecodeError:
            raise UserError(f"{source / 'merges.txt'} is not UTF-8 text; fetch it again") from None
        merges = [line for line in merges[merges[0].startswith("#version") :] if line]
    else:
        bpe = read_json_object(source / "tokenizer.json").get("model", {})
        if bpe.get("type") != "BPE":
            raise UserError(f"{source / 'tokenizer.json'} holds no byte-level BPE; put vocab.json and merges.txt there")
        vocabulary = bpe["vocab"]
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]]
    write_text(target / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
    write_text(target / "merges.txt", "\n".join(["#version: 0.2", *merges, ""]))
    return vocabulary
