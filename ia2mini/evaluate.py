"""Scoring R adapted models, the base model, or the base model with demonstrations, on evaluation rows (protocol section 5)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .episode import Row, by_length, collate, with_demonstrations
from .metrics import asim
from .models.common import Prefix, Taps
from .tasks import Example
from .tokenizer import Tokenizer


@dataclass
class LabelScores:
    """First response position of Q rows under R models, float32 or int64 on the CPU."""

    top: Tensor  # [R, Q] likeliest token of the whole vocabulary
    confidence: Tensor  # [R, Q] its probability
    labels: Tensor  # [R, Q, C] probability of each label's token
    asim: Tensor | None = None  # [R, L] mean similarity to the activations that were given


@torch.no_grad()
def label_scores(
    model: Callable,
    prompts: list[list[int]],
    label_ids: list[int],
    runs: int = 1,
    among: int | None = None,
    like: list[list[Row]] | None = None,
    device="cpu",
    budget: int = 8192,
    watch: Callable[[int], None] | None = None,
) -> LabelScores:
    """Score every prompt under every run in one pass each; only the last position gets logits.

    `like`: for each run, rows of the first prompts with `activations` at their one position, to measure `asim` in the same pass.
    `among`: the confidence is the share among that many likeliest tokens (released scripts: 10), not of the whole vocabulary.
    `budget`: tokens in one pass. `watch` is called with the prompts of each finished pass.
    """
    Q = len(prompts)
    top, confidence = torch.zeros(runs, Q, dtype=torch.int64), torch.zeros(runs, Q)
    labels, columns = torch.zeros(runs, Q, len(label_ids)), torch.tensor(label_ids, device=device)
    tapped, lengths, similarity = len(like[0]) if like else 0, [len(p) for p in prompts], 0.0
    groups = by_length(lengths[:tapped], budget // runs)
    groups += [[tapped + i for i in group] for group in by_length(lengths[tapped:], budget // runs)]
    for group in groups:
        with_taps = group[0] < tapped
        rows = [[known[i] for i in group] for known in like] if with_taps else [[Row(prompts[i], [0]) for i in group]] * runs
        batch = collate(rows, device)
        taps = Taps(batch.at) if with_taps else None
        logits = model(batch.ids, taps=taps, logits=batch.at).float().view(runs, len(group), -1)
        if with_taps:
            similarity = similarity + asim(taps.stack(), batch.activations).view(-1, runs, len(group)).sum(-1).T
        total = logits.logsumexp(-1, keepdim=True)
        best = logits.max(-1)
        whole = total[..., 0] if among is None else logits.topk(among).values.logsumexp(-1)
        top[:, group], confidence[:, group] = best.indices.cpu(), (best.values - whole).exp().cpu()
        labels[:, group] = (logits[..., columns] - total).exp().cpu()
        if watch:
            watch(len(group))
    return LabelScores(top, confidence, labels, (similarity / tapped).cpu() if tapped else None)


@torch.no_grad()
def layer_asim(model: Callable, runs: list[list[Row]], device="cpu", budget: int = 8192) -> Tensor:
    """Mean cosine similarity [R, L] between each run's attention outputs and its rows' `activations`, over their positions."""
    lengths = [max(len(rows[i].prompt) + len(rows[i].answer) for rows in runs) for i in range(len(runs[0]))]
    total, count = 0.0, 0.0
    for group in by_length(lengths, budget // len(runs)):
        batch = collate([[rows[i] for i in group] for rows in runs], device)
        taps = Taps(batch.at)
        model(batch.ids, taps=taps, logits=False)
        real = (batch.weights > 0).float()  # [R, p]
        similarity = asim(taps.stack(), batch.activations).view(-1, *real.shape)  # [L, R, p]
        total = total + (similarity * real).sum(-1).T
        count = count + real.sum(-1, keepdim=True)
    return (total / count).cpu()


@torch.no_grad()
def share_prefix(
    model: nn.Module, tokenizer: Tokenizer, demonstrations: list[list[Example]], queries: list[str], least: int = 16
) -> tuple[Callable, list[list[int]]]:
    """The model with what all ICL prompts begin with computed once, and what is left of each prompt.

    `demonstrations`: one list for all queries, or one a query. Prompts that share fewer than `least` tokens stay whole.
    """
    prompts = tokenizer.encode_all([with_demonstrations(demonstrations[i % len(demonstrations)], q) for i, q in enumerate(queries)])
    shared = 0
    for tokens in zip(*(p[:-1] for p in prompts)):
        if len(set(tokens)) > 1:
            break
        shared += 1
    if shared < least:
        return model, prompts
    prefix = Prefix()
    device = next(model.parameters()).device
    model(torch.tensor([prompts[0][:shared]], device=device), logits=False, cache=prefix)
    return partial(model, prefix=prefix), [p[shared:] for p in prompts]
