"""One command of lrquant in a forked child, with a fault at the n-th change of the file system.

An audit hook sees what Python opens for writing, renames, removes and makes; what it cannot see
(`os.write`, `os.fsync`, and safetensors, which writes from Rust) is wrapped.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch

from lrquant.cli import main

_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.chmod"}
_FOR_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_NO_SPACE = OSError(28, "No space left on device")


class Fault:
    """What happens at change number `at`: "kill", "stop", or "full" from there on; or nothing."""

    def __init__(self, world: Path, kind: str = "", at: int = 0) -> None:
        self.world, self.kind, self.at = str(world), kind, at
        self.count, self.counting = 0, True

    def install(self) -> None:
        """Watch this process until it ends."""
        write, fsync, save = os.write, os.fsync, safetensors.torch.save_file

        def writing(handle: int, content: bytes) -> int:
            if self._is_next() and self.kind == "kill":
                write(handle, content[: len(content) // 2])
            self.change(allocates=True)
            return write(handle, content)

        def flushing(handle: int) -> None:
            self.change(allocates=True)
            fsync(handle)

        def saving(tensors: dict, path: Path, metadata: dict | None = None) -> None:
            self.change(allocates=True)
            save(tensors, path, metadata)
            if self._is_next() and self.kind in ("kill", "full"):
                self._halve(path)
            self.change(allocates=True)

        os.write, os.fsync, safetensors.torch.save_file = writing, flushing, saving
        sys.addaudithook(self._seen)

    def _seen(self, event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            path, _, flags = arguments
            if flags & _FOR_WRITING and self._is_inside(path):
                self.change(allocates=bool(flags & os.O_CREAT))
        elif event in _CHANGES and (isinstance(arguments[0], int) or self._is_inside(arguments[0])):
            self.change(allocates=event == "os.mkdir")

    def _halve(self, path: Path) -> None:
        """Leave half of a file, which is itself no change that the command makes."""
        at, self.at = self.at, sys.maxsize
        os.truncate(path, Path(path).stat().st_size // 2)
        self.at, self.count = at, self.count - 1

    def _is_inside(self, path: str | bytes | os.PathLike) -> bool:
        return os.path.abspath(os.fsdecode(path)).startswith(self.world)

    def _is_next(self) -> bool:
        return self.count + 1 == self.at

    def change(self, allocates: bool) -> None:
        """Count a change that is about to be made, and let the fault happen."""
        self.count += 1
        if self.count == self.at and self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.count == self.at and self.kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.kind == "full" and self.count >= self.at and allocates:
            raise _NO_SPACE


class Child:
    """A command that runs in the folder `world`; its output is kept beside it."""

    def __init__(self, world: Path, arguments: Sequence[str], fault: Fault | None = None) -> None:
        self.log = world.with_name(f"{world.name}.{os.urandom(4).hex()}.log")
        self.count = 0
        self._status: int | None = None
        fault = fault or Fault(world)
        self._read, writing = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.close(self._read)
            _carry_out(world, arguments, fault, self.log, writing)
        os.close(writing)

    def stopped(self) -> bool:
        """Wait; whether it was stopped and has not ended."""
        _, status = os.waitpid(self.pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            self._status = status
        return os.WIFSTOPPED(status)

    def end(self) -> tuple[int, str]:
        """Wait for its end: the exit code, negative for a signal, and what it said of errors."""
        status = os.waitpid(self.pid, 0)[1] if self._status is None else self._status
        with os.fdopen(self._read) as reader:
            self.count = int(reader.read() or 0)
        said = self.log.read_text(errors="replace") if self.log.exists() else ""
        self.log.unlink(missing_ok=True)
        return os.waitstatus_to_exitcode(status), said


def _carry_out(
    world: Path, arguments: Sequence[str], fault: Fault, log: Path, writing: int
) -> None:
    """Run the command in this process and end it."""
    code = 70
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(handle, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.chdir(world)
        fault.install()
        code = main(list(arguments))
        fault.kind = ""
    except BaseException:  # noqa: BLE001
        fault.kind = ""
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os.write(writing, str(fault.count).encode())
        os._exit(code)
