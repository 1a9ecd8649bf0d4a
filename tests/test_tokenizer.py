"""Whole prompts against transformers with the same real files; where BOS and EOS come from; safe joins of answers."""

import json
import warnings
from dataclasses import replace

import pytest
from reference import byte_tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ia2mini import UsageError
from ia2mini.batch import truth_row
from ia2mini.tasks import find_task, load_examples
from ia2mini.tokenizer import Tokenizer

LLAMA_BOS = 128000
REMAP = ("apple", "Friday", "banana", "Saturday", "Thursday", "Sunday", "Wednesday", "Monday")
TEMPLATES = {
    "sentiment": "Text:a fine film \nLabel:",
    "choice": "Question:Why?\nChoices:\n[apple]so\n[Friday]no\n\nAnswer:",
}


@pytest.fixture(scope="module", params=["qwen3", "llama3"])
def real(request, shared_data, tmp_path_factory):
    """(name, our tokenizer, transformers' tokenizer) of a real tokenizer.json."""
    folder = tmp_path_factory.mktemp(request.param)
    file = shared_data / "tokenizers" / request.param / "tokenizer.json"
    (folder / "tokenizer.json").symlink_to(file.resolve())
    (folder / "config.json").write_text('{"eos_token_id": 5}')
    return (
        request.param,
        Tokenizer.from_folder(folder),
        PreTrainedTokenizerFast(tokenizer_file=str(file)),
    )


def real_prompts(shared_data) -> list[str]:
    def rows(name, count):
        lines = (shared_data / name).read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:count]]

    prompts = [f"Text:{row['sentence']}\nLabel:" for row in rows("sst2/train.jsonl", 60)]
    prompts += [
        f"Text:{row['verse_text']}\nLabel:" for row in rows("poem_sentiment/train.jsonl", 40)
    ]
    prompts += [
        f"Question:{row['question']}\nAnswer:{row['answer']}"
        for row in rows("gsm8k/train.jsonl", 40)
    ]
    prompts += [
        f"Question:{row['problem']}\nAnswer:{row['solution']}"
        for row in rows("math_algebra/train.jsonl", 40)
    ]
    return [
        *prompts,
        "\n\n".join(p + "1" for p in prompts[:16]) + "\n\n" + prompts[16],
        "",
        "  é\u2028日本 <|endoftext|>\t\n ",
    ]


def test_whole_prompts_as_transformers_encodes_them(real, shared_data):
    name, ours, theirs = real
    bos = [LLAMA_BOS] if name == "llama3" else []
    for prompt in real_prompts(shared_data):
        ids = ours.encode(prompt)
        assert ids == theirs(prompt)["input_ids"], prompt[:60]
        assert ids == bos + ours.encode(prompt, special=False)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_text_comes_back_without_special_tokens(real):
    _, tokenizer, _ = real
    text = "Text:a fine film \nLabel:1 , . é"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("labels", [tuple("0123"), REMAP], ids=["digits", "remap"])
def test_label_tokens_stand_alone_after_the_colon(real, template, labels):
    _, tokenizer, _ = real
    prompt = TEMPLATES[template]
    ids = tokenizer.label_tokens(prompt, labels)
    assert [len(tokens) for tokens in ids] == [1] * len(labels)
    assert len({token for (token,) in ids}) == len(labels)
    for label, (token,) in zip(labels, ids, strict=True):
        assert tokenizer.encode_answer(prompt, label) == [token]
        assert tokenizer.encode(prompt + label) == [*tokenizer.encode(prompt), token]
        assert tokenizer.decode([token]) == label


@pytest.mark.parametrize("label", ["A", "B", "true", "negative"])
def test_a_label_that_merges_with_the_colon_is_named(real, label):
    _, tokenizer, _ = real
    with pytest.raises(UsageError, match=f"'{label}' merges") as error:
        tokenizer.label_tokens(TEMPLATES["sentiment"], ("0", label))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("template", TEMPLATES)
