"""An adapter of one's own: a trained bias after each target map (BitFit, Ben Zaken et al. 2022)."""

from functools import partial

from ia2mini import Grid, draw_episode, find_task, load, load_examples, score, teach
from ia2mini.adapters import TARGETS, Adapter, by_run
from ia2mini.methods import sft


class Bias(Adapter):
    """y + b for y = W x, b [out] starting at zero."""

    def __init__(self, model, targets=TARGETS):
        super().__init__(model, targets)
        self.shapes = {name: (linear.out_features,) for name, linear in self.linears.items()}

    def change(self, name, weights):
        return partial(self.add, weights[name])  # [R, out]: a row for each run

    @staticmethod
    def add(bias, base, x):
        y = base(x)  # [R * rows, T, out]
        each = by_run(y, len(bias)) + bias[:, None].to(y.dtype)
        return each.view(y.shape)


model, tokenizer = load("tiny")
task = find_task("toy-mood")
rows = load_examples(task, "train").rows
taught = teach(model, tokenizer, draw_episode(rows, n=4))
adapter = Bias(model)
trained = sft(Grid(model, adapter, [taught], rates=[1e-1]))
found = score(model, tokenizer, rows[-100:], task.labels, adapter, trained.theta)[0]
print(f"accuracy {found['acc']:.2f}")
