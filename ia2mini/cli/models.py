"""`ia2mini models`: which models have a short name, and what is to be known before one is downloaded."""

import click

from .group import main

# the beginning of a short name -> model_type, licence, and whether the hub wants an agreement first
KNOWN = {
    "qwen3-": ("qwen3", "Apache-2.0", "no"),
    "llama-": ("llama", "Llama Community", "yes"),
    "smollm2-": ("llama", "Apache-2.0", "no"),
    "smollm3-": ("smollm3", "Apache-2.0", "no"),
    "qwen2.5-3b": ("qwen2", "Qwen Research", "no"),
    "qwen2.5-": ("qwen2", "Apache-2.0", "no"),
    "mistral-": ("mistral", "Apache-2.0", "may"),
    "granite-": ("granite", "Apache-2.0", "no"),
    "olmo2-": ("olmo2", "Apache-2.0", "no"),
}
# … -> vocabulary, hidden, MLP, layers, heads, key/value heads, head size, whether head and embedding are one;
# as the published config.json has them
SHAPES = {
    "qwen3-0.6b": (151936, 1024, 3072, 28, 16, 8, 128, True),
    "qwen3-1.7b": (151936, 2048, 6144, 28, 16, 8, 128, True),
    "qwen3-4b": (151936, 2560, 9728, 36, 32, 8, 128, True),
    "qwen3-8b": (151936, 4096, 12288, 36, 32, 8, 128, False),
    "qwen3-14b": (151936, 5120, 17408, 40, 40, 8, 128, False),
    "qwen3-32b": (151936, 5120, 25600, 64, 64, 8, 128, False),
    "llama-3.2-1b": (128256, 2048, 8192, 16, 32, 8, 64, True),
    "llama-3.2-3b": (128256, 3072, 8192, 28, 24, 8, 128, True),
    "llama-3.1-8b": (128256, 4096, 14336, 32, 32, 8, 128, False),
    "llama-3.1-70b": (128256, 8192, 28672, 80, 64, 8, 128, False),
    "smollm2-135m": (49152, 576, 1536, 30, 9, 3, 64, True),
    "smollm2-360m": (49152, 960, 2560, 32, 15, 5, 64, True),
    "smollm2-1.7b": (49152, 2048, 8192, 24, 32, 32, 64, True),
    "smollm3-3b": (128256, 2048, 11008, 36, 16, 4, 128, True),
    "qwen2.5-0.5b": (151936, 896, 4864, 24, 14, 2, 64, True),
    "qwen2.5-1.5b": (151936, 1536, 8960, 28, 12, 2, 128, True),
    "qwen2.5-3b": (151936, 2048, 11008, 36, 16, 2, 128, True),
    "qwen2.5-7b": (152064, 3584, 18944, 28, 28, 4, 128, False),
    "mistral-7b": (32768, 4096, 14336, 32, 32, 8, 128, False),
    "granite-3.3-2b": (49159, 2048, 8192, 40, 32, 8, 64, True),
    "granite-3.3-8b": (49159, 4096, 12800, 40, 32, 8, 128, True),
    "olmo2-1b": (100352, 2048, 8192, 16, 16, 16, 128, False),
    "olmo2-7b": (100352, 4096, 11008, 32, 32, 32, 128, False),
    "olmo2-13b": (100352, 5120, 13824, 40, 40, 40, 128, False),
}
BYTES = 2  # of a weight in bfloat16
# of the example that memory is stated for: `fit` trains a run for each fold side by side
RUNS = 5
ROWS = 4  # of a run in one step
TOKENS = 100  # of a row


def of_beginning(name: str, facts: dict[str, tuple]) -> tuple:
    """The entry whose key a short name begins with."""
    for beginning, found in facts.items():
        if name.startswith(beginning):
            return found
    raise KeyError(name)


def config_of(name: str):
    """The sizes of a model with a short name, as its family's Config."""
    from ..models.config import FAMILIES

    family, _, _ = of_beginning(name, KNOWN)
    vocabulary, hidden, mlp, layers, heads, shared, head_size, tied = of_beginning(name, SHAPES)
    return FAMILIES[family][0](
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        head_dim=head_size,
        tie_word_embeddings=tied,
        model_type=family,
    )


def count_weights(config) -> int:
    """Weights of a model; those of norms and biases, a thousandth, are left out."""
    D = config.hidden_size
    Q = config.num_attention_heads * config.head_dim
    K = config.num_key_value_heads * config.head_dim
    tables = 1 if config.tie_word_embeddings else 2
    layer = D * (2 * Q + 2 * K + 3 * config.intermediate_size)
    return tables * D * config.vocab_size + config.num_hidden_layers * layer


def fit_bytes(config) -> float:
    """Bytes that `fit` takes at its defaults: weights, and `RUNS` runs of LoRA on `ROWS` rows of `TOKENS` tokens."""
    from ..scale.memory import RANK, run_bytes

    D = config.hidden_size
    Q = config.num_attention_heads * config.head_dim
    K = config.num_key_value_heads * config.head_dim
    trained = config.num_hidden_layers * RANK * (3 * D + 2 * Q + K)  # on q, k and o
    run = run_bytes(config, ROWS * TOKENS, ROWS, BYTES, trained)
    return BYTES * count_weights(config) + RUNS * run


@main.command()
def models():
    """List the models that have a short name.

    It prints the family, the size of the weights in bfloat16, the memory that `fit` needs, the licence, and whether
    the hub asks for an agreement first. Any other checkpoint of these families is named by its folder or its hub id.

    \b
    Examples:
      ia2mini models
      ia2mini models | grep Apache
    """
    from ..models.checkpoint import SHORT_NAMES
    from ..models.config import FAMILIES
    from ..report.tables import aligned

    rows = [("name", "family", "weights", "fit", "licence", "agreement", "hub id")]
    rows.append(("tiny", "qwen3", "embedded", "< 0.1 GB", "MIT", "no", ""))
    for name, hub_id in SHORT_NAMES.items():
        family, licence, agreement = of_beginning(name, KNOWN)
        config = config_of(name)
        weights = f"{BYTES * count_weights(config) / 1e9:.1f} GB"
        needed = f"{fit_bytes(config) / 1e9:.1f} GB"
        rows.append((name, family, weights, needed, licence, agreement, hub_id))
    click.echo("\n".join(aligned(rows, str.ljust)))
    click.echo(f"\nfamilies (model_type in config.json): {', '.join(FAMILIES)}")
    click.echo(
        f"fit: weights in bfloat16, and {RUNS} runs side by side (--folds), each {ROWS} rows of {TOKENS} tokens a step "
        "(--batch-size):\nstates kept for the backward pass, and LoRA's weights seven times. Longer rows need more in "
        "proportion, float32 twice as much;\nPython and PyTorch take about a GB beside it. A GPU trains fewer "
        "runs at once where memory is short."
    )
