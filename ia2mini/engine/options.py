"""What results depend on: every option once, with default and help; the command line is made from it."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from .. import UsageError

RATES = {"lora": (1e-4, 3e-4, 1e-3), "ia3": (1e-3, 1e-2, 1e-1)}  # protocol section 4
# the embedded model is small: LoRA's ten times
TINY_RATES = {"lora": (1e-3, 3e-3, 1e-2), "ia3": (1e-3, 1e-2, 1e-1)}
# of other families: Llama's
BETAS = {"qwen3": (0.1, 0.5, 0.7, 0.9), "llama": (0.001, 0.01, 0.05, 0.5)}
UNTRAINED = ("base", "icl")
LABELS = {  # method: as it is written, in the order of every table and figure
    "base": "base",
    "icl": "ICL",
    "sft": "SFT",
    "sft-sft": "SFT→SFT",
    "soft": "soft labels",
    "soft-sft": "soft→SFT",
    "hidden": "hidden",
    "hidden-sft": "hidden→SFT",
    "ridge": "ridge",
    "ridge-sft": "ridge→SFT",
    "ia2": "IA2",
    "sft-ia2": "SFT→IA2",
    "ia2+sft": "IA2+SFT",
    "ia2-sft": "IA2→SFT",
}
LETTERS = {  # letter -> matrix, in the order of a layer
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "o": "o_proj",
    "g": "gate_proj",
    "u": "up_proj",
    "d": "down_proj",
}
USUAL_LETTERS = "qko"  # paper section 5


def losses_of(methods: tuple[str, ...]) -> set[str]:
    """The phases that these methods consist of ("ia2-sft": ia2 and sft): it says what the teacher is asked for."""
    found = set()
    for method in methods:
        found.update(method.split("-"))
    return found


def last_phase(method: str) -> str:
    return method.split("-")[-1]


def option(
    default,
    help: str,
    choices: Iterable[str] = (),
    least: int | None = None,
    shown: str | None = None,
):
    """A field that is an option of the command line; `shown`: its default in words, `least`: its smallest value."""
    return field(
        default=default,
        metadata={"help": help, "choices": tuple(choices), "least": least, "shown": shown},
    )


def matrices(targets: tuple[str, ...]) -> tuple[str, ...]:
    """The matrices of `--targets`, given by name, by letters ("qko") or as "all", in the order of a layer.

    A name that is not known stays, at the end: the model says that it has no such matrix.
    """
    names = []
    for target in targets:
        if target == "all":
            names += LETTERS.values()
        elif all(letter in LETTERS for letter in target):
            names += [LETTERS[letter] for letter in target]
        else:
            names.append(target)
    known = [name for name in LETTERS.values() if name in names]
    return tuple(known + [name for name in dict.fromkeys(names) if name not in known])


@dataclass(frozen=True)
class AdapterOptions:
    """Which adapter is trained."""

    adapter: str = option("lora", "what is trained", RATES)
    rank: int = option(8, "of LoRA", least=1)
    alpha: float = option(8.0, "of LoRA")
    targets: tuple[str, ...] = option(
        (), "matrices to adapt, by name or letter: q_proj,k_proj or qko", shown="qko"
    )

    @property
    def adapter_name(self) -> str:
        """How tables call the adapter: lora, or with what is not the paper's: lora r16, ia3 qkv."""
        parts = [self.adapter]
        if self.adapter == "lora" and self.rank != 8:
            parts.append(f"r{self.rank}")
        if self.adapter == "lora" and self.alpha != 8:
            parts.append(f"α{self.alpha:g}")
        names = matrices(self.targets)
        letters = "".join(letter for letter, name in LETTERS.items() if name in names)
        if sorted(letters) not in ([], sorted(USUAL_LETTERS)):
            parts.append(letters)
        return " ".join(parts)


