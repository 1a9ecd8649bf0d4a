"""What `fit` ships, from the held-out losses of all candidates."""

import pytest
import torch
from scipy import stats

from ia2mini.crossval import Candidate, choose


def test_what_is_shipped():
    """SFT, unless another is surely better and ICL too; nothing where nothing is better than the base."""

    def shipped(icl=0.0, **losses) -> str:
        rows = {name.replace("_", "-"): row for name, row in losses.items()} | {"icl": [icl] * 4}
        return choose({name: Candidate(name, None, torch.tensor(row)) for name, row in rows.items()})

    base, sft = [2.0] * 4, [1.0, 1.0, 1.0, 1.0]
    assert shipped(base=base, sft=sft, ia2_sft=[0.9, 0.5, 0.8, 0.7]) == "ia2-sft"  # ahead by .28, an error of .09
    assert shipped(base=base, sft=sft, ia2_sft=[0.9, 0.5, 0.8, 0.7], icl=1.1) == "sft"  # which ICL cannot explain
    assert shipped(base=base, sft=sft, ia2_sft=[0.1, 1.9, 0.1, 1.7]) == "sft"  # by .05, an error of .49
    assert shipped(base=base, sft=sft, ia2_sft=[0.2, 1.0, 0.3, 1.1]) == "sft"  # by .35, an error of .24: 1.45 of them
    assert shipped(base=[1.0, 1.5, 0.5, 1.0], sft=[1.1, 1.0, 1.0, 1.1], ia2_sft=[0.9, 1.1, 0.8, 1.1]) == "sft"
    assert shipped(base=base, sft=sft, ia2_sft=[1.1] * 4) == "sft"
    worse, wide = [3.0] * 4, [0.1, 3.0, 0.1, 4.5]
    assert shipped(base=base, sft=worse, ia2_sft=wide) == "ia2-sft"  # SFT is surely worse than the base
    assert shipped(base=base, sft=worse, ia2_sft=wide, icl=3.1) == "base"
    assert shipped(base=base, sft=worse, ia2_sft=[2.5] * 4, probe=[0.0] * 4) == "base"
    assert shipped(base=base, ia2=sft) == "ia2"


@pytest.mark.parametrize("gained, lost", [(4, 0), (5, 0), (8, 1), (9, 2), (9, 3), (0, 0), (0, 6)])
def test_where_icl_is_behind_what_learned_from_it_must_be_right_on_more_rows(gained, lost):
    """As a sign test of scipy says, which only looks at rows on which one of the two is right."""
    right = {"sft": [0] * gained + [1] * lost + [1, 0], "ia2-sft": [1] * gained + [0] * lost + [1, 0]}
    losses = {"base": 2.0, "icl": 1.1, "sft": 1.0, "ia2-sft": 0.5}
    found = {
        name: Candidate(name, None, torch.tensor([loss, loss + 0.01] * (gained + lost + 2))[: gained + lost + 2])
        for name, loss in losses.items()
    }
    for name, rows in right.items():
        found[name].right = torch.tensor(rows).bool()
    n = gained + lost
    sure = n > 0 and stats.binomtest(gained, n, 0.5, "greater").pvalue < 0.05
    assert choose(found) == ("ia2-sft" if sure else "sft")
    found["sft-sft"] = found.pop("ia2-sft")
    assert choose(found) == "sft-sft"  # it has not learned from ICL
    found["ia2-sft"] = found.pop("sft-sft")
    found["icl"].losses = found["sft"].losses - 0.1
    assert choose(found) == "ia2-sft"
