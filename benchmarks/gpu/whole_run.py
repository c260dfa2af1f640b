"""A run of the command line on a tiny model: to its end, killed and resumed, exported, measured."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gpu.check import Check
from lrquant.cli import main

TEXT = " ".join(f"{number * number} is the square of {number}." for number in range(400))
BLOCKS, LONGEST = 4, 120  # seconds until a killed run must have learned a block


def whole_run(check: Check) -> None:
    """Two runs of one seed, of which one is killed and goes on, must have the same bytes."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        words = _words(folder, check)
        _command(check, "a run", [*words, "--output-dir", str(folder / "whole")])
        learned = _killed(check, [*words, "--output-dir", str(folder / "killed")], folder)
        _command(check, "going on", [*words, "--output-dir", str(folder / "killed"), "--resume"])
        whole, killed = _hashes(folder / "whole"), _hashes(folder / "killed")
        equal = whole == killed and len(whole) == BLOCKS
        check.say(f"killed after {learned} of {BLOCKS} blocks", f"same bytes: {equal}", equal)
        run, saved = str(folder / "whole"), str(folder / "saved")
        _command(check, "export", ["export", run, saved, "--format", "lrquant"])
        text = ["--ppl", str(folder / "text.txt"), "--seqlen", "64", "--limit", "2"]
        text += ["--device", str(check.device), "--output-dir", str(folder / "measured")]
        _command(check, "evaluate", ["evaluate", saved, *text])
        results = json.loads((folder / "measured" / "results.json").read_text())
        perplexities = [each["quantized"] for each in results["perplexity"].values()]
        check.say("perplexity of the checkpoint", f"{perplexities[0]:.1f}", perplexities[0] > 1)


def _words(folder: Path, check: Check) -> list[str]:
    """The command that learns a model made here, without where to."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=BLOCKS,
        vocab_size=259,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    _tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    words = ["quantize", "--model", str(folder / "model"), "--scheme", "W4A4", "--lr-plus"]
    words += ["--calib-dataset", str(folder / "text.txt"), "--seqlen", "64", "--no-save"]
    words += ["--nsamples", "4" if check.small else "16", "--epochs", "3" if check.small else "10"]
    words += ["--no-report"] if check.small else []
    return [*words, "--device", str(check.device), "--no-examples", "--quiet"]


def _tokenizer() -> PreTrainedTokenizerFast:
    words = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def _command(check: Check, name: str, words: list[str]) -> None:
    started = time.monotonic()
    code = main(words)
    check.say(name, f"code {code} after {time.monotonic() - started:.1f} s", code == 0)


def _killed(check: Check, words: list[str], folder: Path) -> int:
    """Begin a run in a process of its own, and kill it when a block is learned."""
    process = subprocess.Popen([sys.executable, "-m", "lrquant", *words])
    started, blocks = time.monotonic(), folder / "killed" / "blocks"
    while process.poll() is None and time.monotonic() - started < LONGEST:
        if any(blocks.glob("*.safetensors")):
            break
        time.sleep(0.02)
    process.kill()
    process.wait()
    return len(list(blocks.glob("*.safetensors")))


def _hashes(run: Path) -> dict[str, str]:
    files = sorted((run / "blocks").glob("*.safetensors"))
    return {each.name: hashlib.sha256(each.read_bytes()).hexdigest() for each in files}
