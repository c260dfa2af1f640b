"""Locks: one process writes, the next is told which; nothing is left behind."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal

import pytest

from lrquant.errors import LRQuantError
from lrquant.files.lock import locked
from lrquant.runs.claims import held

FORK = multiprocessing.get_context("fork")


def hold(path, pipe):
    with locked(path, "the folder", "use another"):
        pipe.send("held")
        pipe.recv()


@pytest.fixture
def holder(tmp_path):
    """A process that holds a lock until it is told, or killed."""
    here, there = FORK.Pipe()
    process = FORK.Process(target=hold, args=(tmp_path / "run" / "lock", there))
    process.start()
    assert here.recv() == "held"
    process.pipe = here
    yield process
    if process.is_alive():
        here.send("enough")
    process.join()


def test_the_second_process_says_who_holds_it(holder, tmp_path):
    with pytest.raises(LRQuantError) as error, locked(tmp_path / "run" / "lock", "it", "go away"):
        pass
    said = str(error.value)
    assert f"it: held by process {holder.pid} on " in said and " since 20" in said
    assert said.endswith("wait for it, or go away") and "\n" not in said


def test_a_kill_lets_go_of_it(holder, tmp_path):
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert (tmp_path / "run" / "lock").exists()
    with locked(tmp_path / "run" / "lock", "it", "go away"):
        pass
    assert not (tmp_path / "run" / "lock").exists()


def test_an_end_leaves_nothing_but_what_was_written(tmp_path):
    with locked(tmp_path / "deep" / "run" / "lock", "it", "go away"):
        assert (tmp_path / "deep" / "run").is_dir()
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "deep" / "run" / "lock", "it", "go away"):
        (tmp_path / "deep" / "run" / "file").write_text("x")
    assert [path.name for path in (tmp_path / "deep" / "run").iterdir()] == ["file"]


def test_a_link_in_its_place_is_not_followed(tmp_path):
    (tmp_path / "thesis").write_text("mine")
    (tmp_path / "lock").symlink_to("thesis")
    with (
        pytest.raises(LRQuantError, match="cannot be written"),
        locked(tmp_path / "lock", "it", ""),
    ):
        pass
    assert (tmp_path / "thesis").read_text() == "mine"


def refusing(monkeypatch, number):
    def flock(handle, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("name", ["EOPNOTSUPP", "ENOTSUP", "ENOLCK", "ENOSYS"])
def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, caplog, name):
    number = getattr(errno, name)
    refusing(monkeypatch, number)
    (tmp_path / "run").mkdir()
    other = tmp_path / "run" / f".lrquant-{'0a' * 16}.tmp"
    other.write_text("what another process may be writing")
    with held(tmp_path / "run"):
        assert other.exists()
    (said,) = [entry.getMessage() for entry in caplog.records]
    assert f"run folder {tmp_path / 'run'}: not locked" in said and os.strerror(number) in said
    assert [path.name for path in (tmp_path / "run").iterdir()] == [other.name]


def test_another_error_of_a_lock_is_refused(tmp_path, monkeypatch):
    refusing(monkeypatch, errno.EIO)
    with (
        pytest.raises(LRQuantError, match="cannot be written"),
        locked(tmp_path / "lock", "it", ""),
    ):
        pass


def started(path, barrier, number, results):
    barrier.wait()
    try:
        with locked(path, "it", "go away"):
            results.put(("held", number))
            barrier.wait()
    except LRQuantError:
        results.put(("refused", number))
        barrier.wait()


@pytest.mark.parametrize("attempt", range(5))
def test_of_two_that_start_at_once_one_runs(tmp_path, attempt):
    barrier, results = FORK.Barrier(2), FORK.SimpleQueue()
    path = tmp_path / "run" / "lock"
    both = [FORK.Process(target=started, args=(path, barrier, n, results)) for n in (0, 1)]
    for process in both:
        process.start()
    assert sorted(results.get()[0] for _ in both) == ["held", "refused"]
    for process in both:
        process.join()
