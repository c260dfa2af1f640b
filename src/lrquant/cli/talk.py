"""Talking with a checkpoint: a chat, one answer, and the command by which a runtime serves it."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from lrquant.errors import LRQuantError

if TYPE_CHECKING:
    from lrquant.cli.screen import Screen
    from lrquant.measures.subjects.checkpoint import Checkpoint

_ENDS = ("/exit", "/quit")
_ANEW = "/new"
_HOTTEST = 100


def chat(options: argparse.Namespace, screen: Screen) -> None:
    """`lrquant chat`: turns until /exit or the end of the input."""
    loaded = _loaded(options)
    screen.say(f"{options.folder}: /new starts anew, /exit ends")
    turns: list[dict[str, str]] = []
    while True:
        try:
            said = screen.input("> ", markup=False).strip()
        except EOFError:
            return
        if said in _ENDS:
            return
        if said == _ANEW:
            turns = []
        elif said:
            turns.append({"role": "user", "content": said})
            answer = _answer(loaded, turns, options, screen)
            turns.append({"role": "assistant", "content": answer})


def generate(options: argparse.Namespace, screen: Screen) -> None:
    """`lrquant generate`: one answer."""
    turns = [{"role": "user", "content": options.text}]
    _answer(_loaded(options), turns, options, screen)


def serve(options: argparse.Namespace, screen: Screen) -> None:
    """`lrquant serve`: the runtime's own command, and what is to be known of it."""
    from lrquant.config.config import quantizing_in
    from lrquant.config.core import TARGETS
    from lrquant.files.manifest import MANIFEST, SETTINGS, read_manifest
    from lrquant.formats.choice import formats
    from lrquant.formats.targets import loading_of

    place, target = options.folder, options.target
    _refuse_run(place)
    if target not in TARGETS:
        raise LRQuantError(f"target {target!r}: use one of {', '.join(TARGETS)}")
    if not (place / MANIFEST).is_file():
        raise LRQuantError(f"{place}: no checkpoint of lrquant ({MANIFEST} is missing)")
    form = formats()[read_manifest(place)["format"]]
    loading = loading_of(form, quantizing_in(place / SETTINGS).schemes, target)
    folder = shlex.quote(str(place))
    if loading.refusal is not None:
        raise LRQuantError(f"{place}: not for {target}: {loading.refusal}; `lrquant chat {folder}`")
    if not target.startswith("vllm"):
        raise LRQuantError(f"--target {target}: it has no server; `lrquant chat {folder}` talks")
    for note in (f"{target} computes {loading.computes}", *loading.notes):
        screen.say(f"# {note}")
    screen.say((loading.serve or "vllm serve FOLDER").replace("FOLDER", folder))


def _loaded(options: argparse.Namespace) -> Checkpoint:
    """A checkpoint, verified and read as transformers reads it."""
    from lrquant.config.groups import Computing
    from lrquant.measures.subjects.checkpoint import load_checkpoint

    if options.max_tokens < 1:
        raise LRQuantError(f"--max-tokens {options.max_tokens}: use a whole number of at least 1")
    if options.temperature is not None and not 0 <= options.temperature <= _HOTTEST:
        raise LRQuantError(f"--temperature {options.temperature}: use 0 to {_HOTTEST}")
    _refuse_run(Path(options.folder))
    loaded = load_checkpoint(options.folder, Computing(options.device, "auto", "auto"))
    if loaded.tokenizer is None or not loaded.module.can_generate():
        raise LRQuantError(f"{options.folder}: no model that writes text")
    return loaded


def _refuse_run(place: Path) -> None:
    if (place / "run.json").is_file():
        raise LRQuantError(f"{place}: a run; write a checkpoint first: lrquant export {place} DIR")


def _drawing(temperature: float | None) -> dict[str, bool | float]:
    """How tokens are chosen, where that is not as the model's generation settings say."""
    if temperature is None:
        return {}
    return {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}


def _answer(
    loaded: Checkpoint, turns: list[dict[str, str]], options: argparse.Namespace, screen: Screen
) -> str:
    """The next turn, shown while it is written; without a chat template the text goes on."""
    import torch
    from transformers import TextStreamer

    tokenizer, module = loaded.tokenizer, loaded.module
    assert tokenizer is not None

    class Shown(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            screen.part(text + "\n" * stream_end)

    text, templated = "\n".join(turn["content"] for turn in turns), bool(tokenizer.chat_template)
    if templated:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    encoded = tokenizer(text, return_tensors="pt", add_special_tokens=not templated)
    ids = encoded["input_ids"].to(module.device)
    torch.manual_seed(options.seed)
    written = module.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=options.max_tokens,
        streamer=Shown(tokenizer, skip_prompt=True, skip_special_tokens=True),
        **_drawing(options.temperature),
    )
    answer = written[0, ids.shape[1] :]
    return str(tokenizer.decode(answer, skip_special_tokens=True))
