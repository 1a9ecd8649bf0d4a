"""Random weights in the shapes of real models, held by ia2mini and by transformers alike, and random rows."""

import copy
import random
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property

import torch
from ia2mini.models import llama, qwen3
from ia2mini.models.layers import Rope
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from torch import Tensor, nn

from ia2mini.adapters import LoRA, unpack
from ia2mini.tasks import Example
from ia2mini.tokenizer import Tokenizer

from .report import TOLERANCE

QWEN = {"vocab_size": 151936, "rope": Rope(1e6), "tie_word_embeddings": True}
LLAMA_ROPE = Rope(
    5e5,
    {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
)
SHAPES = {  # vocabulary, hidden, MLP, layers, heads, key/value heads, head size
    "tiny": qwen3.Config(  # as models/tiny
        vocab_size=449, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, tie_word_embeddings=True,
    ),
    "100m": qwen3.Config(
        hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, **QWEN
    ),
    "smollm2-135m": llama.Config(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, rms_norm_eps=1e-5, rope=Rope(1e5), tie_word_embeddings=True,
    ),
    "qwen3-0.6b": qwen3.Config(
        hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, **QWEN
    ),
    "llama-3.2-1b": llama.Config(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, rms_norm_eps=1e-5, rope=LLAMA_ROPE, tie_word_embeddings=True,
    ),
    "llama-3.2-3b": llama.Config(
        vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
        num_key_value_heads=8, head_dim=128, rms_norm_eps=1e-5, rope=LLAMA_ROPE, tie_word_embeddings=True,
    ),
    "qwen3-4b": qwen3.Config(
        hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, **QWEN
    ),
}  # fmt: skip
CPU_DEPTH = {
    "qwen3-0.6b": 4,
    "llama-3.2-1b": 2,
    "llama-3.2-3b": 2,
    "qwen3-4b": 2,
}  # layers on a CPU
LABELS = (" w0", " w1")
# prompt tokens of SST2's training rows under Qwen3's tokenizer, template included, at 5 %, 15 %, … 95 %
SST2_LENGTHS = (7, 8, 9, 10, 12, 14, 17, 21, 26, 36)


@dataclass
class Stand:
    """One shape on one device: our model, transformers' on the same tensors, a tokenizer of words w0, w1, …."""

    shape: str
    about: str  # weights, depth, dtype, device: what the output says of it
    model: nn.Module
    net: nn.Module
    tokenizer: Tokenizer

    @property
    def config(self):
        return self.model.config

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.lm_head.weight.dtype

    @property
    def tolerance(self) -> float:
        """How far two stacks may differ, of the largest value."""
        return TOLERANCE[self.dtype]

    @cached_property
    def adapter(self) -> LoRA:
        return LoRA(self.model)

    def theta(self, runs: int = 1, trained: bool = False) -> Tensor:
        """First weights [R, M] of LoRA, a draw a run; B is random too if `trained`."""
        rows = [self.adapter.init(torch.Generator().manual_seed(r)) for r in range(runs)]
        theta = torch.stack(rows)
        if trained:
            theta += 0.02 * torch.randn(theta.shape, generator=torch.Generator().manual_seed(runs))
        return theta.to(self.device)

    def peft(self) -> nn.Module:
        """peft's LoRA of the protocol (rank 8 on q, k, o) around transformers' model, sharing its frozen tensors."""
        import peft

        net = copy.deepcopy(self.net, {id(p): p for p in self.net.parameters()})
        targets = list(self.adapter.targets)
        return peft.get_peft_model(
            net, peft.LoraConfig(r=8, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
        )

    def text(self, rng: random.Random, tokens: int) -> str:
        return " ".join(f"w{rng.randrange(16, self.config.vocab_size)}" for _ in range(tokens))

    def examples(
        self, count: int, lengths: tuple[int, ...], answer: int = 1, seed: int = 0
    ) -> list[Example]:
        """`count` rows of random words, prompts of `lengths` tokens in turn, shuffled; one-word answers are labels."""
        rng = random.Random(f"{seed} {count} {lengths} {answer}")
        sizes = [lengths[i % len(lengths)] for i in range(count)]
        rng.shuffle(sizes)
        rows = []
        for size in sizes:
            label = rng.randrange(len(LABELS)) if answer == 1 else None
            rows.append(
                Example(
                    self.text(rng, size),
                    LABELS[label] if answer == 1 else " " + self.text(rng, answer),
                    label,
                )
            )
        return rows

    def prompts(self, count: int, lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
        return self.tokenizer.encode_all(
            [e.prompt for e in self.examples(count, lengths, seed=seed)]
        )


@cache
def stand(
    shape: str, device: str = "cpu", dtype: torch.dtype = torch.float32, layers: int | None = None
) -> Stand:
    """Build a shape; on a CPU the large ones at CPU_DEPTH, unless `layers` says otherwise."""
    import transformers

    transformers.logging.set_verbosity_error()
    whole = SHAPES[shape]
    layers = (
        layers or (CPU_DEPTH.get(shape) if device == "cpu" else None) or whole.num_hidden_layers
    )
    config = replace(whole, num_hidden_layers=layers)
    torch.manual_seed(0)
    with torch.device(device):
        net = (
            transformers.AutoModelForCausalLM.from_config(theirs(config), dtype=dtype)
            .eval()
            .requires_grad_(False)
        )
    net.generation_config.eos_token_id, net.generation_config.pad_token_id = None, 0
    with torch.device("meta"):
        model = (qwen3.Qwen3 if config.model_type == "qwen3" else llama.Llama)(config)
    for name, p in net.named_parameters():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, p)
    model.tie()
    size = sum(p.numel() for p in model.parameters()) / 1e6
    depth = (
        f"{layers} layers"
        if layers == whole.num_hidden_layers
        else f"{layers} of its {whole.num_hidden_layers} layers"
    )
    about = f"{shape}: {size:.3g} M random weights, {depth}, vocabulary {config.vocab_size:,}, "
    about += f"{str(dtype)[6:]}, {device}"
    return Stand(shape, about, model.eval(), net, words(config.vocab_size))


def theirs(config):
    """The same config for transformers."""
    import transformers

    raw = asdict(config)
    rope = raw.pop("rope")
    scaling = rope["scaling"] and {"rope_type": "llama3", **rope["scaling"]}
    return transformers.AutoConfig.for_model(
        **raw, rope_theta=rope["theta"], rope_scaling=scaling, bos_token_id=None, eos_token_id=None
    )


def words(size: int) -> Tokenizer:
    """A tokenizer of `size` words w0, w1, … between spaces."""
    backend = Backend(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Tokenizer(backend, ())


def set_peft(net: nn.Module, theta: Tensor, adapter: LoRA) -> None:
    """Give peft's LoRA the weights of one of our runs, theta [M]."""
    parameters = dict(net.named_parameters())
    with torch.no_grad():
        for name, tensor in unpack(theta[None], adapter.shapes).items():
            parameters[f"base_model.model.{name[:-2]}.lora_{name[-1]}.default.weight"].copy_(
                tensor[0]
            )
