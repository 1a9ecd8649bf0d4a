"""Scoring R adapted models, the base, or the base with demonstrations, on evaluation rows (protocol section 5)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import cycle, takewhile

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .adapters import Adapter, adapted
from .batch import Batch, Row, Watch, by_length, collate, over_groups
from .episode import with_demonstrations
from .generate import Decoding, responses
from .losses import cross_entropy, soft_cross_entropy
from .metrics import asim, measure
from .models.attention import Packed, Prefix
from .models.taps import At, Taps, device_of
from .tasks import Example
from .tokenizer import Tokenizer


@dataclass(frozen=True)
class Scoring:
    """How prompts are scored, and what is looked at besides."""

    runs: int = 1  # R that the model computes side by side
    among: int | None = None  # top-1 confidence as the share among that many likeliest tokens (released scripts: 10)
    keep: int = 0  # of how many of the first prompts the attention outputs are returned
    like: Tensor | None = None  # [L, S, n, D] outputs of the first n prompts under S sets, to measure `asim` to:
    # one run is compared with every set, S × k runs k by k with each
    budget: int = 4096  # tokens in one pass
    ends: tuple[int, ...] = ()  # tokens each of which ends a text: a label that is closed by one ends with any of them
    spelled: Tensor | None = None  # [V] the label that a token counts as, -1: none (see `spellings`); labels of 1 token


@dataclass
class LabelScores:
    """What R models answer to Q prompts, float32 or int64 on the CPU."""

    top: Tensor  # [R, Q] index of the label that greedy decoding gives, -1 where it gives none of them
    confidence: Tensor  # [R, Q] probability of what greedy decoding gives
    log_probabilities: Tensor  # [R, Q, C] of each label, of all that could be said; natural logarithms
    outputs: Tensor | None = None  # [L, R, n, D] attention outputs of the first n prompts, on the device
    asim: Tensor | None = None  # [R, L] mean similarity to the attention outputs that were given

    @property
    def probabilities(self) -> Tensor:
        """Of each label, [R, Q, C]; zero below the smallest float32."""
        return self.log_probabilities.exp()


class LabelTree:
    """C labels of up to I tokens behind one prompt: the prompt is read once, every label is a branch from its end.

    A label whose last token is one of `ends` may end with any of them: their probabilities are added.
    """

    def __init__(self, labels: list[list[int]], device, ends: tuple[int, ...] = ()):
        self.tokens = [token for label in labels for token in label[:-1]]  # the last token of a label is only said
        lengths = torch.tensor([[len(label)] for label in labels])
        said = pad_sequence([torch.tensor(label) for label in labels], batch_first=True)  # [C, I]
        places = torch.arange(said.shape[1])
        real = places < lengths
        starts = (lengths - 1).cumsum(0) - (lengths - 1)
        at = (starts + places) * (real & (places > 0))  # 0: the prompt's last token
        self.ends = torch.tensor(ends, dtype=torch.int64, device=device)
        self.said = said.to(device)
        self.real = real.to(device)
        self.at = at.to(device)
        self.closes = torch.isin(self.said, self.ends) & (places == lengths - 1).to(device)  # [C, I]
        self.branches = self.real[:, 1:].nonzero().T  # label and place of each token

    def batch(self, prompts: list[list[int]], runs: int, device) -> tuple[Tensor, At, Packed | None]:
        """ids [R * B, T], positions (rows, columns) of 1 + branch tokens a row, and what keeps the branches apart."""
        rows = collate([[Row(prompt + self.tokens, [0]) for prompt in prompts]] * runs).to(torch.device(device))
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device).repeat(runs)[:, None]
        offsets = torch.arange(len(self.tokens) + 1, device=device)
        columns = lengths - 1 + offsets
        at = torch.arange(len(columns), device=device)[:, None].expand_as(columns).reshape(-1), columns.reshape(-1)
        if not self.tokens:
            return rows.ids, at, None
        label, place = self.branches
        documents, places = torch.zeros_like(rows.ids), torch.arange(rows.ids.shape[1], device=device)
        documents.scatter_(1, columns[:, 1:], (label + 1).expand(len(columns), -1))
        places = places.repeat(len(columns), 1).scatter_(1, columns[:, 1:], lengths + place)
        return rows.ids, at, Packed(documents, places, branches=True)

    def read(self, logits: Tensor, among: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Of logits [..., 1 + branch tokens, V]: label of the greedy answer, its probability, labels' logs [..., C].

        The label is -1 where the greedy answer is none: the probability is then that of the tokens up to there.
        """
        total = logits.logsumexp(-1)
        best = logits.max(-1)
        said = logits[..., self.at, self.said]  # [..., C, I]
        greedy = best.indices[..., self.at]
        agrees = greedy == self.said
        likeliest = best.values[..., self.at]
        if self.closes.any():
            ending = logits[..., self.ends].logsumexp(-1)[..., self.at]
            said = torch.where(self.closes, ending, said)
            ended = self.closes & torch.isin(greedy, self.ends)
            agrees = agrees | ended
            if among is None:
                likeliest = torch.where(ended, ending, likeliest)
        log_probabilities = (said - total[..., self.at]).masked_fill(~self.real, 0.0).sum(-1)
        whole = total if among is None else logits.topk(among).values.logsumexp(-1)
        agreed = (agrees | ~self.real).cumprod(-1)  # [..., C, I] 1 up to where the greedy answer leaves the label
        before = torch.cat((torch.ones_like(agreed[..., :1]), agreed[..., :-1]), -1)
        steps = likeliest - whole[..., self.at]
        confidence = steps.masked_fill(~(before.bool() & self.real), 0.0).sum(-1).exp()  # [..., C]
        complete = agreed[..., -1]
        longest = (agreed * self.real).sum(-1) + complete
        nearest = longest.argmax(-1, keepdim=True)
        top = torch.where(complete.gather(-1, nearest).bool(), nearest, -1)
        return top[..., 0], confidence.gather(-1, nearest)[..., 0], log_probabilities


