"""Experts of a native checkpoint: integer linears of each, beside what is between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn


class IntegerExperts(nn.Module):
    """Each expert's linears under its number, by the names that files have for them.

    `names` are those of gate, up and down, or of up and down; `activation` is that of the module
    which they take the place of.
    """

    def __init__(self, activation: Callable[[Tensor], Tensor], names: tuple[str, ...]) -> None:
        super().__init__()
        self.names = names
        self.__dict__["activation"] = activation

    def add(self, expert: int, linears: Mapping[str, nn.Module]) -> None:
        """The linears of the next expert."""
        self.add_module(str(expert), nn.ModuleDict(dict(linears)))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Output (tokens, hidden) of the experts that each token goes to, as chosen and weighed."""
        chosen = top_k_index.shape[1]
        order = top_k_index.flatten().argsort(stable=True)
        counts = top_k_index.flatten().bincount(minlength=len(self._modules)).tolist()
        tokens = (order // chosen).split(counts)
        outputs = self.outputs(hidden_states[own] for own in tokens)
        weighted = outputs * top_k_weights.flatten()[order, None]
        joined = weighted[order.argsort()].unflatten(0, top_k_index.shape).sum(1)
        return joined.to(hidden_states.dtype)

    def outputs(self, values: Iterable[Tensor]) -> Tensor:
        """What all experts give of the values (tokens, hidden) that each gets, in their order."""
        *inputs, down = self.names
        activation: Callable[[Tensor], Tensor] = self.__dict__["activation"]
        outputs = []
        for expert, own in enumerate(values):
            if len(own):
                linears = self.get_submodule(str(expert))
                inner = torch.cat([linears.get_submodule(name)(own) for name in inputs], -1)
                outputs.append(linears.get_submodule(down)(activation(inner)))
        return torch.cat(outputs)


class IntegerRows(IntegerExperts):
    """The same where each expert gets a row of every token, 0 where that does not go to it."""

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """Output (experts * tokens, hidden), of rows of that shape."""
        rows = hidden_states.unflatten(0, (len(self._modules), -1))
        reached = (rows != 0).any(-1)
        places = reached.nonzero(as_tuple=True)
        outputs = self.outputs(rows[places].split(reached.sum(1).tolist()))
        return torch.zeros_like(rows).index_put(places, outputs.to(rows.dtype)).flatten(0, 1)
