"""The pass with demonstrations, once a set: what the base model answers, its attention outputs and distributions (protocol section 3)."""

from collections.abc import Callable

import torch
from torch import nn

from .episode import Episode, Row, by_length, collate, with_demonstrations
from .generate import STOP, generate
from .models.common import Taps
from .tokenizer import Tokenizer


def teach(
    model: nn.Module,
    tokenizer: Tokenizer,
    episode: Episode,
    max_tokens: int,
    soft_k: int | None = None,
    layers: list[int] | None = None,
    stop: str | None = STOP,
    budget: int = 8192,
    watch: Callable[[int], None] | None = None,
) -> list[Row]:
    """For each training, then dev row: the row without demonstrations, the response with them, and the targets at its positions.

    `max_tokens` 1: the response is the likeliest token. More: greedy, EOS appended. Activations are [L, P, D] in the model's dtype, of
    `layers` (None: all). With `soft_k`, also the log-probabilities [P, k] of the k likeliest tokens (at most the vocabulary).
    `budget`: tokens in one pass. `watch` is called with the rows of each finished pass.
    """
    examples = episode.train + episode.dev
    queries = [tokenizer.encode(e.prompt) for e in examples]
    prompts = [tokenizer.encode(with_demonstrations(d, e.prompt)) for d, e in zip(episode.demonstrations, examples)]
    if max_tokens == 1:
        responses = [[0] for _ in prompts]  # read off the pass below; the last answer token is never fed
    else:
        eos = list(tokenizer.eos_ids[:1])
        responses = [(r + eos)[:max_tokens] for r in generate(model, tokenizer, prompts, max_tokens, stop)]
    rows = [Row(q, r) for q, r in zip(queries, responses)]
    device = next(model.parameters()).device
    for group in by_length([len(p) + len(r) for p, r in zip(prompts, responses)], budget):
        observe(model, [rows[i] for i in group], [prompts[i] for i in group], max_tokens == 1, soft_k, layers, device)
        if watch:
            watch(len(group))
    return rows


@torch.no_grad()
def observe(
    model: Callable,
    rows: list[Row],
    prompts: list[list[int]],
    single: bool,
    soft_k: int | None = None,
    layers: list[int] | None = None,
    device="cpu",
) -> None:
    """Fill in activations, soft targets and, if `single`, the response of `rows`, from one pass over their full `prompts`.

    `model` may be a partial that holds a shared prefix; `prompts` are then what follows it.
    """
    batch = collate([[Row(prompt, row.answer) for prompt, row in zip(prompts, rows)]], device)
    taps = Taps(batch.at, layers)
    logits = model(batch.ids, taps=taps, logits=batch.at if single or soft_k else False)
    sizes = [len(row.answer) for row in rows]
    for row, activations in zip(rows, taps.stack().split(sizes, dim=1)):
        row.activations = activations
    if single:
        for row, token in zip(rows, logits.argmax(-1).tolist()):
            row.answer = [token]
    if soft_k:
        soft, ids = logits.float().log_softmax(-1).topk(min(soft_k, logits.shape[-1]))
        for row, s, i in zip(rows, soft.split(sizes), ids.split(sizes)):
            row.soft, row.soft_ids = s, i
