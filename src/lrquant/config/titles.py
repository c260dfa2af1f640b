"""Settings in groups for people, each under a title, as helps and docstrings list them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from lrquant.config.config import measured_settings

_LEARNED, _MEASURED = "what is learned, and how", "what is measured"
_GROUPS = {
    "model and scheme": (
        *("model", "scheme", "preset", "scheme_for", "wbits", "abits", "group_size", "symmetric"),
        *(
            "activation_symmetric",
            "qkv_bits",
            "hadamard",
            "qk_hadamard",
            "weight_grid",
            "vision_scheme",
        ),
        "net",
    ),
    "where results go": (
        *("save_dir", "format", "target", "save_dtype", "push_to_hub", "output_dir", "resume"),
        *("overwrite", "report", "examples", "log_dir"),
    ),
    "calibration": (
        *("calib_dataset", "data_dir", "nsamples", "seqlen", "seed", "text_column", "bos"),
        *("calib_images", "calib_image_share", "image_token_weight", "cache_dir"),
        *("act_scales", "act_shifts"),
    ),
    _MEASURED: ("ppl", "agreement", "tasks", "compare", "limit"),
    _LEARNED: ("lr_plus", "epochs"),
    "machine": (
        *("device", "precision", "compile", "cuda_graphs", "deterministic", "offload"),
        *("batch_size", "micro_batch_size"),
    ),
}


def grouped(names: Sequence[str]) -> dict[str, list[str]]:
    """Settings by group, those that groups name first and in their order."""
    groups = {title: [n for n in members if n in names] for title, members in _GROUPS.items()}
    placed = {name for members in groups.values() for name in members}
    measured = {e.name for kind in measured_settings() for e in dataclasses.fields(kind)}
    measured |= {"tta", "tta_blocks", "tta_epochs"}
    for name in names:
        if name not in placed:
            groups[_MEASURED if name in measured else _LEARNED].append(name)
    return groups
