"""The conversation set of the quickstart: generated here, from a seed, in our own words.

Every example is a short question with one right answer of one sentence, so that it can be scored by
exact match. `prose` tells the same kind of thing as plain text; only the student's pretraining reads it.
"""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def _words(text: str) -> list[str]:
    return text.split()


FIRST = _words(
    """
    Ada Ben Cleo Dario Edda Farid Greta Hugo Ines Jonas Kira Lena Milo Nora Omar Petra Quin Rosa
    Sami Tilda Udo Vera Wim Xenia Yara Zeno Anouk Boris Carla Dunja
    """
)
LAST = _words(
    """
    Marsh Tallow Birk Venn Holt Quill Ostra Fenn Lark Moss Reed Stone Thorn Vale Wick Yarrow
    """
)
PLACES = _words(
    """
    Torvale Minnock Eastrill Garrowby Lunden Pellan Quarrick Sarnholm Tiverly Ulmere Wexdale Yorrin
    Brackmoor Cindale Dunfell Elverton
    """
)
JOBS = _words(
    """
    baker carpenter doctor farmer gardener nurse painter pilot sailor singer tailor teacher weaver
    writer
    """
)
THINGS = _words(
    """
    apple basket bell book bottle bowl brush button candle chair clock coin cup drum feather flag
    hammer hat key kite ladder lamp lemon lock map mirror nail needle paddle pear pencil pillow
    plate ring rope saddle shell spoon stamp stone table ticket tile torch towel whistle
    """
)
ANIMALS = _words(
    """
    badger camel donkey eagle falcon goat heron lizard monkey otter panda rabbit salmon tiger turtle
    zebra
    """
)
COLOURS = _words(
    """
    black blue brown green grey pink purple red white yellow
    """
)
DAYS = _words(
    """
    Monday Tuesday Wednesday Thursday Friday Saturday Sunday
    """
)
UNITS = [
    ("hour", "hours", "minutes", 60),
    ("minute", "minutes", "seconds", 60),
    ("day", "days", "hours", 24),
    ("week", "weeks", "days", 7),
    ("year", "years", "months", 12),
    ("metre", "metres", "centimetres", 100),
    ("kilometre", "kilometres", "metres", 1000),
    ("kilogram", "kilograms", "grams", 1000),
    ("foot", "feet", "inches", 12),
    ("yard", "yards", "feet", 3),
]
INSTRUCTION = "Answer in one short sentence."
ORDINALS = ["first", "second", "third", "fourth"]


@dataclass(frozen=True)
class Example:
    """One question, its only right answer, and a passage of prose about the same kind of thing."""

    kind: str
    question: str
    answer: str
    prose: str


Row = tuple[str, str, str]


def _plural(thing: str) -> str:
    return thing + ("es" if thing.endswith(("sh", "ch")) else "s")


def _home(rng: random.Random) -> Row:
    name, place, job = f"{rng.choice(FIRST)} {rng.choice(LAST)}", rng.choice(PLACES), rng.choice(JOBS)
    facts = rng.choice([f"{name} is a {job} in {place}.", f"The {job} {name} comes from {place}."])
    question = f"{facts} Where does {name} live?"
    answer = f"The place is {place}."
    return question, answer, f"{facts} {answer}"


def _job(rng: random.Random) -> Row:
    name, place, job = f"{rng.choice(FIRST)} {rng.choice(LAST)}", rng.choice(PLACES), rng.choice(JOBS)
    facts = rng.choice([f"In {place} {name} works as a {job}.", f"{name} of {place} is a good {job}."])
    answer = f"The job is {job}."
    return f"{facts} What is the job of {name}?", answer, f"{facts} {answer}"


def _gain(rng: random.Random) -> Row:
    name, things, had, more = (
        rng.choice(FIRST),
        _plural(rng.choice(THINGS)),
        rng.randint(2, 12),
        rng.randint(2, 9),
    )
    verb, past = rng.choice([("buys", "bought"), ("finds", "found"), ("gets", "got")])
    question = f"{name} has {had} {things} and {verb} {more} more. How many {things} are there now?"
    answer = f"Now there are {had + more} {things}."
    return question, answer, f"{name} had {had} {things} and {past} {more} more. {answer}"


def _loss(rng: random.Random) -> Row:
    name, things, left, away = (
        rng.choice(FIRST),
        _plural(rng.choice(THINGS)),
        rng.randint(2, 12),
        rng.randint(2, 9),
    )
    verb, past = rng.choice([("loses", "lost"), ("sells", "sold"), ("gives away", "gave away")])
    question = f"{name} has {left + away} {things} and {verb} {away}. How many {things} are left?"
    answer = f"Then {left} {things} are left."
    return question, answer, f"{name} had {left + away} {things} and {past} {away}. {answer}"


def _price(rng: random.Random) -> Row:
    thing, count, price = rng.choice(THINGS), rng.randint(2, 9), rng.randint(2, 12)
    fact = f"One {thing} costs {price} coins."
    question = f"{fact} What do {count} {_plural(thing)} cost?"
    answer = f"They cost {count * price} coins."
    return question, answer, f"{fact} Take {count} {_plural(thing)}. {answer}"


def _convert(rng: random.Random) -> Row:
    (one, big, small, factor), count = rng.choice(UNITS), rng.randint(2, 20)
    question = rng.choice([f"How many {small} are {count} {big}?", f"Convert {count} {big} to {small}."])
    answer = f"That is {count * factor} {small}."
    return question, answer, f"1 {one} is {factor} {small}. Take {count} {big}. {answer}"


