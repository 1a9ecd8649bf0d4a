"""bench: the FLOP formula against torch's own counter, the peers against us, and the honesty of what is extrapolated."""

import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench import inference, report, timing, training  # noqa: E402
from bench.shapes import stand  # noqa: E402
from ia2mini.episode import Row  # noqa: E402


@pytest.fixture(scope="module")
def tiny():
    return stand("tiny", layers=2)


@pytest.mark.parametrize("method", ["ia2", "sft"])
def test_flops_formula_matches_torch_counter(tiny, method):
    phase, head = training.PHASES[method][0], method == "sft"
    target = torch.zeros(2, 3, tiny.config.hidden_size)
    rows = [Row(list(range(20, 28)), [1, 2, 3], target) for _ in range(4)]
    step = training.OurStep(tiny, [rows], phase, tiny.theta())
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step.gradient()
    formula = timing.flops(tiny.config, rows=4, tokens=10, positions=12, head=head, backward=True, rank=8)
    assert formula == pytest.approx(counter.get_total_flops(), rel=0.01)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        tiny.model(step.batch.ids, logits=step.batch.at if head else False)
    assert timing.flops(tiny.config, 4, 10, 12, head) == counter.get_total_flops()


def test_both_peers_compute_what_we_compute(tiny):
    for method in training.PHASES:
        assert "same" in training.check_step(tiny, training.set_rows(tiny, 4, 0, (5, 9), 3).icl_train, method)
    assert "same" in training.check_cell(tiny)


def test_disagreement_stops_the_bench():
    with pytest.raises(AssertionError, match="loss: the stacks differ by 1.0e-02"):
        report.agree("loss", 1.01, 1.0, 1e-3)


def test_extrapolation_scales_each_stage_by_its_own_count_and_says_so():
    whole, some = training.Size(), training.Size(sets=1, rates=1, steps=10, rows=50)
    scaled = some.times({"collect": 1.0, "train": 1.0, "evaluate": 1.0}, whole, 0.1)
    assert scaled == {"collect": 5.0, "train": 75.0, "evaluate": 150.0}
    assert (
        some.said(whole) == "extrapolated from 3 of 45 runs, 10 of 50 steps, 50 of 500 rows"
        and whole.said(whole) == "whole"
    )


def test_race_takes_turns_and_reports_median_and_spread():
    turns = []
    times = timing.race({"us": lambda: turns.append("us"), "them": lambda: turns.append("them")}, repeats=3)
    assert turns == ["us", "them"] * 4  # a round to warm up, then three
    assert times["us"].repeats == 3 and times["us"].low <= times["us"].seconds <= times["us"].high


def test_tensors_are_counted_at_their_most():
    def step():
        return torch.ones(10_000_000) + torch.ones(5_000_000).sum()  # 40 MB, 20 MB for a while, 40 MB

    assert timing.allocated(step) == pytest.approx(80e6, rel=0.01)
    assert timing.allocated(lambda: torch.ones(5_000_000).sum()) == pytest.approx(20e6, rel=0.01)


def test_inference_benches_agree_and_name_what_is_extrapolated(tiny):
    found = inference.collect(tiny, rows=2, tokens=8, sample=2, seconds=0)
    assert {"(a) / us", "(b) / us", "tapped / plain"} == found.ratios.keys()
    assert [line.note for line in found.lines if line.stack == "(a)"] == ["extrapolated from 2 of 16 passes"]
    assert inference.generate(tiny, 4, 8, 16, seconds=0).ratios["(a) / us"] > 0
    assert "(b) with a copied cache / us" in inference.icl(tiny, queries=20, shown=3, sample=8, seconds=0).ratios


def test_a_sample_of_prompts_is_padded_as_little_as_all_of_them(tiny):
    prompts = tiny.prompts(500, training.SST2_LENGTHS)
    for rows in (40, 128):
        some = sorted(map(len, training.sample(prompts, rows, "us")))
        assert len(some) == rows
        padded = sum(max(block) * len(block) for block in (some[: rows // 2], some[rows // 2 :]))
        assert sum(some) / padded > 0.75
        assert sum(some) / rows == pytest.approx(sum(map(len, prompts)) / 500, rel=0.1)
    assert training.sample(prompts, 40, "(a)") == prompts[:40] and training.sample(prompts, 500, "us") == prompts
