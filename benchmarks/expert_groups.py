"""Groups of experts: memory, time and losses of small blocks learned some experts at a time.

    python benchmarks/expert_groups.py [--experts 64] [--hidden 768] [--width 384]
        [--groups 0 64 16]

Each size of groups learns the same two blocks in a process of its own; weights and tokens are
random, of Qwen3-MoE's shape.  Memory is what learning adds to the process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from lrquant import quantize
from lrquant.blocks.workbench import peak_memory

CPU = torch.device("cpu")
LEARNED = {
    "LRQuant+": {"lr_plus": True},
    "LRQuant+ and rounding": {"lr_plus": True, "rounding": True},
}


def main() -> None:
    """A row for each size of groups and each set of what is learned, or one of them measured."""
    options = _options()
    if options.group is not None:
        print(json.dumps(_measured(options)))
        return
    for learned in LEARNED:
        for group in options.groups:
            command = [sys.executable, __file__, *sys.argv[1:], "--learned", learned]
            command += ["--group", str(group)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            row = json.loads(output.splitlines()[-1])
            losses = ", ".join(f"{first:.4g} to {last:.4g}" for first, last in row["losses"])
            words = f"groups of {group}" if group else "all, kept"
            print(
                f"{learned}, {words}: {row['memory'] / 1e9:.2f} GB, "
                f"{row['seconds']:.0f} s a block, losses {losses}"
            )


def _measured(options: argparse.Namespace) -> dict[str, object]:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=options.hidden,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=options.experts,
        num_experts_per_tok=8,
        moe_intermediate_size=options.width,
        vocab_size=256,
        initializer_range=0.05,
    )
    model = Qwen3MoeForCausalLM(config).to(torch.bfloat16).eval()
    ids = torch.randint(256, (options.samples, options.tokens))
    before = peak_memory(CPU)
    with tempfile.TemporaryDirectory() as folder:
        quantize(
            model,
            "W3A16g128",
            calibration=ids,
            output_dir=folder,
            epochs=options.epochs,
            expert_tokens=0,
            expert_group=options.group,
            precision="bfloat16",
            device="cpu",
            report=False,
            examples=False,
            **LEARNED[options.learned],
        )
        lines = Path(folder, "blocks.jsonl").read_text(encoding="utf-8").splitlines()
    records = list(map(json.loads, lines))
    return {
        "memory": records[-1]["peak_memory_bytes"] - before,
        "seconds": sum(each["seconds"] for each in records) / len(records),
        "losses": [(each["initial_loss"], each["final_loss"]) for each in records],
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--groups", type=int, nargs="+", default=[0, 64, 16])
    parser.add_argument("--group", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--learned", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
