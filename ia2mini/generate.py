"""Batched greedy generation with a key/value cache; a row ends at EOS or at a stop text."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .batch import Watch, by_length, send
from .models.attention import Cache
from .models.taps import Taps, network_of
from .tokenizer import Tokenizer

STOP = "\n\n"  # what separates demonstrations
PARTS = 4  # bytes of the longest character in UTF-8


def as_it_is(function: Callable) -> Callable:
    return function


def everyone_stays(going: list[bool], runs: int) -> list[int] | None:
    return None


@dataclass(frozen=True)
class DecodingHooks:
    """Where scale/ hooks into decoding; a notebook needs none of it."""

    # is given the step that chooses a token, e.g. to record it as a CUDA graph
    wrap: Callable[[Callable], Callable] = as_it_is
    # whether the cache keeps its shape from the second token on: what a recorded step needs
    static: bool = False
    # (whether each row goes on, runs) -> indices of the rows that stay in the batch; None: all
    who_stays: Callable[[list[bool], int], list[int] | None] = everyone_stays


@dataclass(frozen=True)
class Decoding:
    """How responses are generated: greedily, at most `max_tokens`, up to EOS or the `stop` text."""

    max_tokens: int
    stop: str | None = STOP
    budget: int = 16384  # tokens of cache that a batch may hold
    layers: list[int] | None = None  # whose attention outputs the observer is told; None: all
    runs: int = 1  # R that the model computes side by side
    hooks: DecodingHooks = DecodingHooks()


class Response(NamedTuple):
    """What was generated for a prompt."""

    ids: list[int]  # the answer: without EOS, and cut before the stop text
    generated: list[int]  # every token that was chosen, EOS and those of the stop text too


def generate(
    model: Callable,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    how: Decoding,
    watch: Watch = None,
    observer=None,
) -> list[list[int]]:
    """Greedy responses, ids per prompt, without EOS and cut before the stop text; with R runs, R lists end to end.

    `model` is a model, or a partial around one: with a shared prefix, or what `adapted` yields. When the stop text
    begins inside a token, what stands before it is tokenized again. `observer`, where given, is told every step of a
    single run: which prompts still go on, the token of each, the logits [b, V] it came from and the attention outputs
    [L, b, D] there.
    """
    return [response.ids for response in responses(model, tokenizer, prompts, how, watch, observer)]


def responses(
    model, tokenizer, prompts: list[list[int]], how: Decoding, watch=None, observer=None
) -> list[Response]:
    """As `generate`, with every token that was chosen."""
    lengths = [len(prompt) + how.max_tokens for prompt in prompts]
    found = [Response([], [])] * (how.runs * len(prompts))
    for group in by_length(lengths, how.budget // how.runs):
        decoded = iter(decode_group(model, tokenizer, prompts, group, how, observer))
        for run in range(how.runs):
            for i in group:
                found[run * len(prompts) + i] = next(decoded)
        if watch:
            watch(len(group))
    return found


@torch.inference_mode()
def decode_group(
    model, tokenizer, prompts, group: list[int], how: Decoding, observer=None
) -> list[Response]:
    """Responses to the prompts of `group`, run by run: each step appends the likeliest token to every row."""
    network = network_of(model)
    weight = network.model.embed_tokens.weight
    device = weight.device
    some = [torch.tensor(prompts[i]) for i in group]
    lengths = torch.tensor(list(map(len, some)), device=device)
    last = (lengths - 1).repeat(how.runs)
    ids = pad_sequence(some, batch_first=True).to(device)
    ids = ids.repeat(how.runs, 1)
    capacity = ids.shape[1] + how.max_tokens
    cache = Cache(network.config, len(ids), capacity, weight, how.hooks.static)

    def forward(ids: Tensor, last: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits [b, V] and attention outputs [L, b, D] at the `last` of the new tokens [b, T]."""
        at = torch.arange(len(ids), device=device), last
        taps = Taps(at, how.layers) if observer else None
        logits = model(ids, cache=cache, logits=at, taps=taps)
        cache.lengths += last + 1
        outputs = taps.stack() if taps else None
        return logits, outputs

    def step() -> tuple[Tensor, Tensor | None]:
        """Append `tokens`, and put the next ones in their place."""
        logits, outputs = forward(tokens[:, None], torch.zeros_like(tokens))
        tokens.copy_(logits.argmax(-1))
        return logits, outputs

    found = [Response([], []) for _ in ids]
    rows = list(range(len(ids)))  # which response each row of the batch is
    going = [True] * len(ids)
    logits, outputs = forward(ids, last)
    tokens = logits.argmax(-1)
    next_step = how.hooks.wrap(step)
    for left in reversed(range(how.max_tokens)):
        chosen = tokens.tolist()
        live = [place for place, goes_on in enumerate(going) if goes_on]
        if observer:
            # indexing copies: the next replay of a CUDA graph overwrites `logits` and `outputs`
            here = send(torch.tensor(live), device)
            numbers = [group[rows[place]] for place in live]
            observer(numbers, [chosen[place] for place in live], logits[here], outputs[:, here])
        for place in live:
            going[place] = not ended(tokenizer, found[rows[place]], chosen[place], how.stop)
        if not any(going) or not left:
            break
        staying = how.hooks.who_stays(going, how.runs)
        if staying is not None:
            rows = [rows[place] for place in staying]
            going = [going[place] for place in staying]
            kept = send(torch.tensor(staying), device)
            cache.keep(kept)
            tokens = tokens[kept]
            next_step = how.hooks.wrap(step)
        logits, outputs = next_step()
    return found


def ended(tokenizer: Tokenizer, response: Response, token: int, stop: str | None) -> bool:
    """Add `token` to the response, and return whether it ends there: it is an EOS, or completes the stop text."""
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
    found = ids[:kept] + tokenizer.encode(rest, special=False)
    if decode(found) == before:
        return found
    # SentencePiece puts a blank before a text that stands alone: `rest` is cut out of the whole
    whole = tokenizer.encode(before, special=False)
    beginning = tokenizer.encode(decode(ids[:kept]), special=False)
    while whole[: len(beginning)] != beginning:
        kept -= 1
        beginning = tokenizer.encode(decode(ids[:kept]), special=False)
    return ids[:kept] + whole[len(beginning) :]


def tail(decode: Callable, ids: list[int], characters: int) -> str:
    """The end of a text: its last token, and at least `characters` characters before it, if there are that many.

    A character may be split over tokens, and a part of one may decode as up to `PARTS` replacement characters.
    """
    tokens = characters + 1
    while tokens < len(ids):
        before = decode(ids[-tokens:-1])
        if len(before) >= characters + PARTS:
            break
        tokens *= 2
    return decode(ids[-tokens:])
