"""The whole path on a pretended GPU: nothing mixes devices, and Python waits for the GPU no more than it must."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from commands import invoke
from ia2mini.models.checkpoint import TINY
from pretend_gpu import GpuTensor, pretended_gpu
from reference import relative, starts
from tape import Tape

from bench.cost_page import WAITS
from ia2mini import Grid, LoRA, draw_episode, load, score, teach
from ia2mini.adapters import IA3
from ia2mini.batch import TokenRow
from ia2mini.engine.experiment import make_trainer
from ia2mini.engine.peft import save_adapter
from ia2mini.fitting.answers import answer_scores
from ia2mini.fitting.probe import last_states
from ia2mini.generate import Decoding, generate
from ia2mini.labels import Scoring, label_scores
from ia2mini.methods import METHODS, STARTS_FROM
from ia2mini.scale.decode import fast_decoding
from ia2mini.scale.graphs import recorded
from ia2mini.scale.pack import in_batches
from ia2mini.tasks import find_task, load_examples, world
from ia2mini.teacher import TeacherSettings
from ia2mini.train import Hooks, Settings, train

TRAINED = ("sft", "ia2", "ia2-sft", "soft", "hidden", "ridge")
ADAPTERS = {"lora": LoRA, "ia3": IA3}
SHORT = Settings(batch_size=2, epochs=2, patience=2)
LABELS = ("0", "1")
NEAR_TIE = 0.15  # two steps of bfloat16 between logits of 8 to 16


@pytest.fixture
def gpu():
    with pretended_gpu() as gpu:
        yield gpu


def set_of_rows(model, tokenizer, seed: int):
    rows = load_examples(find_task("toy-mood"), "train").rows
    return teach(
        model, tokenizer, draw_episode(rows, 4, seed), TeacherSettings(soft_k=5, residual=True)
    )


def fast(device: str, after_evaluation=lambda state: False) -> dict:
    """What `run` and `fit` put around the loop."""
    record = partial(recorded, device=torch.device(device))
    return {"hooks": Hooks(in_batches, record, after_evaluation), "trainer": make_trainer(None)}


def path(
    device: str, dtype: torch.dtype, trained=TRAINED, kind: str = "lora", around=fast
) -> dict[str, torch.Tensor]:
    """Load, teach, train by every method, score and generate: what each step gives, on the CPU."""
    model, tokenizer = load("tiny", dtype, device)
    rows = load_examples(find_task("toy-mood"), "eval").rows[:8]
    sets = [set_of_rows(model, tokenizer, seed) for seed in range(2)]
    found = {"targets": sets[0].icl_train[0].activations.cpu()}
    grid = Grid(model, ADAPTERS[kind](model), sets, [1e-2, 1e-3], settings=SHORT, **around(device))
    fits = {}
    for method in trained:
        first = [fits[STARTS_FROM[method]]] if method in STARTS_FROM else []
        fitted = fits[method] = METHODS[method](grid, *first)
        found[method] = fitted.theta.cpu()
        found[f"{method}, dev loss"] = fitted.dev_loss
        scores = score(model, tokenizer, rows, LABELS, grid.adapter, fitted.theta)
        found[f"{method}, scores"] = torch.tensor([run["nll"] for run in scores])
    demonstrations = tuple(load_examples(find_task("toy-mood"), "train").rows[:4])
    scores = score(model, tokenizer, rows, LABELS, demonstrations=demonstrations)
    found["icl, scores"] = torch.tensor([scores[0]["nll"]])
    decoding = Decoding(10, stop=None, hooks=fast_decoding(torch.device(device), 10))
    found["generated"] = torch.tensor(generate(model, tokenizer, prompts_of(tokenizer), decoding))
    return found


def prompts_of(tokenizer) -> list[list[int]]:
    """Three prompts that texts are generated after."""
    rows = load_examples(find_task("toy-mood"), "eval").rows[:3]
    return tokenizer.encode_all([row.prompt for row in rows])


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], allowed: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (
            not isinstance(found[name], GpuTensor)
            and relative(found[name].float(), value.float()) < allowed
        ), name


@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_the_path_gives_what_it_gives_on_a_cpu(dtype, allowed):
    """Attention under a mask is computed in another order there, and bfloat16 rounds."""
    expected = path("cpu", dtype)
    replays = Tape.replays
    with pretended_gpu() as gpu:
        found = path("cuda", dtype)
    if dtype == torch.bfloat16:
        same_texts(found.pop("generated"), expected.pop("generated"))
    same(found, expected, allowed)
    assert gpu.sent and not gpu.unfused and Tape.replays > replays


def same_texts(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Tokens [prompts, tokens] of bfloat16: the same up to the first near tie, which rounding decides."""
    model, tokenizer = load("tiny", torch.bfloat16)
    assert found.shape == expected.shape
    for prompt, mine, theirs in zip(prompts_of(tokenizer), found.tolist(), expected.tolist()):
        if mine == theirs:
            continue
        first = [one == other for one, other in zip(mine, theirs)].index(False)
        logits = model(torch.tensor([prompt + theirs[:first]]))[0, -1].float()
        gap = logits[theirs[first]] - logits[mine[first]]
        assert gap.abs() < NEAR_TIE, (prompt, mine, theirs, gap)


