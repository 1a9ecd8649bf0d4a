"""What a cell costs, computed from shapes: operations, bytes, kernels, least seconds and memory of every stage.

The least: no padding, a matrix read once a pass, inputs and outputs of matrix products once, all else fused into one.
D hidden, M of the MLP, Q and K widths of queries and of keys, V vocabulary, L layers.
"""

import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass, replace
from statistics import fmean

from ia2mini.engine.experiment import in_order
from ia2mini.engine.options import last_phase
from ia2mini.methods import WITH_DEMONSTRATIONS, configs
from ia2mini.scale.memory import run_bytes
from ia2mini.study.cells import Cell

RANK = 8  # of LoRA where nothing else is said
BUDGET = 4096  # tokens of one pass (`TeacherSettings.budget`)
DECODED_AT_ONCE = 4 * BUDGET  # tokens of cache of a batch that is decoded (`Decoding.budget`)
MOST_DEV = 48  # rows that decide when a run stops
# bfloat16 operations a layer: forward, LoRA, backward
KERNELS = {"qwen3": (56, 18, 100), "llama": (38, 18, 78), "olmo2": (58, 18, 102)}
KERNELS_AROUND = 20  # of a pass, outside its layers
MATCHED = ("ia2", "hidden")  # phases that match activations: they need no head


@dataclass(frozen=True)
class Cost:
    """Of a stage; `tokens` as they go through the model."""

    flops: float = 0.0
    bytes: float = 0.0
    kernels: float = 0.0
    tokens: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other))))

    def times(self, factor: float) -> "Cost":
        return Cost(*(factor * value for value in astuple(self)))

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
        forward, lora, backward = KERNELS[config.model_type]
        layer = forward
        if self.rank:
            layer += lora
        if self.backward:
            layer += backward
        once = Cost(
            flops=flops(config, self),
            bytes=moved(config, self, size),
            kernels=self.copies * (config.num_hidden_layers * layer + KERNELS_AROUND),
            tokens=self.rows * self.tokens,
        )
        return once.times(self.times)


def widths(config) -> tuple[int, int]:
    """Q and K: all heads of queries, and all of keys."""
    Q = config.num_attention_heads * config.head_dim
    K = config.num_key_value_heads * config.head_dim
    return Q, K


def matrices(config) -> tuple[int, int, int]:
    """Weights of a layer's frozen maps: q, k, v; o; MLP."""
    D = config.hidden_size
    Q, K = widths(config)
    qkv = D * (Q + 2 * K)
    out = Q * D
    mlp = 3 * D * config.intermediate_size
    return qkv, out, mlp


def lora_size(config, rank: int) -> int:
    """Weights of one run's LoRA on q, k and o."""
    Q, K = widths(config)
    return config.num_hidden_layers * rank * (3 * config.hidden_size + 2 * Q + K)


def flops(config, p: Pass) -> float:
    """FLOPs that a pass needs; a multiply-add counts two, norms and softmax none.

    Forward, a layer: every frozen map 2 · in · out a token; scores and mix 4 · keys · Q a token (the causal half
    not deducted); with `rank`, LoRA on q, k and o 2 · rank · (in + out) a token. The last MLP and the head only at
    `positions`, not at all without a head. `backward` adds the gradient of every input once more, of attention and
    LoRA twice more (their both operands need one), but nothing below the first layer's LoRA.
    """
    D = config.hidden_size
    L = config.num_hidden_layers
    Q, K = widths(config)
    n = p.rows * p.tokens
    qkv, out, mlp = (2 * weights for weights in matrices(config))
    attention = 4 * (p.tokens + p.past) * Q
    lora = 2 * p.rank * (3 * D + 2 * Q + K)
    last = 0.0
    if p.head:
        last = p.positions * (mlp + 2 * D * config.vocab_size)
    total = L * n * (qkv + out + attention + lora)
    total += (L - 1) * n * mlp
    total += last
    if p.backward:
        total += (L - 1) * n * (qkv + out + mlp)
        total += n * out  # of the first layer
        total += 2 * L * n * (attention + lora)
        total += last
        # no gradient reaches the embeddings: A of the first q and k
        total -= n * 2 * p.rank * 2 * D
    return float(total)


def moved(config, p: Pass, size: int) -> float:
    """Bytes of device memory that a pass reads and writes: matrices, states between them, keys and values, logits."""
    D = config.hidden_size
    L = config.num_hidden_layers
    V = config.vocab_size
    Q, K = widths(config)
    state = 4 * (D + Q + K) + 3 * config.intermediate_size
    states = p.rows * p.tokens * state
    weights = sum(matrices(config)) * p.copies
    head = 0.0
    if p.head:
        head = p.copies * V * D * size
        head += 8 * p.positions * V
    if p.backward:
        states *= 3  # kept, read again, and gradients
        weights *= 2
        head *= 2
    cached = 2 * K * p.past * p.pasts
    return L * size * (weights + states + cached) + head


