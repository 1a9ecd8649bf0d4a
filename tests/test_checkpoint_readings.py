"""Checkpoints that can be read in two ways: read as transformers reads them, or refused with a word on both."""

import json
import os
import shutil

import pytest
import torch
import transformers
from ia2mini.models import checkpoint, load
from mistakes import refused
from reference import LLAMA3_SCALING, make_checkpoint, random_ids, upstream
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend

from ia2mini.engine.subject import open_subject
from ia2mini.files.tokenizer_files import add_tokens

LLAMA3 = LLAMA3_SCALING | {"original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def change_config(folder, absent=(), **changes):
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in raw.items() if name not in absent}))


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def same_logits(folder):
    ids = random_ids(2, 40)
    with torch.no_grad():
        gap = (load(folder)[0](ids) - upstream(folder)(ids).logits).abs().max()
    assert gap <= 1e-4, gap


def refused_unless_same(folder):
    """A checkpoint is read as transformers reads it, or not at all; returns whether it is read."""
    try:
        load(folder)
    except checkpoint.UsageError as error:
        assert "\n" not in str(error) and str(folder) in str(error)
        return False
    same_logits(folder)
    return True


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "head", ["absent", "equal", "differs", "differs in its last row", "of another shape"]
)
def test_a_head_beside_the_embedding(tmp_path, family, tied, head):
    folder = make_checkpoint(tmp_path, family, tie_word_embeddings=tied)
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    heads = {
        "equal": embedding.clone(),
        "differs": torch.randn(288, 32),
        "of another shape": torch.ones(288, 31),
    }
    heads["differs in its last row"] = embedding.clone()
    heads["differs in its last row"][-1, -1] += 1
    change_weights(folder, lambda t: t.pop("lm_head.weight", None))
    if head in heads:
        change_weights(folder, lambda t: t.update({"lm_head.weight": heads[head]}))
    fine = head in (
        ("absent", "equal") if tied else ("equal", "differs", "differs in its last row")
    )
    if fine:
        return same_logits(folder)
    said = "tie_word_embeddings to false" if tied else "lm_head.weight"
    refused(lambda: load(folder), str(folder), said)


ROPES = {  # what config.json says: is it read?
    "theta at the top": ({"rope_theta": 300.0}, True),
    "theta inside": (
        {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
        True,
    ),
    "the same theta twice": ({"rope_theta": 300.0, "rope_parameters": {"rope_theta": 300.0}}, True),
    "two thetas": ({"rope_theta": 300.0, "rope_parameters": {"rope_theta": 500.0}}, False),
    "two thetas, the old name": (
        {"rope_theta": 300.0, "rope_scaling": LLAMA3 | {"rope_theta": 500.0}},
        False,
    ),
    "llama3, the old name": ({"rope_scaling": LLAMA3}, True),
    "llama3, the new name": (
        {"rope_parameters": LLAMA3 | {"rope_theta": 300.0}, "rope_theta": None},
        True,
    ),
    "llama3 twice": ({"rope_scaling": LLAMA3, "rope_parameters": LLAMA3}, True),
    "two factors": ({"rope_scaling": LLAMA3, "rope_parameters": LLAMA3 | {"factor": 2.0}}, False),
    "llama3 beside default": (
        {"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default"}},
        False,
    ),
    "default beside llama3": (
        {"rope_scaling": {"rope_type": "default"}, "rope_parameters": LLAMA3},
        False,
    ),
    "yarn beside default": (
        {"rope_scaling": YARN, "rope_parameters": {"rope_type": "default"}},
        False,
    ),
    "default beside yarn": (
        {"rope_scaling": {"rope_type": "default"}, "rope_parameters": YARN},
        False,
    ),
    "nothing beside llama3": ({"rope_scaling": None, "rope_parameters": LLAMA3}, True),
    "a theta that one of them drops": (
        {
            "rope_theta": None,
            "rope_scaling": {"type": "default"},
            "rope_parameters": {"rope_theta": 500.0},
        },
        False,
    ),
    "a context at the top": (
        {"original_max_position_embeddings": 64, "rope_scaling": LLAMA3},
        False,
    ),
    "the same context at the top": (
        {"original_max_position_embeddings": 16, "rope_scaling": LLAMA3},
        True,
    ),
    "a type of the old spelling": (
        {
            "rope_scaling": {
                "type": "llama3",
                **{k: v for k, v in LLAMA3.items() if k != "rope_type"},
            }
        },
        True,
    ),
}


@pytest.mark.parametrize("name", ROPES)
def test_rotary_embeddings_that_are_told_twice(tmp_path, name):
    changes, read = ROPES[name]
    folder = make_checkpoint(tmp_path, "llama")
    absent = [key for key, value in changes.items() if value is None]
    change_config(folder, absent, **changes)
    assert refused_unless_same(folder) == read


def sharded(folder, family="llama", **changes):
    """A checkpoint of several files of weights and an index."""
    return make_checkpoint(folder, family, shard="20KB", **changes)


