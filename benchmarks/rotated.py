"""A model of the llama family with orthogonal rotations folded in: the same function.

    python benchmarks/rotated.py FOLDER OUT [--residual] [--heads] [--seed 0]

FOLDER is a transformers folder in float32.  `--residual` is R1 of SpinQuant (Liu et al., 2024): the
residual stream is turned by a Hadamard matrix with random signs, norm weights moved into what reads
them, the head untied from the embedding.  `--heads` is R2: each head of values by a Hadamard
matrix, undone in the output projection.  What is learned of OUT is compared with what is learned of
FOLDER.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


def main() -> None:
    """Fold, compare the logits of both, and save."""
    options = _options()
    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32)
    ids = torch.arange(1, 65)[None]
    with torch.no_grad():
        before = model(ids).logits
        if options.residual:
            _turn_residual(model, np.random.default_rng(options.seed))
        if options.heads:
            _turn_heads(model)
        apart = (model(ids).logits - before).abs().max()
    print(f"logits differ by {apart:.1e} of {before.abs().max():.1e}")
    model.save_pretrained(options.out)
    AutoTokenizer.from_pretrained(options.folder).save_pretrained(options.out)


def hadamard(size: int) -> Tensor:
    """An orthogonal matrix (size, size) of entries of one magnitude, of sizes 2**a * 12**b."""
    matrix = torch.ones((1, 1), dtype=torch.float64)
    while size > 1:
        factor = _of_twelve() if size % 12 == 0 else torch.tensor([[1.0, 1.0], [1.0, -1.0]])
        if size % len(factor):
            raise SystemExit(f"no Hadamard matrix of size {size} here")
        matrix, size = torch.kron(matrix, factor.double()), size // len(factor)
    return matrix / len(matrix) ** 0.5


def _of_twelve() -> Tensor:
    """Paley's matrix of 12, of the squares modulo 11."""
    squares = {i * i % 11 for i in range(1, 11)}
    signs = [[0 if i == j else 1 if (i - j) % 11 in squares else -1 for j in range(11)]
             for i in range(11)]  # fmt: skip
    matrix = torch.eye(12)
    matrix[0, 1:], matrix[1:, 0] = 1, -1
    matrix[1:, 1:] += torch.tensor(signs)
    return matrix


def _turn_residual(model: PreTrainedModel, generator: np.random.Generator) -> None:
    base = model.get_decoder()
    size = model.config.hidden_size
    turn = torch.tensor(generator.choice([-1.0, 1.0], size))[:, None] * hadamard(size)
    head = model.get_output_embeddings()
    model.config.tie_word_embeddings = False
    head.weight = nn.Parameter(head.weight.detach().clone())
    embedding = model.get_input_embeddings()
    embedding.weight = nn.Parameter((embedding.weight.double() @ turn).float())
    _read(base.norm, [head], turn)
    for block in base.layers:
        attention, mlp = block.self_attn, block.mlp
        _read(block.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj], turn)
        _read(block.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj], turn)
        for writer in (attention.o_proj, mlp.down_proj):
            writer.weight.copy_(turn.T @ writer.weight.double())


def _read(norm: nn.Module, readers: list[nn.Linear], turn: Tensor) -> None:
    """A norm's weight goes into its readers, which read the turned stream."""
    weight = norm.get_parameter("weight")
    for reader in readers:
        reader.weight.copy_(reader.weight.double() * weight.double() @ turn)
    weight.fill_(1)


def _turn_heads(model: PreTrainedModel) -> None:
    for block in model.get_decoder().layers:
        values, output = block.self_attn.v_proj.weight, block.self_attn.o_proj.weight
        turn = hadamard(block.self_attn.head_dim)
        heads = values.double().unflatten(0, (-1, len(turn)))
        values.copy_((turn.T @ heads).flatten(0, 1))
        output.copy_((output.double().unflatten(1, (-1, len(turn))) @ turn).flatten(1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder")
    parser.add_argument("out")
    parser.add_argument("--residual", action="store_true")
    parser.add_argument("--heads", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
