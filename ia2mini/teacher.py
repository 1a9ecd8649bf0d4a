"""The pass with demonstrations, once a set: answers, attention outputs and distributions (protocol section 3)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import repeat

import torch
from torch import Tensor, nn

from .batch import Row, Watch, by_length, collate, over_groups, truth_row
from .episode import Episode, with_demonstrations
from .generate import STOP, Decoding, DecodingHooks, generate
from .models.taps import Taps, device_of
from .tasks import Example
from .tokenizer import Tokenizer


@dataclass(frozen=True)
class Asked:
    """What the teacher is asked for."""

    max_tokens: int = 1  # 1: the response is the likeliest token; more: greedy, EOS appended
    soft_k: int | None = None  # also the log-probabilities of this many likeliest tokens
    layers: list[int] | None = None  # whose attention outputs are recorded; None: all
    stop: str | None = STOP  # text at which a response ends, besides EOS
    budget: int = 4096  # tokens in one pass (of generation: a quarter of those in the cache)
    residual: bool = False  # also the residual stream after every attention
    hooks: DecodingHooks = DecodingHooks()


@dataclass(frozen=True)
class Taught:
    """A set's rows as ids: with the true answers, and with the teacher's responses and targets."""

    train: list[Row]
    dev: list[Row]
    icl_train: list[Row]
    icl_dev: list[Row]


def teach(
    model: nn.Module, tokenizer: Tokenizer, episode: Episode, asked: Asked = Asked(), watch: Watch = None
) -> Taught:
    """Run the base model on every row of `episode` with its demonstrations; what it does there are the targets.

    The rows keep their prompt without demonstrations, the response with them, activations [L, P, D] in the model's
    dtype, with `residual` states [L, P, D], and with `soft_k` log-probabilities [P, k]. Raises UsageError for an answer
    that merges with its prompt.

        taught = teach(model, tokenizer, draw_episode(examples, n=4))
    """
    n, end = len(episode.train), asked.max_tokens > 1
    truth = [truth_row(example, tokenizer, end) for example in episode.train + episode.dev]
    examples = episode.train + episode.dev + episode.unlabelled
    shown = episode.demonstrations + episode.more_demonstrations
    prompts = [tokenizer.encode(with_demonstrations(d, e.prompt)) for d, e in zip(shown, examples)]
    rows, rest = [Row(tokenizer.encode(e.prompt), [0]) for e in examples], list(range(len(examples)))
    if asked.max_tokens > 1:
        rest, watch = respond(model, tokenizer, rows, prompts, asked, watch), None
    observe(model, [rows[i] for i in rest], [prompts[i] for i in rest], replace(asked, residual=False), watch)
    if asked.residual:
        observe(model, rows, prompts, replace(asked, soft_k=None))
    labelled = len(truth)
    return Taught(truth[:n], truth[n:], rows[:n] + rows[labelled:], rows[n:labelled])


def respond(model, tokenizer, rows: list[Row], prompts: list[list[int]], asked: Asked, watch: Watch) -> list[int]:
    """Fill in the responses of `rows` to their full `prompts`, and the activations and soft targets met on the way.

    Returns the indices of rows that still lack these: a stop text inside a token had them tokenized again.
    """
    steps: list[list[tuple]] = [[] for _ in prompts]

    def observer(live: list[int], tokens: list[int], logits: Tensor, outputs: Tensor) -> None:
        soft = zip(*top(logits, asked.soft_k)) if asked.soft_k else repeat((None, None))
        for i, token, output, (log_probabilities, ids) in zip(live, tokens, outputs.unbind(1), soft):
            steps[i].append((token, output, log_probabilities, ids))

    how, rest = Decoding(asked.max_tokens, asked.stop, 4 * asked.budget, asked.layers, hooks=asked.hooks), []
    for i, (row, response) in enumerate(zip(rows, generate(model, tokenizer, prompts, how, watch, observer))):
        row.answer = (response + tokenizer.closing)[: asked.max_tokens]
        tokens, outputs, *soft = zip(*steps[i][: len(row.answer)])
        if list(tokens[: len(response)]) != response:
            rest.append(i)
            continue
        row.activations = torch.stack(outputs, 1)
        if asked.soft_k:
            row.soft, row.soft_ids = map(torch.stack, soft)
    return rest


def label_tokens_at_most(labels: list[list[int]]) -> int:
    """Tokens of the longest label as a response: those of several tokens end with EOS."""
    longest = max(map(len, labels))
    return longest + (longest > 1)


def answer_tokens_at_most(tokenizer: Tokenizer, examples: list[Example]) -> int:
    """Tokens of the longest answer, with EOS."""
    return 1 + max(len(tokenizer.encode_answer(e.prompt, e.answer, apart=True)) for e in examples)


def top(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the k likeliest tokens and these tokens, [P, k] each, from logits [P, V]."""
    return logits.float().log_softmax(-1).topk(min(k, logits.shape[-1]))


@torch.no_grad()
def observe(model: Callable, rows: list[Row], prompts: list[list[int]], asked: Asked, watch: Watch = None) -> None:
    """Fill in activations, soft targets and a single-token response of `rows` from a pass over their full `prompts`.

    `model` may be a partial that holds a shared prefix; `prompts` are then what follows it. With `asked.residual`
    states in place of activations.
    """
    single = asked.max_tokens == 1

    def seen(group: list[int]) -> list[tuple]:
        batch = collate([[Row(prompts[i], rows[i].answer) for i in group]]).to(device_of(model))
        taps = Taps(batch.at, asked.layers, asked.residual)
        logits = model(batch.ids, taps=taps, logits=batch.at if single or asked.soft_k else False)
        sizes = [len(rows[i].answer) for i in group]
        answers = [[token] for token in logits.argmax(-1).tolist()] if single else [rows[i].answer for i in group]
        soft = [t.split(sizes) for t in top(logits, asked.soft_k)] if asked.soft_k else [repeat(None)] * 2
        return list(zip(answers, taps.stack().split(sizes, dim=1), *soft))

    groups = by_length([len(prompt) + len(row.answer) for prompt, row in zip(prompts, rows)], asked.budget)
    for group, found in zip(groups, over_groups(seen, groups, watch)):
        for i, (answer, outputs, soft, soft_ids) in zip(group, found):
            rows[i].answer = answer
            setattr(rows[i], "states" if asked.residual else "activations", outputs)
            if asked.soft_k:
                rows[i].soft, rows[i].soft_ids = soft, soft_ids
