"""A model split over ranks against the whole one and transformers: gloo, two and four processes on the CPU."""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.tensor  # once, before the ranks are forked
from click.testing import CliRunner
from ia2mini.models import Taps, llama, load
from ia2mini.models.checkpoint import save
from ia2mini.scale.blocks import checkpoint_blocks
from ia2mini.models.shard import local, mesh_of
from mistakes import refused
from reference import (
    EOS,
    MIXES,
    byte_tokenizer,
    in_order,
    make_checkpoint,
    make_rows,
    random_ids,
    starts,
    upstream,
    upstream_pass,
)

import ia2mini.files
import ia2mini.train
from ia2mini import open_subject
from ia2mini.adapters import (EVERY_MATRIX, IA3, LoRA, adapted)
from ia2mini.batch import collate
from ia2mini.cli.main import main
from ia2mini.scoring import label_scores, share_prefix
from ia2mini.generate import Decoding, generate
from ia2mini.engine.options import Options
from ia2mini.study.study import compare
from ia2mini.engine.subject import share as start
from ia2mini.tasks import Example, find_task
from ia2mini.train import (Runs, Settings, losses, train_runs)

RUNS = 3
ADAPTERS = {
    "lora": LoRA,
    "lora on every matrix": partial(LoRA, targets=EVERY_MATRIX),
    "ia3": partial(IA3, targets=EVERY_MATRIX),
    "ia3 on inputs": partial(IA3, targets=EVERY_MATRIX, scale_inputs=True),
}
CASES = {
    "untied": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "tied": ("qwen3", {"tie_word_embeddings": True, "head_dim": 12}),
}