@dataclass(frozen=True)
class TrainOptions:
    """How every run trains."""

    rates: tuple[float, ...] = option(
        (), "learning rates", shown="the paper's three for the adapter"
    )
    layers: tuple[int, ...] = option((), "numbers of the layers that are aligned", shown="all")
    batch_size: int = option(4, "training rows of a run in one step", least=1)
    seed: int = option(0, "of every draw; 0 takes the sets of the paper's scripts")

    def __post_init__(self):
        for rate in self.rates:
            if not 0 < rate < float("inf"):
                raise UsageError(f"--rates {rate:g}: a learning rate is a positive number")

    def layer_numbers(self, depth: int) -> list[int] | None:
        """Of a model of `depth` layers those that are aligned; None: all. Raises UsageError."""
        for layer in self.layers:
            if not 0 <= layer < depth:
                raise UsageError(f"--layers {layer}: this model has layers 0 to {depth - 1}")
        return sorted(set(self.layers)) or None

    def rates_for(self, model: str, adapter: str) -> tuple[float, ...]:
        """The rates that were given, else those of a kind of adapter on a model of this name."""
        if self.rates:
            return self.rates
        return TINY_RATES[adapter] if model == "tiny" else RATES[adapter]


@dataclass(frozen=True)
class Options(TrainOptions, AdapterOptions):
    """Everything about a study that changes its numbers, but for tasks, data and checkpoint."""

    n: tuple[int, ...] = option((4,), "training rows of a set; several: 2,4,8")
    epochs: int = option(50, "at most", least=1)
    patience: int = option(
        5, "looks at the dev loss without improvement before a run stops", least=1
    )
    methods: tuple[str, ...] = option(
        ("base", "icl", "sft", "ia2", "ia2-sft"),
        "also ia2+sft, sft-ia2, soft, hidden, ridge; X-sft goes on from X",
    )
    sets: int = option(5, "few-shot sets, each drawn from the pool with its own seed", least=1)
    betas: tuple[float, ...] = option((), "shares of cross-entropy in ia2+sft", shown="four")
    labels: str = option(
        "truth", "what SFT trains on: true answers or ICL responses", ("truth", "icl")
    )
    soft_k: int = option(1024, "likeliest tokens that soft labels keep", least=1)
    icl_demos: str = option(
        "set", "the set's N rows, or N - 1 other rows for each query", ("set", "pool")
    )
    race: bool = option(True, "rates that cannot win any more leave early; with --select dev only")
    select: str = option(
        "dev", "rate by dev loss or, as the paper, by evaluation rows", ("dev", "eval", "both")
    )
    paper_compat: bool = option(
        False, "the released scripts' choices where they differ from ours (docs/reference.md)"
    )
    eval_rows: int = option(500, "evaluation rows at most", least=1, shown="500; the demo 120")
    asim_rows: int = 100  # evaluation rows on which attention outputs are compared

    def __post_init__(self):
        super().__post_init__()
        if self.paper_compat:
            # the released scripts report the best on the evaluation rows
            object.__setattr__(self, "select", "eval")


@dataclass(frozen=True)
class FitOptions(TrainOptions, AdapterOptions):
    """How one's own rows become an adapter."""

    methods: tuple[str, ...] = option(
        ("sft", "ia2-sft"), "what is tried, beside the base, ICL and a linear probe"
    )
    rates: tuple[float, ...] = option(
        (), "learning rates; held-out rows choose among several", shown="the paper's highest"
    )
    epochs: int = option(5, "of every phase of training", least=1)
    ship: str = option(
        "",
        "a method, icl or probe: ship this, whatever held-out rows say",
        shown="what is surely better",
    )
    folds: int = option(5, "parts of cross-validation; up to 10 rows each row is one", least=2)
    demonstrations: int = option(
        16, "rows the teacher sees before each, labels in turn, as the context holds", least=1
    )
    max_tokens: int = option(
        200, "of an answer to --prompts; of others the longest answer decides", least=1
    )
    chat: bool = option(
        False, "prompts as turns of the checkpoint's chat template, demonstrations as earlier turns"
    )
    context: str = ""  # a text that the teacher sees before every query, instead of demonstrations
    temperature: bool = option(
        True, "calibrate probabilities by one temperature, fitted on held-out rows"
    )

    def rates_for(self, model: str, adapter: str) -> tuple[float, ...]:
        """The rates that were given, else the highest of the paper's: few rows leave little to choose by."""
        return self.rates or super().rates_for(model, adapter)[-1:]
