"""Ends of a text: several EOS tokens, what closes an answer, what its confidence is, texts at which to stop."""

import json
import unicodedata

import pytest
import torch
from click.testing import CliRunner
from ia2mini.models import load
from mistakes import refused
from plain import greedy_label, label_log_probability
from reference import EOS, byte_tokenizer, make_checkpoint, upstream
from test_evaluate import PROMPTS
from test_labels import near, upstreams
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from ia2mini import open_subject
from ia2mini.batch import truth_row
from ia2mini.cli.main import main
from ia2mini.fitting.answers import answer_texts
from ia2mini.fitting.predictor import FOREIGN, Predictor
from ia2mini.fitting.score import score_rows
from ia2mini.generate import Decoding, before_stop
from ia2mini.labels import Scoring, label_scores
from ia2mini.scoring import score
from ia2mini.tasks import Example, same_answer
from ia2mini.tasks.chat import ChatTemplate
from ia2mini.tasks.rows import Row
from ia2mini.tokenizer import Tokenizer

CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
FIRST, TURN = 258, 259  # <|end_of_text|> and <|im_end|>


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = make_checkpoint(tmp_path_factory.mktemp("ends") / "m", "qwen3", num_hidden_layers=2)
    return folder, *load(folder)


def several_ends(folder, eos, **files) -> Tokenizer:
    """A tokenizer with the ends 257 to 259, and what each JSON file of its checkpoint says."""
    backend = Backend.from_str(byte_tokenizer(bos=False))
    backend.add_special_tokens(["<|end_of_text|>", "<|im_end|>", "<|im_start|>"])
    backend.save(str(folder / "tokenizer.json"))
    config = {"eos_token_id": eos, "vocab_size": backend.get_vocab_size()}
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return Tokenizer.from_folder(folder)


@pytest.mark.parametrize(
    "eos, files, closing, ends",
    [
        ([FIRST, EOS, TURN], {}, [FIRST], (FIRST, EOS, TURN)),
        (
            [FIRST, EOS, TURN],
            {"tokenizer_config": {"eos_token": "<|im_end|>"}},
            [TURN],
            (FIRST, EOS, TURN),
        ),
        (
            [FIRST, TURN],
            {"tokenizer_config": {"eos_token": {"content": "<|im_end|>"}}},
            [TURN],
            (FIRST, TURN),
        ),
        (
            [FIRST, TURN],
            {"special_tokens_map": {"eos_token": {"content": "<|im_end|>"}}},
            [TURN],
            (FIRST, TURN),
        ),
        (None, {"tokenizer_config": {"eos_token": "<|im_end|>"}}, [TURN], (TURN,)),
        (FIRST, {"tokenizer_config": {"eos_token": "<|im_end|>"}}, [TURN], (FIRST, TURN)),
        (FIRST, {"tokenizer_config": {"eos_token": "not there"}}, [FIRST], (FIRST,)),
        (None, {"tokenizer_config": {"eos_token": None}}, [], ()),
        (FIRST, {"generation_config": {"eos_token_id": [FIRST, TURN]}}, [FIRST], (FIRST, TURN)),
    ],
)
def test_an_answer_is_closed_as_the_tokenizer_says(tmp_path, eos, files, closing, ends):
    tokenizer = several_ends(tmp_path, eos, **files)
    assert tokenizer.closing == closing and tokenizer.eos_ids == ends
    row = truth_row(Example("Q:", "yes"), tokenizer, end=True)
    assert row.answer == tokenizer.encode("yes") + closing
    assert truth_row(Example("Q:", "yes"), tokenizer, end=False).answer == tokenizer.encode("yes")


def test_a_turn_is_closed_as_the_chat_template_says(tmp_path):
    """And generation of an adapter that talks ends there, also where the config does not name that token."""
    tokenizer = several_ends(
        tmp_path, FIRST, tokenizer_config={"eos_token": "<|end_of_text|>", "chat_template": CHATML}
    )
    chat = ChatTemplate(tmp_path, tokenizer)
    assert truth_row(Example(chat("hi"), "yo"), tokenizer, end=True).answer == [
        *tokenizer.encode("yo"),
        TURN,
    ]
    assert truth_row(Example("hi", "yo"), tokenizer, end=True).answer == [
        *tokenizer.encode("yo"),
        FIRST,
    ]
    assert chat.tokenizer.eos_ids == (FIRST, TURN) and chat.tokenizer.closing == [TURN]
    assert tokenizer.closing == [FIRST] and tokenizer.eos_ids == (FIRST,), (
        "another use of it stays as it was"
    )


