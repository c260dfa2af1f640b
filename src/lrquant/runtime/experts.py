"""Experts of a native checkpoint: integer linears of each, beside what is between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


class IntegerExperts(nn.Module):
    """Each expert's linears under its number, by the names that files have for them.

    `names` are those of gate, up and down, or of up and down; `original` is the module that they
    take the place of, whose activation they share.
    """

    def __init__(self, original: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.names = names
        between = "_apply_gate" if original.has_gate else "act_fn"
        self.__dict__["activation"] = getattr(original, between)

    def add(self, expert: int, linears: Mapping[str, nn.Module]) -> None:
        """The linears of the next expert."""
        self.add_module(str(expert), nn.ModuleDict(dict(linears)))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Output (tokens, hidden) of the experts that each token goes to, as chosen and weighed."""
        *inputs, down = self.names
        activation: Callable[[Tensor], Tensor] = self.__dict__["activation"]
        chosen = top_k_index.shape[1]
        order = top_k_index.flatten().argsort(stable=True)
        counts = top_k_index.flatten().bincount(minlength=len(self._modules)).tolist()
        outputs = []
        for expert, tokens in enumerate((order // chosen).split(counts)):
            if len(tokens):
                linears, values = self.get_submodule(str(expert)), hidden_states[tokens]
                own = (linears.get_submodule(name) for name in inputs)
                inner = activation(torch.cat([linear(values) for linear in own], -1))
                outputs.append(linears.get_submodule(down)(inner))
        weighted = torch.cat(outputs) * top_k_weights.flatten()[order, None]
        joined = weighted[order.argsort()].unflatten(0, top_k_index.shape).sum(1)
        return joined.to(hidden_states.dtype)
