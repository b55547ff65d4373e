"""The turns of a conversation, as a row gives them.

A conversation has a user turn, ends with the assistant's, and has the system's only at its
start. Turns of one role in a row are kept as they are: many chat templates take them, and one that
does not says so when the row is encoded. A conversation to be answered is read without the
assistant's turns at its end.
"""

from __future__ import annotations

from collections.abc import Iterator

from manylora.corpus.layouts import Message, RowError, listed
from manylora.corpus.values import named, shown, text_of

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
CALLS = ("tool_calls", "function_call")


def turns_of(value: object, column: str, table: bool, unread: set[str]) -> list[Message]:
    """OpenAI's role/content or ShareGPT's from/value; what else a turn has is added to `unread`."""
    if type(value) is not list or not value:
        raise RowError(
            f"{named(column)} is {shown(value)}, not a list of messages. Write "
            '[{"role": "user", "content": ...}, {"role": "assistant", "content": ...}].'
        )
    return [
        _turn(item, f"message {number} of {named(column)}", table, column, unread)
        for number, item in enumerate(value, start=1)
    ]


def history_of(value: object, column: str, table: bool) -> Iterator[Message]:
    """The exchanges before, as [[question, answer], ...]."""
    if value is None and table:
        return
    pairs = value if isinstance(value, list) else [value]
    for number, pair in enumerate(pairs, start=1):
        what = f"pair {number} of {named(column)}"
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError(f"{what} is {shown(pair)}, not [question, answer].")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            yield Message(role=role, content=text_of(text, what, table))


def conversation(messages: list[Message], answered: bool) -> list[Message]:
    """The messages, if the turns can be learned from, or answered."""
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        raise RowError(
            f"message {roles.index('system', 1) + 1} is the system's; only the first can be. Join "
            "the system messages at the start."
        )
    if not answered:
        while roles and roles[-1] == "assistant":
            roles.pop()
    if "user" not in roles:
        raise RowError("the conversation has no user turn. Add the question, or take the row out.")
    if answered and roles[-1] != "assistant":
        raise RowError(
            f"the conversation ends with a turn of role {roles[-1]}, so its last answer is "
            "missing. Add the assistant's turn, or take the last turn out."
        )
    return messages[: len(roles)]


def _turn(item: object, what: str, table: bool, column: str, unread: set[str]) -> Message:
    if not isinstance(item, dict):
        raise RowError(f"{what} is {shown(item)}, not an object with role and content.")
    role, content = ("role", "content") if "role" in item else ("from", "value")
    if role not in item or content not in item:
        raise RowError(
            f"{what} has {listed(item)}; it needs `role` and `content`, or `from` and `value`."
        )
    name = item[role]
    if not isinstance(name, str) or name.strip().lower() not in ROLES:
        raise RowError(f"{what}: the role is {shown(name)}; known are {', '.join(ROLES)}.")
    known = ROLES[name.strip().lower()]
    if len(item) > 2:
        calls = [key for key in CALLS if item.get(key)]
        if calls:
            raise RowError(
                f"{what} has {listed(calls)}, and only text is read. Write the call as text into "
                "the content, as the model is to write it."
            )
        extra = (key for key in item if key not in (role, content) and item[key] is not None)
        unread.update(f"{column}[].{key}" for key in extra)
    # A system prompt or a tool's result may be empty; what is said and what is learned may not.
    may_be_empty = known in ("system", "tool") and item[content] == ""
    text = text_of(item[content], f"{what} ({known})", table, optional=may_be_empty)
    return Message(role=known, content=text)
