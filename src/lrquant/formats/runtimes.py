"""vLLM and transformers as they compute packed integers.

Each statement says of itself how it is known: "tried" (tests/clients/verdicts.py), "source" (read
in the version's Python) or "docs".  vLLM is 0.32, transformers 5.23 with compressed-tensors 0.20.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace

from lrquant.config.scheme import FLOAT_BITS, Scheme
from lrquant.formats.loading import Loading

SMALLEST_GROUP = 32
_GROUPS = (None, 32, 64, 128)  # of Marlin, vLLM's kernel for most CUDA devices (source)
_EXACT = "VLLM_CPU_INT4_W4A8=0"
_SERVE_CPU = "python -m vllm.entrypoints.openai.api_server --model FOLDER"
# tried: W8A8 nearer to 127 than to 127.5; source: scale = maximum / 127
_STEPS = (
    "vLLM rounds activations to 127 steps to the largest of a token, 127.5 are learned: perplexity "
    "moves by tenths of a percent"
)


# source (vLLM 0.32 and 0.33): HadamardTransform raises for several GPUs, the method of a linear
# asserts that there is no bias, and the weights that it has for the matrices have no `data`
_TRANSFORMS = (
    "vLLM multiplies inputs by Hadamard matrices in float16 or bfloat16, on one GPU alone (no "
    "tensor parallelism, no --cpu-offload-gb), and of some linears: see `lrquant check --target "
    "vllm` (tried in vLLM 0.32 with torch's product in its CUDA kernel's place)"
)
# source: it finds them by the names of a model's own linears, which it has of these.  Others it
# makes one product of without saying of which, where it raises an error, or calls by other names,
# where it leaves the matrices out without a word.
_NAMED = re.compile(r"(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)")
_USUAL = ("self_attn.", "mlp.")  # blocks of other modules it builds in other ways, attention too


def multiplied_in_vllm(matrix: str, block: Collection[str]) -> bool:
    """Whether vLLM knows which linear's inputs to multiply: a matrix of a block of such names."""
    return all(each.startswith(_USUAL) for each in block) and bool(_NAMED.fullmatch(matrix))


def in_vllm(scheme: Scheme) -> Loading:
    """vLLM on CUDA: what its kernel selection takes (source), and what its CPU build would do."""
    loading = _on_cuda(scheme)
    cpu = in_vllm_cpu(scheme)
    if loading.refusal is not None:
        return loading
    if scheme.hadamard:
        loading = replace(loading, notes=(*loading.notes, _TRANSFORMS), transforms=True)
    if cpu.refusal is not None:
        note = f"not for vLLM's CPU build: {cpu.refusal}"
    elif not cpu.as_learned:
        note = f"vLLM's CPU build computes {cpu.computes}"
    else:
        return loading
    return replace(loading, notes=(*loading.notes, note))


def _on_cuda(scheme: Scheme) -> Loading:
    bits, group = scheme.weight_bits, scheme.group_size
    if bits == scheme.activation_bits == 8:
        return Loading(notes=(_STEPS,))
    if group is not None and group < SMALLEST_GROUP:
        return Loading(
            f"vLLM's own kernels take no groups of {group}, but of {SMALLEST_GROUP} columns up"
        )
    if scheme.activation_bits != FLOAT_BITS:
        # source: W4A8 and W4A4 go through the same choice of kernel as W4A16, and only Humming's
        # looks at the activations' scheme.
        return Loading(
            computes=(
                "16-bit activations wherever it chooses the kernel by itself (Machete, Marlin: "
                "read in the source of vLLM 0.32, not tried); start it with --linear-backend "
                "humming and the package humming-kernels"
            ),
            serve="vllm serve FOLDER --linear-backend humming",
        )
    if group in _GROUPS and (bits == 4 or (bits == 8 and scheme.symmetric)):
        return Loading()
    if bits == 8:  # source: Machete (compute capability 9.0) takes zero points of 8 bits
        return Loading(
            notes=("vLLM takes it on Hopper GPUs, on others with the package humming-kernels only",)
        )
    if not scheme.symmetric and bits != 4:
        return Loading(f"no kernel of vLLM is known to take {bits}-bit weights with zero points")
    # docs: humming-kernels 0.1.19 takes symmetric integers of 1 to 8 bits, and any group.
    what = f"{bits}-bit weights" if bits != 4 else f"groups of {group}"
    return Loading(notes=(f"vLLM takes {what} with the package humming-kernels only (not tried)",))


def in_vllm_cpu(scheme: Scheme) -> Loading:
    """vLLM's CPU build for x86: tried with AVX512-BF16 and VNNI; AMX is from the source."""
    bits = scheme.weight_bits
    if scheme.hadamard:  # source: its kernel, hadacore, is in CUDA builds alone
        return Loading("it has no kernel that multiplies inputs by Hadamard matrices")
    if scheme.activation_bits != FLOAT_BITS:
        if bits == scheme.activation_bits == 8:
            # tried: without VNNI instructions oneDNN's sums of two products overflow 16 bits
            vnni = "vLLM's CPU build multiplies bytes wrongly on CPUs without VNNI instructions"
            return Loading(notes=(_STEPS, vnni), serve=_SERVE_CPU)
        return Loading(
            f"it leaves activations beside {bits}-bit weights at 16 bits (at 8 on CPUs with AMX): "
            "something else than what was learned would be served"
        )
    if bits != 4:
        return Loading(f"its kernels take weights of 4 bits, not of {bits}, beside 16-bit ones")
    return Loading(computes=four_bits_on_cpu(), serve=f"{_EXACT} {_SERVE_CPU}", multiple=32)


def four_bits_on_cpu() -> str:
    """What becomes of 16-bit activations beside 4-bit weights (source: CPUWNA16LinearKernel)."""
    return (
        "what was learned, but on CPUs with AMX, in bfloat16, 8-bit activations; start it with "
        f"{_EXACT}, which turns them off"
    )


def in_transformers(scheme: Scheme) -> Loading:
    """transformers with compressed-tensors (tried)."""
    if scheme.hadamard:
        return Loading(
            "transformers leaves transform_config out without a word, so that inputs would not be "
            "multiplied by Hadamard matrices; `compressed_tensors.transform.apply_transform_config`"
            " does it after loading, as `lrquant evaluate` does",
            unsaid=True,
        )
    if scheme.activation_bits != FLOAT_BITS:
        return Loading(
            notes=(
                "transformers emulates quantised activations and decodes the weights at the first "
                "forward: no speed-up",
            )
        )
    if scheme.symmetric:
        return Loading(notes=(_DECODED_LATER,))
    return Loading(notes=(_DECODED_NOW,))


# tried: tests/formats/test_compressed_tensors.py holds what is in memory and what is saved
_DECODED_LATER = (
    "transformers keeps weights packed until the first forward, which decodes all of them (of a "
    "model whose vision tower has the scheme too: while loading): no speed-up, and from then on "
    "the memory of dense weights, which save_pretrained then writes"
)
_DECODED_NOW = (
    "transformers decodes weights with zero points while loading: the memory of dense weights, no "
    "speed-up, and save_pretrained writes a dense model; what stays packed has symmetric weights "
    "(until the first forward), or is AWQ through gptqmodel"
)