def test_labels_of_several_tokens_stand_after_the_colon(real, template):
    _, tokenizer, _ = real
    # two begin with the same token
    prompt, labels = TEMPLATES[template], ("0 of them", "0 of us", "17")
    found = tokenizer.label_tokens(prompt, labels)
    assert found[0][0] == found[1][0] and all(tokenizer.eos_ids[0] not in ids for ids in found)
    for label, ids in zip(labels, found, strict=True):
        assert tokenizer.encode(prompt + label) == tokenizer.encode(prompt) + ids
        assert tokenizer.decode(ids) == label


def test_labels_that_begin_alike_are_told_apart(tmp_path):
    tokenizer = write_tokenizer(tmp_path)
    assert [
        len(ids) for ids in tokenizer.label_tokens("Label:", ("apple", "banana", "avocado"))
    ] == [5, 6, 7]
    plain = [tokenizer.encode(label) for label in ("on", "one", "two")]
    assert tokenizer.label_tokens("Label:", ("one", "two")) == plain[1:]
    # one is the beginning of another: only an end tells them apart, so all have one
    assert tokenizer.label_tokens("Label:", ("on", "one", "two")) == [ids + [257] for ids in plain]
    with pytest.raises(UsageError, match="label 'two' has the tokens of label 'two'") as error:
        tokenizer.label_tokens("Label:", ("one", "two", "two"))
    assert "\n" not in str(error.value)


def test_a_label_in_which_a_text_would_end_is_refused(tmp_path):
    """What ends a text is never part of an answer, so that no such label could be given."""
    tokenizer = write_tokenizer(tmp_path)
    ending = tokenizer.encode("n")[0]
    tokenizer.eos_ids = (*tokenizer.eos_ids, ending)
    for label in ("no", "on", "n", "one"):
        with pytest.raises(UsageError, match=f"label '{label}' holds 'n', which ends a text"):
            tokenizer.label_tokens("Label:", ("yes", label))
    assert tokenizer.label_tokens("Label:", ("yes", "maybe"))