def one_rank(rank: int, ranks: int, port: int, work, answers) -> None:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(address, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    answers.put((rank, work()))


def on_ranks(ranks: int, *work) -> tuple[list, list[int]]:
    """What `work` (one for all, or one a rank) gives in each of so many forked processes, and their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    answers = [fork.SimpleQueue() for _ in range(ranks)]
    every = [
        fork.Process(target=one_rank, args=(rank, ranks, port, work[rank % len(work)], answers[rank]), daemon=True)
        for rank in range(ranks)
    ]
    for process in every:
        process.start()
    found, deadline = [], time.monotonic() + 600
    for process, answer in zip(every, answers, strict=True):
        while answer.empty() and process.is_alive() and time.monotonic() < deadline:
            process.join(0.02)
        found.append(None if answer.empty() else answer.get()[1])
    for process in every:
        process.join(max(0.1, deadline - time.monotonic()))
        process.kill()  # one that waits for ever must not keep the tests waiting; of one that has ended nothing
        process.join()
    return found, [process.exitcode for process in every]


def same(ranks: int, work):
    """What `work` gives on the first of so many ranks; the others have the same bits."""
    found, codes = on_ranks(ranks, work)
    assert codes == [0] * ranks
    for other in found[1:]:
        assert json.dumps(other) == json.dumps(found[0])  # of a float32 this is every bit
    return found[0]


def compute(model, tokenizer, adapters=tuple(ADAPTERS)) -> dict:
    """Everything that a split model must compute as a whole one does, as lists."""
    taps, ids = Taps(), random_ids(3, 9)
    with torch.no_grad():
        found = {"logits": model(ids, taps=taps), "taps": taps.stack()}
    batch = collate([make_rows(4, seed) for seed in range(RUNS)], pack=True)
    for name in adapters:
        adapter = ADAPTERS[name](model)
        found[f"{name} begins"] = theta = starts(adapter, model, RUNS)
        noise = torch.randn(theta.shape, generator=torch.Generator().manual_seed(1))
        moved = (theta + 0.05 * noise).requires_grad_()
        for mix in ("sft", "ia2"):
            weights = {loss: torch.full((RUNS,), share) for loss, share in MIXES[mix].items()}
            with adapted(model, adapter, moved) as student:
                loss = losses(student, batch, weights)
                found[f"{name} {mix} gradient"] = torch.autograd.grad(loss.sum(), moved)[0]
            found[f"{name} {mix} loss"] = loss
    train, dev = ([make_rows(4, first + run) for run in range(RUNS)] for first in (10, 20))
    rates, order = torch.tensor([1e-3, 5e-4, 1e-3]), [partial(in_order, run) for run in range(RUNS)]
    for mix in ("sft", "ia2"):
        weights = {loss: torch.full((RUNS,), share) for loss, share in MIXES[mix].items()}
        lora = LoRA(model)
        runs = Runs(starts(lora, model, RUNS), rates, train, dev, weights, order)
        found[f"{mix} after a step"] = train_runs(model, lora, runs, Settings(steps=1)).theta
        trained = train_runs(model, lora, runs, Settings(batch_size=2, epochs=6, patience=2))
        found |= {f"{mix} dev loss": trained.dev_loss, f"{mix} steps": trained.steps}
    prompts = [random_ids(length).tolist() for length in (3, 7, 5, 2)]
    found["answers"] = generate(model, tokenizer, prompts, Decoding(12, stop=None))
    shared, queries = share_prefix(model, tokenizer, [[Example("a demonstration", "0")]], ["one", "another"])
    scores = label_scores(shared, queries, [[48], [49, EOS]])
    found |= {"label": scores.top, "probability": scores.probabilities}
    return {name: value.tolist() if torch.is_tensor(value) else value for name, value in found.items()}


def split(folder: Path):
    mesh, device = start("cpu")
    return load(folder, device=device, mesh=mesh)


def computed_split(folder: Path, adapters: tuple) -> dict:
    model, tokenizer = split(folder)
    return compute(model, tokenizer, adapters)


@pytest.fixture(scope="module", params=list(CASES))
def case(request, tmp_path_factory):
    """(folder, what the whole model computes) of a checkpoint that two and four ranks can share."""
    family, changes = CASES[request.param]
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4}
    folder = make_checkpoint(tmp_path_factory.mktemp(request.param), family, **sizes, **changes)
    torch.manual_seed(0)
    return folder, compute(*load(folder))


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_compute_what_one_process_does(case, ranks):
    folder, whole = case
    torch.manual_seed(0)
    adapters = tuple(ADAPTERS) if ranks == 2 else ("lora on every matrix", "ia3")
    parts = same(ranks, partial(computed_split, folder, adapters))
    assert ranks > 2 or parts.keys() == whole.keys()
    for name, value in parts.items():
        if name in ("answers", "label") or name.endswith("steps"):
            assert whole[name] == value, name
        else:
            gap = (torch.tensor(value) - torch.tensor(whole[name])).abs().max().item()
            assert gap <= 1e-5, f"{name}: {gap:.1e}"
    assert any(steps < 12 for steps in whole["sft steps"] + whole["ia2 steps"])  # some runs left early
    assert max(map(len, whole["answers"])) > 3
    torch.manual_seed(0)
    logits, outputs = upstream_pass(upstream(folder), random_ids(3, 9))
    assert (torch.tensor(parts["logits"]) - logits).abs().max() <= 1e-5
    assert (torch.tensor(parts["taps"]) - outputs).abs().max() <= 1e-5


def checkpointed_split(folder: Path) -> list:
    model, _ = split(folder)
    checkpoint_blocks(model)
    return gradient(model)


def gradient(model) -> list:
    """Of every loss together with regard to LoRA's weights, one run."""
    lora, batch = LoRA(model, EVERY_MATRIX), collate([make_rows(3, 5)])
    theta = starts(lora, model, 1)
    theta = (theta + 0.02 * torch.randn(theta.shape, generator=torch.Generator().manual_seed(1))).requires_grad_()
    with adapted(model, lora, theta) as student:
        loss = losses(student, batch, {name: torch.ones(1) for name in ("mse", "ce", "kl")})
        return torch.autograd.grad(loss.sum(), theta)[0].tolist()


def test_checkpointed_blocks_are_summed_again(case):
    parts, whole = same(2, partial(checkpointed_split, case[0])), gradient(load(case[0])[0])
    assert (torch.tensor(parts) - torch.tensor(whole)).abs().max() <= 1e-5


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measured(small: Path, folder: Path) -> tuple[int, int, int]:
    """Bytes of the weights that a rank keeps, its peak of memory while loading, and how many ranks share the model."""
    mesh, _ = start("cpu")
    load(small, mesh=mesh)  # imports are not the weights' memory
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    model, _ = load(folder, mesh=mesh)
    peak = status("VmHWM") - before
    parts = {id(p): local(p) for p in model.parameters()}.values()
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in parts)
    return sum(p.untyped_storage().nbytes() for p in parts), peak, mesh_of(model).size()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from /proc")
@pytest.mark.parametrize("ranks", [2, 4])
def test_no_rank_ever_holds_more_than_its_part(tmp_path, ranks):
    sizes = {"vocab_size": 512, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6}
    model = llama.Llama(llama.Config(**sizes, num_attention_heads=8, num_key_value_heads=4))
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    save(model, tmp_path, byte_tokenizer(bos=True), EOS)
    whole = sum(p.nbytes for p in model.parameters())  # 80 MB; the largest tensor 3 MB
    small = make_checkpoint(tmp_path / "small", "llama", num_key_value_heads=4)
    found, codes = on_ranks(ranks, partial(measured, small, tmp_path))
    print(whole, found)
    assert codes == [0] * ranks
    norms = sum(p.nbytes for name, p in model.named_parameters() if "norm" in name)
    assert sum(kept for kept, *_ in found) == whole + (ranks - 1) * norms  # every other weight is kept once
    assert len({kept for kept, *_ in found}) == 1
    for kept, peak, members in found:
        assert members == ranks and peak < kept + 0.15 * whole


