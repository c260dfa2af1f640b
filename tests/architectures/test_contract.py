"""The contract of every family, of this package or another that is installed.

A new one needs a tiny config in conftest.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config

from lrquant.architectures import Architecture, architecture_of, decoder
from lrquant.architectures.latent import latent_sites
from lrquant.architectures.matrix import Matrix, fused_linear, linear, linears
from lrquant.architectures.sites import (
    UNTOUCHED,
    Fold,
    Site,
    gated_norm_site,
    norm_site,
    query_key_site,
    up_down_site,
    value_output_site,
)
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
FLOAT32 = 1e-5  # where norms or rotations compute in float32 whatever is asked
INSIDE = ("gemma", "gemma2", "gemma3", "ernie4_5", "ernie4_5-biases", "cohere2", "bloom")
INSIDE += ("qwen3_5", "qwen3_5-biases", "qwen3_next", "olmo_hybrid", "nemotron_h")
INSIDE += ("granitemoehybrid", "granitemoehybrid-rope", "falcon_h1", "falcon_h1-norm")
INSIDE += ("lfm2", "lfm2-biases", "gemma4", "gemma4-plain")
INSIDE += ("qwen3_5_moe", "qwen3_next-experts", "granitemoehybrid-experts", "lfm2_moe")
INSIDE += ("nemotron_h-experts", "nemotron_h-latent", "gemma4-experts")
INSIDE += ("glm4_moe", "glm4_moe-norms", "dots1", "solar_open", "ernie4_5_moe", "hy_v3")  # routers
INSIDE += ("llama4", "llama4-two", "gemma4_unified", "gemma3n")
INSIDE += ("cohere2_moe", "kimi_linear", "flex_olmo", "granitemoeshared")
INSIDE += ("exaone_moe", "deepseek_v2", "deepseek_v3", "deepseek_v3-whole", "glm4_moe_lite")
ALL_KINDS = {"norm": 2, "value_output": 1, "query_key": 1, "up_down": 1}
NO_QUERY_KEY = {**ALL_KINDS, "query_key": 0}
NO_UP_DOWN = {**ALL_KINDS, "up_down": 0}
AFTER = {**NO_QUERY_KEY, "norm": 0}
OF_EXPERTS = {**NO_QUERY_KEY, "up_down": 4}  # one of each expert
DELTA = {"norm": 3, "value_output": 0, "query_key": 0, "up_down": 1}  # the gated norm is a third
ONE_NORM = dict.fromkeys(KINDS, 0) | {"norm": 1}
ATTENDING = {**ONE_NORM, "value_output": 1, "query_key": 1}
GATED_CONVOLUTION = {**ONE_NORM, "norm": 2, "up_down": 2}
LATENT = {"norm": 4, "value_output": 1, "query_key": 2, "up_down": 1}
EXPECTED = {  # algorithm.md, section 2: sites of each kind, a tuple by block; the rest ALL_KINDS
    "qwen3": {**ALL_KINDS, "query_key": 0},  # q and k are normalised after projection
    "gemma3": NO_QUERY_KEY,
    "gemma3n": {**ONE_NORM, "up_down": 1},  # the norm before attention feeds the residual
    "opt-post-norm": {**ALL_KINDS, "norm": 0},  # the norms' output feeds the residual too
    "opt-bare": {**ALL_KINDS, "norm": 0},  # norms without a weight
    "opt-gelu": NO_UP_DOWN,  # not exact without ReLU
    "olmo2": AFTER,  # norms after the sublayers, q and k normalised
    "olmo3": AFTER,
    "exaone4": AFTER,
    "hunyuan_v1_dense": NO_QUERY_KEY,  # q and k are normalised after RoPE
    "cohere2": {**ALL_KINDS, "norm": 1},  # attention and MLP read the same
    "starcoder2": NO_UP_DOWN,  # GELU without a gate
    "starcoder2-no-biases": NO_UP_DOWN,
    "apertus": {**NO_QUERY_KEY, "up_down": 0},  # xIELU without a gate, q and k normalised
    "gpt_neox": NO_UP_DOWN,  # GELU without a gate
    "bloom": NO_UP_DOWN,
    "falcon": {**NO_UP_DOWN, "norm": 1},  # attention and MLP read the same
    "falcon-groups": NO_UP_DOWN,
    "falcon-one-norm": {**NO_UP_DOWN, "norm": 1},
    "qwen3_5": (DELTA, NO_QUERY_KEY),
    "qwen3_5-biases": (DELTA, NO_QUERY_KEY),
    "qwen3_next": (DELTA, NO_QUERY_KEY),
    "qwen3_5_moe": ({**DELTA, "up_down": 5}, {**NO_QUERY_KEY, "up_down": 5}),
    "qwen3_next-experts": (DELTA, {**NO_QUERY_KEY, "up_down": 5}),
    "granitemoehybrid": (DELTA, ALL_KINDS),
    "granitemoehybrid-experts": ({**DELTA, "up_down": 5}, {**ALL_KINDS, "up_down": 5}),
    "granitemoehybrid-rope": (DELTA, ALL_KINDS),
    "falcon_h1-norm": {**ALL_KINDS, "norm": 3},
    "lfm2": (GATED_CONVOLUTION, NO_QUERY_KEY),
    "lfm2-biases": (GATED_CONVOLUTION, NO_QUERY_KEY),
    "nemotron_h": (
        {**ONE_NORM, "norm": 2},
        ATTENDING,
        {**ONE_NORM, "up_down": 1},
    ),
    "nemotron_h-experts": (ATTENDING, {**ONE_NORM, "up_down": 5}),
    "nemotron_h-latent": (ATTENDING, {**ONE_NORM, "up_down": 6}),  # and of what experts read
    "lfm2_moe": (NO_QUERY_KEY, {**GATED_CONVOLUTION, "up_down": 5}),
    "olmo_hybrid": (DELTA, AFTER),
    "gemma4": {**NO_QUERY_KEY, "value_output": 0},  # q, k and v are normalised
    "gemma4-plain": {**NO_QUERY_KEY, "value_output": 0},
    "gemma4_unified": {**NO_QUERY_KEY, "value_output": 0},
    "gemma4-experts": {"norm": 3, "value_output": 0, "query_key": 0, "up_down": 5},
    "qwen3_moe": OF_EXPERTS,
    "qwen3_moe-unlike": (NO_QUERY_KEY, OF_EXPERTS, OF_EXPERTS),
    "qwen2_moe": {**ALL_KINDS, "up_down": 5},  # and one of the shared expert
    "olmoe": OF_EXPERTS,
    "mixtral": {**ALL_KINDS, "up_down": 4},
    "phimoe": {**ALL_KINDS, "up_down": 4},
    "minimax_m2": OF_EXPERTS,
    "glm4_moe": (ALL_KINDS, {**ALL_KINDS, "up_down": 5}),
    "glm4_moe-norms": (NO_QUERY_KEY, {**NO_QUERY_KEY, "up_down": 5}),
    "dots1": (NO_QUERY_KEY, {**NO_QUERY_KEY, "up_down": 5}),
    "solar_open": {**ALL_KINDS, "up_down": 5},
    "ernie4_5_moe": (ALL_KINDS, {**ALL_KINDS, "up_down": 5}),
    "hunyuan_v1_moe": {**NO_QUERY_KEY, "up_down": 5},
    "hy_v3": (NO_QUERY_KEY, {**NO_QUERY_KEY, "up_down": 5}),
    "exaone_moe": (NO_QUERY_KEY, {**NO_QUERY_KEY, "up_down": 5}),
    "granitemoe": {**ALL_KINDS, "up_down": 4},
    "gpt_oss": NO_UP_DOWN,  # up and 1, cut off, is multiplied with the gate
    "granitemoeshared": {**ALL_KINDS, "up_down": 5},
    "llama4": (NO_QUERY_KEY, {**NO_QUERY_KEY, "up_down": 5}, ALL_KINDS),  # q and k without RoPE
    "llama4-two": {**ALL_KINDS, "up_down": 5},
    "flex_olmo": {**AFTER, "up_down": 4},
    "cohere2_moe": ({**ALL_KINDS, "norm": 1, "up_down": 5}, {**ALL_KINDS, "norm": 1}),
    "kimi_linear": ({**DELTA, "up_down": 6}, {**LATENT, "norm": 3}),
    "deepseek_v2": (LATENT, {**LATENT, "up_down": 5}),
    "deepseek_v3": (LATENT, {**LATENT, "up_down": 5}),
    "deepseek_v3-whole": ({**LATENT, "norm": 3}, {**LATENT, "norm": 3, "up_down": 5}),
    "glm4_moe_lite": (LATENT, {**LATENT, "up_down": 5}),
    "outside-fused": NO_QUERY_KEY,  # only a part of each head may be rotated
    "outside-experts": OF_EXPERTS,
    "outside-unlike": (NO_QUERY_KEY, OF_EXPERTS, OF_EXPERTS),
}
ROUTER = frozenset({"mlp.gate.weight"})
BESIDE = ROUTER | {"mlp.shared_expert_gate.weight"}
GRANITE_ROUTER = frozenset({"block_sparse_moe.router.weight"})
DELTA_SMALL = frozenset(f"linear_attn.{n}.weight" for n in ("conv1d", "in_proj_a", "in_proj_b"))
NEXT_SMALL = frozenset(f"linear_attn.{n}.weight" for n in ("conv1d", "in_proj_ba"))
OLMO_SMALL = frozenset(f"linear_attn.{n}.weight" for n in ("conv1d", "a_proj", "b_proj"))
KIMI_DECAY = ("A_log", "f_a_proj.weight", "f_b_proj.weight")
KIMI_SMALL = frozenset({"self_attn.conv1d.weight", "self_attn.b_proj.weight"})
KIMI_SMALL |= {f"self_attn.forget_gate.{name}" for name in KIMI_DECAY}
ALTUP = frozenset(
    f"{name}.weight"
    for name in (
        *("altup.correction_coefs", "altup.prediction_coefs", "altup.modality_router"),
        *("laurel.linear_left", "laurel.linear_right"),
    )
)
MAMBA = frozenset({"mamba.conv1d.weight"})
UNLIKE = (frozenset(), ROUTER, ROUTER)
KEPT = {  # of each block, or a tuple by block; the rest nothing
    "qwen3_5": (DELTA_SMALL, frozenset()),
    "qwen3_5-biases": (DELTA_SMALL, frozenset()),
    "qwen3_next": (NEXT_SMALL, frozenset()),
    "qwen3_5_moe": (DELTA_SMALL | BESIDE, BESIDE),
    "qwen3_next-experts": (NEXT_SMALL, BESIDE),
    "granitemoehybrid": (MAMBA, frozenset()),
    "granitemoehybrid-experts": (MAMBA | GRANITE_ROUTER, GRANITE_ROUTER),
    "granitemoehybrid-rope": (MAMBA, frozenset()),
    "falcon_h1": MAMBA,
    "falcon_h1-norm": MAMBA,
    "lfm2": (frozenset({"conv.conv.weight"}), frozenset()),
    "lfm2-biases": (frozenset({"conv.conv.weight"}), frozenset()),
    "nemotron_h": (frozenset({"mixer.conv1d.weight"}), frozenset(), frozenset()),
    "nemotron_h-experts": (frozenset(), frozenset({"mixer.gate.weight"})),
    "nemotron_h-latent": (frozenset(), frozenset({"mixer.gate.weight"})),
    "lfm2_moe": (frozenset(), frozenset({"conv.conv.weight", "feed_forward.gate.weight"})),
    "gemma4-experts": frozenset({"router.proj.weight"}),
    "olmo_hybrid": (OLMO_SMALL, frozenset()),
    "gemma4": frozenset({"per_layer_input_gate.weight", "per_layer_projection.weight"}),
    "gemma3n": ALTUP | {"per_layer_input_gate.weight", "per_layer_projection.weight"},
    "outside-experts": ROUTER,
    "outside-unlike": UNLIKE,
    "qwen3_moe": ROUTER,
    "qwen3_moe-unlike": UNLIKE,
    "qwen2_moe": BESIDE,
    "olmoe": ROUTER,
    "mixtral": ROUTER,
    "minimax_m2": ROUTER,
    "ernie4_5_moe": (frozenset(), ROUTER | {"mlp.gate.moe_statics.e_score_correction_bias"}),
    "solar_open": ROUTER,
    "hunyuan_v1_moe": frozenset({"mlp.gate.wg.weight"}),
    **dict.fromkeys(("granitemoe", "granitemoeshared"), GRANITE_ROUTER),
    **dict.fromkeys(("gpt_oss", "phimoe"), frozenset({"mlp.router.weight"})),
    "flex_olmo": ROUTER,
    "llama4": (frozenset(), frozenset({"feed_forward.router.weight"}), frozenset()),
    "llama4-two": frozenset({"feed_forward.router.weight"}),
    "cohere2_moe": (ROUTER, frozenset()),
    "kimi_linear": (ROUTER | KIMI_SMALL, frozenset()),
    **dict.fromkeys(
        ("glm4_moe", "glm4_moe-norms", "dots1", "hy_v3", "exaone_moe", "deepseek_v2"),
        (frozenset(), ROUTER),
    ),
    **dict.fromkeys(("deepseek_v3", "deepseek_v3-whole", "glm4_moe_lite"), (frozenset(), ROUTER)),
}


def block_of(model: nn.Module, index: int) -> nn.Module:
    return model.get_submodule(f"{architecture_of(model.config).blocks}.{index}")


def sites_of(model: nn.Module, index: int = 0) -> tuple[Site, ...]:
    return architecture_of(model.config).sites(model.config, index)


def matrices_of(model: nn.Module, index: int = 0) -> tuple[Matrix, ...]:
    return architecture_of(model.config).matrices(model.config, index)


def kept_of(model: nn.Module, index: int) -> tuple[str, ...]:
    return architecture_of(model.config).kept(model.config, index)


def indices(model: nn.Module) -> range:
    return range(model.config.num_hidden_layers)


def of_block(entry: object, index: int) -> object:
    """An entry of a table for one block: it is the same for all, or a tuple of theirs."""
    return entry[index] if isinstance(entry, tuple) else entry


def times_declared(
    parameters: dict[str, Tensor], matrices: Sequence[Matrix], kept: Sequence[str]
) -> dict[str, Tensor]:
    """How often each value of each parameter of two or more axes is declared."""
    biases = {matrix.bias for matrix in matrices}
    times = {
        name: torch.zeros(p.shape)
        for name, p in parameters.items()
        if p.dim() > 1 and name not in biases
    }
    for name in kept:
        times[name] += 1
    for matrix in matrices:
        values = matrix.of(times[matrix.parameter])
        values += 1
        assert matrix.rows is None or len(values) == matrix.rows[1] - matrix.rows[0], matrix.name
    return times


def test_every_weight_is_declared_exactly_once(variant, make_model):
    """By matrices, or as one that is kept: no value is left over, none has two matrices."""
    model = make_model(variant)
    for index in indices(model):
        parameters = dict(block_of(model, index).named_parameters())
        matrices, kept = matrices_of(model, index), kept_of(model, index)
        assert set(kept) == of_block(KEPT.get(variant, frozenset()), index)
        for name, times in times_declared(parameters, matrices, kept).items():
            assert (times == 1).all(), f"{name} of block {index}"


def test_a_matrix_too_many_or_too_few_is_seen(make_model):
    parameters = dict(block_of(make_model("llama"), 0).named_parameters())
    whole, key = matrices_of(make_model("llama")), "self_attn.k_proj"
    halves = fused_linear(key, a=8, b=8)
    rest = [matrix for matrix in whole if matrix.name != key]

    def once(*matrices: Matrix, kept: Sequence[str] = ()) -> bool:
        times = times_declared(parameters, matrices, kept).values()
        return all(bool((each == 1).all()) for each in times)

    assert once(*whole) and once(*rest, *halves) and once(*rest, kept=[f"{key}.weight"])
    assert not any(once(*each) for each in (rest, (*rest, halves[0]), (*whole, halves[0])))
    assert not once(*whole, kept=[f"{key}.weight"])
    with pytest.raises(AssertionError, match=r"k_proj\.b"):
        once(*rest, *fused_linear(key, a=8, b=9))


def test_matrices_are_named_once_and_after_what_they_are(variant, make_model):
    """The whole of a linear, and no part of it, has its name; each reads a module of the block."""
    model = make_model(variant)
    for index in indices(model):
        modules, matrices = dict(block_of(model, index).named_modules()), matrices_of(model, index)
        assert len({matrix.name for matrix in matrices}) == len(matrices)
        for matrix in matrices:
            name = matrix.parameter.removesuffix(".weight")
            if isinstance(modules.get(name), nn.Linear):
                assert (matrix.reads, matrix.bias) == (name, f"{name}.bias")
                assert (matrix.name == name) == matrix.whole
            inside = matrix.expert is not None and matrix.reads == matrix.name
            assert matrix.reads is None or matrix.reads in modules or inside


def test_a_linear_too_many_or_too_few_is_refused(make_model, monkeypatch):
    model = make_model("llama")
    for names in (["self_attn.q_proj"], [*decoder.LINEARS, "mlp.extra"]):
        odd = Architecture(
            "odd", ("llama",), "model.layers", lambda c, block, x=names: linears(*x), decoder.sites
        )
        monkeypatch.setattr("lrquant.model.loading.architecture_of", lambda config, odd=odd: odd)
        with pytest.raises(LRQuantError, match="the declaration does not fit this model"):
            from_module(model)


def test_sites_are_those_of_the_table(variant, make_model):
    model = make_model(variant)
    for index in indices(model):
        kinds = [site.kind for site in sites_of(model, index)]
        expected = of_block(EXPECTED.get(variant, ALL_KINDS), index)
        assert {kind: kinds.count(kind) for kind in KINDS} == expected


def weight_of(block: nn.Module, matrices: dict[str, Matrix], name: str) -> Tensor:
    matrix = matrices.get(name, linear(name))
    return matrix.of(block.get_parameter(matrix.parameter))


def test_sites_fit_the_matrices(variant, make_model):
    model = make_model(variant)
    for index in indices(model):
        block, sites = block_of(model, index), sites_of(model, index)
        matrices = {matrix.name: matrix for matrix in matrices_of(model, index)}
        kept = {name.removesuffix(".weight") for name in kept_of(model, index)}
        assert len({site.name for site in sites}) == len(sites)
        for site in sites:
            first = site.consumers[0]
            assert site.measured is None or site.measured == matrices[first.module].reads
            assert site.measured is None or first.axis == "columns"
            for fold in site.folds:
                weight = weight_of(block, matrices, fold.module)
                assert len(fold.index) == weight.shape[1 if fold.axis == "columns" else 0]
                assert set(fold.index) - {UNTOUCHED} == set(range(site.size))
                assert weight.dim() == (1 if fold.axis == "norm" else 2)
                assert (fold.module in {*matrices, *kept}) == (fold.axis != "norm")


@pytest.fixture
def change(change_of_logits, token_ids):
    """change(model, sites, left_out) -> change of the logits of random tokens.

    `sites` are those folded into each block, by its index.
    """

    def of(
        model: nn.Module, sites: Mapping[int, Sequence[Site]], left_out: Fold | None = None
    ) -> float:
        folded = [
            (block_of(model, index), matrices_of(model, index), sites.get(index, ()))
            for index in indices(model)
        ]
        return change_of_logits(model, folded, {"input_ids": token_ids(2, TOKENS)}, left_out)

    return of


def test_folding_leaves_the_function_unchanged(variant, make_model, change):
    model = make_model(variant, torch.float64)
    equal = FLOAT32 if variant in INSIDE else EQUAL
    sites = {index: sites_of(model, index) for index in indices(model)}
    assert change(model, {}) == 0
    for index, own in sites.items():
        for site in own:
            assert change(model, {index: (site,)}) < equal, (index, site.name)
    assert change(model, sites) < equal


def test_leaving_out_any_fold_is_seen(variant, make_model, change):
    model = make_model(variant, torch.float64)
    for index in indices(model):
        for site in sites_of(model, index):
            for fold in site.folds:
                seen = change(model, {index: (site,)}, fold)
                assert seen > CLEAR, (index, site.name, fold.module)


@pytest.mark.parametrize("name, has_shifts", [("opt", 3), ("llama-biases", 1), ("llama", 0)])
def test_shifts_are_part_of_what_is_verified(name, has_shifts, make_model, takes_shift):
    model = make_model(name)
    for index in indices(model):
        block, matrices = block_of(model, index), matrices_of(model, index)
        shifted = [site for site in sites_of(model, index) if takes_shift(block, matrices, site)]
        assert len(shifted) == has_shifts


def test_parts_of_a_linear_take_shifts_as_the_whole_does(
    make_model, change_of_logits, token_ids, takes_shift
):
    """The fold of the tests themselves, on rows with a bias; then with a part left out."""
    model, norm, value = (
        make_model("opt", torch.float64),
        "self_attn_layer_norm",
        "self_attn.v_proj",
    )
    others = [matrix for matrix in matrices_of(model) if matrix.name != value]
    matrices = (*others, *fused_linear(value, a=8, b=24))
    readers = ("self_attn.q_proj", "self_attn.k_proj", f"{value}.a", f"{value}.b")
    for cut, holds in ((readers, True), (readers[:-1], False)):
        site = norm_site(norm, cut, 32)
        assert takes_shift(block_of(model, 0), matrices, site)
        folded = [(block_of(model, 0), matrices, (site,))]
        change = change_of_logits(model, folded, {"input_ids": token_ids(2, TOKENS)})
        assert change < EQUAL if holds else change > CLEAR


def replace_offset(site: Site, offset: float) -> Site:
    """The same with another offset of its norm."""
    producer = dataclasses.replace(site.producer, offset=offset)
    return dataclasses.replace(site, folds=(producer, *site.consumers))


def among_rows(up: str, down: str, rows: int, start: int, width: int) -> Site:
    """From some of the `rows` of a linear to the columns of another."""
    site = up_down_site(up, down, width)
    index = (UNTOUCHED,) * start + tuple(range(width)) + (UNTOUCHED,) * (rows - start - width)
    return dataclasses.replace(site, folds=(Fold(up, "rows", -1, index), *site.consumers))


def in_turn(up: str, down: str, width: int) -> Site:
    """From every second row of a matrix to the columns of another."""
    site = up_down_site(up, down, width)
    index = tuple(row for channel in range(width) for row in (UNTOUCHED, channel))
    return dataclasses.replace(site, folds=(Fold(up, "rows", -1, index), *site.consumers))


def mixture_inputs(experts: str, *names: str) -> tuple[str, ...]:
    """What multiplies the input of each of four experts."""
    return tuple(f"{experts}.{expert}.{name}" for expert in range(4) for name in names)


_LATENT = {"num_attention_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 32, "v_head_dim": 12}
_LATENT |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "hidden_size": 32}
QUERY_KEY = ("self_attn.q_proj", "self_attn.k_proj", 4, 2)
WRONG_SITES = {  # the variant, the site, and the block where it does not hold if it does in others
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
    "a norm that the MLP reads too": (
        "cohere2",
        norm_site("input_layernorm", decoder.ATTENTION_INPUTS, 32),
    ),
    "halves for neighbours": ("ernie4_5", query_key_site(*QUERY_KEY, 16, "half")),
    "q and k normalised over all heads": ("olmo2", query_key_site(*QUERY_KEY, 8, "half")),
    "q and k normalised without RoPE": ("exaone4", query_key_site(*QUERY_KEY, 8, "half")),
    "q and k normalised after RoPE": (
        "hunyuan_v1_dense",
        query_key_site(*QUERY_KEY, 16, "half"),
    ),
    "a norm after the sublayer": (
        "olmo3",
        norm_site("post_attention_layernorm", decoder.MLP_INPUTS, 32),
    ),
    "c_fc to c_proj through GELU": ("starcoder2", up_down_site("mlp.c_fc", "mlp.c_proj", 48)),
    "pairs over whole heads where RoPE turns a part": (
        "glm",
        query_key_site(*QUERY_KEY, 16, "half"),
    ),
    "halves of a part of each head for neighbours": (
        "glm4",
        query_key_site(*QUERY_KEY, 16, "half", rotary_dim=8),
    ),
    "halves of whole heads where RoPE turns a part": (
        "nemotron",
        query_key_site(*QUERY_KEY, 8, "half"),
    ),
    "gate instead of up in one linear": (
        "phi3",
        up_down_site("mlp.gate_up_proj.gate", "mlp.down_proj", 48),
    ),
    "queries, keys and values one after the other for each head's in turn": (
        "gpt_neox",
        value_output_site("attention.query_key_value", "attention.dense", 4, 4, 8, rows=64),
    ),
    "squared ReLU as if it were ReLU": (
        "nemotron",
        up_down_site("mlp.up_proj", "mlp.down_proj", 48),
    ),
    "ReLU as if it were squared": (
        "gpt_neox-in-turn",
        up_down_site("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", 48, power=2),
    ),
    "each head's in turn for queries, keys and values of groups": (
        "falcon-groups",
        value_output_site("self_attention.query_key_value", "self_attention.dense", 4, 2, 8, 48),
    ),
    "a norm of which the MLP is not named": (
        "falcon",
        norm_site("input_layernorm", ("self_attention.query_key_value",), 32),
    ),
    "values to output through a convolution and SiLU": (
        "qwen3_5",
        value_output_site("linear_attn.in_proj_qkv", "linear_attn.out_proj", 4, 4, 16, rows=32),
    ),
    "the gate of a DeltaNet": (
        "qwen3_5",
        up_down_site("linear_attn.in_proj_z", "linear_attn.out_proj", 64),
    ),
    "a norm of which the small projections are not named": (
        "qwen3_5",
        norm_site("input_layernorm", ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"), 32, 1.0),
    ),
    "a gated norm as if it stored its weight less 1": (
        "qwen3_next",
        replace_offset(gated_norm_site("linear_attn.norm", "linear_attn.out_proj", 16, 4), 1.0),
    ),
    "what a Mamba mixer scans to its output, through a convolution and SiLU": (
        "nemotron_h",
        among_rows("mixer.in_proj", "mixer.out_proj", 164, start=64, width=64),
    ),
    "the gate of a Mamba mixer": (
        "granitemoehybrid",
        among_rows("mamba.in_proj", "mamba.out_proj", 148, start=0, width=64),
    ),
    "a norm of which the mixer beside attention is not named": (
        "falcon_h1",
        norm_site("input_layernorm", decoder.ATTENTION_INPUTS, 32),
    ),
    "an MLP's squared ReLU in a block of its own as if it were ReLU": (
        "nemotron_h",
        up_down_site("mixer.up_proj", "mixer.down_proj", 48),
    ),
    "what a convolution reads, past its bias": (
        "lfm2-biases",
        up_down_site("conv.in_proj.x", "conv.out_proj", 32),
    ),
    "a norm after attention in a hybrid": (
        "olmo_hybrid",
        norm_site("post_attention_layernorm", decoder.ATTENTION_INPUTS, 32),
    ),
    "a norm that a linear of low rank adds to what it gives": (
        "gemma3n",
        norm_site("input_layernorm", ("self_attn.q_proj", "laurel.linear_left"), 32),
        2,
    ),
    "gate instead of up under a cut": (
        "gemma3n",
        up_down_site("mlp.gate_proj", "mlp.down_proj", 48),
        0,
    ),
    "values that are normalised": (
        "gemma4-plain",
        value_output_site("self_attn.v_proj", "self_attn.o_proj", 4, 2, 8),
    ),
    "a norm that the router reads too": (
        "mixtral",
        norm_site(
            "post_attention_layernorm",
            mixture_inputs("mlp.experts", "w1", "w3"),
            32,
        ),
    ),
    "q and k normalised by their length alone, after RoPE": (
        "llama4",
        query_key_site(*QUERY_KEY, 16, "interleaved"),
        0,
    ),
    "halves for neighbours beside experts in rows": (
        "llama4-two",
        query_key_site(*QUERY_KEY, 16, "half"),
        0,
    ),
    "a norm whose router is not named, beside experts in rows": (
        "llama4-two",
        norm_site(
            "post_attention_layernorm",
            (
                *mixture_inputs("feed_forward.experts", "gate_proj", "up_proj"),
                "feed_forward.shared_expert.gate_proj",
                "feed_forward.shared_expert.up_proj",
            ),
            32,
        ),
    ),
    "a norm of experts that their router does not read": (
        "gemma4-experts",
        norm_site(
            "pre_feedforward_layernorm_2",
            (*mixture_inputs("experts", "gate_proj", "up_proj"), "router.proj"),
            32,
        ),
    ),
    "a norm of which the experts beside the MLP are not named": (
        "granitemoehybrid-experts",
        norm_site("post_attention_layernorm", ("shared_mlp.input_linear",), 32),
    ),
    "a norm that experts read through a linear of lower rank": (
        "nemotron_h-latent",
        norm_site("norm", ("mixer.fc1_latent_proj", "mixer.shared_experts.up_proj"), 32),
    ),
    "an expert's squared ReLU as if it were ReLU": (
        "nemotron_h-experts",
        up_down_site("mixer.experts.1.up_proj", "mixer.experts.1.down_proj", 16),
    ),
    "an expert's up, in turn with its gate and cut off": (
        "gpt_oss",
        in_turn("mlp.experts.1.gate_up_proj", "mlp.experts.1.down_proj", 16),
    ),
    "a shift of values beside sinks": (
        "gpt_oss",
        value_output_site("self_attn.v_proj", "self_attn.o_proj", 4, 2, 8),
    ),
    "values to output of delta attention, through a convolution and SiLU": (
        "kimi_linear",
        up_down_site("self_attn.v_proj", "self_attn.o_proj", 32),
    ),
    "gate instead of up in an expert": (
        "olmoe",
        up_down_site("mlp.experts.1.gate_proj", "mlp.experts.1.down_proj", 48),
    ),
    "one expert's up for another's down": (
        "qwen3_moe",
        up_down_site("mlp.experts.1.up_proj", "mlp.experts.2.down_proj", 16),
    ),
    "q and k of a head's first channels alone turn": (
        "minimax_m2",
        query_key_site(*QUERY_KEY, 8, "half", rotary_dim=4),
    ),
    "pairs over whole heads where RoPE turns a part, beside experts": (
        "glm4_moe",
        query_key_site(*QUERY_KEY, 16, "half"),
    ),
    "latent attention whose pairs are halves": (
        "deepseek_v3",
        latent_sites(DeepseekV3Config(**_LATENT, rope_interleave=False), 0)[-1],
    ),
    "latent attention whose pairs are neighbours": (
        "deepseek_v3-whole",
        latent_sites(DeepseekV3Config(**{**_LATENT, "q_lora_rank": None}), 0)[-1],
    ),
    "up to down through xIELU": ("apertus", up_down_site("mlp.up_proj", "mlp.down_proj", 48)),
}


@pytest.mark.parametrize("what", WRONG_SITES)
def test_a_site_that_does_not_hold_is_seen(what, make_model, change):
    """Negative controls: the sites that the declarations rightly leave out."""
    name, site, *only = WRONG_SITES[what]
    model = make_model(name, torch.float64)
    blocks = only or [index for index in indices(model) if has_place(model, index, site)]
    assert blocks
    for index in blocks:
        assert change(model, {index: (site,)}) > CLEAR


def has_place(model: nn.Module, index: int, site: Site) -> bool:
    """Whether a block is of the kind that a site is of, in a model of several."""
    modules = {name for name, _ in block_of(model, index).named_modules()}
    names = modules | {matrix.name for matrix in matrices_of(model, index)}
    return {fold.module for fold in site.folds} <= names


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
            arguments = entry.arguments(0, index, stream.handed_on(entry.batches[0]))
            states = stream.read(entry.batches[0])
            outputs.append(runner(view.tensors(), states, arguments))
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