def plain(device: str) -> dict:
    return {"trainer": train}


@pytest.mark.parametrize("kind, around", [("ia3", fast), ("lora", plain)])
def test_so_do_the_other_adapter_and_the_plain_loop(kind, around):
    expected = path("cpu", torch.float32, ("ia2",), kind, around)
    with pretended_gpu():
        found = path("cuda", torch.float32, ("ia2",), kind, around)
    same(found, expected, 1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_so_do_the_commands(tmp_path, dtype, gpu):
    """From rows to an adapter, its answers, a merged checkpoint and a text."""
    lines = [
        f'"{row["text"]}",{row["label"]}\n' for row in world.rows("toy-mood-remap", "train")[4:20]
    ]
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(lines))
    on = ["--device", "cuda", "--dtype", dtype]
    fitting = [
        "--methods",
        "sft,ia2",
        "--rates",
        "1e-2",
        "--epochs",
        "2",
        "--folds",
        "2",
        "--model",
        "tiny",
    ]
    commands = [
        ["fit", tmp_path / "rows.csv", "--out", tmp_path / "fitted", *fitting],
        ["predict", tmp_path / "fitted", tmp_path / "rows.csv"],
        ["predict", tmp_path / "fitted", tmp_path / "rows.csv", "--icl"],
        ["generate", "--model", "tiny", "--prompt", "Text:a", "--max-tokens", "4"],
        [
            "run",
            "toy-mood",
            "--n",
            "2",
            "--sets",
            "1",
            "--epochs",
            "2",
            "--eval-rows",
            "4",
            "--methods",
            "icl,ia2",
            "--figures=",
            "--out",
            tmp_path / "run",
        ],
        [
            "predict",
            tmp_path / "peft",
            tmp_path / "rows.csv",
            "--template",
            "Text:{text}\nLabel:",
            "--labels",
            "a,b",
        ],
        ["merge", tmp_path / "peft", "--out", tmp_path / "merged"],
    ]
    model, tokenizer = load("tiny", torch.float32, "cuda")
    adapter = LoRA(model)
    theta = starts(adapter, model, 1).to("cuda")
    save_adapter(adapter, theta[0], tmp_path / "peft", str(TINY))
    for command in commands:
        found = invoke(*command, *on)
        assert found.exit_code == 0, found.output


def test_an_evaluation_of_the_dev_loss_waits_once_and_a_step_never(gpu):
    """Also where runs leave on the way: then their batch is made anew."""
    model, tokenizer = load("tiny", torch.bfloat16, "cuda")
    sets = [set_of_rows(model, tokenizer, seed) for seed in range(3)]
    settings, waited, live = Settings(batch_size=2, epochs=40, patience=1), [], []

    def watch(state):
        waited.append(sum(gpu.waits.values()))
        live.append(len(state.index))
        return False

    grid = Grid(
        model, LoRA(model), sets, [1e-1, 1e-2, 1e-4], settings=settings, **fast("cuda", watch)
    )
    METHODS["ia2"](grid)
    assert len(set(live)) > 2, "runs leave at different looks"
    each = np.diff(waited)
    assert WAITS["a training step"] == 0
    assert len(each) > 5 and set(each) == {WAITS["an evaluation of the dev loss"]}


def test_a_token_waits_once(gpu):
    """Recorded or not, observed or not; rows end on the way."""
    model, tokenizer = load("tiny", torch.bfloat16, "cuda")
    rows = load_examples(find_task("toy-mood"), "train").rows[:9]
    prompts = tokenizer.encode_all([row.prompt for row in rows])
    tokenizer.eos_ids = tuple(range(0, 449, 9))  # many ways to end
    for tokens in (6, 12):  # the shorter one is not recorded
        waited, live = [], []

        def observer(going, *about, waited=waited, live=live):
            waited.append(sum(gpu.waits.values()))
            live.append(len(going))

        decoding = Decoding(tokens, stop=None, hooks=fast_decoding(torch.device("cuda"), tokens))
        generate(model, tokenizer, prompts, decoding, observer=observer)
        assert len(set(live)) > 1
        assert set(np.diff(waited)) == {WAITS["a generated token, of all rows together"]}