def test_labels_that_the_vocabulary_lacks_are_the_same_word():
    words = Backend(
        models.WordLevel({"<unk>": 0, "Label": 1, ":": 2, "good": 3}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = Tokenizer(words, ())
    with (
        pytest.warns(UserWarning),
        pytest.raises(UsageError, match="label 'awful' has the tokens of label 'bad'"),
    ):
        tokenizer.label_tokens("Label:", ("good", "bad", "awful"))


def test_a_multi_token_answer_joins_safely(real):
    _, tokenizer, _ = real
    prompt, answer = "Question:How many?\nAnswer:", "2+2=<<2+2=4>>4 clips\n#### 4"
    assert tokenizer.encode(prompt + answer) == tokenizer.encode(prompt) + tokenizer.encode_answer(
        prompt, answer
    )


@pytest.mark.parametrize("task", ["gsm8k", "hmath_algebra"])
def test_texts_that_would_merge_with_their_prompt_are_tokenized_apart(real, shared_data, task):
    _, tokenizer, _ = real
    rows = load_examples(find_task(task), "train", shared_data, 300).rows[:300]
    merging = []
    for row in rows:
        before = tokenizer.encode(row.prompt)
        if tokenizer.encode(row.prompt + row.answer)[: len(before)] != before:
            merging.append(row)
    assert len(merging) > 30  # "The" after "Answer:"
    for row in rows:
        made = truth_row(row, tokenizer, end=False)
        assert (
            made.prompt == tokenizer.encode(row.prompt)
            and tokenizer.decode(made.answer) == row.answer
        )
    with pytest.raises(UsageError, match="merges with the end of its prompt"):
        truth_row(replace(merging[0], label=0), tokenizer, end=False)


def write_tokenizer(
    folder, config='{"eos_token_id": 257}', generation=None, bos=False
) -> Tokenizer:
    (folder / "tokenizer.json").write_text(byte_tokenizer(bos))
    (folder / "config.json").write_text(config)
    if generation is not None:
        (folder / "generation_config.json").write_text(generation)
    return Tokenizer.from_folder(folder)


@pytest.mark.parametrize(
    "config, generation, eos",
    [
        ('{"eos_token_id": 7}', None, (7,)),
        ('{"eos_token_id": [7, 8]}', None, (7, 8)),
        # as Llama 3 Instruct and Qwen3 ship
        ('{"eos_token_id": 7}', '{"eos_token_id": [9, 7]}', (9, 7)),
        ('{"eos_token_id": 7}', '{"do_sample": true}', (7,)),
        ('{"eos_token_id": 0}', None, (0,)),
        # the probabilities of all are added, so each counts once
        ('{"eos_token_id": [7, 8, 7]}', None, (7, 8)),
        ('{"eos_token_id": null}', None, ()),
        ("{}", "{}", ()),
    ],
)
def test_end_of_sequence_comes_from_the_configs(tmp_path, config, generation, eos):
    assert write_tokenizer(tmp_path, config, generation).eos_ids == eos


@pytest.mark.parametrize(
    "eos", ["{}", '"</s>"', "[7, [8]]", "1.5", "true", "-1", "1e999", "[null]", str(2**70)]
)
@pytest.mark.parametrize("file", ["config", "generation"])
def test_an_end_of_sequence_that_is_no_token_id_is_named(tmp_path, eos, file):
    wrong, fine = f'{{"eos_token_id": {eos}}}', '{"eos_token_id": 7}'
    with pytest.raises(
        UsageError, match="eos_token_id = .* is neither a token id nor a list of them"
    ) as error:
        write_tokenizer(tmp_path, *((wrong,) if file == "config" else (fine, wrong)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bos, first", [(True, [256]), (False, [])])
def test_bos_only_where_the_post_processor_adds_it(tmp_path, bos, first):
    tokenizer = write_tokenizer(tmp_path, bos=bos)
    assert tokenizer.encode("ab") == first + tokenizer.encode("ab", special=False)
    assert len(tokenizer.encode("ab", special=False)) == 2
    assert tokenizer.encode("") == first


def test_truncation_and_padding_written_in_the_file_are_not_applied(tmp_path):
    backend = Backend.from_str(byte_tokenizer(bos=True))
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    (tmp_path / "config.json").write_text("{}")
    for text in ("abcdefgh", "a"):
        backend.save(str(tmp_path / "tokenizer.json"))
        theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
        ids = Tokenizer.from_folder(tmp_path).encode(text)
        assert ids == theirs(text)["input_ids"] and len(ids) == 1 + len(text)


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(UsageError, match=r"tokenizer\.json: no such file"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(UsageError, match=r"tokenizer\.json: not a tokenizers file") as error:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match=r"generation_config\.json: not valid JSON"):
        write_tokenizer(tmp_path, generation="{")


def test_an_unknown_word_costs_a_warning():
    words = Backend(models.WordLevel({"<unk>": 0, "known": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = Tokenizer(words, ())
    with pytest.warns(UserWarning, match="'stranger' is not in the vocabulary"):
        assert tokenizer.encode("known stranger") == [1, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokenizer.encode_all(["known"]) == [[1]]


def test_tokens_beyond_the_models_vocabulary_are_named(tmp_path):
    (tmp_path / "config.json").write_text('{"vocab_size": 100, "eos_token_id": 99}')
    (tmp_path / "tokenizer.json").write_text(byte_tokenizer(bos=False))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert max(tokenizer.encode("abc")) < 100
    for read in (lambda: tokenizer.encode("é"), lambda: tokenizer.encode_all(["a", "é"])):
        with pytest.raises(
            UsageError, match="token 1.. of 'é' is beyond the model's vocab_size 100"
        ):
            read()
    (tmp_path / "config.json").write_text('{"vocab_size": 100, "eos_token_id": 100}')
    with pytest.raises(UsageError, match="eos_token_id = 100 .*vocab_size = 100"):
        Tokenizer.from_folder(tmp_path)
