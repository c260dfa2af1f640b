"""Perplexity of round-to-nearest and LRQuant, scheme by scheme, and an ablation at W4A4.

    python benchmarks/quality.py --model MODEL --data-dir DIR [--only schemes|ablation] [--out FILE]

Protocol: 16 samples x 512 tokens of wikitext2 (validation if there is no train split), contiguous
windows at random offsets, seed 2; 5 epochs; the first 40 windows of 512 tokens of wikitext2 test.
Each finished row is appended to FILE (JSON lines) and not measured again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from lrquant.config import Config
from lrquant.evaluation.measures import measure_perplexity, prepare_evaluation, preparer
from lrquant.model import Model, load_model
from lrquant.pipeline import run
from lrquant.progress import Progress
from lrquant.report.tables import table
from lrquant.sites import KINDS
from lrquant.workbench import make_workbench

PROTOCOL: dict[str, Any] = {"nsamples": 16, "seqlen": 512, "limit": 40, "epochs": 5, "seed": 2}
SITES = Config.let_sites

SCHEMES: dict[str, dict[str, Any]] = {
    "W8A8": {},
    "W4A16": {"lwc": True},
    "W4A16, with LET": {"lwc": True, "let": True},
    "W3A16": {"lwc": True},
    "W3A16, with LET": {"lwc": True, "let": True},
    "W3A16g64": {"lwc": True},
    "W3A16g64, with LET": {"lwc": True, "let": True},
    "W4A4": {},
    "W4A4, with up-down site": {"let_sites": KINDS},
}

ABLATION: dict[str, dict[str, Any]] = {
    "LRQuant": {},
    "LWC only": {"lwc": True},
    "LET only": {"let": True},
    "MSE only": {"loss": "mse"},
    "NLC only": {"loss": "nlc"},
    **{
        f"without the {kind} sites": {"let_sites": tuple(k for k in SITES if k != kind)}
        for kind in SITES
    },
    "with the up_down site": {"let_sites": KINDS},
    "with shifts everywhere": {"let_shift": "always"},
    "Q, K, V at 16 bits": {"qkv_bits": 16},
}


def main() -> None:
    """Measure what is missing, then print both tables."""
    options = _options()
    out = Path(options.out)
    model = load_model(options.model)
    common = {**PROTOCOL, "model": options.model, "data_dir": options.data_dir}
    common |= {"ppl": (options.text,), "calib_dataset": options.text}
    if options.precision:
        common["precision"] = options.precision

    def measure(scheme: str, settings: dict[str, Any]) -> dict[str, Any]:
        return _measured(out, model, {**common, "scheme": scheme, **settings}, options.text)

    if options.only in (None, "schemes"):
        rows = []
        full = measure("W16A16", {"epochs": 0})
        for name, settings in SCHEMES.items():
            scheme = name.split(",")[0]
            nearest, learned = measure(scheme, {"epochs": 0}), measure(scheme, settings)
            cells = (full["perplexity"], nearest["perplexity"], learned["perplexity"])
            rows.append([name, *map(_number, cells), f"{learned['seconds']:.0f}"])
        print(table(["scheme", "full precision", "round-to-nearest", "LRQuant", "seconds"], rows))
    if options.only in (None, "ablation"):
        rows = []
        for name, settings in ABLATION.items():
            learned = measure("W4A4", settings)
            rows.append([name, _number(learned["perplexity"]), f"{learned['seconds']:.0f}"])
        print(table(["W4A4", "perplexity", "seconds"], rows))


def _measured(out: Path, model: Model, settings: dict[str, Any], text: str) -> dict[str, Any]:
    key = json.dumps(settings, sort_keys=True, default=list)
    if out.is_file():
        for line in out.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row["settings"] == key:
                return row
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        config = Config(**settings, output_dir=folder)
        if config.epochs:
            perplexity = run(settings | {"output_dir": folder}, model).results["perplexity"][text][
                "quantized"
            ]
        else:
            perplexity = _unlearned(config, model, text)
    seconds = round(time.monotonic() - started, 1)
    row = {"settings": key, "perplexity": perplexity, "seconds": seconds}
    with out.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(row) + "\n")
    return row


def _unlearned(config: Config, model: Model, text: str) -> float:
    """Round-to-nearest, or with W16A16 full precision."""
    config = config.resolved()
    bench = make_workbench(model, config)
    windows = prepare_evaluation(config, model)[text]
    variants = {"only": preparer(bench, config.quantization)}
    return measure_perplexity(bench, text, windows, variants, Progress())["only"]


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 1e4 else f"{value:.3g}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data-dir")
    parser.add_argument("--text", default="wikitext2")
    parser.add_argument("--only", choices=("schemes", "ablation"))
    parser.add_argument("--precision", default="")
    parser.add_argument("--out", default="quality.jsonl")
    return parser.parse_args()


if __name__ == "__main__":
    main()
