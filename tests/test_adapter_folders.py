"""Folders in which an adapter lies with other files; where a merged checkpoint may be written; which base is named."""

import json
import os
import shutil
import warnings
from dataclasses import replace

import peft
import pytest
import torch
from click.testing import CliRunner
from ia2mini.models import load
from mistakes import refused
from reference import make_checkpoint, random_ids, upstream
from safetensors.torch import load_file
from shipping import shipping
from tokenizers import Tokenizer

from ia2mini import FitOptions, fit, load_adapter, open_subject
from ia2mini.cli.main import main
from ia2mini.fitting.folder import base_of
from ia2mini.report.page import loading_code
from ia2mini.scale import device
from ia2mini.tasks import world
from ia2mini.tasks.chat import template_of

ASK = ("--template", "{text}", "--labels", "a,b")
WEIGHTS = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("base"), "qwen3", num_hidden_layers=2)


@pytest.fixture(scope="module")
def twin(base):
    """peft's LoRA with random weights on the base."""
    net = peft.get_peft_model(
        upstream(base), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    )
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return net.eval()


@pytest.fixture
def saved(twin, tmp_path):
    twin.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def run(*arguments, code=0, input='{"text": "hello"}\n'):
    result = CliRunner().invoke(main, list(map(str, arguments)), input=input)
    assert result.exit_code == code, result.output
    assert code == 0 or result.stderr.count("\n") == 1, result.stderr
    return result.stderr if code else result.stdout


def logits(folder, subject=None):
    """What the loaded adapter computes for some ids."""
    with torch.no_grad(), load_adapter(folder, subject).student() as student:
        return student(IDS)


IDS = random_ids(2, 7)


def copied(files, folder):
    folder.mkdir(exist_ok=True)
    for file in files:
        shutil.copy(file, folder)


