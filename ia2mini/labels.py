"""Scoring labels of one or several tokens after prompts (protocol section 5).

R runs, Q prompts, B rows of a run in a pass, T tokens, C labels, I tokens of a label, L layers, D hidden, V vocabulary,
S sets, n prompts whose attention outputs are recorded.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .batch import TokenRow, Watch, by_length, collate, join_groups, send
from .metrics import asim
from .models.attention import Packed
from .models.taps import At, Taps, device_of, network_of

LOGITS = 2**29  # logits in memory at once; the head is applied to more rows part by part


@dataclass(frozen=True)
class Scoring:
    """How prompts are scored, and what is measured besides."""

    runs: int = 1  # R that the model computes side by side
    # top-1 confidence as the share among that many likeliest tokens (released scripts: 10)
    top_k: int | None = None
    returned_outputs: int = 0  # of so many of the first prompts attention outputs are returned
    # [L, S, n, D] teacher's outputs of the first n prompts under S sets, to measure `asim` against:
    # a single run is compared with every set; S × k runs: each k successive runs with one set
    reference: Tensor | None = None
    budget: int = 4096  # tokens in one pass
    # tokens each of which ends a text: a label that is closed by one ends with any of them
    ends: tuple[int, ...] = ()
    # [V] the label that a token counts as, -1: none (released scripts); labels of 1 token
    label_of_token: Tensor | None = None


@dataclass
class LabelScores:
    """What R models answer to Q prompts, float32 or int64 on the CPU."""

    # [R, Q] index of the label that greedy decoding gives, -1 where it gives none of them
    top: Tensor
    confidence: Tensor  # [R, Q] probability of what greedy decoding gives
    # [R, Q, C] natural log-probability of each label, over the whole vocabulary
    log_probabilities: Tensor
    # [L, R, n, D] attention outputs of the first n prompts, on the device
    outputs: Tensor | None = None
    asim: Tensor | None = None  # [R, L] mean similarity to the attention outputs that were given

    @property
    def probabilities(self) -> Tensor:
        """Of each label, [R, Q, C]; zero below the smallest float32."""
        return self.log_probabilities.exp()


class LabelTree:
    """C labels of up to I tokens after one prompt, as a prefix tree: shared beginnings are read once.

    A node is a beginning of labels; node 0 is the empty one, where the prompt ends. A whole label is no node: its last
    token is only predicted. In a row the prompt comes first, then the last token of every other node. That token
    attends to the prompt and to the shorter beginnings of its node. A label whose last token is one of `ends` may end
    with any of them: their probabilities are added.
    """

    def __init__(self, labels: list[list[int]], device: torch.device, ends: tuple[int, ...] = ()):
        nodes = number_beginnings(labels)
        self.tokens = [beginning[-1] for beginning in nodes if beginning]
        depths = list(map(len, nodes))
        self.depths = send(torch.tensor(depths), device)
        sees = torch.zeros(len(nodes), len(nodes), dtype=torch.bool)
        for beginning, node in nodes.items():
            for length in range(len(beginning) + 1):
                sees[node, nodes[beginning[:length]]] = True
        self.sees = send(sees, device)
        predicting = []  # for each label, the nodes that predict its tokens
        for label in labels:
            numbers = [nodes[tuple(label[:i])] for i in range(len(label))]
            predicting.append(torch.tensor(numbers))
        self.predicted_by = send(pad_sequence(predicting, batch_first=True), device)  # [C, I] nodes
        tokens = pad_sequence(list(map(torch.tensor, labels)), batch_first=True)
        lengths = torch.tensor(list(map(len, labels)))[:, None]
        places = torch.arange(tokens.shape[1])
        end_tokens = torch.tensor(ends, dtype=torch.int64)
        is_last = places == lengths - 1
        is_end = torch.isin(tokens, end_tokens) & is_last
        self.any_is_end = bool(is_end.any())
        self.label_tokens = send(tokens, device)  # [C, I]
        self.is_token = send(places < lengths, device)  # [C, I], False at padding
        self.ends = send(end_tokens, device)
        self.is_end = send(is_end, device)  # [C, I]

    def batch(
        self, prompts: list[list[int]], runs: int, device
    ) -> tuple[Tensor, At, Packed | None]:
        """ids [R * B, T], positions (rows, columns) of the nodes of each row, and what a node sees."""
        one_run = [TokenRow(prompt + self.tokens, [0]) for prompt in prompts]
        ids = send(collate([one_run] * runs).ids, device)
        lengths = send(torch.tensor(list(map(len, prompts))), device)
        ends = lengths.repeat(runs)[:, None] - 1  # [R * B, 1]
        nodes = torch.arange(len(self.depths), device=device)
        columns = ends + nodes
        rows = torch.arange(len(columns), device=device)
        rows = rows[:, None].expand_as(columns)
        at = rows.reshape(-1), columns.reshape(-1)
        if not self.tokens:
            return ids, at, None
        documents = torch.zeros_like(ids)  # 0: the prompt, which all nodes see
        documents.scatter_(1, columns, nodes.expand_as(columns))
        places = torch.arange(ids.shape[1], device=device)
        positions = places.repeat(len(columns), 1)
        positions.scatter_(1, columns, ends + self.depths)
        return ids, at, Packed(documents, positions, self.sees)

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """Each label's log-probability over the whole vocabulary, [..., C] from logits [..., nodes, V]."""
        chosen = logits[..., self.predicted_by, self.label_tokens]  # [..., C, I]
        if self.any_is_end:
            chosen = torch.where(self.is_end, self.any_end(logits), chosen)
        steps = chosen - logits.logsumexp(-1)[..., self.predicted_by]
        return steps.masked_fill(~self.is_token, 0.0).sum(-1)

    def greedy(self, logits: Tensor, top_k: int | None) -> tuple[Tensor, Tensor]:
        """The label that greedy decoding gives, from logits [..., nodes, V], and its probability, [...] each.

        Where it gives no label: -1, and the probability of its tokens up to the first that fits none. With `top_k`,
        probabilities are renormalised over that many likeliest tokens.
        """
        likeliest = logits.max(-1)
        # [..., C, I]: the likeliest token at the node that predicts each label's token
        token = likeliest.indices[..., self.predicted_by]
        chosen = likeliest.values[..., self.predicted_by]
        agrees = token == self.label_tokens
        if self.any_is_end:
            ended = self.is_end & torch.isin(token, self.ends)
            agrees = agrees | ended
            if top_k is None:
                chosen = torch.where(ended, self.any_end(logits), chosen)
        # 1 as long as all tokens so far are those of the label
        agreed = (agrees | ~self.is_token).cumprod(-1)
        # 1 where decoding gets to: where the prompt ends, and after tokens that agreed
        prompt_ends = torch.ones_like(agreed[..., :1])
        reached = torch.cat((prompt_ends, agreed[..., :-1]), -1)
        all_tokens = logits if top_k is None else logits.topk(top_k).values
        steps = chosen - all_tokens.logsumexp(-1)[..., self.predicted_by]
        counted = reached.bool() & self.is_token
        confidence = steps.masked_fill(~counted, 0.0).sum(-1).exp()  # [..., C]
        complete = agreed[..., -1]  # 1 where decoding gives the whole label
        given = (agreed * self.is_token).sum(-1)  # how many of the label's tokens it gives
        nearest = (given + complete).argmax(-1, keepdim=True)
        is_a_label = complete.gather(-1, nearest).bool()
        top = torch.where(is_a_label, nearest, -1)
        return top[..., 0], confidence.gather(-1, nearest)[..., 0]

    def any_end(self, logits: Tensor) -> Tensor:
        """The logit of all `ends` together where each label's tokens are predicted, [..., C, I]."""
        return logits[..., self.ends].logsumexp(-1)[..., self.predicted_by]


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
    tapped = scoring.returned_outputs
    if scoring.reference is not None:
        tapped = scoring.reference.shape[2]
    tapped = min(len(prompts), tapped)
    lengths = [len(prompt) + len(tree.tokens) for prompt in prompts]
    budget = scoring.budget // scoring.runs
    tapped_groups = by_length(lengths[:tapped], budget)
    groups = list(tapped_groups)
    for group in by_length(lengths[tapped:], budget):
        groups.append([tapped + i for i in group])
    parts = []
    for group in groups:
        tap = group[0] < tapped
        parts.append(score_group(model, tree, prompts, group, scoring, tap))
        if watch:
            watch(len(group))
    top = [part.top for part in parts]
    confidence = [part.confidence for part in parts]
    log_probabilities = [part.log_probabilities for part in parts]
    scores = LabelScores(
        top=join_groups(top, groups, dim=1).cpu(),
        confidence=join_groups(confidence, groups, dim=1).cpu(),
        log_probabilities=join_groups(log_probabilities, groups, dim=1).cpu(),
    )
    tapped_parts = parts[: len(tapped_groups)]
    if scoring.reference is not None:
        sums = torch.stack([part.asim for part in tapped_parts])
        scores.asim = (sums.sum(0) / tapped).cpu()
    elif tapped:
        outputs = [part.outputs for part in tapped_parts]
        scores.outputs = join_groups(outputs, tapped_groups, dim=2)
    return scores


