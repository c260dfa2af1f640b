"""Publishing: the new checkpoint or the older one, whole, and nothing of anyone else's removed."""

from __future__ import annotations

import os

import pytest

from lrquant.config.config import Config
from lrquant.config.groups import Places
from lrquant.errors import LRQuantError
from lrquant.files.publishing import HASHES, heal, published, target_lock
from lrquant.formats.protected import check_target


def publish(target, content, overwrite=False):
    with published(target, overwrite) as place:
        (place / "model.safetensors").write_text(content)
        (place / "templates").mkdir()
        (place / "templates" / "chat.jinja").write_text("{{ messages }}")


def files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in folder.rglob("*")
        if path.is_file() and path.name != HASHES
    }


CHECKPOINT = {"model.safetensors": "new", "templates/chat.jinja": "{{ messages }}"}


def test_a_checkpoint_is_listed_as_sha256sum_lists(tmp_path):
    publish(tmp_path / "deep" / "saved", "new")
    assert files(tmp_path / "deep" / "saved") == CHECKPOINT
    lines = (tmp_path / "deep" / "saved" / HASHES).read_text().splitlines()
    assert [line[64:] for line in lines] == ["  model.safetensors", "  templates/chat.jinja"]
    assert os.listdir(tmp_path / "deep") == ["saved"]


def test_an_older_one_is_replaced_if_that_is_asked_for_and_it_is_as_written(tmp_path):
    target = tmp_path / "saved"
    publish(target, "old")
    with pytest.raises(LRQuantError, match="holds a checkpoint; replace it with --overwrite"):
        publish(target, "new")
    publish(target, "new", overwrite=True)
    assert files(target) == CHECKPOINT and os.listdir(tmp_path) == ["saved"]


@pytest.mark.parametrize(
    "mine", ["thesis.tex", "templates/mine", ".git", "link", "model.safetensors"]
)
def test_what_is_someone_elses_stays(tmp_path, mine):
    target = tmp_path / "saved"
    publish(target, "old")
    if mine == "link":
        (target / mine).symlink_to(tmp_path)
    else:
        (target / mine).write_text("mine")
    before = files(target)
    with pytest.raises(LRQuantError, match=f"{mine} (is not of the checkpoint|was changed)"):
        publish(target, "new", overwrite=True)
    assert files(target) == before and os.listdir(tmp_path) == ["saved"]


def test_a_list_that_names_files_outside_removes_none(tmp_path):
    target = tmp_path / "saved"
    publish(target, "old")
    (tmp_path / "mine").write_text("mine")
    with (target / HASHES).open("a") as lines:
        lines.write(f"{'0' * 64}  ../mine\n{'0' * 64}  {tmp_path}/mine\n")
    publish(target, "new", overwrite=True)
    assert files(target) == CHECKPOINT and (tmp_path / "mine").read_text() == "mine"


class Killed(BaseException):
    """As abrupt as a kill can be made within one process."""


@pytest.mark.parametrize("call", range(1, 8))
def test_a_kill_while_it_is_moved_is_healed(tmp_path, monkeypatch, call):
    target, calls = tmp_path / "saved", []
    publish(target, "old")
    (tmp_path / "saved.partial").write_text("mine")

    def killing(function):
        def step(*arguments, **rest):
            calls.append(function)
            if len(calls) >= call:
                raise Killed
            return function(*arguments, **rest)

        return step

    for name in ("rename", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, killing(getattr(os, name)))
    with pytest.raises(Killed):
        publish(target, "new", overwrite=True)
    monkeypatch.undo()
    with target_lock(target):
        heal(target)
    assert files(target)["model.safetensors"] in ("old", "new")
    publish(target, "new", overwrite=True)
    assert files(target) == CHECKPOINT
    assert sorted(os.listdir(tmp_path)) == ["saved", "saved.partial"]


def test_two_exports_to_one_folder(tmp_path):
    second, other = target_lock(tmp_path / "saved"), target_lock(tmp_path / "other")
    with target_lock(tmp_path / "saved"):
        said = r"saved: held by process .*; wait for it, or use"
        with pytest.raises(LRQuantError, match=said), second:
            pass
        with other:
            pass
    assert os.listdir(tmp_path) == []


def test_places_that_must_stay(tmp_path, monkeypatch):
    for name in ("model", "run", "data/wikitext2", "here", "repository/.git", "home", "free"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "text.txt").write_text("words")
    (tmp_path / "link").symlink_to("model")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    config = Config(
        model=str(tmp_path / "model"),
        output_dir=str(tmp_path / "run"),
        data_dir=str(tmp_path / "data"),
        calib_dataset=str(tmp_path / "text.txt"),
    )
    refused = {
        "run": "this is the run folder",
        "run/saved": "lies in the run folder",
        "model": "is, or holds, the model",
        "link/saved": "lies in the model",
        "": "is, or holds,",
        "data/wikitext2/saved": "lies in the data",
        "data": "is, or holds, the data",
        "here": "is, or holds, the current directory",
        "repository": "is, or lies in, a repository",
        "repository/.git/saved": "is, or lies in, a repository",
        "home": "is, or holds, a home folder",
        "text.txt": "is, or holds, the data",
    }
    for name, said in refused.items():
        with pytest.raises(LRQuantError, match=said) as error:
            check_target(config.group(Places), tmp_path / name)
        assert "--save_dir" in str(error.value) and "\n" not in str(error.value)
    for name in ("free", "free/deep/saved", "here/saved", "home/saved", "data/saved"):
        check_target(config.group(Places), tmp_path / name)
    assert not (tmp_path / "free" / "deep").exists()
