"""LoRA, (IA)3, prompt, prefix and full fine-tuning: R runs side by side over one frozen model.

The trainable weights of R runs are one float32 matrix theta [R, M], a row a run. An adapter knows how a row divides
into named tensors (`shapes`), how it begins (`init`), and what it does to the model while `adapted` (`change` at
linear layers, `prefix` before the rows). The rows of a batch come in R equal groups, group r belongs to run r; R = 1 is
ordinary fine-tuning.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Generator, Tensor, nn

from . import UsageError
from .models.cache import Prefix
from .models.common import Linear
from .models.shard import INTO, OUT, mesh_of, own, shared, whole
from .options import MATRICES, AdapterOptions, matrices

TARGETS = ("q_proj", "k_proj", "o_proj")  # paper section 5
EVERY_MATRIX = tuple(MATRICES.values())


class Adapter:
    """What all adapters have: `linears` that they change, `shapes` of one run's named tensors, and what they do."""

    targets: tuple[str, ...] = ()
    layers: list[int] | None = None
    tokens: int = 0  # virtual ones, before every row
    linears: dict[str, Linear] = {}
    within = True  # works within a split block, on each rank's part of it
    shapes: dict[str, tuple]

    def __init__(self, model: nn.Module, targets, layers: list[int] | None):
        self.targets, self.layers = tuple(targets), layers
        self.linears = find_linears(model, targets, layers)

    def init(self, model: nn.Module, generator: Generator) -> Tensor:
        """First weights of one run, [M] float32 on the CPU."""
        return torch.zeros(sum(map(math.prod, self.shapes.values())))

    def change(self, name: str, weights: dict[str, Tensor]) -> Callable:
        """What the seam of one of `linears` shall do, from weights of R runs."""
        raise NotImplementedError

    def prefix(self, model: nn.Module, weights: dict[str, Tensor]) -> Prefix | None:
        """What stands before every row, from weights of R runs."""
        return None


class LoRA(Adapter):
    """W x + (alpha / rank) B A x, A [rank, in] random, B [out, rank] zero at first (Hu et al. 2021; as in peft)."""

    def __init__(self, model: nn.Module, targets=TARGETS, layers: list[int] | None = None, rank=8, alpha=8.0):
        if rank < 1:
            raise UsageError(f"rank {rank}: LoRA needs a rank of at least 1")
        super().__init__(model, targets, layers)
        self.rank, self.alpha, self.shapes = rank, alpha, {}
        for name, linear in self.linears.items():
            self.shapes[f"{name}.A"] = (rank, linear.in_features)
            self.shapes[f"{name}.B"] = (linear.out_features, rank)

    def init(self, model: nn.Module, generator: Generator) -> Tensor:
        theta = super().init(model, generator)
        for name, weight in unpack(theta[None], self.shapes).items():
            if name.endswith(".A"):
                bound = 1 / math.sqrt(weight.shape[-1])  # kaiming_uniform with a = sqrt(5)
                weight.uniform_(-bound, bound, generator=generator)
        return theta

    def change(self, name: str, weights: dict[str, Tensor]) -> Callable:
        frozen = self.linears[name].weight
        A, B = own(weights[f"{name}.A"], 2, frozen, INTO), own(weights[f"{name}.B"], 1, frozen, OUT)
        return partial(low_rank, A, B, self.alpha / self.rank)


class IA3(Adapter):
    """y * s with s [out] starting at one, on the outputs of the target maps (Liu et al. 2022; protocol section 4).

    `scale_inputs` scales what goes in instead, s [in], as the paper's released scripts do; a tuple: of these targets
    (peft's feedforward modules).
    """

    def __init__(self, model: nn.Module, targets=TARGETS, layers: list[int] | None = None, scale_inputs=False):
        super().__init__(model, targets, layers)
        inputs = targets if scale_inputs is True else scale_inputs or ()
        self.inputs = {name for name in self.linears if name.rsplit(".", 1)[1] in inputs}
        sizes = {name: x.in_features if name in self.inputs else x.out_features for name, x in self.linears.items()}
        self.shapes = {name: (features,) for name, features in sizes.items()}

    def init(self, model: nn.Module, generator: Generator) -> Tensor:
        return super().init(model, generator) + 1

    def change(self, name: str, weights: dict[str, Tensor]) -> Callable:
        side = INTO if name in self.inputs else OUT
        return partial(scaled, own(weights[name], 1, self.linears[name].weight, side), name in self.inputs)