@dataclass(frozen=True)
class CellSize:
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
    trained: tuple[str, ...] = ("sft", "ia2", "ia2-sft")  # also what they start from
    epochs: int = 50
    batch: int = 4
    rank: int = RANK

    @property
    def dev(self) -> int:
        return min(max(1, self.n // 2), MOST_DEV)

    @property
    def length(self) -> float:
        """Tokens of a training row."""
        return self.query + self.answer - 1

    @property
    def steps_an_epoch(self) -> int:
        return math.ceil(self.n / self.batch)

    def stages(self, config, size: int = 2) -> dict[str, Cost]:
        """The cost of each stage in order; training for all of its epochs: at most."""
        taught = self.sets * (self.n + self.dev)
        found = {"collect": self.read(taught, self.query + self.shown, config, size)}
        for method in self.trained:
            shown = self.shown if method in WITH_DEMONSTRATIONS else 0.0
            for stage, passes in self.training(last_phase(method), shown).items():
                found[f"{stage} {method}"] = passes.cost(config, size)
        for method in self.methods:
            found[f"score {method}"] = self.score(method, config, size)
        return found

    def training(self, phase: str, shown: float = 0.0) -> dict[str, Pass]:
        """The steps of a phase for all runs, and their looks at the dev loss; `shown`: tokens of demonstrations."""
        if phase == "ridge":  # a pass over every set
            return {"train": Pass(self.sets * self.n, self.length, 0, head=False)}
        runs = self.sets * self.configs
        rows = runs * self.n / self.steps_an_epoch
        step = Pass(
            rows=rows,
            tokens=shown + self.length,
            positions=rows * self.answer,
            head=phase not in MATCHED,
            backward=True,
            rank=self.rank,
            times=self.epochs * self.steps_an_epoch,
        )
        looks_an_epoch = math.ceil(self.steps_an_epoch / 2)
        dev = runs * self.dev
        look = replace(
            step,
            rows=dev,
            positions=dev * self.answer,
            backward=False,
            times=self.epochs * looks_an_epoch,
        )
        return {"train": step, "look": look}

    def score(self, method: str, config, size: int) -> Cost:
        """The answers of a method's runs to every evaluation."""
        queries = sum(self.rows)
        if method == "base":
            return self.read(queries, self.query, config, size)
        if method in WITH_DEMONSTRATIONS:
            runs = self.sets if method == "icl" else self.scored
            rank = 0 if method == "icl" else self.rank
            demonstrations = Pass(runs, self.shown, 0, head=False, rank=rank, times=len(self.rows))
            answering = self.read(
                runs * queries, self.query, config, size, shared=self.shown, rank=rank
            )
            return answering + demonstrations.cost(config, size)
        return self.read(self.scored * queries, self.query, config, size, rank=self.rank)

    def read(
        self, rows: float, tokens: float, config, size: int, shared: float = 0, rank: int = 0
    ) -> Cost:
        """`rows` prompts of `tokens` tokens, and their responses decoded where these have more than one token."""
        copies = max(1, rows * tokens / BUDGET)
        pasts = copies if shared else 0
        prompt = Pass(rows, tokens, rows, rank=rank, past=shared, pasts=pasts, copies=copies)
        total = prompt.cost(config, size)
        if self.answer > 1:
            copies = max(1, rows * (tokens + self.answer) / DECODED_AT_ONCE)
            decode = Pass(
                rows=rows,
                tokens=1,
                positions=rows,
                rank=rank,
                past=shared + tokens + self.answer / 2,
                pasts=rows,
                times=self.answer - 1,
                copies=copies,
            )
            total += decode.cost(config, size)
        return total

    def memory(self, config, size: int = 2) -> float:
        """Bytes at most in training: the frozen weights, and what the runs of a step keep for the backward pass."""
        weights = config.num_hidden_layers * sum(matrices(config))
        tables = 1 if config.tie_word_embeddings else 2
        weights += tables * config.vocab_size * config.hidden_size
        rows = min(self.n, self.batch)
        demonstrated = set(self.trained) & set(WITH_DEMONSTRATIONS)
        longest = self.length + (self.shown if demonstrated else 0)
        kept = run_bytes(
            config, rows * longest, rows * self.answer, size, lora_size(config, self.rank)
        )
        runs = self.sets * self.configs
        return size * weights + runs * kept


def size_of(cell: Cell) -> CellSize:
    """The numbers that a study's cell costs by; an answer counts as long as the longest may be."""
    study = cell.study
    options = study.options
    encode = study.subject.tokenizer.encode_all

    def tokens(texts: Iterable[str]) -> float:
        return fmean(map(len, encode(list(texts))))

    rows = [row for episode in cell.episodes for row in episode.train]
    trained = tuple(in_order(options.methods))
    most = max((len(configs(method, 1, study.rates, study.betas)) for method in trained), default=0)
    return CellSize(
        query=tokens(row.prompt for row in rows),
        shown=(cell.n - 1) * tokens(f"{row.prompt}{row.answer}\n\n" for row in rows),
        answer=cell.max_tokens,
        n=cell.n,
        rows=tuple(len(examples.rows) for examples in cell.evaluations.values()),
        sets=options.sets,
        configs=most,
        scored=options.sets * (1 if options.select == "dev" else most),
        methods=options.methods,
        trained=trained,
        epochs=options.epochs,
        batch=options.batch_size,
        rank=options.rank if options.adapter == "lora" else 0,
    )
