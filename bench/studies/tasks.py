"""The tasks that the studies are made on: toy tasks, relations between words, and sentences with words as labels."""

from dataclasses import replace
from pathlib import Path

from ia2mini import UsageError
from ia2mini.files import json_line, write_text
from ia2mini.tasks import Task, custom_task, find_task

from .fit import CALLED, called, real_rows
from .reopened import RUNS

TASKS = {
    "classification": ("toy-mood", "toy-topic", "toy-mood-flip", "toy-mood-remap"),
    "sums": ("toy-sums", "toy-sums-short"),
    "relations": (),  # the files of a folder
    "words": ("sst2", "ag_news"),  # real rows with words as labels
}
RELATION = "Q: {text}\nA:"  # prompt of a relation's rows
HELD = 100  # of a relation's rows these are evaluation rows
WORD_ROWS = 75  # of each word and each half: to draw sets from, and for evaluation


def tasks_of(part: str, data: Path | None) -> list[Task]:
    """The tasks of a part; relations are the JSONL files with text and answer in `data`/relations."""
    if part == "words":
        return words(data)
    if part != "relations":
        return [find_task(task) for task in TASKS[part]]
    files = sorted((data / "relations").glob("*.jsonl")) if data else []
    if not files:
        raise UsageError(
            "relations: name the folder that holds relations/*.jsonl with --data-dir or $IA2MINI_DATA"
        )
    return [replace(custom_task(file, "text", "answer", RELATION), held_out=HELD) for file in files]


def words(data: Path | None) -> list[Task]:
    """SST2 and AG News with words as labels: as many rows of each label for training as for evaluation."""
    if data is None:
        raise UsageError(
            "words: name the folder that holds sst2/train.jsonl … with --data-dir or $IA2MINI_DATA"
        )
    tasks = []
    for name in TASKS["words"]:
        pool, fresh = [called(rows, name) for rows in real_rows(data, name, WORD_ROWS, draw=0)]
        files = []
        for what, rows in (("train", pool), ("eval", fresh)):
            files.append(RUNS / "words" / f"{name}-{what}.jsonl")
            write_text(files[-1], "".join(json_line(row) + "\n" for row in rows))
        column, label = CALLED[name].values()
        tasks.append(custom_task(files[0], column, label, eval_path=files[1]))
    return tasks
