"""IA2, then SFT, by the training loop itself: one run, R = 1."""

import torch

from ia2mini import LoRA, Runs, Taps, adapted, draw_episode, load, score, teach, train_runs
from ia2mini.batch import collate
from ia2mini.metrics import asim
from ia2mini.tasks import find_task, load_examples

model, tokenizer = load("tiny")
task = find_task("toy-mood-flip")
pool = load_examples(task, "train").rows
test = load_examples(task, "eval", limit=200).rows
taught = teach(model, tokenizer, draw_episode(pool, n=4))
lora = LoRA(model)
theta = lora.init(torch.Generator().manual_seed(0))[None]  # [R, M]
rate = torch.tensor([1e-2])  # [R], as the weight of each loss
one = torch.ones(1)

alignment = Runs(theta, rate, [taught.icl_train], [taught.icl_dev], {"mse": one})
aligned = train_runs(model, lora, alignment)
tuning = Runs(aligned.theta, rate, [taught.train], [taught.dev], {"ce": one})
tuned = train_runs(model, lora, tuning)


def likeness(weights: torch.Tensor) -> float:
    """asim on the dev rows: how alike attention outputs are to those with demonstrations in the prompt."""
    batch = collate([taught.icl_dev])
    taps = Taps(batch.at)
    with torch.no_grad(), adapted(model, lora, weights) as student:
        student(batch.ids, taps=taps, logits=False)
    return asim(taps.stack(), batch.activations).mean().item()


for name, weights in (("base", theta), ("ia2", aligned.theta), ("ia2-sft", tuned.theta)):
    accuracy = score(model, tokenizer, test, task.labels, lora, weights)[0]["acc"]
    print(f"{name:<8} asim {likeness(weights):.2f}, accuracy {accuracy:.2f}")
