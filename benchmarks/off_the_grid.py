"""A model whose weights have left the grid that they were unpacked from: trained a little further.

    python benchmarks/off_the_grid.py FOLDER OUT --text FILE [--steps 300] [--tokens 512]

FOLDER is a transformers folder in float32, FILE one of text that is neither calibrated nor measured
on.  Every weight then lies between the values of the 4-bit file that it came from, as those of a
model that was never quantised do.  Prints how far linears have moved, in steps of that grid.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

GROUP, STEPS = 32, 15  # of Q4_1: columns that share a scale, and steps between its codes


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
    before = {name: weight.detach().clone() for name, weight in _linears(model).items()}
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
    moved = [_steps_moved(before[name], weight) for name, weight in _linears(model).items()]
    print(f"linears moved by {torch.stack(moved).mean():.2f} steps of their 4-bit grid on average")
    model.eval().save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)


def _linears(model: torch.nn.Module) -> dict[str, Tensor]:
    return {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith("model.layers.")
    }


def _steps_moved(before: Tensor, after: Tensor) -> Tensor:
    groups = before.view(-1, GROUP)
    step = (groups.amax(1) - groups.amin(1)) / STEPS
    return ((after.detach() - before).view(-1, GROUP).abs() / step.clamp(min=1e-8)[:, None]).mean()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("out")
    parser.add_argument("--text", required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rate", type=float, default=5e-5)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
