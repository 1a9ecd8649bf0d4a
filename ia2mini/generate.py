"""Batched greedy generation with a key/value cache; rows stop at EOS or at a stop text and leave the batch."""

from collections.abc import Callable

import torch

from .episode import by_length
from .models.common import Cache
from .tokenizer import Tokenizer

STOP = "\n\n"  # what separates demonstrations


def generate(
    model: Callable,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    max_tokens: int,
    stop: str | None = STOP,
    budget: int = 16384,
    watch: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Greedy responses, ids per prompt, without EOS and cut before the stop text; at most `max_tokens` long.

    `model` is a model, or a partial around one: with a shared prefix, or what `adapted` yields (of one run). When the stop text
    begins inside a token, what stands before it is tokenized again. `budget`: tokens of cache a batch may hold. `watch` is called
    with the number of rows of each finished batch.
    """
    responses: list[list[int]] = [[] for _ in prompts]
    for group in by_length([len(p) + max_tokens for p in prompts], budget):
        for i, response in zip(group, _batch(model, tokenizer, [prompts[i] for i in group], max_tokens, stop)):
            responses[i] = response
        if watch:
            watch(len(group))
    return responses


@torch.inference_mode()
def _batch(model, tokenizer, prompts, max_tokens, stop) -> list[list[int]]:
    network = getattr(model, "func", model)
    weight = network.model.embed_tokens.weight
    lengths = torch.tensor([len(p) for p in prompts], device=weight.device)
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(p) for p in prompts], batch_first=True).to(weight.device)
    cache = Cache(network.config, len(prompts), ids.shape[1] + max_tokens, weight.dtype, weight.device)
    responses: list[list[int]] = [[] for _ in prompts]
    live = list(range(len(prompts)))  # the row of `prompts` in each row of the cache
    logits = model(ids, cache=cache, logits=(torch.arange(len(prompts), device=weight.device), lengths - 1))
    cache.lengths += lengths
    for step in range(max_tokens):
        tokens = logits.argmax(-1)
        staying = []
        for row, (i, token) in enumerate(zip(live, tokens.tolist())):
            if token in tokenizer.eos_ids:
                continue
            responses[i].append(token)
            if stop is not None and (text := before_stop(tokenizer, responses[i], stop)) is not None:
                responses[i] = text
            elif step + 1 < max_tokens:
                staying.append(row)
        if not staying:
            break
        if len(staying) < len(live):
            live = [live[row] for row in staying]
            rows = torch.tensor(staying, device=weight.device)
            cache.keep(rows)
            tokens = tokens[rows]
        logits = model(tokens[:, None], cache=cache)[:, -1]
        cache.lengths += 1
    return responses


def before_stop(tokenizer: Tokenizer, ids: list[int], stop: str) -> list[int] | None:
    """The ids before the stop text if their end has just completed it, else None."""
    if stop not in tokenizer.decode(ids[-len(stop) :]):  # a stop of two characters spans at most two tokens
        return None
    text = tokenizer.decode(ids)
    before = text[: text.index(stop)]
    n = next(n for n in range(len(ids), -1, -1) if before.startswith(tokenizer.decode(ids[:n])))
    return ids[:n] + tokenizer.encode(before[len(tokenizer.decode(ids[:n])) :], special=False)
