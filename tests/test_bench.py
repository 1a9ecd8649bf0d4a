"""bench: the FLOP formula against torch's own counter, the peers against us, and what is extrapolated or said."""

import errno
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench import inference, report, timing, training  # noqa: E402
from bench.__main__ import main  # noqa: E402
from bench.cost import Pass, flops  # noqa: E402
from bench.shapes import stand  # noqa: E402
from bench.where import REST, by_kind, kind_of, where  # noqa: E402
from ia2mini.batch import TokenRow  # noqa: E402
from ia2mini.scale import graphs  # noqa: E402


@pytest.fixture(scope="module")
def tiny():
    return stand("tiny", layers=2)


@pytest.mark.parametrize("method", ["ia2", "sft"])
def test_flops_formula_matches_torch_counter(tiny, method):
    phase, head = training.PHASES[method][0], method == "sft"
    target = torch.zeros(2, 3, tiny.config.hidden_size)
    rows = [TokenRow(list(range(20, 28)), [1, 2, 3], target) for _ in range(4)]
    step = training.OurStep(tiny, [rows], phase, tiny.theta())
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step.gradient()
    formula = flops(tiny.config, Pass(4, 10, 12, head, backward=True, rank=8))
    assert formula == pytest.approx(counter.get_total_flops(), rel=0.01)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        tiny.model(step.batch.ids, logits=step.batch.at if head else False)
    assert flops(tiny.config, Pass(4, 10, 12, head)) == counter.get_total_flops()


def test_where_counts_every_operation_once(tiny):
    """Against the profiler's own sum of the same operations."""
    result = where(tiny, runs=2, n=2, tokens=8, steps=1, warm=1)
    for method in training.PHASES:
        shares = {}
        for line in result.lines:
            if line.what == method:
                shares[line.stack] = line.rates["% of the step"]
        assert sum(shares.values()) == pytest.approx(100)
        assert shares["matrix products with weights"] > 0 and shares["elementwise"] > 0
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        weight = torch.randn(30, 30)
        (weight @ weight).softmax(-1).sum()
    operations = profiled.key_averages()
    every = sum(operation.self_cpu_time_total for operation in operations) / 1e6
    assert sum(by_kind(operations).values()) == pytest.approx(every)


@pytest.mark.parametrize(
    "operation, kind",
    [
        ("aten::mm", "matrix products with weights"),
        ("aten::mul_", "elementwise"),
        ("aten::_softmax_backward_data", "softmax and cross-entropy"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "fused attention"),
        ("aten::view", REST),
        ("mm", REST),
    ],
)
def test_the_kind_of_an_operation(operation, kind):
    assert kind_of(operation) == kind


def test_both_peers_compute_what_we_compute(tiny):
    for method in training.PHASES:
        assert "same" in training.check_step(
            tiny, training.taught_set(tiny, 4, 0, (5, 9), 3).icl_train, method
        )
    assert "same" in training.check_cell(tiny)


def test_both_sides_score_the_chosen_rates_runs_or_all_of_them(tiny, monkeypatch):
    # their dev losses differ more than the stacks do
    monkeypatch.setattr(training, "RATES", (1e-5, 3e-2))
    prompts = tiny.prompts(4, training.SST2_LENGTHS)
    found = {}
    for select, runs in (("dev", 2), ("eval", 4)):
        size = training.Size(2, 2, 4, 4, select=select)
        sides = [training.our_cell(tiny, size, prompts)]
        sides += [training.peer_cell(kind(tiny), size, prompts) for kind in training.PEERS.values()]
        for _, picked, tops in sides:
            assert picked == sides[0][1] and tops.shape == (3, runs, 4)
            torch.testing.assert_close(tops, sides[0][2], atol=1e-3, rtol=1e-3)
        found[select] = sides[0][1:]
    assert (
        all(some in ([0, 2], [1, 3]) for some in found["dev"][0])
        and found["eval"][0] == [[0, 1, 2, 3]] * 3
    )
    chosen = torch.stack([tops[some] for some, tops in zip(found["dev"][0], found["eval"][1])])
    torch.testing.assert_close(chosen, found["dev"][1])
    # means over sets
    assert training.Size(3, 2).chosen(torch.tensor([1.0, 0.9, 1.0, 0.9, 1.0, 1.3])) == [0, 2, 4]


