"""ia2mini: teach a language model a task from a handful of examples by ICL Activation Alignment (arXiv 2509.22621).

From a model to an adapter, in the order of a notebook:

    model, tokenizer = load("tiny")                     # a frozen model and its tokenizer
    rows = load_examples(find_task("toy-mood"), "train").rows
    episode = draw_episode(rows, n=4)                   # who trains, who decides, who demonstrates
    taught = teach(model, tokenizer, episode)           # the model's own attention outputs with demonstrations
    grid = Grid(model, LoRA(model), [taught], rates=[1e-2])
    trained = METHODS["ia2-sft"](grid)                  # IA2, then SFT from there
    score(model, tokenizer, rows[-100:], ("0", "1"), grid.adapter, trained.theta)

From one's own rows to an adapter in use:

    fitted = fit("tickets.csv", open_subject("llama-3.2-1b"))
    print(fitted.report["sentence"])
    fitted.save("tickets")
    load_adapter("tickets").predict(["My invoice is wrong"])[0]

The names, each of them a promise; everything else may move:

    fit, FitOptions, load_adapter, open_subject     own rows to an adapter, and the adapter in use
    load                                            a model and its tokenizer from a folder, the hub or a short name
    find_task, load_examples, Example               tasks and their rows
    draw_episode                                    one training set: training, dev and demonstration rows
    teach                                           the pass with demonstrations, which gives IA2 its targets
    LoRA, IA3, adapted                              adapters, and the model with one
    Grid, METHODS                                   all runs of a method side by side; SFT, IA2, IA2→SFT and the others
    Runs, Settings, train_runs                      the training loop, which takes a loss of your own
    Taps                                            records attention outputs in any pass of the model
    score                                           accuracy, calibration and likelihood on labelled rows
    UsageError                                      a mistake in what was given, as one line

`help(ia2mini.fit)` and so on say more.
"""

from importlib import import_module
from pathlib import Path

__version__ = "0.4.0"

MODULES = {
    ".models.checkpoint": "load",
    ".models.taps": "Taps",
    ".tasks": "find_task load_examples Example",
    ".episode": "draw_episode",
    ".teacher": "teach",
    ".adapters": "LoRA IA3 adapted",
    ".methods": "Grid METHODS",
    ".train": "Runs Settings train_runs",
    ".scoring": "score",
    ".engine.subject": "open_subject",
    ".fitting.fit": "fit",
    ".engine.options": "FitOptions",
    ".fitting.predictor": "load_adapter",
}
NAMES = {name: module for module, names in MODULES.items() for name in names.split()}
__all__ = ["UsageError", *NAMES]


class UsageError(ValueError):
    """A user's mistake: one line that says what is wrong, where, and how to mend it."""

    def __init__(self, message: str):
        line = " ".join(message.splitlines())  # what it quotes may be long and of many lines
        super().__init__(line if len(line) < 1000 else f"{line[:700]} … {line[-200:]}")


HERE = Path(__file__).resolve().parent
# in a checkout `ia2mini.models` is the models/ beside this folder
if not (HERE / "models").is_dir():
    if not (HERE.parent / "models/__init__.py").is_file():
        raise ImportError(f"{HERE.parent}/models is missing: install this copy of ia2mini again")
    __path__.append(str(HERE.parent))


def __getattr__(name: str):
    """A name of the front door, imported when first asked for: `import ia2mini` alone loads no torch."""
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(NAMES[name], __name__), name)


def __dir__() -> list[str]:
    """Nothing but what is here: `help(ia2mini)` shows the names above, not every method of every class."""
    return ["__all__", "__doc__", "__file__", "__path__", "__version__"]