@cache
def spellings(tokenizer: Tokenizer, labels: tuple[str, ...], size: int) -> Tensor:
    """For each of `size` tokens the label that its text is but for surrounding blanks, else -1, [V] int64.

    So the paper's released scripts compare: " Friday" is "Friday".
    """
    places = {label.strip(): place for place, label in reversed(list(enumerate(labels)))}
    known = min(size, tokenizer.backend.get_vocab_size())
    texts = tokenizer.backend.decode_batch([[token] for token in range(known)])
    found = [places.get(text.strip(), -1) for text in texts]
    return torch.tensor(found + [-1] * (size - known))


@torch.no_grad()
def label_scores(
    model: Callable, prompts: list[list[int]], labels: list[list[int]], how: Scoring = Scoring(), watch: Watch = None
) -> LabelScores:
    """Score every prompt under every run in one pass each; `labels`: the tokens of each."""
    runs, device = how.runs, device_of(model)
    tree = LabelTree(labels, device, how.ends)
    tapped = min(len(prompts), how.keep if how.like is None else how.like.shape[2])

    def scored(group: list[int]) -> tuple:
        ids, at, branches = tree.batch([prompts[i] for i in group], runs, device)
        taps = Taps((at[0][:: len(tree.tokens) + 1], at[1][:: len(tree.tokens) + 1])) if group[0] < tapped else None
        logits = model(ids, taps=taps, logits=at, cache=branches).float()
        logits = logits.view(runs, len(group), len(tree.tokens) + 1, -1)
        top, *probabilities = tree.read(logits, how.among)
        if how.spelled is not None:
            top = how.spelled.to(device)[logits[..., 0, :].argmax(-1)]
        found = top, *probabilities
        outputs = taps.stack().unflatten(1, (runs, -1)) if taps else None
        if outputs is not None and how.like is not None:
            outputs = outputs.unflatten(1, (min(how.like.shape[1], runs), -1))  # [L, sets, runs a set, rows, D]
            outputs = asim(outputs, how.like[:, :, None, group]).sum(-1).flatten(1).T
        return *(t.cpu() for t in found), outputs

    lengths, budget = [len(p) + len(tree.tokens) for p in prompts], how.budget // runs
    groups = by_length(lengths[:tapped], budget)
    groups += [[tapped + i for i in group] for group in by_length(lengths[tapped:], budget)]
    order = torch.tensor(sum(groups, [])).argsort()
    *found, taken = zip(*over_groups(scored, groups, watch))
    top, confidence, log_probabilities = (torch.cat(parts, 1)[:, order] for parts in found)
    taken = [part for part in taken if part is not None]
    if how.like is not None:
        return LabelScores(top, confidence, log_probabilities, asim=(sum(taken) / tapped).cpu())
    outputs = torch.cat(taken, 2)[:, :, order[:tapped]] if taken else None
    return LabelScores(top, confidence, log_probabilities, outputs)


