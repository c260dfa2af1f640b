"""Tensors outside the language blocks, which no learning looks at: are they numbers?"""

from __future__ import annotations

import torch
from torch import Tensor

from lrquant.architectures import architecture_of
from lrquant.errors import LRQuantError
from lrquant.model.device import dtype_name
from lrquant.model.model import Model

_PIECE = 1 << 24  # elements looked at at once


def require_finite(model: Model, dtype: torch.dtype | None = None) -> None:
    """Refuse a model whose embedding, norms, head or vision tower hold values that are not finite.

    With a `dtype`, that of a checkpoint to be written, values that are too large for it too.
    """
    inside = architecture_of(model.skeleton.config).blocks + "."
    for name in model.skeleton.state_dict():
        if name.startswith(inside) or name in model.tied_names:
            continue
        tensor = model.source.tensor(name)
        if tensor.is_floating_point():
            _require_finite(model, name, tensor, dtype)


def _require_finite(model: Model, name: str, tensor: Tensor, dtype: torch.dtype | None) -> None:
    for piece in tensor.flatten().split(_PIECE):
        if not torch.isfinite(piece.float()).all():
            raise LRQuantError(
                f"model {model.name}: {name} holds values that are not finite; get it again, or "
                "mend that tensor first"
            )
        if dtype is not None and not torch.isfinite(piece.to(dtype)).all():
            raise LRQuantError(
                f"model {model.name}: {name} holds values too large for "
                f"{dtype_name(dtype)}, the checkpoint's dtype; use another "
                "--save_dtype or --format"
            )
