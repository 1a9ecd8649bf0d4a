"""OpenAI's chat rows: the last assistant turn is the answer, the turns before it are asked as by transformers."""

import json
import shutil

import pytest
import transformers
from click.testing import CliRunner
from mistakes import refused
from test_chat import CHATML, LLAMA, checkpoint, talking  # noqa: F401

from ia2mini import FitOptions, fit, load_adapter, open_subject
from ia2mini.cli.main import main
from ia2mini.episode import with_demonstrations
from ia2mini.fitting.rows import read_own
from ia2mini.tasks import Example, world
from ia2mini.tasks.chat import ChatTemplate
from ia2mini.tasks.rows import Row
from ia2mini.tasks.turns import ALL_TURNS, PROMPT_TURNS, open_turns
from ia2mini.tokenizer import Tokenizer

QUICK = FitOptions(epochs=2, rates=(1e-2,), methods=("sft",), folds=2, chat=True)


def turn(role: str, content) -> dict:
    return {"role": role, "content": content}


LONG = [
    turn("system", "Be brief {now}."),
    turn("user", "Is it good?\n"),
    turn("assistant", "No."),
    turn("user", "And 🙂 this?"),
    turn("assistant", "Yes."),
]


@pytest.mark.parametrize("template", [CHATML, LLAMA])
@pytest.mark.parametrize("messages", [LONG, LONG[1:], LONG[3:], LONG[:4]])
def test_a_conversation_is_rendered_as_by_transformers(tmp_path, template, messages):
    folder = checkpoint(tmp_path, template)
    tokenizer = Tokenizer.from_folder(folder)
    chat = ChatTemplate(folder, tokenizer, conversations=True)
    row = open_turns(Row("row 1", {"messages": messages}), ALL_TURNS)
    answered = messages[-1]["role"] == "assistant"
    assert row.get("assistant") == (messages[-1]["content"] if answered else None)
    asked = messages[:-1] if answered else messages
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)

    def expected(turns):
        return theirs.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=True, return_dict=False
        )

    prompt = chat(row[PROMPT_TURNS])
    assert tokenizer.encode(prompt) == expected(asked)
    # of a demonstration every turn but the system's, then its answer; the row's own system's turn first
    shown = [Example(chat(json.dumps(LONG[:4])), "Perhaps.")]
    own = [each for each in asked if each["role"] != "system"]
    whole = [*LONG[1:4], turn("assistant", "Perhaps."), *own]
    if asked[0]["role"] == "system":
        whole = [asked[0], *whole]
    assert tokenizer.encode(with_demonstrations(shown, prompt)) == expected(whole)
    # a context is the system's, too, before the row's own
    context = Example("Mind the gap.", "")
    instruction = "Mind the gap."
    if asked[0]["role"] == "system":
        instruction += "\n\n" + asked[0]["content"]
    found = tokenizer.encode(with_demonstrations([context], prompt))
    assert found == expected([turn("system", instruction), *own])


def test_columns_of_a_template():
    rows = []
    for i in range(8):
        asked = turn("user", f"Is {i} good?\n")
        rows.append({"messages": [LONG[0], asked, turn("assistant", str(i % 2))]})
    kept, task = read_own(rows, (None, None, "{system}|{user}"))
    assert task.example(kept[1]).prompt == "Be brief {now}.|Is 1 good?\n"
    assert task.example(kept[1]).answer == "1" and task.labels == ("0", "1")
    parts = [{"type": "text", "text": "Is it "}, {"type": "text", "text": "good?"}]
    rows[0]["messages"][1] = turn("user", parts)
    assert read_own(rows, (None, None, "{user}"))[0][0]["user"] == "Is it good?"
    told = read_own(rows, (), chat=True)[1]
    assert told.prompt == ALL_TURNS and "the answer is 'assistant'" in told.remarks[-2]
    refused(lambda: read_own(rows), "row 1", "--chat", "--template")
    refused(lambda: read_own(rows, (None, None, ALL_TURNS)), "row 1", "--chat")
    rows[5] = {"messages": LONG}
    refused(lambda: read_own(rows, (None, None, "{user}")), "row 6", "3 turns", "--chat")


