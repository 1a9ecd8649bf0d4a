"""Batched greedy generation with a key/value cache; rows stop at EOS or at a stop text and leave the batch."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .batch import Watch, by_length, send
from .models.attention import Cache
from .models.taps import Taps
from .scale import ranks as parallel
from .scale.graphs import RECORDERS, CapturedStep
from .tokenizer import Tokenizer

STOP = "\n\n"  # what separates demonstrations
WORTH = 8  # tokens of a response from which on recording its steps pays
PARTS = 4  # bytes of the longest character in UTF-8


@dataclass(frozen=True)
class Decoding:
    """How responses are generated: greedily, at most `max_tokens`, up to EOS or the `stop` text."""

    max_tokens: int
    stop: str | None = STOP
    budget: int = 16384  # tokens of cache that a batch may hold
    layers: list[int] | None = None  # whose attention outputs the observer is told; None: all
    runs: int = 1  # R that the model computes side by side


class Response(NamedTuple):
    """What was generated for a prompt."""

    ids: list[int]  # the answer: without EOS, and cut before the stop text
    generated: list[int]  # every token that was chosen, EOS and those of the stop text too


def generate(
    model: Callable, tokenizer: Tokenizer, prompts: list[list[int]], how: Decoding, watch: Watch = None, observer=None
) -> list[list[int]]:
    """Greedy responses, ids per prompt, without EOS and cut before the stop text; of R runs all prompts, run by run.

    `model` is a model, or a partial around one: with a shared prefix, or what `adapted` yields. When the stop text
    begins inside a token, what stands before it is tokenized again. `observer`, where given, is told every step of a
    single run: which prompts still go on, the token of each, the logits [b, V] it came from and the attention outputs
    [L, b, D] there.
    """
    return [response.ids for response in responses(model, tokenizer, prompts, how, watch, observer)]


def responses(model, tokenizer, prompts: list[list[int]], how: Decoding, watch=None, observer=None) -> list[Response]:
    """As `generate`, with every token that was chosen."""
    groups = by_length([len(p) + how.max_tokens for p in prompts], how.budget // how.runs)
    found = parallel.spread(lambda group: _batch(model, tokenizer, prompts, group, how, observer), groups, watch)
    places = [run * len(prompts) + i for group in groups for run in range(how.runs) for i in group]
    return [response for _, response in sorted(zip(places, sum(found, [])))]


@torch.inference_mode()
def _batch(model, tokenizer, prompts, group: list[int], how: Decoding, observer) -> list[Response]:
    """Responses to the prompts of `group`, run by run. Ended rows leave; where steps are recorded, half at once."""
    network = getattr(model, "func", model)
    weight = network.model.embed_tokens.weight
    device = weight.device
    static = device.type in RECORDERS and how.max_tokens >= WORTH  # steps are recorded
    last = torch.tensor([len(prompts[i]) for i in group], device=device).repeat(how.runs) - 1
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(prompts[i]) for i in group], batch_first=True).to(device)
    ids = ids.repeat(how.runs, 1)
    cache = Cache(network.config, len(ids), ids.shape[1] + how.max_tokens, weight, static)

    def forward(ids: Tensor, last: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits [b, V] and attention outputs [L, b, D] at the `last` of the new tokens [b, T]."""
        at = torch.arange(len(ids), device=device), last
        taps = Taps(at, how.layers) if observer else None
        logits = model(ids, cache=cache, logits=at, taps=taps)
        cache.lengths += last + 1
        return logits, taps.stack() if taps else None

    def decode() -> tuple[Tensor, Tensor | None]:
        logits, outputs = forward(tokens[:, None], torch.zeros_like(tokens))
        tokens.copy_(logits.argmax(-1))
        return logits, outputs

    def recorded() -> Callable:
        return CapturedStep(decode, device) if static else decode

    found = [Response([], []) for _ in ids]
    logits, outputs = forward(ids, last)
    tokens, going, step = logits.argmax(-1), list(enumerate(range(len(ids)))), recorded()
    for left in reversed(range(how.max_tokens)):
        chosen = tokens.tolist()
        if observer:
            live = [row for row, _ in going]
            rows = send(torch.tensor(live), device) if static else slice(None)  # a replay overwrites what it has given
            observer([group[i] for _, i in going], [chosen[row] for row in live], logits[rows], outputs[:, rows])
        going = [(row, i) for row, i in going if not ended(tokenizer, found[i], chosen[row], how.stop)]
        if not going or not left:
            break
        rows = staying([row for row, _ in going], len(tokens), how.runs)
        if len(rows) <= (len(tokens) // 2 if static else len(tokens) - 1):
            places = {row: place for place, row in enumerate(rows)}
            going = [(places[row], i) for row, i in going]
            rows = send(torch.tensor(rows), device)
            cache.keep(rows)
            tokens, step = tokens[rows], recorded()
        logits, outputs = step()
    return found


def staying(going: list[int], rows: int, runs: int) -> list[int]:
    """Which rows stay in a batch: those still going and, in runs with fewer of them, ended ones up to equal numbers."""
    live, size = set(going), rows // runs
    each = [sorted(range(run, run + size), key=lambda row: row not in live) for run in range(0, rows, size)]
    most = max(len(live.intersection(run)) for run in each)
    return [row for run in each for row in run[:most]]


def ended(tokenizer: Tokenizer, response: Response, token: int, stop: str | None) -> bool:
    """Whether `token`, which is added to the response, ends it: it is an EOS, or completes the stop text."""
    response.generated.append(token)
    if token in tokenizer.eos_ids:
        return True
    response.ids.append(token)
    before = before_stop(tokenizer, response.ids, stop) if stop else None
    if before is None:
        return False
    response.ids[:] = before
    return True


def before_stop(tokenizer: Tokenizer, ids: list[int], stop: str) -> list[int] | None:
    """The ids before the stop text if their end has just completed it, else None."""
    decode = partial(tokenizer.decode, special=tokenizer.holds_special(stop))
    if stop not in tail(decode, ids, len(stop)):
        return None
    text = decode(ids)
    place = text.find(stop)
    if place < 0:
        return None
    before = text[:place]
    kept = len(ids)
    while not before.startswith(decode(ids[:kept])):
        kept -= 1
    rest = before[len(decode(ids[:kept])) :]
    return ids[:kept] + tokenizer.encode(rest, special=False)


def tail(decode: Callable, ids: list[int], characters: int) -> str:
    """The end of a text: what the last token says, and at least so many characters before it, where there are any.

    A character may take several tokens, and its last part alone may decode as several unknown ones.
    """
    tokens = characters + 1
    while tokens < len(ids) and len(decode(ids[-tokens:-1])) < characters + PARTS:
        tokens *= 2
    return decode(ids[-tokens:])