def score_logits_in_parts(
    tree: LabelTree, scoring: Scoring, max_states: int, states: Tensor, head: Tensor
) -> tuple[Tensor, ...]:
    """In place of the head: what `score_logits` gives, with the logits of `max_states` of the states [P, D] at once."""
    return score_logits(tree, scoring, (F.linear(part, head) for part in states.split(max_states)))


def score_logits(tree: LabelTree, scoring: Scoring, parts: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Greedy label, its probability [n], and labels' log-probabilities [n, C], from logits [n * nodes, V] in parts."""
    scores = []
    for logits in parts:
        logits = logits.float().view(-1, len(tree.depths), logits.shape[-1])
        top, confidence = tree.greedy(logits, scoring.top_k)
        if scoring.label_of_token is not None:
            first_token = logits[:, 0].argmax(-1)
            top = send(scoring.label_of_token, logits.device)[first_token]
        scores.append((top, confidence, tree.log_probabilities(logits)))
    return tuple(map(torch.cat, zip(*scores)))


def score_group(
    model: Callable,
    tree: LabelTree,
    prompts: list[list[int]],
    group: list[int],
    scoring: Scoring,
    tap: bool,
) -> LabelScores:
    """The prompts of `group` in one pass, on the device; with `tap` also their attention outputs or, if there is a
    reference, the similarity to it.
    """
    device = device_of(model)
    group_prompts = [prompts[i] for i in group]
    ids, at, branches = tree.batch(group_prompts, scoring.runs, device)
    nodes = len(tree.depths)
    taps = None
    if tap:  # where the prompts end
        rows, columns = at
        taps = Taps((rows[::nodes], columns[::nodes]))
    V = len(network_of(model).model.embed_tokens.weight)
    max_rows = max(1, LOGITS // (nodes * V))  # rows whose logits are held at once
    if max_rows < scoring.runs * len(group):
        head = partial(score_logits_in_parts, tree, scoring, max_rows * nodes)
        answers = model(ids, taps=taps, logits=at, cache=branches, head=head)
    else:
        logits = model(ids, taps=taps, logits=at, cache=branches)  # [R * B * nodes, V]
        answers = score_logits(tree, scoring, [logits])
    scores = LabelScores(*(answer.unflatten(0, (scoring.runs, -1)) for answer in answers))
    if not tap:
        return scores
    outputs = taps.stack().unflatten(1, (scoring.runs, -1))  # [L, R, B, D]
    if scoring.reference is None:
        scores.outputs = outputs
        return scores
    sets = min(scoring.reference.shape[1], scoring.runs)
    outputs = outputs.unflatten(1, (sets, -1))  # [L, sets, runs of a set, B, D]
    places = send(torch.tensor(group), device)
    similarity = asim(outputs, scoring.reference[:, :, None, places])
    scores.asim = similarity.sum(-1).flatten(1).T
    return scores
