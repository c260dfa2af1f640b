"""A linear of a native checkpoint: packed while it is loaded and saved, int8 codes in memory."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import NamedTuple

import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from torch import Tensor, nn
from torch.nn.functional import linear

from lrquant.config.scheme import Scheme
from lrquant.numerics.grids.integer import IntegerGrid
from lrquant.numerics.grids.schemes import activation_grid
from lrquant.numerics.hadamard import hadamard
from lrquant.numerics.packing import packed_weight
from lrquant.numerics.products import affine_product, quantize_tokens
from lrquant.runtime.reads import LAST_READ


class Integers(NamedTuple):
    """Codes int8 (units * out, unit), one unit below the other.

    Sums of codes (units, out) and zero points (groups, out), int32.
    """

    codes: Tensor
    code_sums: Tensor
    zero_points: Tensor


class Tokens(NamedTuple):
    """Codes int8 (tokens, in), scales float32 and zero points int32 (tokens, groups).

    `sums` int32 (tokens, units) are those of codes less zero points over each unit's columns.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    sums: Tensor


class IntegerLinear(nn.Module):
    """``y = (x H input_factor) W^T + bias`` with W, and x below 16 bits, as integers.

    H is a Hadamard matrix, where the scheme has one.  Activations are quantised per token or group
    of its channels, products and zero-point corrections are exact in int32, and the scales follow
    in float32; with 16-bit activations the weight is decoded to x's dtype.  Before `unpack` it
    holds the checkpoint's tensors, named as in compressed-tensors' pack-quantized layout, of which
    each forward makes `Integers` that are then forgotten; after it these alone.  A unit is the most
    columns that share their scales on both sides.
    """

    codes: Tensor
    code_sums: Tensor
    zero_points: Tensor
    weight_packed: Tensor
    weight_zero_point: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    input_factor: Tensor | None
    input_clip: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        *,
        bias: bool,
        input_factor: bool = False,
        input_clip: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        self.group_size = scheme.group_size or in_features
        self._grid = activation_grid(scheme)
        self.packed_in_memory = True
        groups = in_features // self.group_size
        self._unit = math.gcd(self.group_size, scheme.activation_group_size or in_features)
        made = (scheme.hadamard or self._grid) and not (input_factor or input_clip)
        self._how = self._told() if made else None  # None: of what it reads none is shared
        bits = scheme.weight_bits
        self._register("weight_packed", (out_features, -(-in_features * bits // 32)), torch.int32)
        self._register("weight_shape", (2,), torch.int64)
        self._register("weight_scale", (out_features, groups))
        if not scheme.symmetric:
            self._register(
                "weight_zero_point", (-(-out_features * bits // 32), groups), torch.int32
            )
        self._register("bias", (out_features,) if bias else None)
        self._register("input_factor", (in_features,) if input_factor else None)
        self._register("input_clip", (2,) if input_clip else None)

    def _register(
        self, name: str, shape: tuple[int, ...] | None, dtype: torch.dtype = torch.float32
    ) -> None:
        empty = None if shape is None else torch.empty(shape, dtype=dtype)
        parameter = None if empty is None else nn.Parameter(empty, requires_grad=False)
        self.register_parameter(name, parameter)

    def unpack(self) -> None:
        """Turn what was loaded into the integers that the products take, for all forwards."""
        integers = self._unpacked()
        del self.weight_packed, self.weight_shape
        if not self.scheme.symmetric:
            del self.weight_zero_point
        for name, tensor in integers._asdict().items():
            self.register_buffer(name, tensor, persistent=False)
        if self._grid and self.input_clip is not None and self.input_factor is None:
            self._how = (*self._told(), *self.input_clip.tolist())
        self.packed_in_memory = False

    @property
    def unpacked_bytes(self) -> int:
        """What the integers take after `unpack`."""
        columns = self.in_features // self._unit + self.in_features // self.group_size
        return self.out_features * (self.in_features + columns * torch.int32.itemsize)

    def _unpacked(self) -> Integers:
        """The integers of what was loaded."""
        bits, shape = self.scheme.weight_bits, (self.out_features, self.in_features)
        codes = unpack_from_int32(self.weight_packed.data, bits, torch.Size(shape))
        zero_points = torch.zeros_like(self.weight_scale, dtype=torch.int32)
        if not self.scheme.symmetric:
            zero_points = unpack_from_int32(
                self.weight_zero_point.data, bits, zero_points.shape, packed_dim=0
            ).int()
        codes = codes.view(self.out_features, -1, self._unit).transpose(0, 1).contiguous()
        sums = codes.sum(-1, dtype=torch.int32)
        return Integers(codes.view(-1, self._unit), sums, zero_points.t().contiguous())

    def _integers(self) -> Integers:
        if self.packed_in_memory:
            return self._unpacked()
        return Integers(self.codes, self.code_sums, self.zero_points)

    def packed(self) -> dict[str, Tensor]:
        """The tensors that `unpack` took apart, as a checkpoint holds them."""
        codes = self._in_rows(self.codes)
        zero_points = None if self.scheme.symmetric else self.zero_points.t().to(torch.int8)
        return packed_weight(codes, zero_points, self.scheme.weight_bits)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) that the codes stand for."""
        integers = self._integers()
        codes = self._in_rows(integers.codes).view(self.out_features, -1, self.group_size).float()
        values = codes.sub_(integers.zero_points.t()[..., None]).mul_(self.weight_scale[..., None])
        return values.view(self.out_features, -1).to(dtype)

    def _in_rows(self, codes: Tensor) -> Tensor:
        """(units * out, unit) to (out, in), int8."""
        units = codes.view(-1, self.out_features, self._unit)
        return units.transpose(0, 1).reshape(self.out_features, self.in_features)

    def forward(self, values: Tensor) -> Tensor:
        """(..., in) to (..., out), in the dtype of `values`."""
        dtype = values.dtype
        if self._grid is None:
            bias = None if self.bias is None else self.bias.to(dtype)
            (read,) = self._read(values)
            return linear(read, self.weight(dtype), bias)
        output = self._product(Tokens(*self._read(values)), self._grid, self._integers())
        if self.bias is not None:
            output += self.bias
        return output.to(dtype).view(*values.shape[:-1], self.out_features)

    def _read(self, values: Tensor) -> tuple[Tensor, ...]:
        """What products take: values in their dtype, or `Tokens`."""
        if self._how is None:
            return self._made(values)
        return LAST_READ.of(values, self._how, self._made)

    def _told(self) -> tuple[Hashable, ...]:
        """All that what it reads is made by, but for factors and clipping."""
        return self.scheme.hadamard, self._grid, self._unit

    def _made(self, values: Tensor) -> tuple[Tensor, ...]:
        read = hadamard(values) if self.scheme.hadamard else values
        if self.input_factor is not None:
            read = read * self.input_factor.to(read.dtype)
        if self._grid is None:
            return (read.to(values.dtype),)
        size = self._grid.size(self.in_features)
        codes, scale, zero_point = quantize_tokens(
            read.reshape(-1, size), self._grid, self.input_clip
        )
        units = codes if self._unit == size else codes.unflatten(-1, (-1, self._unit))
        sums = units.sum(-1, keepdim=units is codes, dtype=torch.int32)
        tokens = Tokens(codes, scale, zero_point, sums.sub_(zero_point, alpha=self._unit))
        if size == self.in_features:
            return tokens
        parts = self.in_features // size
        rows = len(codes) // parts
        return Tokens(*(each.view(rows, parts * each.shape[1]) for each in tokens))

    def _product(self, tokens: Tokens, grid: IntegerGrid, integers: Integers) -> Tensor:
        """To float32 (tokens, out), without the bias."""
        if self._unit == self.in_features:
            codes = tokens.codes.contiguous()
            totals = affine_product(codes, tokens.zero_point, tokens.sums, *integers).float()
            return totals.mul_(self.weight_scale.t()).mul_(tokens.scale)
        codes, scale, zero_point, sums = tokens
        size, weights = grid.size(self.in_features), integers.codes.split(self.out_features)
        output: Tensor | None = None
        for unit, columns in enumerate(codes.split(self._unit, 1)):
            own, group = unit * self._unit // size, unit * self._unit // self.group_size
            totals = affine_product(
                columns.contiguous(),
                zero_point[:, own, None],
                sums[:, unit, None],
                weights[unit],
                integers.code_sums[unit],
                integers.zero_points[group],
            ).float()
            if scale.shape[1] > 1:
                totals.mul_(scale[:, own, None])
            if output is None:
                output = totals.mul_(self.weight_scale[:, group])
            else:
                output.addcmul_(totals, self.weight_scale[:, group])
        assert output is not None
        return output if scale.shape[1] > 1 else output.mul_(scale)

    def extra_repr(self) -> str:
        """Sizes and scheme."""
        return f"{self.in_features}, {self.out_features}, {self.scheme.name}"
