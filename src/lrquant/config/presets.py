"""Named values of settings: our defaults, and those of the papers where they differ."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "epochs": 20,
        "let_lr": 5e-3,
        "lwc_lr": 1e-2,
        "rotation_lr": 1e-2,
        "lwc_init": 4.0,
        "let_sites": ("norm", "value_output", "query_key"),
        "let_shift": "always",
        "loss": "mse+nlc",
        "ema_init": "one",
        "rotation_sharing": "weight",
        "keep_best": False,
        "batch_size": 1,
        "nsamples": 128,
        "seqlen": 2048,
    },
}


def with_preset(settings: dict[str, Any]) -> dict[str, Any]:
    """`settings` over the values of the preset that they name."""
    name = settings.get("preset", "default")
    return {**PRESETS.get(name, {}), **settings}
