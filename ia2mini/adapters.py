"""LoRA and (IA)3: R runs side by side over one frozen model.

The trainable weights of R runs are one float32 matrix theta [R, M], a row a run. An adapter knows how a row divides
into named tensors (`shapes`), how it begins (`init`), what it does to a linear layer while `adapted` (`change`) and
what it makes of that layer's weights for good (`merged`). The rows of a batch come in R equal groups, group r belongs
to run r; R = 1 is ordinary fine-tuning.
"""

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Generator, Tensor, nn

from . import UsageError
from .models.layers import Linear

TARGETS = ("q_proj", "k_proj", "o_proj")  # paper section 5
# all matrices of a layer that an adapter may change
EVERY_MATRIX = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Adapter:
    """What both adapters have: `linears` that they change, and `shapes` of one run's named tensors."""

    shapes: dict[str, tuple]

    def __init__(self, model: nn.Module, targets):
        self.targets = tuple(targets)
        self.linears = find_linears(model, targets)

    def init(self, generator: Generator) -> Tensor:
        """First weights of one run, [M] float32 on the CPU."""
        return torch.zeros(sum(map(math.prod, self.shapes.values())))

    def change(self, name: str, weights: dict[str, Tensor]) -> Callable:
        """The function (base, x) that takes the place of one of `linears`, from weights [R, …] of R runs."""
        raise NotImplementedError

    def merged(self, name: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weight (and bias) of one of `linears` with one run's weights in it, by parameter name, float32."""
        raise NotImplementedError


class LoRA(Adapter):
    """W x + (alpha / rank) B A x, A [rank, in] random, B [out, rank] zero at first (Hu et al. 2021; as in peft)."""

    def __init__(self, model: nn.Module, targets=TARGETS, rank=8, alpha=8.0):
        if rank < 1:
            raise UsageError(f"rank {rank}: LoRA needs a rank of at least 1")
        super().__init__(model, targets)
        self.rank = rank
        self.alpha = alpha
        self.scale = alpha / rank
        self.shapes = {}
        for name, linear in self.linears.items():
            self.shapes[f"{name}.A"] = (rank, linear.in_features)
            self.shapes[f"{name}.B"] = (linear.out_features, rank)

    def init(self, generator: Generator) -> Tensor:
        theta = super().init(generator)
        for name, weight in unpack(theta[None], self.shapes).items():
            if name.endswith(".A"):
                bound = 1 / math.sqrt(weight.shape[-1])  # kaiming_uniform with a = sqrt(5)
                weight.uniform_(-bound, bound, generator=generator)
        return theta

    def change(self, name: str, weights: dict[str, Tensor]) -> Callable:
        A = weights[f"{name}.A"]
        B = weights[f"{name}.B"]

        def add_low_rank(base: Callable, x: Tensor) -> Tensor:
            """y + scale * B A x for y = base(x), A [R, rank, in], B [R, out, rank]."""
            y = base(x)
            down = MatmulInFloat32.apply(by_run(x, len(A)), A)  # [R, rows of a run, rank]
            up = (down * self.scale) @ B.mT
            return y + up.view(y.shape).to(y.dtype)

        return add_low_rank

    def merged(self, name: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        A = weights[f"{name}.A"]
        B = weights[f"{name}.B"]
        weight = self.linears[name].weight.float()
        return {f"{name}.weight": weight + self.scale * B @ A}


class MatmulInFloat32(torch.autograd.Function):
    """x.float() @ W^T, x [R, n, in], W [R, out, in]. A bfloat16 x is kept for the backward pass as it is."""

    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor) -> Tensor:
        ctx.save_for_backward(x, W)
        return x.to(W.dtype) @ W.mT

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor]:
        x, W = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ W).to(x.dtype)
        return grad_x, grad.mT @ x.to(W.dtype)


class IA3(Adapter):
    """y * s with s [out] starting at one, on the outputs of the target maps (Liu et al. 2022; protocol section 4).

    `scale_inputs` scales what goes in instead, s [in]: True for every map, as the paper's released scripts do, or the
    full names of some maps (peft's feedforward modules).
    """

    def __init__(
        self,
        model: nn.Module,
        targets=TARGETS,
        scale_inputs: bool | Collection[str] = False,
    ):
        super().__init__(model, targets)
        self.inputs: set[str] = set()
        if scale_inputs is True:
            self.inputs = set(self.linears)
        elif scale_inputs:
            self.inputs = set(scale_inputs)
        self.shapes = {}
        for name, linear in self.linears.items():
            size = linear.in_features if name in self.inputs else linear.out_features
            self.shapes[name] = (size,)

    def init(self, generator: Generator) -> Tensor:
        return super().init(generator) + 1

    def change(self, name: str, weights: dict[str, Tensor]) -> Callable:
        s = weights[name]

        def scale_output(base: Callable, x: Tensor) -> Tensor:
            """base(x) * s, s [R, out]."""
            y = base(x)
            scaled = by_run(y, len(s)) * s[:, None].to(y.dtype)
            return scaled.view(y.shape)

        def scale_input(base: Callable, x: Tensor) -> Tensor:
            """base(x * s), s [R, in]."""
            scaled = by_run(x, len(s)) * s[:, None].to(x.dtype)
            return base(scaled.view(x.shape))

        return scale_input if name in self.inputs else scale_output

    def merged(self, name: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        s = weights[name]
        linear = self.linears[name]
        weight = linear.weight.float()
        if name in self.inputs:
            return {f"{name}.weight": weight * s}
        merged = {f"{name}.weight": weight * s[:, None]}
        if linear.bias is not None:
            merged[f"{name}.bias"] = linear.bias.float() * s
        return merged


def by_run(x: Tensor, R: int) -> Tensor:
    """x [R * rows, (T,) D] as [R, rows * T, D]: one group a run."""
    return x.reshape(R, -1, x.shape[-1])


@contextmanager
def adapted(model: nn.Module, adapter: Adapter | None, theta: Tensor | None) -> Iterator[Callable]:
    """The model itself, its linear maps changed by `adapter` with weights theta [R, M]; as it is where theta is None.

    The rows of each batch must come in R equal groups, run by run. Gradients reach theta. Call the backward pass inside
    the `with` too: checkpointed layers are recomputed in it, and need the adapter.
    """
    if theta is None:
        yield model
        return
    weights = unpack(theta, adapter.shapes)
    try:
        for name, linear in adapter.linears.items():
            linear.adapted = adapter.change(name, weights)
        yield model
    finally:
        for linear in adapter.linears.values():
            linear.adapted = None


def find_linears(model: nn.Module, targets) -> dict[str, Linear]:
    """Name -> every `Linear` called one of `targets`. Raises UsageError for no match."""
    linears = {}
    matched = set()
    for name, module in model.named_modules():
        target = name.rpartition(".")[2]  # of model.layers.<layer>.….<target>
        if isinstance(module, Linear) and target in targets:
            linears[name] = module
            matched.add(target)
    for target in targets:
        if target not in matched:
            known = ", ".join(EVERY_MATRIX)
            raise UsageError(
                f"adapter target {target!r} matches no matrix of this model; targets: {known}"
            )
    return linears


def unpack(theta: Tensor, shapes: dict[str, tuple]) -> dict[str, Tensor]:
    """Name -> [R, *shape] views of theta [R, M]."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    tensors = {}
    for name, part in zip(shapes, theta.split(sizes, dim=1)):
        tensors[name] = part.view(len(theta), *shapes[name])
    return tensors
