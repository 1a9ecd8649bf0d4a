"""Scoring answers, and R adapted models on labelled rows (protocol section 5).

R runs, Q prompts, L layers, D hidden, P answer tokens of the batch.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from . import UsageError
from .adapters import Adapter, adapted
from .batch import Batch, TokenRow, Watch, by_length, collate, join_groups, send
from .generate import Decoding, responses
from .labels import Scoring, label_scores
from .losses import cross_entropy, kl_divergence
from .metrics import measure
from .models.taps import device_of, network_of
from .prefix import share_prefix
from .tasks import Example
from .tokenizer import Tokenizer


@torch.no_grad()
def answer_scores(
    model: Callable,
    rows: list[TokenRow],
    runs: int = 1,
    budget: int = 4096,
    ends: tuple[int, ...] = (),
) -> Tensor:
    """Mean log-probability per answer token of each row, or minus its mean KL with `soft`: [R, Q] float32 on the CPU.

    Every token of `ends` ends a text; an answer token among them counts with the sum of their probabilities.
    """
    device = device_of(model)
    end_tokens = torch.tensor(ends, dtype=torch.int64)
    groups = by_length(list(map(len, rows)), max(1, budget // runs))
    parts = []
    for group in groups:
        group_rows = [rows[i] for i in group]
        batch = collate([group_rows] * runs)
        closing = torch.isin(batch.targets, end_tokens).nonzero()[:, 0]
        batch = batch.to(device)
        states = model(batch.ids, logits=batch.at, head=False)
        head = network_of(model).lm_head.weight
        loss = answer_loss(batch, send(closing, device), ends, states, head)
        loss = loss.view(runs, -1)  # [R, P / R]
        sizes = [len(row.answer) for row in group_rows]
        means = [part.mean(1) for part in loss.split(sizes, 1)]
        parts.append(-torch.stack(means, 1))
    return join_groups(parts, groups, dim=1).cpu()


def answer_loss(
    batch: Batch, closing: Tensor, ends: tuple[int, ...], states: Tensor, head: Tensor
) -> Tensor:
    """KL from the teacher's distributions where the batch has them, else cross-entropy on the answers, [P].

    At the places `closing` the answer ends: any of the tokens `ends` is right there.
    """
    if batch.soft is not None:
        return kl_divergence(states, head, batch.soft, batch.soft_ids)
    loss = cross_entropy(states, head, batch.targets)
    if len(ends) > 1 and len(closing):
        log_probabilities = []
        for end in ends:
            this_end = torch.full_like(closing, end)
            log_probabilities.append(-cross_entropy(states[closing], head, this_end))
        loss[closing] = -torch.stack(log_probabilities).logsumexp(0)
    return loss


def answer_texts(
    model: Callable,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    decoding: Decoding,
    watch: Watch = None,
) -> tuple[list[str], list[float]]:
    """What a model answers to prompts, greedily, and the geometric mean of its tokens' probabilities.

    Every token that was generated counts: an EOS with the probability of all EOS tokens, or those of the stop text.
    """
    answers = responses(model, tokenizer, prompts, decoding, watch)
    rows = []
    for prompt, response in zip(prompts, answers):
        rows.append(TokenRow(prompt, response.generated))
    confidence = answer_scores(model, rows, ends=tokenizer.eos_ids)[0].exp()
    texts = [tokenizer.decode(response.ids) for response in answers]
    return texts, confidence.tolist()


def score(
    model: nn.Module,
    tokenizer: Tokenizer,
    examples: list[Example],
    labels: tuple[str, ...],
    adapter: Adapter | None = None,
    theta: Tensor | None = None,
    demonstrations: tuple[Example, ...] = (),
) -> list[dict]:
    """How good R adapted models are on labelled rows: the metrics of `metrics.measure`, a dict a run.

    `theta` [R, M] are weights of `adapter`; without them the base model is scored, with `demonstrations` in its prompt
    if there are any. All prompts must end as the first one does. Raises UsageError for a label that merges with it,
    and for an adapter without its weights.

        score(model, tokenizer, examples, ("0", "1"), lora, trained.theta)[0]["acc"]
    """
    if (adapter is None) != (theta is None):
        raise UsageError("score: give an adapter with its weights theta [R, M], or neither")
    prompts = [example.prompt for example in examples]
    label_tokens = tokenizer.label_tokens(prompts[0], labels)
    scoring = Scoring(ends=tokenizer.eos_ids)
    if theta is None:
        with_prefix, ids = share_prefix(model, tokenizer, [list(demonstrations)], prompts)
        scores = label_scores(with_prefix, ids, label_tokens, scoring)
    else:
        ids = tokenizer.encode_all(prompts)
        scoring = replace(scoring, runs=len(theta))
        with adapted(model, adapter, theta) as student:
            scores = label_scores(student, ids, label_tokens, scoring)
    gold = torch.tensor([example.label for example in examples])
    metrics = []
    for r in range(scoring.runs):
        correct = scores.top[r] == gold
        metrics.append(measure(scores.confidence[r], correct, scores.log_probabilities[r], gold))
    return metrics
