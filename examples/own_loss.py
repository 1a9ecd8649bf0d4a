"""A loss of one's own: Huber's in place of the squared error between attention outputs.

In the tables of `run`: ia2mini run toy-mood --loss examples/own_loss.py
In Python: python examples/own_loss.py
"""

import torch.nn.functional as F

from ia2mini import Grid, LoRA, Taps, draw_episode, find_task, load, load_examples, score, teach
from ia2mini.losses import per_run


def huber(student, batch):
    """One number for each run, [R]: mean over D, sum over layers as in IA2, mean over the positions of a run."""
    taps = Taps(batch.at)
    student(batch.ids, taps=taps, logits=False)
    distance = F.huber_loss(taps.stack(), batch.activations, reduction="none")  # [L, P, D]
    return per_run(distance.mean(-1).sum(0), batch.weights)


if __name__ == "__main__":
    model, tokenizer = load("tiny")
    task = find_task("toy-mood")
    rows = load_examples(task, "train").rows
    taught = teach(model, tokenizer, draw_episode(rows, n=4))
    lora = LoRA(model)
    grid = Grid(model, lora, [taught], rates=[1e-2])
    trained = grid.train("huber", {huber: 1.0}, answers="icl")
    new_rows = load_examples(task, "eval").rows[:100]
    found = score(model, tokenizer, new_rows, task.labels, lora, trained.theta)[0]
    print(f"accuracy {found['acc']:.2f}")
