"""`run --loss FILE.py`: a loss of one's own beside the built-in ones, and with their numbers where it is a copy."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from mistakes import refused
from safetensors.torch import load_file

from ia2mini import open_subject
from ia2mini.batch import TokenRow, collate
from ia2mini.cli.main import main
from ia2mini.engine.options import METHOD_NAMES, Options
from ia2mini.losses import own_loss, per_run
from ia2mini.methods import METHODS, STARTS_FROM
from ia2mini.report.join import join
from ia2mini.scale.pack import pack
from ia2mini.study.study import compare
from ia2mini.tasks import find_task

COPIES = '''
from ia2mini import Taps
from ia2mini.losses import activation_mse, per_run


def copied(student, batch):
    taps = Taps(batch.at)
    student(batch.ids, taps=taps, logits=False)
    return per_run(activation_mse(taps.each(), batch.activations), batch.weights)


def of_states(student, batch):
    taps = Taps(batch.at, None, True)
    student(batch.ids, taps=taps, logits=False)
    return per_run(activation_mse(taps.each(), batch.states), batch.weights)


def plain_kl(student, batch):
    """Against `torch.nn.functional`, through all logits."""
    import torch.nn.functional as F

    logits = student(batch.ids, logits=batch.at).float()
    found = logits.log_softmax(-1).gather(1, batch.soft_ids)
    teacher = batch.soft.float().log_softmax(-1)
    each = F.kl_div(found, teacher, reduction="none", log_target=True).sum(-1)
    return per_run(each, batch.weights)
'''
BUILT_IN = {"copied": "ia2", "of_states": "hidden", "plain_kl": "soft"}
SMALL = Options(n=(4,), sets=2, epochs=4, eval_rows=12, rates=(1e-3, 1e-2), methods=("sft",))
MOOD = find_task("toy-mood")


@pytest.fixture(scope="module")
def subject():
    torch.set_num_threads(1)
    return open_subject("tiny", "cpu")


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("losses") / "losses.py"
    path.write_text(COPIES)
    return path


@pytest.fixture(scope="module")
def studied(subject, file, tmp_path_factory):
    """The copies beside what they copy."""
    before = dict(METHODS), dict(STARTS_FROM)
    built_in = tuple(name for first in BUILT_IN.values() for name in (first, f"{first}-sft"))
    options = replace(SMALL, methods=built_in, loss=tuple(f"{file}:{name}" for name in BUILT_IN))
    found = compare([MOOD], subject, options, tmp_path_factory.mktemp("runs"))
    assert (METHODS, STARTS_FROM) == before
    return found


def of_method(records: list[dict], method: str) -> list[dict]:
    return [{k: v for k, v in r.items() if k != "method"} for r in records if r["method"] == method]


@pytest.mark.parametrize("own", ["copied", "of_states"])
@pytest.mark.parametrize("then", ["", "-sft"])
def test_a_copy_of_a_built_in_loss_gives_its_numbers_bit_for_bit(own, then, studied):
    document, folder = studied
    ours = load_file(folder / f"toy-mood-n4/fit-{own}{then}.safetensors")
    theirs = load_file(folder / f"toy-mood-n4/fit-{BUILT_IN[own]}{then}.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for kind in ("training", "runs", "cells"):
        mine = of_method(document[kind], own + then)
        assert mine and mine == of_method(document[kind], BUILT_IN[own] + then)


def test_a_loss_on_the_teachers_distribution_equals_soft_labels(studied):
    document, _ = studied
    ours = [run["dev_loss"] for run in of_method(document["training"], "plain_kl")]
    theirs = [run["dev_loss"] for run in of_method(document["training"], "soft")]
    assert ours == pytest.approx(theirs, rel=1e-3)


@torch.no_grad()
def test_rows_that_share_a_line_are_kept_apart(subject):
    """The loss says nothing of packing, and gives the same number for packed rows as for padded ones."""

    def likelihood(student, batch):
        logits = student(batch.ids, logits=batch.at)
        return per_run(F.cross_entropy(logits, batch.targets, reduction="none"), batch.weights)

    rows = [TokenRow(list(range(10, 10 + length)), [5, 6]) for length in (20, 3, 4)]
    padded = collate([rows, rows[::-1]])
    packed = pack(padded)
    assert packed.packed is not None
    wanted = own_loss(likelihood, subject.model, padded)
    found = own_loss(likelihood, subject.model, packed)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def typed(*words) -> tuple[int, str, str]:
    done = CliRunner().invoke(main, ["run", "toy-mood", *map(str, words)])
    return done.exit_code, done.stdout, done.stderr


FEW = "--sets 1 --eval-rows 4 --epochs 1 --rates 1e-3 --n 2 --json --figures".split() + ["svg"]
OWN_LOSS = Path(__file__).parents[1] / "examples" / "own_loss.py"


def test_the_example_stands_beside_the_others(tmp_path):
    code, printed, said = typed(*FEW, "--loss", OWN_LOSS, "--out", tmp_path)
    assert code == 0, said
    document = json.loads(printed.splitlines()[-1])
    methods = {cell["method"] for cell in document["cells"]}
    assert methods == {"base", "icl", "sft", "ia2", "ia2-sft", "huber", "huber-sft"}
    (folder,) = tmp_path.iterdir()
    shown = (folder / "report.html").read_text(), printed
    assert all("huber→SFT" in text for text in shown) and list(folder.glob("methods.svg"))
    assert all((folder / name).is_dir() for name in document["adapters"] if "huber-sft" in name)


def test_methods_name_what_is_trained(tmp_path):
    given = ["--methods", "icl,huber-sft", "--loss", OWN_LOSS, "--out", tmp_path]
    code, printed, said = typed(*FEW, *given)
    assert code == 0, said
    cells = json.loads(printed.splitlines()[-1])["cells"]
    assert {cell["method"] for cell in cells} == {"icl", "huber-sft"}


def test_the_files_content_is_what_a_run_belongs_to(subject, file, tmp_path, monkeypatch):
    options = replace(SMALL, sets=1, epochs=1, rates=(1e-3,), eval_rows=4)
    _, plain = compare([MOOD], subject, options, tmp_path)
    _, first = compare([MOOD], subject, replace(options, loss=(f"{file}:copied",)), tmp_path)
    other = tmp_path / "other.py"
    shutil.copy(file, other)
    with monkeypatch.context() as patched:
        patched.setattr("ia2mini.engine.experiment.teach_all", None)  # nothing is taught again
        _, again = compare([MOOD], subject, replace(options, loss=(f"{other}:copied",)), tmp_path)
    other.write_text(
        COPIES.replace("(batch.at)", "(batch.at, [0])", 1).replace(
            "batch.activations", "batch.activations[:1]", 1
        )
    )
    _, changed = compare([MOOD], subject, replace(options, loss=(f"{other}:copied",)), tmp_path)
    assert first == again and len({plain, first, changed}) == 3
    joined = join([plain, first])
    assert {cell["method"] for cell in joined["cells"]} == {"sft", "copied", "copied-sft"}
    refused(
        lambda: join([first, changed]),
        str(changed),
        "loss of copied = ",
        "do not belong together; leave one out",
    )


CALL = "def own(student, batch):\n    found = student(batch.ids, logits=batch.at)\n    return "
FILES = {
    "print(1": ["line 1: SyntaxError"],
    "import math\nimport nothing_of_this_name\n": ["line 2: ModuleNotFoundError"],
    "raise SystemExit(0)": ["line 1: SystemExit"],
    "own = 3\n": ["FILE:NAME", "(none)"],
    "def one(): pass\ndef two(): pass\n": ["FILE:NAME", "(one, two)"],
    "def sft(student, batch): pass\n": ["a method sft is there already"],
    "def IA2(student, batch): pass\n": ["a method IA2 is there already"],
    CALL + "found.mean()\n": ["own returned ()", "shape (2,)"],
    CALL + "3.0\n": ["own returned float", "shape (2,)"],
    CALL + "found[:, 0]\n": ["own returned (8,)", "shape (2,)"],
    CALL + "found.detach()[:2, 0]\n": ["own does not depend on what `student` computes"],
    CALL + "found.nothing\n": ["line 3: AttributeError", "nothing"],
}


@pytest.mark.parametrize("source", FILES)
def test_a_mistake_is_one_line(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "FILE"
    path = path.with_suffix(".py")
    path.write_text(source)
    code, _, said = typed("--rates", "1e-3,1e-2", "--sets", 1, "--loss", path)
    line = said.strip().splitlines()[-1].replace(str(path), "FILE")
    assert code == 2 and line.startswith("ia2mini: "), said
    assert all(text in line for text in FILES[source]), line
    assert not list(tmp_path.rglob("results.json"))


def test_further_mistakes_are_one_line_before_any_work(file, tmp_path):
    out = tmp_path / "runs"
    twin = shutil.copy(file, tmp_path / "twin.py")
    for given, mentioned in (
        (f"{tmp_path}/absent.py", "no such file"),
        ("loss.txt", "give a Python file"),
        (f"{file}:absent", "copied, of_states, plain_kl"),
        (f"{file}:copied,{twin}:copied", "a method copied is there already"),
    ):
        code, _, said = typed("--loss", given, "--out", out)
        assert code == 2 and mentioned in said and said.count("\n") == 1, said
    code, _, said = typed("--loss", f"{file}:copied", "--layers", 1, "--out", out)
    assert code == 2 and "--layers" in said and not out.exists()


def test_no_built_in_method_can_be_named_by_a_loss():
    """`NAME` and `NAME-sft`: names of functions have no dash, so they clash with first phases only."""
    assert {name.partition("-")[0] for name in METHOD_NAMES} >= {
        "sft",
        "ia2",
        "soft",
        "hidden",
        "ridge",
    }


def test_the_page_quotes_the_example():
    page = (OWN_LOSS.parents[1] / "docs" / "studies.md").read_text(encoding="utf-8")
    (quoted,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert quoted in OWN_LOSS.read_text(encoding="utf-8")
