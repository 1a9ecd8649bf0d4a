"""What a study's numbers depend on: every option once, with default and help; the command line is made from it."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import product

from .. import UsageError

RATES = {"lora": (1e-4, 3e-4, 1e-3), "ia3": (1e-3, 1e-2, 1e-1)}  # protocol section 4
TINY_RATES = {"lora": (1e-3, 3e-3, 1e-2), "ia3": RATES["ia3"]}  # the embedded model is small: LoRA's ten times
BETAS = {"qwen3": (0.1, 0.5, 0.7, 0.9), "llama": (0.001, 0.01, 0.05, 0.5)}
UNTRAINED = ("base", "icl")
MATCHED = ("ia2", "hidden")  # phases that match activations; SFT's are on the true answers, others the teacher's
MATRICES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}  # by their letters
MATRICES |= {"g": "gate_proj", "u": "up_proj", "d": "down_proj"}
THIRDS = ("first-third", "middle-third", "last-third")  # of the layers


def phases(methods: tuple[str, ...]) -> set[str]:
    """What these methods consist of: it says what the teacher is asked for."""
    return {phase for method in methods for phase in method.split("-")}


def last_phase(method: str) -> str:
    return method.split("-")[-1]


def option(default, help: str, choices: Iterable[str] = (), least: int | None = None, shown: str | None = None):
    """A field that is an option of the command line; `shown`: its default in words, `least`: its smallest value."""
    return field(default=default, metadata={"help": help, "choices": tuple(choices), "least": least, "shown": shown})


def matrices(targets: tuple[str, ...]) -> tuple[str, ...]:
    """The matrices of `--targets`, by name, by letters ("qko"), or all, in the order of a layer; unknown ones last."""
    letters = {"all": "".join(MATRICES)}
    found = (map(MATRICES.get, letters.get(t, t)) if set(letters.get(t, t)) <= set(MATRICES) else [t] for t in targets)
    names = dict.fromkeys(name for names in found for name in names)
    return tuple(sorted(names, key=lambda name: [*MATRICES.values(), name].index(name)))


@dataclass(frozen=True)
class AdapterOptions:
    """Which adapter is trained."""

    adapter: str = option("lora", "what is trained", RATES)
    rank: int = option(8, "of LoRA", least=1)
    alpha: float = option(8.0, "of LoRA")
    targets: tuple[str, ...] = option((), "matrices to adapt, by name or letter", shown="qko")

    @property
    def name(self) -> str:
        """How tables call it: lora, or with what is not the paper's: lora r16, ia3 qkv."""
        lora, letters = self.adapter == "lora", "".join(k for k, name in MATRICES.items() if name in self.targets)
        usual = letters in ("", "qko")
        parts = [f"r{self.rank}"] * (lora and self.rank != 8) + [f"α{self.alpha:g}"] * (lora and self.alpha != 8)
        return " ".join([self.adapter, *parts, *[letters] * (not usual)])


@dataclass(frozen=True)
class AdapterLists:
    """Which adapters are compared."""

    adapter: tuple[str, ...] = option(("lora",), f"what is trained: {', '.join(RATES)}; several: lora,ia3", RATES)
    rank: tuple[int, ...] = option((8,), "of LoRA; several: 4,8,16", least=1)
    alpha: float = option(8.0, "of LoRA")
    targets: tuple[str, ...] = option(
        (),
        "matrices to adapt: names (q_proj,k_proj) are one set, letters a set each (qko,qv,all)",
        shown="qko",
    )

    @property
    def adapters(self) -> list[AdapterOptions]:
        """Each kind with each rank and each set of matrices, as far as it has them."""
        named = tuple(name for name in self.targets if name in MATRICES.values())
        sets = [matrices(named)] * bool(named) + [matrices((part,)) for part in self.targets if part not in named]
        found = []
        for kind, rank, targets in product(self.adapter, self.rank, sets or [()]):
            found.append(AdapterOptions(kind, rank if kind == "lora" else 8, self.alpha, targets))
        return list(dict.fromkeys(found))


