"""The whole protocol against a plain reference: transformers, peft, hooks, torch's Adam, row by row; and real rows."""

import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from ia2mini.models import load
from ia2mini.models.checkpoint import TINY, save
from ia2mini.models.qwen3 import Config, Qwen3
from plain import TRAINED, Plain, joined, plain_protocol
from reference import make_checkpoint, upstream
from tokenizers import Tokenizer as Backend

import ia2mini.engine.experiment
import ia2mini.train
from ia2mini.cli.main import main
from ia2mini.engine.options import Options
from ia2mini.engine.subject import Subject
from ia2mini.episode import draw_episode
from ia2mini.study.study import compare
from ia2mini.tasks import Task, find_task, load_examples
from ia2mini.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random Qwen3 over the words of the toy tasks, inclined to end a paragraph so that generations stop."""
    torch.set_num_threads(1)
    words = Backend.from_file(str(TINY / "tokenizer.json"))
    eos, stop = words.token_to_id("<eos>"), words.token_to_id("\n\n")
    size = words.get_vocab_size()
    changes = {"vocab_size": size, "eos_token_id": eos, "bos_token_id": None}
    made = make_checkpoint(tmp_path_factory.mktemp("tiny"), "qwen3", seed=1, **changes)
    net = upstream(made)
    with torch.no_grad():
        net.lm_head.weight[stop] *= 2
    config = (made / "config.json").read_text()
    net.save_pretrained(made)
    (made / "config.json").write_text(config)
    (made / "tokenizer.json").write_text(words.to_str())
    return made


def side_by_side(runs: list[list[float]]) -> list[list[float]]:
    """Losses of all runs as they come when trained together: at every step and look, those of the runs still going."""
    return [[run[i] for run in runs if i < len(run)] for i in range(max(map(len, runs)))]


def ours(
    folder: Path, task: Task, o: Options, out: Path, monkeypatch
) -> tuple[dict, Path, list, list]:
    """`compare` on the same: document, folder, the teacher's rows of each set, every loss that training looked at."""
    taught, seen = [], []
    engine, teach, losses = (
        ia2mini.engine.experiment,
        ia2mini.engine.experiment.teach,
        ia2mini.train.run_losses,
    )
    monkeypatch.setattr(
        engine, "teach", lambda *args, **more: taught.append(teach(*args, **more)) or taught[-1]
    )
    monkeypatch.setattr(
        ia2mini.train, "run_losses", lambda *args: seen.append(losses(*args)) or seen[-1]
    )
    subject = Subject(*load(folder), folder, "random", str(folder))
    document, kept = compare([task], subject, o, out)
    return (
        document,
        kept,
        [t.icl_train + t.icl_dev for t in taught],
        [values.tolist() for values in seen],
    )


@pytest.fixture(scope="module", params=["single", "several", "multi"])
def studied(request, folder):
    """(kind, task, options, the plain protocol of these)."""
    # three steps an epoch: looks after even steps and at epochs' ends differ
    if request.param == "single":
        task, o = (
            find_task("toy-mood"),
            Options(n=(5,), batch_size=2, epochs=4, eval_rows=8, asim_rows=4),
        )
    elif request.param == "several":  # labels of several tokens
        task = replace(find_task("toy-mood"), labels=("0 0", "1"), ood=())
        o = Options(n=(4,), epochs=7, eval_rows=8, asim_rows=4)
    else:
        task = replace(find_task("toy-sums-short"), max_tokens=6, ood=())
        o = Options(n=(4,), epochs=6, eval_rows=5, asim_rows=3)
    o = replace(o, sets=2, rates=(1e-2, 3e-2), patience=2)
    return request.param, task, o, plain_protocol(folder, task, o.n[0], o)


def best_rate(plain: dict, method: str, about: str) -> float | None:
    """The rate with the lowest mean dev loss over sets, of a trained method."""
    losses: dict[float, list[float]] = {}
    for (m, e, _, rate), record in plain["records"].items():
        if rate and (m, e) == (method, about):
            losses.setdefault(rate, []).append(record["dev_loss"])
    return min(losses, key=lambda rate: fmean(losses[rate])) if losses else None


