"""Other toolkits on the protocol of `quality.py`, each in an environment that this makes.

    python benchmarks/peers/run.py --model MODEL --data-dir DATA --runs FOLDER [--only ROW …]

ROW is a row's name ("auto-round 200 W3A16g64") or a pattern ("llmcompressor * W4A16"); --list
prints them.  A toolkit is installed with pip into FOLDER/environments, quantises MODEL (written
once as a float32 folder of transformers) on the token windows that lrquant's own runs learn from,
and hands back de-quantised weights, which are measured here as lrquant's own are.  Each row is a
line of FOLDER/measures.jsonl; what is there is not done again.  What a toolkit says is in
FOLDER/rows/ROW/log.txt.  All take as many threads as OMP_NUM_THREADS says.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from measuring import TEXTS, Protocol, Reference

from lrquant.measures.numbers import divergence, number
from lrquant.measures.rows import table

HERE = Path(__file__).resolve().parent
SCHEMES = ("W4A16", "W3A16", "W3A16g64", "W2A16g64", "W4A4-qkv16", "W8A8-qkv16")


@dataclass(frozen=True)
class Toolkit:
    """A toolkit: what pip installs, its settings, its environment, schemes it lacks, and why."""

    script: str
    packages: tuple[str, ...]
    settings: tuple[str, ...]
    variables: dict[str, str] = field(default_factory=dict)
    lacks: Mapping[str, str] = field(default_factory=dict)


_FLOATS = "beside 4-bit weights its activations are FP8, NVFP4 or (QQQ) 8-bit, beside others 16-bit"
TOOLKITS = {
    "auto-round": Toolkit(
        "with_auto_round.py",
        ("auto-round==0.16.1", "torch==2.13.0", "transformers==5.24.0"),
        ("50", "200", "1000"),
        # 8-bit asymmetric weights are refused otherwise, for the sake of a file format.
        variables={"AR_ALLOW_W8_ASYM": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"},
    ),
    "llmcompressor": Toolkit(
        "with_llmcompressor.py",
        (
            *("llmcompressor==0.14.0.1", "compressed-tensors==0.19.0"),
            *("torch==2.13.0", "transformers==5.17.0"),
        ),
        ("round-to-nearest", "GPTQ", "AWQ", "SpinQuant", "SpinQuant and GPTQ"),
    ),
    "gptqmodel": Toolkit(
        "with_gptqmodel.py",
        ("gptqmodel==7.6.0", "torch==2.13.0", "transformers==5.24.0"),
        ("GPTQ",),
        variables={"GPTQMODEL_CPU_WORKERS": "2"},  # with one, as for two cores, it does not start
        lacks={"W4A4-qkv16": _FLOATS, "W8A8-qkv16": _FLOATS},
    ),
}


@dataclass(frozen=True)
class Row:
    """A toolkit with a setting, at a scheme."""

    toolkit: str
    setting: str
    scheme: str

    @property
    def name(self) -> str:
        """As `--only` has it."""
        return f"{self.toolkit} {self.setting} {self.scheme}"

    @property
    def lack(self) -> str | None:
        """Why the toolkit has no such scheme, if so."""
        return TOOLKITS[self.toolkit].lacks.get(self.scheme)


ROWS = [
    Row(name, setting, scheme)
    for scheme in SCHEMES
    for name, toolkit in TOOLKITS.items()
    for setting in toolkit.settings
]


def main() -> None:
    """Quantise and measure what is missing of the chosen rows, then print the table."""
    options = _options()
    patterns = options.only or ["*"]
    chosen = [row for row in ROWS if any(fnmatchcase(row.name, each) for each in patterns)]
    if options.list:
        print("\n".join(row.name for row in chosen))
        return
    bench = _Bench(options)
    for row in chosen:
        if row.lack is None and row.name not in bench.measures():
            bench.measure(row)
    print(_table(chosen, bench.measures()))


class _Bench:
    """The folder of a comparison, and the model that all toolkits start from."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.folder = Path(options.runs).resolve()
        self.keep = options.keep
        protocol = Protocol(options.samples, options.tokens, options.windows)
        self.reference = Reference(
            options.model, Path(options.data_dir), protocol, options.precision
        )
        self.folder.mkdir(parents=True, exist_ok=True)

    def measures(self) -> dict[str, dict[str, Any]]:
        """What was measured under the same conditions, by row."""
        path = self.folder / "measures.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        rows = [json.loads(line) for line in lines]
        same = self.reference.conditions
        return {row["row"]: row for row in rows if row["conditions"] == same}

    def measure(self, row: Row) -> None:
        """Quantise in the toolkit's environment and measure; say why where it fails."""
        place = self.folder / "rows" / row.name.replace(" ", "_")
        print(row.name, flush=True)
        try:
            self._quantise(row, place)
        except RuntimeError as error:
            print(f"  FAILED: {error}", flush=True)
            return
        entry = {"row": row.name, **json.loads((place / "result.json").read_text())}
        entry |= {"conditions": self.reference.conditions}
        entry |= {"texts": self.reference.measure(place, row.scheme)}
        with (self.folder / "measures.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(entry) + "\n")
        if not self.keep:
            for path in (place / "result.json", *place.glob("*.safetensors")):
                path.unlink()

    def _quantise(self, row: Row, place: Path) -> None:
        """Leave a row's de-quantised model in `place`; `result.json` says that it is whole."""
        samples, windows = place / "samples.json", self.reference.windows
        if (place / "result.json").is_file() and samples.read_text() == windows:
            return
        toolkit = TOOLKITS[row.toolkit]
        python = self._environment(row.toolkit)
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        samples.write_text(windows)
        command: list[str | Path] = [python, HERE / toolkit.script, self._dense, samples]
        _run(
            [*command, row.scheme, row.setting, place],
            place / "log.txt",
            {"HF_HUB_OFFLINE": "1", **toolkit.variables},
        )

    @cached_property
    def _dense(self) -> Path:
        """The full-precision model as a folder of transformers, written once."""
        folder = self.folder / "full_precision"
        written, name = folder / "of.txt", self.reference.model.name
        if not written.is_file() or written.read_text() != name:
            self.reference.write(folder)
            written.write_text(name)
        return folder

    def _environment(self, name: str) -> Path:
        """The Python of a toolkit's environment, made if it is not there."""
        packages = TOOLKITS[name].packages
        folder = self.folder / "environments" / packages[0].replace("==", "-")
        python = folder / "bin" / "python"
        if not (folder / "installed").is_file():
            venv.create(folder, with_pip=True, clear=True)
            _run([python, "-m", "pip", "install", *packages], folder / "pip.txt", {})
            (folder / "installed").touch()
        return python


def _run(command: Sequence[str | Path], log: Path, variables: dict[str, str]) -> None:
    """Run without this package; RuntimeError with the last error said where it fails."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with log.open("w", encoding="utf-8") as lines:
        ended = subprocess.run(
            [str(each) for each in command], env=environ | variables, stdout=lines, stderr=lines
        )
    if ended.returncode:
        said = log.read_text(encoding="utf-8", errors="replace").split("\n")
        errors = [line for line in said if re.match(r"\w*(Error|ERROR)\b", line)]
        raise RuntimeError(f"{(errors or said)[-1]} ({log})")


def _table(rows: Sequence[Row], measures: Mapping[str, dict[str, Any]]) -> str:
    """The rows that were measured, and those that a toolkit lacks, with reasons below."""
    body, reasons = [], []
    for row in rows:
        cells = ["–", "–", "–", "–"]
        if row.lack is not None:
            reasons.append(f"- {row.name}: {row.lack}")
        elif row.name in measures:
            entry = measures[row.name]
            scores = [entry["texts"][text] for text in TEXTS]
            cells = [f"{number(s['perplexity'])} ({divergence(s['kl_mean'])})" for s in scores]
            cells += [f"{entry[each]:.0f}" for each in ("seconds", "processor_seconds")]
        else:
            continue
        body.append([row.scheme, f"{row.toolkit} {row.setting}", *cells])
    head = ["scheme", "toolkit", *(f"{text} (KL)" for text in TEXTS), "seconds", "processor"]
    return "\n".join([table(head, body), *reasons])


def _options() -> argparse.Namespace:
    protocol = Protocol()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument(
        "--data-dir", required=True, help="wikitext2/ and c4/, as quality.py has it"
    )
    parser.add_argument("--runs", default="peer-runs", help="folder, made if it is not there")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="names or patterns of rows")
    parser.add_argument("--list", action="store_true", help="print the chosen rows' names alone")
    parser.add_argument("--samples", type=int, default=protocol.samples)
    parser.add_argument(
        "--tokens", type=int, default=protocol.tokens, help="of samples and windows"
    )
    parser.add_argument("--windows", type=int, default=protocol.windows)
    parser.add_argument("--precision", default="auto", help="of measuring; toolkits choose theirs")
    parser.add_argument("--keep", action="store_true", help="keep de-quantised models")
    return parser.parse_args()


if __name__ == "__main__":
    main()
