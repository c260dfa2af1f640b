"""One GGUF file, its tensors unpacked and renamed as transformers does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
)

from lrquant.errors import UNREADABLE, LRQuantError
from lrquant.model.sources.checks import (
    damaged,
    file_state,
    fingerprint_of,
    first_line,
    require_unchanged,
    sound_file,
)
from lrquant.model.sources.gguf_header import require_sound_header
from lrquant.model.sources.protocol import WeightSource

_FLOATING_POINT = tuple(
    getattr(gguf.GGMLQuantizationType, name) for name in ("F64", "F32", "F16", "BF16")
)


class GGUFSource(WeightSource):
    """A GGUF file of a dense model under transformers' names; one tensor is unpacked at a time.

    Names, permutations and offsets are undone by transformers' own tensor processors.  Tensors
    without a transformers name (such as rope_freqs) are left out, as transformers does.
    """

    def __init__(self, path: Path, skeleton: PreTrainedModel) -> None:
        self.origin = str(path)
        self._path = sound_file(path)
        self._state = file_state(path)
        reader = _read_gguf(path)
        family = reader.fields["general.architecture"].contents()
        try:
            config = load_gguf_checkpoint(path, return_tensors=False)["config"]
            self._processor = TENSOR_PROCESSORS.get(family, TensorProcessor)(config=config)
            self._names = get_gguf_hf_weights_map(skeleton, self._processor)
            mapped = [tensor for tensor in reader.tensors if tensor.name in self._names]
            for kind in {tensor.tensor_type for tensor in mapped}:
                gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except UNREADABLE as error:
            raise LRQuantError(
                f"{path}: GGUF of architecture {family} cannot be unpacked ({first_line(error)}); "
                "use the safetensors model"
            ) from error
        self._stored = {self._names[tensor.name]: tensor for tensor in mapped}
        experts = [tensor.name for tensor in reader.tensors if "_exps" in tensor.name]
        if experts or len(self._stored) < len(mapped):
            raise LRQuantError(
                f"{path}: mixture-of-experts GGUF ({len(experts)} stacked expert tensors) is not "
                "supported; use a dense model or the safetensors model"
            )
        self._shapes = {name: tuple(t.shape) for name, t in skeleton.state_dict().items()}

    def names(self) -> frozenset[str]:
        return frozenset(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """The skeleton's shape if it differs only as processors may: transposed, axes of one."""
        stored = tuple(int(size) for size in reversed(self._stored[name].shape))
        expected = self._shapes.get(name, stored)
        same = sorted(n for n in stored if n > 1) == sorted(n for n in expected if n > 1)
        return expected if same else stored

    def dtype(self, name: str) -> str:
        return "float32"

    def tensor(self, name: str) -> Tensor:
        stored = self._stored[name]
        require_unchanged(self._path, self._state)  # it is mapped: cut short, it kills the process
        aside: dict[str, dict[str, Tensor]] = {"tensors": {}}
        weights, renamed, _ = self._processor.process(
            weights=gguf.dequantize(stored.data, stored.tensor_type),
            name=stored.name,
            tensor_key_mapping=self._names,
            parsed_parameters=aside,
        )
        if renamed is None:  # the processor has put the finished tensor aside
            return aside["tensors"][name]
        return torch.from_numpy(np.require(weights, requirements=["C", "W"]))

    def unpacked_from(self) -> str:
        return quantised_types(self._stored.values())

    def fingerprint(self) -> str:
        return fingerprint_of([self._path])


def quantised_types(tensors: Iterable[gguf.ReaderTensor]) -> str:
    """Types of those of the tensors that are quantised, those that hold most bytes first."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.tensor_type not in _FLOATING_POINT:
            sizes[tensor.tensor_type.name] += int(tensor.n_bytes)
    return " and ".join(name for name, _ in sizes.most_common())


def _read_gguf(path: Path) -> gguf.GGUFReader:
    require_sound_header(path)
    try:
        reader = gguf.GGUFReader(path)
        if "general.architecture" not in reader.fields or reader.byte_order != "I":
            raise ValueError("no general.architecture, or made for another byte order")
    except UNREADABLE as error:
        raise damaged(path, error) from error
    split = reader.fields.get("split.count")
    if split is not None and split.contents() > 1:
        raise LRQuantError(
            f"{path}: one of {split.contents()} parts of a model; join them with "
            "`llama-gguf-split --merge`"
        )
    return reader
