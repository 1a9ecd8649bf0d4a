"""IA2, then SFT, without the command line; then the same with a loss of one's own."""

import torch

from ia2mini import METHODS, Grid, LoRA, Taps, draw_episode, load, score, teach
from ia2mini.losses import per_run
from ia2mini.tasks import find_task, load_examples

model, tokenizer = load("tiny")
task = find_task("toy-mood-flip")
pool = load_examples(task, "train").rows
test = load_examples(task, "eval", limit=200).rows
# 4 rows train, 2 decide when to stop, each sees the others as demonstrations
episode = draw_episode(pool, n=4)
# answers and attention outputs of the base model with demonstrations
taught = teach(model, tokenizer, episode)
lora = LoRA(model, rank=8)
grid = Grid(model, lora, [taught], rates=[3e-3, 1e-2])  # two runs side by side

icl = score(model, tokenizer, test, task.labels, demonstrations=episode.icl[0])[0]
print("with demonstrations", icl["acc"])
for method in ("sft", "ia2", "ia2-sft"):
    trained = METHODS[method](grid)  # trained.theta [runs, weights], trained.dev_loss [runs]
    best = trained.dev_loss.argmin()
    scores = score(model, tokenizer, test, task.labels, lora, trained.theta[best : best + 1])[0]
    print(f"{method:<8} accuracy {scores['acc']:.2f}, ECE {scores['ece']:.2f}")


def cosine(student, batch) -> torch.Tensor:
    """A loss of one's own: one minus the cosine to the teacher's attention outputs, a number a run."""
    taps = Taps(batch.at)
    student(batch.ids, taps=taps, logits=False)
    distance = 1 - torch.cosine_similarity(taps.stack(), batch.activations, dim=-1).mean(0)  # [P]
    return per_run(distance, batch.weights)


trained = grid.train("cosine", {cosine: 1.0}, answers="icl")
found = score(model, tokenizer, test, task.labels, lora, trained.theta)
print("cosine   accuracy", [round(run["acc"], 2) for run in found])