class Full(Adapter):
    """(W + D) x with D [out, in] zero at first: full fine-tuning of every projection matrix, not embeddings and norms.

    With Adam and no weight decay, training D is training W; keeping D apart leaves the base untouched and D in float32.
    """

    def __init__(self, model: nn.Module, targets=EVERY_MATRIX, layers: list[int] | None = None):
        if mesh_of(model) is not None:
            raise UsageError("--adapter full is as large as the model and is not split with it; leave out --shard")
        super().__init__(model, targets, layers)
        self.shapes = {name: tuple(linear.weight.shape) for name, linear in self.linears.items()}

    def change(self, name: str, weights: dict[str, Tensor]) -> Callable:
        return partial(shifted, weights[name])


class Prompt(Adapter):
    """`tokens` trained embeddings [tokens, D] before every row, random words' at first (Lester et al. 2021)."""

    within = False

    def __init__(self, model: nn.Module, tokens: int = 20):
        self.tokens = tokens
        self.shapes = {"embeddings": (tokens, model.config.hidden_size)}

    def init(self, model: nn.Module, generator: Generator) -> Tensor:
        return random_words(model, self.tokens, generator).float().cpu().flatten()

    def prefix(self, model: nn.Module, weights: dict[str, Tensor]) -> Prefix:
        prefix = Prefix()  # never sees the rows behind it: computed once a run, not once a row
        model(weights["embeddings"].to(model.model.embed_tokens.weight.dtype), logits=False, cache=prefix)
        return prefix


class PrefixTuning(Adapter):
    """Trained keys and values of `tokens` virtual tokens in every layer, random words' at first (Li & Liang 2021)."""

    def __init__(self, model: nn.Module, tokens: int = 20):
        c = model.config
        self.tokens = tokens
        self.shapes = {"prefix": (c.num_hidden_layers, 2, c.num_key_value_heads, tokens, c.head_dim)}

    def init(self, model: nn.Module, generator: Generator) -> Tensor:
        prefix = Prefix()
        with torch.no_grad():
            model(random_words(model, self.tokens, generator)[None], logits=False, cache=prefix)
        found = whole(torch.stack([torch.cat(pair) for pair in prefix.layers]), mesh_of(model), dim=2)
        return found.float().cpu().flatten()

    def prefix(self, model: nn.Module, weights: dict[str, Tensor]) -> Prefix:
        layers = weights["prefix"].to(model.model.embed_tokens.weight.dtype).unbind(1)  # each [R, 2, K, tokens, E]
        k_proj = model.model.layers[0].self_attn.k_proj.weight
        return Prefix(own(layer, 2, k_proj, OUT).unbind(1) for layer in layers)


def random_words(model: nn.Module, count: int, generator: Generator) -> Tensor:
    """Embeddings [count, D] of words drawn from the vocabulary."""
    table = model.model.embed_tokens
    return table(torch.randint(len(table.weight), (count,), generator=generator).to(table.weight.device))


ADAPTERS = {"lora": LoRA, "ia3": IA3, "prompt": Prompt, "prefix": PrefixTuning, "full": Full}


def make_adapter(model: nn.Module, o: AdapterOptions, scale_inputs: bool = False) -> Adapter:
    """The adapter that the options ask for. Raises UsageError for targets that the model lacks."""
    if o.adapter in ("prompt", "prefix"):
        if o.targets:
            raise UsageError(f"--targets chooses matrices, and a {o.adapter} adapter has none; leave it out")
        return ADAPTERS[o.adapter](model, tokens=o.virtual_tokens)
    more: dict[str, dict] = {"lora": {"rank": o.rank, "alpha": o.alpha}, "ia3": {"scale_inputs": scale_inputs}}
    chosen = {"targets": matrices(o.targets)} if o.targets else {}
    return ADAPTERS[o.adapter](model, **chosen, **more.get(o.adapter, {}))


