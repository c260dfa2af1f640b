"""The contract of every file in architectures/: a new family needs a tiny config in conftest.py."""

from __future__ import annotations

import dataclasses
import functools
import io
import re
import tokenize
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, GPT2Config, PretrainedConfig

import lrquant
from lrquant.architectures import Architecture, architecture_of, architectures, decoder, towers
from lrquant.architectures.matrix import linears
from lrquant.architectures.sites import Fold, Site, norm_site, query_key_site, up_down_site
from lrquant.blocks.inputs import BlockInputs
from lrquant.blocks.plan import Plan, learned_by
from lrquant.blocks.workbench import Workbench, advance_full_precision
from lrquant.config.choices import KINDS
from lrquant.config.scheme import FLOATING_POINT
from lrquant.config.schemes import Schemes
from lrquant.errors import LRQuantError
from lrquant.model.loading import from_module

TOKENS = 12
EQUAL, CLEAR = 1e-9, 1e-3  # relative changes of the logits in float64
FLOAT32, INSIDE = 1e-5, ("gemma", "gemma3")  # their norms compute in float32 whatever is asked
ALL_KINDS = {"norm": 2, "value_output": 1, "query_key": 1, "up_down": 1}
EXPECTED = {  # algorithm.md, section 2: sites of each kind; the rest have ALL_KINDS
    "qwen3": {**ALL_KINDS, "query_key": 0},  # q and k are normalised after projection
    "gemma3": {**ALL_KINDS, "query_key": 0},
    "opt-post-norm": {**ALL_KINDS, "norm": 0},  # the norms' output feeds the residual too
    "opt-bare": {**ALL_KINDS, "norm": 0},  # norms without a weight
    "opt-gelu": {**ALL_KINDS, "up_down": 0},  # not exact without ReLU
}


def require_tiny_configs(served: dict[str, Architecture], tiny: dict[str, PretrainedConfig]):
    covered = {config.model_type for config in tiny.values()}
    missing = sorted(set(served) - covered)
    if missing:
        pytest.fail(
            f"no test runs for {', '.join(missing)}: add a tiny config of each to TINY in "
            "tests/conftest.py"
        )


def test_every_family_has_a_tiny_config(tiny_configs):
    """Those that read pictures have theirs in tests/vision."""
    served = architectures().items()
    of_text = {key: f for key, f in served if f.tower is None and not f.reads_pixels}
    require_tiny_configs(of_text, tiny_configs)


def test_a_family_without_a_tiny_config_is_noticed(tiny_configs):
    served = {**architectures(), "new": architectures()["llama"]}
    with pytest.raises(pytest.fail.Exception, match=r"new.*: add a tiny config"):
        require_tiny_configs(served, tiny_configs)


def test_every_file_is_a_family_or_is_used_by_one():
    """A file without ARCHITECTURE or TOWER would be passed over in silence."""
    folder = Path(lrquant.__file__).parent / "architectures"
    sources = {path.stem: path.read_text() for path in folder.glob("*.py") if path.stem[0] != "_"}
    families = {found.name for found in (*architectures().values(), *towers().values())}
    assert families <= set(sources), "a family's file has its name"
    for helper in set(sources) - families:
        pattern = rf"(import.*|architectures\.)\b{helper}\b"
        used = [name for name in families if re.search(pattern, sources[name])]
        assert used, f"{helper}.py declares no ARCHITECTURE and no family imports it"


@pytest.mark.parametrize("model_type", sorted(set(architectures()) - {"mllama"}))
def test_model_types_are_those_of_transformers(model_type):
    architecture = architectures()[model_type]
    assert model_type in architecture.model_types
    assert architecture_of(AutoConfig.for_model(model_type)) is architecture


def test_an_unknown_family_is_refused_with_the_known_and_the_guide():
    with pytest.raises(LRQuantError) as caught:
        architecture_of(GPT2Config())
    message = str(caught.value)
    assert message.startswith("model family 'gpt2' is not declared; known: ")
    assert ", ".join(sorted(architectures())) in message
    assert "docs/add-an-architecture.md" in message


def test_a_declared_refusal_is_an_error(monkeypatch):
    refusing = Architecture(
        "odd", ("odd",), "x", lambda c, block: (), lambda c, block: (), refusal=lambda c: "too odd"
    )
    monkeypatch.setattr(lrquant.architectures, "architectures", lambda: {"odd": refusing})
    config = GPT2Config()
    config.model_type = "odd"
    with pytest.raises(LRQuantError, match="model family 'odd': too odd"):
        architecture_of(config)


def block_of(model: nn.Module, index: int) -> nn.Module:
    return model.get_submodule(f"{architecture_of(model.config).blocks}.{index}")