def test_a_cell_says_on_both_sides_which_runs_it_scores(tiny):
    for select, said in (
        ("dev", "scores the chosen rate's runs, 3 of 6"),
        ("eval", "scores every run, 6 of 6"),
    ):
        whole = training.Size(1, 2, 2, 4, select=select)
        part = training.Size(1, 1, 2, 4, select=select)
        found = training.cell(tiny, whole, {"(a)": part, "(b)": part}, repeats=1)
        notes = {line.stack: line.note for line in found.lines if line.what == "whole cell"}
        assert notes.keys() == {"us", "(a)", "(b)"} and all(
            note.startswith(said) for note in notes.values()
        )
        assert notes["us"].endswith("; whole") and "extrapolated from 3 of 6 runs" in notes["(a)"]


def test_options_of_the_command():
    shown = CliRunner().invoke(main, ["cell", "--help"])
    assert shown.exit_code == 0 and "--select" in shown.stdout and "dev" in shown.stdout
    for name in set(main.commands) - {
        "cell",
        "effect",
        "causes",
        "layers",
        "choice",
        "race",
        "stronger",
        "bayes",
    }:
        shown = CliRunner().invoke(main, [name, "--help"])
        assert shown.exit_code == 0 and "--select" not in shown.stdout
    wrong = CliRunner().invoke(main, ["--shape", "tiny", "step"])
    assert (
        wrong.exit_code == 2
        and "options come after the command: python -m bench step" in wrong.stderr
    )


def test_disagreement_stops_the_bench():
    with pytest.raises(AssertionError, match="loss: the stacks differ by 1.0e-02"):
        report.agree("loss", 1.01, 1.0, 1e-3)


def test_extrapolation_scales_each_stage_by_its_own_count_and_says_so():
    whole, some = training.Size(), training.Size(sets=1, rates=1, steps=10, rows=50)
    once = {"collect": 1.0, "train": 1.0, "evaluate": 1.0}
    # a run a set is scored
    assert some.times(once, whole, 0.1) == {"collect": 5.0, "train": 75.0, "evaluate": 50.0}
    counts = "3 of 45 runs, 3 of 15 scored runs, 10 of 50 steps, 50 of 500 rows"
    assert some.said(whole) == f"extrapolated from {counts}" and whole.said(whole) == "whole"
    every, some = replace(whole, select="eval"), replace(some, select="eval")
    assert some.times(once, every, 0.1) == {"collect": 5.0, "train": 75.0, "evaluate": 150.0}


def test_race_takes_turns_and_reports_median_and_spread():
    turns = []
    times = timing.race(
        {"us": lambda: turns.append("us"), "them": lambda: turns.append("them")}, repeats=3
    )
    assert turns == ["us", "them"] * 4  # a round to warm up, then three
    assert times["us"].repeats == 3 and times["us"].low <= times["us"].seconds <= times["us"].high


