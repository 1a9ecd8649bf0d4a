"""The whole protocol, plainly: transformers, peft, hooks, torch's Adam, one row at a time and no cache."""

import gc
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from ia2mini.models import load
from reference import peft_twin, twin_parameters, twin_theta, upstream

from ia2mini.adapters import LoRA
from ia2mini.engine.options import Options
from ia2mini.episode import draw_episode, seeded
from ia2mini.methods import Grid
from ia2mini.tasks import Example, Task, find_task, load_examples
from ia2mini.tasks.answers import PARSERS
from ia2mini.tokenizer import Tokenizer

TRAINED = ("sft", "ia2", "ia2-sft")


class Plain:
    """A transformers model with a hook on every self_attn; one row, no cache."""

    def __init__(self, net: torch.nn.Module, tokenizer: Tokenizer):
        self.net, self.tokenizer = net, tokenizer
        self.caught = caught = []  # the hooks hold this list alone, so that the object can go
        for name, module in net.named_modules():
            if name.endswith("self_attn"):
                module.register_forward_hook(lambda module, args, out: caught.append(out[0][0]))

    def __call__(self, prompt: list[int], answer: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [P, V] and attention outputs [L, P, D] at the P positions that predict the answer."""
        self.caught.clear()
        logits = self.net(torch.tensor([prompt + answer[:-1]]), use_cache=False).logits[0]
        return logits[-len(answer) :], torch.stack(self.caught)[:, -len(answer) :]

    def following(self, ids: list[int]) -> torch.Tensor:
        """Logits [V] of the token after `ids`."""
        return self(ids, [0])[0][0]

    @torch.no_grad()
    def respond(self, prompt: list[int], most: int) -> list[int]:
        """The greedy response: until EOS or the stop text, neither included."""
        response: list[int] = []
        while len(response) < most:
            token = self.following(prompt + response).argmax().item()
            if token in self.tokenizer.eos_ids:
                break
            response.append(token)
            if "\n\n" in self.tokenizer.decode(response):
                # it may have taken several tokens
                while self.tokenizer.decode(response).endswith("\n"):
                    response.pop()
                return response
        return response


@dataclass
class PlainRow:
    prompt: list[int]
    answer: list[int]
    targets: torch.Tensor | None = None


def joined(demonstrations: list[Example]) -> str:
    return "".join(d.prompt + d.answer + "\n\n" for d in demonstrations)


@torch.no_grad()
def teacher(base: Plain, demonstrations, prompt: str, most: int) -> PlainRow:
    """The row as the teacher answers it, with its attention outputs with the demonstrations in the prompt."""
    ids = base.tokenizer.encode(joined(demonstrations) + prompt)
    if most == 1:
        answer = [base.following(ids).argmax().item()]
    else:
        answer = (base.respond(ids, most) + base.tokenizer.closing)[:most]
    return PlainRow(base.tokenizer.encode(prompt), answer, base(ids, answer)[1])


def row_loss(student: Plain, row: PlainRow, phase: str) -> torch.Tensor:
    logits, outputs = student(row.prompt, row.answer)
    if phase == "ia2":
        return sum(
            ((ours - target) ** 2).mean() for ours, target in zip(outputs, row.targets, strict=True)
        )
    return F.cross_entropy(logits, torch.tensor(row.answer))


def train(student: Plain, adapter: LoRA, rate: float, phase: str, data, orders, o: Options):
    """One run on data = (training rows, dev rows): every loss in order, the best weights, the best dev loss, steps."""
    rows, dev = data
    adam = torch.optim.Adam(twin_parameters(student.net, adapter), lr=rate)
    trace, looks, steps, best = [], [], 0, None
    for order in orders:
        for start in range(0, len(rows), o.batch_size):
            portion = [rows[i] for i in order[start : start + o.batch_size]]
            value = sum(row_loss(student, row, phase) for row in portion) / len(portion)
            adam.zero_grad()
            value.backward()
            adam.step()
            steps += 1
            trace.append(value.item())
            if steps % 2 == 0 or start + o.batch_size >= len(rows):
                with torch.no_grad():
                    look = fmean(row_loss(student, row, phase).item() for row in dev)
                trace.append(look)
                if not looks or look < min(looks):
                    best = twin_theta(student.net, adapter)
                looks.append(look)
                if len(looks) - 1 - looks.index(min(looks)) == o.patience:
                    return trace, best, min(looks), steps
    return trace, best, min(looks), steps


def fifteen_bins(confidence: list[float], correct: list[bool]) -> float:
    """Expected calibration error, bin by bin."""
    total = 0.0
    for i in range(15):
        mine = [j for j, c in enumerate(confidence) if i / 15 < c <= (i + 1) / 15]
        if mine:
            total += abs(sum(correct[j] for j in mine) - sum(confidence[j] for j in mine))
    return total / len(confidence)


@torch.no_grad()
def similarity(student: Plain, references: list[PlainRow]) -> float:
    """asim: cosine to the teacher's attention outputs, mean over layers and positions."""
    return fmean(
        value
        for r in references
        for value in F.cosine_similarity(student(r.prompt, r.answer)[1], r.targets, dim=-1)
        .mean(0)
        .tolist()
    )


def label_log_probability(following, prompt: list[int], label: list[int]) -> float:
    """That of a whole label, a pass a token; `following(ids)`: logits [V] of the token after `ids`."""
    return sum(
        following(prompt + label[:i]).double().log_softmax(0)[token].item()
        for i, token in enumerate(label)
    )


def greedy_label(
    following, prompt: list[int], labels: list[list[int]], among=None
) -> tuple[int, float]:
    """Greedy decoding until it has given a label or can give none: the label's index or -1, and the probability."""
    said, probability = [], 1.0
    while any(label[: len(said)] == said for label in labels) and said not in labels:
        logits = following(prompt + said).double()
        whole = logits if among is None else logits.topk(among).values
        said.append(logits.argmax().item())
        probability *= (logits.max() - whole.logsumexp(0)).exp().item()
    return labels.index(said) if said in labels else -1, probability


@torch.no_grad()
def evaluate(student: Plain, task: Task, rows: list[Example], before: str = "") -> dict:
    """Accuracy with ECE and NLL or texts of one model on evaluation rows, the text of demonstrations before each."""
    prompts = [student.tokenizer.encode(before + row.prompt) for row in rows]
    if task.labels:
        labels = [student.tokenizer.encode(label) for label in task.labels]
        said = [greedy_label(student.following, ids, labels) for ids in prompts]
        correct = [
            top >= 0 and task.labels[top] == row.answer
            for (top, _), row in zip(said, rows, strict=True)
        ]
        true = [student.tokenizer.encode(row.answer) for row in rows]
        nll = -fmean(
            label_log_probability(student.following, *pair)
            for pair in zip(prompts, true, strict=True)
        )
        return {
            "acc": fmean(correct),
            "ece": fifteen_bins([sure for _, sure in said], correct),
            "nll": nll,
        }
    texts = [student.tokenizer.decode(student.respond(ids, task.max_tokens)) for ids in prompts]
    parse = PARSERS[task.parser]
    pairs = [(parse(text), parse(row.answer)) for text, row in zip(texts, rows, strict=True)]
    return {
        "acc": fmean(said is not None and said == answer for said, answer in pairs),
        "texts": texts,
    }


def plain_protocol(folder: Path, task: Task, n: int, o: Options) -> dict:
    """The protocol, read top to bottom. The draws (sets, orders, first weights) are ours; what is computed is not."""
    model, tokenizer = load(folder)
    adapter, base, most = LoRA(model), Plain(upstream(folder), tokenizer), task.max_tokens
    if task.labels:
        most = max(len(tokenizer.encode(label)) for label in task.labels)
        most += most > 1  # EOS
    end = [] if most == 1 else tokenizer.closing
    pool = load_examples(task, "train").rows
    tasks = {e: task if e == task.name else find_task(e) for e in task.evals}
    evals = {e: load_examples(here, "eval", limit=o.eval_rows).rows for e, here in tasks.items()}
    draws = Grid(model, adapter, [None] * o.sets, o.rates)
    taught, traces, records = [], {phase: [] for phase in TRAINED}, {}
    for s in range(o.sets):
        episode = draw_episode(pool, n, s)
        examples = list(zip(episode.demonstrations, episode.train + episode.dev, strict=True))
        taught.append(
            [teacher(base, demonstrations, e.prompt, most) for demonstrations, e in examples]
        )
        truth = [
            PlainRow(tokenizer.encode(e.prompt), tokenizer.encode(e.answer) + end)
            for _, e in examples
        ]
        orders = [seeded(o.seed, s, f"epoch {epoch}").permutation(n) for epoch in range(o.epochs)]
        likes = {}
        for e, rows in evals.items():
            alike = 1 if task.labels else most  # of labels, the position before them is compared
            likes[e] = [
                teacher(base, episode.icl[0], row.prompt, alike) for row in rows[: o.asim_rows]
            ]
            records["base", e, s, None] = evaluate(base, tasks[e], rows) | {
                "asim": similarity(base, likes[e])
            }
            records["icl", e, s, None] = evaluate(base, tasks[e], rows, joined(episode.icl[0])) | {
                "asim": 1.0
            }
        first = draws.first_weights(s)
        for rate in o.rates:
            start, before = {"sft": first, "ia2": first}, {}
            for phase in TRAINED:
                gc.collect()  # models of the phase before: half a billion weights each on Qwen
                rows = taught[s] if phase == "ia2" else truth
                student = Plain(peft_twin(folder, adapter, start[phase]), tokenizer)
                trace, best, dev_loss, steps = train(
                    student, adapter, rate, phase, (rows[:n], rows[n:]), orders, o
                )
                traces[phase].append(trace)
                start[f"{phase}-sft"], before[f"{phase}-sft"] = best, steps
                student = Plain(peft_twin(folder, adapter, best), tokenizer)
                for e, rows in evals.items():
                    scores = evaluate(student, tasks[e], rows) | {
                        "asim": similarity(student, likes[e])
                    }
                    records[phase, e, s, rate] = scores | {
                        "dev_loss": dev_loss,
                        "steps": steps + before.get(phase, 0),
                    }
    return {"taught": taught, "traces": traces, "records": records}
