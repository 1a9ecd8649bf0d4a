"""The pass with demonstrations, once a set: what the base model answers, its attention outputs and distributions (protocol section 3)."""

from collections.abc import Callable
from itertools import repeat

import torch
from torch import Tensor, nn

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
    budget: int = 4096,
    watch: Callable[[int], None] | None = None,
) -> list[Row]:
    """For each training, then dev row: the row without demonstrations, the response with them, and the targets at its positions.

    `max_tokens` 1: the response is the likeliest token. More: greedy, EOS appended. Activations are [L, P, D] in the model's dtype, of
    `layers` (None: all). With `soft_k`, also the log-probabilities [P, k] of the k likeliest tokens (at most the vocabulary).
    `budget`: tokens in one pass (of generation: a quarter of those in the cache). `watch` is called with the rows of each finished pass.
    """
    examples = episode.train + episode.dev
    prompts = [tokenizer.encode(with_demonstrations(d, e.prompt)) for d, e in zip(episode.demonstrations, examples)]
    rows, rest = [Row(tokenizer.encode(e.prompt), [0]) for e in examples], list(range(len(examples)))
    if max_tokens > 1:
        rest = respond(model, tokenizer, rows, prompts, max_tokens, soft_k, layers, stop, budget, watch)
    device, watch = (
        next(model.parameters()).device,
        watch if max_tokens == 1 else None,
    )  # generated rows were counted there
    observe(
        model,
        [rows[i] for i in rest],
        [prompts[i] for i in rest],
        max_tokens == 1,
        soft_k,
        layers,
        device,
        budget,
        watch,
    )
    return rows


def respond(
    model, tokenizer, rows: list[Row], prompts: list[list[int]], max_tokens, soft_k, layers, stop, budget, watch
) -> list[int]:
    """Fill in the responses of `rows` to their full `prompts`, and the activations and soft targets met on the way, as `teach` is asked.

    Returns the indices of rows that still lack these: the stop text began inside a token, so that the response was tokenized again.
    """
    steps: list[list[tuple]] = [[] for _ in prompts]

    def observer(live: list[int], tokens: list[int], logits: Tensor, outputs: Tensor) -> None:
        soft = zip(*top(logits, soft_k)) if soft_k else repeat((None, None))
        for i, token, output, (log_probabilities, ids) in zip(live, tokens, outputs.unbind(1), soft):
            steps[i].append((token, output, log_probabilities, ids))

    responses, rest = generate(model, tokenizer, prompts, max_tokens, stop, 4 * budget, watch, observer, layers), []
    for i, (row, response) in enumerate(zip(rows, responses)):
        row.answer = (response + list(tokenizer.eos_ids[:1]))[:max_tokens]
        tokens, outputs, *soft = zip(*steps[i][: len(row.answer)])
        if list(tokens[: len(response)]) != response:
            rest.append(i)
            continue
        row.activations = torch.stack(outputs, 1)
        if soft_k:
            row.soft, row.soft_ids = map(torch.stack, soft)
    return rest


def top(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the k likeliest tokens and these tokens, [P, k] each, from logits [P, V]."""
    return logits.float().log_softmax(-1).topk(min(k, logits.shape[-1]))


@torch.no_grad()
def observe(
    model: Callable,
    rows: list[Row],
    prompts: list[list[int]],
    single: bool,
    soft_k: int | None = None,
    layers: list[int] | None = None,
    device="cpu",
    budget: int = 4096,
    watch: Callable[[int], None] | None = None,
) -> None:
    """Fill in activations, soft targets and, if `single`, the response of `rows`, from a pass over their full `prompts`.

    `model` may be a partial that holds a shared prefix; `prompts` are then what follows it. `budget`: tokens in one pass. `watch` is
    called with the rows of each finished pass.
    """
    for group in by_length([len(prompt) + len(row.answer) for prompt, row in zip(prompts, rows)], budget):
        here = [rows[i] for i in group]
        batch = collate([[Row(prompts[i], rows[i].answer) for i in group]], device)
        taps = Taps(batch.at, layers)
        logits = model(batch.ids, taps=taps, logits=batch.at if single or soft_k else False)
        sizes = [len(row.answer) for row in here]
        for row, activations in zip(here, taps.stack().split(sizes, dim=1)):
            row.activations = activations
        if single:
            for row, token in zip(here, logits.argmax(-1).tolist()):
                row.answer = [token]
        if soft_k:
            for row, s, i in zip(here, *(t.split(sizes) for t in top(logits, soft_k))):
                row.soft, row.soft_ids = s, i
        if watch:
            watch(len(group))
