"""One value of a row: is it a text that can be learned from, and how it is shown where not."""

from __future__ import annotations

from manylora.corpus.layouts import RowError


def text_of(value: object, what: str, table: bool = False, optional: bool = False) -> str:
    """The text; RowError, which begins with `what`, where it is none or has nothing in it.

    optional: it may be empty. table: it comes from a format with columns, where what is left out
    is a null.
    """
    if type(value) is not str:
        if value is None and optional and table:
            return ""
        raise RowError(f"{what} {_not_text(value, table, optional)}")
    if not optional and (not value or value.isspace()):
        raise RowError(f"{what} is empty. Fill it in, or take the row out of the file.")
    return value if value.isascii() else _whole(value, what)


def task_name(value: object, what: str) -> str:
    """The name of a task as text; a whole number is one too."""
    if type(value) is int and value.bit_length() <= 64:
        return str(value)
    if not isinstance(value, str):
        raise RowError(
            f"{what} names the task and is {shown(value)}. Give it as a text or a whole number."
        )
    return text_of(value, what)


def shown(value: object) -> str:
    """A value of any type in a message, cut short before it is written out."""
    if value is None:
        return "null"
    if isinstance(value, list | dict):
        kind = "an empty" if not value else f"a {len(value)}-item"
        return f"{kind} {'list' if isinstance(value, list) else 'object'}"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | bytes):
        return ascii(value[:60])
    if isinstance(value, int) and value.bit_length() > 200:
        return "a number of many digits"
    return str(value)[:60]


def named(column: str) -> str:
    """A column in a message."""
    return f'field "{column[:40]}"'


def _not_text(value: object, table: bool, optional: bool) -> str:
    if value is None and table:
        return "is empty (null). Fill it in, or take the row out of the file."
    found = f"is {shown(value)}, not a string."
    if table:
        return f"{found} Store the column as text (pandas: frame[name].astype(str))."
    return f"{found} Write it in quotes{' or leave it out' if optional else ''}."


def _whole(text: str, what: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(
            f"{what} holds half of a surrogate pair, {text[error.start : error.end]!a}, not a "
            "character. Write the character itself."
        ) from None
    return text
