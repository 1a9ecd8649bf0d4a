"""What docs/reading.md says can be added in twenty lines, in examples/."""

import json
import re
import runpy
from pathlib import Path

import pytest
import torch
from ia2mini.models import config as configs
from reference import make_checkpoint, random_ids, upstream

from ia2mini import Taps, load

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("name", ["own_loss", "own_adapter", "own_task"])
def test_what_is_added_learns(name, capsys):
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    (said,) = re.findall(r"accuracy (\S+)", capsys.readouterr().out)
    assert float(said) >= 0.8


def test_a_family_of_ones_own_is_read_and_tapped(tmp_path, monkeypatch):
    """Against transformers' Llama with the same activation."""
    monkeypatch.setattr(configs, "FAMILIES", dict(configs.FAMILIES))
    runpy.run_path(str(EXAMPLES / "own_family.py"))
    folder = make_checkpoint(tmp_path, "llama", num_hidden_layers=2)
    twin = upstream(folder)
    for layer in twin.model.layers:
        layer.mlp.act_fn = torch.nn.GELU(approximate="tanh")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gelu-llama"}))
    model, _ = load(folder)
    ids = random_ids(2, 7)
    taps = Taps()
    with torch.no_grad():
        found = model(ids, taps=taps)
        wanted = twin(ids).logits
    assert (found - wanted).abs().max() < 1e-4 and taps.stack().shape[:3] == (2, 2, 7)


@pytest.mark.parametrize("name", ["own_loss", "own_adapter", "own_task", "own_family"])
def test_it_takes_twenty_lines(name):
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    added = re.split("if __name__|model, tokenizer = load", source)[0].split("\n\n\n", 1)[-1]
    code = [
        line for line in added.splitlines() if line.strip() and not line.lstrip().startswith("#")
    ]
    assert len(code) <= 20
