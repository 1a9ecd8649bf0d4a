"""Helpers that test files share: tiny random checkpoints of both families, made, run and trained by transformers."""

import json
import math
from pathlib import Path

import numpy as np
import torch
import transformers
from ia2mini.models import Taps
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from ia2mini.adapters import LoRA, unpack
from ia2mini.batch import TokenRow
from ia2mini.train import Hooks, Runs, Settings, State

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCABULARY = 288  # 256 bytes, BOS, EOS and unused entries, as real embeddings are padded
BOS, EOS = 256, 257
CLASSES = {
    "llama": "Llama",
    "qwen3": "Qwen3",
    "qwen2": "Qwen2",
    "mistral": "Mistral",
    "smollm3": "SmolLM3",
    "seed_oss": "SeedOss",
    "granite": "Granite",
    "olmo2": "Olmo2",
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def byte_tokenizer(bos: bool) -> str:
    """tokenizer.json with one token a byte and no merges; `bos`: the post-processor adds BOS, as Llama's does."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS)]
        )
    return tokenizer.to_str()


def raw_config(family: str, absent: tuple[str, ...] = (), **changes) -> dict:
    """A tiny config.json in the hub's spelling, without the fields in `absent`."""
    raw = {
        "architectures": [f"{CLASSES[family]}ForCausalLM"],
        "model_type": family,
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": BOS,
        "pad_token_id": None,
        "eos_token_id": EOS,
        "torch_dtype": "float32",
        **changes,
    }
    return {name: value for name, value in raw.items() if name not in absent}


def make_checkpoint(
    folder: Path, family: str, dtype=torch.float32, shard: str = "1GB", seed: int = 0, **changes
) -> Path:
    """A tiny random checkpoint, every weight away from its initial value; config.json in the hub's spelling."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = raw_config(family, torch_dtype=str(dtype).removeprefix("torch."), **changes)
    (folder / "config.json").write_text(json.dumps(raw))
    generator = torch.Generator().manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(folder)
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.2 * noise if "norm" in name else 0.2 * noise)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "tokenizer.json").write_text(byte_tokenizer(bos=family == "llama"))
    return folder


def upstream(folder: Path, dtype=torch.float32):
    """The checkpoint as transformers loads it."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def upstream_pass(model, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' logits [B, T, V] and attention outputs [L, B, T, D], the latter caught by forward hooks."""
    caught: list[torch.Tensor] = []
    # Granite and OLMo 2: what is added to the stream
    factor = getattr(model.config, "residual_multiplier", 1.0)
    if model.config.model_type == "olmo2":
        handles = [
            block.post_attention_layernorm.register_forward_hook(lambda m, i, a: caught.append(a))
            for block in model.model.layers
        ]
    else:
        handles = [
            block.self_attn.register_forward_hook(lambda m, i, out: caught.append(out[0] * factor))
            for block in model.model.layers
        ]
    try:
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return logits, torch.stack(caught)


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape)


