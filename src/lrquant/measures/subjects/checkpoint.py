"""A quantised checkpoint as transformers loads it: what is measured is what others will run."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import logging

from lrquant.architectures import Architecture, architecture_of
from lrquant.blocks.placement import Placement, Room
from lrquant.blocks.residuals import in_line
from lrquant.blocks.streams import Stream
from lrquant.blocks.stubs import stubs
from lrquant.config.config import Config
from lrquant.config.groups import Computing
from lrquant.data.samples import Samples
from lrquant.errors import LRQuantError
from lrquant.files.manifest import MANIFEST, SETTINGS, read_manifest, require_whole
from lrquant.files.whole import read_json
from lrquant.measures.scoring.predictions import single_samples
from lrquant.measures.subjects.stored import Stored, make_dense, spread_loading
from lrquant.measures.subjects.transforms import Transforms
from lrquant.model.device import choose_device
from lrquant.model.loading import load_processor
from lrquant.model.reading import read_config, read_tokenizer, reading
from lrquant.model.sources import resolve_model
from lrquant.model.sources.kinds import has_tokenizer_files, is_unpacked


@dataclass(frozen=True)
class Checkpoint:
    """A whole model in memory, weights and activations quantised by what transformers made of it.

    `settings` are those that it was learned with, if this project wrote it.
    """

    name: str
    module: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    settings: Config | None
    processor: Any = None

    @property
    def skeleton(self) -> PreTrainedModel:
        """The model whose forward says what it reads."""
        return self.module

    @property
    def architecture(self) -> Architecture:
        """Its family."""
        return architecture_of(self.module.config)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.module.device

    @property
    def dtype(self) -> torch.dtype:
        """In what its floating-point tensors are stored, so in what it computes."""
        return self.module.dtype

    @torch.no_grad()
    def final_states(
        self, windows: Samples, progress: Callable[[int], None] = lambda window: None
    ) -> Stream:
        """Hidden states after the last block (windows, tokens, hidden), float32 on the host."""
        batches = list(single_samples(windows.feed))
        config = self.architecture.part(self.module.config)
        shape = batches[-1][0].rows.stop, self._residuals * config.hidden_size
        stream = Stream(shape, torch.float32, self.device, "host")
        seen: list[Tensor] = []

        def keep(block: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            states = output[0] if isinstance(output, tuple) else output
            seen.append(in_line(states, self._residuals))

        handle = self._blocks[-1].register_forward_hook(keep)
        try:
            for (batch, _, _), sample in zip(batches, windows.feed.inputs, strict=True):
                # The whole module: some formats unpack themselves before its first forward.
                inputs = {name: value.to(self.device) for name, value in sample.items()}
                self.module(**inputs, use_cache=False, logits_to_keep=self._logits_to_keep)
                stream.write(batch, seen.pop())
                progress(batch.samples.start)
        finally:
            handle.remove()
        return stream

    @torch.no_grad()
    def head(self, hidden_states: Tensor) -> Tensor:
        """Logits (batch, tokens, vocabulary) of hidden states after the last block."""
        states = hidden_states.to(self.dtype)
        ids = torch.zeros(states.shape[:2], dtype=torch.long, device=self.device)
        visits = [lambda hidden, arguments: states] * len(self._blocks)
        with stubs(self._blocks, visits, self.architecture.in_tuples, self._residuals):
            return self.module(input_ids=ids, use_cache=False).logits

    @property
    def _logits_to_keep(self) -> int:
        """One will do, or all where later blocks would compute no other tokens."""
        return 1 if self.architecture.hands_on is None else 0

    @property
    def _residuals(self) -> int:
        return self.architecture.residuals(self.architecture.part(self.module.config))

    @property
    def _blocks(self) -> nn.ModuleList:
        blocks = self.module.get_submodule(self.architecture.blocks)
        assert isinstance(blocks, nn.ModuleList)
        return blocks


def is_checkpoint(name: str, cache_dir: Path | None) -> bool:
    """Whether a folder or hub name is a quantised model, or one that this project wrote.

    One whose weights are unpacked while read is none: it is measured as what it stands for.
    """
    if Path(name).expanduser().is_file():
        return False
    files = resolve_model(name, cache_dir)
    if files.gguf_file is not None:
        return False
    try:
        values = json.loads((files.folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LRQuantError(f"{files.folder}/config.json: cannot be read; get it again") from error
    quantized = bool(values.get("quantization_config")) and not is_unpacked(values)
    return quantized or (files.folder / SETTINGS).is_file()


def load_checkpoint(name: str, computing: Computing, cache_dir: Path | None = None) -> Checkpoint:
    """Load it in the dtype that it is stored in, or that `--precision` says.

    Refused are files that this project wrote and that changed since, tensors that are missing,
    left over or of another shape, and what transformers would leave out without a word.
    """
    return loaded(stored_checkpoint(name, computing, cache_dir), choose_device(computing.device))


def stored_checkpoint(name: str, computing: Computing, cache_dir: Path | None = None) -> Stored:
    """Its files, of which those that no loading could mend are refused."""
    folder = resolve_model(name, cache_dir).folder
    if (folder / MANIFEST).exists():
        require_whole(folder)
    _refuse_ignored(name, folder)
    dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    return Stored(name, folder, read_config(folder), dtypes.get(computing.precision))


def loaded(
    stored: Stored, device: torch.device, scratch: Path | None = None, room: Room | None = None
) -> Checkpoint:
    """The checkpoint on a device, or over several places where that has no room for it.

    `room` is what there is, by default what is free; what lies on the disk is in `scratch`.
    """
    folder, architecture = stored.folder, stored.architecture
    own = (folder / MANIFEST).exists()
    without = architecture.reads_pixels or (own and not has_tokenizer_files(folder))
    tokenizer = None if without else read_tokenizer(folder)
    placement = stored.placement(device, room)
    if placement is None:
        module = _read(stored)
        nn.Module.to(module, device)
    else:
        module = _spread(stored, placement.with_folder(scratch))
    processor = load_processor(folder, architecture)
    module = module.eval().requires_grad_(False)
    return Checkpoint(stored.name, module, tokenizer, settings_of(folder), processor)


def _spread(stored: Stored, placement: Placement) -> PreTrainedModel:
    """The model over several places, whose folder goes with it."""
    places = {"device_map": placement.device_map(stored.outer_names), "offload_buffers": True}
    with ExitStack() as stack:
        stack.callback(placement.remove)
        with spread_loading():
            module = _read(stored, offload_folder=placement.folder, **places)
            make_dense(module)
        stack.pop_all()
    placement.end_with(module)
    return module


def _read(stored: Stored, **places: Any) -> PreTrainedModel:
    """What transformers makes of the files; `places` are its arguments that say where."""
    mend = "write it again, or give the run that it is of"
    with reading("the checkpoint", stored.folder, mend), quiet_loading():
        try:
            module, report = _made(stored, stored.config, places)
        except ValueError as error:
            if "scaled_dot_product_attention" not in str(error):
                raise
            plain = copy.deepcopy(stored.config)  # soft caps and sinks rule torch's attention out
            plain._attn_implementation = "eager"
            module, report = _made(stored, plain, places)
    transforms = _transforms(stored.name, stored.folder)
    _refuse_parts(stored.name, stored.folder, report, transforms)
    transforms.enter(module)
    return module


def _made(
    stored: Stored, config: PretrainedConfig, places: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and what transformers reports of it."""
    made: tuple[PreTrainedModel, dict[str, Any]] = stored.architecture.auto_class.from_pretrained(
        stored.folder,
        dtype=stored.dtype or "auto",
        config=config,
        output_loading_info=True,
        trust_remote_code=False,
        **places,
    )
    return made


