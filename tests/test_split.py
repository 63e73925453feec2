"""Parts have their exact shares, file by file; no dialogue is in two parts; a long one is cut between turns."""

import json
from itertools import accumulate, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import PROJECT, fit, refused
from dialogues.batches import DialogueDataset
from dialogues.conversations import Conversations
from dialogues.dialogue import Dialogue, Turn
from dialogues.split import choose_parts, divide_turns, split_conversations
from dialogues.template import TEMPLATES, Renderer
from dialogues.tokenizer import load_tokenizer
from load_gpt2_weights import load_model
from pipeline.prepare import open_data, read_data
from settings import DataSettings, TrainingSettings
from support.errors import UserError
from training.defaults import complete

TINY = PROJECT / "models" / "tiny"
shares = st.one_of(
    st.integers(1, 99).map(lambda percent: [percent, 100 - percent]),
    st.sampled_from([[80, 10, 10], [33, 33, 34], [98, 1, 1]]),
    st.integers(2, 9).map(lambda folds: [1] * folds),
)


def talks(*sizes: int, start: int = 0) -> list[dict]:
    """A conversation for each number of turns in `sizes`; no two turns have the same text."""
    numbers = iter(range(start, start + sum(sizes)))
    return [
        {"turns": [{"speaker": "AB"[turn % 2], "text": f"word {next(numbers)}"} for turn in range(size)]}
        for size in sizes
    ]


def write(path, records: list[dict]):
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    return path


def read(*paths, fold: int = 0, seed: int = 1, **options):
    settings = DataSettings(paths=paths, **options)
    return read_data(open_data(settings), TINY, settings, seed, fold)


def said(data) -> dict[str, list[list[str]]]:
    """The texts of the dialogues in each part."""
    return {
        name: [[turn.text for turn in data.conversations[number].turns] for number in numbers.tolist()]
        for name, numbers in data.parts.items()
    }


