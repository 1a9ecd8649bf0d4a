"""A few-shot set: which rows train, which rows decide when to stop, which demonstrations each sees; and right-padded batches."""

from dataclasses import dataclass
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from . import UsageError
from .models.common import At, Packed
from .tasks import Example
from .tokenizer import Tokenizer

PACKED, WORTH = (
    512,
    0.8,
)  # tokens in a line, and share of the padded ones: its attention is computed whole, mostly in vain


@dataclass(frozen=True)
class Episode:
    """One set of the protocol (section 2)."""

    train: list[Example]  # N rows
    dev: list[Example]  # max(1, N/2) rows, at most 48
    demonstrations: list[list[Example]]  # one list a row of train + dev, N - 1 long: what the teacher sees before it
    icl: list[list[Example]]  # before each evaluation row; one list: the same for all


def seeded(seed: int, number: int, purpose: str) -> np.random.Generator:
    """The generator of one purpose in one set: no draw depends on any other."""
    return np.random.default_rng([seed, number, crc32(purpose.encode())])


def draw_episode(
    pool: list[Example], n: int, number: int, seed: int = 0, pool_demos: int = 0, reuse: bool = False
) -> Episode:
    """Set `number` of size `n`: the pool shuffled with the set's seed, N rows to train, the next ones as dev.

    Two choices of the released scripts: with `pool_demos`, that many evaluation rows have each N - 1 demonstrations of their own, drawn
    from the rest of the pool; with `reuse`, dev row j has training row j's demonstrations. Raises UsageError for N too small or large.
    """
    dev_size = min(max(1, n // 2), 48)
    if n < 2:
        raise UsageError(f"--n {n}: with fewer than 2 rows no demonstration is left for the teacher; use --n 2 or more")
    if n + dev_size > len(pool):
        raise UsageError(
            f"--n {n}: needs {n} training and {dev_size} dev rows, but the pool holds only {len(pool)}; use a smaller --n"
        )
    order = np.arange(len(pool))
    np.random.RandomState(seed * 1000 + number).shuffle(order)  # the released scripts' order when seed is 0
    train, dev = ([pool[i] for i in part] for part in (order[:n], order[n : n + dev_size]))
    rng = seeded(seed, number, "demonstrations")
    others = [[row for j, row in enumerate(train) if j != i] for i in range(n)]
    leave_one_out = [shuffled(rows, rng) for rows in others]
    for_dev = [leave_one_out[j % n] if reuse else shuffled(train, rng)[: n - 1] for j in range(dev_size)]
    icl = [shuffled(train, seeded(seed, number, "icl"))]
    if pool_demos:
        rest, rng = [pool[i] for i in order[n + dev_size :]], seeded(seed, number, "icl from the pool")
        if len(rest) < n - 1:
            raise UsageError(
                f"--n {n}: demonstrations from the pool need {n - 1} rows besides the set, but it has only {len(rest)}"
            )
        icl = [[rest[i] for i in rng.choice(len(rest), n - 1, replace=False)] for _ in range(pool_demos)]
    return Episode(train, dev, leave_one_out + for_dev, icl)


def shuffled(rows: list[Example], rng: np.random.Generator) -> list[Example]:
    return [rows[i] for i in rng.permutation(len(rows))]


def with_demonstrations(demonstrations: list[Example], prompt: str) -> str:
    """The prompt of the protocol: each demonstration's prompt and answer, then the query's prompt, blank lines between."""
    return "\n\n".join([d.prompt + d.answer for d in demonstrations] + [prompt])


@dataclass
class Row:
    """One row as ids. P of its positions predict the answer: the last prompt token, then each answer token but the last."""

    prompt: list[int]
    answer: list[int]
    activations: Tensor | None = None  # [L, P, D], the teacher's attention outputs there
    soft: Tensor | None = None  # [P, k], the teacher's log-probabilities of its k likeliest tokens there
    soft_ids: Tensor | None = None  # [P, k], those tokens


def truth_row(example: Example, tokenizer: Tokenizer, single: bool) -> Row:
    """The row with its true answer; answers of many tokens end with EOS. Raises UsageError when prompt and answer merge."""
    answer = tokenizer.encode_answer(example.prompt, example.answer)
    return Row(tokenizer.encode(example.prompt), answer if single else answer + list(tokenizer.eos_ids[:1]))


@dataclass
class Batch:
    """Rows of R runs, run by run: each right-padded, or all of a run one after another in a single line (`packed`).

    Positions are padded to equally many a run (weight 0).
    """

    ids: Tensor  # [R * B, T], packed [R, T]
    packed: Packed | None
    at: At  # rows and columns of the P answer positions, run by run
    targets: Tensor  # [P] answer tokens
    weights: Tensor  # [R, P / R]: each run's sum to one: mean over positions of a row, mean over rows
    activations: Tensor | None  # [L, P, D]
    soft: Tensor | None  # [P, k]
    soft_ids: Tensor | None  # [P, k]

    def tensors(self) -> list[Tensor]:
        """All that is there, in an order of its own."""
        packed = (self.packed.mask, self.packed.places) if self.packed else ()
        every = self.ids, *packed, *self.at, self.targets, self.weights, self.activations, self.soft, self.soft_ids
        return [t for t in every if t is not None]


def collate(runs: list[list[Row]], device="cpu", pack: bool = False) -> Batch:
    """One batch of R lists of equally many rows. `pack`: no padding between a run's rows, where they are short and it is worth it."""
    lengths = np.array(
        [[len(row.prompt) + len(row.answer) - 1 for row in run] for run in runs]
    )  # the last answer token predicts nothing
    (R, B), totals = lengths.shape, lengths.sum(1)
    pack = pack and totals.max() <= min(PACKED, WORTH * B * lengths.max())
    lines = np.arange(R)[:, None].repeat(B, 1) if pack else np.arange(R * B).reshape(R, B)
    starts = lengths.cumsum(1) - lengths if pack else np.zeros_like(lengths)
    ids = np.zeros((R, totals.max()) if pack else (R * B, lengths.max()), np.int64)
    documents, places = np.full(ids.shape, -1), np.zeros_like(ids)
    most = max(sum(len(row.answer) for row in run) for run in runs)
    at, targets, weights = (
        np.zeros((2, R, most), np.int64),
        np.zeros((R, most), np.int64),
        np.zeros((R, most), np.float32),
    )
    at[0] = lines[:, :1]  # positions of no weight stay within the run
    for r, run in enumerate(runs):
        p = 0
        for i, row in enumerate(run):
            line, here = lines[r, i], slice(starts[r, i], starts[r, i] + lengths[r, i])
            ids[line, here] = row.prompt + row.answer[:-1]
            documents[line, here], places[line, here] = i, np.arange(lengths[r, i])
            span = slice(p, p := p + len(row.answer))
            at[0, r, span] = line
            at[1, r, span] = here.start + len(row.prompt) - 1 + np.arange(len(row.answer))
            targets[r, span] = row.answer
            weights[r, span] = 1 / (len(row.answer) * B)

    def send(array):
        return torch.from_numpy(array).to(device, non_blocking=True)

    return Batch(
        send(ids),
        Packed(send(documents), send(places)) if pack else None,
        (send(at[0].reshape(-1)), send(at[1].reshape(-1))),
        send(targets.reshape(-1)),
        send(weights),
        joined([[row.activations for row in run] for run in runs], most, dim=1),
        joined([[row.soft for row in run] for run in runs], most, dim=0),
        joined([[row.soft_ids for row in run] for run in runs], most, dim=0),
    )


def joined(runs: list[list[Tensor | None]], most: int, dim: int) -> Tensor | None:
    """Per-position tensors of all rows along `dim`, each run padded to `most` positions; None where rows have none."""
    if runs[0][0] is None:
        return None
    parts = []
    for run in runs:
        parts += run
        if short := most - sum(t.shape[dim] for t in run):
            parts.append(run[0].narrow(dim, 0, 1).expand(*[short if d == dim else -1 for d in range(run[0].dim())]))
    return torch.cat(parts, dim)


def by_length(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices in groups of similar length: rows × longest row of a group stays within `budget` tokens (one row at least)."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):  # longest first: memory trouble shows at once
        if not groups or (len(groups[-1]) + 1) * lengths[groups[-1][0]] > budget:
            groups.append([])
        groups[-1].append(i)
    return groups
