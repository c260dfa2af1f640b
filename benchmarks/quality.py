"""Perplexity and KL divergence of round-to-nearest, LRQuant and LRQuant+, and an ablation.

    python benchmarks/quality.py --model MODEL --data-dir DIR --runs FOLDER [--only ROW …]

Protocol: 16 samples x 512 tokens of wikitext2 (validation if there is no train split), contiguous
windows at random offsets, seed 2; 5 epochs; the first 40 windows of 512 tokens of each text.

Every row is a run folder in FOLDER; one that is there already is gone on with, and what
FOLDER/measures.jsonl holds is not measured again.  ROW is a row's name or a pattern ("W4A4 *"):
several processes can share the rows (`OMP_NUM_THREADS=1` for each); the last one, without --only,
prints the tables.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from lrquant.blocks.head import Head
from lrquant.blocks.inputs import BlockInputs
from lrquant.blocks.plan import FULL_PRECISION, Plan
from lrquant.blocks.runner import Variant
from lrquant.blocks.streams import Stream
from lrquant.blocks.variants import as_learned, full_precision, unlearned
from lrquant.blocks.workbench import Workbench, make_workbench
from lrquant.config.choices import KINDS
from lrquant.config.config import Config, preset, with_preset
from lrquant.config.groups import Computing
from lrquant.config.scheme import Scheme
from lrquant.config.schemes import Schemes
from lrquant.data.samples import Samples, perplexity_windows
from lrquant.measures.agreement import MEASURE as AGREEMENT
from lrquant.measures.numbers import divergence, number
from lrquant.measures.perplexity import MEASURE as PERPLEXITY
from lrquant.measures.rows import table
from lrquant.measures.scoring.predictions import score, send_through
from lrquant.model.loading import load_model
from lrquant.model.model import Model
from lrquant.pipeline import run
from lrquant.runs.folder import RunFolder

PROTOCOL: dict[str, Any] = {"nsamples": 16, "seqlen": 512, "epochs": 5, "seed": 2, "report": False}
WINDOWS = 40
TEXTS = ("wikitext2", "c4")
SCHEMES = ("W8A8", "W6A6", "W4A8", "W4A4", "W4A16", "W3A16", "W3A16g64", "W2A16g64")

PAPER = preset("paper")
PUBLISHED = {name: PAPER[name] for name in ("lwc_init", "keep_best", "let_init", "let_sites")}
PLUS_AS_PUBLISHED = {k: v for k, v in PAPER.items() if k not in PROTOCOL}
PLUS_AS_PUBLISHED |= {"lr_plus": True}

TUNED = {"lr_plus": True, "rounding": True, "tune": True, "tune_rounding": True}
TUNED |= {"tune_nsamples": 256, "tune_epochs": 1}

METHODS: dict[str, dict[str, Any]] = {
    "LRQuant": PUBLISHED,
    "LRQuant, default settings": {},
    "LRQuant+": {"lr_plus": True},
    "LRQuant+ and rounding": {"lr_plus": True, "rounding": True},
    "tuned": TUNED,
    "balanced": {"preset": "balanced"},
}

ABLATION: dict[str, dict[str, Any]] = {
    "LRQuant": PUBLISHED,
    "LRQuant, clipping alone": {**PUBLISHED, "lwc": True, "let": False},
    "LRQuant, transformation alone": {**PUBLISHED, "lwc": False, "let": True},
    "LRQuant, MSE alone": {**PUBLISHED, "loss": "mse"},
    "LRQuant, NLC alone": {**PUBLISHED, "loss": "nlc"},
    **{
        f"LRQuant, without {kind} sites": {
            **PUBLISHED,
            "let_sites": tuple(k for k in PUBLISHED["let_sites"] if k != kind),
        }
        for kind in PUBLISHED["let_sites"]
    },
    "LRQuant, default settings": {},
    "two branches alone": {"two_branch": True},
    "dynamic weights alone": {"dynamic_weights": True},
    "rotation alone": {"rotation": True},
    "LRQuant+": {"lr_plus": True},
    "LRQuant+, published start of the clipping": {"lr_plus": True, "lwc_init": 4.0},
    "LRQuant+, published start of scales": {"lr_plus": True, "let_init": 1.0},
    "LRQuant+, last epoch": {"lr_plus": True, "keep_best": False},
    "LRQuant+, running means from one": {"lr_plus": True, "ema_init": "one"},
    "LRQuant+, r1 alone": {"lr_plus": True, "rotation_sharing": "none"},
    "LRQuant+, r2 a linear": {"lr_plus": True, "rotation_sharing": "linear"},
    "LRQuant+, dense factor (published form)": {"lr_plus": True, "rotation_sharing": "weight"},
    "LRQuant+ as published": PLUS_AS_PUBLISHED,
    "LRQuant+, sites of the papers": {"lr_plus": True, "let_sites": PUBLISHED["let_sites"]},
    "LRQuant+, all sites": {"lr_plus": True, "let_sites": KINDS},
}


def main() -> None:
    """Learn and measure what is missing of the chosen rows, then print the tables."""
    options = _options()
    rows = _rows(options.epochs)
    wanted = options.only or ["*"]
    chosen = [name for pattern in wanted for name in rows if fnmatchcase(name, pattern)]
    bench = _Bench(options)
    for name in dict.fromkeys(chosen):
        bench.measure(name, rows[name])
    if not options.only:
        _print_tables(rows, bench)


def _rows(epochs: int) -> dict[str, dict[str, Any]]:
    """All rows by name; `epochs` 0 is round-to-nearest, and W16A16 full precision."""
    rows: dict[str, dict[str, Any]] = {}
    for scheme in SCHEMES:
        rows[f"{scheme} round-to-nearest"] = {"scheme": scheme, "epochs": 0}
        weight_only = {"lwc": True} if Scheme.parse(scheme).weight_only else {}
        for method, settings in METHODS.items():
            rows[f"{scheme} {method}"] = with_preset({"scheme": scheme, **weight_only, **settings})
    for name, settings in ABLATION.items():
        rows.setdefault(f"W4A4 {name}", {"scheme": "W4A4", **settings})
    learned = {**PROTOCOL, "epochs": epochs}
    return {name: {**learned, **settings} for name, settings in rows.items()}


class _Bench:
    """A model, the texts, and the full-precision model's final states on each of them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.model: Model = load_model(options.model)
        self.folder = Path(options.runs)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.common = {"model": options.model, "data_dir": options.data_dir}
        self.common |= {"calib_dataset": options.calib}
        config = Config(**self.common, precision=options.precision)
        computing, scratch = config.group(Computing), Path(config.output_dir)
        self.bench: Workbench = make_workbench(self.model, FULL_PRECISION, computing, scratch)
        self.precision = options.precision
        data_dir = Path(options.data_dir) if options.data_dir else None
        self.texts = {
            name: perplexity_windows(
                name, self.model.tokenizer, PROTOCOL["seqlen"], options.windows, data_dir
            )
            for name in options.texts
        }
        self._references: dict[str, Stream] = {}
        self._head: Head | None = None

    def measure(self, name: str, settings: dict[str, Any]) -> None:
        """Learn one row, unless its run is there, and measure it on every text."""
        missing = [text for text in self.texts if (name, text) not in self.measures()]
        if not missing:
            return
        place = self.folder / name.replace(" ", "_").replace(",", "")
        plan = Plan(Schemes(Scheme.parse(settings["scheme"])))
        prepare = unlearned(dataclasses.replace(self.bench, plan=plan))
        if settings["epochs"]:
            given = {**self.common, **settings, "output_dir": str(place)}
            given |= {"precision": self.precision}
            run(given | ({"resume": str(place)} if place.is_dir() else {}), self.model)
            learned = RunFolder.open(place)
            plan = Plan.of(learned.config.resolved().quantizing)
            prepare = as_learned(dataclasses.replace(self.bench, plan=plan), learned)
        for text in missing:
            scores = self._scores(self.texts[text], prepare)
            row = {"row": name, "text": text, "windows": self.texts[text].description, **scores}
            with (self.folder / "measures.jsonl").open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(row) + "\n")

    def measures(self) -> dict[tuple[str, str], dict[str, Any]]:
        """What was measured, by (row, text)."""
        path = self.folder / "measures.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        rows = [json.loads(line) for line in lines]
        described = {name: samples.description for name, samples in self.texts.items()}
        return {
            (row["row"], row["text"]): row
            for row in rows
            if row["windows"] == described.get(row["text"])
        }

    @torch.no_grad()
    def _scores(self, windows: Samples, prepare: Variant) -> dict[str, float]:
        bench = self.bench
        self._head = self._head or Head(self.model, bench.device, bench.dtype)
        entry = BlockInputs(self.model, windows.ids, 4, bench.device)
        if windows.name not in self._references:
            (reference,) = bench.streams(entry, 1)
            send_through(self.model, full_precision(bench), reference, entry)
            self._references[windows.name] = reference
            self._full(windows, reference)
        (stream,) = bench.streams(entry, 1)
        send_through(self.model, prepare, stream, entry)
        reference = self._references[windows.name]
        (scores,) = score([AGREEMENT], self._head, stream, windows.feed, reference)
        assert scores.divergences is not None
        return {"perplexity": scores.perplexity, "kl_mean": scores.divergences.kl_mean}

    def _full(self, windows: Samples, reference: Stream) -> None:
        if ("full precision", windows.name) in self.measures():
            return
        assert self._head is not None
        row: dict[str, Any] = {"row": "full precision", "text": windows.name}
        row["windows"] = windows.description
        (scores,) = score([PERPLEXITY], self._head, reference, windows.feed)
        row["perplexity"] = scores.perplexity
        with (self.folder / "measures.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")