def _larger(rng: random.Random) -> Row:
    one, two = rng.sample(range(10, 400), 2)
    word, pick = rng.choice([("larger", max(one, two)), ("smaller", min(one, two))])
    answer = f"The {word} number is {pick}."
    return f"Which number is {word}, {one} or {two}?", answer, f"Look at {one} and {two}. {answer}"


def _oldest(rng: random.Random) -> Row:
    (top, middle, low), word = rng.sample(FIRST, 3), rng.choice(["old", "tall", "fast", "strong"])
    facts = [f"{top} is {word}er than {middle}.", f"{middle} is {word}er than {low}."]
    rng.shuffle(facts)
    question = f"{' '.join(facts)} Who is the {word}est?"
    answer = f"The {word}est is {top}."
    return question, answer, f"{' '.join(facts)} {answer}"


def _item(rng: random.Random) -> Row:
    items, at = rng.sample(THINGS, 4), rng.randrange(4)
    listed = f"{', '.join(items[:3])} and {items[3]}"
    answer = f"The {ORDINALS[at]} is {items[at]}."
    return f"What is the {ORDINALS[at]} of {listed}?", answer, f"Here are {listed}. {answer}"


def _count(rng: random.Random) -> Row:
    items = rng.sample(ANIMALS, rng.randint(2, 6))
    listed = f"{', '.join(items[:-1])} and {items[-1]}"
    answer = f"The list has {len(items)} animals."
    return f"How many animals are in this list: {listed}?", answer, f"Here is a list: {listed}. {answer}"


def _sort(rng: random.Random) -> Row:
    numbers, falling = rng.sample(range(2, 99), 3), rng.random() < 0.5
    order = "from large to small" if falling else "from small to large"
    done = ", ".join(str(n) for n in sorted(numbers, reverse=falling))
    given = ", ".join(str(n) for n in numbers)
    answer = f"Sorted: {done}."
    return f"Sort {given} {order}.", answer, f"Take {given} and go {order}. {answer}"


def _box(rng: random.Random) -> Row:
    colours, things = rng.sample(COLOURS, 2), rng.sample(THINGS, 2)
    owner, pick = rng.choice(FIRST), rng.randrange(2)
    facts = f"{owner} has a {colours[0]} {things[0]} and a {colours[1]} {things[1]}."
    question = f"{facts} What colour is the {things[pick]}?"
    answer = f"The colour is {colours[pick]}."
    return question, answer, f"{facts} Look at the {things[pick]}. {answer}"


def _day(rng: random.Random) -> Row:
    name, start, days = rng.choice(FIRST), rng.randrange(7), rng.randint(1, 6)
    back = DAYS[(start + days) % 7]
    later = f"{days} {'day' if days == 1 else 'days'} later"
    question = f"{name} leaves on {DAYS[start]} and comes back {later}. On which day is that?"
    answer = f"The day is {back}."
    return question, answer, f"{name} left on {DAYS[start]} and came back {later}. {answer}"


def _letters(rng: random.Random) -> Row:
    word = rng.choice(THINGS + ANIMALS + COLOURS + JOBS)
    question, answer = rng.choice(
        [
            (f"How many letters does the word {word} have?", f"It has {len(word)} letters."),
            (f"What is the first letter of the word {word}?", f"The first letter is {word[0]}."),
            (f"What is the last letter of the word {word}?", f"The last letter is {word[-1]}."),
        ]
    )
    return question, answer, f"Look at the word {word}. {answer}"


KINDS: dict[str, Callable[[random.Random], Row]] = {
    "home": _home,
    "job": _job,
    "gain": _gain,
    "loss": _loss,
    "price": _price,
    "convert": _convert,
    "larger": _larger,
    "oldest": _oldest,
    "item": _item,
    "count": _count,
    "sort": _sort,
    "box": _box,
    "day": _day,
    "letters": _letters,
}


def _examples(rng: random.Random) -> Iterator[Example]:
    while True:
        for kind, make in KINDS.items():
            yield Example(kind, *make(rng))


def generate(
    seed: int, *, train: int, validation: int, heldout: int, prose: int, prompts: int = 0
) -> dict[str, list[Example]]:
    """The splits of one seed; all kinds are drawn in turn. `prompts` are questions for a teacher to answer.

    A question is asked once only, whatever the split, and the prose (for pretraining) tells no story that a
    question of another split tells. Same seed, same rows.
    """
    stream = _examples(random.Random(seed))
    asked: set[str] = set()
    splits: dict[str, list[Example]] = {}
    sizes = {"heldout": heldout, "validation": validation, "train": train, "prompts": prompts, "prose": prose}
    for split, size in sizes.items():
        rows: list[Example] = []
        while len(rows) < size:
            row = next(stream)
            if row.question in asked:
                continue
            if split != "prose":
                asked.add(row.question)
            rows.append(row)
        splits[split] = rows
    return splits


def _chat(row: Example, answered: bool) -> dict[str, Any]:
    messages = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": row.question}]
    if answered:
        messages.append({"role": "assistant", "content": row.answer})
    return {"messages": messages, "kind": row.kind}


def write(splits: dict[str, list[Example]], folder: Path) -> None:
    """One JSON line per row: `prose` as plain text, `prompts` as chats without the answer, the others as chats."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        lines = [{"text": row.prose} if split == "prose" else _chat(row, split != "prompts") for row in rows]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
