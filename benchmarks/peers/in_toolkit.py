"""A scheme, a stopwatch and a dense checkpoint, for scripts in a toolkit's own environment.

Such a script is run as `python SCRIPT MODEL SAMPLES SCHEME SETTING OUT`: a folder of transformers,
a JSON file of token windows, a scheme by lrquant's name, a setting of the toolkit, and the folder
for the de-quantised model.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


@dataclass(frozen=True)
class Bits:
    """A scheme; None are 16-bit activations, and one scale an output channel."""

    weights: int
    activations: int | None
    group_size: int | None

    @classmethod
    def parse(cls, name: str) -> Bits:
        """Of "W3A16g64", or "W4A4-qkv16": Q, K and V stay in floating point everywhere."""
        match = re.fullmatch(r"W(\d+)(?:A16(?:g(\d+))?|A(\d+)-qkv16)", name)
        if match is None:
            raise ValueError(f"scheme {name!r}: use W<bits>A16[g<size>] or W<bits>A<bits>-qkv16")
        group_size, activations = (int(digits) if digits else None for digits in match.groups()[1:])
        return cls(int(match[1]), activations, group_size)


@dataclass(frozen=True)
class Task:
    """What the command line of such a script asks for."""

    model: str
    windows: list[list[int]]
    bits: Bits
    setting: str
    out: Path

    @classmethod
    def of_arguments(cls) -> Task:
        """Read the command line."""
        model, samples, scheme, setting, out = sys.argv[1:]
        windows = json.loads(Path(samples).read_text())
        return cls(model, windows, Bits.parse(scheme), setting, Path(out))

    def save(self, tensors: Mapping[str, Tensor], watch: Stopwatch, *packages: str) -> None:
        """Write a quantised model's tensors as a plain float32 model; `result.json` comes last."""
        config = AutoConfig.from_pretrained(self.model)
        embedding = tensors["model.embed_tokens.weight"]
        config.tie_word_embeddings = torch.equal(tensors["lm_head.weight"], embedding)
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        plain.load_state_dict({name: tensors[name] for name in plain.state_dict()})
        plain.save_pretrained(self.out)
        AutoTokenizer.from_pretrained(self.model).save_pretrained(self.out)
        versions = {name: version(name) for name in ("torch", "transformers", *packages)}
        result = {**watch.times, "versions": versions}
        (self.out / "result.json").write_text(json.dumps(result))


class Stopwatch:
    """Seconds of a `with` block: of the clock, and of processors in it and its children."""

    def __enter__(self) -> Stopwatch:
        self._start = _now()
        return self

    def __exit__(self, *error: object) -> None:
        clock, processor = (now - then for now, then in zip(_now(), self._start, strict=True))
        self.times = {"seconds": clock, "processor_seconds": processor}


def _now() -> tuple[float, float]:
    return time.perf_counter(), sum(os.times()[:4])