def _refuse_ignored(name: str, folder: Path) -> None:
    """Refuse what would be read over: unknown methods, odd transforms, adapters."""
    quantization = read_json(folder / "config.json").get("quantization_config")
    if isinstance(quantization, dict) and not AutoHfQuantizer.supports_quant_method(quantization):
        raise LRQuantError(
            f"checkpoint {name}: quant_method {quantization.get('quant_method')!r} of its "
            "config.json is unknown here, and would be left out; measure it in the software that "
            "wrote it"
        )
    _transforms(name, folder)
    if (folder / "adapter_config.json").is_file():
        raise LRQuantError(
            f"checkpoint {name}: adapter_config.json beside its weights changes what is loaded "
            "from machine to machine; merge the adapter, or take the file away"
        )


def _transforms(name: str, folder: Path) -> Transforms:
    quantization = read_json(folder / "config.json").get("quantization_config")
    return Transforms(name, quantization if isinstance(quantization, dict) else {})


def _refuse_parts(name: str, folder: Path, report: dict[str, Any], transforms: Transforms) -> None:
    """Refuse a checkpoint of which transformers made up, left out or reshaped a tensor."""
    expected: set[str] = set()
    if (folder / MANIFEST).exists():
        expected.update(read_manifest(folder).get("extra_tensors", []))
    left = [key for key in report["unexpected_keys"] if not transforms.is_matrix(key)]
    problems = {
        "has no": sorted(report["missing_keys"]),
        "is not read although it holds": sorted(set(left) - expected),
        "has another shape than config.json says of": sorted(
            str(entry[0]) for entry in report["mismatched_keys"]
        ),
    }
    for said, names in problems.items():
        if names:
            more = f" and {len(names) - 1} tensors more" if names[1:] else ""
            raise LRQuantError(
                f"checkpoint {name}: it {said} {names[0]}{more}, so transformers would measure "
                "another model; its config.json and its files do not belong together, get it again"
            )


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Without transformers' progress bars where no terminal shows them."""
    shown = logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def settings_of(folder: Path) -> Config | None:
    """What a checkpoint of this project was learned with, None if another one made it."""
    made_by = folder / SETTINGS
    return Config.from_yaml(made_by) if made_by.is_file() else None
