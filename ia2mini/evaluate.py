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
    outputs: Tensor | None = None  # [L, R, n, D] attention outputs of the first n rows, on the device
    asim: Tensor | None = None  # [R, L] mean similarity to the attention outputs that were given


@torch.no_grad()
def label_scores(
    model: Callable,
    prompts: list[list[int]],
    label_ids: list[int],
    runs: int = 1,
    among: int | None = None,
    keep: int = 0,
    like: Tensor | None = None,
    device="cpu",
    budget: int = 4096,
    watch: Callable[[int], None] | None = None,
) -> LabelScores:
    """Score every prompt under every run in one pass each; only the last position gets logits.

    `keep`: of how many of the first prompts the attention outputs are returned. `like` [L, S, n, D]: outputs of the first n prompts
    under S sets, to measure `asim` to: one run is compared with every set, S × k runs k by k with each. `among`: the confidence is
    the share among that many likeliest tokens (released scripts: 10), not of the whole vocabulary. `budget`: tokens in one pass.
    `watch` is called with the prompts of each finished pass.
    """
    Q, sets = len(prompts), 1 if like is None else like.shape[1]
    top, confidence = torch.zeros(runs, Q, dtype=torch.int64), torch.zeros(runs, Q)
    labels, columns = torch.zeros(runs, Q, len(label_ids)), torch.tensor(label_ids, device=device)
    tapped, lengths, kept, similarity = (
        min(Q, keep if like is None else like.shape[2]),
        [len(p) for p in prompts],
        [],
        0.0,
    )
    groups = by_length(lengths[:tapped], budget // runs)
    order = torch.tensor(sum(groups, []), dtype=torch.int64, device=device)
    groups += [[tapped + i for i in group] for group in by_length(lengths[tapped:], budget // runs)]
    for group in groups:
        batch = collate([[Row(prompts[i], [0]) for i in group]] * runs, device)
        taps = Taps(batch.at) if group[0] < tapped else None
        logits = model(batch.ids, taps=taps, logits=batch.at).float().view(runs, len(group), -1)
        if taps and like is None:
            kept.append(taps.stack().unflatten(1, (runs, -1)))
        elif taps:
            outputs = taps.stack().unflatten(1, (min(sets, runs), -1, len(group)))  # [L, sets, runs a set, rows, D]
            similarity = similarity + asim(outputs, like[:, :, None, group]).sum(-1).flatten(1).T
        total = logits.logsumexp(-1, keepdim=True)
        best = logits.max(-1)
        whole = total[..., 0] if among is None else logits.topk(among).values.logsumexp(-1)
        top[:, group], confidence[:, group] = best.indices.cpu(), (best.values - whole).exp().cpu()
        labels[:, group] = (logits[..., columns] - total).exp().cpu()
        if watch:
            watch(len(group))
    outputs = torch.cat(kept, 2)[:, :, order.argsort()] if kept else None
    return LabelScores(top, confidence, labels, outputs, None if like is None else (similarity / tapped).cpu())


@torch.no_grad()
def layer_asim(model: Callable, rows: list[Row], device="cpu", budget: int = 4096) -> Tensor:
    """Mean cosine similarity [L] between the model's attention outputs and the rows' `activations`, over all their positions."""
    total, count = 0.0, 0
    for group in by_length([len(row.prompt) + len(row.answer) for row in rows], budget):
        batch = collate([[rows[i] for i in group]], device)
        taps = Taps(batch.at)
        model(batch.ids, taps=taps, logits=False)
        total = total + asim(taps.stack(), batch.activations).sum(-1)
        count += len(batch.targets)
    return (total / count).cpu()


@torch.no_grad()
def share_prefix(
    model: nn.Module, tokenizer: Tokenizer, demonstrations: list[list[Example]], queries: list[str], least: int = 16
) -> tuple[Callable, list[list[int]]]:
    """The model with what all ICL prompts begin with computed once, and what is left of each prompt.

    `demonstrations`: one list for all queries, or one a query. Prompts that share fewer than `least` tokens stay whole.
    """
    prompts = tokenizer.encode_all(
        [with_demonstrations(demonstrations[i % len(demonstrations)], q) for i, q in enumerate(queries)]
    )
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
