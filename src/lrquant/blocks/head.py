"""All that comes after the last block: final norm and head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from lrquant.blocks.stubs import Arguments, stubs
from lrquant.model.model import Model

HEAD_TOKENS = 512  # whose logits are in memory at once, where they are many
_FEWEST = 16
_KEPT = (1 << 25) - 1  # bytes: what is larger glibc gives back to the system, and is given anew


def outputs(model: Model) -> int:
    """How many logits there are of a token, or of a picture that is classified."""
    config = model.config
    return int(config.num_labels or 0) if model.architecture.reads_pixels else config.vocab_size


def tokens_at_once(device: torch.device, vocabulary: int) -> int:
    """Of how many tokens logits should be in memory at once.

    On a CPU so few that their memory is that of the ones before, a power of two: pages made anew
    each time cost as much as the products.
    """
    if device.type != "cpu":
        return HEAD_TOKENS
    most = _KEPT // torch.float32.itemsize // vocabulary
    return min(HEAD_TOKENS, max(_FEWEST, 1 << most.bit_length() >> 1))


class Head:
    """Everything after the last block: final norm and head, on hidden states."""

    def __init__(self, model: Model, device: torch.device, dtype: torch.dtype) -> None:
        self._model, self._device = model, device
        self._tensors = model.outer_tensors(device, dtype, head=True, embeddings=False)

    @property
    def at_once(self) -> int:
        """Of how many tokens it is to be asked for logits at once."""
        return tokens_at_once(self._device, outputs(self._model))

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """Logits (batch, tokens, vocabulary), or (batch, classes) of a classifier.

        Of final hidden states (batch, tokens, hidden).
        """
        with torch.no_grad():
            return self.logits(hidden_states)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """The same, differentiable in the hidden states."""
        model = self._model
        visits = [lambda hidden, arguments: hidden_states] * len(model.blocks)
        handles = cast_outer_linears(model.skeleton, model.block_lists)
        try:
            with stubs(model.blocks, visits, model.architecture.in_tuples, model.residuals):
                return functional_call(
                    model.skeleton,
                    self._tensors,
                    (),
                    self._inputs(hidden_states),
                    tie_weights=False,
                ).logits
        finally:
            for handle in handles:
                handle.remove()

    def _inputs(self, hidden_states: Tensor) -> Arguments:
        """Inputs whose only use is that the model has some."""
        if self._model.architecture.reads_pixels:
            config = self._model.config
            shape = len(hidden_states), config.num_channels, config.image_size, config.image_size
            return {"pixel_values": torch.zeros(shape, device=self._device)}
        ids = torch.zeros(hidden_states.shape[:2], dtype=torch.long, device=self._device)
        return {"input_ids": ids, "use_cache": False}


def cast_outer_linears(module: nn.Module, block_lists: Sequence[str]) -> list[RemovableHandle]:
    """Hook every linear outside the blocks to cast its input to its weight's dtype."""
    inside = tuple(path + "." for path in block_lists)

    def cast(linear: nn.Linear, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (inputs[0].to(linear.weight.dtype),)

    return [
        linear.register_forward_pre_hook(cast)
        for name, linear in module.named_modules()
        if isinstance(linear, nn.Linear) and not name.startswith(inside)
    ]