@pytest.mark.parametrize(
    "template, end",
    [
        ("{% for m in messages %}{{ m.content }}</s>{% endfor %}", EOS),
        ("{% for m in messages %}{{ m.content }}\n<|im_end|></s>{% endfor %}", TURN),
        ("{% for m in messages %}{{ m.content }}\n\n{% endfor %}", None),
        ("{% for m in messages %}{{ m.content | upper }}</s>{% endfor %}", None),
        (
            "{% if messages[1] is defined %}{{ raise_exception('one turn') }}{% endif %}{{ messages[0].content }}",
            None,
        ),
    ],
)
def test_what_a_template_writes_after_an_answer(tmp_path, template, end):
    tokenizer = several_ends(tmp_path, FIRST, tokenizer_config={"chat_template": template})
    chat = ChatTemplate(tmp_path, tokenizer)
    assert chat.end == end and chat.tokenizer.closing == [FIRST if end is None else end]


@pytest.mark.parametrize("among", [None, 10])
@pytest.mark.parametrize("ends", [(EOS,), (3, EOS), (EOS, 3, 7, 200)])
def test_a_label_ends_with_any_end_of_sequence(tiny, ends, among):
    """Its probability by transformers: that of its tokens, times the sum over all ends."""
    folder, model, _ = tiny
    following = upstreams(upstream(folder))
    labels = near(following, PROMPTS)[:5] + [[70], [70, 71]]
    closed = [[*label, ends[0]] for label in labels]
    scores = label_scores(model, PROMPTS, closed, Scoring(top_k=among, ends=ends))
    for q, prompt in enumerate(PROMPTS):
        for label, found in zip(labels, scores.log_probabilities[0, q].tolist(), strict=True):
            last = (
                following(prompt + label).double().log_softmax(-1)[list(ends)].logsumexp(-1).item()
            )
            assert found == pytest.approx(
                label_log_probability(following, prompt, label) + last, abs=1e-4
            )


def test_greedy_decoding_gives_a_label_at_whatever_end_it_comes_to():
    """A plain table: after the label the second end is likeliest."""
    from test_labels import Chain

    a, b, first, second = range(4)
    table = torch.zeros(1, 5, 5)
    for token, then in {4: a, a: second, b: first}.items():
        table[0, token, then] = 5.0
    p = table[0].softmax(-1)
    for ends, top, sure in (
        ((first,), -1, p[4, a] * p[a, second]),
        ((first, second), 0, p[4, a] * (p[a, first] + p[a, second])),
    ):
        scores = label_scores(Chain(table), [[4]], [[a, first], [a, b, first]], Scoring(ends=ends))
        assert scores.top.tolist() == [[top]] and scores.confidence.item() == pytest.approx(
            sure.item(), rel=1e-5
        )


def plain_text(net, tokenizer, ids, most, stop=None) -> tuple[list[int], list[float]]:
    """What is generated greedily by transformers, a pass a token, and the log-probability of each token."""
    said, logs = [], []
    while len(said) < most:
        with torch.no_grad():
            p = net(torch.tensor([ids + said])).logits[0, -1].double().log_softmax(-1)
        said.append(p.argmax().item())
        ended = said[-1] in tokenizer.eos_ids
        logs.append(p[list(tokenizer.eos_ids)].logsumexp(0).item() if ended else p[said[-1]].item())
        if ended or stop and stop in tokenizer.decode(said):
            break
    return said, logs


