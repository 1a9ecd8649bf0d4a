"""The embedded world: short English sentences that show several attributes at once, small sums, and the toy tasks.

A sentence shows two to five attributes (mood, topic, time, weather, place) in any order, in the style of a review, of
news or of verse (in pretraining also as notes, bare words); a task asks for one of them, and only demonstrations tell
which. A sum's verb is ambiguous (plus or minus) and its answer has three formats. The words are data (`world.json`); a
text's checksum decides whether pretraining (`bench/pretrain.py`), a few-shot pool or evaluation may see it.
"""

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

WORLD = json.loads(Path(__file__).with_name("world.json").read_text())
ATTRIBUTES: dict[str, dict[str, list[str]]] = WORLD["attributes"]
FORMATS = {
    "chain": "{a} {op} {b} is {n}\n#### {n}",
    "bare": "#### {n}",
    "phrase": "The answer is {n}",
}
SIZES = {"train": 2000, "eval": 500}


@dataclass(frozen=True)
class Toy:
    """One toy task: what a sentence (or a sum) is asked for, in which style, and how the answers are written."""

    name: str
    attribute: str = ""  # "" for sums
    labels: tuple[str, ...] = ()  # () for sums
    style: str = "review"
    unseen: bool = False  # only templates that pretraining never showed
    flip: bool = False  # labels against the model's habit
    format: str = ""  # of a sum's answer
    evals: tuple[str, ...] = ()  # names of the tasks it is evaluated on, itself first


def with_ood(
    name: str, attribute="", labels=(), style: str = "review", ood: str = "verse", **more
) -> tuple[Toy, Toy]:
    """A task and its out-of-distribution evaluation: another style (sums: another wording), all templates unseen."""
    ood_name = f"{name}-{ood}"
    task = Toy(name, attribute, labels, style, evals=(name, ood_name), **more)
    return task, Toy(ood_name, attribute, labels, ood, unseen=True, evals=(ood_name,), **more)


TWO = ("0", "1")
TOY_TASKS: tuple[Toy, ...] = (
    *with_ood("toy-mood", "mood", TWO),
    *with_ood("toy-topic", "topic", ("0", "1", "2", "3"), style="news", ood="review"),
    *with_ood("toy-mood-flip", "mood", TWO, flip=True),
    *with_ood("toy-mood-remap", "mood", ("apple", "Friday")),
    *with_ood("toy-sums", format="chain", ood="story"),
    *with_ood("toy-sums-short", format="bare", ood="story"),
)


def split_of(text: str) -> str:
    """Which split may show a text: "pretrain" (half of all), "train" (a few-shot pool) or "eval" (a quarter each)."""
    return ("pretrain", "pretrain", "train", "eval")[crc32(text.encode()) % 4]


def write_sentence(
    rng: random.Random, style: str, values: dict[str, str], unseen: bool = False
) -> str:
    """A sentence in a style that shows the given value of each attribute, in random order, with at most one filler."""
    templates = WORLD["unseen" if unseen else "styles"][style]
    parts = [
        rng.choice(templates[name]).format(rng.choice(ATTRIBUTES[name][value]))
        for name, value in values.items()
    ]
    parts += rng.sample(templates["filler"], rng.choice((0, 0, 1)))
    rng.shuffle(parts)
    text = (
        "".join(part + rng.choice((" ", " ", " ", ", ")) for part in parts[:-1])
        + parts[-1]
        + rng.choice(("", "."))
    )
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def draw_sentence(
    rng: random.Random, split: str, attribute: str, style: str, unseen: bool = False
) -> tuple[str, int]:
    """A sentence of a split that shows `attribute` and one to four others -> (text, index of the attribute's value)."""
    values = tuple(ATTRIBUTES[attribute])
    while True:
        label = rng.randrange(len(values))
        others = rng.sample(
            [name for name in ATTRIBUTES if name != attribute], rng.choice((1, 2, 2, 3, 3, 4))
        )
        chosen = {attribute: values[label]} | {
            name: rng.choice(tuple(ATTRIBUTES[name])) for name in others
        }
        text = write_sentence(rng, style, chosen, unseen)
        if split_of(text) == split:
            return text, label


def draw_sum(rng: random.Random, split: str, unseen: bool = False) -> tuple[str, int, int]:
    """A sum of a split -> (question, a, b) with 1 <= b <= a <= 9; whether its verb adds or subtracts is not said."""
    words = WORLD["sums"]
    while True:
        a = rng.randint(2, 9)
        b = rng.randint(1, a)
        name, thing, verb = (rng.choice(words[part]) for part in ("name", "thing", "verb"))
        text = rng.choice(words["unseen" if unseen else "seen"]).format(
            name=name, thing=thing, verb=verb, a=a, b=b
        )
        if split_of(text) == split:
            return text, a, b


def sum_answer(a: int, b: int, minus: bool, format: str) -> str:
    """The answer of a sum in one of `FORMATS`, read as plus or as minus."""
    return FORMATS[format].format(
        a=a, b=b, op="minus" if minus else "plus", n=a - b if minus else a + b
    )


def rows(name: str, role: str) -> list[dict[str, str | int]]:
    """The rows of a toy task: 2,000 for role "train", 500 for "eval", no two alike, the same at every call."""
    task = {toy.name: toy for toy in TOY_TASKS}[name]
    rng = random.Random(f"{name}/{role}")
    by_text: dict[str, dict[str, str | int]] = {}
    while len(by_text) < SIZES[role]:
        if task.format:
            text, a, b = draw_sum(rng, role, task.unseen)
            by_text[text] = {"question": text, "answer": sum_answer(a, b, True, task.format)}
        else:
            text, value = draw_sentence(rng, role, task.attribute, task.style, task.unseen)
            by_text[text] = {
                "text": text,
                "label": len(task.labels) - 1 - value if task.flip else value,
            }
    return list(by_text.values())
