"""Estimates: sizes against really written files, formulas against values worked out by hand."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from lrquant import quantize
from lrquant.blocks.inputs import BlockInputs
from lrquant.blocks.plan import Plan
from lrquant.blocks.variants import full_precision
from lrquant.blocks.workbench import shape_view
from lrquant.config.config import Config
from lrquant.config.groups import Adapting, Learning
from lrquant.data.feeds import Feed
from lrquant.data.samples import Samples
from lrquant.formats.checkpoint import INDEX
from lrquant.formats.choice import formats
from lrquant.measures.scoring.predictions import send_through
from lrquant.model.loading import from_module, load_model
from lrquant.preflight.estimate import (
    checkpoint_size,
    estimate_memory,
    learned_bytes,
    learning_seconds,
    measuring_seconds,
    run_bytes,
    stream_bytes,
)
from lrquant.preflight.handed import handed_row_bytes
from lrquant.preflight.kinds import KindCosts
from lrquant.preflight.load import Load, TextLoad
from lrquant.preflight.probe import BlockCosts

WIDE = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
WIDE_OPT = {"hidden_size": 128, "ffn_dim": 192, "word_embed_proj_dim": 128}
COSTS = BlockCosts(
    **{"read": 1.0, "observed": 3.0, "full": 2.0, "start": 5.0, "weights": 0.5, "held": 4.0},
    **{"step": 10.0, "freeze": 0.25, "peak_memory": 9_000, "streams": 1_000, "rows": 16},
)
BLOCKS = [KindCosts((0, 1), 0, COSTS)]


@pytest.fixture
def load_of(make_model, make_bench):
    """load_of(model, settings, samples, tokens, dtype) -> what its blocks are to learn on"""

    def make(model, config, samples, tokens, dtype=torch.float32):
        bench = make_bench(model, dtype, Plan.of(config.quantizing))
        return Load(bench, config.group(Learning), samples * tokens, None)

    return make


def size_of(folder):
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("some words, and some more of them. " * 20)
    return path


@pytest.fixture
def written(model_folder, text_file, tmp_path):
    """A finished run with its checkpoint."""

    def make(family, scheme, changes=WIDE, **settings):
        return quantize(
            model_folder(family, **changes),
            scheme,
            output_dir=str(tmp_path / "run"),
            save_dir=str(tmp_path / "saved"),
            **{"calib_dataset": str(text_file), "nsamples": 1, "seqlen": 16, "epochs": 1},
            **{"report": False, **settings},
        )

    return make


def estimated(run):
    form = formats()[run.config.format or "compressed-tensors"]
    settings = len(run.config.to_yaml().encode())
    return checkpoint_size(run.workbench.model, Plan.of(run.config.quantizing), form, settings)


@pytest.mark.parametrize(
    ("family", "scheme", "settings"),
    [
        ("llama-biases", "W2A16g16-sym", {"lr_plus": True}),
        ("qwen3", "W8A8-sym-qkv16", {"activation_symmetric": True}),
        ("opt", "W4A4-sym-qkv16", {"activation_symmetric": True}),
        ("opt-bare", "W8A16", {}),
        ("qwen2", "W3A3g16", {"format": "lrquant", "lr_plus": True, "rotation_sharing": "linear"}),
        ("mistral", "W16A16", {"format": "dequantized", "lwc": False}),
    ],
)
def test_the_size_of_a_checkpoint(written, tmp_path, family, scheme, settings):
    run = written(family, scheme, WIDE_OPT if "opt" in family else WIDE, **settings)
    assert estimated(run).total == pytest.approx(size_of(tmp_path / "saved"), rel=0.02)


def test_another_scheme_is_not_within_two_per_cent(written, tmp_path):
    """Negative control: groups and zero points weigh that much."""
    run = written("llama", "W4A16g16", {**WIDE, "num_hidden_layers": 4, "vocab_size": 264})
    real = size_of(tmp_path / "saved")
    assert estimated(run).total == pytest.approx(real, rel=0.02)
    other = dataclasses.replace(run, config=dataclasses.replace(run.config, group_size=None))
    assert estimated(other).total < 0.98 * real


def test_the_parts_of_a_checkpoint(written, tmp_path):
    run = written("llama", "W4A16g64")
    size = estimated(run)
    blocks = sum(path.stat().st_size for path in (tmp_path / "saved").glob("model-0*"))
    outer = (tmp_path / "saved" / "model-outer.safetensors").stat().st_size
    index = (tmp_path / "saved" / INDEX).stat().st_size
    assert size.blocks == pytest.approx(blocks + index, rel=0.02)
    assert size.outside > outer
    weights = 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 192
    expected = 4 + (32 + 4) / 64 + 7 * 8 * 16 / weights  # float32 scales, codes of zero, shapes
    assert size.bits_per_weight == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "report"),
    [
        ({"scheme": "W4A4"}, False),
        ({"scheme": "W4A4", "lr_plus": True}, True),
        ({"scheme": "W3A16g16", "lr_plus": True, "rotation_sharing": "linear"}, True),
        ({"scheme": "W4A16", "lr_plus": True, "rotate_rank": 2}, False),
    ],
)
def test_the_size_of_a_run_folder(make_model, token_ids, tmp_path, settings, report):
    run = quantize(
        make_model("llama", **WIDE),
        calibration=token_ids(2, 16),
        output_dir=str(tmp_path / "run"),
        **{"epochs": 1, "report": report, **settings},
    )
    model, plan = run.workbench.model, run.workbench.plan
    if report:
        with_report = run_bytes(model, plan, report=True)
        assert size_of(tmp_path / "run") < with_report < 3 * size_of(tmp_path / "run")
        for name in ("report.html", "report.json", "report.md"):
            (tmp_path / "run" / name).unlink()
        shutil.rmtree(tmp_path / "run" / "diagnostics")
    one = (tmp_path / "run" / "blocks" / "0000.safetensors").stat().st_size
    assert learned_bytes(shape_view(model, 0, plan)) == pytest.approx(one, rel=0.02)
    whole = size_of(tmp_path / "run")
    assert whole / 2 < run_bytes(model, plan, report=False) < 1.2 * whole + 4096


def test_nothing_learned_takes_no_space(make_model):
    config = Config(scheme="W16A16", epochs=0).resolved()
    model = from_module(make_model("llama"))
    assert learned_bytes(shape_view(model, 0, Plan.of(config.quantizing))) == 0


def test_the_size_of_hidden_states(make_model, load_of):
    """128 samples of 2048 tokens at 32 channels: LLaMA-7B's 4096 take 128 times as much."""
    one, plus = Config(scheme="W4A4").resolved(), Config(scheme="W4A4", lr_plus=True).resolved()
    model = make_model("llama")
    assert stream_bytes(load_of(model, plus, 128, 2048, torch.bfloat16)) == 6 * 2**30 // 128
    assert stream_bytes(load_of(model, one, 16, 512)) == 2 * 16 * 512 * 32 * 4