def test_an_index_beside_a_single_file(tmp_path):
    """transformers takes the single file; where the other set is whole too, it is said."""
    folder, other = sharded(tmp_path / "a"), make_checkpoint(tmp_path / "b", "llama", seed=7)
    shutil.copy(other / "model.safetensors", folder)
    refused(
        lambda: load(folder),
        "two sets of weights",
        "model.safetensors",
        "model.safetensors.index.json",
    )
    sorted(folder.glob("model-*"))[1].unlink()
    same_logits(folder)  # the index was left behind
    for file in folder.glob("model-*"):
        file.unlink()
    same_logits(folder)
    single = make_checkpoint(tmp_path / "c", "llama")
    names = dict.fromkeys(load_file(single / "model.safetensors"), "model.safetensors")
    (single / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    same_logits(single)


def test_shards_that_are_missing_or_hold_a_tensor_twice(tmp_path):
    folder = sharded(tmp_path)
    files = sorted(folder.glob("model-*"))
    first = load_file(files[0])
    second = load_file(files[1])
    name = next(iter(first))
    save_file(second | {name: first[name] + 1}, files[1], metadata={"format": "pt"})
    refused(lambda: load(folder), f"tensor {name} stands in {files[0].name} too")
    files[1].unlink()
    refused(lambda: load(folder), files[1].name, "every shard")


def test_single_files_of_other_names_are_left_alone(tmp_path):
    folder, other = (
        make_checkpoint(tmp_path / "a", "qwen3"),
        make_checkpoint(tmp_path / "b", "qwen3", seed=7),
    )
    for name in (
        "consolidated.safetensors",
        "model.fp16.safetensors",
        "model-00001-of-00002.safetensors",
    ):
        shutil.copy(other / "model.safetensors", folder / name)
    same_logits(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "q4.gguf", "model.fp16.safetensors"])
def test_weights_that_are_not_read_are_named(tmp_path, name):
    folder = make_checkpoint(tmp_path, "qwen3")
    (folder / "model.safetensors").rename(folder / name)
    refused(lambda: load(folder), f"{name} is not read", "in model.safetensors, or in shards")


def test_weights_without_a_head_are_no_language_model(tmp_path):
    folder = make_checkpoint(tmp_path, "qwen3", tie_word_embeddings=True)
    upstream(folder).model.save_pretrained(folder)
    change_config(folder, architectures=["Qwen3ForCausalLM"])
    refused(lambda: load(folder), "no tensor is called model.layers", "embed_tokens.weight")


@pytest.mark.parametrize("layers", [2, 4, 4096])
def test_another_number_of_layers_is_found_before_they_are_made(tmp_path, monkeypatch, layers):
    folder = make_checkpoint(tmp_path, "qwen3")
    change_config(folder, num_hidden_layers=layers)
    monkeypatch.setattr(
        "ia2mini.models.qwen3.Qwen3.__init__", lambda *_: pytest.fail("the layers were made")
    )
    refused(lambda: load(folder), f"num_hidden_layers = {layers}, the files hold 3")


def test_a_checkpoint_that_holds_an_adapter_too(tmp_path):
    """transformers puts the adapter on it (or on another base), which `load` does not."""
    folder = make_checkpoint(tmp_path / "base", "qwen3")
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "some/base"})
    )
    for opened in (load, open_subject):
        refused(
            lambda opened=opened: opened(str(folder)),
            str(folder),
            "some/base",
            "move adapter_config.json",
        )
    (folder / "config.json").unlink()
    refused(lambda: load(folder), "an adapter and no checkpoint", "some/base")


def test_a_folder_whose_name_is_not_utf8(tmp_path):
    folder = make_checkpoint(tmp_path / "base", "qwen3")
    for name in (b"m\xe9", b"\xff/model"):
        odd = tmp_path / os.fsdecode(name)
        shutil.copytree(folder, odd)
        refused(lambda odd=odd: load(odd), "is not UTF-8; rename it", "\\udc")
    shutil.copytree(folder, tmp_path / "mé ß")
    load(tmp_path / "mé ß")


# What stands beside tokenizer.json, of which byte_tokenizer has <s> (256) and </s> (257)
DECODER = {
    "256": {"content": "<s>", "special": True},
    "258": {"content": "<|im|>", "special": True},
}
DECODER["259"] = {"content": " hi", "lstrip": True, "normalized": False}
BESIDE = {
    "nothing": {},
    "a decoder": {"tokenizer_config": {"added_tokens_decoder": DECODER}},
    "a decoder that makes a token special": {
        "tokenizer_config": {
            "added_tokens_decoder": {"258": {"content": "<|im|>"}},
            "eos_token": "<|im|>",
        }
    },
    "a decoder beside older files": {
        "tokenizer_config": {"added_tokens_decoder": DECODER},
        "added_tokens": {"x y": 260},
        "special_tokens_map": {"pad_token": "x y"},
    },
    "a token that is in the vocabulary": {
        "tokenizer_config": {"added_tokens_decoder": {"71": {"content": "h"}}}
    },
    "added tokens": {"added_tokens": {"<|im|>": 258, "x y": 259}},
    "added tokens that are special": {
        "added_tokens": {"<|im|>": 258, "x y": 259},
        "special_tokens_map": {
            "eos_token": "<|im|>",
            "pad_token": {"content": "x y", "lstrip": True},
        },
    },
    "a map of special tokens": {"special_tokens_map": {"pad_token": "<|im|>", "bos_token": "<s>"}},
    "named tokens": {
        "tokenizer_config": {"pad_token": "<|im|>", "image_token": "x y", "bos_token": "<s>"}
    },
    "further tokens": {"tokenizer_config": {"additional_special_tokens": ["<|im|>", "x y"]}},
    "further tokens of today": {
        "tokenizer_config": {"extra_special_tokens": {"audio_token": "x y"}}
    },
    "what transformers 5 writes": {
        "tokenizer_config": {
            "model_specific_special_tokens": {"image_token": "<|im|>"},
            "extra_special_tokens": ["x y"],
        }
    },
    "names of tokens as plain text": {
        "tokenizer_config": {
            "split_special_tokens": True,
            "bos_token": "<s>",
            "pad_token": "<|im|>",
        }
    },
    "a token of one character": {"tokenizer_config": {"pad_token": "é"}},
}


