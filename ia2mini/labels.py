"""Scoring labels of one or several tokens behind prompts (protocol section 5).

R runs, Q prompts, B rows of a run in a pass, T tokens, C labels, I tokens of a label, L layers, D hidden, V vocabulary,
S sets, n prompts whose attention outputs are looked at.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .batch import Row, Watch, by_length, collate
from .metrics import asim
from .models.attention import Packed
from .models.taps import At, Taps, device_of
from .tokenizer import Tokenizer


@dataclass(frozen=True)
class Scoring:
    """How prompts are scored, and what is looked at besides."""

    runs: int = 1  # R that the model computes side by side
    # top-1 confidence as the share among that many likeliest tokens (released scripts: 10)
    among: int | None = None
    keep: int = 0  # of how many of the first prompts the attention outputs are returned
    # [L, S, n, D] outputs of the first n prompts under S sets, to measure `asim` to:
    # one run is compared with every set, S × k runs k by k with each
    like: Tensor | None = None
    budget: int = 4096  # tokens in one pass
    # tokens each of which ends a text: a label that is closed by one ends with any of them
    ends: tuple[int, ...] = ()
    # [V] the label that a token counts as, -1: none (see `spellings`); labels of 1 token
    spelled: Tensor | None = None


@dataclass
class LabelScores:
    """What R models answer to Q prompts, float32 or int64 on the CPU."""

    # [R, Q] index of the label that greedy decoding gives, -1 where it gives none of them
    top: Tensor
    confidence: Tensor  # [R, Q] probability of what greedy decoding gives
    # [R, Q, C] of each label, of all that could be said; natural logarithms
    log_probabilities: Tensor
    # [L, R, n, D] attention outputs of the first n prompts, on the device
    outputs: Tensor | None = None
    asim: Tensor | None = None  # [R, L] mean similarity to the attention outputs that were given

    @property
    def probabilities(self) -> Tensor:
        """Of each label, [R, Q, C]; zero below the smallest float32."""
        return self.log_probabilities.exp()


class LabelTree:
    """C labels of up to I tokens behind one prompt: the prompt is read once, and what labels share at their start once.

    A node is a beginning that labels share; node 0 is the empty one, where the prompt ends. Behind the prompt stands
    the last token of each other node; it sees the prompt and the nodes that it goes on from. The last token of a label
    is only said, and needs no node. A label whose last token is one of `ends` may end with any of them: their
    probabilities are added.
    """

    def __init__(self, labels: list[list[int]], device, ends: tuple[int, ...] = ()):
        nodes: dict[tuple[int, ...], int] = {}  # beginning -> number
        for length in range(max(map(len, labels))):
            for label in labels:
                if length < len(label):
                    nodes.setdefault(tuple(label[:length]), len(nodes))
        self.tokens = [beginning[-1] for beginning in nodes if beginning]
        self.depths = torch.tensor([len(beginning) for beginning in nodes], device=device)
        sees = torch.zeros(len(nodes), len(nodes), dtype=torch.bool)
        for beginning, node in nodes.items():
            for length in range(len(beginning) + 1):
                sees[node, nodes[beginning[:length]]] = True
        self.sees = sees.to(device)
        before = []  # of each label the nodes behind which its tokens are said
        for label in labels:
            before.append(torch.tensor([nodes[tuple(label[:i])] for i in range(len(label))]))
        self.at = pad_sequence(before, batch_first=True).to(device)  # [C, I]
        said = [torch.tensor(label) for label in labels]
        self.said = pad_sequence(said, batch_first=True).to(device)  # [C, I]
        lengths = torch.tensor([[len(label)] for label in labels], device=device)
        places = torch.arange(self.said.shape[1], device=device)
        self.real = places < lengths
        self.ends = torch.tensor(ends, dtype=torch.int64, device=device)
        # [C, I]
        self.closes = torch.isin(self.said, self.ends) & (places == lengths - 1)

    def batch(
        self, prompts: list[list[int]], runs: int, device
    ) -> tuple[Tensor, At, Packed | None]:
        """ids [R * B, T], positions (rows, columns) of the nodes of each row, and what a node sees."""
        one_run = [Row(prompt + self.tokens, [0]) for prompt in prompts]
        ids = collate([one_run] * runs).ids.to(device)
        ends = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
        ends = ends.repeat(runs)[:, None]  # [R * B, 1]
        nodes = torch.arange(len(self.depths), device=device)
        columns = ends + nodes
        rows = torch.arange(len(columns), device=device)[:, None].expand_as(columns)
        at = rows.reshape(-1), columns.reshape(-1)
        if not self.tokens:
            return ids, at, None
        documents = torch.zeros_like(ids)  # 0: the prompt, which all nodes see
        documents.scatter_(1, columns, nodes.expand_as(columns))
        positions = torch.arange(ids.shape[1], device=device).repeat(len(columns), 1)
        positions.scatter_(1, columns, ends + self.depths)
        return ids, at, Packed(documents, positions, self.sees)

    def read(self, logits: Tensor, among: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Of logits [..., nodes, V]: label of the greedy answer, its probability, labels' logs [..., C].

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
        # [..., C, I] 1 up to where the greedy answer leaves the label
        agreed = (agrees | ~self.real).cumprod(-1)
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
    model: Callable,
    prompts: list[list[int]],
    labels: list[list[int]],
    how: Scoring = Scoring(),
    watch: Watch = None,
) -> LabelScores:
    """Score every prompt under every run in one pass each; `labels`: the tokens of each."""
    tree = LabelTree(labels, device_of(model), how.ends)
    looked_at = how.keep if how.like is None else how.like.shape[2]
    tapped = min(len(prompts), looked_at)
    lengths = [len(prompt) + len(tree.tokens) for prompt in prompts]
    budget = how.budget // how.runs
    groups = by_length(lengths[:tapped], budget)
    for group in by_length(lengths[tapped:], budget):
        groups.append([tapped + i for i in group])
    parts = []
    for group in groups:
        parts.append(score_group(model, tree, prompts, group, how, tap=group[0] < tapped))
        if watch:
            watch(len(group))
    order = torch.tensor(sum(groups, [])).argsort()
    found = LabelScores(
        top=torch.cat([part.top for part in parts], 1)[:, order],
        confidence=torch.cat([part.confidence for part in parts], 1)[:, order],
        log_probabilities=torch.cat([part.log_probabilities for part in parts], 1)[:, order],
    )
    if how.like is not None:
        alike = torch.stack([part.asim for part in parts if part.asim is not None])
        found.asim = (alike.sum(0) / tapped).cpu()
    elif tapped:
        outputs = [part.outputs for part in parts if part.outputs is not None]
        found.outputs = torch.cat(outputs, 2)[:, :, order[:tapped]]
    return found


def score_group(
    model: Callable,
    tree: LabelTree,
    prompts: list[list[int]],
    group: list[int],
    how: Scoring,
    tap: bool,
) -> LabelScores:
    """The prompts of `group` in one pass; with `tap` their attention outputs, or how alike these are, summed."""
    device = device_of(model)
    ids, at, branches = tree.batch([prompts[i] for i in group], how.runs, device)
    step = len(tree.depths)  # nodes a row
    taps = None
    if tap:  # where the prompts end
        rows, columns = at
        taps = Taps((rows[::step], columns[::step]))
    logits = model(ids, taps=taps, logits=at, cache=branches).float()
    logits = logits.view(how.runs, len(group), step, -1)
    top, confidence, log_probabilities = tree.read(logits, how.among)
    if how.spelled is not None:
        top = how.spelled.to(device)[logits[..., 0, :].argmax(-1)]
    found = LabelScores(top.cpu(), confidence.cpu(), log_probabilities.cpu())
    if not tap:
        return found
    outputs = taps.stack().unflatten(1, (how.runs, -1))  # [L, R, B, D]
    if how.like is None:
        found.outputs = outputs
        return found
    sets = min(how.like.shape[1], how.runs)
    outputs = outputs.unflatten(1, (sets, -1))  # [L, sets, runs of a set, B, D]
    alike = asim(outputs, how.like[:, :, None, group])
    found.asim = alike.sum(-1).flatten(1).T
    return found
