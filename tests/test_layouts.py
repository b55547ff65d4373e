"""Column names: what is found to be what, and what is asked back."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from manylora.corpus.layouts import CorpusError, Example, Fields, Layout, RowError, find_layout
from manylora.corpus.rows import RowReader

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def turns(row: dict[str, object], answered: bool = True, **fields: str) -> list[tuple[str, str]]:
    """The conversation that one row is."""
    example = RowReader("t", Fields(**fields), "task", answered).example(row, 1)
    return [(message["role"], message["content"]) for message in example.messages]


def reason(
    row: dict[str, object], answered: bool = True, table: bool = False, **fields: str
) -> str:
    """Why the row is refused, without where."""
    with pytest.raises(CorpusError) as caught:
        RowReader("t", Fields(**fields), "task", table=table).example(row, 7)
    assert str(caught.value).startswith("t:7: ")
    return str(caught.value).removeprefix("t:7: ")


KNOWN = {
    "instruction input output": Layout(prompt="instruction", input="input", output="output"),
    "Instruction Context Response": Layout(
        prompt="Instruction", input="Context", output="Response"
    ),
    "instruction output": Layout(prompt="instruction", output="output"),
    "prompt completion": Layout(prompt="prompt", output="completion"),
    "problem solution": Layout(prompt="problem", output="solution"),
    "id question context answer": Layout(prompt="question", input="context", output="answer"),
    "input output": Layout(prompt="input", output="output"),
    "input target context": Layout(prompt="input", output="target", input="context"),
    "system_prompt query response": Layout(
        prompt="query", output="response", system="system_prompt"
    ),
    "instruction input output history system": Layout(
        prompt="instruction", input="input", output="output", system="system", history="history"
    ),
    "messages": Layout(messages="messages"),
    "system conversations": Layout(messages="conversations", system="system"),
    "prompt prompt_id messages": Layout(messages="messages"),
}


@pytest.mark.parametrize("columns", KNOWN)
def test_usual_column_names_are_known(columns: str) -> None:
    assert find_layout(columns.split(), Fields()) == KNOWN[columns]


UNCLEAR = {
    "question answer response": ["'answer', 'response'", "fields: {output: answer}"],
    "instruction question output": ["'instruction', 'question'", "fields: {prompt: instruction}"],
    "instruction input context output": ["could each be the input"],
    "Prompt prompt output": ["'Prompt', 'prompt'"],
    "messages prompt completion": ["fields: {messages: messages}", "{prompt: prompt, output:"],
    "messages chat": ["could each be the messages"],
    "question choices answer": ["'choices' look like the choices", "{prompt: question, output:"],
    "question A B C D answer": ["'A', 'B', 'C', 'D' look like"],
    "text label": ["no field for the prompt", "none for the answer", "the row has 'text', 'label'"],
    "question gold": ["no field for the answer", "fields: {prompt: question, output: COLUMN}"],
    "": ["the row has no field"],
}


@pytest.mark.parametrize("columns", UNCLEAR)
def test_unclear_column_names_are_an_error_that_shows_what_to_write(columns: str) -> None:
    with pytest.raises(RowError) as caught:
        find_layout(columns.split(), Fields())
    for part in UNCLEAR[columns]:
        assert part in str(caught.value)


def test_named_columns_are_taken_as_named() -> None:
    columns = ["text", "question", "context", "answer", "response"]
    assert find_layout(columns, Fields(output="response")) == Layout(
        prompt="question", input="context", output="response"
    )
    # Naming the prompt leaves out what is not named.
    assert find_layout(columns, Fields(prompt="text", output="answer")) == Layout(
        prompt="text", output="answer"
    )
    chosen = Fields(prompt="question", output="answer")
    assert find_layout(["question", "choices", "answer"], chosen).columns == ["question", "answer"]
    with pytest.raises(RowError, match=r'no field "txt", which `fields.prompt` names'):
        find_layout(columns, Fields(prompt="txt"))
    with pytest.raises(RowError, match=r'no field "topic", which `fields.task` names'):
        find_layout(columns, Fields(output="answer", task="topic"))


def test_a_row_to_be_answered_needs_no_answer() -> None:
    assert find_layout(["question"], Fields(), answered=False) == Layout(prompt="question")
    assert turns({"question": "q"}, answered=False) == [("user", "q")]
    assert turns({"prompt": "q", "completion": 3}, answered=False) == [("user", "q")]
    assert turns({"messages": [USER, ASSISTANT, USER]}, answered=False) == [
        ("user", "q"),
        ("assistant", "a"),
        ("user", "q"),
    ]
    assert turns({"messages": [USER, ASSISTANT]}, answered=False) == [("user", "q")]


def test_fields_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValidationError, match="whole conversation"):
        Fields(messages="m", prompt="p")
    with pytest.raises(ValidationError, match="named twice"):
        Fields(prompt="p", output="p")
    with pytest.raises(ValidationError, match="promt"):
        Fields(promt="p")  # type: ignore[call-arg]


def test_the_input_follows_the_prompt_on_a_new_line() -> None:
    assert turns({"instruction": "Do.", "input": "it", "output": "ok"})[0] == ("user", "Do.\nit")
    assert turns({"instruction": "Do.", "input": "", "output": "ok"})[0] == ("user", "Do.")


def test_system_and_history_come_before() -> None:
    row = {"instruction": "3", "output": "c", "system": "S", "history": [["1", "a"], ["2", "b"]]}
    assert turns(row) == [
        ("system", "S"),
        *(("user", "1"), ("assistant", "a"), ("user", "2"), ("assistant", "b")),
        *(("user", "3"), ("assistant", "c")),
    ]
    assert turns({**row, "system": "", "history": []}) == [("user", "3"), ("assistant", "c")]


def test_both_forms_of_turns_are_read() -> None:
    row = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    assert turns(row) == [("user", "q"), ("assistant", "a")]
    tool = [USER, ASSISTANT, {"role": "function", "content": ""}, ASSISTANT]
    assert [role for role, _ in turns({"Messages": tool})] == [
        *("user", "assistant", "tool", "assistant")
    ]


def test_prompt_and_completion_may_be_lists_of_turns() -> None:
    system = {"role": "system", "content": "s"}
    expected = [("system", "s"), ("user", "q"), ("assistant", "a")]
    assert turns({"prompt": [system, USER], "completion": [ASSISTANT]}) == expected
    assert turns({"prompt": [system, USER], "completion": "a"}) == expected


BAD_ROWS: list[tuple[dict[str, object], str]] = [
    ({"prompt": "a", "output": ""}, 'field "output" is empty'),
    ({"prompt": " \n", "output": "b"}, 'field "prompt" is empty'),
    ({"prompt": "a", "output": 3}, 'field "output" is 3, not a string. Write it in quotes.'),
    ({"prompt": "a", "output": None}, 'field "output" is null, not a string'),
    ({"instruction": "a", "input": None, "output": "b"}, "in quotes or leave it out"),
    ({"prompt": "a", "output": "\ud800"}, "half of a surrogate pair"),
    ({"prompt": {"a": 1}, "output": "b"}, 'field "prompt" is a 1-item object'),
    ({"prompt": "a", "output": []}, "an empty list, not a list of messages"),
    ({"messages": "hello"}, "'hello', not a list of messages"),
    ({"messages": [USER]}, "ends with a turn of role user"),
    ({"messages": [ASSISTANT]}, "no user turn"),
    ({"messages": [USER, {"role": "system", "content": "s"}, ASSISTANT]}, "message 2 is the sys"),
    ({"messages": [USER, {"role": "alien", "content": "s"}]}, "the role is 'alien'; known are"),
    ({"messages": [USER, {"role": "assistant"}]}, "message 2 of field \"messages\" has 'role'"),
    ({"messages": [USER, {"role": "assistant", "content": ""}]}, "(assistant) is empty"),
    ({"messages": [USER, {"role": "assistant", "content": [1]}]}, "a 1-item list, not a string"),
    ({"messages": [USER, {**ASSISTANT, "tool_calls": [{}]}]}, "only text is read"),
    ({"messages": [USER, "a"]}, "is 'a', not an object with role and content"),
    ({"prompt": [USER], "completion": [USER]}, "ends with a turn of role user"),
    ({"prompt": [USER], "input": "x", "completion": "a"}, "has no place in it"),
    ({"prompt": "a", "output": "b", "history": [["q"]]}, "pair 1 of field"),
    ({"prompt": "a", "output": "b", "history": [["q", ""]]}, "pair 1 of field"),
]


@pytest.mark.parametrize("number", range(len(BAD_ROWS)))
def test_a_bad_row_says_what_is_wrong_with_it(number: int) -> None:
    row, expected = BAD_ROWS[number]
    assert expected in reason(row)


def test_in_a_table_what_is_left_out_is_a_null() -> None:
    row = {"instruction": "a", "input": None, "output": "b", "system": None, "history": None}
    example = RowReader("t", Fields(), "task", table=True).example(row, 1)
    assert len(example.messages) == 2
    assert "is empty (null)" in reason({"prompt": "a", "output": None}, table=True)
    assert "astype(str)" in reason({"prompt": "a", "output": 3.5}, table=True)


def test_a_column_may_name_the_task() -> None:
    reader = RowReader("t", Fields(task="topic"), "unused")
    row = {"prompt": "q", "completion": "a"}
    assert reader.example({**row, "topic": "maths"}, 1).task == "maths"
    assert reader.example({**row, "topic": 7}, 2).task == "7"
    for wrong, why in ((" ", "is empty"), (True, "is true"), (1.5, "is 1.5"), (None, "is null")):
        assert why in reason({**row, "topic": wrong}, task="topic")


def test_the_first_good_row_decides_the_layout() -> None:
    reader = RowReader("t", Fields(), "task")
    with pytest.raises(CorpusError):
        reader.example({"question": "q", "answer": ""}, 1)
    reader.example({"prompt": "q", "completion": "a"}, 2)
    with pytest.raises(CorpusError, match=r"t:3: .*layout question/answer.* are prompt/completion"):
        reader.example({"question": "q", "answer": "a"}, 3)
    assert len(reader.example({"prompt": "q", "completion": "a", "system": "s"}, 4).messages) == 3


def test_an_optional_column_that_is_named_must_be_in_some_row() -> None:
    reader = RowReader("t", Fields(input="contxt"), "task")
    reader.example({"prompt": "q", "completion": "a"}, 1)
    with pytest.raises(CorpusError, match=r"`fields.input` names 'contxt', which no row has"):
        reader.finish()
    reader.example({"prompt": "q", "completion": "a", "contxt": "c"}, 2)
    reader.finish()


def test_what_is_not_read_is_kept_in_mind() -> None:
    reader = RowReader("t", Fields(), "task")
    reader.example({"messages": [USER, {**ASSISTANT, "weight": 0}], "id": 3}, 1)
    assert reader.unread == {"id", "messages[].weight"}


def test_an_example_knows_its_prompt_and_its_answer() -> None:
    example = Example("t", [USER, ASSISTANT], "t.jsonl:1")  # type: ignore[list-item]
    assert (example.prompt, example.output, example.answered) == ([USER], "a", True)
    open_one = Example("t", [USER], "t.jsonl:1")  # type: ignore[list-item]
    assert (open_one.prompt, open_one.output, open_one.answered) == ([USER], "", False)