WRONG = {
    "no user": ([turn("system", "a")], "no user's turn"),
    "nothing": ([], "no user's turn"),
    "answer alone": ([turn("assistant", "a")], "no user's turn"),
    "two answers": ([turn("user", "a"), turn("assistant", "b"), turn("assistant", "c")], "no user"),
    "late system": ([turn("user", "a"), turn("system", "b"), turn("user", "c")], "not the first"),
    "tool": ([turn("user", "a"), turn("tool", "b")], "turn 2 has no role"),
    "call": ([turn("user", "a"), turn("assistant", None)], "turn 2 is no text"),
    "call beside text": (
        [turn("user", "a"), turn("assistant", "b") | {"tool_calls": [{"id": "1"}]}],
        "turn 2 is no text",
    ),
    "image": ([turn("user", [{"type": "image_url", "image_url": {}}])], "turn 1 is no text"),
    "text": (["hello"], "turn 1 has no role"),
    "number": ([turn("user", 3)], "turn 1 is no text"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_conversation_is_one_line(name):
    messages, said = WRONG[name]
    rows = [{"messages": LONG}, {"messages": messages}]
    refused(lambda: read_own(rows, (), chat=True), "row 2", said)


def test_a_blank_question_is_left_out():
    rows = []
    for i in range(8):
        asked = turn("user", f"Is {i} good?" if i else " \n")
        rows.append({"messages": [LONG[0], asked, turn("assistant", str(i % 2))]})
    for how, chat in (((), True), ((None, None, "{user}"), False)):
        kept, task = read_own(rows, how, chat=chat)
        assert len(kept) == 7 and task.remarks[0].startswith("left out for want of prompt: 1 of 8")


def test_a_column_of_the_same_name_is_refused():
    rows = [{"messages": LONG, "user": "me"}]
    refused(lambda: read_own(rows, (), chat=True), "row 1", "'user'", "rename")
    # a text in a column of that name is no conversation
    rows = [{"messages": f"text {i}", "label": i % 2} for i in range(8)]
    _, task = read_own(rows)
    assert task.prompt == "Messages: {messages}\nLabel: "


def test_fit_predict_and_score_conversations(talking, tmp_path):  # noqa: F811
    """As rows of a text and a label, asked by the same template."""
    rows = world.rows("toy-mood", "train")[4:16]
    asked = [[turn("user", row["text"])] for row in rows]
    chats = [[*one, turn("assistant", str(row["label"]))] for one, row in zip(asked, rows)]
    path = tmp_path / "chats.jsonl"
    path.write_text(
        "".join(json.dumps({"id": i, "messages": m}) + "\n" for i, m in enumerate(chats))
    )
    how = "--chat --methods sft --epochs 2 --rates 1e-2 --folds 2".split()
    words = ["fit", path, "--model", talking, *how, "--out", tmp_path / "a"]
    done = CliRunner().invoke(main, list(map(str, words)))
    assert done.exit_code == 0, done.output
    plain = fit(rows, open_subject(str(talking), "cpu"), QUICK, ("text", "label", "{text}"))
    loaded = load_adapter(tmp_path / "a")
    for name, one in loaded.report["candidates"].items():
        assert one["nll"] == pytest.approx(plain.report["candidates"][name]["nll"], abs=1e-5), name
    texts = [row["text"] for row in rows]
    expected = plain.predict_proba(texts)
    for form in (texts, [{"messages": m} for m in asked], [{"messages": m} for m in chats]):
        assert loaded.predict_proba(form) == pytest.approx(expected, abs=1e-5)
    done = CliRunner().invoke(main, ["score", str(tmp_path / "a"), str(path)])
    assert done.exit_code == 0 and "of 12 rows right" in done.output
    out = tmp_path / "out.jsonl"
    done = CliRunner().invoke(main, ["predict", str(tmp_path / "a"), str(path), "--out", str(out)])
    first = json.loads(out.read_text().splitlines()[0])
    assert done.exit_code == 0 and first["id"] == 0 and first["messages"] == chats[0]


def test_a_row_that_the_template_refuses_is_named(talking, tmp_path):  # noqa: F811
    """As templates do that want users and assistants in turn."""
    folder = shutil.copytree(talking, tmp_path / "model")
    source = (folder / "chat_template.jinja").read_text()
    check = "{% for m in messages %}{% if m.role == 'user' and loop.previtem is defined"
    check += " and loop.previtem.role == 'user' %}{{ raise_exception('two users') }}"
    check += "{% endif %}{% endfor %}"
    (folder / "chat_template.jinja").write_text(check + source)
    rows = []
    for row in world.rows("toy-mood", "train")[4:16]:
        rows.append({"messages": [turn("user", row["text"]), turn("assistant", str(row["label"]))]})
    twice = {"messages": [turn("user", "good"), *rows[0]["messages"]]}
    subject = open_subject(str(folder), "cpu")
    refused(lambda: fit([*rows, twice], subject, QUICK), "row 13: the chat template", "two users")
    refused(lambda: fit(rows, subject, QUICK, unlabelled=[twice]), "row 1: the chat template")
    fitted = fit(rows, subject, QUICK)
    refused(lambda: fitted.predict([rows[0], twice]), "row 2: the chat template", "two users")


def test_a_description_whose_conversation_is_none_is_one_line(talking, tmp_path):  # noqa: F811
    rows = [
        {"messages": [turn("user", row["text"]), turn("assistant", str(row["label"]))]}
        for row in world.rows("toy-mood", "train")[4:12]
    ]
    fit(rows, open_subject(str(talking), "cpu"), QUICK).save(tmp_path)
    spec = json.loads((tmp_path / "ia2mini.json").read_text())
    for broken in ("no JSON", "3", "[3]", '[{"role": "user"}]', "[]"):
        (tmp_path / "ia2mini.json").write_text(json.dumps({**spec, "example": broken}))
        try:
            load_adapter(tmp_path)
        except ValueError as error:
            assert "\n" not in str(error)
