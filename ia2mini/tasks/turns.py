"""Rows that hold a conversation, as OpenAI's chat files: {"messages": [{"role": "user", "content": …}, …]}.

The last turn, if it is the assistant's, is the answer. The turns before it are what is asked: all of them with --chat,
or the columns `system` and `user` of a template.
"""

import json

from ia2mini import UsageError

from .rows import Row, parse_json

MESSAGES = "messages"
ANSWER = "assistant"
PROMPT_TURNS = "messages before the answer"  # the column of what is asked, as JSON
ALL_TURNS = f"{{{PROMPT_TURNS}}}"  # the template of a prompt that is all of it
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def holds_turns(row: Row) -> bool:
    return isinstance(row.get(MESSAGES), list)


def open_turns(row: Row, template: str | None) -> Row:
    """A row whose conversation has become columns, for this template; any other row as it is. Raises UsageError.

    For `ALL_TURNS` one column is JSON of what is asked, else `system` and `user` are texts. `assistant` is the answer,
    where there is one. For `ALL_TURNS` a text is what the user says.
    """
    messages = row.get(MESSAGES)
    if template == ALL_TURNS and isinstance(row.get(PROMPT_TURNS), str):
        messages = [{"role": "user", "content": row[PROMPT_TURNS]}]
    if not isinstance(messages, list):
        return row
    turns = read_each(f"{row.where}: messages", messages)
    columns = {name: value for name, value in row.items() if name != MESSAGES}
    for name in columns:
        if name in ROLES:
            raise UsageError(f"{row.where}: both messages and a column {name!r}; rename the column")
    if turns and turns[-1]["role"] == "assistant":
        columns[ANSWER] = turns.pop()["content"]
    if not turns or turns[-1]["role"] != "user":
        raise UsageError(f"{row.where}: messages: no user's turn stands before the answer")
    if any(turn["role"] == "system" for turn in turns[1:]):
        raise UsageError(f"{row.where}: messages: a system's turn that is not the first")
    if template == ALL_TURNS:
        asked = turns[-1]["content"].strip()
        columns[PROMPT_TURNS] = json.dumps(turns, ensure_ascii=False) if asked else ""
        return Row(row.where, columns)
    prompt_turns = [turn for turn in turns if turn["role"] != "system"]
    if len(prompt_turns) > 1:
        several = f"{len(prompt_turns)} turns before the answer, and a template takes one"
        raise UsageError(f"{row.where}: messages: {several}; use --chat without a template")
    columns.update({turn["role"]: turn["content"] for turn in turns})
    return Row(row.where, columns)


def read_each(where: str, turns: list) -> list[dict[str, str]]:
    """The role and the text of each turn. Raises UsageError for whatever is no text of a known role."""
    found = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or turn.get("role") not in ROLES:
            roles = ", ".join(ROLES)
            raise UsageError(f"{where}: turn {number} has no role of {roles}: {repr(turn)[:60]}")
        content = turn.get("content")
        if isinstance(content, list):  # in parts
            parts = [part.get("text") if isinstance(part, dict) else None for part in content]
            content = "".join(parts) if all(isinstance(part, str) for part in parts) else None
        if not isinstance(content, str) or turn.get("tool_calls") or turn.get("function_call"):
            kinds = "a call of a tool, an image?"
            mend = "leave the row out, or write it as text"
            raise UsageError(f"{where}: turn {number} is no text ({kinds}); {mend}")
        found.append({"role": ROLES[turn["role"]], "content": content})
    return found


def read_turns(question: str) -> list[dict[str, str]]:
    """The turns that `open_turns` wrote as JSON. Raises UsageError for what is none."""
    where = "a conversation"
    turns = parse_json(question, where, "a list of turns is expected")
    if not isinstance(turns, list):
        raise UsageError(f"{where}: {question[:60]!r} is no list of turns")
    return read_each(where, turns)