def texts(windows, tokens, name="a"):
    return [Samples(torch.zeros((windows, tokens), dtype=torch.int64), name, "", "", "")]


def test_the_memory_of_each_phase(make_model, load_of):
    """Hidden 32, vocabulary 264, untied, float32: values added up by hand."""
    config = Config(scheme="W4A4").resolved()
    load = load_of(make_model("llama"), config, 10, 16)
    memory = estimate_memory(load, BLOCKS, 5_000, True, TextLoad(texts(6, 16), 16))
    streams = 2 * 10 * 16 * 32 * 4
    embedding = 4 * (264 * 32 + 32)  # and the last norm
    assert memory.embedding == 5_000 + streams + embedding
    assert memory.learning == 9_000 - 1_000 + streams
    logits = 2 * 16 * 264 * 4
    states = 6 * 16 * 32 * 4
    assert memory.measuring == 5_000 + states + embedding, "gone before there are logits"
    measured = TextLoad(texts(6, 16), 16, {"a"})
    against = estimate_memory(load, BLOCKS, 5_000, True, measured)
    assert against.measuring == 5_000 + 2 * states + 2 * logits
    assert memory.peak == max(memory.embedding, memory.learning, memory.measuring)
    assert dataclasses.replace(memory, tower=10**9).peak == 10**9


