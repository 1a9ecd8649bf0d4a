"""The pass with demonstrations, once a set: answers, attention outputs and distributions (protocol section 3)."""

from collections import Counter, defaultdict
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

MIN_ROWS_OF_A_PREFIX = 4  # demonstrations that fewer rows have in common are computed for each row


@dataclass(frozen=True)
class TeacherSettings:
    """What the pass with demonstrations computes, and how."""

    max_tokens: int = 1  # 1: the response is the likeliest token; more: greedy, EOS appended
    soft_k: int | None = None  # also the log-probabilities of this many likeliest tokens
    layers: list[int] | None = None  # whose attention outputs are recorded; None: all
    stop: str | None = STOP  # text at which a response ends, besides EOS
    budget: int = 4096  # tokens in one pass; four times as many in a cache while generating
    residual: bool = False  # also the residual stream after every attention
    demonstrated: bool = False  # also the rows with demonstrations and their true answers
    hooks: DecodingHooks = DecodingHooks()


@dataclass(frozen=True)
class Taught:
    """A set's rows as ids: with the true answers, and with the teacher's responses and targets."""

    train: list[TokenRow]
    dev: list[TokenRow]
    icl_train: list[TokenRow] = field(default_factory=list)
    icl_dev: list[TokenRow] = field(default_factory=list)
    # with the true answers, and demonstrations in the prompt
    demonstrated_train: list[TokenRow] = field(default_factory=list)
    demonstrated_dev: list[TokenRow] = field(default_factory=list)


def true_rows(
    tokenizer: Tokenizer, episode: Episode, end: bool, demonstrated: bool = False
) -> Taught:
    """A set's rows with their true answers, which need no teacher.

    `end` appends EOS to the answers; `demonstrated`: also with demonstrations in the prompt. Raises UsageError for an
    answer that merges with its prompt.
    """
    examples = episode.train + episode.dev
    rows = [truth_row(example, tokenizer, end) for example in examples]
    demonstrated_rows = []
    if demonstrated:
        for example, demonstrations in zip(examples, episode.demonstrations):
            prompt = with_demonstrations(demonstrations, example.prompt)
            demonstrated_rows.append(truth_row(replace(example, prompt=prompt), tokenizer, end))
    n = len(episode.train)
    return Taught(
        train=rows[:n],
        dev=rows[n:],
        demonstrated_train=demonstrated_rows[:n],
        demonstrated_dev=demonstrated_rows[n:],
    )


def balanced(taught: Taught) -> Taught:
    """The set with weights that make every true answer count the same, however many training rows have it."""
    rows_of = Counter(tuple(row.answer) for row in taught.train)

    def weighted(rows: list[TokenRow]) -> list[TokenRow]:
        found = []
        for row in rows:
            weight = len(rows) / (len(rows_of) * rows_of[tuple(row.answer)])
            found.append(replace(row, weight=weight))
        return found

    return replace(
        taught,
        train=weighted(taught.train),
        demonstrated_train=weighted(taught.demonstrated_train),
    )


def teach(
    model: nn.Module,
    tokenizer: Tokenizer,
    episode: Episode,
    settings: TeacherSettings = TeacherSettings(),
    watch: Watch = None,
) -> Taught:
    """Run the base model on every row of `episode` with its demonstrations, and record the targets.

    Each row has its prompt without demonstrations, the response with them, activations [L, P, D] in the model's dtype,
    with `residual` states [L, P, D], and with `soft_k` log-probabilities [P, k]. Raises UsageError for an answer
    that merges with its prompt.

        taught = teach(model, tokenizer, draw_episode(examples, n=4))
    """
    of_text = settings.max_tokens > 1
    true = true_rows(tokenizer, episode, of_text, settings.demonstrated)
    examples = episode.train + episode.dev + episode.unlabelled
    # [0] stands for the response until it is known: of a single token its place is known already
    rows = [TokenRow(tokenizer.encode(example.prompt), [0]) for example in examples]
    passes = teacher_passes(model, tokenizer, examples, episode.demonstrations)
    for teacher, indices, prompts in passes:
        some_rows = [rows[i] for i in indices]
        if of_text:
            generate_responses(teacher, tokenizer, some_rows, prompts, settings, watch)
        else:
            record_targets(teacher, some_rows, prompts, settings, watch)
        if settings.residual:
            without_soft = replace(settings, soft_k=None)
            record_targets(teacher, some_rows, prompts, without_soft, of_stream=True)
    n = len(episode.train)
    labelled = n + len(episode.dev)
    return replace(true, icl_train=rows[:n] + rows[labelled:], icl_dev=rows[n:labelled])


