"""Channel statistics: against direct computation, and what is refused when they are read."""

from __future__ import annotations

import os
import pickle
import random
import warnings

import pytest
import torch

from lrquant.blocks.inputs import BlockInputs
from lrquant.blocks.workbench import advance_full_precision
from lrquant.errors import LRQuantError
from lrquant.ingredients.base.statistics import ChannelStatistics, load_statistics


def observed(values: torch.Tensor, step: int) -> ChannelStatistics:
    statistics = ChannelStatistics()
    for start in range(0, len(values), step):
        statistics.observe("linear", values[start : start + step])
    return statistics


@pytest.fixture
def values():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(7, 5, 6, generator=generator) + torch.linspace(-3, 3, 6)


@pytest.mark.parametrize("step", [1, 2, 7])
def test_maxima_and_midpoints(values, step):
    statistics = observed(values, step)
    assert torch.equal(statistics.maxima["linear"], values.abs().amax((0, 1)))
    direct = None
    for sample in values.double():
        middle = (sample.amax(0) + sample.amin(0)) / 2
        direct = middle if direct is None else 0.99 * direct + 0.01 * middle
    torch.testing.assert_close(statistics.midpoints["linear"], direct.float())


def test_midpoints_depend_on_the_order_of_samples_and_maxima_do_not(values):
    forward, backward = observed(values, 1), observed(values.flip(0), 1)
    assert torch.equal(forward.maxima["linear"], backward.maxima["linear"])
    assert not torch.allclose(forward.midpoints["linear"], backward.midpoints["linear"])


def test_flat_tokens_are_one_sample(values):
    flat = ChannelStatistics()
    flat.observe("linear", values[0])
    batched = observed(values[:1], 1)
    assert torch.equal(flat.maxima["linear"], batched.maxima["linear"])
    assert torch.equal(flat.midpoints["linear"], batched.midpoints["linear"])


def test_bfloat16_and_gradients_are_taken_in(values):
    statistics = observed(values.bfloat16().requires_grad_(), 2)
    found = statistics.maxima["linear"]
    assert found.dtype == torch.float32 and not found.requires_grad
    assert torch.equal(found, values.bfloat16().float().abs().amax((0, 1)))


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("name", ["llama", "opt", "opt-post-norm"])
def test_of_a_model_against_hooks_on_transformers(
    name, batch_size, make_model, make_bench, token_ids
):
    """OPT flattens the tokens of a batch before its MLP: samples must still be told apart."""
    module = make_model(name)
    bench = make_bench(module)
    ids = token_ids(3, 10)
    expected = ChannelStatistics()
    prefix = bench.model.architecture.blocks
    for path, linear in module.named_modules():
        if isinstance(linear, torch.nn.Linear) and path.startswith(prefix + "."):
            linear.register_forward_pre_hook(
                lambda module, inputs, path=path: expected.observe(path, inputs[0])
            )
    for sample in ids:
        module(sample[None])
    found = ChannelStatistics()
    entry = BlockInputs(bench.model, ids, batch_size, bench.device)
    (stream,) = bench.streams(entry, 1)
    entry.embed(stream)
    for index in range(len(bench.model.blocks)):
        advance_full_precision(
            bench, index, bench.stored(index), entry, stream, stream, found.observe
        )
    for table in ("maxima", "midpoints"):
        theirs, ours = getattr(expected, table), getattr(found, table)
        assert theirs.keys() == ours.keys() and len(ours) > 10
        for path in theirs:
            torch.testing.assert_close(ours[path], theirs[path], rtol=1e-4, atol=1e-5)


@pytest.fixture
def files(tmp_path):
    return tmp_path / "scales" / "model.pt", tmp_path / "shifts" / "model.pt"


def test_save_and_load(values, files):
    statistics = observed(values, 1)
    statistics.save(*files)
    loaded = load_statistics(*files)
    for table in ("maxima", "midpoints"):
        before, after = getattr(statistics, table), getattr(loaded, table)
        assert before.keys() == after.keys()
        assert torch.equal(before["linear"], after["linear"])
    assert sorted(p.name for p in files[0].parent.iterdir()) == ["model.pt"]


