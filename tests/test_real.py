"""Real checkpoints against transformers and peft; `make test-real` runs these tests alone.

$IA2MINI_REAL is SmolLM2-135M-Instruct; $IA2MINI_REAL2 may name another, as Qwen2.5-Coder-0.5B-Instruct.
"""

import json
import subprocess
import sys
import time
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

import pytest
import torch
from ia2mini.models import Taps, load
from plain import TRAINED, plain_protocol
from reference import relative, upstream, upstream_pass

from bench.timing import allocated
from ia2mini.adapters import LoRA, adapted
from ia2mini.batch import TokenRow
from ia2mini.engine.options import Options
from ia2mini.engine.subject import Subject
from ia2mini.generate import Decoding, generate
from ia2mini.study.study import compare
from ia2mini.tasks import custom_task, load_examples
from ia2mini.tokenizer import Tokenizer
from ia2mini.train import Runs, Settings, train_runs

# relative distance to transformers; ours to the truth as a share of theirs
FLOAT32, BFLOAT16 = 1e-5, 1.2
# relative distance of dev losses after training: Adam enlarges the rounding of tiny gradients
LOSS = 1e-4


def tell(capsys, text: str) -> None:
    with capsys.disabled():
        print("\n" + text)


@pytest.fixture(scope="module")
def ours(real):
    """(model, tokenizer) in float32."""
    return load(real)


@pytest.fixture(scope="module")
def weights(ours) -> int:
    return sum(tensor.numel() for tensor in ours[0].parameters())


@pytest.fixture(scope="module")
def net(real):
    return upstream(real)


@pytest.fixture(scope="module")
def texts(shared_data) -> list[str]:
    """Twenty real prompts of unequal lengths: ten questions to the assistant, ten sentences to be continued."""
    lines = (shared_data / "sciq/validation.jsonl").read_text(encoding="utf-8").splitlines()[:10]
    asked = [json.loads(line)["question"] + " Answer in one word." for line in lines]
    asked = [
        f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" for question in asked
    ]
    lines = (shared_data / "sst2/validation.jsonl").read_text(encoding="utf-8").splitlines()[:10]
    return asked + [json.loads(line)["sentence"] for line in lines]


