"""Scoring labels of one or several tokens after prompts (protocol section 5).

R runs, Q prompts, B rows of a run in a pass, T tokens, C labels, I tokens of a label, L layers, D hidden, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .batch import Watch, by_length, join_groups, pad_prompts, send
from .models.attention import Packed
from .models.taps import At, Taps, device_of, network_of

SCORED_LOGITS = 2**29  # logits in memory at once; the head is applied to more rows part by part


@dataclass(frozen=True)
class Scoring:
    """How prompts are scored."""

    runs: int = 1  # R that the model computes side by side
    # top-1 confidence as the share among that many likeliest tokens (released scripts: 10)
    top_k: int | None = None
    budget: int = 4096  # tokens in one pass
    # tokens each of which ends a text: a label that is closed by one ends with any of them
    ends: tuple[int, ...] = ()
    observed: int = 0  # of so many of the first prompts the observer gets the attention outputs
    # takes the numbers of some prompts and the outputs [L, R, prompts, D] where they end, on the device
    observer: Callable[[list[int], Tensor], None] | None = None


class LabelScores(NamedTuple):
    """What R models answer to Q prompts, on the CPU."""

    # [R, Q] index of the label that greedy decoding gives, -1 where it gives none of them
    top: Tensor
    confidence: Tensor  # [R, Q] float32, probability of what greedy decoding gives
    first_token: Tensor  # [R, Q] the likeliest token after the prompt
    # [R, Q, C] float32, natural log-probability of each label, over the whole vocabulary
    log_probabilities: Tensor


class LabelTree:
    """C labels of up to I tokens after one prompt, as a prefix tree: shared beginnings are read once.

    A node is a beginning of labels; node 0 is the empty one, where the prompt ends. A whole label is no node: its last
    token is only predicted. In a row the prompt comes first, then the last token of every other node. That token
    attends to the prompt and to the shorter beginnings of its node. A label whose last token is one of `ends` may end
    with any of them: their probabilities are added.

    Labels [5, 7], [5, 8] and [9] have the nodes () and (5,). A row is the prompt, then 5; node 0 predicts 5 and 9,
    node 1 predicts 7 and 8.
    """

    def __init__(self, labels: list[list[int]], device: torch.device, ends: tuple[int, ...] = ()):
        nodes = number_beginnings(labels)
        self.tokens = [beginning[-1] for beginning in nodes if beginning]
        depths = torch.tensor([len(beginning) for beginning in nodes])
        sees = torch.zeros(len(nodes), len(nodes), dtype=torch.bool)
        for beginning, node in nodes.items():
            for length in range(len(beginning) + 1):
                sees[node, nodes[beginning[:length]]] = True
        size = (len(labels), max(map(len, labels)))  # [C, I]
        predicted_by = torch.zeros(size, dtype=torch.int64)
        label_tokens = torch.zeros(size, dtype=torch.int64)
        is_token = torch.zeros(size, dtype=torch.bool)
        is_end = torch.zeros(size, dtype=torch.bool)
        for c, label in enumerate(labels):
            for i, token in enumerate(label):
                predicted_by[c, i] = nodes[tuple(label[:i])]
                label_tokens[c, i] = token
                is_token[c, i] = True
            is_end[c, len(label) - 1] = label[-1] in ends
        self.depths = send(depths, device)
        self.sees = send(sees, device)
        self.predicted_by = send(predicted_by, device)  # [C, I] the node that predicts each token
        self.label_tokens = send(label_tokens, device)  # [C, I]
        self.is_token = send(is_token, device)  # [C, I], False at padding
        self.is_end = send(is_end, device)  # [C, I]
        self.end_tokens = send(torch.tensor(ends, dtype=torch.int64), device)

    def batch(
        self, prompts: list[list[int]], runs: int, device
    ) -> tuple[Tensor, At, Packed | None]:
        """ids [R * B, T], positions (rows, columns) of the nodes of each row, and what a node sees."""
        ids, ends = pad_prompts([prompt + self.tokens for prompt in prompts], runs, device)
        last_columns = ends[:, None] - len(self.tokens)  # [R * B, 1], where the prompts end
        nodes = torch.arange(len(self.depths), device=device)
        columns = last_columns + nodes
        rows = torch.arange(len(columns), device=device)
        rows = rows[:, None].expand_as(columns)
        at = rows.reshape(-1), columns.reshape(-1)
        if not self.tokens:
            return ids, at, None
        documents = torch.zeros_like(ids)  # 0: the prompt, which all nodes see
        documents.scatter_(1, columns, nodes.expand_as(columns))
        places = torch.arange(ids.shape[1], device=device)
        positions = places.repeat(len(columns), 1)
        positions.scatter_(1, columns, last_columns + self.depths)
        return ids, at, Packed(documents, positions, self.sees)

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """Each label's log-probability over the whole vocabulary, [..., C] from logits [..., nodes, V]."""
        chosen = logits[..., self.predicted_by, self.label_tokens]  # [..., C, I]
        chosen = torch.where(self.is_end, self.any_end(logits), chosen)
        total = logits.logsumexp(-1)
        steps = chosen - total[..., self.predicted_by]
        return steps.masked_fill(~self.is_token, 0.0).sum(-1)

    def greedy(self, logits: Tensor, top_k: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """From logits [..., nodes, V] what greedy decoding gives: label, its probability, first token, [...] each.

        Where it gives no label: -1, and the probability of its tokens up to the first that fits none. With `top_k`,
        probabilities are renormalised over that many likeliest tokens. Decoding follows a label as long as each of its
        tokens is the likeliest at its node; the label that is followed furthest shows where decoding goes.
        """
        predicted_by = self.predicted_by
        likeliest = logits.max(-1)
        # [..., C, I]: the likeliest token at the node that predicts each label's token
        token = likeliest.indices[..., predicted_by]
        chosen = likeliest.values[..., predicted_by]
        ended = self.is_end & torch.isin(token, self.end_tokens)
        agrees = (token == self.label_tokens) | ended
        candidates = logits
        if top_k is None:
            chosen = torch.where(ended, self.any_end(logits), chosen)
        else:
            candidates = logits.topk(top_k).values
        total = candidates.logsumexp(-1)
        steps = chosen - total[..., predicted_by]
        # 1 where this token of the label and all before it are what decoding gives
        agreed = (agrees | ~self.is_token).cumprod(-1)
        # 1 where all tokens before this one are: decoding gets here
        before = agreed[..., :-1]
        reached = F.pad(before, (1, 0), value=1)
        counted = reached.bool() & self.is_token
        log_confidence = steps.masked_fill(~counted, 0.0).sum(-1)  # [..., C]
        is_given = agreed[..., -1]  # 1 where decoding gives the whole label
        matched = (agreed * self.is_token).sum(-1)  # how many tokens of the label decoding gives
        # a label that is given comes before a longer one that goes on as far
        closest = (matched + is_given).argmax(-1, keepdim=True)
        is_a_label = is_given.gather(-1, closest).bool()
        top = torch.where(is_a_label, closest, -1)
        confidence = log_confidence.gather(-1, closest).exp()
        first_token = likeliest.indices[..., 0]  # node 0 is where the prompt ends
        return top[..., 0], confidence[..., 0], first_token

    def any_end(self, logits: Tensor) -> Tensor:
        """The logit of all end tokens together where each label's tokens are predicted, [..., C, I]."""
        any_end = logits[..., self.end_tokens].logsumexp(-1)
        return any_end[..., self.predicted_by]


def number_beginnings(labels: list[list[int]]) -> dict[tuple[int, ...], int]:
    """What labels begin with, without their last tokens, numbered from the shortest on: the empty beginning is 0."""
    numbers: dict[tuple[int, ...], int] = {}
    for length in range(max(map(len, labels))):
        for label in labels:
            if length < len(label):
                numbers.setdefault(tuple(label[:length]), len(numbers))
    return numbers


@torch.no_grad()
def label_scores(
    model: Callable,
    prompts: list[list[int]],
    labels: list[list[int]],
    scoring: Scoring = Scoring(),
    watch: Watch = None,
) -> LabelScores:
    """Score every prompt under every run in one pass each; `labels`: the tokens of each."""
    tree = LabelTree(labels, device_of(model), scoring.ends)
    lengths = [len(prompt) + len(tree.tokens) for prompt in prompts]
    budget = scoring.budget // scoring.runs
    observed = scoring.observed
    # observed prompts are grouped apart: a group is observed as a whole or not at all
    groups = by_length(lengths[:observed], budget)
    for group in by_length(lengths[observed:], budget):
        groups.append([observed + i for i in group])
    parts = []
    for group in groups:
        parts.append(score_group(model, tree, prompts, group, scoring))
        if watch:
            watch(len(group))
    return LabelScores(*[join_groups(part, groups, dim=1).cpu() for part in zip(*parts)])


def score_group(
    model: Callable,
    tree: LabelTree,
    prompts: list[list[int]],
    group: list[int],
    scoring: Scoring,
) -> list[Tensor]:
    """The prompts of `group` in one pass: the fields of `LabelScores`, each [R, B, ...], on the device."""
    group_prompts = [prompts[i] for i in group]
    ids, at, packed = tree.batch(group_prompts, scoring.runs, device_of(model))
    nodes = len(tree.depths)
    taps = None
    if group[0] < scoring.observed:
        rows, columns = at
        taps = Taps((rows[::nodes], columns[::nodes]))  # where the prompts end
    states = model(ids, taps=taps, logits=at, cache=packed, head=False)  # [R * B * nodes, D]
    lm_head = network_of(model).lm_head
    logits_of_a_row = nodes * len(lm_head.weight)
    rows_at_once = max(1, SCORED_LOGITS // logits_of_a_row)
    parts = []
    for some_states in states.split(rows_at_once * nodes):
        logits = lm_head(some_states).float().unflatten(0, (-1, nodes))  # [rows, nodes, V]
        top, confidence, first_token = tree.greedy(logits, scoring.top_k)
        log_probabilities = tree.log_probabilities(logits)
        parts.append((top, confidence, first_token, log_probabilities))
    by_run = (scoring.runs, -1)
    if taps is not None:
        scoring.observer(group, taps.stack().unflatten(1, by_run))
    return [torch.cat(part).unflatten(0, by_run) for part in zip(*parts)]
