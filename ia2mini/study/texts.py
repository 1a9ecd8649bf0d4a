"""What models answer in texts: generated, kept on disk, and compared with the base's behind demonstrations.

R runs, S sets, Q evaluation rows, L layers.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..batch import TokenRow
from ..engine.experiment import Experiment
from ..generate import Decoding, generate
from ..models.taps import device_of
from ..scale.decode import fast_decoding
from ..scoring import layer_asim
from ..tasks import same_answer
from .evaluation import Evaluation


def score_texts(
    e: Evaluation, model: Callable, prompts: list[list[int]], runs: list[str], bar
) -> tuple[list, Tensor]:
    """Greedy responses (ids) of a model's `runs` to the rows, and which are right [R, Q].

    All runs answer side by side; each one's texts are kept.
    """
    files = [texts_file(e.x, run, e.name) for run in runs]
    kept = [e.x.store.json(file) for file in files]
    if None in kept:
        kept = generate_texts(e, model, prompts, len(runs), bar)
        kept = [e.x.store.keep_json(file, texts) for file, texts in zip(files, kept)]
    responses = [texts["ids"] for texts in kept]
    return responses, torch.stack(list(map(parsed_correct, kept)))


def generate_texts(
    e: Evaluation, model: Callable, prompts: list[list[int]], runs: int, bar
) -> list[dict]:
    """What is kept of each run's texts."""
    how = Decoding(
        e.task.max_tokens,
        runs=runs,
        budget=4 * e.budget,
        hooks=fast_decoding(device_of(e.model), e.task.max_tokens),
    )

    def watch(queries: int) -> None:
        bar.update(queries * runs)

    responses = generate(model, e.tokenizer, prompts, how, watch)
    answers = [row.answer for row in e.rows]
    kept = []
    for r in range(runs):
        ids = responses[r * len(prompts) : (r + 1) * len(prompts)]
        texts = [e.tokenizer.decode(response) for response in ids]
        kept.append({"texts": texts, "parser": e.task.parser, "ids": ids, "answers": answers})
    return kept


def texts_file(x: Experiment, run: str, name: str) -> str:
    return f"{x.name}/generations/{run}-on-{name}.json"


def parsed_correct(kept: dict) -> Tensor:
    """Whether each of the kept texts parses to the same as its true answer, [Q] bool."""
    parser = kept["parser"]
    pairs = zip(kept["texts"], kept["answers"])
    return torch.tensor([same_answer(parser, text, answer) for text, answer in pairs])


def likeness(e: Evaluation, model: Callable, rows: list[list[TokenRow]], responses: list) -> Tensor:
    """asim of R runs to their set's rows, [R, L]; of one run (the base) to every set's, [S, L].

    As the released scripts have it, on the runs' own responses.
    """
    runs = len(responses)
    if runs == 1:
        compared = rows
        own = responses * len(rows)
    else:
        compared = [rows[r * len(rows) // runs] for r in range(runs)]
        own = responses
    as_scripts = e.options.paper_compat
    if as_scripts:
        compared = [cut_rows(e, mine, texts) for mine, texts in zip(compared, own)]
    return layer_asim(model, compared, e.budget, by_row=as_scripts)


def cut_rows(e: Evaluation, rows: list[TokenRow], responses: list[list[int]]) -> list[TokenRow]:
    """The rows with other responses in place of their own, both cut to the shorter."""
    found = []
    for row, response in zip(rows, responses):
        cut = with_end(e, response)[: len(row.answer)]
        found.append(TokenRow(row.prompt, cut, row.activations[:, : len(cut)]))
    return found


def with_end(e: Evaluation, response: list[int]) -> list[int]:
    """A generated response with the end-of-sequence token, unless it was cut."""
    return (response + e.tokenizer.closing)[: e.cell.max_tokens]
