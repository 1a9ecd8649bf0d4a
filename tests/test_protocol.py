"""The whole protocol against a plain reference: transformers, peft, hooks, torch's Adam and one row at a time; and real rows to the end."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, pstdev

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from ia2mini.models import load
from ia2mini.models.checkpoint import save
from ia2mini.models.qwen3 import Config, Qwen3
from reference import make_checkpoint, peft_twin, twin_parameters, twin_theta, upstream

import ia2mini.cell
import ia2mini.train
from ia2mini.adapters import LoRA
from ia2mini.cell import Options
from ia2mini.cli import main
from ia2mini.episode import draw_episode, seeded
from ia2mini.experiment import Subject, compare
from ia2mini.tasks import Example, Task, find_task, load_examples
from ia2mini.tasks.world import build_tokenizer
from ia2mini.tokenizer import Tokenizer
from ia2mini.train import Job

TRAINED = ("sft", "ia2", "ia2-sft")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random Qwen3 over the words of the toy tasks, inclined to end a paragraph so that generations stop."""
    torch.set_num_threads(1)
    words = build_tokenizer()
    eos, stop = words.token_to_id("<eos>"), words.token_to_id("\n\n")
    size = words.get_vocab_size()
    made = make_checkpoint(
        tmp_path_factory.mktemp("tiny"), "qwen3", vocab_size=size, eos_token_id=eos, bos_token_id=None, seed=1
    )
    net = upstream(made)
    with torch.no_grad():
        net.lm_head.weight[stop] *= 2
    config = (made / "config.json").read_text()
    net.save_pretrained(made)
    (made / "config.json").write_text(config)
    (made / "tokenizer.json").write_text(words.to_str())
    return made


