"""Memory of a step over a block of experts, counted on tensors without values.

    python benchmarks/experts.py [--experts 128] [--width 768] [--hidden 2048] [--tokens 2048]
        [--groups 0 128 16]

Counts what a step allocates for the weights of one block: those that are stored, what learning
holds of them on the way to the products and back, parameters with what optimizers and the choice of
an epoch keep of them.  Activations are counted by hand, of one sample.  The default is the shape of
Qwen3-30B-A3B; attention is its own at any shape.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig

from gpu.allocations import Allocations
from lrquant.architectures import architecture_of
from lrquant.blocks.experts import BlockTensors
from lrquant.blocks.plan import learned_by, plan_block
from lrquant.blocks.view import BlockView
from lrquant.config.scheme import Scheme
from lrquant.config.schemes import Schemes
from lrquant.learn.groups import groups_of
from lrquant.model.model import Model
from lrquant.model.skeleton import build_skeleton
from lrquant.model.sources import WeightSource

GIB = 2**30
LEARNED = {
    "clipping": {"lwc": True},
    "LRQuant+": {"lwc": True, "let": True, "rotation": True},
    "LRQuant+ and rounding": {"lwc": True, "let": True, "rotation": True, "rounding": True},
}


def main() -> None:
    """Count, and print a row for each set of what is learned."""
    options = _options()
    config = Qwen3MoeConfig(
        hidden_size=options.hidden,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=options.experts,
        num_experts_per_tok=8,
        moe_intermediate_size=options.width,
        vocab_size=256,
    )
    family = architecture_of(config)
    model = Model("counted", build_skeleton(config, family), None, _none(), family)
    block = model.blocks[0].state_dict().items()
    stored = {name: tensor.data.to(torch.bfloat16) for name, tensor in block}
    held = sum(tensor.nbytes for tensor in stored.values())
    picked = options.tokens * 8
    activations = picked * (2 * (2 * options.hidden + 5 * options.width) + 12 * options.hidden)
    print(f"stored {held / GIB:.2f} GiB, activations of a sample about {activations / GIB:.2f} GiB")
    for name, learned in LEARNED.items():
        plan = plan_block(model, 0, Schemes(Scheme(4, 16, 128, False)))
        for size in options.groups:
            view = BlockView(
                stored, plan, learned_by(**learned), torch.bfloat16, by_expert=size > 0
            )
            weights, parameters = _last_group(view, size)
            whole = held + weights + parameters + activations
            words = f"groups of {size}" if size else "all, kept"
            print(
                f"{name}, {words}: weights of a step {weights / GIB:.2f} GiB at the most, "
                f"parameters {parameters / GIB:.2f} GiB, all {whole / GIB:.2f} GiB"
            )


def _last_group(view: BlockView, size: int) -> tuple[int, int]:
    """Bytes at the most of a step's weights, and of parameters with all that is kept of them.

    In the last group, when all others are learned; its optimizer has two moments where it is Adam.
    """
    shapes = view.parameter_shapes().items()
    view.parameters = {name: torch.empty(shape, device="meta") for name, shape in shapes}
    last = groups_of(view, size)[-1] if size else frozenset(view.parameters)
    if size:
        view.still = last
        view.compact_()
    view.still = frozenset(view.parameters) - last
    parameters = sum(tensor.nbytes for tensor in view.parameters.values())
    for name, tensor in view.moving.items():
        moments = 0 if name.startswith("rounding.") else 2
        parameters += (moments + 2) * tensor.nbytes  # its start and the best beside
        tensor.requires_grad_(True)
    with Allocations([*view.stored.values(), *view.parameters.values()]) as allocations:
        tensors = view.tensors()
        _backward(tensors.values())
        if isinstance(tensors, BlockTensors):
            for expert in range(next(iter(tensors.apart.values())).count):
                _backward([each.make(expert) for each in tensors.apart.values()])
    codes = sum(shape.rows * shape.columns for shape in view.shapes.quantized.values())
    most = sum(allocations.most.values())
    return max(most + codes * (last != frozenset(view.parameters)), codes), parameters


def _backward(outputs: Iterable[Tensor]) -> None:
    learned = [each for each in outputs if each.requires_grad]
    if learned:
        torch.autograd.backward(learned, [torch.empty_like(each) for each in learned])


def _none() -> WeightSource:
    class Nothing(WeightSource):
        origin = "nothing"

    return Nothing()  # type: ignore[abstract]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--groups", type=int, nargs="+", default=[0, 128, 16])
    return parser.parse_args()


if __name__ == "__main__":
    main()