def test_shifts_may_be_left_out(values, files):
    observed(values, 1).save(*files)
    assert load_statistics(files[0], None).midpoints == {}


def test_half_precision_files_of_other_tools_are_read(tmp_path):
    path = tmp_path / "scales.pt"
    torch.save({"a": torch.ones(3, dtype=torch.float16)}, path)
    assert load_statistics(path, None).maxima["a"].dtype == torch.float32


def refused(path, words: str) -> None:
    with pytest.raises(LRQuantError) as caught:
        load_statistics(path, None)
    message = str(caught.value)
    assert str(path) in message and words in message and "\n" not in message


def test_a_missing_file_says_how_to_make_it(tmp_path):
    refused(tmp_path / "nowhere.pt", "lrquant stats")


def test_a_folder_is_refused(tmp_path):
    refused(tmp_path, "cannot be read (not a regular file)")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"\0", b"text\n", b"PK\x03\x04 and no more", b"\x80\x02.", bytes(range(256)) * 4),
        *(pickle.dumps(value) for value in ({"a": 1}, [1, 2], torch.ones)),
    ],
)
def test_what_is_not_a_statistics_file_is_refused(content, tmp_path):
    path = tmp_path / "scales.pt"
    path.write_bytes(content)
    refused(path, "statistics")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_no_damage_escapes_as_another_error(legacy, tmp_path):
    """A file cut off or with bytes changed at many places is read whole or refused."""
    path = tmp_path / "scales.pt"
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=not legacy)
    content = path.read_bytes()
    generator = random.Random(0)
    refusals = 0
    for trial in range(300):
        damaged = bytearray(content)
        if trial % 3 == 0:
            damaged = damaged[: generator.randrange(len(damaged))]
        for _ in range(generator.randrange(1, 4)):
            if damaged:
                damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        path.write_bytes(damaged)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                load_statistics(path, None)
        except LRQuantError:
            refusals += 1
    assert refusals > 100


class Malicious:
    """Runs a command when unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("save", ["pickle", "torch", "torch legacy"])
def test_pickled_code_does_not_run(save, tmp_path):
    path, witness = tmp_path / "scales.pt", tmp_path / "witness"
    content = {"a": torch.ones(3), "b": Malicious(f"touch {witness}")}
    if save == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=save == "torch")
    refused(path, "corrupt or not a statistics file")
    assert not witness.exists()
    torch.load(path, weights_only=False) if save != "pickle" else pickle.loads(path.read_bytes())
    assert witness.exists()  # the file would have done harm


@pytest.mark.parametrize(
    "content",
    [
        [torch.ones(3)],
        {"a": [1.0, 2.0]},
        {"a": torch.ones(2, 3)},
        {"a": torch.tensor(1.0)},
        {3: torch.ones(3)},
        torch.ones(3),
    ],
)
def test_anything_but_names_and_vectors_is_refused(content, tmp_path):
    path = tmp_path / "scales.pt"
    torch.save(content, path)
    refused(path, "expected a mapping from linear names to one value a channel")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(value, tmp_path):
    path = tmp_path / "scales.pt"
    torch.save({"good": torch.ones(3), "bad": torch.tensor([1.0, value])}, path)
    refused(path, "bad holds a value that is not finite")


def test_importance_is_the_mean_square_of_what_the_linear_reads():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 5, 8, generator=generator) + 20
    statistics = ChannelStatistics()
    statistics.observe("q", values)
    weight = torch.zeros(2, 8)
    squares = values.double().square().mean((0, 1))
    plain = statistics.importance("q", weight, None)
    torch.testing.assert_close(plain.double(), squares / squares.mean(), rtol=1e-5, atol=0)
    shift = values.mean((0, 1)) + 0.1
    shifted = (values.double() - shift).square().mean((0, 1))
    found = statistics.importance("q", weight, shift)
    torch.testing.assert_close(found.double(), shifted / shifted.mean(), rtol=1e-2, atol=0)
    assert torch.equal(statistics.importance("never seen", weight, shift), torch.ones(8))