class Plain:
    """A transformers model with a hook on every self_attn; one row, no cache."""

    def __init__(self, net: torch.nn.Module, tokenizer: Tokenizer):
        self.net, self.tokenizer, self.caught = net, tokenizer, []
        for name, module in net.named_modules():
            if name.endswith("self_attn"):
                module.register_forward_hook(lambda module, args, out: self.caught.append(out[0][0]))

    def __call__(self, prompt: list[int], answer: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [P, V] and attention outputs [L, P, D] at the P positions that predict the answer."""
        self.caught.clear()
        logits = self.net(torch.tensor([prompt + answer[:-1]]), use_cache=False).logits[0]
        return logits[-len(answer) :], torch.stack(self.caught)[:, -len(answer) :]

    @torch.no_grad()
    def respond(self, prompt: list[int], most: int) -> list[int]:
        """The greedy response: until EOS or the stop text, neither included."""
        response: list[int] = []
        while len(response) < most:
            token = self(prompt + response, [0])[0][0].argmax().item()
            if token in self.tokenizer.eos_ids:
                break
            response.append(token)
            if "\n\n" in self.tokenizer.decode(response):
                return response[:-1]
        return response


@dataclass
class PlainRow:
    prompt: list[int]
    answer: list[int]
    targets: torch.Tensor | None = None


def joined(demonstrations: list[Example]) -> str:
    return "".join(d.prompt + d.answer + "\n\n" for d in demonstrations)


@torch.no_grad()
def teacher(base: Plain, demonstrations, prompt: str, single: bool, most: int) -> PlainRow:
    """The row as the teacher answers it, with its attention outputs behind the demonstrations."""
    ids = base.tokenizer.encode(joined(demonstrations) + prompt)
    answer = (
        [base(ids, [0])[0][0].argmax().item()]
        if single
        else (base.respond(ids, most) + list(base.tokenizer.eos_ids))[:most]
    )
    return PlainRow(base.tokenizer.encode(prompt), answer, base(ids, answer)[1])


def row_loss(student: Plain, row: PlainRow, phase: str) -> torch.Tensor:
    logits, outputs = student(row.prompt, row.answer)
    if phase == "ia2":
        return sum(((ours - target) ** 2).mean() for ours, target in zip(outputs, row.targets, strict=True))
    return F.cross_entropy(logits, torch.tensor(row.answer))


def train(student: Plain, adapter: LoRA, rate: float, phase: str, rows, dev, orders, o: Options):
    """One run: every loss in order, at steps and at looks; the best weights; the best dev loss; steps."""
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
    return (
        torch.cat([F.cosine_similarity(student(r.prompt, r.answer)[1], r.targets, dim=-1) for r in references], 1)
        .mean()
        .item()
    )


@torch.no_grad()
def evaluate(student: Plain, task: Task, rows: list[Example], before: str = "") -> dict:
    """Accuracy with ECE or texts of one model on evaluation rows, with the text of demonstrations before each."""
    prompts = [student.tokenizer.encode(before + row.prompt) for row in rows]
    if task.labels:
        p = [student(ids, [0])[0][0].softmax(0) for ids in prompts]
        correct = [student.tokenizer.decode([q.argmax().item()]) == row.answer for q, row in zip(p, rows, strict=True)]
        return {"acc": fmean(correct), "ece": fifteen_bins([q.max().item() for q in p], correct)}
    texts = [student.tokenizer.decode(student.respond(ids, task.max_tokens)) for ids in prompts]
    right = [
        task.parse(text) is not None and task.parse(text) == task.parse(row.answer)
        for text, row in zip(texts, rows, strict=True)
    ]
    return {"acc": fmean(right), "texts": texts}


def plain_protocol(folder: Path, task: Task, n: int, o: Options) -> dict:
    """The protocol, read top to bottom. The draws (sets, orders, first weights) are ours; everything computed is not."""
    model, tokenizer = load(folder)
    adapter, base, single, most = LoRA(model), Plain(upstream(folder), tokenizer), bool(task.labels), task.max_tokens
    end = [] if single else list(tokenizer.eos_ids)
    pool = load_examples(task, "train").rows
    evals = {
        e: load_examples(task if e == task.name else find_task(e), "eval", limit=o.eval_rows).rows for e in task.evals
    }
    draws = Job(model, adapter, [None] * o.sets, o.rates)
    first, taught, traces, records = draws.start(draws.grid()), [], {phase: [] for phase in TRAINED}, {}
    for s in range(o.sets):
        episode = draw_episode(pool, n, s)
        examples = list(zip(episode.demonstrations, episode.train + episode.dev, strict=True))
        taught.append([teacher(base, demonstrations, e.prompt, single, most) for demonstrations, e in examples])
        truth = [PlainRow(tokenizer.encode(e.prompt), tokenizer.encode(e.answer) + end) for _, e in examples]
        orders = [seeded(o.seed, s, f"epoch {epoch}").permutation(n) for epoch in range(o.epochs)]
        likes = {}
        for e, rows in evals.items():
            likes[e] = [teacher(base, episode.icl[0], row.prompt, single, most) for row in rows[: o.asim_rows]]
            records["base", e, s, None] = evaluate(base, task, rows) | {"asim": similarity(base, likes[e])}
            records["icl", e, s, None] = evaluate(base, task, rows, joined(episode.icl[0])) | {"asim": 1.0}
        for r, rate in enumerate(o.rates, s * len(o.rates)):
            start, before = {"sft": first[r], "ia2": first[r]}, {}
            for phase in TRAINED:
                student, rows = (
                    Plain(peft_twin(folder, adapter, start[phase]), tokenizer),
                    taught[s] if phase == "ia2" else truth,
                )
                trace, best, dev_loss, steps = train(student, adapter, rate, phase, rows[:n], rows[n:], orders, o)
                traces[phase].append(trace)
                start[f"{phase}-sft"], before[f"{phase}-sft"] = best, steps
                student = Plain(peft_twin(folder, adapter, best), tokenizer)
                for e, rows in evals.items():
                    scores = evaluate(student, task, rows) | {"asim": similarity(student, likes[e])}
                    records[phase, e, s, rate] = scores | {"dev_loss": dev_loss, "steps": steps + before.get(phase, 0)}
    return {"taught": taught, "traces": traces, "records": records}


def side_by_side(runs: list[list[float]]) -> list[list[float]]:
    """Losses of all runs as they come when trained together: at every step and look, those of the runs still going."""
    return [[run[i] for run in runs if i < len(run)] for i in range(max(map(len, runs)))]


def ours(folder: Path, task: Task, n: int, o: Options, out: Path, monkeypatch) -> tuple[dict, Path, list, list]:
    """`compare` on the same: its document and folder, the teacher's rows of each set, and every loss that training looked at."""
    taught, seen = [], []
    teach, losses = ia2mini.cell.teach, ia2mini.train.losses
    monkeypatch.setattr(ia2mini.cell, "teach", lambda *args: taught.append(teach(*args)) or taught[-1])
    monkeypatch.setattr(ia2mini.train, "losses", lambda *args: seen.append(losses(*args)) or seen[-1])
    subject = Subject(*load(folder), folder, "random", str(folder))
    return *compare([task], (n,), subject, o, out), taught, [values.tolist() for values in seen]


@pytest.mark.parametrize("kind", ["single", "multi"])
def test_compare_equals_the_plain_protocol(kind, folder, tmp_path, monkeypatch):
    if kind == "single":  # three steps an epoch: looks after even steps and at epochs' ends differ
        task, n = find_task("toy-mood"), 5
        o = Options(sets=2, rates=(1e-2, 3e-2), batch_size=2, epochs=4, patience=2, eval_rows=8, asim_rows=4)
    else:
        task, n = replace(find_task("toy-sums-short"), max_tokens=6, ood=()), 4
        o = Options(sets=2, rates=(1e-2, 3e-2), epochs=6, patience=2, eval_rows=5, asim_rows=3)
    document, kept, taught, seen = ours(folder, task, n, o, tmp_path, monkeypatch)
    plain = plain_protocol(folder, task, n, o)
    for mine, theirs in zip(sum(taught, []), sum(plain["taught"], []), strict=True):
        assert (mine.prompt, mine.answer) == (theirs.prompt, theirs.answer)
        assert (mine.activations - theirs.targets).abs().max() <= 1e-5
    lengths = {len(row.answer) for row in sum(plain["taught"], [])}
    assert lengths == {1} if kind == "single" else len(lengths) > 1, lengths  # else stopping was not tried
    expected = sum((side_by_side(plain["traces"][phase]) for phase in TRAINED), [])
    assert [len(values) for values in seen] == [len(values) for values in expected]
    np.testing.assert_allclose(
        sum(seen, []), sum(expected, []), rtol=5e-4
    )  # Adam enlarges the rounding of tiny gradients
    records = plain["records"]
    assert len(document["runs"]) == len(records)
    for run in document["runs"]:
        theirs = records[run["method"], run["eval"], run["set"], run["rate"]]
        assert run["acc"] == pytest.approx(theirs["acc"])
        assert run["asim"] == pytest.approx(theirs["asim"], abs=5e-4 if run["rate"] else 1e-5)
        assert run["steps"] == theirs.get("steps", 0)
        if kind == "single":
            assert run["ece"] == pytest.approx(theirs["ece"], abs=5e-4)  # Adam enlarges the rounding of tiny gradients
        else:
            assert json.loads((kept / run["texts"]).read_text())["texts"] == theirs["texts"]
    for cell in document["cells"]:
        about = (cell["method"], cell["eval"])
        by_rate = {
            rate: [records[(*about, s, rate)] for s in range(o.sets)] for rate in (o.rates if cell["rate"] else (None,))
        }
        if cell["selected_by"] == "dev":
            assert cell["rate"] == min(o.rates, key=lambda rate: fmean(run["dev_loss"] for run in by_rate[rate]))
        if cell["selected_by"] == "eval":
            assert cell["acc_mean"] == pytest.approx(
                max(fmean(run["acc"] for run in runs) for runs in by_rate.values())
            )
        for metric in ("acc", "asim", *(["ece"] if kind == "single" else [])):
            values = [run[metric] for run in by_rate[cell["rate"]]]
            assert (cell[f"{metric}_mean"], cell[f"{metric}_std"]) == pytest.approx(
                (fmean(values), pstdev(values)), abs=5e-4
            )
    sft = [run["acc"] for run in document["runs"] if run["method"] == "sft"]
    assert kind == "multi" or max(sft) > 0, "nothing learned: the comparison would be of zeros"


def test_paper_compat_compares_each_model_on_its_own_response(folder, tmp_path):
    task, o = (
        replace(find_task("toy-sums-short"), max_tokens=6, ood=()),
        Options(("base",), 1, eval_rows=4, asim_rows=3, paper_compat=True),
    )
    model, tokenizer = load(folder)
    document, _ = compare([task], (4,), Subject(model, tokenizer, folder, "random", str(folder)), o, tmp_path)
    base, pool = Plain(upstream(folder), tokenizer), load_examples(task, "train").rows
    shown, alike, lengths = draw_episode(pool, 4, 0, 0, 4, True).icl, [], []
    for demonstrations, row in zip(shown, load_examples(task, "eval", limit=3).rows, strict=False):
        prompts = [tokenizer.encode(text + row.prompt) for text in (joined(demonstrations), "")]
        own = [(base.respond(prompt, 6) + list(tokenizer.eos_ids))[:6] for prompt in prompts]
        outputs = [base(prompt, response)[1] for prompt, response in zip(prompts, own, strict=True)]
        lengths.append([x.shape[1] for x in outputs])
        shorter = min(lengths[-1])
        alike.append(F.cosine_similarity(*(x[:, :shorter] for x in outputs), dim=-1))
    assert any(a != b for a, b in lengths), "nothing was cut"
    assert document["runs"][0]["asim"] == pytest.approx(torch.cat(alike, 1).mean().item(), abs=1e-5)


REAL = [  # the first rows of set 0 of the real SST2 rows, as the model must read them
    "Text:men in black ii achieves ultimate insignificance -- it 's the sci-fi comedy spectacle as whiffle-ball epic . \nLabel:0",
    "Text:no rooting interest \nLabel:0",
    "Text:seems content to dog-paddle in the mediocre end of the pool \nLabel:0",
    "Text:builds to a crescendo that encompasses many more paths than we started with \nLabel:1",
]
DEV = "Text:this is a beautiful film for people who like their romances to have that french realism \nLabel:"
QUERY = "Text:the words , ` frankly , my dear , i do n't give a damn , ' have never been more appropriate . \nLabel:"


def test_real_rows_run_to_the_end(shared_data, tmp_path, monkeypatch):
    config = Config(
        151936, 32, 64, 2, 4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True
    )  # Qwen3's own vocabulary
    model = Qwen3(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.05)
    save(
        model, tmp_path / "model", (shared_data / "tokenizers/qwen3/tokenizer.json").read_text(encoding="utf-8"), 151643
    )
    read = []
    encode, encode_all = Tokenizer.encode, Tokenizer.encode_all
    monkeypatch.setattr(
        Tokenizer, "encode", lambda self, text, special=True: read.append(text) or encode(self, text, special)
    )
    monkeypatch.setattr(Tokenizer, "encode_all", lambda self, texts: read.extend(texts) or encode_all(self, texts))
    command = [
        "run",
        "sst2",
        "--model",
        str(tmp_path / "model"),
        "--data-dir",
        str(shared_data),
        "--out",
        str(tmp_path / "runs"),
    ]
    options = [
        "--n",
        "4",
        "--sets",
        "1",
        "--rates",
        "1e-3",
        "--eval-rows",
        "20",
        "--methods",
        "icl,sft",
        "--device",
        "cpu",
        "--json",
    ]
    result = CliRunner().invoke(main, command + options)
    assert result.exit_code == 0, result.output
    cells = json.loads(result.stdout.splitlines()[-1])["cells"]
    assert {(c["method"], c["eval"], c["ood"]) for c in cells} == {
        (method, e, e != "sst2") for method in ("icl", "sft") for e in ("sst2", "finsen", "poems")
    }
    assert DEV in read and QUERY in read
    (demonstrated,) = {text for text in read if text.endswith("\n\n" + QUERY)}
    assert sorted(demonstrated.split("\n\n")) == sorted([*REAL, QUERY])
    for row in REAL:  # leave one out: the other three before it, and only those
        (seen,) = {text for text in read if text.endswith("\n\n" + row[:-1])}
        assert sorted(seen.split("\n\n")) == sorted([*(r for r in REAL if r != row), row[:-1]])