def test_the_confidence_of_a_text_is_that_of_what_was_generated(tiny):
    """By an end of sequence, by the stop text and by the limit; an empty answer too."""
    folder, model, tokenizer = tiny
    net = upstream(folder)
    free = Tokenizer(tokenizer.backend, ())
    prompts = [*PROMPTS, [9, 9, 9], [100, 7]]
    plain = [plain_text(net, free, ids, 6)[0] for ids in prompts]
    ends = (plain[0][2], plain[1][0], EOS)
    letters = [
        tokenizer.decode([token]) for said in plain[2:] for token in said if token not in ends
    ]
    stop = next(letter for letter in letters if letter.isascii() and letter.isprintable())
    ending = Tokenizer(tokenizer.backend, ends)
    kinds = set()
    for text_stop in (None, stop):
        texts, sure = zip(*answer_texts(model, ending, prompts, Decoding(6, text_stop)))
        for ids, text, found in zip(prompts, texts, sure, strict=True):
            said, logs = plain_text(net, ending, ids, 6, text_stop)
            kinds.add("end" if said[-1] in ends else "limit" if len(said) == 6 else "stop")
            kept = said[:-1] if said[-1] in ends else said
            assert text == ending.decode(kept).split(text_stop or "never")[0]
            assert found == pytest.approx(torch.tensor(logs).mean().exp().item(), rel=1e-4)
        assert "" in texts
    assert kinds == {"end", "limit", "stop"}


def test_labels_of_which_one_begins_another_need_an_end(tmp_path):
    tokenizer = several_ends(tmp_path, None)
    for labels in (("1", "10"), ("10", "1", "100"), ("yes", "no", "yes, but")):
        refused(
            lambda labels=labels: tokenizer.label_tokens("Label:", labels),
            "begins label",
            "eos_token_id",
        )
    assert len(tokenizer.label_tokens("Label:", ("1", "2", "01"))) == 3
    said = several_ends(tmp_path, None, tokenizer_config={"eos_token": "</s>"})
    assert [ids[-1] for ids in said.label_tokens("Label:", ("1", "10"))] == [EOS, EOS]


LONG = [
    "a friendly thank you note for everyone there",
    "the parcel never came and nobody has called yet",
    "other",
]


@pytest.fixture(scope="module")
def sharp(tmp_path_factory):
    """A model of which every logit is far from the others: a label has a probability below the smallest float32."""
    folder = make_checkpoint(tmp_path_factory.mktemp("sharp") / "m", "llama", num_hidden_layers=2)
    net = upstream(folder)
    with torch.no_grad():
        net.lm_head.weight *= 6
    net.save_pretrained(folder.parent / "n")
    (folder.parent / "n/model.safetensors").replace(folder / "model.safetensors")
    return folder


def test_labels_less_likely_than_the_smallest_float32_are_told_apart(sharp):
    following = upstreams(upstream(sharp))
    subject = open_subject(str(sharp), "cpu")
    spec = {"template": "{text}", "labels": LONG, "temperature": 30.0}
    fitted = Predictor(subject, None, None, FOREIGN | spec)
    rows = [
        Row(f"row {i}", {"text": f"Ticket: number {i}\nClass:", "label": LONG[i % 2]})
        for i in range(6)
    ]
    labels, losses = [subject.tokenizer.encode(label, special=False) for label in LONG], []
    for row, found in zip(rows, fitted.answer_rows(rows), strict=True):
        ids = subject.tokenizer.encode(row["text"])
        logs = torch.tensor(
            [label_log_probability(following, ids, label) for label in labels]
        ).double()
        assert logs[:2].max() < -150
        shares = (logs / 30).softmax(-1)
        assert found["answer"] == LONG[shares.argmax()]
        assert list(found["probabilities"].values()) == pytest.approx(
            shares.tolist(), rel=1e-3, abs=1e-12
        )
        losses.append(-(logs / 30).log_softmax(-1)[LONG.index(row["label"])].item())
    numbers = score_rows(fitted, rows, False)["candidates"]["adapter"]
    assert numbers["nll"][0] == pytest.approx(sum(losses) / 6, rel=1e-4)
    examples = [Example(row["text"], row["label"], LONG.index(row["label"])) for row in rows]
    (measured,) = score(subject.model, subject.tokenizer, examples, tuple(LONG))
    whole = [
        -label_log_probability(following, subject.tokenizer.encode(e.prompt), labels[e.label])
        for e in examples
    ]
    assert measured["nll"] == pytest.approx(sum(whole) / 6, rel=1e-4) and measured["nll"] > 150


