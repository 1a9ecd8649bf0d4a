"""The scripts in examples/ run as they stand, and what they print is right."""

import re
import runpy
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_a_tap_equals_a_hook(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["taps.py"])
    runpy.run_path(str(EXAMPLES / "taps.py"))
    differences = [float(x) for x in re.findall(r"difference (\S+)", capsys.readouterr().out)]
    assert len(differences) == 2 and max(differences) < 1e-5


def test_ia2_by_hand_beats_sft_and_is_short(capsys):
    runpy.run_path(str(EXAMPLES / "ia2_by_hand.py"))
    said = dict(re.findall(r"^(sft|ia2|ia2-sft) +accuracy (\S+),", capsys.readouterr().out, re.MULTILINE))
    assert float(said["ia2"]) > float(said["sft"]) + 0.2
    until_own_loss = (EXAMPLES / "ia2_by_hand.py").read_text().split("def cosine")[0]
    assert until_own_loss.count("\n") <= 30
