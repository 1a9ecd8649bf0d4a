"""`ia2mini models`: which models have a short name, and what is to be known before one is downloaded."""

import json
from pathlib import Path

import click

from .group import main

# the beginning of a short name -> its licence, whether the hub wants an agreement first, and its published config.json
KNOWN = json.loads(Path(__file__).with_name("models.json").read_text(encoding="utf-8"))
BYTES = 2  # of a weight in bfloat16
# of the example that memory is stated for: `fit` trains a run for each fold side by side
RUNS = 5
ROWS = 4  # of a run in one step
TOKENS = 100  # of a row


def known_of(name: str) -> dict:
    """What is known of the model with a short name."""
    return next(known for beginning, known in KNOWN.items() if name.startswith(beginning))


def config_of(name: str):
    """The sizes of a model with a short name, as its family's Config."""
    from ..models.config import FAMILIES

    sizes = known_of(name)["config"]
    return FAMILIES[sizes["model_type"]][0](**sizes)


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
        known = known_of(name)
        config = config_of(name)
        weights = f"{BYTES * count_weights(config) / 1e9:.1f} GB"
        needed = f"{fit_bytes(config) / 1e9:.1f} GB"
        terms = (known["licence"], known["agreement"])
        rows.append((name, config.model_type, weights, needed, *terms, hub_id))
    click.echo("\n".join(aligned(rows, str.ljust)))
    click.echo(f"\nfamilies (model_type in config.json): {', '.join(FAMILIES)}")
    click.echo(
        f"fit: weights in bfloat16, and {RUNS} runs side by side (--folds), each {ROWS} rows of {TOKENS} tokens a step "
        "(--batch-size):\nstates kept for the backward pass, and LoRA's weights seven times. Longer rows need more in "
        "proportion, float32 twice as much;\nPython and PyTorch take about a GB beside it. A GPU trains fewer "
        "runs at once where memory is short."
    )