def test_shares_far_beyond_float32_count_in_a_score(sharp):
    """At temperature 1 the true label's share is below 1e-87: its loss is not cut off."""
    following = upstreams(upstream(sharp))
    subject = open_subject(str(sharp), "cpu")
    fitted = Predictor(subject, None, None, FOREIGN | {"template": "{text}", "labels": LONG})
    rows = [
        Row(f"row {i}", {"text": f"Ticket: number {i}\nClass:", "label": LONG[i % 2]})
        for i in range(4)
    ]
    labels, losses = [subject.tokenizer.encode(label, special=False) for label in LONG], []
    for row in rows:
        ids = subject.tokenizer.encode(row["text"])
        logs = torch.tensor(
            [label_log_probability(following, ids, label) for label in labels]
        ).double()
        losses.append(-logs.log_softmax(-1)[LONG.index(row["label"])].item())
    assert max(losses) > 200
    assert score_rows(fitted, rows, False)["candidates"]["adapter"]["nll"][0] == pytest.approx(
        sum(losses) / 4, rel=1e-4
    )


def letters(*more: str) -> Tokenizer:
    """A tokenizer of one token a byte, and special tokens after them."""
    backend = Backend(
        models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(more))
    return Tokenizer(backend, ())


@pytest.mark.parametrize(
    "stop", ["é", "日本", "🙂", "🙂🙂", "。\n", "né", "\u200d", "\r\n", "END", " ", "¡"]
)
@pytest.mark.parametrize("before", ["", "x", "né", "日", "🙂 and", "\n", "ab" * 20])
def test_a_stop_text_of_characters_of_several_tokens_stops(stop, before):
    """As a search in the text, after every token."""
    tokenizer = letters()
    ids, said = tokenizer.encode(before + stop + "more"), []
    for token in ids:
        said.append(token)
        found = before_stop(tokenizer, said, stop)
        text = tokenizer.decode(said)
        assert (found is not None) == (stop in text)
        if found is not None:
            assert tokenizer.decode(found) == text[: text.index(stop)]
            break
    assert found is not None


def test_a_stop_text_may_be_a_special_token():
    tokenizer = letters("<|next|>", "<|other|>")
    ids = tokenizer.encode("ab<|other|>c<|next|>")
    assert before_stop(tokenizer, ids, "<|next|>") == ids[:-1]
    assert before_stop(tokenizer, ids[:-1], "<|next|>") is None


def test_a_line_end_on_the_command_line_is_one():
    """The embedded model answers with a label and a blank line."""
    how = [
        "generate",
        "--device",
        "cpu",
        "--max-tokens",
        "8",
        "--prompt",
        "Text:good\nLabel:1\n\nText:bad\nLabel:",
    ]
    assert CliRunner().invoke(main, how).stdout.startswith("0\n\nText:")
    for stop, kept in (("\\n", "0"), ("\n", "0"), ("\\n\\n", "0"), ("\\nText", "0\n")):
        result = CliRunner().invoke(main, [*how, "--stop", stop])
        assert result.exit_code == 0 and result.stdout == kept + "\n"
    empty = CliRunner().invoke(main, [*how, "--stop", ""])
    assert empty.exit_code == 2 and "--stop is empty" in empty.stderr


@pytest.mark.parametrize("parser", ["text", "hashes", "boxed"])
@pytest.mark.parametrize("answer", ["café", "Zürich", "naïve", "señor", "Ångström", "각", "ế", "क़"])
def test_accents_may_be_written_either_way(parser, answer):
    text = {"text": "{}", "hashes": "so\n#### {}", "boxed": r"\boxed{{{}}}"}[parser].format(answer)
    forms = [unicodedata.normalize(form, text) for form in ("NFC", "NFD")]
    assert forms[0] != forms[1] or answer == "क़"
    assert all(same_answer(parser, one, other) for one in forms for other in forms)
    assert not same_answer(
        parser, forms[0], forms[1].replace(unicodedata.normalize("NFD", answer), "cafe")
    )


def test_nothing_else_of_a_label_is_greedy(tiny):
    """Without ends the greedy label is as before, by a plain loop."""
    folder, model, _ = tiny
    following = upstreams(upstream(folder))
    labels = near(following, PROMPTS)
    scores = label_scores(model, PROMPTS, labels, Scoring(ends=(EOS, 3)))
    for q, prompt in enumerate(PROMPTS):
        top, confidence = greedy_label(following, prompt, labels)
        assert scores.top[0, q] == top and scores.confidence[0, q].item() == pytest.approx(
            confidence, rel=1e-4
        )