class TestDialogues:
    @given(size=st.integers(1, 2000), shares=shares)
    def test_one_file_is_cut_exactly_at_the_shares(self, size, shares):
        parts = choose_parts(np.zeros(size, int), np.arange(size), shares)
        cuts = [size * bound // sum(shares) for bound in accumulate(shares, initial=0)]  # int(100 * 0.57) is 56
        assert parts.tolist() == [part for part, (start, end) in enumerate(pairwise(cuts)) for _ in range(start, end)]

    @given(
        files=st.lists(st.integers(0, 20), min_size=1, max_size=200).map(sorted),
        shares=shares.filter(lambda shares: len(shares) < 4),
    )
    def test_the_split_applies_to_all_files_together(self, files, shares):
        parts = choose_parts(np.array(files), np.arange(len(files)), shares)
        for part, bound in enumerate(list(accumulate(shares))[:-1]):
            assert abs((parts <= part).sum() - len(files) * bound / sum(shares)) < 2
        for file in set(files):  # in the order of the file
            assert sorted(mine := parts[np.array(files) == file].tolist()) == mine

    def test_each_of_several_files_is_split(self):
        parts = choose_parts(np.repeat([0, 1], [10, 20]), np.arange(30), [70, 30])
        assert parts.tolist() == [0] * 7 + [1] * 3 + [0] * 14 + [1] * 6
        parts = choose_parts(np.arange(10), np.arange(10), [70, 30])
        assert (parts == 0).sum() == 7

    @given(equal=st.lists(st.integers(0, 30), min_size=1, max_size=100), shares=shares)
    def test_equal_dialogues_are_in_the_same_part(self, equal, shares):
        parts = choose_parts(np.zeros(len(equal), int), np.array(equal), shares)
        kinds = list(dict.fromkeys(equal))
        of_kinds = choose_parts(np.zeros(len(kinds), int), np.arange(len(kinds)), shares)
        assert parts.tolist() == [of_kinds[kinds.index(kind)] for kind in equal]


class TestTurns:
    @given(turns=st.lists(st.integers(2, 9), min_size=1, max_size=5), shares=shares)
    def test_every_part_gets_turns_if_there_are_enough(self, turns, shares):
        if sum(size // 2 for size in turns) < len(shares):  # too few pieces of two turns
            with pytest.raises(UserError, match=r"too little data for --split x"):
                divide_turns(turns, shares, "--split x")
            return
        divisions = divide_turns(turns, shares, "--split x")
        parts = [part for division in divisions for part in division.parts]
        assert parts == sorted(parts)
        assert set(parts) == set(range(len(shares)))
        for size, (cuts, mine) in zip(turns, divisions, strict=True):
            assert len(mine) == len(cuts) + 1
            assert all(end - start >= 2 for start, end in pairwise([0, *cuts, size]))

    def test_the_cuts_match_the_shares(self):
        assert divide_turns([1000], [70, 30], "") == [([700], [0, 1])]
        assert divide_turns([1000], [80, 10, 10], "") == [([800, 900], [0, 1, 2])]
        assert divide_turns([8], [1] * 4, "") == [([2, 4, 6], [0, 1, 2, 3])]
        assert divide_turns([10] * 5, [80, 10, 10], "") == [([], [0])] * 4 + [([5], [1, 2])]

    @pytest.mark.parametrize("template", TEMPLATES)
    def test_pieces_contain_the_original_turns(self, template, vocabulary):
        turns = tuple(Turn(name, f"é {number}") for number, name in enumerate(("Alex", "Bob", "Bob") * 4))
        first, second = Dialogue(turns, "Once upon a time."), Dialogue(turns[1:3], "")
        whole = Conversations.of(Renderer(load_tokenizer(vocabulary), template), [first, second], "Bob")
        divided, origins = whole.divide({0: [3, 7]})
        assert origins.tolist() == [0, 0, 0, 1]
        assert divided.numbers.tolist() == [1, 1, 1, 2]
        expected = [first._replace(turns=turns[start:end]) for start, end in ((0, 3), (3, 7), (7, 12))]
        assert [divided[number] for number in range(4)] == [*expected, second]
        assert divided.speakers == whole.speakers
        learned = [whole.tokens[whole.learned], divided.tokens[divided.learned]]
        assert abs(len(learned[0]) - len(learned[1])) <= 2  # because of the end-of-text tokens

    def test_copies_are_cut_at_the_same_turns_and_a_part_of_copies_is_refused(self, vocabulary):
        turns = tuple(Turn("AB"[number % 2], f"word {number}") for number in range(10))
        renderer = Renderer(load_tokenizer(vocabulary))
        twice = Conversations.of(renderer, [Dialogue(turns)] * 2)
        split = split_conversations(twice, np.arange(2), [50, 50], "--split 50/50", by_file=True)
        assert [part.tolist() for part in split.parts] == [[0, 2], [1, 3]]
        echo = Conversations.of(renderer, [Dialogue((Turn("A", "hi"), Turn("B", "ho")) * 2)])
        with pytest.raises(UserError, match="only duplicates of another part; add dialogues"):
            split_conversations(echo, np.arange(1), [50, 50], "--split 50/50", by_file=True)


class TestFiles:
    def test_each_file_is_split_and_counted(self, tmp_path):
        (tmp_path / "b.txt").write_text("Ann: one\nCem: two\n\nAnn: three\nCem: four\n\nAnn: five\nCem: six\n")
        write(tmp_path / "a.jsonl", talks(*[2] * 10))
        data = read(tmp_path / "b.txt", tmp_path / "a.jsonl")
        assert data.conversations.files.tolist() == [0] * 3 + [1] * 10
        assert data.conversations.numbers.tolist() == [1, 4, 7, *range(1, 11)]
        assert {name: numbers.tolist() for name, numbers in data.parts.items()} == {
            "train": [0, 1, *range(3, 10)],
            "val": [2, *range(10, 13)],
        }
        assert data.conversations.place_of(1) == f"{tmp_path}/b.txt line 4"
        assert data.notes == ()

    def test_small_files_are_reported(self, tmp_path):
        paths = [write(tmp_path / f"{n}.jsonl", talks(2, start=10 * n)) for n in range(10)]
        data = read(*paths)
        assert [len(part) for part in data.parts.values()] == [7, 3]
        assert "split: 10 of 10 files have too few dialogues for every part" in data.notes[0]

    def test_small_files_fill_the_folds_uncut(self, tmp_path):
        paths = [write(tmp_path / f"{n}.jsonl", talks(5, start=10 * n)) for n in range(10)]
        folds = [read(*paths, folds=9, fold=fold) for fold in range(1, 10)]
        assert all(len(data.conversations) == 10 for data in folds)  # nothing is cut
        held_out = np.concatenate([data.parts["val"] for data in folds])
        assert sorted(held_out.tolist()) == list(range(10))

    def test_all_files_are_shuffled_together(self, tmp_path):
        paths = [write(tmp_path / f"{n}.jsonl", talks(*[2] * 10, start=100 * n)) for n in range(2)]
        data = read(*paths, shuffle=True, seed=3)
        order = np.random.default_rng(3).permutation(20)
        assert np.concatenate(list(data.parts.values())).tolist() == order.tolist()

    @pytest.mark.parametrize("options", [{}, {"shuffle": True}, {"split": "60/20/20"}, {"fold": 2, "folds": 3}])
    def test_no_dialogue_is_in_two_parts(self, tmp_path, options):
        records = talks(*[2] * 12)
        paths = [write(tmp_path / "a.jsonl", records), write(tmp_path / "b.jsonl", records[::-1] + records[:4])]
        data = read(*paths, **options)
        parts = [set(map(tuple, part)) for part in said(data).values()]
        assert sum(map(len, parts)) == len(set.union(*parts)) == 12
        assert sum(map(len, data.parts.values())) == 28

    def test_a_copy_of_a_file_does_not_change_the_split(self, tmp_path):
        records = talks(*[2] * 10)
        data = read(*(write(tmp_path / name, records) for name in ("a.jsonl", "b.jsonl")))
        assert [len(part) for part in data.parts.values()] == [14, 6]


class TestOneLongChat:
    def test_a_single_dialogue_is_cut_between_turns(self, tmp_path):
        data = read(write(tmp_path / "chat.jsonl", talks(40)), split="80/10/10")
        words = [f"word {number}" for number in range(40)]
        assert said(data) == {"train": [words[:32]], "val": [words[32:36]], "test": [words[36:]]}
        assert data.notes == (
            "split: dialogues are cut between turns, because --split 80/10/10 needs more than 1 distinct dialogue:"
            " 1 became 3",
        )

    def test_each_fold_holds_out_a_different_piece(self, tmp_path):
        path = write(tmp_path / "chat.jsonl", talks(12, 2))
        folds = [said(read(path, folds=5, fold=fold)) for fold in range(1, 6)]
        held_out = [piece for each in folds for piece in each["val"]]
        assert [word for piece in held_out for word in piece] == [f"word {number}" for number in range(14)]
        assert all(sorted(each["train"] + each["val"]) == sorted(held_out) for each in folds)

    @pytest.mark.slow
    def test_a_single_dialogue_can_be_trained_on_and_evaluated(self, command, work):
        write(work / "chat.jsonl", talks(30))
        options = ["--data", "chat.jsonl", "--epochs", 1, "--max-new-tokens", 2, "--run-dir", "run"]
        done = command("finetune.py", *options)
        assert done.returncode == 0, done.stderr
        assert "train: 1 dialogue, 21 turns" in done.stdout
        assert "val: 1 dialogue, 9 turns" in done.stdout
        assert done.stdout.count("split: dialogues are cut between turns") == 1
        done = command("evaluate.py", "run", "--base", "none")
        assert done.returncode == 0, done.stderr
        assert "measured on the 1 held out by the run (val)" in done.stdout

    def test_the_error_for_too_few_turns_says_what_to_add(self, command, work):
        write(work / "chat.jsonl", talks(3))
        assert refused(command("finetune.py", "--data", "chat.jsonl")) == (
            "error: chat.jsonl: too little data for --split 70/30: 1 distinct dialogue with 3 turns; each part needs"
            " a dialogue, or 2 turns of a longer one; add dialogues or change the option"
        )


class TestTheCommand:
    @pytest.mark.slow
    def test_several_files_in_several_formats_make_one_run(self, command, work):
        (work / "chats").mkdir()
        lines = [f"[{day:02}.03.24, 10:00] A: hi {day}\n[{day:02}.03.24, 10:01] B: ho\n" for day in range(1, 11)]
        (work / "chats" / "chat_2.txt").write_text("".join(lines))
        (work / "chats" / "chat_10.txt").write_text("A: one\nB: two\n\nA: alone\n\nB: three\nA: four\n")
        (work / "chats" / "photo.jpg").write_bytes(b"\xff\xd8\xff")
        (work / "chats" / "notes.txt").write_text("Milk\nBread\n")
        records = [*talks(*[2] * 8), {"turns": [{"speaker": "A", "text": "x"}]}]
        write(work / "more.jsonl", records)
        options = ["--data", "chats", "--epochs", 1, "--max-new-tokens", 2, "--run-dir", "run", "--data", "more.jsonl"]
        done = command("finetune.py", *options)
        assert done.returncode == 0, done.stderr
        for line in (
            "data: chats/chat_2.txt, chats/chat_10.txt, more.jsonl (chat-export, text, turns), 20 dialogues, 40 turns",
            "  chats/chat_10.txt (text): 2 dialogues, 4 turns",
            "skipped: single turns (2; chats/chat_10.txt line 4, more.jsonl line 9)",
            "not read: chats/notes.txt: no conversation found (the text starts with 'Milk')",
            "not read: images, audio and video (1)",
            "train: 14 dialogues, 28 turns",
        ):
            assert done.stdout.count(line) == 1, line
        ledger = json.loads((work / "run" / "ledger.json").read_text())
        assert [each["dialogues"] for each in ledger["files"]] == [10, 2, 8]
        assert ledger["skipped"]["single turns"]["first"] == ["chats/chat_10.txt line 4", "more.jsonl line 9"]
        recorded = json.loads((work / "run" / "settings.json").read_text())
        assert recorded["data"]["paths"] == [str(work / "chats"), str(work / "more.jsonl")]
        done = command("evaluate.py", "run", "--base", "none")
        assert done.returncode == 0, done.stderr
        assert "measured on the 6 held out by the run" in done.stdout

    def test_a_broken_record_names_its_file(self, command, work):
        write(work / "a.jsonl", talks(*[2] * 5))
        write(work / "b.jsonl", [*talks(2), {"turns": [{"speaker": "A", "text": 5}]}])
        line = refused(command("finetune.py", "--data", "a.jsonl", "b.jsonl"))
        assert line.startswith("error: b.jsonl: line 2: turn 1: the text of 'A' must be a string")

    def test_the_output_may_not_overwrite_the_data(self, command, work):
        for name in ("a", "b"):
            write(work / f"{name}.jsonl", talks(*[2] * 5))
        line = refused(command("finetune.py", "--data", "*.jsonl", "--output", "b.jsonl"))
        assert "--output b.jsonl would overwrite b.jsonl" in line
        assert "no data: give a file, a folder, or - for standard input" in refused(command("finetune.py", "--data"))

    def test_control_characters_in_names_do_not_reach_the_terminal(self, command, work):
        (work / "a.json").write_text(json.dumps([{"A\x1b[31m": f"b{n}", "B": "c"} for n in range(5)]))
        line = refused(command("finetune.py", "--preview", "--data", "a.json"))
        assert "'A\\x1b[31m' is not a speaker's name" in line


@pytest.mark.slow
def test_duplicates_in_two_parts_would_lower_the_validation_loss(tmp_path):
    """A third of the dialogues are copies. Divided in file order, all four that are held out were learned."""
    records = json.loads((PROJECT / "llm_train_text.json").read_text(), object_pairs_hook=list)[:8]
    records = [{"turns": [{"speaker": who, "text": text} for who, text in record]} for record in records]
    data = read(write(tmp_path / "data.jsonl", records + records[1:5]))
    conversations = data.conversations
    apart = {name: numbers.tolist() for name, numbers in data.parts.items()}
    in_order = {"train": list(range(8)), "val": list(range(8, 12))}

    def validation_loss(parts: dict[str, list[int]], folder) -> float:
        train, val = (DialogueDataset(conversations, np.array(parts[name]), 512) for name in ("train", "val"))
        settings = complete(TrainingSettings(), parameters=7_600_000)
        return fit(load_model(TINY)[0], train, val, settings, tmp_path / folder).evaluations[-1][1]

    leaked, honest = validation_loss(in_order, "before"), validation_loss(apart, "after")
    assert leaked < 1.8 < 2.4 < honest
