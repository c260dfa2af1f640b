"""A native checkpoint beside the learned model: do they differ by more than float32 rounding does?

    python benchmarks/rounding.py RUN CHECKPOINT --text FILE [--windows 12 --tokens 512]

CHECKPOINT is RUN in the native format.  First each block alone, on the inputs that it has in the
learned (fake-quantised) model: how far its output is from the learned block's, in the native block
and in the learned block with inputs moved by 1e-7 of themselves.  Then whole models over the
windows: the native one, and the learned one with its embeddings (twice, other seeds) or the outputs
of all its linears moved by 1e-7, each against the learned one.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lrquant.architectures import architecture_of
from lrquant.blocks.materialize import materialize
from lrquant.blocks.plan import Plan
from lrquant.blocks.variants import as_learned
from lrquant.blocks.workbench import make_workbench
from lrquant.config.groups import Computing
from lrquant.measures.rows import table
from lrquant.model.loading import load_model
from lrquant.runs.folder import RunFolder

MOVED = 1e-7  # about the rounding of one float32 sum, relative


@torch.no_grad()
def main() -> None:
    """Print one line a block and one table."""
    options = _options()
    folder = RunFolder.open(Path(options.run))
    config = dataclasses.replace(folder.config, precision="float32", device="cpu")
    model = load_model(config.model, None)
    plan, computing = Plan.of(config.quantizing), config.group(Computing)
    bench = make_workbench(model, plan, computing, Path(config.output_dir))
    learned = materialize(bench, as_learned(bench, folder)).eval()
    native = AutoModelForCausalLM.from_pretrained(options.checkpoint, dtype="float32").eval()
    assert model.tokenizer is not None
    text = Path(options.text).read_text(encoding="utf-8")
    ids = model.tokenizer(text, verbose=False).input_ids[: options.windows * options.tokens]
    windows = torch.tensor(ids).view(options.windows, 1, options.tokens)
    _blocks(learned, native, windows[0])
    print("\n" + _models(learned, native, windows))


def _blocks(learned: PreTrainedModel, native: PreTrainedModel, ids: Tensor) -> None:
    seen: list[tuple[tuple[Tensor, ...], dict[str, Any]]] = []
    with ExitStack() as hooks:
        for block in _of(learned):
            keep = block.register_forward_pre_hook(
                lambda module, inputs, named: seen.append((inputs, named)), with_kwargs=True
            )
            hooks.callback(keep.remove)
        learned(ids, use_cache=False)
    for index, (inputs, named) in enumerate(seen):
        first, *rest = inputs
        ours, theirs = _of(learned)[index], _of(native)[index]
        expected = _states(ours(first, *rest, **named))
        moved = _states(ours(_moved(first, torch.Generator().manual_seed(index)), *rest, **named))
        found = _states(theirs(first, *rest, **named))
        size = (expected - first).norm()  # what the block adds
        apart = [float((states - expected).norm() / size) for states in (found, moved)]
        print(f"block {index}: native {apart[0]:.1e}, learned and moved {apart[1]:.1e}", flush=True)


def _models(learned: PreTrainedModel, native: PreTrainedModel, windows: Tensor) -> str:
    embeddings = [learned.get_input_embeddings()]
    linears = [m for block in _of(learned) for m in block.modules() if isinstance(m, nn.Linear)]
    variants: dict[str, Callable[[Tensor], Tensor]] = {
        "native": lambda ids: _scores(native, ids),
        "learned, embeddings moved": lambda ids: _scores_moved(learned, embeddings, ids, 0),
        "learned, embeddings moved, other seed": lambda ids: _scores_moved(
            learned, embeddings, ids, 1
        ),
        "learned, linears' outputs moved": lambda ids: _scores_moved(learned, linears, ids, 100),
    }
    losses: dict[str, list[Tensor]] = {name: [] for name in ("learned", *variants)}
    far: dict[str, list[Tensor]] = {name: [] for name in variants}
    for ids in windows:
        expected, targets = _scores(learned, ids), ids[0, 1:, None]
        losses["learned"].append(-expected.gather(-1, targets).double().mean())
        for name, scores in variants.items():
            found = scores(ids)
            losses[name].append(-found.gather(-1, targets).double().mean())
            far[name].append(torch.linalg.vecdot(expected.exp(), expected - found).mean())
    rows = []
    base = torch.stack(losses["learned"])
    for name, values in losses.items():
        loss = torch.stack(values)
        error = float((loss - base).std() / math.sqrt(len(loss)))
        change = f"{float((loss - base).mean()):+.4f} ± {error:.4f}" if name in far else ""
        divergence = f"{float(torch.stack(far[name]).mean()):.3f}" if name in far else ""
        rows.append([name, f"{math.exp(float(loss.mean())):.2f}", change, divergence])
    return table(["model", "perplexity", "loss, from learned", "KL from learned"], rows)


def _scores(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Log-probabilities (tokens - 1, vocabulary)."""
    return model(ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)


def _scores_moved(model: PreTrainedModel, modules: Any, ids: Tensor, seed: int) -> Tensor:
    with _outputs_moved(modules, seed):
        return _scores(model, ids)


@contextmanager
def _outputs_moved(modules: Any, seed: int):
    generator = torch.Generator().manual_seed(seed)
    with ExitStack() as hooks:
        for module in modules:
            handle = module.register_forward_hook(lambda m, i, output: _moved(output, generator))
            hooks.callback(handle.remove)
        yield


def _moved(values: Tensor, generator: torch.Generator) -> Tensor:
    return values * (1 + MOVED * torch.randn(values.shape, generator=generator))


def _states(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _of(model: PreTrainedModel) -> Any:
    return model.get_submodule(architecture_of(model.config).blocks)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("--text", required=True, help="UTF-8 text, tokenised as a whole")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=512, help="tokens a window")
    return parser.parse_args()


if __name__ == "__main__":
    main()
