"""Loading and saving of the native format by transformers, once this module is imported.

It may be imported in the middle of transformers' own imports: all that needs transformers' models
is imported by who first loads a checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lrquant.config.scheme import FLOAT_BITS, Scheme
from lrquant.errors import LRQuantError
from lrquant.files.whole import JsonObject
from lrquant.model.experts import SECOND, ExpertForm, expert_form
from lrquant.numerics.grids.schemes import activation_grid, attention_grid
from lrquant.numerics.tokens import fake_quantize_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lrquant.runtime.linear import IntegerLinear

NAME = "lrquant"
VERSION = 1


@register_quantization_config(NAME)
class NativeConfig(QuantizationConfigMixin):
    """`quantization_config` of a native checkpoint's config.json.

    `scheme` are the fields of `Scheme`; `ignore` names the linears that stay as they are; `biases`,
    `shifts`, `input_factors` and `input_clips` name the modules of a block that have such a tensor.
    `tower` has the same for a quantised vision tower, and the path of its `blocks`; `others` lists
    schemes of their own for `modules` by full name, `attentions` those of Q, K and V of such
    attentions; `experts` names the gate, up and down of an expert, or its up and down, each a
    linear of its own.
    """

    def __init__(
        self,
        quant_method: str = NAME,
        format_version: int = VERSION,
        scheme: JsonObject | None = None,
        ignore: list[str] | None = None,
        biases: list[str] | None = None,
        shifts: list[str] | None = None,
        input_factors: list[str] | None = None,
        input_clips: list[str] | None = None,
        tower: JsonObject | None = None,
        others: list[JsonObject] | None = None,
        attentions: list[JsonObject] | None = None,
        experts: list[str] | None = None,
        **unknown: object,
    ) -> None:
        if format_version > VERSION:
            raise LRQuantError(
                f"checkpoint of format version {format_version}: this lrquant reads up to "
                f"{VERSION}; update lrquant"
            )
        if unknown or scheme is None:
            odd = f"unknown {', '.join(sorted(unknown))}" if unknown else "no scheme"
            raise LRQuantError(f"quantization_config of config.json: {odd}; export it again")
        self.quant_method: Any = quant_method
        self.format_version = format_version
        self.scheme, self.ignore = scheme, ignore or []
        self.biases, self.shifts = biases or [], shifts or []
        self.input_factors = input_factors or []
        if input_clips:
            self.input_clips = input_clips
        if tower is not None:
            self.tower = tower
        if others:
            self.others = others
        if attentions:
            self.attentions = attentions
        if experts:
            self.experts = experts

    def part_of(self, module: str) -> _Part:
        """What a module of this name is quantised as."""
        tower = getattr(self, "tower", None)
        part = vars(self)
        if tower is not None and module.startswith(tower["blocks"] + "."):
            part = tower
        usual = Scheme(**part["scheme"])
        scheme = self._schemes("others").get(module, usual)
        clips = part.get("input_clips", [])
        return _Part(scheme, usual, part["biases"], part["shifts"], part["input_factors"], clips)

    @property
    def other_attentions(self) -> dict[str, Scheme]:
        """Attentions by full name that have another scheme than that of their part."""
        return self._schemes("attentions")

    def _schemes(self, groups: str) -> dict[str, Scheme]:
        return {
            name: Scheme(**group["scheme"])
            for group in getattr(self, groups, ())
            for name in group["modules"]
        }


@dataclass(frozen=True)
class _Part:
    """Scheme of a module, that of its part, and the modules of blocks that have extra tensors."""

    scheme: Scheme
    usual: Scheme
    biases: list[str]
    shifts: list[str]
    input_factors: list[str]
    input_clips: list[str]


@register_quantizer(NAME)
class NativeQuantizer(HfQuantizer):
    """Puts integer linears, shifts and quantised attention in place, and packs again on saving."""

    quantization_config: NativeConfig
    requires_calibration = True  # learned by lrquant, never quantised while loading

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **rest: object) -> None:
        from lrquant.runtime.names import names_in_files

        config = self.quantization_config
        self._published = names_in_files(model, getattr(config, "experts", []))
        for name, module in list(model.named_modules()):
            form = expert_form(module)
            if form is not None:
                self._replace_experts(model, name, module, form)
            own = self._published(name)
            part = config.part_of(own)
            if isinstance(module, nn.Linear) and _ends_with(own, part.biases):
                _make_bias(module)
            if isinstance(module, nn.Linear) and own not in config.ignore:
                _set_attention(model, name, part.usual)
                self._replace(model, name, module, part)
            elif _ends_with(own, part.shifts):
                empty = torch.empty(module.weight.shape, dtype=torch.float32, device="meta")
                module.register_parameter("shift", nn.Parameter(empty, requires_grad=False))
                module.register_forward_hook(_shifted)
        for name, scheme in config.other_attentions.items():
            _set_own_attention(model.get_submodule(name), scheme)

    def _replace(self, model: nn.Module, name: str, module: nn.Linear, part: _Part) -> None:
        if part.scheme.weight_bits == FLOAT_BITS:
            module.register_forward_pre_hook(_QuantizedInput(part.scheme))
            return
        from lrquant.runtime.linear import IntegerLinear

        own = self._published(name)
        with torch.device("meta"):
            replacement = IntegerLinear(
                module.in_features,
                module.out_features,
                part.scheme,
                bias=_ends_with(own, part.biases),
                input_factor=_ends_with(own, part.input_factors),
                input_clip=_ends_with(own, part.input_clips),
            )
        model.set_submodule(name, replacement)
        parent = model.get_submodule(name.rpartition(".")[0])
        if not parent._non_persistent_buffers_set:
            # All of it is in the checkpoint; some models would initialise it by linears' weights.
            setattr(parent, "_is_hf_initialized", True)  # noqa: B010

    def _replace_experts(
        self, model: PreTrainedModel, name: str, module: nn.Module, form: ExpertForm
    ) -> None:
        from lrquant.runtime.experts import IntegerExperts, IntegerRows

        config, published = self.quantization_config, self._published
        names = getattr(config, "experts", None)
        if names is None or published(f"{name}.0.{names[0]}") in config.ignore:
            return
        sizes = _sizes_of_experts(module, form, names)
        owner = (IntegerRows if form.in_rows else IntegerExperts)(form.activation, tuple(names))
        model.set_submodule(name, owner)
        for expert in range(len(module.get_parameter(SECOND))):
            with torch.device("meta"):
                linears = {own: nn.Linear(*size, bias=False) for own, size in sizes.items()}
            owner.add(expert, linears)
            for own, linear in linears.items():
                full = f"{name}.{expert}.{own}"
                self._replace(model, full, linear, config.part_of(published(full)))

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **rest: object
    ) -> PreTrainedModel:
        _refuse_missing(model)
        for module in _integer_linears(model).values():
            if not module.weight_packed.is_meta:  # else it comes packed to each forward
                module.unpack()
        return model

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes of an element of what is loaded, when it is unpacked."""
        from lrquant.runtime.linear import IntegerLinear

        path, _, leaf = param_name.rpartition(".")
        module = model.get_submodule(path)
        if not isinstance(module, IntegerLinear) or param.is_floating_point():
            return param.element_size()
        return module.unpacked_bytes / param.numel() if leaf == "weight_packed" else 0

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The model's tensors, packed again."""
        state = model.state_dict()
        for name, module in _integer_linears(model).items():
            if module.packed_in_memory:
                continue
            state |= {f"{name}.{key}": tensor for key, tensor in module.packed().items()}
        return state, {}