def teacher_passes(
    model: nn.Module,
    tokenizer: Tokenizer,
    examples: list[Example],
    demonstrations: list[list[Example]],
) -> Iterator[tuple[Callable, list[int], list[list[int]]]]:
    """Every row once: a model, the indices of some rows, and their prompts for this model.

    Where `MIN_ROWS_OF_A_PREFIX` rows or more have the same demonstrations, the model has read these already.
    """
    groups = defaultdict(list)
    for i, before in enumerate(demonstrations):
        groups[tuple(before)].append(i)
    alone = []
    for indices in groups.values():
        if len(indices) < MIN_ROWS_OF_A_PREFIX:
            alone += indices
            continue
        queries = [examples[i].prompt for i in indices]
        teacher, prompts = share_prefix(model, tokenizer, [demonstrations[indices[0]]], queries)
        yield teacher, indices, prompts
    if alone:
        alone.sort()
        texts = [with_demonstrations(demonstrations[i], examples[i].prompt) for i in alone]
        yield model, alone, tokenizer.encode_all(texts)


def generate_responses(
    model: Callable,
    tokenizer: Tokenizer,
    rows: list[TokenRow],
    prompts: list[list[int]],
    settings: TeacherSettings,
    watch: Watch,
) -> None:
    """Fill in the responses of `rows` to their full `prompts`, and the activations and soft targets met on the way.

    Where a stop text began inside a token, the response was tokenized again: its tokens are not those that were
    generated, and a pass over them records the targets.
    """
    # of each prompt, for every token: the token, attention outputs [L, D] and, if asked for, soft targets [k] twice
    steps: list[list[tuple]] = [[] for _ in prompts]

    def observer(indices: list[int], tokens: list[int], logits: Tensor, outputs: Tensor) -> None:
        """Keep what prompts `indices` show: logits [b, V] and outputs [L, b, D] where `tokens` were chosen."""
        seen: list = [tokens, outputs.unbind(1)]
        if settings.soft_k:
            seen += likeliest_tokens(logits, settings.soft_k)
        for i, step in zip(indices, zip(*seen)):
            steps[i].append(step)

    decoding = Decoding(
        max_tokens=settings.max_tokens,
        stop=settings.stop,
        budget=4 * settings.budget,
        layers=settings.layers,
        hooks=settings.hooks,
    )
    responses = generate(model, tokenizer, prompts, decoding, watch, observer)
    unrecorded = []
    for i, (row, response) in enumerate(zip(rows, responses)):
        row.answer = (response + tokenizer.closing)[: settings.max_tokens]
        if not row.answer:
            prompt_end = tokenizer.decode(row.prompt)[-60:]
            lack = (
                "the checkpoint's config.json names no eos_token_id that would end it; add it there"
            )
            raise UsageError(f"the model's answer to {prompt_end!r} is empty, and {lack}")
        tokens, outputs, *soft = zip(*steps[i][: len(row.answer)])
        if list(tokens[: len(response)]) != response:
            unrecorded.append(i)
            continue
        row.activations = torch.stack(outputs, 1)
        if soft:
            row.soft, row.soft_ids = map(torch.stack, soft)
    record_targets(model, [rows[i] for i in unrecorded], [prompts[i] for i in unrecorded], settings)


def likeliest_tokens(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the k likeliest tokens and these tokens, [P, k] each, from logits [P, V]."""
    return logits.float().log_softmax(-1).topk(min(k, logits.shape[-1]))


@torch.no_grad()
def record_targets(
    model: Callable,
    rows: list[TokenRow],
    prompts: list[list[int]],
    settings: TeacherSettings,
    watch: Watch = None,
    of_stream: bool = False,
) -> None:
    """Fill in activations, soft targets and a single-token response of `rows` from a pass over their full `prompts`.

    `model` may be a partial that holds a shared prefix; `prompts` are then what follows it. With `of_stream` it fills
    in `states` in place of `activations`.
    """
    single = settings.max_tokens == 1
    needs_logits = single or settings.soft_k
    lengths = [len(prompt) + len(row.answer) for prompt, row in zip(prompts, rows)]
    for group in by_length(lengths, settings.budget):
        some_rows = [rows[i] for i in group]
        full = [TokenRow(prompts[i], rows[i].answer) for i in group]
        batch = collate([full]).to(device_of(model))
        taps = Taps(batch.at, settings.layers, of_stream)
        logits = model(batch.ids, taps=taps, logits=batch.at if needs_logits else False)
        sizes = [len(row.answer) for row in some_rows]
        for row, outputs in zip(some_rows, taps.stack().split(sizes, dim=1)):
            if of_stream:
                row.states = outputs
            else:
                row.activations = outputs
        if settings.soft_k:
            soft, soft_ids = likeliest_tokens(logits, settings.soft_k)
            for row, row_soft, row_ids in zip(some_rows, soft.split(sizes), soft_ids.split(sizes)):
                row.soft = row_soft
                row.soft_ids = row_ids
        if single:
            for row, token in zip(some_rows, logits.argmax(-1).tolist()):
                row.answer = [token]
        if watch:
            watch(len(group))
