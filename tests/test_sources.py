"""Sources: the same rows from any kind of file and from a hub look-alike, and a clear line for every mistake."""

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import types
import zipfile
from dataclasses import replace

import pytest
from hub import TOKEN, connect, serve
from tables import SST2, parquet_bytes, write_rows

from ia2mini import UsageError
from ia2mini.tasks import custom_task, find_task, load_examples
from ia2mini.tasks.sources import PARQUET


def test_the_same_rows_from_every_kind_of_file(tmp_path):
    digests = set()
    for kind in ("jsonl", "json", "parquet", "csv", "tsv"):
        write_rows(tmp_path / kind / "sst2" / f"validation.{kind}", SST2)
        found = load_examples(find_task("sst2"), "eval", tmp_path / kind)
        digests.add(found.origin["digest"])
        assert (found.origin["rows"], found.origin["used"], len(found.rows)) == (40, 40, 40)
        assert {(e.prompt, e.label) for e in found.rows} == {
            (f"Text:{row['sentence']}\nLabel:", row["label"]) for row in SST2
        }
    assert len(digests) == 1
    assert len(load_examples(find_task("sst2"), "eval", tmp_path / "csv", limit=7).rows) == 7


@pytest.mark.parametrize(
    "place",
    [
        "gsm_symbolic/test.csv",
        "gsm_symbolic/main_test.jsonl",
        "GSM-Symbolic/main/test.parquet",
        "gsm8ks/test.tsv",
        "gsm8ks/main_test.json",
    ],
)
def test_spellings_of_a_local_folder(tmp_path, place):
    write_rows(tmp_path / place, [{"question": "q", "answer": "#### 1"}])
    assert load_examples(find_task("gsm8ks"), "eval", tmp_path).origin["files"] == [
        str(tmp_path / place)
    ]


def test_what_was_looked_for_is_listed(tmp_path):
    listed = "no rows of gsm8ks there; looked for gsm_symbolic|GSM-Symbolic|gsm8ks / test|main_test|main/test + "
    with pytest.raises(UsageError, match=re.escape(listed + ".jsonl|.json|.parquet|.csv|.tsv")):
        load_examples(find_task("gsm8ks"), "eval", tmp_path)


def test_of_two_files_parquet_comes_before_csv(tmp_path):
    write_rows(tmp_path / "sst2" / "validation.csv", SST2[:3])
    write_rows(tmp_path / "sst2" / "validation.parquet", SST2[:5])
    assert load_examples(find_task("sst2"), "eval", tmp_path).origin["rows"] == 5


def test_wrong_rows_name_file_and_line(tmp_path):
    path = tmp_path / "sst2" / "validation.csv"
    wrong = {
        "text,label\nx,0\n": "validation.csv:2: no column 'sentence'; the columns there are 'text', 'label'",
        "sentence,label\nx,0\nx,2\n": "validation.csv:3: unknown label '2' in column 'label'; known labels: '0', '1'",
    }
    for rows, message in wrong.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(rows)
        with pytest.raises(UsageError, match=message):
            load_examples(find_task("sst2"), "eval", tmp_path)
    write_rows(
        tmp_path / "financial_phrasebank" / "train.jsonl", [{"sentence": "x", "label": 0}] * 500
    )
    with pytest.raises(UsageError, match="finsen: no rows left to train on, of 500"):
        load_examples(find_task("finsen"), "train", tmp_path)


