"""The pass with demonstrations, once a set: answers, attention outputs and distributions (protocol section 3)."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from . import UsageError
from .batch import TokenRow, Watch, by_length, collate, truth_row
from .episode import Episode, with_demonstrations
from .generate import STOP, Decoding, DecodingHooks, generate
from .models.taps import Taps, device_of
from .prefix import share_prefix
from .tasks import Example
from .tokenizer import Tokenizer

SHARED = 4  # demonstrations that at least this many rows have in common are computed only once


@dataclass(frozen=True)
class Asked:
    """What the teacher is asked for."""

    max_tokens: int = 1  # 1: the response is the likeliest token; more: greedy, EOS appended
    soft_k: int | None = None  # also the log-probabilities of this many likeliest tokens
    layers: list[int] | None = None  # whose attention outputs are recorded; None: all
    stop: str | None = STOP  # text at which a response ends, besides EOS
    budget: int = 4096  # tokens in one pass; four times as many in a cache while generating
    residual: bool = False  # also the residual stream after every attention
    behind: bool = False  # also the rows with their true answers behind the demonstrations
    hooks: DecodingHooks = DecodingHooks()


@dataclass(frozen=True)
class Taught:
    """A set's rows as ids: with the true answers, and with the teacher's responses and targets."""

    train: list[TokenRow]
    dev: list[TokenRow]
    icl_train: list[TokenRow]
    icl_dev: list[TokenRow]
    # with the true answers, and demonstrations in the prompt
    behind_train: list[TokenRow] = field(default_factory=list)
    behind_dev: list[TokenRow] = field(default_factory=list)


def true_rows(tokenizer: Tokenizer, episode: Episode, end: bool, behind: bool = False) -> Taught:
    """A set's rows with their true answers, which need no teacher; `behind`: also behind their demonstrations.

    `end` appends EOS to the answers. Raises UsageError for an answer that merges with its prompt.
    """
    examples = episode.train + episode.dev
    rows = [truth_row(example, tokenizer, end) for example in examples]
    demonstrated = []
    if behind:
        for example, shown in zip(examples, episode.demonstrations):
            prompt = with_demonstrations(shown, example.prompt)
            demonstrated.append(truth_row(replace(example, prompt=prompt), tokenizer, end))
    n = len(episode.train)
    return Taught(rows[:n], rows[n:], [], [], demonstrated[:n], demonstrated[n:])


def teach(
    model: nn.Module,
    tokenizer: Tokenizer,
    episode: Episode,
    asked: Asked = Asked(),
    watch: Watch = None,
) -> Taught:
    """Run the base model on every row of `episode` with its demonstrations; what it does there are the targets.

    The rows keep their prompt without demonstrations, the response with them, activations [L, P, D] in the model's
    dtype, with `residual` states [L, P, D], and with `soft_k` log-probabilities [P, k]. Raises UsageError for an answer
    that merges with its prompt.

        taught = teach(model, tokenizer, draw_episode(examples, n=4))
    """
    of_text = asked.max_tokens > 1
    true = true_rows(tokenizer, episode, of_text, asked.behind)
    examples = episode.train + episode.dev + episode.unlabelled
    shown = episode.demonstrations + episode.more_demonstrations
    rows = [TokenRow(tokenizer.encode(example.prompt), [0]) for example in examples]
    for student, numbers, prompts in passes(model, tokenizer, examples, shown):
        ask(student, tokenizer, [rows[i] for i in numbers], prompts, asked, watch)
    n = len(episode.train)
    labelled = n + len(episode.dev)
    return replace(true, icl_train=rows[:n] + rows[labelled:], icl_dev=rows[n:labelled])


def passes(
    model: nn.Module, tokenizer: Tokenizer, examples: list[Example], shown: list[list[Example]]
) -> Iterator[tuple[Callable, list[int], list[list[int]]]]:
    """A model, the indices of rows and their prompts for it, until every row has had its turn.

    Where `SHARED` rows or more have the same demonstrations, the model has read these already.
    """
    groups = defaultdict(list)
    for i, demonstrations in enumerate(shown):
        groups[tuple(demonstrations)].append(i)
    alone = []
    for numbers in groups.values():
        if len(numbers) < SHARED:
            alone += numbers
            continue
        queries = [examples[i].prompt for i in numbers]
        student, prompts = share_prefix(model, tokenizer, [shown[numbers[0]]], queries)
        yield student, numbers, prompts
    if alone:
        alone.sort()
        texts = [with_demonstrations(shown[i], examples[i].prompt) for i in alone]
        yield model, alone, tokenizer.encode_all(texts)


def ask(
    model: Callable,
    tokenizer: Tokenizer,
    rows: list[TokenRow],
    prompts: list[list[int]],
    asked: Asked,
    watch: Watch,
) -> None:
    """Fill in what is asked for of `rows`, from their prompts with demonstrations."""
    missing = list(range(len(rows)))
    if asked.max_tokens > 1:
        missing = respond(model, tokenizer, rows, prompts, asked, watch)
        watch = None  # it has heard of every row
    attention = replace(asked, residual=False)
    observe(model, [rows[i] for i in missing], [prompts[i] for i in missing], attention, watch)
    if asked.residual:
        observe(model, rows, prompts, replace(asked, soft_k=None))


@dataclass
class Step:
    """What was seen where one token of a response was chosen."""

    token: int
    output: Tensor  # [L, D] attention outputs
    soft: Tensor | None = None  # [k] log-probabilities of the likeliest tokens
    soft_ids: Tensor | None = None  # [k] these tokens


def respond(
    model, tokenizer, rows: list[TokenRow], prompts: list[list[int]], asked: Asked, watch: Watch
) -> list[int]:
    """Fill in the responses of `rows` to their full `prompts`, and the activations and soft targets met on the way.

    Returns the indices of rows that still lack activations and soft targets: a stop text began inside a token, so the
    response was tokenized again and its tokens are not those that were generated.
    """
    steps: list[list[Step]] = [[] for _ in prompts]

    def observer(numbers: list[int], tokens: list[int], logits: Tensor, outputs: Tensor) -> None:
        """Keep what prompts `numbers` show: logits [b, V] and outputs [L, b, D] where `tokens` were chosen."""
        seen = [Step(token, output) for token, output in zip(tokens, outputs.unbind(1))]
        if asked.soft_k:
            for step, soft, ids in zip(seen, *top(logits, asked.soft_k)):
                step.soft = soft
                step.soft_ids = ids
        for number, step in zip(numbers, seen):
            steps[number].append(step)

    how = Decoding(asked.max_tokens, asked.stop, 4 * asked.budget, asked.layers, hooks=asked.hooks)
    missing = []
    for i, response in enumerate(generate(model, tokenizer, prompts, how, watch, observer)):
        row = rows[i]
        row.answer = (response + tokenizer.closing)[: asked.max_tokens]
        if not row.answer:
            asked_for = tokenizer.decode(row.prompt)[-60:]
            lack = (
                "the checkpoint's config.json names no eos_token_id that would end it; add it there"
            )
            raise UsageError(f"the model's answer to {asked_for!r} is empty, and {lack}")
        seen = steps[i][: len(row.answer)]
        if [step.token for step in seen[: len(response)]] != response:
            missing.append(i)
            continue
        row.activations = torch.stack([step.output for step in seen], 1)
        if asked.soft_k:
            row.soft = torch.stack([step.soft for step in seen])
            row.soft_ids = torch.stack([step.soft_ids for step in seen])
    return missing


def label_tokens_at_most(labels: list[list[int]]) -> int:
    """Tokens that a response needs for the longest label, with EOS if any label has several tokens."""
    longest = max(map(len, labels))
    return longest + 1 if longest > 1 else 1


def answer_tokens_at_most(tokenizer: Tokenizer, examples: list[Example]) -> int:
    """Tokens of the longest answer, with EOS."""
    longest = 0
    for example in examples:
        ids = tokenizer.encode_answer(example.prompt, example.answer, apart=True)
        longest = max(longest, len(ids))
    return 1 + longest


def top(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the k likeliest tokens and these tokens, [P, k] each, from logits [P, V]."""
    return logits.float().log_softmax(-1).topk(min(k, logits.shape[-1]))


