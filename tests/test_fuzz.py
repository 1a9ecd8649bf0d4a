"""Hostile files: whatever is done to one, the right result or one line, soon and in little memory.

500 seeded mutations a kind; with $IA2MINI_FUZZ, in seconds for all kinds, as many more as fit.
"""

import json
import math
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz import any_of, content, fuzz, harm, harm_json
from ia2mini.models import load
from reference import make_checkpoint
from safetensors.torch import load_file
from tables import write_rows

from ia2mini import UsageError
from ia2mini.adapters import IA3, LoRA
from ia2mini.engine.peft import save_adapter
from ia2mini.engine.store import Store
from ia2mini.engine.subject import Subject
from ia2mini.fitting.folder import base_of
from ia2mini.fitting.predictor import FOREIGN, Predictor, load_adapter
from ia2mini.tasks.chat import ChatTemplate
from ia2mini.tasks.own import own_task, similar_labels
from ia2mini.tasks.rows import read_rows

SIZES = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 4,
}
SIZES |= {"num_key_value_heads": 1, "max_position_embeddings": 512}
CHAT = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] | trim }}\n{% endfor %}"
CHAT += "{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> list[Path]:
    """A Llama in one file and a Qwen3 in several, with all that a checkpoint folder may hold."""
    root, made = tmp_path_factory.mktemp("checkpoints"), []
    for family, shard in (("llama", "1GB"), ("qwen3", "8KB")):
        made.append(make_checkpoint(root / family, family, shard=shard, **SIZES))
        (made[-1] / "generation_config.json").write_text(json.dumps({"eos_token_id": [257]}))
        settings = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": CHAT}
        (made[-1] / "tokenizer_config.json").write_text(json.dumps(settings))
    (made[1] / "chat_template.jinja").write_text(CHAT)
    return made


def copy(source: Path, folder: Path) -> list[str]:
    for path in source.iterdir():
        shutil.copyfile(path, folder / path.name)
    return sorted(path.name for path in source.iterdir())


