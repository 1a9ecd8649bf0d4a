"""What a study costs, by formula: against torch's counters, bytes that autograd keeps, and a study's own passes."""

import os
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from ia2mini.models import attention, load
from reference import make_checkpoint, starts
from torch._dynamo.callback import callback_handler
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bench import cost_page
from bench.cost import KERNELS, CellSize, Cost, Pass, flops, lora_size, size_of
from bench.shapes import SHAPES
from ia2mini import METHODS, Grid, draw_episode, load_examples, open_subject, teach
from ia2mini.adapters import LoRA, adapted
from ia2mini.batch import TokenRow, collate
from ia2mini.cli.main import main
from ia2mini.cli.options import compile_and_checkpoint, tell_of_compiling
from ia2mini.engine.options import Options
from ia2mini.generate import Decoding, generate
from ia2mini.labels import Scoring, label_scores
from ia2mini.methods import STARTS_FROM
from ia2mini.prefix import share_prefix
from ia2mini.scale import blocks
from ia2mini.scale.memory import run_bytes
from ia2mini.study.cells import make_cells
from ia2mini.tasks import find_task
from ia2mini.train import Settings, run_losses


@pytest.fixture(autouse=True)
def fused_attention(monkeypatch):
    """What is counted is a GPU's: on a CPU short rows in half precision have no fused kernel."""
    monkeypatch.setattr(attention, "SHORT", 0)


VIEWS = "view _unsafe_view t transpose expand unsqueeze squeeze slice select split split_with_sizes unbind detach "
VIEWS = {
    *VIEWS.split(),
    "permute",
    "alias",
    "as_strided",
    "empty",
    "empty_like",
    "lift_fresh",
    "_local_scalar_dense",
}


