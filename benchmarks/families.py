"""Time and memory of learning one block of each kind, family by family, at small real proportions.

    OMP_NUM_THREADS=1 python benchmarks/families.py [--only NAME …] [--samples 8] [--tokens 256]

Every model has one block of each of its family's kinds, with the proportions of a published one (of
heads, experts, ranks and widths) at a few hundred hidden channels.  Weights are random, drawn as
transformers initialises that family, since none of the real ones is small.  LRQuant+ and learned
rounding (`--recipe fast`), one epoch; a process a model, so that peaks are its own.  Seconds are
processor time, and memory the process' peak less what it had before, of which the model is a part.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lrquant import quantize
from lrquant.measures.rows import table
from lrquant.runs.block_file import BlockRecord
from lrquant.runs.progress import Progress

VOCABULARY, SCHEMES = 512, ("W4A16g64", "W4A4")
MIB = 2**20
_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
_DELTA = {"linear_num_key_heads": 4, "linear_num_value_heads": 8}
_DELTA |= {"linear_key_head_dim": 64, "linear_value_head_dim": 64}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_ROUTED = {"moe_intermediate_size": 256, "num_experts_per_tok": 8}
_LATENT = {"q_lora_rank": 192, "kv_lora_rank": 64, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32}
_LATENT |= {"num_attention_heads": 8, "num_key_value_heads": 8, "v_head_dim": 64}
_GROUPS = {"n_shared_experts": 1, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1}
_MAMBA = {"mamba_n_heads": 16, "mamba_d_head": 64, "mamba_d_state": 64}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 128}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**_HEADS, "intermediate_size": 1408, "blocks": 1},
    "qwen3_5_text": {**_HEADS, **_DELTA, **_LINEAR, "intermediate_size": 1728},
    "qwen3_5_moe_text": {
        **{**_HEADS, **_DELTA, **_LINEAR, **_ROUTED},
        "num_experts": 64,
        "shared_expert_intermediate_size": 256,
    },
    "qwen3_moe": {**_HEADS, **_ROUTED, "num_experts": 64, "blocks": 1},
    "mixtral": {
        **{**_HEADS, "num_local_experts": 8, "num_experts_per_tok": 2},
        "intermediate_size": 1792,
        "blocks": 1,
    },
    "gpt_oss": {
        **{**_HEADS, **_SLIDING, "intermediate_size": 512},
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
    },
    "deepseek_v3": {
        **{**_LATENT, **_ROUTED, **_GROUPS},
        "intermediate_size": 1408,
        "n_routed_experts": 64,
    },
    "glm4_moe": {
        **{**_HEADS, **_ROUTED, **_GROUPS, "n_group": 1, "topk_group": 1},
        "intermediate_size": 1408,
        "n_routed_experts": 64,
    },
    "minimax_m2": {
        **{**_HEADS, "intermediate_size": 256, "num_local_experts": 64},
        "num_experts_per_tok": 8,
        "rotary_dim": 32,
        "blocks": 1,
    },
    "granitemoehybrid": {
        **{**_HEADS, **_MAMBA, **_LINEAR, "intermediate_size": 256},
        "num_local_experts": 32,
        "num_experts_per_tok": 8,
        "shared_intermediate_size": 512,
    },
    "nemotron_h": {
        **{**_HEADS, "intermediate_size": 1408, "mamba_num_heads": 16, "mamba_head_dim": 64},
        "n_groups": 2,
        "layer_types": ["linear_attention", "full_attention", "mlp"],
        "blocks": 3,
    },
    "lfm2": {
        **{**_HEADS, "block_auto_adjust_ff_dim": False, "intermediate_size": 1536},
        "layer_types": ["conv", "full_attention"],
    },
    "gemma4_text": {
        **{**_HEADS, **_SLIDING, "global_head_dim": 128, "intermediate_size": 2048},
        "hidden_size_per_layer_input": 64,
        "vocab_size_per_layer_input": VOCABULARY,
    },
    "llama4_text": {
        **{**_HEADS, "intermediate_size": 512, "intermediate_size_mlp": 1024},
        "num_local_experts": 16,
        "interleave_moe_layer_step": 2,
    },
}


@dataclass
class Clock(Progress):
    """Processor seconds of every block, and the most memory that was seen."""

    seconds: list[float] = field(default_factory=list)
    peak: int = 0
    last: float = field(default_factory=time.process_time)

    def blocks(self, *arguments: Any, **named: Any) -> AbstractContextManager[None]:
        self.last = time.process_time()
        return super().blocks(*arguments, **named)

    def finished(self, block: int, record: BlockRecord | None) -> None:
        now = time.process_time()
        self.seconds.append(now - self.last)
        self.last = now
        if record is not None:
            self.peak = max(self.peak, record.peak_memory_bytes)


def main() -> None:
    """A row a family and scheme, each from a process of its own."""
    options = _options()
    logging.disable(logging.WARNING)
    if options.one:
        print(json.dumps(_learned(options.one[0], options.one[1], options)))
        return
    rows = []
    for name in options.only or FAMILIES:
        for scheme in SCHEMES:
            command = [sys.executable, __file__, "--one", name, scheme]
            command += ["--samples", str(options.samples), "--tokens", str(options.tokens)]
            answer = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
            row = json.loads(answer.splitlines()[-1])
            rows.append([name, scheme, *row])
            print(" | ".join(rows[-1]), flush=True)
    head = ["model type", "scheme", "million weights a block", "seconds a block", "memory, MiB"]
    print("\n" + table(head, rows))


def _learned(name: str, scheme: str, options: argparse.Namespace) -> list[str]:
    settings = dict(FAMILIES[name])
    blocks = settings.pop("blocks", 2)
    shape = {"vocab_size": VOCABULARY, "hidden_size": 512, "num_hidden_layers": blocks}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    before = psutil.Process().memory_info().rss
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **shape, **ends, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    ids = torch.randint(3, VOCABULARY, (options.samples, options.tokens))
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        run = quantize(
            model,
            scheme,
            calibration=ids,
            progress=clock,
            output_dir=folder,
            preset="fast",
            epochs=1,
            report=False,
            examples=False,
        )
        losses = [
            f"{100 * (each.final_loss / each.initial_loss - 1):+.0f} %" for each in run.records
        ]
    parts = [sum(p.numel() for p in block.parameters()) / 1e6 for block in model.model.layers]
    print(f"{name}, {scheme}: losses {', '.join(losses)}", file=sys.stderr)
    return [
        " + ".join(f"{part:.1f}" for part in parts),
        " + ".join(f"{each:.1f}" for each in clock.seconds),
        f"{(clock.peak - before) / MIB:.0f}",
    ]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=FAMILIES, metavar="NAME")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
