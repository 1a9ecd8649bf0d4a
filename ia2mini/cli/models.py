"""`ia2mini models`: which models have a short name, and what is to be known before one is downloaded."""

import re

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
}


def about(name: str) -> tuple[str, str, str]:
    """Family, licence and agreement of a short name."""
    for beginning, facts in KNOWN.items():
        if name.startswith(beginning):
            return facts
    raise KeyError(name)


def gigabytes(name: str) -> str:
    """What the weights take in bfloat16, two bytes each, by the number that the name says."""
    number, unit = re.search(r"(\d+(?:\.\d+)?)([bm])\b", name).groups()
    weights = float(number) * (1e9 if unit == "b" else 1e6)
    return f"{2 * weights / 1e9:.1f} GB"


@main.command()
def models():
    """List the models that have a short name: family, weights in bfloat16, licence, agreement on the hub.

    Any other checkpoint of these families is named by its folder or its hub id. `run` and `fit` keep the weights
    once, whatever the number of runs; the rest of the memory depends on the rows.
    """
    from ..models.checkpoint import SHORT_NAMES
    from ..models.config import FAMILIES

    rows = [("name", "family", "bfloat16", "licence", "agreement", "hub id")]
    rows.append(("tiny", "qwen3", "embedded", "MIT", "no", ""))
    for name, hub_id in SHORT_NAMES.items():
        family, licence, agreement = about(name)
        rows.append((name, family, gigabytes(name), licence, agreement, hub_id))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        entries = [f"{entry:<{width}}" for entry, width in zip(row, widths)]
        click.echo("  ".join(entries).rstrip())
    click.echo(f"\nfamilies (model_type in config.json): {', '.join(FAMILIES)}")
