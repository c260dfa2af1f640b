"""Files of rows: every known layout is read as what it is, and nothing is chosen by guess."""

from __future__ import annotations

import copy
import json
import os

import pyarrow
import pytest
from pyarrow import parquet

from lrquant.chats import written_out
from lrquant.data import calibration_samples, perplexity_windows
from lrquant.errors import LRQuantError
from lrquant.texts import load_text

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
)
ASKED = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "because"}]
LAYOUTS = {  # a row, its layout, and what the template makes of it
    "messages": ({"id": "a7", "messages": ASKED}, "messages", "[user]why?[assistant]because"),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "why?"}]}]},
        "messages",
        "[user]why?",
    ),
    "sharegpt": (
        {
            "id": "a7",
            "conversations": [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "so"}],
        },
        "conversations",
        "[user]why?[assistant]so",
    ),
    "alpaca": (
        {"instruction": "add", "input": "1 2", "output": "3"},
        "instruction and output",
        "[user]add\n\n1 2[assistant]3",
    ),
    "alpaca-no-input": (
        {"instruction": "add", "input": "", "output": "3"},
        "instruction and output",
        "[user]add[assistant]3",
    ),
    "question": (
        {"id": "q", "question": "why?", "answer": "so"},
        "question and answer",
        "[user]why?[assistant]so",
    ),
    "preference": (
        {"prompt": "why?", "chosen": " so", "rejected": " no"},
        "preference: prompt and chosen",
        "why? so",
    ),
    "preference-messages": (
        {"prompt": "why?", "chosen": ASKED, "rejected": ASKED[:1]},
        "preference: prompt and chosen",
        "[user]why?[assistant]because",
    ),
    "preference-answer": (
        {"prompt": ASKED[:1], "chosen": ASKED[1:], "rejected": ASKED[1:]},
        "preference: prompt and chosen",
        "[user]why?[assistant]because",
    ),
    "completion": ({"prompt": "one, ", "completion": "two"}, "prompt and completion", "one, two"),
    "text-first": ({"text": "plain", "messages": ASKED}, "column text", "plain"),
    "single": ({"n": 1, "body": "plain"}, "column body", "plain"),
}


@pytest.fixture
def templated(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write(path, rows):
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(name, column=None):
    return load_text(name, ("train",), None, None, column)


def error_of(call, *arguments, **settings):
    with pytest.raises(LRQuantError) as caught:
        call(*arguments, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_known_layout_is_read_as_what_it_is(tmp_path, templated, layout, suffix):
    row, name, expected = LAYOUTS[layout]
    text = read(write(tmp_path / f"rows.{suffix}", [row, row]))
    assert text.layout == name
    written = written_out(text.documents, templated, "rows")
    documents = text.documents if written is None else written.documents
    plain = isinstance(text.documents[0], str)
    assert list(documents) == [expected if plain else "<s>" + expected] * 2


def test_several_columns_are_refused_by_name_and_one_can_be_chosen(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"id": "x", "body": "a"}, {"id": "y", "body": "b"}])
    message = error_of(read, path)
    assert "id, body" in message and "--text-column" in message
    text = read(path, "body")
    assert (list(text.documents), text.layout) == (["a", "b"], "column body")
    assert "no column 'words' (columns: id, body)" in error_of(read, path, "words")


def test_a_chosen_column_may_hold_messages(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"id": "x", "turns": ASKED}])
    assert read(path, "turns").documents == [tuple(ASKED)]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"messages": [{"role": "user"}]}', "line 1: not of the layout 'messages'"),
        ('{"messages": []}', "line 1: not of the layout"),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "--calib-images"),
        ('{"text": "a"}\n{"text": null}', "line 2: not of the layout 'column text'"),
        ('{"text": "\\ud800"}', "line 1"),
        ('{"text": "a", "n": ' + "9" * 5000 + "}", "line 1: not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"a": ' * 100_000, "not JSON"),
        ('{"text": "a"}\n[1]', "line 2: not a JSON object"),
        ("7", "line 1: not a JSON object"),
        ("", "no rows in it"),
    ],
)
def test_odd_rows_are_one_line(tmp_path, content, expected):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    assert expected in error_of(read, str(path))


def test_monstrous_numbers_beside_the_text_are_nothing(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "n": 1e999, "m": NaN}\n')
    assert read(str(path)).documents == ["a"]


def test_what_is_no_file_is_refused_before_it_is_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "folder.jsonl").mkdir()
    assert "a pipe or device" in error_of(read, str(tmp_path / "pipe.txt"))
    assert "a folder" in error_of(read, str(tmp_path / "folder.jsonl"))


def test_without_a_template_messages_are_joined_and_that_is_said(tmp_path, tiny_tokenizer):
    path = write(tmp_path / "chat.jsonl", [{"messages": ASKED}] * 4)
    samples = calibration_samples(path, tiny_tokenizer, 1, 8, 0)
    assert "messages, no chat template: messages joined by blank lines" in samples.description
    windows = perplexity_windows(path, tiny_tokenizer, 8)
    assert tiny_tokenizer.decode(windows.ids[0]) == "why?\n\nbe"


def test_a_system_message_that_the_template_refuses_goes_to_the_users(templated):
    templated.chat_template = NO_SYSTEM
    messages = ({"role": "system", "content": "short"}, *ASKED)
    (text,) = written_out([messages], templated, "rows").documents
    assert text == "[user]short\n\nwhy?[assistant]because"
    late = (*ASKED, {"role": "system", "content": "short"})
    assert "rows, row 1: the model's chat template" in error_of(
        written_out, [late], templated, "rows"
    )


def test_the_log_says_what_is_read(tmp_path, templated, caplog):
    caplog.set_level("INFO")
    path = write(tmp_path / "chat.jsonl", [{"id": "i", "messages": ASKED}] * 3)
    calibration_samples(path, templated, 1, 8, 0)
    (line,) = [line for line in caplog.messages if line.startswith("text ")]
    assert "messages, by the chat template; 3 documents, the first: '<s>[user]why?" in line


def test_control_characters_of_a_text_stay_out_of_the_log(tmp_path, tiny_tokenizer, caplog):
    caplog.set_level("INFO")
    path = write(tmp_path / "a.jsonl", [{"text": "\x1b[31mred\nline " + "x" * 40}] * 2)
    calibration_samples(path, tiny_tokenizer, 1, 8, 0)
    assert not any("\x1b" in line or "\n" in line for line in caplog.messages)
