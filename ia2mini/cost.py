"""What a study costs, computed from shapes: operations, bytes, kernels, least seconds and memory of every stage.

The least: no padding, a matrix read once a pass, inputs and outputs of matrix products once, all else fused into one.
"""

import math
import time
from dataclasses import astuple, dataclass, replace

import torch
import torch.nn.functional as F

from .engine.options import MATCHED, UNTRAINED, last_phase

RANK, BUDGET = 8, 4096  # of LoRA where nothing else is said; tokens of one pass (`Setting.budget`)
KERNELS = {"qwen3": (56, 18, 100), "llama": (38, 18, 78)}  # bfloat16 operations a layer: forward, LoRA, backward


@dataclass(frozen=True)
class Cost:
    """Of a stage; `tokens` as they go through the model."""

    flops: float = 0.0
    bytes: float = 0.0
    kernels: float = 0.0
    tokens: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other))))

    def seconds(self, rate: float, bandwidth: float = math.inf) -> float:
        """At least, on a machine of `rate` FLOP/s and `bandwidth` bytes/s."""
        return max(self.flops / rate, self.bytes / bandwidth)


@dataclass(frozen=True)
class Pass:
    """`times` passes of `rows` rows of `tokens` tokens each, the last MLP and the head at `positions` in all a time.

    `past`: earlier tokens that each row sees, in `pasts` different caches; `copies` of the frozen matrices are read.
    """

    rows: float
    tokens: float
    positions: float
    head: bool = True
    backward: bool = False
    rank: int = 0
    past: float = 0.0
    pasts: float = 0.0
    times: float = 1.0
    copies: float = 1.0  # matrices are read so often a time: rows beyond a pass's budget

    def cost(self, config, size: int = 2) -> Cost:
        """`size`: bytes of a frozen weight or a state."""
        layer = sum(KERNELS[config.model_type][: 1 + bool(self.rank) + self.backward])
        kernels = self.copies * (config.num_hidden_layers * layer + 20)
        each = flops(config, self), moved(config, self, size), kernels, self.rows * self.tokens
        return Cost(*(self.times * value for value in each))


def widths(config) -> tuple[int, ...]:
    """D, M, Q, K, V and the number of layers L."""
    Q, K = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return config.hidden_size, config.intermediate_size, Q, K, config.vocab_size, config.num_hidden_layers


def matrices(config) -> tuple[int, int, int]:
    """Weights of a layer's frozen maps: q, k, v; o; MLP."""
    D, M, Q, K, *_ = widths(config)
    return D * (Q + 2 * K), Q * D, 3 * D * M


def lora_size(config, rank: int) -> int:
    """Weights of one run's LoRA on q, k and o."""
    D, _, Q, K, _, L = widths(config)
    return L * rank * (3 * D + 2 * Q + K)


def flops(config, p: Pass) -> float:
    """FLOPs that a pass needs; a multiply-add counts two, norms and softmax none.

    Forward, a layer: every frozen map 2 · in · out a token; scores and mix 4 · keys · Q a token (the causal half
    not deducted); with `rank`, LoRA on q, k and o 2 · rank · (in + out) a token. The last MLP and the head only at
    `positions`, not at all without a head. `backward` adds the gradient of every input once more, of attention and
    LoRA twice more (their both operands need one), but nothing below the first layer's LoRA.
    """
    (D, _, Q, K, V, L), n = widths(config), p.rows * p.tokens
    qkv, out, mlp = (2 * weights for weights in matrices(config))
    attention, lora = 4 * (p.tokens + p.past) * Q, 2 * p.rank * (3 * D + 2 * Q + K)
    last = p.positions * (mlp + 2 * D * V) if p.head else 0
    total = L * n * (qkv + out + attention + lora) + (L - 1) * n * mlp + last
    if p.backward:
        total += (L - 1) * n * (qkv + out + mlp) + n * out + L * n * 2 * (attention + lora) + last
        total -= n * 2 * p.rank * 2 * D  # no gradient reaches the embeddings: A of the first q and k
    return float(total)


def moved(config, p: Pass, size: int) -> float:
    """Bytes of device memory that a pass reads and writes: matrices, states between them, keys and values, logits."""
    D, M, Q, K, V, L = widths(config)
    states = p.rows * p.tokens * (4 * D + 4 * Q + 4 * K + 3 * M)
    states *= 3 if p.backward else 1  # kept, read again, and gradients
    weights = sum(matrices(config)) * p.copies * (2 if p.backward else 1)
    head = p.copies * V * D * size + 8 * p.positions * V if p.head else 0
    return L * size * (weights + states + 2 * K * p.past * p.pasts) + head * (2 if p.backward else 1)