def test_keys_and_values_for_later_blocks_count_in_every_stream(make_model, make_bench):
    """Gemma 4's last blocks read those of one block of each kind: two heads, of 8 and 16 wide."""
    config = Config(scheme="W4A16g8", lr_plus=True).resolved()
    bench = make_bench(make_model("gemma4"), torch.bfloat16, Plan.of(config.quantizing))
    batch = Feed.of_tokens(torch.zeros((1, 12), dtype=torch.int64))
    load = Load(bench, config.group(Learning), 10 * 12, batch)
    row = handed_row_bytes(load)
    assert row == 2 * 2 * (8 + 16) * 2
    entry = BlockInputs(bench.model, batch, 1, bench.device)
    (stream,) = bench.streams(entry, 1)
    send_through(bench.model, full_precision(bench), stream, entry, lambda _: None)
    states = [each for own in stream.handed.values() for own in own.values() for each in own]
    assert sum(each.nbytes for each in states) == 12 * row
    read = TextLoad(texts(6, 16), 16)
    without, memory = (estimate_memory(load, BLOCKS, 0, True, read, own) for own in (0, row))
    assert memory.learning - without.learning == 3 * 10 * 12 * row
    assert memory.embedding == without.embedding
    large = TextLoad(texts(60, 160), 160)
    without, memory = (estimate_memory(load, BLOCKS, 0, True, large, own) for own in (0, row))
    assert memory.measuring - without.measuring <= 60 * 160 * row


def test_memory_of_other_settings(make_model, load_of):
    model = make_model("llama", torch.bfloat16)
    config = Config(scheme="W4A4", lr_plus=True).resolved()

    def memory(config, dtype=torch.bfloat16, inside=True, windows=(), against=()):
        load = load_of(model, config, 10, 16, dtype)
        return estimate_memory(load, BLOCKS, 5_000, inside, TextLoad(windows, 16, against))

    streams = 3 * 10 * 16 * 32 * 2
    assert memory(config).learning == 8_000 + streams
    assert memory(config, inside=False).learning == 8_000, "hidden states are on disk"
    assert memory(config, torch.float32).learning == 8_000 + 2 * streams
    copies = (4 + 2) * (264 * 32 + 32)  # as stored, and in float32
    assert memory(config).embedding == 5_000 + streams + copies
    assert memory(config).measuring == 5_000, "nothing is measured"
    states, logits = 2 * 16 * 32 * 2, 2 * 16 * 264 * 4
    assert memory(config, windows=texts(2, 16)).measuring == 5_000 + states + copies
    against = memory(config, windows=texts(2, 16), against={"a"}).measuring
    as_stored = 2 * (264 * 32 + 32)  # of the embedding, read before: mapped pages
    assert against == 5_000 + 2 * states + as_stored + 2 * logits


def test_the_time_of_learning(make_model, load_of):
    """COSTS are whole numbers of seconds: 6 batches, 3 epochs, 2 blocks, worked out by hand."""
    plain = Config(scheme="W4A16", epochs=3, keep_best=False, lwc_init=4.0).resolved()
    model = make_model("llama")

    def seconds(config, costs=COSTS, finished=0):
        kinds = [KindCosts((0, 1), 0, costs)]
        return learning_seconds(load_of(model, config, 12, 8), kinds, finished)

    block = 1 + 5 + 0.5 + 0.25 + 6 * (2 + 2 * 4) + 3 * 6 * 10
    assert seconds(plain) == 2 * block
    searched = dataclasses.replace(plain, lwc_init=None)
    assert seconds(searched) == 2 * (block + 6 * 1)
    best = dataclasses.replace(plain, keep_best=True)
    assert seconds(best) == 2 * (block + 3 * (6 * 4 + 0.5))
    branches = dataclasses.replace(plain, two_branch=True)
    assert seconds(branches) == 2 * (block + 6 * 2)
    passed = 1 + 0.25 + 6 * (2 + 4)
    assert seconds(plain, finished=1) == block + passed
    assert seconds(plain, dataclasses.replace(COSTS, step=0.0)) == 2 * (block - 3 * 6 * 10)
    grouped = dataclasses.replace(COSTS, groups=4)
    assert seconds(plain, grouped) == 2 * (block + 3 * (3 * 6 * 10 + 6 * 4 + 0.25))


