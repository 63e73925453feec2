"""Generate the benchmark's inputs: models with random weights in the published layout, a vocabulary of the
published size, and files of dialogues.
"""

import json
import random
import re
import shutil
import sys
from collections import Counter
from dataclasses import asdict
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from measure import PROJECT, run_task

BUNDLED_DATA = PROJECT / "llm_train_text.json"
INSTRUCTION = "The following is a conversation between two people."
END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 50257  # tokens in the published vocabulary
WORDS = re.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?[a-zA-Z]+| ?[0-9]+| ?[^\sa-zA-Z0-9]+|\s+(?!\S)|\s+"
)  # GPT-2's, for ASCII
LONGEST_DIALOGUE = 12  # maximum number of bundled dialogues joined into one
SIDES = 2  # number of parts of a dialogue file: half for training, half for validation

Turns = list[tuple[str, str]]  # speaker and text


def read_dialogues(path: Path) -> list[Turns]:
    """The dialogues of a file from `write_dialogues`, or of the bundled file, in which a speaker's later turns repeat
    the key.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return json.loads(text, object_pairs_hook=list)
    records = map(json.loads, text.splitlines())
    return [[(turn["speaker"], turn["text"]) for turn in record["turns"]] for record in records]


def render(turns: Turns) -> str:
    """A dialogue in the `prompt` template."""
    return INSTRUCTION + "".join(f"\n\n### {speaker}:\n{text}" for speaker, text in turns) + END_OF_TEXT


def opening(turns: Turns) -> str:
    """The prompt for the second turn."""
    return render(turns[:1]).removesuffix(END_OF_TEXT) + f"\n\n### {turns[1][0]}:\n"


def write_dialogues(path: Path, dialogues: list[Turns]) -> None:
    lines = (json.dumps({"turns": [{"speaker": who, "text": text} for who, text in turns]}) for turns in dialogues)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def make_dialogues(kind: str, count: int, folder: Path, length: int, path: Path) -> None:
    """Write `count` dialogues to `path`.

    Args:
        kind: `short`: random bundled dialogues; `long`: 2 to 12 random bundled dialogues joined; `fixed`: random words
            that make `length` input tokens in the vocabulary of the model folder `folder`.
    """
    chance = random.Random(0)
    bundled = read_dialogues(BUNDLED_DATA)
    if kind == "short":
        dialogues = [chance.choice(bundled) for _ in range(count)]
    elif kind == "long":
        sizes = (chance.randint(2, LONGEST_DIALOGUE) for _ in range(count))
        dialogues = [[turn for part in chance.choices(bundled, k=size) for turn in part] for size in sizes]
    else:
        dialogues = fixed_dialogues(count, folder, length, chance)
    write_dialogues(path, dialogues)


def fixed_dialogues(count: int, folder: Path, length: int, chance: random.Random) -> list[Turns]:
    """Dialogues of two turns with random words, each `length` input tokens long; the last token is only a target."""
    from dialogues.tokenizer import load_tokenizer

    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    words = [token.replace("Ġ", " ") for token in vocabulary if re.fullmatch("Ġ[a-z]{2,}", token)]
    encode = load_tokenizer(folder).encode_ordinary
    frame: Turns = [("Alex", "x"), ("Bob", "x")]
    missing = length - len(encode(render(frame).removesuffix(END_OF_TEXT)))  # the end of text is only a target
    assert missing >= 0, f"{length} tokens are too few for a dialogue"
    return [[frame[0], ("Bob", "x" + "".join(chance.choices(words, k=missing)))] for _ in range(count)]


def make_vocabulary(folder: Path) -> None:
    """Write a byte-level BPE vocabulary of the published size, with every word of the bundled dialogues as one token.

    The bundled dialogues then have about the same number of tokens as with the published vocabulary. The remaining
    merges join pairs of bytes that do not occur in English.
    """
    letters = byte_letters()
    texts = [render(turns).removesuffix(END_OF_TEXT) for turns in read_dialogues(BUNDLED_DATA)]
    counts = Counter(word for text in texts for word in WORDS.findall(text))
    spelled = {tuple(letters[byte] for byte in word.encode()): count for word, count in counts.items()}
    merges = learn_merges(spelled)
    english = range(32, 127)
    pairs = ((left, right) for left in letters for right in letters if not (left in english and right in english))
    fillers = ((letters[left], letters[right]) for left, right in pairs)
    known = set(merges)
    unknown = (pair for pair in fillers if pair not in known)
    merges += islice(unknown, VOCABULARY - 1 - len(letters) - len(merges))
    tokens = [*letters.values(), *map("".join, merges), END_OF_TEXT]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    assert len(vocabulary) == VOCABULARY
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *map(" ".join, merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8", newline="\n")


def byte_letters() -> dict[int, str]:
    """Map each byte to its character in GPT-2's files, in the order of ids.

    Printable bytes keep their character; the others get characters from U+0100 on (Radford et al. 2019, `encoder.py`).
    """
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def learn_merges(words: dict[tuple[str, ...], int]) -> list[tuple[str, str]]:
    """Byte-pair encoding (Sennrich et al. 2016, algorithm 1): join the most frequent pair until each word is whole."""
    merges = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for pieces, count in words.items():
            for pair in pairwise(pieces):
                pairs[pair] += count
        if not pairs:
            return merges
        best = pairs.most_common(1)[0][0]
        merges.append(best)
        words = {join(pieces, best): count for pieces, count in words.items()}


def join(pieces: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """The pieces of a word, with each occurrence of `pair` joined."""
    joined: list[str] = []
    for piece in pieces:
        if joined and (joined[-1], piece) == pair:
            joined[-1] += piece
        else:
            joined.append(piece)
    return tuple(joined)


def make_model(name: str, vocabulary: str, folder: str) -> dict[str, Any]:
    """Write a model folder with random weights, in a published shape or in the tiny shape `quick`.

    Args:
        vocabulary: the folder of `vocab.json` and `merges.txt`.
    """
    import torch

    from gpt_model import PUBLISHED, GPTConfig, GPTModel
    from load_gpt2_weights import as_stored, parameter_shapes, write_tensors

    config = {**PUBLISHED, "quick": GPTConfig(n_layer=2, n_head=2, n_embd=64)}[name]
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    for file in ("vocab.json", "merges.txt"):
        shutil.copy(Path(vocabulary) / file, target / file)
    end = config.vocab_size - 1
    fixed = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new"}
    # Train without dropout on both sides, as we do by default.
    dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    raw = {**fixed, **asdict(config), **dropout, "bos_token_id": end, "eos_token_id": end}
    (target / "config.json").write_text(json.dumps(raw, indent=2), encoding="utf-8")
    torch.manual_seed(0)
    stored = (as_stored(name, parameter) for name, parameter in GPTModel(config).named_parameters())
    write_tensors(target / "model.safetensors", parameter_shapes(config), stored, torch.float32)
    return {}


def make_data(kind: str, count: int, folder: str, length: int, path: str) -> dict[str, Any]:
    make_dialogues(kind, count, Path(folder), length, Path(path))
    return {}


if __name__ == "__main__":
    run_task({"model": make_model, "data": make_data}, sys.argv[1:])