@dataclass(frozen=True)
class Cell:
    """One task at one N, in the numbers that its cost depends on; tokens are means over rows."""

    query: float  # tokens of a prompt without demonstrations
    shown: float  # of the demonstrations before it
    answer: float = 1.0  # of a response
    n: int = 4
    rows: tuple[int, ...] = (500,)  # of each evaluation
    sets: int = 5
    configs: int = 3  # rates (× β) of a set
    scored: int = 5  # runs of a method that are scored
    methods: tuple[str, ...] = ("base", "icl", "sft", "ia2", "ia2-sft")
    trained: tuple[str, ...] = ("sft", "ia2", "ia2-sft")  # also what they begin with
    epochs: int = 50
    batch: int = 4
    more: int = 0  # rows without answers
    rank: int = RANK

    @property
    def dev(self) -> int:
        return min(max(1, self.n // 2), 48)

    @property
    def length(self) -> float:  # tokens of a training row
        return self.query + self.answer - 1

    def stages(self, config, size: int = 2) -> dict[str, Cost]:
        """The cost of each stage in order; training for all of its epochs: at most."""
        runs, found = self.sets * self.configs, {}
        taught = self.sets * (self.n + self.dev + self.more)
        found["collect"] = self.read(taught, self.query + self.shown, config, size)
        for method in self.trained:
            phase = last_phase(method)
            train = self.n + self.more * (phase != "sft")
            if phase == "ridge":  # a pass over every set
                found[f"train {method}"] = Pass(self.sets * train, self.length, 0, False).cost(config, size)
                continue
            portions = math.ceil(train / self.batch)
            rows = runs * train / portions
            step = Pass(rows, self.length, rows * self.answer, phase not in MATCHED, True, self.rank)
            look = replace(step, rows=runs * self.dev, positions=runs * self.dev * self.answer, backward=False)
            found[f"train {method}"] = replace(step, times=self.epochs * portions).cost(config, size)
            found[f"look {method}"] = replace(look, times=self.epochs * math.ceil(portions / 2)).cost(config, size)
        for method in self.methods:
            each = {"base": 1, "icl": self.sets}.get(method, self.scored) * sum(self.rows)
            shared, rank = self.shown * (method == "icl"), self.rank * (method not in UNTRAINED)
            found[f"score {method}"] = self.read(each, self.query, config, size, shared, rank)
            if method == "icl":
                found["score icl"] += Pass(self.sets, self.shown, 0, False, times=len(self.rows)).cost(config, size)
        return found

    def read(self, rows: float, tokens: float, config, size: int, shared: float = 0, rank: int = 0) -> Cost:
        """`rows` prompts of `tokens` tokens, and their responses decoded where these have more than one token."""
        copies = max(1, rows * tokens / BUDGET)
        prompt = Pass(rows, tokens, rows, True, False, rank, shared, copies * bool(shared), copies=copies)
        total = prompt.cost(config, size)
        if self.answer > 1:
            past, copies = shared + tokens + self.answer / 2, max(1, rows * (tokens + self.answer) / (4 * BUDGET))
            decode = Pass(rows, 1, rows, True, False, rank, past, rows, self.answer - 1, copies)
            total += decode.cost(config, size)
        return total

    def memory(self, config, size: int = 2, side_by_side: int | None = None) -> float:
        """Bytes at most in training: the frozen weights, and what the runs of a step keep for the backward pass."""
        (D, _, _, _, V, L), rows = widths(config), min(self.n, self.batch)
        weights = L * sum(matrices(config)) + V * D * (2 - config.tie_word_embeddings)
        kept = run_bytes(config, rows * self.length, rows * self.answer, size, lora_size(config, self.rank))
        return size * weights + min(side_by_side or 10**9, self.sets * self.configs) * kept


def run_bytes(config, tokens: float, positions: float, size: int, trained: int, checkpointing: bool = False) -> float:
    """Bytes that training one run takes beside the model: states of a step that are kept for the backward pass.

    A layer keeps, a token: what its norms and LoRA read, queries, keys (also before their norm), values, what attention
    gives, three states of the MLP, LoRA's and the norms' small ones; checkpointed, what both halves read, and one layer
    is there as a whole. Weights count seven times (best, now, gradients, Adam's), an answer its targets and gradient.
    """
    D, M, Q, K, _, L = widths(config)
    layer = size * (3 * D + 2 * Q + 2 * K + 3 * M + (Q + K) * (config.model_type == "qwen3")) + 24 * RANK
    last = size * (3 * M + D)  # an MLP that only answer positions reach
    layers = L * 2 * D * size + layer if checkpointing else L * layer - last
    return tokens * layers + positions * (L + 2) * D * size + 4 * 7 * trained


def gemm_rate(rows: int, inputs: int, outputs: int, device="cpu", dtype=torch.float32, seconds: float = 0.5) -> float:
    """FLOP/s of x [rows, inputs] @ W^T [inputs, outputs]: the best of as many rounds as fit into `seconds`."""
    x, w = (torch.randn(n, inputs, device=device, dtype=dtype) for n in (rows, outputs))
    times, start, wait = [], time.perf_counter(), torch.cuda.synchronize if x.is_cuda else lambda: None
    while time.perf_counter() - start < seconds or len(times) < 3:
        wait()
        begun = time.perf_counter()
        F.linear(x, w)
        wait()
        times.append(time.perf_counter() - begun)
    return 2 * rows * inputs * outputs / min(times)
