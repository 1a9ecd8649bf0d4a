"""What results depend on: every option once, with default and help; the command line is made from it."""

from collections.abc import Iterable
from dataclasses import Field, dataclass, field, fields
from typing import get_origin

from .. import UsageError

RATES = {"lora": (1e-4, 3e-4, 1e-3), "ia3": (1e-3, 1e-2, 1e-1)}  # protocol section 4
# the embedded model is small: LoRA's ten times
TINY_RATES = {"lora": (1e-3, 3e-3, 1e-2), "ia3": (1e-3, 1e-2, 1e-1)}
# of other families: Llama's
BETAS = {"qwen3": (0.1, 0.5, 0.7, 0.9), "llama": (0.001, 0.01, 0.05, 0.5)}
UNTRAINED = ("base", "icl")
ICL_SFT = "icl-sft"  # what a tuned teacher is
METHOD_NAMES = {  # method: as it is written, in the order of every table and figure
    "base": "base",
    "icl": "ICL",
    "icl-sft": "ICL, fine-tuned",
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
# what `fit` tries, and for how many epochs. SFT on the teacher's answers to a context does harm (docs/results.md)
ROW_METHODS = ("sft", "ia2-sft", "hidden-sft")
ROW_EPOCHS = 5
CONTEXT_METHODS = ("ia2",)
CONTEXT_EPOCHS = 15
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


def method_name(method: str) -> str:
    """How tables and figures write a method, also one with a loss of one's own: "huber-sft" is huber→SFT."""
    return METHOD_NAMES.get(method, method.replace("-sft", "→SFT"))


def phases_of(methods: Iterable[str]) -> set[str]:
    """The phases that these methods consist of ("ia2-sft": ia2 and sft): it says what the teacher is asked for."""
    found = set()
    for method in methods:
        found.update([method] if method == ICL_SFT else method.split("-"))
    return found


def need_teacher(methods: Iterable[str]) -> bool:
    """Whether one of these methods learns from what the teacher does."""
    return bool(phases_of(methods) - {*UNTRAINED, "sft", ICL_SFT})


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


def check_value(f: Field, value) -> None:
    """Raises UsageError for a value that the command line would not take, where an option is given in Python."""
    if value is None or "least" not in f.metadata:
        return
    if get_origin(f.type) is tuple and not isinstance(value, (tuple, list)):
        raise UsageError(f"{f.name} = {value!r}: give a tuple, as ({value!r},)")
    least = f.metadata["least"]
    if least is not None and not value >= least:
        raise UsageError(f"{f.name} = {value!r}: at least {least} is needed")
    choices = f.metadata["choices"]
    if choices and value not in choices:
        raise UsageError(f"{f.name} = {value!r}: give one of {', '.join(choices)}")


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

    adapter: str = option("lora", "Train this kind of adapter.", RATES)
    rank: int = option(8, "Give LoRA's two matrices this rank.", least=1)
    alpha: float = option(8.0, "Scale LoRA's update by alpha / rank.")
    targets: tuple[str, ...] = option((), "Adapt these matrices: q_proj,k_proj or qk.", shown="qko")

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

    rates: tuple[float, ...] = option((), "Try these learning rates.", shown="the paper's three")
    layers: tuple[int, ...] = option((), "Match activations only in these layers.", shown="all")
    batch_size: int = option(4, "Train on this many rows in one step.", least=1)
    seed: int = option(
        0, "Seed every random draw; 0 draws the sets of the paper's scripts.", least=0
    )

    def __post_init__(self):
        for f in fields(self):
            check_value(f, getattr(self, f.name))
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

    n: tuple[int, ...] = option((4,), "Draw this many training rows; 2,4,8 tries several.")
    epochs: int = option(50, "Train for at most this many epochs.", least=1)
    patience: int = option(5, "Stop after this many evaluations without a lower dev loss.", least=1)
    methods: tuple[str, ...] = option(
        ("base", "icl", "sft", "ia2", "ia2-sft"),
        "Compare these methods. There are also ia2+sft, sft-ia2, soft, hidden and ridge; "
        "X-sft runs SFT from the weights of X. icl-sft trains and answers with demonstrations in the prompt.",
    )
    loss: tuple[str, ...] = option(
        (),
        "Add the methods NAME and NAME-sft, with the loss NAME of your own: FILE.py or FILE.py:NAME. "
        "The file is executed.",
        shown="none",
    )
    sets: int = option(5, "Draw this many training sets, each with its own seed.", least=1)
    betas: tuple[float, ...] = option((), "Weigh cross-entropy by these in ia2+sft.", shown="four")
    labels: str = option(
        "truth",
        "Train SFT on the true answers, or on the model's own answers with demonstrations (icl).",
        ("truth", "icl"),
    )
    teacher: str = option(
        "base",
        "Align to the base model with demonstrations, or to that model fine-tuned with demonstrations (tuned).",
        ("base", "tuned"),
    )
    soft_k: int = option(1024, "Keep this many of the likeliest tokens in soft labels.", least=1)
    icl_demos: str = option(
        "set",
        "Show ICL the training set's N rows, or N - 1 other rows drawn for each query (pool).",
        ("set", "pool"),
    )
    race: bool = option(True, "Stop a learning rate that cannot win any more (with --select dev).")
    select: str = option(
        "dev",
        "Choose the learning rate by dev loss or, as the paper does, by the evaluation rows.",
        ("dev", "eval", "both"),
    )
    paper_compat: bool = option(
        False, "Follow the paper's released scripts where ia2mini differs (docs/reference.md)."
    )
    eval_rows: int = option(
        500, "Evaluate on at most this many rows.", least=1, shown="500; the demo 120"
    )
    asim_rows: int = 100  # evaluation rows on which attention outputs are compared

    @property
    def learns_from_teacher(self) -> bool:
        """Whether a method learns from what the teacher does or, with `labels` "icl", from its answers."""
        return need_teacher(self.methods) or self.labels == "icl"

    @property
    def tuned(self) -> bool:
        """Whether a tuned teacher is to be trained."""
        return self.teacher == "tuned" and self.learns_from_teacher

    def __post_init__(self):
        super().__post_init__()
        if self.loss and self.layers:
            raise UsageError("--layers: a loss of your own chooses its layers; leave one out")
        if self.paper_compat:
            # the released scripts report the best on the evaluation rows
            object.__setattr__(self, "select", "eval")


@dataclass(frozen=True)
class FitOptions(TrainOptions, AdapterOptions):
    """How one's own rows become an adapter."""

    methods: tuple[str, ...] = option(
        None,
        "Try these methods, beside the base model, ICL and a linear probe. sft alone is the fastest; icl-sft keeps "
        "demonstrations in the prompt and trains many times longer.",
        shown=f"{','.join(ROW_METHODS)}; with --context {','.join(CONTEXT_METHODS)}",
    )
    rates: tuple[float, ...] = option(
        (), "Try these learning rates; held-out rows choose.", shown="the paper's highest"
    )
    epochs: int = option(
        None,
        "Train every phase for this many epochs.",
        least=1,
        shown=f"{ROW_EPOCHS}; with --context {CONTEXT_EPOCHS}",
    )
    balance: bool = option(False, "Let every label weigh the same in training, however rare.")
    ship: str = option(
        "",
        "Ship this method (or icl, or probe), whatever the held-out rows say.",
        shown="held-out rows decide",
    )
    folds: int = option(
        5, "Cross-validate in this many folds; up to 10 rows, each is one.", least=2
    )
    demonstrations: int = option(
        16, "Show the teacher at most this many rows, labels in turn, before each row.", least=1
    )
    max_tokens: int = option(
        200,
        "Generate at most this many tokens for --prompts; for ROWS the longest answer decides.",
        least=1,
    )
    chat: bool = option(False, "Write prompts and demonstrations by the model's chat template.")
    context: str = ""  # a text that the teacher sees before every query, instead of demonstrations
    temperature: bool = option(True, "Calibrate probabilities by a temperature from held-out rows.")

    def __post_init__(self):
        super().__post_init__()
        if self.methods is None:
            usual_methods = CONTEXT_METHODS if self.context else ROW_METHODS
            object.__setattr__(self, "methods", usual_methods)
        if self.epochs is None:
            usual_epochs = CONTEXT_EPOCHS if self.context else ROW_EPOCHS
            object.__setattr__(self, "epochs", usual_epochs)

    def rates_for(self, model: str, adapter: str) -> tuple[float, ...]:
        """The rates that were given, else the highest of the paper's: few rows leave little to choose by."""
        return self.rates or super().rates_for(model, adapter)[-1:]
