"""The tests of a code row: kept beside the conversation for pass@k, and never learned from.

    tests                   Python code, or a list of it
    test_list               MBPP's (arXiv 2108.07732); perhaps test_setup_code and test_imports,
                            which go first
    test, entry_point       HumanEval's (arXiv 2107.03374): test defines `check`, which is called
                            with the function of that name

The first of these lines whose first column a row has (of the last, both columns), upper and lower
case taken as one. The text is Python that asserts something, to be run after the answer; of a
column that holds anything else nothing is kept, as of every column that is not known.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Collection, Sequence

_FORMS = (
    ("tests",),
    ("test_list", "test_setup_code", "test_imports"),
    ("test", "entry_point"),
)


def columns_of_tests(columns: Sequence[str], taken: Collection[str]) -> tuple[str, ...]:
    """The columns that hold a row's tests; none where it has none. taken: those read already."""
    free = {name.strip().casefold(): name for name in columns if name not in taken}
    for form in _FORMS:
        if form[0] in free and (form[0] != "test" or "entry_point" in free):
            return tuple(free[name] for name in form if name in free)
    return ()


def code_tests(row: dict[str, object], columns: Sequence[str]) -> str:
    """The tests as one text, with nothing in it where these columns hold none."""
    values = {name.strip().casefold(): row[name] for name in columns}
    if "entry_point" in values:
        parts = [*_texts(values["test"]), f"check({values['entry_point']})"]
    else:
        order = ("test_imports", "test_setup_code", "test_list", "tests")
        parts = [text for name in order for text in _texts(values.get(name))]
    tests = "\n".join(part for part in parts if part.strip())
    return tests if _asserts(tests) else ""


def _texts(value: object) -> list[str]:
    """A text or several; a list that was written as a text (CSV has no other) is read."""
    if isinstance(value, str):
        if not value.lstrip().startswith("["):
            return [value]
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        return []
    return value


def _asserts(text: str) -> bool:
    """Whether it is Python in which something is asserted: other code passes whatever it tests."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in strings
            tree = ast.parse(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False
    return any(_is_assertion(node) for node in ast.walk(tree))


def _is_assertion(node: ast.AST) -> bool:
    """`assert`, or a function named like it: self.assertEqual, numpy's assert_allclose."""
    if isinstance(node, ast.Name):
        return node.id.startswith("assert")
    if isinstance(node, ast.Attribute):
        return node.attr.startswith("assert")
    return isinstance(node, ast.Assert)
