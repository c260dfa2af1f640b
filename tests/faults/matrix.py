"""Kills, damaged files, full disks and races, one by one, on a tiny model: `make faults`.

Prints one table.  A case is lost if a learned block or someone else's byte is, and wrong if what
comes of it is neither the undisturbed run's bytes nor exit code 2 with one line.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from child import Child, Fault
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import lrquant
import lrquant.pipeline
import lrquant.reports.page  # children find imported what they need

BLOCKS = 2
QUICK = ["--nsamples", "2", "--seqlen", "16", "--epochs", "1", "--precision", "float32"]
QUICK += ["--device", "cpu", "--scheme", "W4A16", "--no-report", "--recipe", "default"]
MINE = ("notes.txt", "saved.partial", "p.partial", "run/mine.txt", "run/blocks/mine.txt")
VOLATILE = ("run.log", "results.json", "blocks.jsonl", "lrquant-files.jsonl")  # clocks
VOLATILE += ("lrquant.yaml", "lrquant.sha256")  # whether it was resumed
KINDS = ("kills", "damaged files", "full disks", "races")


@dataclass
class Tally:
    """Cases by kind, and what went wrong."""

    cases: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)

    def case(self, kind: str, name: str, lost: str, wrong: str) -> None:
        """Take in one case; the two say what was lost or wrong, nothing if nothing was."""
        self.cases[kind] += 1
        self.lost[kind] += bool(lost)
        self.wrong[kind] += bool(wrong)
        if lost or wrong:
            print(f"{kind}: {name}: {lost or wrong}", file=sys.stderr)

    @contextmanager
    def told_at_the_end(self, started: float) -> Iterator[None]:
        """Print the table whatever ends it."""
        try:
            yield
        finally:
            print(self.table())
            print(f"\nlrquant {lrquant.__version__}, {time.monotonic() - started:.0f} s")

    def table(self) -> str:
        """Markdown, a row a kind."""
        rows = [f"| {k} | {self.cases[k]} | {self.lost[k]} | {self.wrong[k]} |" for k in KINDS]
        return "\n".join(
            ["| faults | cases | lost | wrong |", "| --- | ---: | ---: | ---: |", *rows]
        )


@dataclass(frozen=True)
class Story:
    """A command, the state that it starts from, and the commands that mend it after a fault."""

    name: str
    start: str
    command: list[str]
    mends: list[list[str]]


class Bench:
    """The tiny model, the states that stories start from, and worlds made of them."""

    def __init__(self, root: Path, draw: random.Random, wanted: int) -> None:
        self.root, self.draw, self.wanted = root, draw, wanted
        self.numbers = iter(range(10**9))
        _save_model(root / "model")
        self.text = root / "text.txt"
        self.text.write_text("some words, and some more of them. " * 40)
        self.learn = ["quantize", "--model", str(root / "model"), "--calib_dataset"]
        self.learn += [str(self.text), *QUICK]
        self.ppl = ["--ppl", str(self.text), "--limit", "2", "--seqlen", "16"]
        self._make_states()

    def _make_states(self) -> None:
        states = self.root / "states"
        learn = [*self.learn, "--output_dir", "run"]
        (states / "empty").mkdir(parents=True)
        for name in MINE[:3]:
            (states / "empty" / name).write_text(f"mine: {name}")
        self._state("empty", "older", [[*learn, "--scheme", "W3A16", "--save_dir", "saved"]])
        self._state("empty", "run", [[*learn, *self.ppl, "--report"]])
        self._state("run", "exported", [["export", "run", "saved"]])
        self._state("run", "part", [])
        for path in (states / "part" / "run").glob("*/0001.safetensors"):
            path.unlink()

    def _state(self, start: str, name: str, commands: list[list[str]]) -> None:
        place = self.root / "states" / name
        shutil.copytree(self.root / "states" / start, place)
        for command in commands:
            code, said = Child(place, command).end()
            assert code == 0, said
        for mine in MINE:
            if (place / mine).parent.is_dir():
                (place / mine).write_text(f"mine: {mine}")

    def drawn(self, stories: list[Story]) -> list[Story]:
        """As many of them as are wanted."""
        return self.draw.sample(stories, min(self.wanted, len(stories)))

    def world(self, start: str) -> Path:
        """A copy of a state."""
        place = self.root / f"world-{next(self.numbers)}"
        shutil.copytree(self.root / "states" / start, place)
        return place

    def stories(self) -> list[Story]:
        """Every command that writes, with what is said to mend it."""
        learn = [*self.learn, "--output_dir", "run", "--save_dir", "saved", "--ppl", str(self.text)]
        learn += ["--limit", "2"]
        go_on, copy = [*learn, "--resume", "run"], [*self.learn, "--output_dir", "copy"]
        again = [*go_on, "--overwrite"]
        evaluate = ["evaluate", "run", *self.ppl, "--agreement", str(self.text), "--no-report"]
        results = ["evaluate", str(self.root / "model"), *self.ppl, "--output_dir", "results"]
        over = ["export", "run", "saved", "--overwrite", "--format", "dequantized"]
        elsewhere = [*copy, "--resume", "run"]
        return [
            Story("learn", "empty", learn, [learn, go_on, again]),
            Story("overwrite", "older", [*learn, "--overwrite"], [[*learn, "--overwrite"], again]),
            Story("resume", "part", go_on, [go_on, again]),
            Story("resume elsewhere", "part", elsewhere, [elsewhere, [*copy, "--resume", "copy"]]),
            Story(
                "export", "run", ["export", "run", "saved"], [["export", "run", "saved"], over[:4]]
            ),
            Story("export over", "exported", over, [over]),
            Story("evaluate", "run", evaluate, [evaluate]),
            Story("evaluate a model", "empty", results, [results]),
            Story("report", "run", ["report", "run"], [["report", "run"]]),
        ]


def _save_model(folder: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 264, "hidden_size": 32, "intermediate_size": 48}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = LlamaConfig(**sizes, **heads, num_hidden_layers=BLOCKS)
    LlamaForCausalLM(config).save_pretrained(folder)
    words = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def fingerprint(world: Path) -> dict[str, str]:
    """Hashes of what must be equal after all: learned, figures, checkpoints; and results' names."""
    kept = {}
    for path in sorted(world.rglob("*")):
        name = path.relative_to(world).as_posix()
        if not path.is_file() or path.name in VOLATILE or "report." in path.name:
            kept[name] = ""
        else:
            kept[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return kept


def lost(world: Path, start: Path, replaced: bool) -> str:
    """What of someone's, or of what was learned before, is not as it was."""
    for path in start.rglob("*"):
        name = path.relative_to(start).as_posix()
        learned = name.startswith("run/blocks/") and not replaced
        if not path.is_file() or not (name in MINE or learned):
            continue
        if not (world / name).is_file() or (world / name).read_bytes() != path.read_bytes():
            return f"{name} is lost or changed"
    return ""


def one_line(code: int, said: str) -> bool:
    """Exit code 2 with one line, or 0."""
    lines = [line for line in said.splitlines() if line.startswith(("lrquant: ", "Traceback"))]
    return code == 0 or (code == 2 and len(lines) == 1 and lines[0].startswith("lrquant: "))


def mended(world: Path, story: Story, expected: dict[str, str]) -> str:
    """Give the commands that are said to mend, until one succeeds; what is wrong then, if any."""
    said = ""
    for command in story.mends:
        code, said = Child(world, command).end()
        if not one_line(code, said):
            return f"exit code {code}: {said.strip()[-300:]}"
        if code == 0:
            return differences(fingerprint(world), expected)
    return f"nothing mends it: {said.strip()[-300:]}"


def differences(found: dict[str, str], expected: dict[str, str], aside: Sequence[str] = ()) -> str:
    """Names that differ, none if none do; those `aside` may."""
    names = (found.keys() | expected.keys()) - set(aside)
    names = {name for name in names if found.get(name) != expected.get(name)}
    return ("differs: " + ", ".join(sorted(names)[:5])) if names else ""


def points(bench: Bench, story: Story) -> tuple[int, dict[str, str]]:
    """How many changes an undisturbed command makes, and what comes of it."""
    world = bench.world(story.start)
    child = Child(world, story.command)
    code, said = child.end()
    assert code == 0, said
    expected = fingerprint(world)
    shutil.rmtree(world)
    return child.count, expected


def kills_and_full_disks(
    bench: Bench, tally: Tally, sample: Callable[[Sequence], Sequence]
) -> None:
    """A kill before, and a disk that is full from, each change on."""
    for story in bench.drawn(bench.stories()):
        count, expected = points(bench, story)
        for kind, fault in (("kills", "kill"), ("full disks", "full")):
            for at in sample(range(1, count + 1)):
                world = bench.world(story.start)
                code, said = Child(world, story.command, Fault(world, fault, at)).end()
                start = bench.root / "states" / story.start
                gone = lost(world, start, story.name == "overwrite")
                wrong = "" if fault == "kill" or one_line(code, said) else said.strip()[-300:]
                wrong = wrong or mended(world, story, expected)
                gone = gone or lost(world, start, story.name == "overwrite")
                tally.case(kind, f"{story.name} at {at} of {count}", gone, wrong)
                shutil.rmtree(world)


def damages(path: Path, others: Sequence[Path]) -> Iterator[tuple[str, Callable[[], None]]]:
    """Ways to damage one file."""
    content = path.read_bytes()

    def flip(place: int) -> None:
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])

    def folder() -> None:
        path.unlink()
        path.mkdir()

    yield "truncated", lambda: path.write_bytes(content[: len(content) // 2]) and None
    yield "emptied", lambda: path.write_bytes(b"") and None
    for share in (0.01, 0.3, 0.6, 0.99):
        yield f"flipped at {share}", lambda share=share: flip(int(share * (len(content) - 1)))
    yield "deleted", path.unlink
    yield "a folder", folder
    same = [other for other in others if other.suffix == path.suffix and other != path]
    if same:
        yield (
            f"swapped with {same[-1].name}",
            lambda: path.write_bytes(same[-1].read_bytes()) and None,
        )
    if path.suffix == ".safetensors":
        yield "unrelated", lambda: save_file({"x": torch.ones(3)}, path)


def damaged_files(bench: Bench, tally: Tally, sample: Callable[[Sequence], Sequence]) -> None:
    """Each file of a run and of a checkpoint damaged in each way, then used."""
    run, checkpoint = bench.root / "states" / "run" / "run", bench.root / "states/exported/saved"
    export, evaluate = ["export", "run", "saved"], ["evaluate", "saved", *bench.ppl]
    go_on = [*bench.learn, "--output_dir", "run", "--resume", "run", *bench.ppl[:4]]
    expected = fingerprint(bench.root / "states" / "exported" / "saved")
    learned = fingerprint(run / "blocks")
    cases = [("run", run, name, number) for name, number in _cases(run)]
    cases += [("exported", checkpoint, name, number) for name, number in _cases(checkpoint)]
    for start, folder, name, number in sample(cases):
        world = bench.world(start)
        place = world / folder.name
        files = sorted(path for path in place.rglob("*") if path.is_file())
        what, damage = list(damages(place / name, files))[number]
        damage()
        wrong = ""
        for command in (
            (export, ["report", "run"], go_on)
            if start == "run"
            else (["inspect", "saved"], evaluate)
        ):
            code, said = Child(world, command).end()
            if not one_line(code, said):
                wrong = f"{command[0]}: exit code {code}: {said.strip()[-400:]}"
            elif code == 0 and command == export:
                told = ("README.md", "lrquant.json") if name == "results.json" else ()
                wrong = wrong or differences(fingerprint(world / "saved"), expected, told)
            elif code == 0 and command == go_on:
                wrong = wrong or differences(fingerprint(world / "run" / "blocks"), learned)
        weights = name.endswith(".safetensors") or name in ("config.json", "lrquant.json")
        if start == "exported" and code == 0 and weights and what != "deleted":
            wrong = wrong or "measured as if nothing had happened"
        mine = lost(world, bench.root / "states" / start, replaced=True)
        tally.case("damaged files", f"{folder.name}/{name} {what}", mine, wrong)
        shutil.rmtree(world)


def _cases(folder: Path) -> list[tuple[str, int]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    own = [path for path in files if "mine" not in path.name and path.stat().st_size]
    return [
        (path.relative_to(folder).as_posix(), number)
        for path in own
        for number, _ in enumerate(damages(path, files))
    ]


def races(bench: Bench, tally: Tally, sample: Callable[[Sequence], Sequence]) -> None:
    """The same command started while the first stands before each of its changes."""
    raced = [story for story in bench.stories() if story.name in ("learn", "export")]
    for story in bench.drawn(raced):
        count, expected = points(bench, story)
        for at in sample(range(1, count + 1)):
            world = bench.world(story.start)
            first = Child(world, story.command, Fault(world, "stop", at))
            stopped = first.stopped()
            code, said = Child(world, story.command).end()
            wrong = "" if one_line(code, said) else said.strip()[-300:]
            if stopped:
                os.kill(first.pid, signal.SIGCONT)
            other, also_said = first.end()
            wrong = wrong or ("" if one_line(other, also_said) else also_said.strip()[-300:])
            if not wrong and 0 not in (code, other):
                wrong = f"neither went on: {said.strip()[-200:]} {also_said.strip()[-200:]}"
            wrong = wrong or differences(fingerprint(world), expected)
            gone = lost(world, bench.root / "states" / story.start, replaced=False)
            tally.case("races", f"{story.name} at {at} of {count}: {code}, {other}", gone, wrong)
            shutil.rmtree(world)


def run() -> int:
    """Carry out all cases, or some of each kind; 1 if anything was lost or wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of the cases, drawn by a seed")
    parser.add_argument("--stories", type=int, default=99, help="how many commands of a kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=KINDS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    draw = random.Random(options.seed)

    def sample(cases: Sequence) -> Sequence:
        return [case for case in cases if draw.random() < options.share]

    parts = {"kills": kills_and_full_disks, "damaged files": damaged_files, "races": races}
    tally, started = Tally(), time.monotonic()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit("stopped before its end"))
    with tally.told_at_the_end(started), tempfile.TemporaryDirectory() as root:
        bench = Bench(Path(root).resolve(), draw, options.stories)
        for kind, part in parts.items():
            if options.only in (None, kind) or (kind == "kills" and options.only == "full disks"):
                part(bench, tally, sample)
    return int(bool(sum(tally.lost.values()) + sum(tally.wrong.values())))


if __name__ == "__main__":
    sys.exit(run())
