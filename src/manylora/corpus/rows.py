"""A decoded row as an example, for every format.

    prompt, input, output     user "prompt\\ninput" (the prompt alone if input is empty), assistant
    messages                  the turns as they are (see turns.py)
    prompt, output as lists   their turns one after the other (TRL's conversational form)
    system, history           a first system turn; pairs of a question and its answer before

The first row that can be used decides the layout of its file: a row of another one is a bad row.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from manylora.corpus.code_tests import code_tests
from manylora.corpus.layouts import (
    CorpusError,
    Example,
    Fields,
    Layout,
    Message,
    RowError,
    check_optional,
    find_layout,
)
from manylora.corpus.turns import conversation, history_of, turns_of
from manylora.corpus.values import named, task_name, text_of

# Of files whose every row has other columns, no more than this is kept in mind.
KEPT = 1000


class RowReader:
    """The rows of one file as examples.

    file: as it is named in messages. source: as it is named in an example's `source`.
    table: the format has columns (CSV, Parquet), so an optional value is left out as a null.
    """

    def __init__(
        self,
        file: Path | str,
        fields: Fields,
        task: str,
        answered: bool = True,
        table: bool = False,
    ) -> None:
        self.file, self.fields, self.task = str(file), fields, task
        self.source = file.name if isinstance(file, Path) else file
        self.answered, self.table = answered, table
        self.unread: set[str] = set()
        """Columns that are not read, of all rows so far; the first 1,000 of them."""
        self._named: set[str] = set()
        self._tests: dict[str, bool] = {}  # columns of tests: whether some row has tests in it
        self._layout: Layout | None = None
        self._layouts: dict[tuple[str, ...], Layout] = {}

    def example(self, row: dict[str, object], place: int | str) -> Example:
        """The row at that place; CorpusError when it cannot be used."""
        columns = tuple(row)
        try:
            layout = self._layouts.get(columns) or self._find(columns)
            name = layout.task
            task = self.task if name is None else task_name(row[name], named(name))
            messages = self._messages(row, layout)
            tests = self._code_tests(row, layout)
        except RowError as error:
            raise CorpusError(f"{self.file}:{place}: {error}") from None
        if self._layout is None:
            self._layout = layout
            self._layouts = {columns: layout}
        return Example(task, messages, f"{self.source}:{place}", tests)

    def header(self, columns: Sequence[str]) -> Layout:
        """The layout of a format that has its columns' names before its rows."""
        try:
            layout = find_layout(columns, self.fields, self.answered)
            check_optional(columns, self.fields)
        except RowError as error:
            raise CorpusError(f"{self.file}: {error}") from None
        self._note_unread(columns, layout)
        return layout

    def finish(self) -> None:
        """To be called after the last row: columns named in the recipe must have been there."""
        self.unread.update(name for name, found in self._tests.items() if not found)
        if self._layout is None:
            return
        try:
            check_optional(self._named | set(self._layout.columns), self.fields)
        except RowError as error:
            raise CorpusError(f"{self.file}: {error}") from None

    def _find(self, columns: tuple[str, ...]) -> Layout:
        layout = find_layout(columns, self.fields, self.answered)
        if self._layout is not None:
            joined = self._layout.joined(layout)
            if joined is None:
                raise RowError(
                    f"a row of the layout {layout}, where those before are {self._layout}. Give "
                    "all rows of a file the same columns, or put these rows into their own file."
                )
            self._layout = joined
        self._note_unread(columns, layout)
        self._named.update(set(columns) & set(self.fields.named))
        if len(columns) <= KEPT:
            if len(self._layouts) >= KEPT:
                self._layouts.clear()
            self._layouts[columns] = layout
        return layout

    def _note_unread(self, columns: Sequence[str], layout: Layout) -> None:
        if len(self.unread) < KEPT:
            read = layout.columns
            self.unread.update([name for name in columns if name not in read][:KEPT])

    def _code_tests(self, row: dict[str, object], layout: Layout) -> str:
        tests = code_tests(row, layout.tests) if layout.tests else ""
        for name in layout.tests:
            self._tests[name] = self._tests.get(name, False) or bool(tests)
        return tests

    def _messages(self, row: dict[str, object], layout: Layout) -> list[Message]:
        messages: list[Message] = []
        if layout.system is not None:
            system = self._text(row, layout.system, optional=True)
            if system:
                messages.append(Message(role="system", content=system))
        if layout.messages is not None:
            messages += self._turns(row, layout.messages)
            return conversation(messages, self.answered)
        if layout.history is not None:
            messages += history_of(row[layout.history], layout.history, self.table)
        assert layout.prompt is not None
        messages += self._prompt(row, layout, layout.prompt)
        listed = type(row[layout.prompt]) is list
        if layout.output is not None:
            if type(row[layout.output]) is list:
                listed = True
                messages += self._turns(row, layout.output)
            else:
                text = self._text(row, layout.output)
                messages.append(Message(role="assistant", content=text))
        return conversation(messages, self.answered) if listed else messages

    def _prompt(self, row: dict[str, object], layout: Layout, column: str) -> list[Message]:
        more = "" if layout.input is None else self._text(row, layout.input, optional=True)
        if type(row[column]) is not list:
            text = self._text(row, column)
            return [Message(role="user", content=f"{text}\n{more}" if more else text)]
        if more:
            raise RowError(
                f"{named(column)} is a list of messages, so {named(str(layout.input))} has no "
                "place in it. Write it into the messages."
            )
        return self._turns(row, column)

    def _text(self, row: dict[str, object], column: str, optional: bool = False) -> str:
        value = row[column]
        if type(value) is str and value.isascii() and (optional or (value and not value.isspace())):
            return value
        return text_of(value, named(column), self.table, optional)

    def _turns(self, row: dict[str, object], column: str) -> list[Message]:
        extra: set[str] = set()
        turns = turns_of(row[column], column, self.table, extra)
        if len(self.unread) < KEPT:
            self.unread |= extra
        return turns
