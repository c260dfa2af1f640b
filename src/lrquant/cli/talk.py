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
    from lrquant.model.writing import Drawing

_ENDS = ("/exit", "/quit")
_ANEW = "/new"


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
    screen.say(loading.command(folder))


def _loaded(options: argparse.Namespace) -> Checkpoint:
    """A checkpoint, verified and read as transformers reads it."""
    from lrquant.config.groups import Computing
    from lrquant.measures.subjects.checkpoint import load_checkpoint
    from lrquant.model.writing import require_writer

    _drawing(options)  # which refuses what it can't be
    _refuse_run(Path(options.folder))
    loaded = load_checkpoint(options.folder, Computing(options.device, "auto", "auto"))
    require_writer(loaded.module, loaded.tokenizer, options.folder)
    return loaded


def _drawing(options: argparse.Namespace) -> Drawing:
    from lrquant.model.writing import Drawing

    return Drawing(options.max_tokens, options.temperature, options.seed)


def _refuse_run(place: Path) -> None:
    from lrquant.runs.folder import is_run

    if is_run(place):
        raise LRQuantError(f"{place}: a run; write a checkpoint first: lrquant export {place} DIR")


def _answer(
    loaded: Checkpoint, turns: list[dict[str, str]], options: argparse.Namespace, screen: Screen
) -> str:
    """The next turn, shown while it is written; without a chat template the text goes on."""
    from transformers import TextStreamer

    from lrquant.model.writing import answer, require_writer

    tokenizer = require_writer(loaded.module, loaded.tokenizer, options.folder)

    class Shown(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            screen.part(text + "\n" * stream_end)

    streamer = Shown(tokenizer, skip_prompt=True, skip_special_tokens=True)
    return answer(loaded.module, tokenizer, turns, _drawing(options), streamer)