@pytest.mark.parametrize("select", ["both", "dev"])
def test_compare_equals_the_plain_protocol(studied, select, folder, tmp_path, monkeypatch):
    kind, task, o, plain = studied
    document, kept, taught, seen = ours(
        folder, task, replace(o, select=select), tmp_path, monkeypatch
    )
    for mine, theirs in zip(sum(taught, []), sum(plain["taught"], []), strict=True):
        assert (mine.prompt, mine.answer) == (theirs.prompt, theirs.answer)
        assert (mine.activations - theirs.targets).abs().max() <= 1e-5
    lengths = {len(row.answer) for row in sum(plain["taught"], [])}
    # else stopping was not tried
    assert lengths == {1} if kind == "single" else len(lengths) > 1, lengths
    expected = sum((side_by_side(plain["traces"][phase]) for phase in TRAINED), [])
    assert [len(values) for values in seen] == [len(values) for values in expected]
    # Adam enlarges the rounding of tiny gradients
    np.testing.assert_allclose(sum(seen, []), sum(expected, []), rtol=5e-4)
    records = plain["records"]
    if select == "dev":  # only runs at the chosen rate are scored
        records = {
            key: r for key, r in records.items() if key[3] == best_rate(plain, key[0], task.name)
        }
    told = [(run["method"], run["eval"], run["set"], run["rate"]) for run in document["runs"]]
    assert len(told) == len(records) and set(told) == set(records)
    if kind != "multi":
        assert len(document["training"]) == len(TRAINED) * o.sets * len(o.rates), (
            "all runs are told of their training"
        )
    for run in document["training"]:
        theirs = plain["records"][run["method"], task.name, run["set"], run["rate"]]
        assert (
            run["dev_loss"] == pytest.approx(theirs["dev_loss"], rel=5e-4)
            and run["steps"] == theirs["steps"]
        )
    for run in document["runs"]:
        theirs = records[run["method"], run["eval"], run["set"], run["rate"]]
        assert run["acc"] == pytest.approx(theirs["acc"])
        assert run["asim"] == pytest.approx(theirs["asim"], abs=5e-4 if run["rate"] else 1e-5)
        assert run["steps"] == theirs.get("steps", 0)
        if kind != "multi":
            # Adam enlarges the rounding of tiny gradients
            assert run["ece"] == pytest.approx(theirs["ece"], abs=5e-4)
            assert run["nll"] == pytest.approx(theirs["nll"], rel=5e-4)
        else:
            assert json.loads((kept / run["texts"]).read_text())["texts"] == theirs["texts"]
    for cell in document["cells"]:
        about = (cell["method"], cell["eval"])
        by_rate = {
            rate: [plain["records"][(*about, s, rate)] for s in range(o.sets)]
            for rate in (o.rates if cell["rate"] else (None,))
        }
        if cell["selected_by"] == "dev":
            assert cell["rate"] == min(
                o.rates, key=lambda rate: fmean(run["dev_loss"] for run in by_rate[rate])
            )
        if cell["selected_by"] == "eval":
            best = max(fmean(run["acc"] for run in runs) for runs in by_rate.values())
            assert cell["acc_mean"] == pytest.approx(best)
        for metric in ("acc", "asim", *(["ece", "nll"] if kind != "multi" else [])):
            values = [run[metric] for run in by_rate[cell["rate"]]]
            found = cell[f"{metric}_mean"], cell[f"{metric}_std"]
            assert found == pytest.approx((fmean(values), stdev(values)), abs=5e-4)
    choices = {None, "dev", "eval"} if select == "both" else {None, "dev"}
    assert {cell["selected_by"] for cell in document["cells"]} == choices
    sft = [run["acc"] for run in document["runs"] if run["method"] == "sft"]
    assert kind == "multi" or max(sft) > 0, "nothing learned: the comparison would be of zeros"