def test_what_ranks_cannot_share_is_refused(tmp_path):
    four = SimpleNamespace(size=lambda: 4)
    for name, changes in {
        "num_key_value_heads = 2": {},
        "intermediate_size = 50": {"num_key_value_heads": 4, "intermediate_size": 50},
    }.items():
        folder = make_checkpoint(tmp_path / name[:3], "llama", **changes)
        refused(lambda folder=folder: load(folder, mesh=four), "--shard", name, "4 ranks", "--nproc-per-node 2")
    refused(lambda: open_subject("tiny", shard=True), "torchrun --nproc-per-node")
    for command in (["run", "--shard", "--compile"], ["predict", str(tmp_path), "-", "--shard"]):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 2 and "--shard" in result.stderr and result.stderr.count("\n") == 1
    assert CliRunner().invoke(main, ["merge", str(tmp_path), "--shard", "--out", "x"]).exit_code == 2


OPTIONS = {"methods": ("base", "sft", "ia2-sft"), "sets": 2, "rates": (1e-2, 3e-2), "epochs": 2, "eval_rows": 8}
COMMAND = "run toy-sums-short --methods base,sft,ia2-sft --sets 2 --rates 1e-2,3e-2 --epochs 2 --eval-rows 8"


def command(out: Path, dies_at: int | None, line: str) -> None:
    """The command in this rank, its output in files; it is killed when it makes a certain step of Adam."""
    rank = os.environ["RANK"]
    sys.stdout, sys.stderr = (open(out / f"{stream}-of-{rank}", "w", buffering=1) for stream in ("said", "told"))
    steps, step = count(1), ia2mini.train.Adam.step

    def dying(adam, grad):
        if next(steps) == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        step(adam, grad)

    ia2mini.train.Adam.step = dying
    sys.modules["matplotlib"] = None  # figures take longer than all the rest
    if rank != "0":
        ia2mini.files.tempfile = None  # only the first rank may write
    main.main([*line.split(), "--shard", "--out", str(out / "runs")])


def near(one, other, where: str = "") -> None:
    """Two documents say the same, numbers to 1e-5."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one.keys() - {"seconds", "seconds_by_phase", "peak_memory_bytes"}:
            near(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for a, b in zip(one, other, strict=True):
            near(a, b, f"{where}[]")
    else:
        assert one == (pytest.approx(other, abs=1e-5) if isinstance(one, float) else other), where


def test_a_killed_rank_ends_the_other_with_a_line_and_the_same_command_goes_on(tmp_path):
    _, codes = on_ranks(2, partial(command, tmp_path, None, COMMAND), partial(command, tmp_path, 3, COMMAND))
    assert codes == [2, -signal.SIGKILL]
    said = (tmp_path / "told-of-0").read_text().splitlines()
    assert [line for line in said if not line.startswith("phase ")] == [
        said[-1]
    ] and "another process has ended" in said[-1]
    kept = {path: path.stat().st_ino for path in tmp_path.glob("runs/*/toy-sums-short-n4/*.safetensors")}
    assert any(path.name == "fit-sft.safetensors" for path in kept)
    assert not any(path.name == "fit-ia2.safetensors" for path in kept)
    _, codes = on_ranks(2, partial(command, tmp_path, None, COMMAND))
    assert codes == [0, 0]
    assert (
        kept.items()
        <= {path: path.stat().st_ino for path in tmp_path.glob("runs/*/toy-sums-short-n4/*.safetensors")}.items()
    )
    assert (
        (tmp_path / "said-of-1").read_text() == (tmp_path / "told-of-1").read_text() == ""
    )  # the first rank speaks for all
    assert "IA2→SFT" in (tmp_path / "said-of-0").read_text()
    document, folder = compare([find_task("toy-sums-short")], open_subject(), Options(**OPTIONS), tmp_path / "alone")
    assert [folder.name] == [path.name for path in (tmp_path / "runs").iterdir()]
    near(json.loads((tmp_path / "runs" / folder.name / "results.json").read_text()), document)
    assert {p.relative_to(folder) for p in folder.rglob("*.safetensors")} == {
        p.relative_to(tmp_path / "runs" / folder.name) for p in (tmp_path / "runs").rglob("*.safetensors")
    }
