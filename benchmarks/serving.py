"""Prefill and decode speed of saved checkpoints against the dense model, in one process.

    python benchmarks/serving.py --model MODEL [--compile] CHECKPOINT [CHECKPOINT …]

MODEL is the model that they were made of, in bfloat16 and in float32; each CHECKPOINT is loaded as
its README says, in float32 (`--dtype` for another).  Prefill: one forward of --prompt tokens, the
best of --repeats.  Decode: --new tokens, one at a time, after that prompt, with the cache that the
checkpoint asks for; with --compile through torch.compile, and with a cache of fixed size.  Memory:
the bytes of all parameters and buffers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GgufConfig,
    PreTrainedModel,
    StaticCache,
)

from lrquant import LRQuantError, QuantizedCache
from lrquant.measures.rows import table


def main() -> None:
    """Measure every model and print one table."""
    options = _options()
    torch.manual_seed(0)
    rows = []
    for name, load in _models(options).items():
        model = load()
        ids = torch.randint(10, 1000, (1, options.prompt))
        prefill = _prefill(model, ids, options.repeats)
        decode = _decode(model, ids, options.new, options.compile)
        tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
        size = sum(tensors.values()) / 2**20
        rows.append([name, f"{prefill:.0f}", f"{decode:.1f}", f"{size:.0f}"])
        print(" | ".join(rows[-1]), flush=True)
        del model
    head = [f"model ({torch.get_num_threads()} threads)"]
    head += [f"prefill of {options.prompt}, tokens/s", "decode, tokens/s", "memory, MiB"]
    print("\n" + table(head, rows))


def _models(options: argparse.Namespace) -> dict[str, Callable[[], PreTrainedModel]]:
    path = Path(options.model)
    named: dict[str, Any] = {}
    if path.suffix == ".gguf":
        named = {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True)}
    folder = path.parent if named else path

    def dense(dtype: str) -> Callable[[], PreTrainedModel]:
        return lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **named).to(
            getattr(torch, dtype)
        )

    def saved(place: str) -> Callable[[], PreTrainedModel]:
        return lambda: AutoModelForCausalLM.from_pretrained(place, dtype=options.dtype)

    models = {f"dense, {dtype}": dense(dtype) for dtype in ("bfloat16", "float32")}
    return models | {Path(place).name: saved(place) for place in options.checkpoints}


@torch.inference_mode()
def _prefill(model: PreTrainedModel, ids: torch.Tensor, repeats: int) -> float:
    """Tokens a second."""
    best = float("inf")
    for _ in range(repeats + 1):
        started = time.perf_counter()
        model(ids, use_cache=False, logits_to_keep=1)
        best = min(best, time.perf_counter() - started)
    return ids.numel() / best


@torch.inference_mode()
def _decode(model: PreTrainedModel, ids: torch.Tensor, new: int, compiled: bool) -> float:
    """Tokens a second after the prompt and the steps in which it is compiled."""
    step = torch.compile(model.forward, dynamic=False) if compiled else model.forward
    warm = 2 if compiled else 0
    cache = _cache(model, ids.numel() + warm + new if compiled else None)
    last = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
    started = time.perf_counter()
    for index in range(warm + new):
        if index == warm:
            started = time.perf_counter()
        position = torch.tensor([[ids.numel() + index]])
        logits = step(last, past_key_values=cache, position_ids=position).logits
        last = logits[:, -1:].argmax(-1)
    return new / (time.perf_counter() - started)


def _cache(model: PreTrainedModel, size: int | None) -> Cache:
    if size is not None:
        return StaticCache(config=model.config, max_cache_len=size)
    try:
        return QuantizedCache(model.config)
    except LRQuantError:
        return DynamicCache(config=model.config)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("checkpoints", nargs="*", metavar="CHECKPOINT")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