def test_paper_compat_compares_each_model_on_its_own_response(folder, tmp_path):
    task = replace(find_task("toy-sums-short"), max_tokens=6, ood=())
    o = Options(methods=("base",), sets=1, eval_rows=4, asim_rows=3, paper_compat=True)
    model, tokenizer = load(folder)
    document, _ = compare(
        [task], Subject(model, tokenizer, folder, "random", str(folder)), o, tmp_path
    )
    base, pool = Plain(upstream(folder), tokenizer), load_examples(task, "train").rows
    shown, alike, lengths = draw_episode(pool, 4, 0, 0, 4, True).icl, [], []
    for demonstrations, row in zip(shown, load_examples(task, "eval", limit=3).rows, strict=False):
        prompts = [tokenizer.encode(text + row.prompt) for text in (joined(demonstrations), "")]
        own = [(base.respond(prompt, 6) + list(tokenizer.eos_ids))[:6] for prompt in prompts]
        outputs = [base(prompt, response)[1] for prompt, response in zip(prompts, own, strict=True)]
        lengths.append([x.shape[1] for x in outputs])
        shorter = min(lengths[-1])
        alike.append(F.cosine_similarity(*(x[:, :shorter] for x in outputs), dim=-1))
    assert any(a != b for a, b in lengths), "nothing was cut"
    assert document["runs"][0]["asim"] == pytest.approx(
        fmean(a.mean().item() for a in alike), abs=1e-5
    )


REAL = [  # the first rows of set 0 of the real SST2 rows, as the model must read them
    "Text:men in black ii achieves ultimate insignificance -- "
    "it 's the sci-fi comedy spectacle as whiffle-ball epic . \nLabel:0",
    "Text:no rooting interest \nLabel:0",
    "Text:seems content to dog-paddle in the mediocre end of the pool \nLabel:0",
    "Text:builds to a crescendo that encompasses many more paths than we started with \nLabel:1",
]
DEV = "Text:this is a beautiful film for people who like their romances to have that french realism \nLabel:"
QUERY = "Text:the words , ` frankly , my dear , i do n't give a damn , ' have never been more appropriate . \nLabel:"


def test_real_rows_run_to_the_end(shared_data, tmp_path, monkeypatch):
    vocabulary = 151936  # Qwen3's own
    model = Qwen3(
        Config(
            vocabulary, 32, 64, 2, 4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True
        )
    )
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.05)
    words = (shared_data / "tokenizers/qwen3/tokenizer.json").read_text(encoding="utf-8")
    save(model, tmp_path / "model", words, 151643)
    read, encode, encode_all = [], Tokenizer.encode, Tokenizer.encode_all
    monkeypatch.setattr(
        Tokenizer,
        "encode",
        lambda self, text, **more: read.append(text) or encode(self, text, **more),
    )
    monkeypatch.setattr(
        Tokenizer, "encode_all", lambda self, texts: read.extend(texts) or encode_all(self, texts)
    )
    folders = {"--model": tmp_path / "model", "--data-dir": shared_data, "--out": tmp_path / "runs"}
    command = ["run", "sst2", *(str(part) for pair in folders.items() for part in pair)]
    options = "--n 4 --sets 1 --rates 1e-3 --eval-rows 20 --methods icl,ia2 --figures= --device cpu --json".split()
    result = CliRunner().invoke(main, command + options)
    assert result.exit_code == 0, result.output
    cells = json.loads(result.stdout.splitlines()[-1])["cells"]
    assert {(c["method"], c["eval"], c["ood"]) for c in cells} == {
        (method, e, e != "sst2") for method in ("icl", "ia2") for e in ("sst2", "finsen", "poems")
    }
    assert DEV in read and QUERY in read
    (demonstrated,) = {text for text in read if text.endswith("\n\n" + QUERY)}
    assert sorted(demonstrated.split("\n\n")) == sorted([*REAL, QUERY])
    for row in REAL:  # leave one out: the other three before it, and only those
        (seen,) = {text for text in read if text.endswith("\n\n" + row[:-1])}
        assert sorted(seen.split("\n\n")) == sorted([*(r for r in REAL if r != row), row[:-1]])
