"""Files of rows: every known layout is read as what it is, and nothing is chosen by guess."""

from __future__ import annotations

import copy
import json
import os
import types

import psutil
import pyarrow
import pytest
from pyarrow import parquet

from lrquant.data.chats import written_out
from lrquant.data.conversations import is_conversations, read_conversations
from lrquant.data.samples import calibration_samples, perplexity_windows
from lrquant.data.texts import load_text
from lrquant.errors import LRQuantError

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


def write(path, entries):
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(entries), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(entries, indent=1))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in entries))
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


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"words\0words", "NUL"),
        ("a.txt", "words".encode("utf-16-le"), "NUL"),
        ("a.jsonl", b'{"text": "a"}\n\0', "NUL"),
        ("a.jsonl", b"a" * 100_000, "line 1: not JSON"),
    ],
)
def test_odd_bytes_are_one_line(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    assert expected in error_of(read, str(tmp_path / name))


def test_a_byte_order_mark_is_no_text(tmp_path):
    for name, words in (("a.txt", "plain"), ("a.jsonl", '{"text": "plain"}')):
        (tmp_path / name).write_text(words, encoding="utf-8-sig")
        assert read(str(tmp_path / name)).documents == ["plain"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_text_larger_than_the_memory_is_refused(tmp_path, monkeypatch, name):
    path = tmp_path / name
    if name.endswith("parquet"):  # one value, a thousand times: small on disk
        parquet.write_table(pyarrow.table({"text": ["x" * 1000] * 1000}), path)
        assert path.stat().st_size < 50_000
    else:
        path.write_text(json.dumps({"text": "x" * 100_000}))
    assert read(str(path)).documents
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=0))
    assert "of memory are free; give a part" in error_of(read, str(path))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_null_text_is_not_taken_for_another_column(tmp_path, suffix):
    path = write(tmp_path / f"a.{suffix}", [{"text": None, "title": "t"}, {"text": "a"}])
    assert "1: not of the layout 'column text'" in error_of(read, path)


def test_rows_with_pictures_are_not_read_as_their_words(tmp_path):
    row = {"image": "a.png", "question": "why?", "answer": "so"}
    path = write(tmp_path / "a.jsonl", [row])
    assert "--calib-images" in error_of(read, path)
    row["image"] = {"bytes": b"PNG", "path": "a.png"}
    path = write(tmp_path / "a.parquet", [row])
    assert "--calib-images" in error_of(read, path)
    assert read(path, "question").documents == ["why?"]


def test_text_that_parquet_keeps_as_a_dictionary(tmp_path):
    words = pyarrow.array(["a", "b", "a"]).dictionary_encode()
    parquet.write_table(pyarrow.table({"text": words}), tmp_path / "a.parquet")
    assert read(str(tmp_path / "a.parquet")).documents == ["a", "b", "a"]


def test_a_system_prompt_and_other_names_of_roles(tmp_path):
    row = {"system_prompt": "short", "question": "why?", "response": "so"}
    (messages,) = read(write(tmp_path / "a.jsonl", [row])).documents
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    said = [{"from": "prompter", "value": "why?"}, {"from": "model", "value": "so"}]
    (messages,) = read(write(tmp_path / "b.jsonl", [{"conversation": said}])).documents
    assert [message["role"] for message in messages] == ["user", "assistant"]


def test_whether_a_file_holds_conversations_needs_no_whole_line(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\n{"messages": "' + b"\xff" * 100)
    assert is_conversations(path)
    path.write_bytes(b'{"text": "' + b"\xff" * 100 + b'"}\n{"messages": []}')
    assert not is_conversations(path)


def test_pipes_for_conversations_and_pictures(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    assert "no pictures" in error_of(read_conversations, tmp_path)
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "a pipe or device" in error_of(read_conversations, tmp_path / "pipe.jsonl")
    (tmp_path / "deep.jsonl").write_text('{"a": ' * 100_000)
    assert "expected" in error_of(read_conversations, tmp_path / "deep.jsonl")


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
