"""`kernel`: the activation loss alone; `memory`: the peak of a training step; `load`: from disk to the first tokens."""

import json
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from ia2mini.models.checkpoint import save
from torch import Tensor

from ia2mini.batch import TokenRow
from ia2mini.losses import activation_mse
from ia2mini.scale.blocks import HALVES, checkpoint_blocks

from .peers import PEERS
from .report import Line, Result, agree
from .shapes import stand
from .timing import Timing, allocated, race
from .training import PHASES, OurStep


def plain_mse(outputs: list[Tensor], targets: Tensor) -> Tensor:
    """Equation 4 as it is written, whole tensors at a time: L times [P, D] and [L, P, D] -> [P]."""
    return ((torch.stack(outputs).float() - targets.float()) ** 2).mean(-1).sum(0)


def both_ways(loss, outputs: list[Tensor], targets: Tensor) -> Tensor:
    """Forward and backward of the loss from the taps of L layers; the gradient of the first."""
    for x in outputs:
        x.grad = None
    loss(outputs, targets).mean().backward()
    return outputs[0].grad


# of `kernel`: hidden units, positions
SIZES = ((2048, 1), (2048, 64), (2048, 1024), (5120, 1024), (2048, 16384))


def kernel(
    device: str = "cpu", dtype=torch.bfloat16, layers=None, seconds: float = 2.0, sizes=SIZES
) -> Result:
    """The loss, forward and backward, for P answer positions of D hidden units; against eager code and a plain copy."""
    layers = layers or (4 if device == "cpu" else 28)
    result = Result(
        "kernel",
        f"activation loss, forward and backward, {layers} layers, {str(dtype)[6:]} inputs, {device}",
        [],
    )
    for D, P in sizes:
        outputs = [
            torch.randn(P, D, device=device, dtype=dtype).requires_grad_() for _ in range(layers)
        ]
        targets = torch.randn(layers, P, D, device=device, dtype=dtype)
        agree(
            "loss",
            activation_mse(outputs, targets).detach(),
            plain_mse(outputs, targets).detach(),
            1e-4,
        )
        agree(
            "gradient",
            both_ways(activation_mse, outputs, targets).clone(),
            both_ways(plain_mse, outputs, targets),
            1e-2,
        )
        other = torch.empty_like(targets)
        stacks = {
            "us": lambda o=outputs, t=targets: both_ways(activation_mse, o, t),
            "eager": lambda o=outputs, t=targets: both_ways(plain_mse, o, t),
            "copy": lambda o=other, t=targets: o.copy_(t),
        }
        times = race(stacks, 9, seconds, device)
        copied = 2 * targets.nbytes / times["copy"].low
        for name in ("us", "eager"):
            # both tensors read twice, one gradient written
            rate = 5 * targets.nbytes / times[name].seconds
            result.add(
                Line(
                    f"D {D}, P {P}",
                    name,
                    times[name],
                    "",
                    {"% of copy bandwidth": 100 * rate / copied},
                )
            )
        result.ratio(f"D {D}, P {P}: eager / us", times["eager"], times["us"])
    for name, loss in (("us", activation_mse), ("eager", plain_mse)):
        extra = extra_bytes(loss, layers, D, P, device, dtype)
        result.add(Line(f"D {D}, P {P}: over the inputs", name, rates={"bytes": extra}))
    return result


def extra_bytes(loss, layers: int, D: int, P: int, device: str, dtype) -> int:
    """Bytes that the loss needs, forward and backward, beside inputs and gradients."""
    outputs = [
        torch.randn(P, D, device=device, dtype=dtype).requires_grad_() for _ in range(layers)
    ]
    targets = torch.randn(layers, P, D, device=device, dtype=dtype)
    return allocated(lambda: both_ways(loss, outputs, targets), device) - targets.nbytes


def memory(
    shape: str = "100m", device: str = "cpu", dtype=torch.float32, tokens: int = 200
) -> Result:
    """The most bytes of tensors beside the model in one training step of 4 rows with 26 + `tokens` tokens."""
    about = f"{shape}, {str(dtype)[6:]}, {device}: one step of 4 rows of 26 tokens with answers of {tokens}"
    result = Result("memory", about, [])
    ground = stand(shape, device, dtype)
    c = ground.config
    ids = [20 + i % 64 for i in range(tokens)]
    target = torch.randn(c.num_hidden_layers, tokens, c.hidden_size, device=device, dtype=dtype)
    for method, (phase, _) in PHASES.items():
        rows = [
            TokenRow(prompt, ids, target if phase == "mse" else None)
            for prompt in ground.prompts(4, (26,))
        ]
        ours = OurStep(ground, [rows], phase, ground.theta())
        ours.update = ours.update.function  # as it is computed, not while it is recorded
        stacks = {"us": ours, "us, checkpointing": partial(with_checkpointing, ground.model, ours)}
        for name, kind in PEERS.items():
            peer = kind(ground)
            peer.begin(ground.theta()[0], 1e-3)
            stacks[name] = partial(peer.step, rows, phase)
        most = {name: allocated(step, device) for name, step in stacks.items()}
        for name, size in most.items():
            result.add(Line(f"{method} step", name, rates={"bytes of tensors": size}))
        for name in PEERS:
            for mine in ("us", "us, checkpointing"):
                result.ratios[f"{method}: {mine} / {name}"] = most[mine] / most[name]
    return result