def counted(function) -> int:
    """FLOPs that torch's counter sees."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


@pytest.fixture(scope="module", params=["llama", "qwen3", "olmo2"])
def family(request, tmp_path_factory):
    """Models of two and of three layers."""
    folders = {n: tmp_path_factory.mktemp(f"{request.param}{n}") for n in (2, 3)}
    return {
        n: make_checkpoint(folder, request.param, num_hidden_layers=n)
        for n, folder in folders.items()
    }


def test_a_whole_cell_costs_what_torch_counts():
    """Teacher, three methods with their looks, and scoring, on rows of one length: nothing is padded."""
    model, tokenizer = load("tiny")
    length = len(tokenizer.encode(load_examples(find_task("toy-mood"), "train").rows[0].prompt))
    pool, rows = (
        [
            e
            for e in load_examples(find_task("toy-mood"), split).rows
            if len(tokenizer.encode(e.prompt)) == length
        ]
        for split in ("train", "eval")
    )
    rows, labels = rows[:6], tokenizer.label_tokens(rows[0].prompt, find_task("toy-mood").labels)
    episodes, prompts = (
        [draw_episode(pool, 4, number) for number in range(2)],
        [row.prompt for row in rows],
    )
    lora, found, fits = LoRA(model), {}, {}
    taught = []
    found["collect"] = counted(lambda: taught.extend(teach(model, tokenizer, e) for e in episodes))
    settings = Settings(epochs=1, patience=99)
    grid = Grid(model, lora, taught, (1e-3, 1e-2), settings=settings)
    for method in ("sft", "ia2", "ia2-sft"):
        first = [fits[STARTS_FROM[method]]] if method in STARTS_FROM else []
        found[f"train {method}"] = counted(
            lambda method=method, first=first: fits.update({method: METHODS[method](grid, *first)})
        )
        with adapted(model, lora, fits[method].theta[:2]) as student:
            ids = tokenizer.encode_all(prompts)
            found[f"score {method}"] = counted(
                lambda ids=ids: label_scores(student, ids, labels, Scoring(2))
            )
    icl = [share_prefix(model, tokenizer, e.icl, prompts) for e in episodes]
    rest, prefix = len(icl[0][1][0]), icl[0][0].keywords["prefix"].length
    found["score icl"] = counted(lambda: [label_scores(*shared, labels) for shared in icl])
    shown = len(
        tokenizer.encode(episodes[0].train[0].prompt + episodes[0].train[0].answer + "\n\n")
    )
    cell = CellSize(length, 3 * shown, n=4, rows=(6,), sets=2, configs=2, scored=2, epochs=1)
    stages = {name: cost.flops for name, cost in cell.stages(model.config, 4).items()}
    for method in ("sft", "ia2", "ia2-sft"):
        stages[f"train {method}"] += stages.pop(f"look {method}")
        assert stages[f"score {method}"] == pytest.approx(found[f"score {method}"], rel=0.01)
        assert stages[f"train {method}"] == pytest.approx(found[f"train {method}"], rel=0.02)
    # demonstrations are not all of one length
    assert stages["collect"] == pytest.approx(found["collect"], rel=0.03)
    demonstrated = Pass(12, rest, 12, past=prefix)
    assert flops(model.config, demonstrated) == pytest.approx(found["score icl"], rel=0.001)


def test_decoding_costs_what_torch_counts():
    model, tokenizer = load("tiny")
    prompts, tokens = [list(range(10, 20))] * 3, 6
    network = Counting(model)
    with torch.no_grad():
        total = counted(lambda: generate(network, tokenizer, prompts, Decoding(tokens, stop=None)))
    expected = Pass(3, 10, 3).cost(model.config).flops
    for step in range(network.passes - 1):
        expected += flops(model.config, Pass(3, 1, 3, past=10 + step))
    assert total == pytest.approx(expected, rel=0.001) and network.passes > 2
    read = CellSize(10, 0, answer=network.passes).read(3, 10, model.config, 4)
    assert read.flops == pytest.approx(expected, rel=0.01) and read.tokens == 3 * (
        10 + network.passes - 1
    )


class Counting:
    """A model that counts its passes."""

    def __init__(self, model):
        self.func, self.passes = model, 0

    def __call__(self, *arguments, **named):
        self.passes += 1
        return self.func(*arguments, **named)


def step_of(folder, runs: int, phase: str, dtype=torch.bfloat16):
    """A step of `runs` runs on four rows of equal length: model, adapter, first weights, batch, mix."""
    model = load(folder, dtype)[0]
    adapter, depth, D = LoRA(model), model.config.num_hidden_layers, model.config.hidden_size
    rows = [
        TokenRow(list(range(5, 45)), [5] * 8, torch.zeros(depth, 8, D, dtype=dtype))
        for _ in range(4)
    ]
    return (
        model,
        adapter,
        starts(adapter, model, runs),
        collate([rows] * runs),
        {phase: torch.ones(runs)},
    )


def fused() -> bool:
    """Whether attention with grouped heads is one kernel on this CPU; with PyTorch 2.6 it is not."""
    heads = torch.ones(1, 2, 2, 8), torch.ones(1, 1, 2, 8), torch.ones(1, 1, 2, 8)
    with torch.no_grad(), Kernels() as seen:
        F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
    return any("flash" in name for name in seen.names)


FUSED = pytest.mark.skipif(
    "not fused()", reason="this PyTorch computes grouped heads by whole score matrices on a CPU"
)


@FUSED
@pytest.mark.parametrize("phase", ["mse", "ce"])
def test_bytes_kept_for_the_backward_pass(family, phase):
    """What a further run, and a further layer, keeps in bfloat16; nothing as wide as a state is float32 among it."""
    kept = {}
    for layers, runs in ((2, 1), (2, 2), (3, 1)):
        model, adapter, theta, batch, mix = step_of(family[layers], runs, phase)
        theta, seen = theta.requires_grad_(), {}
        own = {
            t.untyped_storage().data_ptr() for t in (*model.parameters(), theta, batch.activations)
        }

        def note(tensor, seen=seen, own=own):
            if tensor.untyped_storage().data_ptr() not in own:
                seen[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with (
            adapted(model, adapter, theta) as student,
            torch.autograd.graph.saved_tensors_hooks(note, lambda t: t),
        ):
            graph = run_losses(student, batch, mix)  # noqa: F841  (held: addresses stay apart)
        kept[layers, runs] = sum(t.untyped_storage().nbytes() for t in seen.values())
        wide = [
            t.shape
            for t in seen.values()
            if t.dtype == torch.float32 and t.numel() >= 47 * 4 * 16 * runs
        ]
        if model.config.model_type != "olmo2":  # what its norms read
            assert not [shape for shape in wide if shape[-1] >= model.config.hidden_size // 2], wide
    shape, tokens = load(family[2])[0].config, 4 * 47
    weights = 4 * 7 * lora_size(shape, 8)
    assert lora_size(shape, 8) == theta.shape[1] * 2 // 3
    expected = run_bytes(shape, tokens, 32, 2, lora_size(shape, 8)) - weights
    # of two layers the first keeps less
    assert kept[2, 2] - kept[2, 1] == pytest.approx(expected, rel=0.2)
    layer = run_bytes(replace(shape, num_hidden_layers=3), tokens, 0, 2, 0) - run_bytes(
        shape, tokens, 0, 2, 0
    )
    assert kept[3, 1] - kept[2, 1] == pytest.approx(layer, rel=0.1)


class Kernels(TorchDispatchMode):
    """Counts operations that compute."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.names[function._schema.name.split("::")[1]] += 1
        return function(*arguments, **named or {})

    @property
    def total(self) -> int:
        return sum(count for name, count in self.names.items() if name not in VIEWS)


@FUSED
def test_kernels_of_a_layer(family):
    counts = {}
    for layers in (2, 3):
        model, adapter, theta, batch, mix = step_of(family[layers], 2, "ce")
        with torch.no_grad(), Kernels() as plain:
            model(batch.ids, logits=batch.at)
        with torch.no_grad(), adapted(model, adapter, theta) as student, Kernels() as forward:
            run_losses(student, batch, mix)
        with adapted(model, adapter, theta.requires_grad_()) as student, Kernels() as both:
            torch.autograd.grad(run_losses(student, batch, mix).sum(), theta)
        counts[layers] = plain.total, forward.total, both.total
    plain, forward, both = (b - a for a, b in zip(counts[2], counts[3]))
    kind = model.config.model_type
    assert KERNELS[kind] == pytest.approx((plain, forward - plain, both - forward), rel=0.06)