def low_rank(A: Tensor, B: Tensor, scale: float, base: Callable, x: Tensor) -> Tensor:
    """y + scale * B A x for y = base(x), A [R, rank, in], B [R, out, rank]."""
    y = base(x)
    down = Product.apply(grouped(x, A), A)  # [R, rows of a run, rank]
    return y + ((down * scale) @ B.mT).view(y.shape).to(y.dtype)


class Product(torch.autograd.Function):
    """x [R, n, in] @ W^T in the float32 of W [R, out, in]; of an x in bfloat16 no float32 copy is kept."""

    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor) -> Tensor:
        ctx.save_for_backward(x, W)
        return x.to(W.dtype) @ W.mT

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor]:
        x, W = ctx.saved_tensors
        return (grad @ W).to(x.dtype) if ctx.needs_input_grad[0] else None, grad.mT @ x.to(W.dtype)


def scaled(s: Tensor, inputs: bool, base: Callable, x: Tensor) -> Tensor:
    """base(x) * s for s [R, out]; of `inputs` base(x * s) for s [R, in]."""
    y = x if inputs else base(x)
    y = (grouped(y, s) * s[:, None].to(y.dtype)).view(y.shape)
    return base(y) if inputs else y


def shifted(D: Tensor, base: Callable, x: Tensor) -> Tensor:
    """y + D x for y = base(x), D [R, out, in]."""
    y = base(x)
    return y + Product.apply(grouped(x, D), D).view(y.shape).to(y.dtype)


def grouped(x: Tensor, weight: Tensor) -> Tensor:
    """x [R * rows, (T,) D] as [R, rows * T, D]: one group a run."""
    return x.reshape(len(weight), -1, x.shape[-1])


@contextmanager
def adapted(model: nn.Module, adapter: Adapter, theta: Tensor) -> Iterator[Callable]:
    """The model under `adapter` with weights theta [R, M], as a callable with the model's own arguments.

    Within the block the batch's rows come in R equal groups. Gradients reach theta; the backward pass belongs into the
    block too, since checkpointed layers compute anew there.
    """
    weights = unpack(shared(theta, mesh_of(model) if adapter.within else None), adapter.shapes)
    try:
        for name, linear in adapter.linears.items():
            linear.adapter = adapter.change(name, weights)
        yield partial(model, prefix=adapter.prefix(model, weights))
    finally:
        for linear in adapter.linears.values():
            linear.adapter = None


def find_linears(model: nn.Module, targets, layers: list[int] | None) -> dict[str, Linear]:
    """Name -> every `Linear` called one of `targets` in `layers` (None: all). Raises UsageError for no match."""
    depth = model.config.num_hidden_layers
    if bad := [i for i in layers or [] if not 0 <= i < depth]:
        raise UsageError(f"layer {bad[0]}: this model has layers 0 to {depth - 1}")
    every = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    chosen = range(depth) if layers is None else layers
    found = {n: m for n, m in every.items() if n.rsplit(".", 1)[1] in targets and int(n.split(".")[2]) in chosen}
    if lost := [target for target in targets if not any(name.endswith(f".{target}") for name in found)]:
        there = f"targets: {', '.join(EVERY_MATRIX)}"
        raise UsageError(f"adapter target {lost[0]!r} matches no matrix of this model; {there}")
    return found  # a name is model.layers.<i>.….<target>


def unpack(theta: Tensor, shapes: dict[str, tuple]) -> dict[str, Tensor]:
    """Name -> [R, *shape] views of theta [R, M]."""
    parts = theta.split([math.prod(shape) for shape in shapes.values()], dim=1)
    return {name: part.view(len(theta), *shape) for (name, shape), part in zip(shapes.items(), parts)}