def sites_of(model: nn.Module, index: int = 0) -> tuple[Site, ...]:
    return architecture_of(model.config).sites(model.config, index)


def names_of(model: nn.Module, index: int = 0) -> list[str]:
    """The declared matrices of a block."""
    return [matrix.name for matrix in architecture_of(model.config).matrices(model.config, index)]


def test_linears_are_those_of_every_block(variant, make_model):
    model = make_model(variant)
    for index in range(model.config.num_hidden_layers):
        declared = names_of(model, index)
        assert len(set(declared)) == len(declared)
        modules = block_of(model, index).named_modules()
        assert {name for name, module in modules if isinstance(module, nn.Linear)} == set(declared)


def test_a_linear_too_many_or_too_few_is_refused(make_model, monkeypatch):
    model = make_model("llama")
    for names in (["self_attn.q_proj"], [*names_of(model), "mlp.extra"]):
        odd = Architecture(
            "odd", ("llama",), "model.layers", lambda c, block, x=names: linears(*x), decoder.sites
        )
        monkeypatch.setattr("lrquant.model.loading.architecture_of", lambda config, odd=odd: odd)
        with pytest.raises(LRQuantError, match="the declaration does not fit this model"):
            from_module(model)


def test_sites_are_those_of_the_table(variant, make_model):
    model = make_model(variant)
    for index in range(model.config.num_hidden_layers):
        found = [site.kind for site in sites_of(model, index)]
        assert {kind: found.count(kind) for kind in KINDS} == EXPECTED.get(variant, ALL_KINDS)


def test_sites_fit_the_modules(variant, make_model):
    model = make_model(variant)
    block = block_of(model, 0)
    sites = sites_of(model)
    assert len({site.name for site in sites}) == len(sites)
    declared = names_of(model)
    for site in sites:
        assert site.measured is None or site.measured == site.consumers[0].module
        assert site.measured is None or site.consumers[0].axis == "columns"
        for fold in site.folds:
            weight = block.get_submodule(fold.module).weight
            assert len(fold.index) == weight.shape[1 if fold.axis == "columns" else 0]
            assert set(fold.index) == set(range(site.size))
            assert (fold.module in declared) == (fold.axis != "norm")


@pytest.fixture
def change(change_of_logits, token_ids):
    """change(model, sites, left_out) -> change of the logits of random tokens."""

    def of(model: nn.Module, sites: Sequence[Site], left_out: Fold | None = None) -> float:
        blocks = [block_of(model, index) for index in range(model.config.num_hidden_layers)]
        inputs = {"input_ids": token_ids(2, TOKENS)}
        return change_of_logits(model, blocks, sites, inputs, left_out)

    return of


def test_folding_leaves_the_function_unchanged(variant, make_model, change):
    model = make_model(variant, torch.float64)
    equal = FLOAT32 if variant in INSIDE else EQUAL
    assert change(model, ()) == 0
    for site in sites_of(model):
        assert change(model, (site,)) < equal, site.name
    assert change(model, sites_of(model)) < equal


def test_leaving_out_any_fold_is_seen(variant, make_model, change):
    model = make_model(variant, torch.float64)
    for site in sites_of(model):
        for fold in site.folds:
            assert change(model, (site,), fold) > CLEAR, (site.name, fold.module)


@pytest.mark.parametrize("name, has_shifts", [("opt", 3), ("llama-biases", 1), ("llama", 0)])
def test_shifts_are_part_of_what_is_verified(name, has_shifts, make_model, takes_shift):
    model = make_model(name)
    assert sum(takes_shift(block_of(model, 0), site) for site in sites_of(model)) == has_shifts


QUERY_KEY = ("self_attn.q_proj", "self_attn.k_proj", 4, 2)
WRONG_SITES = {
    "unpaired under RoPE": ("llama", query_key_site(*QUERY_KEY, 8, rotary=None)),
    "neighbours for halves": ("llama", query_key_site(*QUERY_KEY, 8, rotary="interleaved")),
    "q and k normalised after projection": ("qwen3", query_key_site(*QUERY_KEY, 16, "half")),
    "a norm that stores its weight less 1, as if it did not": (
        "gemma",
        norm_site("input_layernorm", decoder.ATTENTION_INPUTS, 32),
    ),
    "fc1 to fc2 through GELU": ("opt-gelu", up_down_site("fc1", "fc2", 48)),
    "gate instead of up": ("llama", up_down_site("mlp.gate_proj", "mlp.down_proj", 48)),
    "a norm whose output feeds the residual": (
        "opt-post-norm",
        norm_site("self_attn_layer_norm", ("fc1",), 32),
    ),
    "a norm of which one reader is not named": (
        "llama",
        norm_site("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj"), 32),
    ),
}