def weights_of(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of every safetensors file of a folder, read by hand."""
    found, kinds = {}, {"F32": np.float32, "F16": np.float16, "F64": np.float64}
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for name, about in json.loads(data[8:start]).items():
            if name != "__metadata__" and about["dtype"] in kinds:
                first, end = about["data_offsets"]
                found[name] = np.frombuffer(
                    data[start + first : start + end], kinds[about["dtype"]]
                ).reshape(about["shape"])
    return found


def test_checkpoint_folders(checkpoints, tmp_path):
    def make(rng, folder):
        names = copy(any_of(rng, checkpoints), folder)
        return harm(rng, folder, names + ["config.json"] * 2 + ["tokenizer.json"], tmp_path)

    def check(folder):
        model, tokenizer = load(folder)
        for name, p in model.named_parameters():
            if not p.isfinite().all():
                return f"{name} is not finite"
            if any(p.resolve().parent != folder.resolve() for p in folder.glob("*.safetensors")):
                return "read from elsewhere"
            if name in (found := weights_of(folder)) and not np.array_equal(
                found[name].astype(np.float32), p
            ):
                return f"{name} is not what the file holds"
        prompts = ["Text:a lovely é🙂\nLabel:", "b"]
        try:
            prompts.append(ChatTemplate(folder, tokenizer)("c"))
        except UsageError as error:
            assert "\n" not in str(error)
        for prompt in prompts:
            ids = tokenizer.encode(prompt)
            if ids and model(torch.tensor([ids])).shape != (1, len(ids), model.config.vocab_size):
                return "logits of another shape"
            tokenizer.decode(ids + list(tokenizer.eos_ids))
        if tokenizer.eos_ids:
            model(torch.tensor([tokenizer.eos_ids]))

    ends = fuzz("checkpoint", tmp_path, make, check)
    assert min(ends["read"], ends["refused"]) > 20


@pytest.fixture(scope="module")
def subject(checkpoints):
    return Subject(*load(checkpoints[1]), checkpoints[1], "qwen3", str(checkpoints[1]))


@pytest.fixture(scope="module")
def adapters(subject, tmp_path_factory) -> list[Path]:
    """An adapter of each kind in peft's format."""
    root, model = tmp_path_factory.mktemp("adapters"), subject.model
    fed = [f"model.layers.{i}.mlp.down_proj" for i in range(len(model.model.layers))]
    made = [LoRA(model, rank=2), IA3(model), IA3(model, ("k_proj", "down_proj"), scale_inputs=fed)]
    for i, adapter in enumerate(made):
        theta = adapter.init(torch.Generator().manual_seed(i)) + 0.1
        save_adapter(adapter, theta, root / str(i), subject.base)
    return [root / str(i) for i in range(len(made))]


def answers(predictor, labels, **how):
    """What is wrong with a predictor's answers to a row."""
    (found,) = predictor.answer_rows([{"text": "a é\n", "answer": "mine"}], **how)
    if not 0 <= found["confidence"] <= 1 or found["row_answer"] != "mine":
        return f"{found}"
    if labels and not (
        found["answer"] in [*labels, None]
        and math.isclose(sum(found["probabilities"].values()), 1, abs_tol=1e-4)
    ):
        return f"{found}"


def test_adapter_folders(subject, adapters, tmp_path):
    def make(rng, folder):
        names = copy(any_of(rng, adapters), folder)
        return harm(rng, folder, names, tmp_path)

    def check(folder):
        labels = ["0", "1"]
        base_of(folder)
        return answers(
            load_adapter(folder, subject, template="Text:{text}\nLabel:", labels=labels), labels
        )

    ends = fuzz("adapter", tmp_path, make, check)
    assert min(ends["read"], ends["refused"]) > 20


@pytest.fixture(scope="module")
def fitted(subject, tmp_path_factory) -> list[Path]:
    """Adapters as `ia2mini fit` saves them: of labels, of text in a conversation."""
    root = tmp_path_factory.mktemp("fitted")
    for name, more in {
        "labels": {"labels": ["0", "1"], "template": "Text:{text}\nLabel:"},
        "text": {"template": "{text}", "max_tokens": 3, "chat": True},
    }.items():
        adapter = LoRA(subject.model, rank=2)
        theta = adapter.init(torch.Generator().manual_seed(1)) + 0.1
        spec = (
            FOREIGN
            | {
                "method": "sft",
                "example": "Text:b\nLabel:",
                "confidences": [0.2, 0.5, 0.9],
                "temperature": 1.5,
            }
            | more
        )
        spec["demonstrations"] = [{"prompt": "Text:c\nLabel:", "answer": "1"}]
        Predictor(subject, adapter, theta[None], spec).save(root / name)
    return sorted(root.iterdir())


def test_descriptions_of_adapters(subject, fitted, tmp_path):
    def make(rng, folder):
        copy(any_of(rng, fitted), folder)
        return harm(rng, folder, ["ia2mini.json"], tmp_path)

    def check(folder):
        base_of(folder)
        predictor = load_adapter(folder, subject)
        labels = predictor.spec["labels"]
        wrong = answers(predictor, labels) or answers(predictor, labels, icl=True)
        return wrong or answers(predictor, labels, coverage=0.5)

    ends = fuzz("description", tmp_path, make, check)
    assert min(ends["read"], ends["refused"]) > 20


ROWS = [{"text": f'row {i}, "é🙂"\n', "label": "ab"[i % 2], "more": i / 4} for i in range(8)]


def test_data_files(tmp_path):
    for suffix in (".jsonl", ".json", ".csv", ".tsv", ".parquet"):
        write_rows(tmp_path / "rows" / f"rows{suffix}", ROWS)

    def make(rng, folder):
        path = any_of(rng, sorted((tmp_path / "rows").iterdir()))
        shutil.copyfile(path, folder / path.name)
        if path.suffix == ".jsonl" and rng.random() < 0.5:
            lines = path.read_bytes().splitlines()
            at = rng.integers(len(lines))
            lines[at] = harm_json(rng, lines[at])
            (folder / path.name).write_bytes(b"\n".join(lines))
            return f"harm_json of line {at}"
        return harm(rng, folder, [path.name], tmp_path)

    def check(folder):
        rows = read_rows(next(folder.iterdir(), folder / "rows.csv"))
        _, task = own_task(rows, "own")
        similar_labels(task.labels or ())
        for row in rows:
            example = task.example(row)
            (example.prompt + example.answer).encode()

    ends = fuzz("data", tmp_path, make, check)
    assert min(ends["read"], ends["refused"]) > 20


def as_bytes(tensors: dict) -> dict:
    return {
        name: (t.dtype, t.shape, t.flatten().view(torch.uint8).numpy().tobytes())
        for name, t in tensors.items()
    }


def test_run_folders(tmp_path):
    """What cannot be read is set aside and computed again; what reads well is trusted."""
    what = {"n": 4, "rates": [1e-3]}
    tensors = {"theta": torch.randn(3, 20), "dev_loss": torch.rand(3), "steps": torch.arange(3)}
    texts = {"texts": ["a", "ü", "1e5"], "parser": "text", "ids": [[1, 2], [3], []], "share": 0.25}
    # run.json is written anew, other seconds are as good
    names = ["cell/fit.safetensors", "cell/texts.json"]

    def use(out):
        store = Store(out, "name", what)
        with store.stage("train", "training sft"):
            found = store.once("cell/fit", lambda: tensors)
            kept = store.json("cell/texts.json")
            if kept is None:
                kept = store.keep_json("cell/texts.json", texts)
        return store, found, kept

    pristine = use(tmp_path / "pristine")[0].path

    def make(rng, folder):
        shutil.copytree(pristine, folder, dirs_exist_ok=True)
        return harm(rng, folder, names, tmp_path)

    def check(folder):
        before, path = content(folder), tmp_path / pristine.name
        # no dead links
        before = {name: held for name, held in before.items() if (folder / name).exists()}
        folder.rename(path)
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                _, found, kept = use(tmp_path)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                use(tmp_path)
            after = content(path)
            there = as_bytes(load_file(path / "cell/fit.safetensors"))
            told = json.loads((path / "cell/texts.json").read_bytes())
        finally:
            path.rename(folder)
        if as_bytes(found) != there or json.dumps(kept) != json.dumps(told):
            return "what is used is not what is kept"
        again = {name for name in names if name not in before or f"{name}.bad" in after}
        if "cell/fit.safetensors" in again and there != as_bytes(tensors):
            return "other tensors, computed again"
        if "cell/texts.json" in again and kept != texts:
            return "other texts, computed again"
        changed = {name for name in before if after[name] != before[name]} - {"seconds.json"}
        lost = [name for name in changed if after.get(f"{name}.bad") != before[name]]
        if lost:
            return f"{lost} were not set aside"
        if any(name.endswith(".bad") for name in after) != bool(said):
            return f"set aside without a warning, or the other way round: {[str(w.message) for w in said]}"

    ends = fuzz("run", tmp_path, make, check, kept=False)
    assert not ends["refused"]
