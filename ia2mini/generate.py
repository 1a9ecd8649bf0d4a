"""Batched greedy generation with a key/value cache; rows stop at EOS or at a stop text and leave the batch."""

from collections.abc import Callable

import torch
from torch import Tensor

from .episode import by_length
from .graphs import RECORDERS, Replayed
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
def _batch(model, tokenizer, prompts, group: list[int], responses, max_tokens, stop, observer, layers) -> None:
    """Write the responses to the prompts of `group`. Rows that have ended leave the cache; where steps are recorded, half of it at once."""
    network = getattr(model, "func", model)
    weight = network.model.embed_tokens.weight
    device, static = weight.device, weight.device.type in RECORDERS
    last = torch.tensor([len(prompts[i]) for i in group], device=device) - 1
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(prompts[i]) for i in group], batch_first=True).to(device)
    cache = Cache(network.config, len(group), ids.shape[1] + max_tokens, weight.dtype, device, static)

    def forward(ids: Tensor, last: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits [b, V] and attention outputs [L, b, D] at the `last` of the new tokens [b, T]."""
        at = torch.arange(len(ids), device=device), last
        taps = Taps(at, layers) if observer else None
        logits = model(ids, cache=cache, logits=at, taps=taps)
        cache.lengths += last + 1
        return logits, taps and taps.stack()

    def decode() -> tuple[Tensor, Tensor | None]:
        logits, outputs = forward(tokens[:, None], torch.zeros_like(tokens))
        tokens.copy_(logits.argmax(-1))
        return logits, outputs

    logits, outputs = forward(ids, last)
    tokens, going, step = logits.argmax(-1), dict(enumerate(group)), Replayed(decode, device)
    for left in reversed(range(max_tokens)):
        chosen = tokens.tolist()
        if observer:
            rows = list(going) if static else slice(None)  # the next step overwrites what a recorded one has given
            observer(list(going.values()), [chosen[row] for row in going], logits[rows], outputs[:, rows])
        for row, i in list(going.items()):
            ended = chosen[row] in tokenizer.eos_ids
            if not ended:
                responses[i].append(chosen[row])
                if stop is not None and (text := before_stop(tokenizer, responses[i], stop)) is not None:
                    responses[i], ended = text, True
            if ended:
                del going[row]
        if not going or not left:
            break
        if len(going) <= (len(tokens) // 2 if static else len(tokens) - 1):
            rows = torch.tensor(list(going), device=device)
            cache.keep(rows)
            tokens, going, step = tokens[rows], dict(enumerate(going.values())), Replayed(decode, device)
        logits, outputs = step()


def before_stop(tokenizer: Tokenizer, ids: list[int], stop: str) -> list[int] | None:
    """The ids before the stop text if their end has just completed it, else None."""
    if stop not in tokenizer.decode(ids[-len(stop) :]):  # a stop of two characters spans at most two tokens
        return None
    text = tokenizer.decode(ids)
    before = text[: text.index(stop)]
    n = next(n for n in range(len(ids), -1, -1) if before.startswith(tokenizer.decode(ids[:n])))
    return ids[:n] + tokenizer.encode(before[len(tokenizer.decode(ids[:n])) :], special=False)