@dataclass(frozen=True)
class TrainOptions:
    """How every run trains."""

    rates: tuple[float, ...] = option((), "learning rates", shown="the paper's three for the adapter")
    layers: tuple[str, ...] = option((), f"numbers of layers that are aligned, or {', '.join(THIRDS)}", shown="all")
    batch_size: int = option(4, "training rows of a run in one step", least=1)
    epochs: int = option(50, "at most", least=1)
    patience: int = option(5, "looks at the dev loss without improvement before a run stops", least=1)
    seed: int = option(0, "of every draw; 0 takes the sets of the paper's scripts")

    def __post_init__(self):
        if bad := [rate for rate in self.rates if not 0 < rate < float("inf")]:
            raise UsageError(f"--rates {bad[0]:g}: a learning rate is a positive number")

    def layer_numbers(self, depth: int) -> list[int] | None:
        """Of a model of `depth` layers those that are aligned; None: all. Raises UsageError."""
        thirds = {name: range(depth * i // 3, depth * (i + 1) // 3) for i, name in enumerate(THIRDS)}
        found = [[int(part)] if str(part).isdecimal() else thirds.get(part) for part in self.layers]
        for part, some in zip(self.layers, found):
            if some is None or any(layer >= depth for layer in some):
                raise UsageError(f"--layers {part}: this model has layers 0 to {depth - 1}; or say {', '.join(THIRDS)}")
        return sorted({layer for some in found for layer in some}) or None

    def rates_for(self, model: str, adapter: str) -> tuple[float, ...]:
        """The rates that were given, else those of a kind of adapter on a model of this name."""
        return self.rates or (TINY_RATES if model == "tiny" else RATES)[adapter]


@dataclass(frozen=True)
class Options(TrainOptions, AdapterLists):
    """Everything about a study that changes its numbers, but for tasks, data and checkpoint."""

    n: tuple[int, ...] = option((4,), "training rows of a set; several: 2,4,8")
    methods: tuple[str, ...] = option(
        ("base", "icl", "sft", "ia2", "ia2-sft"),
        "also ia2+sft, sft-ia2, soft, hidden, ridge, responses; X-sft goes on from X",
    )
    unlabelled: tuple[int, ...] = option((0,), "more rows, without answers, whose queries join IA2's; several: 0,8,64")
    sets: int = option(5, "few-shot sets, each drawn from the pool with its own seed", least=1)
    betas: tuple[float, ...] = option((), "shares of cross-entropy in ia2+sft", shown="four")
    labels: str = option("truth", "what SFT trains on: true answers or ICL responses", ("truth", "icl"))
    soft_k: int = option(1024, "likeliest tokens that soft labels keep", least=1)
    teacher: str = option(
        "true", "controls: what it sees instead of demonstrations", ("true", "shuffled", "other", "none")
    )
    icl_demos: str = option("set", "the set's N rows, or N - 1 other rows for each query", ("set", "pool"))
    race: bool = option(True, "rates that cannot win any more leave early; with --select dev only")
    select: str = option(
        "dev", "rate by dev loss, KL to the teacher, evaluation rows (the paper)", ("dev", "kl", "eval", "both")
    )
    paper_compat: bool = option(False, "the released scripts' choices where they differ from ours (docs/reference.md)")
    eval_rows: int = option(500, "evaluation rows at most", least=1, shown="500; the demo 120")
    asim_rows: int = 100  # evaluation rows on which attention outputs are compared

    def __post_init__(self):
        super().__post_init__()
        if self.paper_compat:
            object.__setattr__(self, "select", "eval")  # the released scripts report the best on the evaluation rows


@dataclass(frozen=True)
class FitOptions(TrainOptions, AdapterOptions):
    """How one's own rows become an adapter."""

    methods: tuple[str, ...] = option(("sft", "ia2", "ia2-sft"), "what is tried, beside the base and ICL")
    folds: int = option(5, "parts of cross-validation; up to 10 rows each row is one", least=2)
    demonstrations: int = option(16, "rows the teacher sees before each, labels in turn, as the context holds", least=1)
    max_tokens: int = option(200, "of an answer to --prompts; of others the longest answer decides", least=1)
    chat: bool = option(False, "prompts as turns of the checkpoint's chat template, demonstrations as earlier turns")
    context: str = ""  # a text that the teacher sees before every query, instead of demonstrations
    temperature: bool = option(True, "calibrate probabilities by one temperature, fitted on held-out rows")