def _print_tables(rows: dict[str, dict[str, Any]], bench: _Bench) -> None:
    measures = bench.measures()

    def cells(name: str) -> list[str]:
        found = [measures[name, text] for text in bench.texts]
        perplexities = (number(row["perplexity"]) for row in found)
        return [*perplexities, *(divergence(row.get("kl_mean")) for row in found)]

    head = [*(f"{text} ppl" for text in bench.texts), *(f"{text} KL" for text in bench.texts)]
    print(table(["scheme and method", *head], [["full precision", *cells("full precision")]]))
    listed = [name for name in rows if (name, next(iter(bench.texts))) in measures]
    main_rows = [f"{s} {m}" for s in SCHEMES for m in ("round-to-nearest", *METHODS)]
    body = [[name, *cells(name)] for name in main_rows if name in listed]
    print("\n" + table(["scheme and method", *head], body))
    body = [[name, *cells(f"W4A4 {name}")] for name in ABLATION if f"W4A4 {name}" in listed]
    print("\n" + table(["W4A4", *head], body))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data-dir")
    parser.add_argument("--runs", default="quality-runs")
    parser.add_argument("--calib", default="wikitext2")
    parser.add_argument("--texts", nargs="+", default=list(TEXTS))
    parser.add_argument("--only", nargs="+", metavar="ROW", help="names or patterns of rows")
    parser.add_argument("--epochs", type=int, default=PROTOCOL["epochs"])
    parser.add_argument("--windows", type=int, default=WINDOWS)
    parser.add_argument("--precision", default="auto")
    return parser.parse_args()


if __name__ == "__main__":
    main()
