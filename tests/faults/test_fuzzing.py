"""Fuzzing: settings, texts, models, run folders and checkpoints that nobody would write.

Each ends with the right value, or with an `LRQuantError` of one line; nothing else is let through.
The examples are the same at every run; LRQUANT_FUZZ says how many of each kind.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from lrquant import Config, LRQuantError, quantize
from lrquant.cli import main
from lrquant.config.config import typed_settings
from lrquant.config.groups import Computing
from lrquant.config.settings import read_yaml
from lrquant.data.texts import load_text
from lrquant.measures.evaluation.resolution import resolve_settings
from lrquant.measures.subjects.checkpoint import load_checkpoint
from lrquant.model.loading import load_model
from lrquant.reports.inspection import inspect_folder
from lrquant.reports.writing import write_report
from lrquant.runs.folder import RunFolder

EXAMPLES = int(os.environ.get("LRQUANT_FUZZ", "15"))


def fuzz(share: float = 1.0):
    """Seeded, of so many examples, with no clock and nothing kept between runs."""
    return settings(
        max_examples=max(1, round(EXAMPLES * share)),
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # no hour is spent on a smaller example
        suppress_health_check=list(HealthCheck),
    )


def outcome(action: Callable[[], Any]) -> Any:
    """What an action gives, or None where it is refused in one line of visible characters."""
    try:
        value = action()
    except LRQuantError as error:
        message = str(error)
        assert message.strip() and message.splitlines() == [message]
        assert not any(character < " " or character == "\x7f" for character in message)
        return None
    assert value is not None
    return value


# Values and damage

NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, 2, 3, 4, 8, 16, 64, 2**31, 2**63, -(2**63), 10**20, 10**30]),
    st.integers(),
    st.floats(),
)
WORDS = st.one_of(
    st.sampled_from(["", " ", ",", "W4A4", "w3a16g16", "W99A1", "auto", "1e20", "nan", "cpu"]),
    st.text(max_size=12),
    st.text(string.printable, max_size=12),
)
PLAIN = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS)
ANY = st.recursive(
    PLAIN,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=3)),
    max_leaves=5,
)
DAMAGE = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "drop", "put", "zero"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=3,
)


def damaged(content: bytes, damage: list[tuple[str, float, int]]) -> bytes:
    """A file's content after each damage in turn: how, where as a share of its length, how much."""
    changed = bytearray(content)
    for how, share, amount in damage:
        place = int(share * len(changed))
        if how == "flip" and changed:
            changed[place] ^= 1 << amount % 8
        elif how == "cut":
            del changed[place:]
        elif how == "drop":
            del changed[place : place + amount]
        elif how == "put":
            changed[place:place] = bytes([amount]) * (amount % 9)
        elif how == "zero":
            changed[place : place + amount] = bytes(len(changed[place : place + amount]))
    return bytes(changed)


def edited(values: Any, picks: list[int], new: Any) -> Any:
    """JSON with one value, found by going down at each of `picks`, in another's place."""
    if not picks or not isinstance(values, dict | list) or not values:
        return new
    keys = sorted(values) if isinstance(values, dict) else list(range(len(values)))
    key = keys[picks[0] % len(keys)]
    changed = dict(values) if isinstance(values, dict) else list(values)
    changed[key] = edited(changed[key], picks[1:], new)
    return changed


PICKS = st.lists(st.integers(0, 30), min_size=1, max_size=3)


# Settings

FIELDS = {entry.name: entry.default for entry in dataclasses.fields(Config)}


@fuzz(10)
@given(st.dictionaries(st.sampled_from(sorted(FIELDS)), ANY, max_size=4))
def test_settings(values):
    if values.get("resume") is not None:
        values = {**values, "epochs": 1}  # nothing is resumed here
    resolved = outcome(lambda: resolve_settings(values))
    if resolved is not None:
        config = resolved[0]
        assert typed_settings(dataclasses.asdict(config), "again") == dataclasses.asdict(config)
        assert config.resolved() == config