def _sizes_of_experts(
    module: nn.Module, form: ExpertForm, names: list[str]
) -> dict[str, tuple[int, int]]:
    """Columns and rows of each of an expert's linears."""
    *inputs, down = names
    shapes = [module.get_parameter(name).shape[1:] for name in (form.first, SECOND)]
    shapes = shapes if form.transposed else [each[::-1] for each in shapes]
    (columns, rows), second = shapes
    return dict.fromkeys(inputs, (columns, rows // len(inputs))) | {down: (second[0], second[1])}


def _integer_linears(model: nn.Module) -> dict[str, IntegerLinear]:
    from lrquant.runtime.linear import IntegerLinear

    modules = model.named_modules()
    return {name: module for name, module in modules if isinstance(module, IntegerLinear)}


def _make_bias(module: nn.Linear) -> None:
    """Room for a bias that the model's own linear lacks."""
    if module.bias is None:
        empty = torch.empty(module.out_features, dtype=module.weight.dtype, device="meta")
        module.register_parameter("bias", nn.Parameter(empty, requires_grad=False))


def _set_attention(model: nn.Module, linear: str, scheme: Scheme) -> None:
    """Quantise Q, K and V of all attentions alike, if a linear is in one."""
    from lrquant.blocks.attention import attention_name

    config = getattr(model.get_submodule(linear.rpartition(".")[0]), "config", None)
    grid = attention_grid(scheme)
    if config is not None and grid is not None:
        config._attn_implementation = attention_name(grid, rotated=scheme.qk_hadamard)


def _set_own_attention(attention: nn.Module, scheme: Scheme) -> None:
    """Quantise Q, K and V of one attention, which then has a configuration of its own."""
    from lrquant.blocks.attention import attention_name, with_own_config

    name = attention_name(attention_grid(scheme), rotated=scheme.qk_hadamard)
    with_own_config(attention)._attn_implementation = name


def _refuse_missing(model: PreTrainedModel) -> None:
    """Tensors that the files lack hold anything: transformers marks what it loaded, and tied.

    Those that come to each forward from another place are not here to be marked.
    """
    missing = [
        name
        for name, parameter in model.named_parameters()
        if not parameter.is_meta and not getattr(parameter, "_is_hf_initialized", False)
    ]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise LRQuantError(
            f"checkpoint {model.name_or_path}: {missing[0]}{more} is missing; export the run again"
        )


def _ends_with(name: str, modules: list[str]) -> bool:
    """Whether a module's full name is one of a block's `modules`."""
    return any(name == module or name.endswith("." + module) for module in modules)


def _shifted(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    shift: Tensor = module.get_parameter("shift")
    if shift.is_meta:  # of another place, whence accelerate's hook fetches it for the forward alone
        shift = vars(module)["_hf_hook"].weights_map["shift"].to(output.device)
    return (output + shift).to(output.dtype)


class _QuantizedInput:
    """A linear with a dense weight reads quantised activations."""

    def __init__(self, scheme: Scheme) -> None:
        self._scheme = scheme

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        (values,) = inputs
        grid = activation_grid(self._scheme)
        if grid is None:
            return (values,)
        return (fake_quantize_tokens(values, grid, values.dtype),)
