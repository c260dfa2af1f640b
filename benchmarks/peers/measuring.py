"""The protocol of `quality.py` for models that other software quantised: samples and measures."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lrquant.blocks.head import Head
from lrquant.blocks.inputs import BlockInputs
from lrquant.blocks.materialize import materialize
from lrquant.blocks.plan import FULL_PRECISION, Plan
from lrquant.blocks.streams import Stream
from lrquant.blocks.variants import full_precision, unlearned
from lrquant.blocks.workbench import Workbench, make_workbench
from lrquant.config.config import Config
from lrquant.config.groups import Computing
from lrquant.config.scheme import FLOAT_BITS, Scheme
from lrquant.config.schemes import Schemes
from lrquant.data.samples import Samples, calibration_samples, perplexity_windows
from lrquant.measures.agreement import MEASURE as AGREEMENT
from lrquant.measures.scoring.predictions import score, send_through
from lrquant.model.device import dtype_name
from lrquant.model.loading import load_model

TEXTS = ("wikitext2", "c4")
SEED = 2


@dataclass(frozen=True)
class Protocol:
    """How much text: calibration samples, tokens of each, and windows that are measured."""

    samples: int = 16
    tokens: int = 512
    windows: int = 40


class Reference:
    """The full-precision model: what toolkits are given and what comes back is held against."""

    def __init__(self, name: str, data: Path, protocol: Protocol, precision: str) -> None:
        self.model = load_model(name)
        computing = Config(model=name, precision=precision).group(Computing)
        self.bench = make_workbench(self.model, FULL_PRECISION, computing)
        assert self.model.tokenizer is not None
        self.tokenizer = self.model.tokenizer
        tokens = protocol.tokens
        self.samples = calibration_samples(
            "wikitext2", self.tokenizer, protocol.samples, tokens, SEED, data
        )
        self.texts = [
            perplexity_windows(text, self.tokenizer, tokens, protocol.windows, data)
            for text in TEXTS
        ]
        self._head = Head(self.model, self.bench.device, self.bench.dtype)
        self._states: dict[str, Stream] = {}

    @property
    def windows(self) -> str:
        """The calibration samples: JSON, a list of lists of token ids."""
        return json.dumps(self.samples.ids.tolist())

    @property
    def conditions(self) -> dict[str, str]:
        """What numbers depend on beside the toolkit and its setting."""
        texts = {text.name: text.description for text in self.texts}
        own = {"model": self.model.name, "samples": self.samples.description}
        return {**own, **texts, "precision": dtype_name(self.bench.dtype)}

    def write(self, folder: Path) -> None:
        """The model as transformers reads it, in float32, and its tokenizer."""
        single = replace(self.bench, dtype=torch.float32)
        module = materialize(single, full_precision(single))
        module.config.tie_word_embeddings = self.model.skeleton.config.tie_word_embeddings
        module.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @torch.no_grad()
    def measure(self, folder: Path, scheme: str) -> dict[str, Any]:
        """Perplexity and KL of a dense model whose weights are rounded and whose inputs are not.

        The inputs of linears are rounded here, as the scheme says.
        """
        model = load_model(str(folder))
        inputs = replace(Scheme.parse(scheme), weight_bits=FLOAT_BITS, group_size=None)
        bench = replace(self.bench, model=model, plan=Plan(Schemes(inputs)))
        head = Head(model, bench.device, bench.dtype)
        measures: dict[str, Any] = {}
        for text in self.texts:
            if text.name not in self._states:
                self._states[text.name] = _final_states(self.bench, text)
            states, reference = _final_states(bench, text), self._states[text.name]
            (scores,) = score([AGREEMENT], head, states, text.feed, reference, self._head)
            assert scores.divergences is not None
            measures[text.name] = {
                "perplexity": scores.perplexity,
                "kl_mean": scores.divergences.kl_mean,
            }
        return measures


def _final_states(bench: Workbench, text: Samples) -> Stream:
    """Hidden states of a text after the last block."""
    entry = BlockInputs(bench.model, text.ids, 4, bench.device)
    (stream,) = bench.streams(entry, 1)
    send_through(bench.model, unlearned(bench), stream, entry)
    return stream
