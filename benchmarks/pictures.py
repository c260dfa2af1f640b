"""Answers about pictures and KL divergence at several schemes: round-to-nearest, LRQuant, LRQuant+.

    python benchmarks/pictures.py --model FOLDER --data FOLDER --text DIR --runs FOLDER [--only …]

FOLDER of --model is what examples/make_easy_vqa_model.py writes, of --data what
examples/easy_vqa_data.py writes (train.jsonl, test.jsonl); DIR has wikitext2/validation.txt.

Protocol: 32 samples, of which those with pictures are conversations of train.jsonl with their
answers and those of text are windows of 64 tokens of wikitext2's validation split; seed 2, 5
epochs, batches of 4.  Measured on the first questions of test.jsonl (--questions): exact match of
greedy answers, and mean KL divergence of the next-token distribution from full precision where the
next token is text.  A row is a run folder in FOLDER; what is there already is not done again.
"""

from __future__ import annotations

import argparse
import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lrquant.measures.numbers import divergence, spread
from lrquant.measures.rows import table
from lrquant.model.loading import load_model
from lrquant.pipeline import run

PROTOCOL: dict[str, Any] = {"nsamples": 32, "seqlen": 64, "epochs": 5, "seed": 2, "batch_size": 4}
PROTOCOL |= {"report": False, "micro_batch_size": 4}
SCHEMES = ("W8A8", "W6A6", "W4A16", "W4A4")
METHODS: dict[str, dict[str, Any]] = {"LRQuant": {}, "LRQuant+": {"lr_plus": True}}
DATA: dict[str, dict[str, Any]] = {
    "text": {},
    "pictures and text": {"calib_image_share": 0.5},
    "pictures": {"calib_image_share": 1.0},
}
TOWERS = {"W8A8": "W8A8", "W6A6": "W6A6", "W4A16": "W8A8", "W4A4": "W4A8"}


def main() -> None:
    """Learn and measure what is missing of the chosen rows, then print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--only", nargs="*")
    options = parser.parse_args()
    rows = _rows(options)
    names = [n for n in rows if any(fnmatchcase(n, p) for p in options.only or ["*"])]
    model = load_model(options.model)
    options.runs.mkdir(parents=True, exist_ok=True)
    for name in names:
        if name not in _measured(options.runs):
            _measure(name, rows[name], model, options)
    if options.only is None:
        _print(options.runs)


def _rows(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Settings of every row by name."""
    train, text = str(options.data / "train.jsonl"), {"data_dir": options.text}
    rows: dict[str, dict[str, Any]] = {}
    for scheme in SCHEMES:
        for part, vision in (("language", {}), ("both", {"vision_scheme": TOWERS[scheme]})):
            for method, settings in METHODS.items():
                for data, given in DATA.items():
                    if part == "both" and data == "text":
                        continue  # the tower learns on pictures
                    pictures = {"calib_images": train} if given else {}
                    row = {"scheme": scheme, **settings, **given, **pictures, **vision, **text}
                    rows[f"{scheme}, {part}, {method}, {data}"] = {**PROTOCOL, **row}
    plus = rows["W4A4, language, LRQuant+, pictures and text"]
    for weight in (0.1, 10.0):
        rows[f"W4A4, language, LRQuant+, picture tokens count {weight:g}"] = {
            **plus,
            "image_token_weight": weight,
        }
    return rows


def _measure(name: str, settings: dict[str, Any], model: Any, options: argparse.Namespace) -> None:
    place = options.runs / name.replace(", ", "-").replace(" ", "_")
    test = str(options.data / "test.jsonl")
    given = {"model": options.model, "precision": options.precision, **settings}
    given |= {"output_dir": str(place)}
    run(given | ({"resume": str(place)} if place.is_dir() else {}), model)
    first = not any(row.startswith(_group(name)) for row in _measured(options.runs))
    measuring = {"vqa": (test,), "agreement": (test,), "limit": options.questions}
    measuring |= {"compare": first, "epochs": 0, "resume": str(place)}
    results = run(measuring | {"precision": options.precision}, model).results
    found: dict[str, dict[str, Any]] = {}
    for kind in ("vqa", "agreement"):
        for variant, scores in results[kind][test].items():
            if isinstance(scores, dict):
                found.setdefault(variant, {}).update(scores)
    with (options.runs / "measures.jsonl").open("a", encoding="utf-8") as lines:
        lines.write(json.dumps({"row": name, "questions": options.questions, **found}) + "\n")


def _group(name: str) -> str:
    """Scheme and parts: rows with the same full precision and round-to-nearest."""
    return ", ".join(name.split(", ")[:2])


def _measured(runs: Path) -> dict[str, dict[str, Any]]:
    path = runs / "measures.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {row["row"]: row for row in map(json.loads, lines)}


def _print(runs: Path) -> None:
    lines = []
    for name, row in _measured(runs).items():
        for variant in ("full_precision", "round_to_nearest", "quantized"):
            if variant in row:
                shown = name if variant == "quantized" else f"{_group(name)}, {variant}"
                scores = row[variant]
                right = spread(scores["exact_match"], scores.get("exact_match_stderr"))
                kl = divergence(scores.get("kl_mean"))
                lines.append([shown.replace("_", " "), right, kl])
    print(table(["scheme, parts, method, calibration", "exact match", "mean KL"], lines))


if __name__ == "__main__":
    main()
