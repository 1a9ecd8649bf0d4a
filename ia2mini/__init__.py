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
    next(load_adapter("tickets").predict([{"text": "My invoice is wrong"}]))["answer"]

`Taps` asks any pass for its attention outputs; `Runs` and `train_runs` take losses of your own. Each name is a promise;
everything else may move.
"""

from importlib import import_module

__version__ = "0.3.0"

MODULES = {
    ".models.checkpoint": "load",
    ".models.common": "Taps",
    ".tasks": "find_task load_examples Example",
    ".episode": "draw_episode",
    ".teacher": "teach",
    ".adapters": "LoRA IA3 adapted",
    ".methods": "Grid METHODS",
    ".train": "Runs Settings train_runs",
    ".evaluate": "score",
    ".subject": "open_subject",
    ".fitting": "fit",
    ".options": "FitOptions",
    ".predictor": "load_adapter",
}
NAMES = {name: module for module, names in MODULES.items() for name in names.split()}
__all__ = ["UsageError", *NAMES]


class UsageError(ValueError):
    """A user's mistake: one line that says what is wrong, where, and how to mend it."""

    def __init__(self, message: str):
        line = " ".join(message.splitlines())  # what it quotes may be long and of many lines
        super().__init__(line if len(line) < 1000 else f"{line[:700]} … {line[-200:]}")


def __getattr__(name: str):
    """A name of the front door, imported when first asked for: `import ia2mini` alone loads no torch."""
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(NAMES[name], __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *NAMES]