def our_pass(model, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Our logits [B, T, V] and attention outputs [L, B, T, D]."""
    taps = Taps()
    with torch.no_grad():
        logits = model(ids, taps=taps)
    return logits, taps.stack()


def distances(ours: tuple, theirs: tuple) -> list[tuple[str, float]]:
    """The largest absolute difference of every layer's attention output and, last, of the logits, by name."""
    names = [*(f"attention output of layer {i}" for i in range(len(theirs[1]))), "logits"]
    pairs = zip([*ours[1], ours[0]], [*theirs[1], theirs[0]], strict=True)
    return [
        (name, (a.float() - b.float()).abs().max().item())
        for name, (a, b) in zip(names, pairs, strict=True)
    ]


def assert_equal(ours: tuple, theirs: tuple, allowed: float | list[float] = 1e-5) -> None:
    """Both passes (logits, attention outputs) agree; the failure names the first layer that differs."""
    found = distances(ours, theirs)
    for (name, gap), limit in zip(
        found, allowed if isinstance(allowed, list) else [allowed] * len(found), strict=True
    ):
        assert gap <= limit, f"first difference at {name}: {gap:.2e} > {limit:.0e}"


def peft_twin(folder: Path, adapter, theta: torch.Tensor):
    """peft's own adapter of the same kind on the same checkpoint, its weights set to one run's theta [M]."""
    import peft

    linears, c = list(adapter.linears), {"task_type": "CAUSAL_LM"}
    net = upstream(folder)
    if isinstance(adapter, LoRA):
        config = peft.LoraConfig(
            r=adapter.rank, lora_alpha=adapter.alpha, target_modules=linears, **c
        )
    else:
        config = peft.IA3Config(
            target_modules=linears, feedforward_modules=sorted(adapter.inputs), **c
        )
    twin = peft.get_peft_model(net, config)
    with torch.no_grad():
        parts = unpack(theta[None], adapter.shapes).values()
        for ours, p in zip(parts, twin_parameters(twin, adapter), strict=True):
            p.copy_(ours[0].reshape(p.shape))
    return twin.eval()


def twin_parameters(twin, adapter) -> list[torch.nn.Parameter]:
    """The trained parameters of a twin in the order of `adapter.shapes`; no other parameter trains."""
    named = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    if isinstance(adapter, LoRA):
        names = [
            f"base_model.model.{name[:-2]}.lora_{name[-1]}.default.weight"
            for name in adapter.shapes
        ]
    else:
        names = [f"base_model.model.{name}.ia3_l.default" for name in adapter.shapes]
    assert set(names) == set(named)
    return [named[name] for name in names]


def twin_theta(twin, adapter, gradients: bool = False) -> torch.Tensor:
    """A twin's weights, or their gradients, as our row [M]."""
    parameters = twin_parameters(twin, adapter)
    return torch.cat(
        [(p.grad if gradients else p.detach()).reshape(-1) for p in parameters]
    ).clone()


MIXES = {
    "sft": {"ce": 1.0},
    "ia2": {"mse": 1.0},
    "soft": {"kl": 1.0},
    "mixed": {"mse": 0.3, "ce": 0.7},
}
MIXES |= {"hidden": {"hidden": 1.0}}


def make_rows(count: int, seed: int, k: int = 6) -> list[TokenRow]:
    """Random rows of 2 to 7 prompt and 1 to 3 answer tokens with random teacher targets (two layers of 32 units)."""
    g, more = (torch.Generator().manual_seed(s) for s in (seed, seed + 1000))
    made = []
    for _ in range(count):
        T, P = (int(torch.randint(low, high, (), generator=g)) for low, high in ((2, 8), (1, 4)))
        ids = torch.randint(0, VOCABULARY, (T + P,), generator=g).tolist()
        soft, soft_ids = (2 * torch.randn(P, VOCABULARY, generator=g)).log_softmax(-1).topk(k)
        activations, states = (0.3 * torch.randn(2, P, 32, generator=x) for x in (g, more))
        made.append(TokenRow(ids[:T], ids[T:], activations, soft, soft_ids, states))
    return made


def plain_loss(twin, row: TokenRow, mix: dict[str, float]) -> torch.Tensor:
    """One row's loss, written out: hooks on transformers' attention, means over answer positions, sum over layers."""
    caught, streams = [], []
    blocks = [m for name, m in twin.named_modules() if name.endswith("self_attn")]
    norms = [m for name, m in twin.named_modules() if name.endswith("post_attention_layernorm")]
    handles = [
        b.register_forward_hook(lambda module, args, out: caught.append(out[0])) for b in blocks
    ]
    handles += [
        norm.register_forward_pre_hook(lambda module, args: streams.append(args[0]))
        for norm in norms
    ]
    logits = (
        twin(torch.tensor([row.prompt + row.answer[:-1]])).logits[0, -len(row.answer) :].double()
    )
    for handle in handles:
        handle.remove()
    total = 0.0
    for name, tapped, wanted in (("mse", caught, row.activations), ("hidden", streams, row.states)):
        if name in mix:
            layers = zip(tapped, wanted, strict=True)
            total += mix[name] * sum(
                (a[0, -len(row.answer) :].double() - t.double()).pow(2).mean() for a, t in layers
            )
    if "ce" in mix:
        said = sum(torch.log(p.softmax(0)[t]) for p, t in zip(logits, row.answer, strict=True))
        total -= mix["ce"] * said / len(row.answer)
    if "kl" in mix:
        for p, soft, ids in zip(logits, row.soft, row.soft_ids, strict=True):
            teacher = soft.double().exp() / soft.double().exp().sum()
            divergence = sum(
                q * (q.log() - p.log_softmax(0)[i]) for q, i in zip(teacher, ids, strict=True)
            )
            total += mix["kl"] * divergence / len(row.answer)
    return total


def plain_fit(twin, adapter, rate, mix, data, order, settings):
    """(best weights [M], its dev loss, steps, best dev loss at each look) of one run: torch.optim.Adam, row by row."""
    train, dev = data
    optimizer = torch.optim.Adam(twin_parameters(twin, adapter), lr=rate)
    best, best_theta, steps, misses, history = math.inf, None, 0, 0, []
    for epoch in range(settings.epochs):
        portions = np.array_split(
            order(epoch), range(settings.batch_size, len(train), settings.batch_size)
        )
        for number, portion in enumerate(portions):
            optimizer.zero_grad()
            for i in portion:
                (plain_loss(twin, train[i], mix) / len(portion)).backward()
            optimizer.step()
            steps += 1
            if steps % 2 == 0 or number == len(portions) - 1:
                with torch.no_grad():
                    loss = float(np.mean([plain_loss(twin, row, mix).item() for row in dev]))
                misses = 0 if loss < best else misses + 1
                if loss < best:
                    best, best_theta = loss, twin_theta(twin, adapter)
                history.append((steps, best))
                if misses == settings.patience:
                    return best_theta, best, steps, history
    return best_theta, best, steps, history


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """The distance of `a` from `b`, as a share of the size of `b`."""
    return ((a - b).norm() / b.norm()).item()


def starts(adapter, model, runs: int) -> torch.Tensor:
    """First weights [R, M], each run's its own."""
    return torch.stack([adapter.init(torch.Generator().manual_seed(r)) for r in range(runs)])


def in_order(run: int, epoch: int) -> list[int]:
    """The order of a run's four rows in an epoch."""
    return np.random.default_rng([run, epoch]).permutation(4).tolist()


DEFAULTS = Settings()
NO_HOOKS = Hooks()


def from_start(trainer):
    """A trainer of scale/, called as `train` is in a notebook: without a state to go on with."""

    def train(model, adapter, runs: Runs, settings=DEFAULTS, hooks=NO_HOOKS) -> State:
        return trainer(model, adapter, runs, settings, State.begin(runs.theta), hooks)

    return train