def test_what_one_of_several_processes_takes(make_model, load_of):
    """Of steps of 4 samples three have 2 at most, as two have; what is done once a block stays."""
    config = Config(scheme="W4A16", epochs=3, keep_best=False, lwc_init=4.0, batch_size=4)
    whole = load_of(make_model("llama"), config.resolved(), 12, 8)
    once = 1 + 5 + 0.5 + 0.25
    assert learning_seconds(whole, BLOCKS) == 2 * (once + 6 * (2 + 2 * 4) + 3 * 6 * 10)
    for processes in (2, 3):
        load = dataclasses.replace(whole, processes=processes)
        assert learning_seconds(load, BLOCKS) == 2 * (once + 3 * (2 + 2 * 4) + 3 * 3 * 10)
        assert stream_bytes(load) == stream_bytes(whole) // 2
    model = whole.workbench.model
    read, shared = TextLoad(texts(8, 8), 8), TextLoad(texts(8, 8), 8, processes=4)
    blocks = 2 * 1.25  # read and frozen by each
    expected = (measuring_seconds(model, BLOCKS, read, True) - blocks) / 4 + blocks
    assert measuring_seconds(model, BLOCKS, shared, True) == pytest.approx(expected)


def test_the_time_of_measuring(make_model):
    model = from_module(make_model("llama"))
    linears = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
    head = 264 * 32 / linears * 2.0 / 16  # seconds a token, by the share of products
    quantized = 2 * 4.0 / 16
    once = measuring_seconds(model, BLOCKS, TextLoad(texts(5, 8), 8), True)
    assert once == pytest.approx(40 * (quantized + head) + 2 * 1.25)
    assert measuring_seconds(model, BLOCKS, TextLoad([], 8), True) == 0
    compared = TextLoad(texts(5, 8), 8, compared=True)
    more = 40 * (2 * quantized + 2 * 2.0 / 16 + 3 * head) + 3 * 2 * 1.25
    assert measuring_seconds(model, BLOCKS, compared, True) == pytest.approx(more)


def test_the_time_of_adapting_in_groups(make_model):
    """Of the last block: each group has its epochs and a held pass, and quantises all others."""
    model, adapting = from_module(make_model("llama")), Adapting(epochs=3, blocks=1)
    text = TextLoad(texts(4, 8), 8, adapting=adapting)
    alone, grouped = (
        measuring_seconds(model, [KindCosts((0, 1), 0, each)], text, True)
        for each in (COSTS, dataclasses.replace(COSTS, groups=4))
    )
    assert grouped - alone == pytest.approx(3 * (2 * (3 * (10 + 4) + 4) + 0.25))


def test_the_files_that_travel_along_are_counted(model_folder, tmp_path):
    model = load_model(str(model_folder("llama")))
    config = Config(scheme="W4A16", model=model.name).resolved()
    form = formats()["compressed-tensors"]
    with_tokenizer = checkpoint_size(model, Plan.of(config.quantizing), form, 0).outside
    before = {path.name for path in Path(model.name).iterdir()}
    written = [path for path in Path(model.name).glob("*tokenizer*") if path.is_file()]
    size = sum(path.stat().st_size for path in written)
    for path in written:
        path.unlink()
    without = checkpoint_size(model, Plan.of(config.quantizing), form, 0).outside
    assert with_tokenizer - without == pytest.approx(size, abs=100)  # the name of its class
    left = {path.name for path in Path(model.name).iterdir()}
    assert left == before - {path.name for path in written}, "the model's own folder is left alone"