def test_scoring_waits_at_its_end_whatever_the_number_of_rows(gpu):
    model, tokenizer = load("tiny", torch.bfloat16, "cuda")
    rows = load_examples(find_task("toy-mood"), "eval").rows[:12]
    prompts = tokenizer.encode_all([row.prompt for row in rows])
    labels = tokenizer.label_tokens(rows[0].prompt, LABELS)
    ends = tuple(label[0] for label in labels)
    answers = [TokenRow(prompt, [ends[row.label], ends[0]]) for prompt, row in zip(prompts, rows)]
    for budget in (40, 4096):  # many passes, or one
        scored = Scoring(budget=budget, ends=ends)
        for what, work in {
            "labels scored": lambda scored=scored: label_scores(model, prompts, labels, scored),
            "answers scored": lambda budget=budget: answer_scores(
                model, answers, budget=budget, ends=ends
            ),
            "last states read": lambda budget=budget: last_states(model, prompts, budget),
        }.items():
            gpu.waits.clear()
            work()
            expected = WAITS[f"{what}, whatever the number of rows"]
            assert sum(gpu.waits.values()) == expected, (what, gpu.waits)


def test_the_pretended_gpu_refuses_what_a_gpu_refuses(gpu):
    here, there = torch.ones(3), torch.ones(3, device="cuda")
    assert there.is_cuda and there.device == torch.device("cuda:0") and (there + 1).is_cuda
    for mixed in (
        lambda: here + there,
        lambda: there.add_(here),
        lambda: torch.cat([here, there]),
        lambda: here @ there,
    ):
        with pytest.raises(RuntimeError, match="same device"):
            mixed()
    with pytest.raises(RuntimeError, match="same device"):
        here[torch.tensor([0], device="cuda")]
    for arrays in (there.numpy, lambda: np.asarray(there)):
        with pytest.raises(TypeError, match="numpy"):
            arrays()
    assert not (there + torch.tensor(2.0)).cpu().is_cuda, "a number of the CPU may be mixed in"
    x = there.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((x * there).square().sum(), x)
    assert gradient.is_cuda and gradient.tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    "kind, wait",
    [
        ("item", lambda x: x.sum().item()),
        ("item", lambda x: bool(x.any())),
        ("item", lambda x: float(x[0])),
        ("copy to the CPU", lambda x: x.cpu()),
        ("copy to the CPU", lambda x: x.to("cpu", torch.float64)),
        ("copy to the CPU", lambda x: x.tolist()),
        ("copy to the GPU", lambda x: torch.ones(2).to("cuda")),
        ("copy to the GPU", lambda x: torch.ones(2).cuda()),
        ("copy to the GPU", lambda x: torch.ones(2).to(x)),
        ("copy to the GPU", lambda x: torch.tensor([1], device="cuda")),
        ("copy to the GPU", lambda x: torch.as_tensor([1], device="cuda")),
        ("copy to the GPU", lambda x: torch.ones(2).pin_memory().to("cuda")),
        ("copy between devices", lambda x: torch.zeros(3).copy_(x)),
        ("copy between devices", lambda x: x.copy_(torch.zeros(3))),
        ("index by a mask", lambda x: x[x > 0]),
        ("index by a mask", lambda x: x.index_put_((x > 0,), torch.zeros((), device="cuda"))),
        ("index on the CPU", lambda x: x[torch.tensor([0, 1])]),
        ("index on the CPU", lambda x: x[[0, 2]]),
        ("nonzero", lambda x: x.nonzero()),
        ("nonzero", lambda x: torch.where(x > 0)),
        ("equal", lambda x: torch.equal(x, x)),
        ("repeat_interleave", lambda x: x.repeat_interleave(x.long())),
        ("synchronize", lambda x: torch.cuda.synchronize()),
    ],
)
def test_what_waits_for_the_gpu_is_counted_and_refused_in_a_recording(gpu, kind, wait):
    x = torch.ones(3, device="cuda")
    gpu.waits.clear()
    wait(x)
    assert [name for name, _ in gpu.waits] == [kind]
    gpu.recording = True
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        wait(x)
    gpu.recording = False


def test_what_does_not_wait_is_not_counted(gpu):
    x = torch.ones(3, 3, device="cuda")
    at = torch.ones(2).pin_memory().to("cuda", non_blocking=True)
    x[at.long()].sum().add_(1).argmax(), x.to(torch.bfloat16) @ x.bfloat16(), F.softmax(x, -1)
    assert not gpu.waits and len(gpu.sent) == 1
