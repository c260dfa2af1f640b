"""Examples of what a model writes before and after: short, greedy, only where that is cheap."""

from __future__ import annotations

import logging

import torch
from transformers import GenerationMixin

from lrquant.blocks.materialize import materialize
from lrquant.blocks.placement import spread, whole_bytes
from lrquant.blocks.runner import Variant
from lrquant.blocks.variants import as_learned, full_precision
from lrquant.blocks.workbench import Workbench
from lrquant.errors import LRQuantError
from lrquant.runs.folder import RunFolder
from lrquant.runs.results import Json

logger = logging.getLogger("lrquant")
PROMPTS = (
    "The three most important things to know about the moon are",
    "To make a simple tomato soup, first",
)
NEW_TOKENS = 32
LARGEST_ON_CPU = 1_000_000_000  # parameters: a minute or so on a few cores


def write_examples(workbench: Workbench, folder: RunFolder) -> dict[str, Json]:
    """What full precision and the learned model write after each of `PROMPTS`, as JSON has it.

    Nothing, with the reason in the log, where the model has no text to write, or is too large for a
    minute: on a CPU above `LARGEST_ON_CPU` parameters, and where blocks would lie on the disk or,
    beside CUDA devices, on the host.  Nothing is drawn, so a run repeats.
    """
    reason = _too_dear(workbench)
    if reason is not None:
        logger.info("no examples of what the model writes: %s", reason)
        return {}
    models = {
        "full_precision": (workbench.full_precision, full_precision(workbench)),
        "quantized": (workbench, as_learned(workbench, folder)),
    }
    written = {name: _continuations(*each) for name, each in models.items()}
    if not all(written.values()):
        return {}
    pairs = zip(PROMPTS, written["full_precision"], written["quantized"], strict=True)
    texts = [{"prompt": p, "full_precision": f, "quantized": q} for p, f, q in pairs]
    return {"examples": texts}


def _too_dear(workbench: Workbench) -> str | None:
    """Why nothing is written, or None."""
    model, device = workbench.model, workbench.device
    if model.tokenizer is None:
        return "it has no tokenizer"
    if device.type == "cpu" and model.parameters > LARGEST_ON_CPU:
        return f"above {LARGEST_ON_CPU / 1e9:.0f} G parameters that takes too long on a CPU"
    size = whole_bytes(model, workbench.dtype)
    try:
        placement = spread(size, device)
    except LRQuantError as error:
        return str(error)
    if placement is not None and placement.slow:
        return f"the whole model needs {size}, with {placement}"
    return None


@torch.no_grad()
def _continuations(workbench: Workbench, variant: Variant) -> list[str]:
    """The texts of one variant; none of a model that writes no text."""
    module, tokenizer = materialize(workbench, variant), workbench.model.tokenizer
    if tokenizer is None or not isinstance(module, GenerationMixin) or not module.can_generate():
        return []
    positions = getattr(module.config.get_text_config(), "max_position_embeddings", None)
    room = None if positions is None else max(positions - NEW_TOKENS, 1)
    texts = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"][:, :room].to(workbench.device)
        generate = getattr(module, "generate")  # noqa: B009
        written = generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=0,
        )
        texts.append(str(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)))
    return texts
