"""Generate text answers, keep them on disk, and compare them with the true ones.

R runs, Q evaluation rows.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..generate import STOP, generate
from ..scale.decode import decoding_for
from ..tasks import same_answer
from .cells import Cell
from .evaluation import Evaluation


def score_texts(
    e: Evaluation, model: Callable, prompts: list[list[int]], runs: list[str], bar
) -> tuple[list, Tensor]:
    """Greedy responses (ids) of a model's `runs` to the rows, and whether each is right [R, Q].

    All runs answer side by side. The texts of each run are kept.
    """
    store = e.experiment.store
    files = [texts_file(e.cell, run, e.name) for run in runs]
    kept = [store.json(file) for file in files]
    if None in kept:
        generated = generate_texts(e, model, prompts, len(runs), bar)
        kept = [store.keep_json(file, texts) for file, texts in zip(files, generated)]
    responses = [texts["ids"] for texts in kept]
    correct = [parsed_correct(texts) for texts in kept]
    return responses, torch.stack(correct)


def generate_texts(
    e: Evaluation, model: Callable, prompts: list[list[int]], runs: int, bar
) -> list[dict]:
    """Generate the texts of each run, in the form that is kept."""
    decoding = replace(decoding_for(e.model, e.task.max_tokens, STOP), runs=runs)

    def watch(queries: int) -> None:
        bar.update(queries * runs)

    responses = generate(model, e.tokenizer, prompts, decoding, watch)
    answers = [row.answer for row in e.rows]
    kept = []
    for r in range(runs):
        first = r * len(prompts)
        ids = responses[first : first + len(prompts)]
        texts = [e.tokenizer.decode(response) for response in ids]
        kept.append({"texts": texts, "parser": e.task.parser, "ids": ids, "answers": answers})
    return kept


def texts_file(cell: Cell, run: str, name: str) -> str:
    return f"{cell.name}/generations/{run}-on-{name}.json"


def parsed_correct(kept: dict) -> Tensor:
    """Whether each kept text parses to the same value as its true answer, [Q] bool."""
    correct = []
    for text, answer in zip(kept["texts"], kept["answers"]):
        correct.append(same_answer(kept["parser"], text, answer))
    return torch.tensor(correct)


def with_end(e: Evaluation, response: list[int]) -> list[int]:
    """A generated response with the end-of-sequence token, unless it was cut."""
    ended = response + e.tokenizer.closing
    return ended[: e.cell.max_tokens]