def test_a_pass_moves_its_matrices_once_and_more_rows_only_states():
    shape = load("tiny")[0].config
    one, two = (Pass(rows, 10, 1).cost(shape, 2) for rows in (1, 2))
    matrices = sum(
        p.numel() for n, p in load("tiny")[0].named_parameters() if "norm" not in n
    )  # head and table are one
    states = two.bytes - one.bytes
    assert one.bytes - states - 8 * shape.vocab_size == pytest.approx(2 * matrices) and states > 0
    assert Cost(flops=6, bytes=8).seconds(2, 1) == 8 and Cost(flops=6, bytes=8).seconds(2) == 3
    assert Cost(1, 2, 3, 4) + Cost(1, 1, 1, 1) == Cost(2, 3, 4, 5)


def test_a_cell_of_a_study_is_as_large_as_its_rows():
    subject = open_subject("tiny", "cpu")
    options = Options(
        n=(2, 4), methods=("icl", "ia2-sft", "ia2+sft"), rates=(1e-3, 1e-2), eval_rows=50
    )
    two, four = map(size_of, make_cells([find_task("toy-mood")], subject, options))
    pool = load_examples(find_task("toy-mood"), "train").rows
    prompts = subject.tokenizer.encode_all(
        [e.prompt for i in range(5) for e in draw_episode(pool, 4, i).train]
    )
    assert four.query == pytest.approx(sum(map(len, prompts)) / 20)
    assert four.shown == pytest.approx(3 * (four.query + 2))  # a label and what stands between rows
    assert four.trained == ("ia2", "ia2-sft", "ia2+sft") and four.rows == (50, 50)
    # a run for each rate and β, the best is scored
    assert (four.sets, four.configs, four.scored) == (5, 8, 5)
    whole = [
        sum(size.stages(subject.model.config, 4).values(), Cost()).seconds(1e9)
        for size in (two, four)
    ]
    assert whole[0] < whole[1]
    (every,) = make_cells([find_task("toy-mood")], subject, replace(options, n=(4,), select="both"))
    assert size_of(every) == replace(four, scored=40)


def test_the_page_is_what_the_script_makes():
    assert cost_page.PAGE.read_text() == cost_page.page(), "python -m bench cost"


def test_the_paper_s_largest_cell_by_hand():
    """A step of 15 runs × 4 rows × 26 tokens on Qwen3-4B: forward and the gradient of inputs, 2 FLOPs a weight each."""
    shape, tokens = SHAPES["qwen3-4b"], 15 * 4 * 26
    weights = 36 * (2560 * (4096 + 2 * 1024) + 4096 * 2560 + 3 * 2560 * 9728)
    assert flops(shape, Pass(60, 26, 60, False, True, 8)) == pytest.approx(
        4 * weights * tokens, rel=0.05
    )
    (line,) = [
        line
        for line in cost_page.table("qwen3-4b", "", cost_page.LABELLED)
        if "| train ia2 |" in line
    ]
    assert float(line.split("|")[2]) == pytest.approx(
        50 * 4 * weights * 15 * 4 * 16 / 1e12, rel=0.05
    )


def test_compiling_is_said_and_kept_where_it_lasts(monkeypatch, capsys):
    """Blocks are compiled where that is asked for; the compiler's results are kept."""
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    CliRunner().invoke(main, ["tasks"])
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/somewhere/ia2mini/compiled"
    model = load("tiny")[0]
    asked = []
    monkeypatch.setattr(blocks, "compile_blocks", asked.append)
    compile_and_checkpoint(model, None, False)
    assert not asked, "on a CPU nothing is compiled unless asked for"
    monkeypatch.undo()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/somewhere/ia2mini/compiled")
    monkeypatch.setattr(blocks, "compile_blocks", partial(blocks.compile_blocks, backend="eager"))
    monkeypatch.setattr(callback_handler, "start_callbacks", [])
    tell_of_compiling.cache_clear()
    compile_and_checkpoint(model, True, False)
    assert not capsys.readouterr().err
    for length in (3, 4):
        model(torch.arange(length)[None], logits=False)
    assert (
        capsys.readouterr().err
        == "compiling (minutes at first; kept in /somewhere/ia2mini/compiled)\n"
    )


def test_a_phase_costs_by_what_it_is_whatever_it_began_with():
    config = SHAPES["qwen3-4b"]
    names = ("sft", "ia2", "hidden", "soft", "ridge", "soft-sft", "ridge-sft")
    stages = CellSize(16, 64, trained=names, methods=names).stages(config)
    cost = {name: stages[f"train {name}"].flops for name in names}
    assert cost["hidden"] == cost["ia2"] < cost["soft"] == cost["sft"]  # activations need no head
    assert cost["soft-sft"] == cost["ridge-sft"] == cost["sft"]
    assert 0 < cost["ridge"] < cost["ia2"] / 100 and "look ridge" not in stages