def test_recordings_are_made_before_anything_is_timed(monkeypatch):
    """A stand-in recorder whose recording, as the calls before it, is slow: only replays are timed, and it is said."""

    class Recorder:
        def __init__(self, device):
            pass

        def __call__(self, function):
            calls.append("recording")
            return lambda: calls.append("replay"), None

    monkeypatch.setitem(graphs.RECORDERS, "cpu", Recorder)
    calls, timed, turns = [], [], []
    step = graphs.CapturedStep(lambda: calls.append("eager"), torch.device("cpu"))
    plain = timing.Timing.of
    monkeypatch.setattr(
        timing.Timing, "of", lambda values: timed.append(len(values)) or plain(values)
    )
    timing.recorded()
    timing.race({"us": step, "them": lambda: turns.append(1)}, repeats=3)
    assert calls[: graphs.OFTEN + 1] == ["eager"] * graphs.OFTEN + ["recording"]
    assert (
        timed == [3, 3]
        and calls[-3:] == ["replay"] * 3
        and "eager" not in calls[graphs.OFTEN + 1 :]
    )
    assert len(turns) == graphs.OFTEN + 1 + 1 + 3, "the others warm up as long"
    rounds = graphs.OFTEN + 1 + 1 + 3
    said = f"CUDA graphs: recorded 1 ×, {rounds - graphs.OFTEN} of {rounds} calls replayed, warming up included"
    assert timing.recorded() == said and timing.recorded() == ""


def test_tensors_are_counted_at_their_most():
    def step():
        # 40 MB, 20 MB for a while, 40 MB
        return torch.ones(10_000_000) + torch.ones(5_000_000).sum()

    assert timing.allocated(step) == pytest.approx(80e6, rel=0.01)
    assert timing.allocated(lambda: torch.ones(5_000_000).sum()) == pytest.approx(20e6, rel=0.01)


def test_inference_benches_agree_and_name_what_is_extrapolated(tiny):
    found = inference.collect(tiny, rows=2, tokens=8, sample=2, seconds=0)
    assert {"(a) / us", "(b) / us", "tapped / plain"} == found.ratios.keys()
    assert [line.note for line in found.lines if line.stack == "(a)"] == [
        "extrapolated from 2 of 16 passes"
    ]
    assert inference.generate(tiny, 4, 8, 16, seconds=0).ratios["(a) / us"] > 0
    assert (
        "(b) with a copied cache / us"
        in inference.icl(tiny, queries=20, shown=3, sample=8, seconds=0).ratios
    )


def test_a_sample_of_prompts_is_padded_as_little_as_all_of_them(tiny):
    prompts = tiny.prompts(500, training.SST2_LENGTHS)
    for rows in (40, 128):
        some = sorted(map(len, training.sample(prompts, rows, "us")))
        assert len(some) == rows
        padded = sum(max(block) * len(block) for block in (some[: rows // 2], some[rows // 2 :]))
        assert sum(some) / padded > 0.75
        assert sum(some) / rows == pytest.approx(sum(map(len, prompts)) / 500, rel=0.1)
    assert (
        training.sample(prompts, 40, "(a)") == prompts[:40]
        and training.sample(prompts, 500, "us") == prompts
    )


def test_the_figure_of_growth_names_every_stage_at_its_line(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from bench import scale

    monkeypatch.setattr(scale, "RESULTS", tmp_path / "bench" / "results")
    points = {1: {"collect": 0.1, "train": 0.5}, 4: {"collect": 0.2, "train": 2.0}}
    said = scale.plot({"layers": points}, "tiny", "cpu")
    assert said == "figure: bench/results/scale-tiny-cpu.png"
    assert (tmp_path / "bench" / "results" / "scale-tiny-cpu.png").stat().st_size > 5000
    axis = scale.new_figure().subplots()
    scale.plot_sweep(axis, points)
    assert [text.get_text() for text in axis.texts] == ["collect", "train", "all"]
    assert [list(line.get_ydata()) for line in axis.lines[2:]] == [
        pytest.approx([0.6, 2.2]),
        pytest.approx([0.55, 2.2]),
    ]


def test_a_pipe_that_nobody_reads_ends_all_benches_at_once(monkeypatch):
    """As `python -m bench | head -1`: no traceback, and no further bench is measured for nobody."""
    tried = []

    def run(name, *about):
        tried.append(name)
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("bench.__main__.run", run)
    result = CliRunner().invoke(main, [])
    assert tried == ["step"] and result.exit_code == 1 and result.output == ""
