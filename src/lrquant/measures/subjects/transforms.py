"""compressed-tensors' transform_config, which transformers leaves out without a word.

What of it is done at run time is put into a loaded model by the library that defines it.  Weights
are stored as its other part left them.
"""

from __future__ import annotations

from compressed_tensors.transform import (
    TransformBase,
    TransformConfig,
    TransformFactory,
    TransformScheme,
)
from compressed_tensors.transform.utils.hadamard import deterministic_hadamard_matrix
from torch import nn
from transformers import PreTrainedModel

from lrquant.errors import LRQuantError
from lrquant.files.whole import JsonObject

_LINEARS = ("input", "output")


class Transforms:
    """What is done at run time by a checkpoint's quantization_config, which may have none of it.

    Raises LRQuantError for what is not made by its size alone, and for what is not of linears.
    """

    def __init__(self, name: str, quantization: JsonObject) -> None:
        try:
            whole = TransformConfig.model_validate(
                quantization.get("transform_config") or {"config_groups": {}}
            )
        except ValueError as error:
            raise _odd(name, "is none that compressed-tensors knows") from error
        self._schemes: dict[str, TransformScheme] = {}
        for group, scheme in whole.config_groups.items():
            online = [where for where in scheme.apply if where.is_online()]
            if not online:
                continue
            if scheme.type != "hadamard" or scheme.randomize:
                raise _odd(name, f"multiplies by {scheme.type} matrices of its own")
            if any(where.location not in _LINEARS for where in online):
                raise _odd(name, "is not of linears alone")
            self._schemes[group] = scheme.model_copy(update={"apply": online})

    def is_matrix(self, tensor: str) -> bool:
        """Whether a tensor of the files is one of the matrices, which are made here."""
        places = (f"{g}_{w.location}" for g, own in self._schemes.items() for w in own.apply)
        return any(tensor.endswith(f".{place}.weight") for place in places)

    def enter(self, module: PreTrainedModel) -> None:
        """Have a model's linears multiply what they read, and what they give.

        Of linears that lie on the disk the library makes matrices without values.
        """
        for group, scheme in self._schemes.items():
            factory = TransformFactory.from_scheme(scheme, name=group)
            factory.apply_to_model(module, use_tqdm=False)
        whole: dict[int, nn.Parameter] = {}
        for each in module.modules():
            if isinstance(each, TransformBase) and each.weight.is_meta:
                size = len(each.weight)
                if size not in whole:
                    matrix = deterministic_hadamard_matrix(size, each.weight.dtype)
                    whole[size] = nn.Parameter(matrix, requires_grad=False)
                each.weight = whole[size]


def _odd(name: str, what: str) -> LRQuantError:
    return LRQuantError(
        f"checkpoint {name}: its transform_config {what}, and transformers leaves it out, so "
        "something else would be computed; measure it in the software that wrote it"
    )