def with_checkpointing(model, step) -> None:
    checkpoint_blocks(model)
    try:
        step()
    finally:
        for block in model.model.layers:
            for half in HALVES:
                delattr(block, half)


US = """
import json, time; start = time.perf_counter()
import torch; from ia2mini.models import load; from bench.timing import reset_peak, resident
imported = time.perf_counter()
reset_peak(); before = resident()[0]
model, _ = load({folder!r}, torch.{dtype}, {device!r})
loaded = time.perf_counter()
with torch.no_grad(): model(torch.arange(8, device={device!r})[None], logits=False)
"""
THEM = """
import json, time; start = time.perf_counter()
import torch; from transformers import AutoModelForCausalLM; from bench.timing import reset_peak, resident
import transformers.models.qwen3.modeling_qwen3, transformers.models.llama.modeling_llama
imported = time.perf_counter()
reset_peak(); before = resident()[0]
model = AutoModelForCausalLM.from_pretrained({folder!r}, dtype=torch.{dtype}).to({device!r})
loaded = time.perf_counter()
with torch.no_grad(): model(torch.arange(8, device={device!r})[None], logits_to_keep=1)
"""
SAID = "print(json.dumps([imported - start, loaded - imported, time.perf_counter() - loaded, resident()[1] - before]))"
FIRST = """
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({folder!r})
model = AutoModelForCausalLM.from_pretrained({folder!r})
ids = tokenizer("w20 w21 w22", return_tensors="pt").input_ids
how = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
print(tokenizer.decode(model.generate(ids, **how)[0, 3:]))
"""


def python(code: str) -> str:
    """Run code in a fresh interpreter of this environment; its last line."""
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=root
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def checkpoint(shape: str, folder: Path, dtype=torch.float32) -> None:
    """A checkpoint of random weights that both libraries can read."""
    ground = stand(shape, dtype=dtype)
    save(ground.model, folder, ground.tokenizer.backend.to_str())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    )


def load(shape: str = "100m", device: str = "cpu", repeats: int = 2) -> Result:
    """A checkpoint from disk (in the page cache) to a model that has made a pass; the command to its first tokens."""
    result = Result(
        "load",
        f"{shape} and tiny, random weights, {device}; a fresh process each, files in the page cache",
        [],
    )
    folder = Path(tempfile.mkdtemp(prefix="ia2mini-bench-"))
    try:
        for kept, wanted in (
            ("float32", "float32"),
            ("bfloat16", "float32" if device == "cpu" else "bfloat16"),
        ):
            checkpoint(shape, folder / kept, getattr(torch, kept))
            what = {"folder": str(folder / kept), "dtype": wanted, "device": device}
            spent: dict[str, list] = {"us": [], "transformers": []}
            for _ in range(repeats):
                for name, code in (("us", US), ("transformers", THEM)):
                    spent[name].append(json.loads(python(code.format(**what) + SAID)))
            totals = {
                name: Timing.of([load + use for _, load, use, _ in runs])
                for name, runs in spent.items()
            }
            for name, runs in spent.items():
                rates = {
                    "s to import": Timing.of([r[0] for r in runs]).seconds,
                    "bytes more at most": max(r[3] for r in runs),
                }
                result.add(
                    Line(f"{kept} file as {wanted}, and a pass", name, totals[name], "", rates)
                )
            result.ratio(
                f"{kept} as {wanted}: transformers / us", totals["transformers"], totals["us"]
            )
            most = [max(r[3] for r in spent[name]) for name in ("us", "transformers")]
            result.ratios[f"  memory, {kept} as {wanted}: us / transformers"] = most[0] / most[1]
        checkpoint("tiny", folder / "tiny")
        command = [
            "generate",
            "--model",
            str(folder / "tiny"),
            "--prompt",
            "w20 w21 w22",
            "--max-tokens",
            "8",
            "--device",
            device,
        ]
        code = f"from ia2mini.cli.main import main; main({command!r})"
        them = FIRST.format(folder=str(folder / "tiny"))
        assert python(code).split() == python(them).split(), (
            "ia2mini and transformers continue the prompt differently"
        )
        times = race(
            {"us": lambda: python(code), "transformers": lambda: python(them)}, repeats, 20
        )
        for name, timed in times.items():
            result.add(Line("command to first tokens", name, timed))
        result.ratio("first tokens: us / transformers", times["us"], times["transformers"])
    finally:
        shutil.rmtree(folder)
    return result