LAYOUTS = {
    "as peft writes it": lambda base: [],
    "config.json of the base beside it": lambda base: [base / "config.json"],
    "tokenizer files beside it": lambda base: [base / "config.json", base / "tokenizer.json"],
    "the whole base beside it": lambda base: [file for file in base.iterdir() if file.is_file()],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_adapter_is_used_whatever_lies_beside_it(base, twin, saved, layout):
    """Python, predict, score, generate and merge; the base that the adapter names, or --model."""
    copied(LAYOUTS[layout](base), saved)
    with torch.no_grad():
        expected = twin(IDS).logits
        plain = load(base)[0](IDS)
    assert (logits(saved) - expected).abs().max() <= 1e-5
    assert (logits(saved, open_subject(str(base), "cpu")) - expected).abs().max() <= 1e-5
    assert (plain - expected).abs().max() > 1e-2
    sure = {}
    for name, more in (("named", ()), ("given", ("--model", base))):
        sure[name] = json.loads(run("predict", saved, "-", *ASK, *more))["confidence"]
        out = saved.parent / f"merged {name}"
        run("merge", saved, "--out", out, *more)
        assert (upstream(out)(IDS).logits - expected).abs().max() <= 1e-4
    assert sure["named"] == sure["given"]
    bare = [file for file in saved.iterdir() if file.name in WEIGHTS]
    copied(bare, saved.parent / "bare")
    assert (
        sure["named"] == json.loads(run("predict", saved.parent / "bare", "-", *ASK))["confidence"]
    )
    assert "label" not in run("generate", "--adapter", saved, "--prompt", "hi", "--max-tokens", "2")


def test_transformers_reads_the_shared_folder_so_too(base, twin, saved):
    copied([file for file in base.iterdir() if file.is_file()], saved)
    assert (upstream(saved)(IDS).logits - logits(saved)).abs().max() <= 1e-5
    assert "holds a checkpoint and an adapter" in run(
        "predict", saved, "-", *ASK, "--model", saved, code=2
    )
    assert "holds a checkpoint and an adapter" in run(
        "generate", "--model", saved, "--prompt", "a", code=2
    )


def test_a_folder_that_is_base_and_adapter_of_itself_is_refused(base, twin, tmp_path):
    """Whether the adapter is in the weights already nobody can tell."""
    shutil.copytree(base, tmp_path / "both")
    twin.save_pretrained(tmp_path / "both")
    config = json.loads((tmp_path / "both" / "adapter_config.json").read_text())
    named = config | {"base_model_name_or_path": str(tmp_path / "both")}
    (tmp_path / "both" / "adapter_config.json").write_text(json.dumps(named))
    assert "holds a checkpoint and an adapter" in run(
        "predict", tmp_path / "both", "-", *ASK, code=2
    )


def test_a_checkpoint_is_no_adapter_and_an_adapter_no_checkpoint(base, saved, tmp_path):
    assert "a checkpoint and no adapter" in run("predict", base, "-", *ASK, code=2)
    assert "a checkpoint and no adapter" in run(
        "merge", base, "--model", base, "--out", tmp_path / "m", code=2
    )
    assert "an adapter and no checkpoint" in run(
        "generate", "--model", saved, "--prompt", "a", code=2
    )
    assert not (tmp_path / "m").exists()


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """(what `fit` found on the embedded model, its folder)."""
    folder = tmp_path_factory.mktemp("fit") / "a"
    rows = world.rows("toy-mood", "train")[:12]
    how = FitOptions(methods=("sft",), rates=(1e-2,), epochs=6, folds=3, temperature=False)
    with shipping("sft"):
        found = fit(
            [{"text": row["text"], "label": row["label"]} for row in rows],
            open_subject("tiny", "cpu"),
            how,
        )
    found.save(folder)
    return found, folder


def test_where_the_base_alone_answers_no_adapter_may_lie_beside(shipped, saved, tmp_path):
    found, _ = shipped
    alone = replace(found, adapter=None, theta=None, spec=found.spec | {"method": "base"})
    alone.save(tmp_path / "alone")
    assert load_adapter(tmp_path / "alone").adapter is None
    for name in (*WEIGHTS, "config.json"):
        shutil.copytree(tmp_path / "alone", tmp_path / name)
        (tmp_path / name / name).write_text("{}")
        refused(lambda name=name: load_adapter(tmp_path / name), f"{name} lies beside it")


def test_what_is_fitted_on_tiny_names_it_and_moves_with_it(shipped, tmp_path, monkeypatch):
    found, folder = shipped
    assert base_of(folder) == ("tiny", None) and open_subject("tiny", "cpu").base == "tiny"
    assert (
        json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        == "tiny"
    )
    shutil.copytree(folder, tmp_path / "moved")
    (tmp_path / "moved" / "ia2mini.json").unlink()  # peft's part alone
    assert base_of(tmp_path / "moved") == ("tiny", None)
    for place in (folder, tmp_path / "moved"):
        assert torch.equal(load_adapter(place).theta, found.theta)
    code = loading_code(repr("tiny"), str(folder))
    names: dict = {}
    exec(code, names)
    with torch.no_grad(), found.student() as student:
        ids = torch.tensor([[3, 4, 5]])
        assert (names["model"](ids).logits - student(ids)).abs().max() <= 1e-5


@pytest.mark.parametrize("value", [["a"], 5, {"a": 1}, True, 1.5])
@pytest.mark.parametrize("field", ["base_model_name_or_path", "revision"])
def test_a_base_that_is_no_text_is_named(saved, value, field):
    config = json.loads((saved / "adapter_config.json").read_text()) | {field: value}
    (saved / "adapter_config.json").write_text(json.dumps(config))
    refused(
        lambda: base_of(saved),
        "adapter_config.json",
        f"{field} = {value!r}",
        "is not a text",
        "--model",
    )
    assert "is not a text" in run("predict", saved, "-", *ASK, code=2)


@pytest.mark.parametrize("value", [None, "", "\0", "none/there/at/all", "\ud800", "x" * 5000])
def test_a_base_that_is_not_there_is_one_line(saved, value):
    config = json.loads((saved / "adapter_config.json").read_text()) | {
        "base_model_name_or_path": value
    }
    (saved / "adapter_config.json").write_text(json.dumps(config))
    told = run("predict", saved, "-", *ASK, code=2)
    assert "names no base model" in told if not value else "unknown model" in told


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_merge_writes_into_a_new_or_empty_folder_alone(base, saved, tmp_path):
    """Not over the base, the adapter, another checkpoint, or a person's files."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "years.md").write_text("of notes")
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "model.safetensors.index.json").write_text("{}")
    (tmp_path / "nested" / "deeper").mkdir(parents=True)
    (tmp_path / "link").symlink_to(base)
    for name in ("notes", "index", "nested", "link", "adapter"):
        before = contents(tmp_path / name)
        assert "--out needs a new or empty folder" in run(
            "merge", saved, "--out", tmp_path / name, code=2
        )
        assert contents(tmp_path / name) == before
    before = contents(base)
    assert "--out needs a new or empty folder" in run("merge", saved, "--out", base, code=2)
    assert contents(base) == before
    (tmp_path / "file").write_text("mine")
    assert "cannot write there" in run("merge", saved, "--out", tmp_path / "file", code=2)
    assert (tmp_path / "file").read_text() == "mine"
    odd = tmp_path / os.fsdecode(b"m\xe9")
    assert "is not UTF-8" in run("merge", saved, "--out", odd, code=2) and not odd.exists()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".gitattributes").write_text("")
    for name in ("empty", "new/deeper"):
        run("merge", saved, "--out", tmp_path / name)
        assert load_file(tmp_path / name / "model.safetensors")


def test_the_same_merge_may_be_made_again_and_no_other(base, twin, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(
        device, "bfloat16_in_hardware", lambda cpu: True
    )  # else a line more is said
    out = tmp_path / "m"
    first = run("merge", saved, "--out", out)
    kept = contents(out)
    (out / "config.json").unlink()  # as if it had been interrupted
    assert run("merge", saved, "--out", out) == first and contents(out) == kept
    (out / "mine.txt").write_text("kept")
    run("merge", saved, "--out", out)
    assert (out / "mine.txt").read_text() == "kept"
    other = tmp_path / "other"
    peft.get_peft_model(
        upstream(base), peft.LoraConfig(r=2, target_modules=["q_proj"])
    ).save_pretrained(other)
    for adapter, more in ((other, ()), (saved, ("--dtype", "bfloat16"))):
        assert "holds another merged checkpoint" in run(
            "merge", adapter, "--out", out, *more, code=2
        )
    assert contents(out) == kept | {out / "mine.txt": b"kept"}
    rounded = run("merge", saved, "--out", tmp_path / "b", "--dtype", "bfloat16")
    assert "rounded to bfloat16" in rounded and "rounded" not in first


def test_tokens_beside_tokenizer_json_go_with_a_merge(base, saved, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    (folder / "added_tokens.json").write_text(json.dumps({"<|im|>": 258}))
    run("merge", saved, "--model", folder, "--out", tmp_path / "m")
    for place in (folder, tmp_path / "m"):
        assert load(place)[1].encode("a<|im|>") == [64, 258]


def test_an_adapter_that_is_merged_into_its_base_does_not_count_twice(base, twin, saved, tmp_path):
    merged = tmp_path / "merged"
    run("merge", saved, "--out", merged)
    for command in (("predict", saved, "-", *ASK), ("merge", saved, "--out", tmp_path / "again")):
        assert f"{merged} holds this adapter already" in run(*command, "--model", merged, code=2)
    other = tmp_path / "other"  # another may be put on it
    shutil.copytree(saved, other)
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 2}))
    net = peft.PeftModel.from_pretrained(upstream(merged), other).eval()
    with torch.no_grad():
        expected = net(IDS).logits
    assert (logits(other, open_subject(str(merged))) - expected).abs().max() <= 1e-4


def test_a_chat_template_of_any_file_goes_with_a_merge(base, saved, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    run("merge", saved, "--model", folder, "--out", tmp_path / "m")
    assert template_of(tmp_path / "m") == template


def test_an_adapter_with_a_tokenizer_of_its_own(base, saved):
    """A padding token more, as training often adds, is told; other ids for the base's tokens are refused."""
    shutil.copy(base / "tokenizer.json", saved)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(saved)
    backend = Tokenizer.from_file(str(saved / "tokenizer.json"))
    backend.add_special_tokens(["[PAD]"])
    backend.save(str(saved / "tokenizer.json"))
    with pytest.warns(UserWarning, match=r"the base lacks, read as plain text: '\[PAD\]'"):
        load_adapter(saved)
    words = json.loads((saved / "tokenizer.json").read_text())
    words["model"]["vocab"] |= {"a": 65, "b": 64}
    (saved / "tokenizer.json").write_text(json.dumps(words))
    refused(lambda: load_adapter(saved), "is another than that of", "(token 'a')")


def test_another_model_of_the_hub_than_the_adapter_names_is_told(base, saved):
    config = json.loads((saved / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "some/base"
    (saved / "adapter_config.json").write_text(json.dumps(config))
    local = open_subject(str(base))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(saved, local)
        load_adapter(saved, replace(local, base="Some/Base", revision="abc"))
    with pytest.warns(UserWarning, match="names 'some/base' as its base and is used on some/chat"):
        load_adapter(saved, replace(local, base="some/chat", revision="abc"))
