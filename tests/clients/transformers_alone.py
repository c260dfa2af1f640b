"""Load a checkpoint with transformers, without this package: perplexity, and what it generates.

    python tests/clients/transformers_alone.py CHECKPOINT --text FILE [--windows 8 --tokens 512]

Prints one line of JSON.  `perplexity` is ``exp`` of the mean negative log-likelihood of tokens
2..n of each of the text's first windows, as `lrquant evaluate RUN --ppl FILE --limit 8 --seqlen
512` gives it for the run that CHECKPOINT was written from.  Needs torch, transformers and what
the format asks for: compressed-tensors, or gptqmodel for AWQ.  A transform_config, which
transformers leaves out, is put in by compressed-tensors.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT = "The capital of France is"
GENERATED = 24  # tokens


def windows_of(tokenizer, text: str, windows: int, tokens: int) -> Tensor:
    """The first windows (windows, tokens) of a text file."""
    ids = tokenizer(Path(text).read_text(encoding="utf-8"), verbose=False).input_ids
    return torch.tensor(ids[: windows * tokens]).view(windows, tokens)


def perplexity(log_likelihoods: Tensor) -> float:
    """Of natural logarithms of any shape."""
    return math.exp(-float(log_likelihoods.double().mean()))


@torch.no_grad()
def log_likelihoods(model, windows: Tensor) -> Tensor:
    """Of tokens 2..n of each window: (windows, tokens - 1), float32."""
    found = []
    for window in windows:
        logits = model(window[None]).logits[0, :-1].float()
        found.append(logits.log_softmax(-1).gather(-1, window[1:, None])[:, 0])
    return torch.stack(found)


def apply_transforms(model, folder: Path) -> None:
    """Have a model multiply inputs as its config.json says."""
    values = json.loads((folder / "config.json").read_text())
    transforms = (values.get("quantization_config") or {}).get("transform_config")
    if transforms:
        from compressed_tensors.transform import TransformConfig, apply_transform_config

        apply_transform_config(model, TransformConfig.model_validate(transforms))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--text", required=True, help="UTF-8 text, tokenised as a whole")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512, help="tokens a window")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--log-likelihoods", help="write them here too (JSON)")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(
        options.checkpoint, dtype=getattr(torch, options.dtype)
    ).eval()
    apply_transforms(model, Path(options.checkpoint))
    windows = windows_of(tokenizer, options.text, options.windows, options.tokens)
    found = log_likelihoods(model, windows)
    prompt = torch.tensor([tokenizer(PROMPT).input_ids])
    generated = model.generate(prompt, max_new_tokens=GENERATED, do_sample=False)
    assert "lrquant" not in sys.modules
    if options.log_likelihoods:
        Path(options.log_likelihoods).write_text(json.dumps(found.tolist()))
    result = {
        "checkpoint": options.checkpoint,
        "dtype": options.dtype,
        "perplexity": perplexity(found),
        "generated": tokenizer.decode(generated[0, prompt.shape[1] :]),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
