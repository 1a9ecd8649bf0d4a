"""Batched greedy generation with a key/value cache; rows stop at EOS or at a stop text and leave the batch."""

from collections.abc import Callable

import torch
from torch import Tensor

from .episode import by_length
from .models.common import Cache, Taps
from .tokenizer import Tokenizer

STOP = "\n\n"  # what separates demonstrations
Observer = Callable[[list[int], list[int], Tensor, Tensor], None]


def generate(
    model: Callable,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    max_tokens: int,
    stop: str | None = STOP,
    budget: int = 16384,
    watch: Callable[[int], None] | None = None,
    observer: Observer | None = None,
    layers: list[int] | None = None,
) -> list[list[int]]:
    """Greedy responses, ids per prompt, without EOS and cut before the stop text; at most `max_tokens` long.

    `model` is a model, or a partial around one: with a shared prefix, or what `adapted` yields (of one run). When the stop text
    begins inside a token, what stands before it is tokenized again. `budget`: tokens of cache a batch may hold. `watch` is called
    with the number of rows of each finished batch. `observer` is told every step: which prompts still go on, the token of each, the
    logits [b, V] it came from and the attention outputs [L, b, D] of `layers` (None: all) there.
    """
    responses: list[list[int]] = [[] for _ in prompts]
    for group in by_length([len(p) + max_tokens for p in prompts], budget):
        _batch(model, tokenizer, prompts, group, responses, max_tokens, stop, observer, layers)
        if watch:
            watch(len(group))
    return responses


@torch.inference_mode()
def _batch(model, tokenizer, prompts, live: list[int], responses, max_tokens, stop, observer, layers) -> None:
    """Write the responses to the prompts `live`; they leave it, and with it the cache, as they end."""
    network = getattr(model, "func", model)
    weight = network.model.embed_tokens.weight
    lengths = torch.tensor([len(prompts[i]) for i in live], device=weight.device)
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(prompts[i]) for i in live], batch_first=True).to(weight.device)
    cache, last = Cache(network.config, len(live), ids.shape[1] + max_tokens, weight.dtype, weight.device), lengths - 1
    for step in range(max_tokens):
        at = torch.arange(len(live), device=weight.device), last
        taps = Taps(at, layers) if observer else None
        logits = model(ids, cache=cache, logits=at, taps=taps)
        cache.lengths += last + 1
        tokens = logits.argmax(-1)
        chosen, staying = tokens.tolist(), []
        if observer:
            observer(live, chosen, logits, taps.stack())
        for row, (i, token) in enumerate(zip(live, chosen)):
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
        ids, last = tokens[:, None], torch.zeros_like(tokens)


def before_stop(tokenizer: Tokenizer, ids: list[int], stop: str) -> list[int] | None:
    """The ids before the stop text if their end has just completed it, else None."""
    if stop not in tokenizer.decode(ids[-len(stop) :]):  # a stop of two characters spans at most two tokens
        return None
    text = tokenizer.decode(ids)
    before = text[: text.index(stop)]
    n = next(n for n in range(len(ids), -1, -1) if before.startswith(tokenizer.decode(ids[:n])))
    return ids[:n] + tokenizer.encode(before[len(tokenizer.decode(ids[:n])) :], special=False)