def write_beside(folder, files):
    for name, content in files.items():
        if name == "tokenizer_config":
            content = content | {"tokenizer_class": "PreTrainedTokenizerFast"}
        (folder / f"{name}.json").write_text(json.dumps(content))


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_tokens_that_stand_beside_tokenizer_json(tmp_path, family, name):
    folder = make_checkpoint(tmp_path, family)
    write_beside(folder, BESIDE[name])
    ours = load(folder)[1]
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    for text in ("<|im|>a  hi x y", "x y<s>hi</s> <|im|> é", "plain", ""):
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


CLASHES = {
    "another id": (
        {"tokenizer_config": {"added_tokens_decoder": {"7": {"content": "<|im|>"}}}},
        "has the id 7",
    ),
    "another id of a token": ({"added_tokens": {"</s>": 5}}, "has the id 5, and 257"),
    "BOS is to be added": (
        {"tokenizer_config": {"add_bos_token": True, "bos_token": "<s>"}},
        "does not add it",
    ),
    "EOS is to be added": (
        {"tokenizer_config": {"add_eos_token": True, "eos_token": "</s>"}},
        "does not add it",
    ),
    "a number": ({"tokenizer_config": {"pad_token": 5}}, "5 is not a token"),
    "a list": ({"special_tokens_map": {"pad_token": ["a"]}}, "is not a token"),
    "a list of numbers": (
        {"tokenizer_config": {"additional_special_tokens": [1]}},
        "1 is not a token",
    ),
    "a text": (
        {"tokenizer_config": {"extra_special_tokens": "ab"}},
        "neither a list nor an object",
    ),
    "a list where tokens have names": (
        {"tokenizer_config": {"model_specific_special_tokens": ["ab"]}},
        "model_specific_special_tokens is not an object",
    ),
    "a decoder of lists": ({"tokenizer_config": {"added_tokens_decoder": []}}, "not an object"),
    "a decoder of texts": (
        {"tokenizer_config": {"added_tokens_decoder": {"258": "a"}}},
        "is not an id with a token",
    ),
    "an id in words": (
        {"tokenizer_config": {"added_tokens_decoder": {"x": {"content": "a"}}}},
        "is not an id",
    ),
    "an id that is none": ({"added_tokens": {"a b": "x"}}, "is not a token's id"),
    "a flag that is none": (
        {"tokenizer_config": {"added_tokens_decoder": {"258": {"content": "a b", "lstrip": 3}}}},
        "not true or false",
    ),
}


@pytest.mark.parametrize("name", CLASHES)
def test_files_of_tokens_that_say_different_things_or_nonsense(tmp_path, name):
    files, said = CLASHES[name]
    folder = make_checkpoint(tmp_path, "qwen3")  # its tokenizer.json adds no BOS
    write_beside(folder, files)
    refused(lambda: load(folder), str(folder), said)


def test_a_bos_that_both_files_add_or_leave_out_is_fine(tmp_path):
    for family, adds in (("llama", True), ("qwen3", False)):
        folder = make_checkpoint(tmp_path / family, family)
        write_beside(
            folder,
            {
                "tokenizer_config": {
                    "add_bos_token": adds,
                    "bos_token": "<s>",
                    "add_eos_token": False,
                }
            },
        )
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        assert load(folder)[1].encode("a") == theirs("a")["input_ids"]
        write_beside(folder, {"tokenizer_config": {"add_bos_token": not adds, "bos_token": "<s>"}})
        refused(lambda folder=folder: load(folder), f"add_bos_token = {str(not adds).lower()}")


@pytest.mark.parametrize("name", ["qwen3", "llama3"])
def test_a_real_tokenizer_keeps_its_ids_when_a_token_is_added(shared_data, tmp_path, name):
    shutil.copy(shared_data / "tokenizers" / name / "tokenizer.json", tmp_path)
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    write_beside(tmp_path, {"added_tokens": {"<|mine|>": backend.get_vocab_size()}})
    add_tokens(backend, tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    text = "Hello <|mine|> wörld <|im_start|>user<|eot_id|>"
    assert backend.encode(text).ids == theirs(text)["input_ids"]