@torch.no_grad()
def layer_asim(model: Callable, runs: list[list[Row]], budget: int = 4096, by_row: bool = False) -> Tensor:
    """Mean cosine similarity [R, L] of R runs' attention outputs to the `activations` of each one's rows.

    The mean is over all positions; `by_row` over those of a row, then over rows, as in the released scripts.
    """
    device = device_of(model)

    def alike(group: list[int]) -> Tensor:
        batch = collate([[rows[i] for i in group] for rows in runs]).to(device)
        taps = Taps(batch.at)
        model(batch.ids, taps=taps, logits=False)
        similar = asim(taps.stack(), batch.activations).unflatten(1, (len(runs), -1))  # [L, R, P / R]
        if by_row:
            return (similar * batch.weights).sum(-1) * len(group)
        return (similar * (batch.weights > 0)).sum(-1)

    lengths = [max(map(len, rows)) + 1 for rows in zip(*runs)]
    total = sum(over_groups(alike, by_length(lengths, budget // len(runs))))
    counts = [len(rows) if by_row else sum(len(row.answer) for row in rows) for rows in runs]
    return (total / torch.tensor(counts, device=device)).T.cpu()


@torch.no_grad()
def answer_scores(
    model: Callable, rows: list[Row], runs: int = 1, budget: int = 4096, ends: tuple[int, ...] = ()
) -> Tensor:
    """Mean log-probability of an answer token, of rows with `soft` minus the mean KL, [R, Q] float32 on the CPU.

    An answer token among `ends`, each of which ends a text, counts with the probability of them all.
    """

    def scored(group: list[int]) -> Tensor:
        batch = collate([[rows[i] for i in group]] * runs).to(device_of(model))
        loss = model(batch.ids, logits=batch.at, head=partial(answer_loss, batch, ends))
        parts = loss.view(runs, -1).split([len(rows[i].answer) for i in group], 1)
        return -torch.stack([part.mean(1) for part in parts], 1).cpu()

    groups = by_length(list(map(len, rows)), max(1, budget // runs))
    return torch.cat(over_groups(scored, groups), 1)[:, torch.tensor(sum(groups, [])).argsort()]


def answer_loss(batch: Batch, ends: tuple[int, ...], states: Tensor, head: Tensor) -> Tensor:
    """KL from the teacher's distributions where the batch has them, else cross-entropy on the answers, [P]."""
    if batch.soft is not None:
        return soft_cross_entropy(states, head, batch.soft, batch.soft_ids)
    loss = cross_entropy(states, head, batch.targets)
    ending = torch.isin(batch.targets, torch.tensor(ends, dtype=torch.int64, device=loss.device))
    if len(ends) > 1 and ending.any():
        there = states[ending]
        each = [cross_entropy(there, head, torch.full_like(batch.targets[ending], end)) for end in ends]
        loss[ending] = -torch.stack(each).neg().logsumexp(0)
    return loss


def answer_texts(
    model: Callable, tokenizer: Tokenizer, prompts: list[list[int]], how: Decoding, watch: Watch = None
) -> tuple[list[str], list[float]]:
    """What a model answers to prompts, greedily, and the geometric mean of its tokens' probabilities.

    Every token that was generated counts: an EOS with the probability of all EOS tokens, or those of the stop text.
    """
    found = responses(model, tokenizer, prompts, how, watch)
    said = [Row(prompt, response.generated) for prompt, response in zip(prompts, found)]
    sure = answer_scores(model, said, ends=tokenizer.eos_ids)[0].exp()
    return [tokenizer.decode(response.ids) for response in found], sure.tolist()


@torch.no_grad()
def last_states(model: Callable, prompts: list[list[int]], budget: int = 4096) -> Tensor:
    """The state [Q, D] that the last token of each prompt gives to the head, float32 on the CPU."""

    def states(group: list[int]) -> Tensor:
        batch = collate([[Row(prompts[i], [0]) for i in group]]).to(device_of(model))
        return model(batch.ids, logits=batch.at, head=lambda states, head: states).float().cpu()

    groups = by_length([len(prompt) for prompt in prompts], budget)
    found = torch.cat(over_groups(states, groups))
    return found[torch.tensor(sum(groups, [])).argsort()]


@torch.no_grad()
def share_prefix(
    model: nn.Module, tokenizer: Tokenizer, demonstrations: list[list[Example]], queries: list[str], least: int = 16
) -> tuple[Callable, list[list[int]]]:
    """The model with what all ICL prompts begin with, `least` tokens or more, computed once; the rest of each prompt.

    `demonstrations`: one list for all queries, or one a query.
    """
    prompts = tokenizer.encode_all([with_demonstrations(d, q) for d, q in zip(cycle(demonstrations), queries)])
    shared = len(list(takewhile(lambda tokens: len(set(tokens)) == 1, zip(*(p[:-1] for p in prompts)))))
    if shared < least:
        return model, prompts
    prefix = Prefix()
    model(torch.tensor([prompts[0][:shared]], device=device_of(model)), logits=False, cache=prefix)
    return partial(model, prefix=prefix), [p[shared:] for p in prompts]


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
    if there are any. Raises UsageError for a label that merges with its prompt.

        score(model, tokenizer, examples, ("0", "1"), lora, trained.theta)[0]["acc"]
    """
    prompts = [e.prompt for e in examples]
    tokens = tokenizer.label_tokens(prompts[0], labels)
    how = Scoring(ends=tokenizer.eos_ids)
    if theta is None:
        student, ids = share_prefix(model, tokenizer, [list(demonstrations)], prompts)
        scores = label_scores(student, ids, tokens, how)
    else:
        with adapted(model, adapter, theta) as student:
            scores = label_scores(student, tokenizer.encode_all(prompts), tokens, replace(how, runs=len(theta)))
    gold = torch.tensor([e.label for e in examples])
    each_run = zip(scores.confidence, scores.top == gold, scores.log_probabilities)
    return [measure(*run, gold) for run in each_run]
