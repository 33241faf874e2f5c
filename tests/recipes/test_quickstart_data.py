"""The quickstart's conversation set and its scoring: no model is loaded here."""

import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from quickstart.data import DAYS, KINDS, ORDINALS, UNITS, Example, generate, write
from quickstart.measure import answer_tokens, exact_match
from quickstart.rows import GOLD_PER_KIND, first_of_each_kind
from quickstart.rows import read as read_rows
from quickstart.rows import write as write_rows

SIZES = {"train": 504, "validation": 112, "heldout": 168, "prompts": 490, "prose": 1000}


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Example]]:
    return generate(7, **SIZES)


def test_sizes(splits: dict[str, list[Example]]) -> None:
    assert {name: len(rows) for name, rows in splits.items()} == SIZES


def test_same_seed_same_rows_other_seed_other_rows(splits: dict[str, list[Example]]) -> None:
    assert generate(7, **SIZES) == splits
    other = generate(8, **SIZES)["heldout"]
    assert {row.question for row in other} != {row.question for row in splits["heldout"]}


def test_no_question_twice_in_any_split(splits: dict[str, list[Example]]) -> None:
    asked = Counter(row.question for name, rows in splits.items() if name != "prose" for row in rows)
    assert asked.most_common(1)[0][1] == 1


def test_prose_is_not_drawn_from_a_question_of_another_split(splits: dict[str, list[Example]]) -> None:
    asked = {row.question for name, rows in splits.items() if name != "prose" for row in rows}
    assert not asked & {row.question for row in splits["prose"]}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_its_share_of_every_split(splits: dict[str, list[Example]], kind: str) -> None:
    for rows in splits.values():
        share = sum(row.kind == kind for row in rows) * len(KINDS) / len(rows)
        # Kinds with few different questions repeat one sooner; a repeated one is left out.
        assert 0.5 < share < 1.2


def numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def between(text: str, before: str, after: str) -> str:
    return text.split(before, 1)[1].split(after, 1)[0]


def solve(kind: str, question: str) -> str:
    """The right answer, worked out from the question's words alone."""
    words = re.findall(r"\w+", question)
    found = numbers(question)
    if kind == "home":
        return re.search(r"(?:in|from) (\w+)\.", question)[1]
    if kind == "job":
        return between(question, "as a ", ".") if "works as" in question else between(question, "a good ", ".")
    if kind == "gain":
        return str(found[0] + found[1])
    if kind == "loss":
        return str(found[0] - found[1])
    if kind == "price":
        return str(found[0] * found[1])
    if kind == "convert":
        big, small = next((b, s) for _, b, s, _ in UNITS if b in words and s in words)
        return str(found[0] * next(f for _, b, s, f in UNITS if (b, s) == (big, small)))
    if kind == "larger":
        return str(max(found) if "larger" in words else min(found))
    if kind == "oldest":
        pairs = re.findall(r"(\w+) is \w+er than (\w+)", question)
        return ({a for a, _ in pairs} - {b for _, b in pairs}).pop()
    if kind == "item":
        listed = re.split(r", | and ", between(question, " of ", "?"))
        return listed[next(i for i, word in enumerate(ORDINALS) if f"the {word} of" in question)]
    if kind == "count":
        return str(len(re.split(r", | and ", between(question, "list: ", "?"))))
    if kind == "sort":
        return ", ".join(map(str, sorted(found, reverse="from large" in question)))
    if kind == "box":
        thing = between(question, "colour is the ", "?")
        return re.search(rf"(\w+) {thing}\b", question)[1]
    if kind == "day":
        start = next(i for i, day in enumerate(DAYS) if day in words)
        return DAYS[(start + found[0]) % 7]
    word = between(question, "the word ", " have" if "How many" in question else "?")
    return str(len(word)) if "How many" in question else word[0 if "first" in question else -1]


@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_is_right_and_one_sentence(kind: str) -> None:
    rng = random.Random(3)
    for _ in range(200):
        question, answer, _ = KINDS[kind](rng)
        assert re.search(rf"\b{re.escape(solve(kind, question))}\b[^,]*\.$", answer), (question, answer)
        assert answer.count(".") == 1 and answer.endswith(".") and "\n" not in answer


def test_written_rows_are_chats_and_texts(splits: dict[str, list[Example]], tmp_path: Path) -> None:
    write(splits, tmp_path / "data")
    chats = [json.loads(line) for line in (tmp_path / "data/train.jsonl").read_text().splitlines()]
    assert [m["role"] for m in chats[0]["messages"]] == ["system", "user", "assistant"]
    assert [c["messages"][1]["content"] for c in chats] == [row.question for row in splits["train"]]
    texts = [json.loads(line)["text"] for line in (tmp_path / "data/prose.jsonl").read_text().splitlines()]
    assert texts == [row.prose for row in splits["prose"]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    write_rows(folder, seed=7, sizes=SIZES)
    return folder


def questions(file: Path) -> list[str]:
    return [next(m["content"] for m in row["messages"] if m["role"] == "user") for row in read_rows(file)]


def test_gold_rows_are_few_and_equally_many_of_each_kind(files: Path) -> None:
    kinds = Counter(row["kind"] for row in read_rows(files / "gold.jsonl"))
    assert kinds == dict.fromkeys(KINDS, GOLD_PER_KIND) and sum(kinds.values()) == 84


def test_all_gold_rows_hold_the_few_ones(files: Path) -> None:
    few, everything = questions(files / "gold.jsonl"), questions(files / "gold_all.jsonl")
    assert set(few) < set(everything) and len(everything) == 504


def test_prompts_have_no_answer_and_no_question_of_another_file(files: Path) -> None:
    rows = read_rows(files / "prompts.jsonl")
    assert len(rows) == 490
    for row in rows:
        assert [m["role"] for m in row["messages"]] == ["system", "user"]
    asked = set(questions(files / "prompts.jsonl"))
    for other in ("gold_all", "validation", "heldout"):
        assert not asked & set(questions(files / f"{other}.jsonl"))


def test_the_key_answers_the_prompts_in_their_order(files: Path) -> None:
    key = read_rows(files / "prompts_key.jsonl")
    assert questions(files / "prompts_key.jsonl") == questions(files / "prompts.jsonl")
    assert all(row["messages"][-1]["role"] == "assistant" for row in key)


def test_too_few_rows_of_a_kind_are_an_error(splits: dict[str, list[Example]]) -> None:
    with pytest.raises(ValueError, match=r"gold rows: expected 40 of each kind, got fewer of .*home"):
        first_of_each_kind(splits["train"], 40)


@pytest.mark.parametrize(
    ("reply", "gold", "same"),
    [
        ("The oldest is Milo.", "The oldest is Milo.", True),
        (" The oldest  is Milo.\n", "The oldest is Milo.", True),
        ("the oldest is Milo.", "The oldest is Milo.", False),
        ("The oldest is Milo. Really.", "The oldest is Milo.", False),
        ("", "The oldest is Milo.", False),
    ],
)
def test_exact_match(reply: str, gold: str, same: bool) -> None:
    assert exact_match(reply, gold) is same


def test_answer_tokens_cover_the_answer_and_nothing_else() -> None:
    offsets = [(0, 0), (0, 3), (3, 5), (5, 9), (9, 9), (9, 12)]
    assert answer_tokens(offsets, 4, 9) == [2, 3]
    assert answer_tokens(offsets, 9, 12) == [5]