def prompts_of(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    prompts = [tokenizer.encode(text) for text in texts]
    assert len({len(p) for p in prompts}) > len(prompts) / 2, "unequal lengths"
    return prompts


@pytest.fixture(scope="module")
def long(ours, shared_data) -> list[list[int]]:
    """Four worked sums of unequal lengths."""
    lines = (shared_data / "gsm8k/test.jsonl").read_text(encoding="utf-8").splitlines()[:4]
    rows = [json.loads(line) for line in lines]
    return prompts_of(ours[1], [f"Q: {row['question']}\nA: {row['answer']}" for row in rows])


def padded_pass(model, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Our logits [P, V] and attention outputs [L, P, D] at all positions of rows in one right-padded batch."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    places = [(i, t) for i, row in enumerate(rows) for t in range(len(row))]
    at = tuple(map(torch.tensor, zip(*places, strict=True)))
    taps = Taps(at)
    with torch.no_grad():
        logits = model(ids, taps=taps, logits=at)
    return logits, taps.stack()


def alone(net, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' logits [P, V] and attention outputs [L, P, D], each row in a pass of its own, by forward hooks."""
    passes = [upstream_pass(net, torch.tensor([row])) for row in rows]
    return torch.cat([logits[0] for logits, _ in passes]), torch.cat(
        [outputs[:, 0] for _, outputs in passes], 1
    )


def gaps(found: tuple, truth: tuple) -> dict[str, float]:
    """The relative distance of the logits and of every layer's attention output, by name."""
    logits, layers = (
        relative(found[0].float(), truth[0]),
        zip(found[1].float(), truth[1], strict=True),
    )
    return {"logits": logits} | {f"layer {i}": relative(*pair) for i, pair in enumerate(layers)}


@pytest.fixture(scope="module")
def truth(net, long):
    return alone(net, long)


def test_logits_and_every_layer_in_float32(ours, long, truth, capsys):
    found = gaps(padded_pass(ours[0], long), truth)
    most = max(found.values())
    tell(
        capsys,
        f"float32: logits off by {found['logits']:.1e}, attention outputs by {most:.1e} at most",
    )
    assert len(found) == 1 + ours[0].config.num_hidden_layers and most <= FLOAT32, found


def test_bfloat16_is_as_near_the_truth_as_transformers(real, ours, long, truth, capsys):
    model, net = load(real, dtype=torch.bfloat16)[0], upstream(real, torch.bfloat16)
    found, theirs = padded_pass(model, long), alone(net, long)
    assert found[0].dtype == found[1].dtype == torch.bfloat16
    mine, theirs = gaps(found, truth), gaps(theirs, truth)
    shares = {name: mine[name] / theirs[name] for name in mine}
    least, most = min(shares.values()), max(shares.values())
    off = f"logits off by {mine['logits']:.1e} (transformers {theirs['logits']:.1e})"
    tell(capsys, f"bfloat16: {off}, all by {least:.2f} to {most:.2f} of what transformers' are")
    assert len(shares) == 1 + ours[0].config.num_hidden_layers and most <= BFLOAT16, shares


def greedy(net, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """transformers' greedy tokens, EOS as any other, each prompt alone."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        how = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None}
        (row,) = net.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **how)
        found.append(row[len(prompt) :].tolist())
    return found


def until_end(row: list[int], ends: tuple[int, ...]) -> list[int]:
    return list(takewhile(lambda token: token not in ends, row))


def test_twenty_prompts_in_one_batch_equal_transformers(ours, net, texts):
    model, tokenizer = ours
    prompts = prompts_of(tokenizer, texts)
    free = greedy(net, prompts, 24)
    batches = []
    found = generate(
        model, Tokenizer(tokenizer.backend, ()), prompts, Decoding(24, stop=None), batches.append
    )
    assert found == free and {len(row) for row in found} == {24} and batches == [20]
    cut = [until_end(row, tokenizer.eos_ids) for row in free]
    assert generate(model, tokenizer, prompts, Decoding(24, stop=None)) == cut
    assert 3 < sum(row != whole for row, whole in zip(cut, free, strict=True)) < 20, "some met EOS"
    said = [tokenizer.decode(row) for row in cut]
    # one model writes paragraphs, another only sentences
    stop = next(text for text in ("\n\n", "\n", ". ") if any(text in answer for answer in said))
    how = Decoding(24, stop)
    stopped = [tokenizer.decode(row) for row in generate(model, tokenizer, prompts, how)]
    assert stopped == [answer.split(stop)[0] for answer in said] != said


def test_runs_side_by_side_answer_as_each_alone(ours, texts):
    model, tokenizer = ours
    prompts, adapter, how = prompts_of(tokenizer, texts[5:15]), LoRA(model), Decoding(16, stop=None)
    g = torch.Generator().manual_seed(0)
    theta = torch.stack([adapter.init(g) for _ in range(3)])
    theta += 0.1 * torch.randn(theta.shape, generator=g)
    each = []
    for r in range(3):
        with adapted(model, adapter, theta[r : r + 1]) as student:
            each.append(generate(student, tokenizer, prompts, how))
    with adapted(model, adapter, theta) as student:
        assert generate(student, tokenizer, prompts, replace(how, runs=3)) == sum(each, [])
    base = generate(model, tokenizer, prompts, how)
    for i, one in enumerate([*each, base]):
        for other in [*each, base][:i]:
            assert sum(a != b for a, b in zip(one, other, strict=True)) > 5, (
                "adapters of visible size"
            )


def test_a_study_equals_the_plain_protocol(real, ours, shared_data, tmp_path, capsys):
    model, tokenizer = ours
    task = custom_task(
        shared_data / "relations/singular_plural.jsonl", "text", "answer", "Q: {text}\nA:"
    )
    o = Options(
        n=(4,), sets=1, rates=(3e-4, 1e-3), epochs=4, eval_rows=6, asim_rows=2, select="both"
    )
    document, kept = compare(
        [task], Subject(model, tokenizer, real, real.name, str(real)), o, tmp_path
    )
    rows = load_examples(task, "train").rows + load_examples(task, "eval", limit=6).rows
    longest = max(
        len(tokenizer.encode(row.prompt + row.answer)) - len(tokenizer.encode(row.prompt))
        for row in rows
    )
    records = plain_protocol(real, replace(task, max_tokens=longest + 1), 4, o)["records"]
    told = {(run["method"], run["rate"]) for run in document["runs"]}
    assert not task.labels and told == {(method, rate) for method, _, _, rate in records}
    assert len(document["training"]) == len(TRAINED) * len(o.rates)
    apart, said, losses = [], set(), []
    for run in document["training"]:
        theirs = records[run["method"], task.name, 0, run["rate"]]
        assert run["steps"] == theirs["steps"]
        apart.append(abs(run["dev_loss"] / theirs["dev_loss"] - 1))
        losses.append(f"{run['method']} {run['rate']:g}: {run['dev_loss']:.4f}")
    for run in document["runs"]:
        theirs = records[run["method"], task.name, 0, run["rate"]]
        found = json.loads((kept / run["texts"]).read_text())["texts"]
        assert found == theirs["texts"] and run["acc"] == pytest.approx(theirs["acc"])
        assert run["asim"] == pytest.approx(theirs["asim"], abs=1e-4)
        said.add(tuple(found))
    tell(
        capsys,
        f"dev losses off by {max(apart):.1e} at most ({', '.join(losses)}); {len(said)} kinds of texts",
    )
    assert max(apart) <= LOSS, apart
    assert len(said) > 2, "training changed nothing: the comparison would be of the base model"


LOADING = """
import json, sys, time
from pathlib import Path
from bench.timing import reset_peak, resident
from ia2mini.models import load
reset_peak()
before, begin = resident()[0], time.perf_counter()
model, _ = load(Path(sys.argv[1]))
print(json.dumps([time.perf_counter() - begin, resident()[1] - before, sum(p.nbytes for p in model.parameters())]))
"""


def test_loading_holds_no_second_copy_of_the_weights(real, weights, capsys):
    # in a process of its own
    command, root = [sys.executable, "-c", LOADING, str(real)], Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    seconds, peak, loaded = json.loads(done.stdout)
    tell(
        capsys,
        f"loading: {seconds:.1f} s, {peak / 2**20:,.0f} MiB at the peak for {loaded / 2**20:,.0f} of weights",
    )
    assert loaded == 4 * weights and peak < 1.3 * loaded


@pytest.mark.parametrize("loss", ["mse", "ce"])
def test_a_step_holds_no_copy_of_the_weights(ours, long, weights, loss, capsys):
    """Three runs of four rows of 20 tokens, the last four of them answers."""
    model, adapter = ours[0], LoRA(ours[0])
    targets = torch.zeros(model.config.num_hidden_layers, 4, model.config.hidden_size)
    rows = [TokenRow(ids[:16], ids[16:20], targets) for ids in long]
    theta = torch.stack([adapter.init(torch.Generator().manual_seed(r)) for r in range(3)])
    mix, orders = {loss: torch.ones(3)}, [lambda epoch: range(4)] * 3
    runs = Runs(theta, torch.full((3,), 1e-4), [rows] * 3, [[]] * 3, mix, orders)
    peak = allocated(lambda: train_runs(model, adapter, runs, Settings(epochs=1)))
    begin = time.perf_counter()
    train_runs(model, adapter, runs, Settings(epochs=3))
    seconds = (time.perf_counter() - begin) / 3
    tell(
        capsys,
        f"a step by {loss}: {seconds:.2f} s, {peak / 2**20:,.0f} MiB of tensors beside the weights",
    )
    assert peak < 4 * weights