@fuzz(5)
@given(
    st.one_of(
        st.binary(max_size=80),
        st.dictionaries(WORDS, ANY, max_size=3).map(lambda v: json.dumps(v).encode()),
        st.tuples(st.just(Config().to_yaml().encode()), DAMAGE).map(lambda pair: damaged(*pair)),
    )
)
def test_a_file_of_settings(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "settings.yaml"
    path.write_bytes(content)
    config = outcome(lambda: Config.from_yaml(path))
    if config is not None:
        assert config == Config(**typed_settings(read_yaml(path), "again"))


# Texts

ROWS = st.lists(
    st.one_of(
        ANY,
        st.fixed_dictionaries({"text": ANY}),
        st.fixed_dictionaries({"messages": st.lists(st.dictionaries(WORDS, ANY), max_size=2)}),
        st.fixed_dictionaries({"conversations": ANY, "id": PLAIN}),
        st.fixed_dictionaries({"instruction": PLAIN, "input": PLAIN, "output": PLAIN}),
    ),
    max_size=4,
)
LINES = ROWS.map(lambda rows: "\n".join(json.dumps(row) for row in rows).encode())
CONTENT = st.one_of(
    st.binary(max_size=60), st.text(max_size=60).map(lambda t: t.encode("utf-8", "replace")), LINES
)


@fuzz(5)
@given(st.sampled_from([".txt", ".json", ".jsonl", ".parquet"]), CONTENT, st.none() | WORDS)
def test_texts(tmp_path_factory, suffix, content, column):
    path = tmp_path_factory.getbasetemp() / f"text{suffix}"
    path.write_bytes(content)
    text = outcome(lambda: load_text(str(path), ("train",), None, None, column))
    if text is not None and suffix == ".txt":
        assert list(text.documents) == [content.decode("utf-8")]


# Models


@pytest.fixture(scope="module")
def model(tmp_path_factory, make_model, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("fuzz") / "model"
    make_model("llama").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def replaced(model):
    """Put a file's content in another's place, and what was there back at the end."""
    changed = {}

    def replace(name: str, content: bytes) -> None:
        changed.setdefault(name, (model / name).read_bytes())
        (model / name).write_bytes(content)

    yield replace
    for name, content in changed.items():
        (model / name).write_bytes(content)


@fuzz(5)
@given(picks=PICKS, new=ANY, file=st.sampled_from(["config.json", "tokenizer_config.json"]))
def test_values_of_a_models_files(model, replaced, picks, new, file):
    before = (model / file).read_bytes()
    replaced(file, json.dumps(edited(json.loads(before), picks, new)).encode())
    try:
        loaded = outcome(lambda: load_model(str(model)))
    finally:
        replaced(file, before)
    if loaded is not None:
        for name, tensor in loaded.skeleton.state_dict().items():
            assert loaded.source.tensor(name).shape == tensor.shape


@fuzz(3)
@given(damage=DAMAGE, file=st.sampled_from(["config.json", "tokenizer.json", "model.safetensors"]))
def test_bytes_of_a_models_files(model, replaced, damage, file):
    before = (model / file).read_bytes()
    replaced(file, damaged(before, damage))
    try:
        loaded = outcome(lambda: load_model(str(model)))
        if loaded is not None:
            for name, tensor in loaded.skeleton.state_dict().items():
                assert loaded.source.tensor(name).shape == tensor.shape
    finally:
        replaced(file, before)


# Run folders and checkpoints


@pytest.fixture(scope="module")
def run(tmp_path_factory, model, token_ids):
    """A finished run with its report, and its checkpoint, of the model's folder."""
    place = tmp_path_factory.mktemp("fuzz")
    done = quantize(
        str(model),
        "W4A16",
        calibration=token_ids(3, 16),
        output_dir=str(place / "run"),
        save_dir=str(place / "checkpoint"),
        precision="float32",
        epochs=1,
    )
    return done.folder.path, place / "checkpoint"


@pytest.fixture
def copied(tmp_path_factory):
    """copied(folder) -> a copy in which files may be damaged, made anew at each call."""

    def copy(folder: Path) -> Path:
        place = tmp_path_factory.getbasetemp() / f"copy-{folder.name}"
        shutil.rmtree(place, ignore_errors=True)
        return Path(shutil.copytree(folder, place))

    return copy


def some_file(folder: Path, pick: int) -> Path:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    return files[pick % len(files)]


def spoil(path: Path, damage: list[tuple[str, float, int]], picks: list[int], new: Any) -> None:
    """Damage a file's bytes, or, of JSON and where `picks` say so, one of its values."""
    content = path.read_bytes()
    if path.suffix == ".json" and sum(picks) % 2:
        path.write_text(json.dumps(edited(json.loads(content), picks, new)))
    else:
        path.write_bytes(damaged(content, damage))


SPOILED = {"pick": st.integers(0, 40), "damage": DAMAGE, "picks": PICKS, "new": ANY}


@fuzz(3)
@given(**SPOILED)
def test_run_folders(run, copied, pick, damage, picks, new):
    """What is read of one is what was written: settings, and what each block has learned."""
    place, learned = copied(run[0]), RunFolder.open(run[0])
    spoil(some_file(place, pick), damage, picks, new)
    outcome(lambda: inspect_folder(place))
    opened = outcome(lambda: RunFolder.open(place))
    if opened is None:
        return
    config = outcome(lambda: opened.config)
    assert config in (None, learned.config)
    outcome(opened.records)
    for index in range(2):
        tensors = outcome(lambda: opened.load_block(index))  # noqa: B023
        expected = learned.load_block(index)
        if tensors is not None:
            assert tensors.keys() == expected.keys()
            assert all(torch.equal(tensors[name], expected[name]) for name in expected)


@fuzz(0.3)
@given(**SPOILED)
def test_reports_of_run_folders(run, copied, pick, damage, picks, new):
    place = copied(run[0])
    spoil(some_file(place, pick), damage, picks, new)
    outcome(lambda: write_report(RunFolder.open(place)))


@fuzz(2)
@given(**SPOILED)
def test_checkpoints(run, copied, pick, damage, picks, new):
    """Only those that are whole are loaded; their logits are those that were."""
    place = copied(run[1])
    spoil(some_file(place, pick), damage, picks, new)
    outcome(lambda: inspect_folder(place))
    computing = Computing("cpu", "float32", "auto")
    loaded = outcome(lambda: load_checkpoint(str(place), computing))
    if loaded is not None:
        ids = torch.tensor([[5, 6, 7]])
        expected = load_checkpoint(str(run[1]), computing).module(ids).logits
        assert torch.equal(loaded.module(ids).logits, expected)


# The command line


@fuzz(3)
@given(
    st.sampled_from(["quantize", "check", "stats", "evaluate", "export", "inspect", "report"]),
    st.lists(
        st.one_of(
            st.sampled_from(["--scheme", "--model", "--tasks", "--ppl", "--limit", "--device"]),
            WORDS.filter(lambda word: "h" not in word and "\0" not in word),  # no --help
        ),
        max_size=4,
    ),
)
def test_the_command_line(tmp_path_factory, command, words):
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("empty"))
    try:
        assert main([command, *words]) == 2
    finally:
        os.chdir(before)
