"""A model whose weights have left the grid that they were unpacked from: trained on, and scaled.

    python benchmarks/off_the_grid.py FOLDER OUT --text FILE [--steps 300] [--spread 0.05]

FOLDER is a transformers folder of a LLaMA in float32, FILE one of text that is neither calibrated
nor measured on.  A few hundred steps move weights by little; so each channel between a norm and
what reads it, v and o, up and down is also scaled by exp(spread z), z normal, on one side and
divided by it on the other, which changes nothing that the model computes.  Prints how far weights
are from the nearest grid of groups of 32 and 4 bits, in its steps, before and after: 0 on a grid,
0.25 where they lie anywhere.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

GROUP, STEPS = (
    32,
    15,
)  # of Q4_1: columns that share a scale, and steps from its first code to its last


def main() -> None:
    """Train, and save."""
    options = _options()
    torch.manual_seed(options.seed)
    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32).train()
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    text = Path(options.text).read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    windows = ids[: len(ids) // options.tokens * options.tokens].view(-1, options.tokens)
    order = torch.randperm(len(windows))[: options.steps]
    print(f"before: {_from_a_grid(model):.3f} steps from the nearest grid on average")
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(order))
    for step, window in enumerate(order):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(windows[window][None], labels=windows[window][None]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        if step % 20 == 0:
            print(f"step {step} of {len(order)}: loss {float(loss):.3f}", flush=True)
    _scale_(model, options.spread)
    print(f"after: {_from_a_grid(model):.3f} steps from the nearest grid on average")
    model.eval().save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)


@torch.no_grad()
def _scale_(model: PreTrainedModel, spread: float) -> None:
    """Scale channels on their way from one weight to the next, by what cancels."""
    config = model.config
    width, repeats = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        for norm, readers in (
            (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            scales = _drawn(len(norm.weight), spread)
            norm.weight.div_(scales)
            for linear in readers:
                linear.weight.mul_(scales)
        scales = _drawn(len(attention.v_proj.weight), spread)
        attention.v_proj.weight.div_(scales[:, None])
        heads = scales.view(-1, width).repeat_interleave(repeats, dim=0)
        attention.o_proj.weight.mul_(heads.reshape(-1))
        scales = _drawn(len(mlp.up_proj.weight), spread)
        mlp.up_proj.weight.div_(scales[:, None])
        mlp.down_proj.weight.mul_(scales)


def _drawn(channels: int, spread: float) -> Tensor:
    return torch.exp(spread * torch.randn(channels))


@torch.no_grad()
def _from_a_grid(model: PreTrainedModel) -> float:
    """Mean distance of the blocks' linears from round-to-nearest in groups, in steps."""
    distances = []
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            groups = module.weight.view(-1, GROUP)
            low, high = groups.aminmax(dim=1, keepdim=True)
            codes = (groups - low) / ((high - low) / STEPS).clamp(min=1e-8)
            distances.append((codes - codes.round()).abs().mean())
    return float(torch.stack(distances).mean())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("out")
    parser.add_argument("--text", required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rate", type=float, default=5e-5)
    parser.add_argument("--spread", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