def sst2_repo(shards=1):
    parts = [SST2[i * len(SST2) // shards : (i + 1) * len(SST2) // shards] for i in range(shards)]
    files = {
        f"default/validation/{i:04}.parquet": parquet_bytes(part) for i, part in enumerate(parts)
    }
    return {
        ("dataset", "stanfordnlp/sst2"): {
            "main": {"README.md": b"# sst2"},
            PARQUET: {
                "README.md": b"",
                "default/train/0000.parquet": parquet_bytes(SST2[:9]),
                **files,
            },
        }
    }


@pytest.mark.parametrize("shards", [1, 3])
def test_the_same_rows_from_the_hub(tmp_path, monkeypatch, shards):
    write_rows(tmp_path / "sst2" / "validation.jsonl", SST2)
    local = load_examples(find_task("sst2"), "eval", tmp_path)
    with serve(sst2_repo(shards)) as hub:
        connect(monkeypatch, hub, tmp_path)
        found = load_examples(find_task("sst2"), "eval")
        assert found.rows == local.rows and found.origin["digest"] == local.origin["digest"]
        assert found.origin["revision"] == hub.commit("dataset", "stanfordnlp/sst2", PARQUET)
        assert found.origin["files"] == [
            f"default/validation/{i:04}.parquet" for i in range(shards)
        ]
        # only the files needed
        assert not any("default/train" in request["path"] for request in hub.requests)
        before = sum(request["path"].startswith("/cdn/") for request in hub.requests)
        load_examples(find_task("sst2"), "eval")
        again = sum(request["path"].startswith("/cdn/") for request in hub.requests)
        assert again == before == shards  # the second time from the cache


def test_the_cache_serves_when_the_hub_does_not(tmp_path, monkeypatch):
    with serve(sst2_repo(2)) as hub:
        connect(monkeypatch, hub, tmp_path)
        first = load_examples(find_task("sst2"), "eval")
    # nobody listens at that address any more
    assert load_examples(find_task("sst2"), "eval") == first
    with pytest.raises(
        UsageError,
        match=f"no Parquet folder default/train in branch {PARQUET}; found default/validation; the hub cannot",
    ):
        load_examples(find_task("sst2"), "train")
    connect(monkeypatch, hub, tmp_path, offline=True)
    assert load_examples(find_task("sst2"), "eval") == first
    with pytest.raises(UsageError, match="fancyzhx/ag_news: not in the local cache"):
        load_examples(find_task("agnews"), "eval")
    code = "from ia2mini.tasks import *; print(load_examples(find_task('sst2'), 'eval').origin['digest'])"
    environment = os.environ | hub.environment(tmp_path) | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.stdout.strip() == first.origin["digest"], done.stderr
    next((tmp_path / "hub").rglob("validation/0001.parquet")).unlink()
    # rather than half the rows
    with pytest.raises(UsageError, match="stanfordnlp/sst2: not in the local cache"):
        load_examples(find_task("sst2"), "eval")


def test_no_network_is_said(tmp_path, monkeypatch):
    with serve({}) as hub:
        connect(monkeypatch, hub, tmp_path)
    with pytest.raises(
        UsageError,
        match=r"stanfordnlp/sst2: cannot be downloaded \(ConnectError.*check the network",
    ):
        load_examples(find_task("sst2"), "eval")


def test_a_cut_download_resumes_or_fails_cleanly(tmp_path, monkeypatch):
    from huggingface_hub import constants, file_download

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50)
    monkeypatch.setattr(file_download, "time", types.SimpleNamespace(sleep=lambda seconds: None))
    name = "default/validation/0000.parquet"
    with serve(sst2_repo()) as hub:
        connect(monkeypatch, hub, tmp_path)
        hub.cut[name] = [100] + [0] * 20  # never comes further
        with pytest.raises(
            UsageError, match=r"stanfordnlp/sst2: cannot be downloaded \(RemoteProtocolError"
        ) as caught:
            load_examples(find_task("sst2"), "eval")
        assert "\n" not in str(caught.value)
        assert not list((tmp_path / "hub").rglob("*.incomplete")) and not list(
            (tmp_path / "hub").rglob("*.parquet")
        )
        hub.cut[name] = [100, 50]
        hub.requests.clear()
        assert len(load_examples(find_task("sst2"), "eval").rows) == 40
        ranges = [
            request["range"] for request in hub.requests if request["path"].startswith("/cdn/")
        ]
        assert ranges == [None, "bytes=100-", "bytes=150-"]


def test_what_the_hub_may_refuse(tmp_path, monkeypatch):
    task = find_task("sst2")
    repos = {
        ("dataset", "a/no-branch"): {"main": {}},
        ("dataset", "a/no-split"): {
            PARQUET: {"x/validation/0000.parquet": b"", "y/validation/0.parquet": b""}
        },
        ("dataset", "a/gated"): sst2_repo()["dataset", "stanfordnlp/sst2"],
    }
    refusals = {
        "a/absent": "a/absent: no such dataset on the hub",
        "a/no-branch": f"has no revision {PARQUET}",
        "a/no-split": f"no Parquet folder default/validation in branch {PARQUET}; found x/validation, y/validation",
        "a/gated": "a/gated is gated: accept its terms at https://huggingface.co/datasets/a/gated, then log in",
    }
    with serve(repos, gated=("a/gated",)) as hub:
        connect(monkeypatch, hub, tmp_path)
        for repo, message in refusals.items():
            with pytest.raises(UsageError, match=message) as caught:
                load_examples(replace(task, hub=repo), "eval")
            assert "\n" not in str(caught.value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        assert len(load_examples(replace(task, hub="a/gated"), "eval").rows) == 40
        assert not any(
            request["token"] for request in hub.requests if request["path"].startswith("/cdn/")
        )


@pytest.mark.parametrize(
    "configs, wanted",
    [(("default", "main"), "main"), (("default", "socratic"), "default"), (("only",), "only")],
)
def test_the_config_folder_is_matched_not_guessed(tmp_path, monkeypatch, configs, wanted):
    files = {
        f"{config}/test/0000.parquet": parquet_bytes([{"question": config, "answer": "#### 1"}])
        for config in configs
    }
    with serve({("dataset", "openai/gsm8k"): {PARQUET: files}}) as hub:
        connect(monkeypatch, hub, tmp_path)
        assert (
            load_examples(find_task("gsm8k"), "eval").rows[0].prompt
            == f"Question:{wanted}\nAnswer:"
        )


def test_nested_columns_from_parquet(tmp_path, monkeypatch):
    rows = [
        {
            "question": "Q?",
            "choices": {"text": list("abcdefgh"), "label": list("ABCDEFGH")},
            "answerKey": "H",
        }
    ]
    with serve(
        {
            ("dataset", "allenai/qasc"): {
                PARQUET: {"default/validation/0000.parquet": parquet_bytes(rows)}
            }
        }
    ) as hub:
        connect(monkeypatch, hub, tmp_path)
        hubbed = load_examples(find_task("qasc_remap"), "eval").rows
    write_rows(tmp_path / "qasc" / "validation.jsonl", rows)
    assert (
        hubbed == load_examples(find_task("qasc_remap"), "eval", tmp_path).rows
        and hubbed[0].answer == "Monday"
    )


def test_financial_phrasebank_from_its_zip(tmp_path, monkeypatch, shared_data):
    rows = [
        json.loads(line)
        for line in (shared_data / "financial_phrasebank/train.jsonl")
        .read_text(encoding="utf-8")
        .split("\n")
        if line
    ]
    names = ("negative", "neutral", "positive")
    text = "".join(f"{row['sentence']}@{names[row['label']]}\r\n" for row in rows).encode("latin-1")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("__MACOSX/FinancialPhraseBank-v1.0/._Sentences_50Agree.txt", b"not it")
        archive.writestr("FinancialPhraseBank-v1.0/Sentences_50Agree.txt", text)
    task, data = find_task("finsen"), buffer.getvalue()
    name, _, member = task.archive
    with serve(
        {("dataset", task.hub): {"main": {name: data, "financial_phrasebank.py": b"script"}}}
    ) as hub:
        connect(monkeypatch, hub, tmp_path)
        for role in ("train", "eval"):
            found = load_examples(
                replace(task, archive=(name, hashlib.sha256(data).hexdigest(), member)), role
            )
            assert found.rows == load_examples(task, role, shared_data).rows
        assert found.origin["revision"] == hub.commit("dataset", task.hub, "main")
        with pytest.raises(
            UsageError,
            match="FinancialPhraseBank-v1.0.zip: missing, or not the published file of sha256 0e1a06c4",
        ):
            load_examples(task, "eval")
        hub.repos["dataset", task.hub]["main"] = {}
        with pytest.raises(UsageError, match="missing, or not the published file"):
            load_examples(task, "eval")


def test_strategytf_falls_back_and_says_so(tmp_path, monkeypatch):
    rows = [{"question": f"q{i}", "answer": i % 2 == 0} for i in range(600)]
    one = {
        ("dataset", "wics/strategy-qa"): {
            PARQUET: {"default/test/0000.parquet": parquet_bytes(rows)}
        }
    }
    other = {
        ("dataset", "ChilleD/StrategyQA"): {
            PARQUET: {
                "default/train/0000.parquet": parquet_bytes(rows[:400]),
                "default/test/0000.parquet": parquet_bytes(rows[400:]),
            }
        }
    }
    digests = set()
    for case, repos in enumerate((one | other, other)):
        with serve(repos) as hub:
            connect(monkeypatch, hub, tmp_path / str(case))
            found = load_examples(find_task("strategytf"), "eval")
        digests.add(found.origin["digest"])
        assert len(found.rows) == 500 and found.origin["hub"] == (
            "ChilleD/StrategyQA" if case else "wics/strategy-qa"
        )
    assert len(digests) == 1
    assert (
        found.origin["instead_of"] == "wics/strategy-qa"
        and "no such dataset" in found.origin["because"]
    )


def test_forty_lines_of_ones_own(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text(
        "text,label\n" + "".join(f'"Nr {i}, said",{("bad", "good")[i % 2]}\n' for i in range(40))
    )
    task = custom_task(path, "text", "label")
    assert (task.name, task.labels, task.evals, task.max_tokens) == (
        "mine",
        ("bad", "good"),
        ("mine",),
        1,
    )
    pool, held = (load_examples(task, role) for role in ("train", "eval"))
    assert (len(pool.rows), len(held.rows)) == (20, 20)
    assert {e.prompt for e in pool.rows + held.rows} == {
        f"Text: Nr {i}, said\nLabel:" for i in range(40)
    }
    assert all(
        e.answer.strip()
        == task.labels[e.label]
        == ("bad", "good")[int(e.prompt.split()[2][:-1]) % 2]
        for e in pool.rows
    )
    assert load_examples(custom_task(path, "text", "label"), "train") == pool


def test_labels_may_have_several_words(tmp_path):
    rows = [
        {"text": f"t{i}", "label": ("not at all", "not quite", "yes")[i % 3]} for i in range(60)
    ]
    task = custom_task(write_rows(tmp_path / "mine.jsonl", rows), "text", "label")
    assert (task.labels, task.max_tokens, task.parser) == (
        ("not at all", "not quite", "yes"),
        1,
        None,
    )
    for example in load_examples(task, "train").rows:
        number = int(example.prompt.removeprefix("Text: t").removesuffix("\nLabel:"))
        label = task.labels[example.label]
        assert example.answer == f" {label}" and label == rows[number]["label"]


def test_repeated_prompts_are_not_on_both_sides(tmp_path):
    rows = [{"text": f"t{i % 100}", "label": i // 100} for i in range(300)]
    task = custom_task(write_rows(tmp_path / "rows.jsonl", rows), "text", "label")
    pool, held = (load_examples(task, role).rows for role in ("train", "eval"))
    assert len(pool) == 80 and len(held) == 20 and len({e.prompt for e in pool + held}) == 100
    assert {e.answer for e in pool + held} == {" 0"}  # the first of the repeated rows counts


def test_a_file_for_evaluation_and_a_template(tmp_path):
    train = write_rows(
        tmp_path / "train.parquet",
        [{"a": f"x{i}", "b c": "y", "label": str(i % 3)} for i in range(30)],
    )
    other = write_rows(tmp_path / "other.tsv", [{"a": "z", "b c": "w", "label": "2"}])
    task = custom_task(train, "a", "label", r"A:{a}\nB:{b c}\nLabel:", other)
    assert task.labels == ("0", "1", "2")
    assert len(load_examples(task, "train").rows) == 30
    (example,) = load_examples(task, "eval").rows
    assert (example.prompt, example.answer, example.label) == ("A:z\nB:w\nLabel:", "2", 2)
    write_rows(other, [{"a": "z", "b c": "w", "label": "7"}])
    with pytest.raises(
        UsageError,
        match=r"other.tsv:2: unknown label '7' in column 'label'; known labels: '0', '1', '2'",
    ):
        load_examples(task, "eval")


def test_rows_that_are_trained_on_and_evaluated_are_counted(tmp_path):
    rows = [{"text": f"x {i}", "label": str(i % 2)} for i in range(30)]
    train = write_rows(tmp_path / "train.jsonl", rows)
    both = write_rows(tmp_path / "both.jsonl", [rows[3], {"text": "new", "label": "1"}])
    told = "1 of 2 evaluation rows have a prompt of the rows to train on"
    assert told in custom_task(train, eval_path=both).remarks[-1]
    fresh = write_rows(tmp_path / "fresh.jsonl", [{"text": "new", "label": "1"}])
    assert not any("to train on" in one for one in custom_task(train, eval_path=fresh).remarks)


def test_answers_that_are_text_and_their_parsers(tmp_path):
    for answers, parser in {
        ("so #### 1,0", "#### 2"): "number",
        (r"is \boxed{a}", r"\boxed{b}"): "boxed",
        ("one #### way", "another #### 3"): "hashes",
        ("one way", "another #### 3"): "text",
    }.items():
        rows = [{"q": f"{i}", "a": f"{i}{answers[i % 2]}"} for i in range(50)]
        task = custom_task(write_rows(tmp_path / "text.jsonl", rows), "q", "a")
        assert (task.labels, task.parser, task.max_tokens) == ((), parser, 200)
        example = load_examples(task, "train").rows[0]
        assert (
            example.prompt.startswith("Question:")
            and example.prompt.endswith("\nAnswer:")
            and example.label is None
        )
        assert (len(load_examples(task, "train").rows), len(load_examples(task, "eval").rows)) == (
            30,
            20,
        )


def test_what_is_wrong_with_ones_own_rows(tmp_path):
    path = write_rows(
        tmp_path / "mine.jsonl", [{"text": f"t{i}", "label": i % 2} for i in range(8)]
    )
    templates = {
        "Text:{txt}": "mine.jsonl:1: no column 'txt'; the columns there are 'text', 'label'",
        "Text:{}": "mine.jsonl:1: no column ''",
        "Text:": "template 'Text:': must name a column of the prompt, as {text}",
        "{text} {label}": "and not the answer's",
    }
    for template, message in templates.items():
        with pytest.raises(UsageError, match=message):
            custom_task(path, "text", "label", template)
    with pytest.raises(UsageError, match="mine.jsonl:1: no column 'sentence'"):
        custom_task(path, "sentence", "label")
    with pytest.raises(UsageError, match="mine.jsonl:1: no column 'answer'"):
        custom_task(path, "text", "answer")
    rows = [{"text": f"t{i}", "label": "0"} for i in range(8)]
    for nothing in (None, " ", "NaN"):
        write_rows(tmp_path / "odd.jsonl", [*rows, {"text": "t", "label": nothing}])
        with pytest.raises(UsageError, match="every row has the answer '0'"):
            custom_task(tmp_path / "odd.jsonl", "text", "label")