@torch.no_grad()
def observe(
    model: Callable,
    rows: list[TokenRow],
    prompts: list[list[int]],
    asked: Asked,
    watch: Watch = None,
) -> None:
    """Fill in activations, soft targets and a single-token response of `rows` from a pass over their full `prompts`.

    `model` may be a partial that holds a shared prefix; `prompts` are then what follows it. With `asked.residual` it
    fills in `states` in place of `activations`.
    """
    lengths = [len(prompt) + len(row.answer) for prompt, row in zip(prompts, rows)]
    for group in by_length(lengths, asked.budget):
        observe_group(model, [rows[i] for i in group], [prompts[i] for i in group], asked)
        if watch:
            watch(len(group))


def observe_group(
    model: Callable, rows: list[TokenRow], prompts: list[list[int]], asked: Asked
) -> None:
    """`observe` in one pass."""
    single = asked.max_tokens == 1
    full = [TokenRow(prompt, row.answer) for prompt, row in zip(prompts, rows)]
    batch = collate([full]).to(device_of(model))
    taps = Taps(batch.at, asked.layers, asked.residual)
    needs_logits = single or asked.soft_k
    logits = model(batch.ids, taps=taps, logits=batch.at if needs_logits else False)
    sizes = [len(row.answer) for row in rows]
    for row, outputs in zip(rows, taps.stack().split(sizes, dim=1)):
        if asked.residual:
            row.states = outputs
        else:
            row.activations = outputs
    if asked.soft_k:
        soft, soft_ids = top(logits, asked.soft_k)
        for row, mine, ids in zip(rows, soft.split(sizes), soft_ids.split(sizes)):
            row.soft = mine
            row.soft_ids = ids
    if single:
        for row, token in zip(rows, logits.argmax(-1).tolist()):
            row.answer = [token]