@pytest.mark.parametrize("what", WRONG_SITES)
def test_a_site_that_does_not_hold_is_seen(what, make_model, change):
    """Negative controls: the sites that the declarations rightly leave out."""
    name, site = WRONG_SITES[what]
    assert change(make_model(name, torch.float64), (site,)) > CLEAR


@torch.no_grad()
def block_outputs(
    bench: Workbench, ids: torch.Tensor, rule: str | None, set_sites_: Callable
) -> list[torch.Tensor]:
    """Output of each block on full-precision inputs, under random scales, and shifts by a rule."""
    learned = () if rule is None else learned_by(let=True, let_sites=KINDS, let_shift=rule)
    bench = dataclasses.replace(bench, plan=Plan(Schemes(FLOATING_POINT), learned))
    entry = BlockInputs(bench.model, ids, len(ids), bench.device)
    (stream,) = bench.streams(entry, 1)
    entry.embed(stream)
    outputs = []
    for index in range(len(bench.model.blocks)):
        view = bench.view(index, bench.stored(index))
        set_sites_(view, index)
        with bench.runner(index, view) as runner:
            states = stream.read(entry.batches[0])
            outputs.append(runner(view.tensors(), states, entry.arguments(0, index)))
        advance_full_precision(bench, index, bench.stored(index), entry, stream, stream)
    return outputs


@pytest.mark.parametrize("rule", ["never", "auto", "always"])
def test_the_block_view_folds_the_same_way(
    rule, variant, make_model, make_bench, token_ids, set_sites_
):
    """In floating point, with every site and shifts also where no bias exists."""
    bench = make_bench(make_model(variant))
    ids = token_ids(2, TOKENS)
    plain, folded = (
        block_outputs(bench, ids, None, set_sites_),
        block_outputs(bench, ids, rule, set_sites_),
    )
    for before, after in zip(plain, folded, strict=True):
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4 * float(before.std()))


def test_the_block_view_comparison_sees_one_wrong_scale(
    make_model, make_bench, token_ids, set_sites_
):
    bench = make_bench(make_model("llama"))
    ids = token_ids(2, TOKENS)
    (plain, _) = block_outputs(bench, ids, None, set_sites_)
    view = bench.view(0, bench.stored(0))
    tensors = view.tensors()
    tensors["self_attn.k_proj.weight"] = tensors["self_attn.k_proj.weight"].clone()
    tensors["self_attn.k_proj.weight"][3] *= 1.5
    entry = BlockInputs(bench.model, ids, len(ids), bench.device)
    (stream,) = bench.streams(entry, 1)
    entry.embed(stream)
    with bench.runner(0, view) as runner:
        wrong = runner(tensors, stream.read(entry.batches[0]), entry.arguments(0, 0))
    assert not torch.allclose(wrong, plain, rtol=1e-4, atol=1e-4 * float(plain.std()))


@functools.cache
def family_words() -> re.Pattern[str]:
    """Family names without their version; short ones only as words of their own."""
    served = [(key, architecture.name) for key, architecture in architectures().items()]
    names = {re.sub(r"\d+$", "", name) for pair in served for name in pair}
    long = {name for name in names if len(name) > 3}
    parts = [f"(?i:{name})" for name in sorted(long)]
    for name in sorted(names - long):
        parts += [rf"(?<![a-z]){name}(?![a-z]|[- ](in|out)\b)", rf"{name.upper()}(?![a-z])"]
    return re.compile("|".join(parts))


def leaks(source: str) -> list[str]:
    """Identifiers, strings and comments that name a family; names of other software are none."""
    source = source.replace("llama-gguf-split", "").replace("llama.cpp", "")
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [
        f"line {token.start[0]}: {token.string}"
        for token in tokens
        if family_words().search(token.string)
    ]


def test_no_family_is_named_outside_its_file():
    package = Path(lrquant.__file__).parent
    found = {
        str(path.relative_to(package)): leaks(path.read_text(encoding="utf-8"))
        for path in sorted(package.rglob("*.py"))
        if path.parent.name != "architectures"
    }
    assert len(found) > 20
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "source, leaking",
    [
        ("from transformers import LlamaConfig", True),
        ("if config.model_type == 'opt': pass", True),
        ("class OPTBlock: pass", True),
        ("opt_layer = 1", True),
        ('"""As in Qwen3."""', True),
        ("x = 1  # mistral only", True),
        ("optimizer = options.optional", False),
        ("adopt = 'to opt in, to opt-out'", False),
        ("x = 'OPT only'", True),
        ("merge = 'llama-gguf-split --merge'", False),
    ],
)
def test_the_leak_test_sees_leaks(source, leaking):
    assert bool(leaks(source)) == leaking
