"""Pushing a checkpoint, against a stand-in of the hub on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml
from huggingface_hub import constants

import lrquant
from lrquant import quantize
from lrquant.cli.entry import main
from lrquant.errors import LRQuantError
from lrquant.files.manifest import MANIFEST
from lrquant.formats.hub import require_repository


class Hub(ThreadingHTTPServer):
    """Repositories by name, each with its files by path; what was asked, in order."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Requests)
        self.repositories, self.objects, self.made, self.token = {}, {}, [], "known"

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"


class Requests(BaseHTTPRequestHandler):
    """The few requests of the hub that a push makes."""

    def log_message(self, *arguments):
        pass

    def answer(self, value, status=200, **headers):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(body)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self):
        path = self.path.partition("?")[0]
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            return self.answer({"error": "who are you"}, 401)
        if path == "/api/whoami-v2":
            return self.answer({"name": "me", "type": "user"})
        name, _, rest = path.removeprefix("/api/models/").partition("/tree/")
        if name not in self.server.repositories:
            return self.answer({"error": "none"}, 404, X_Error_Code="RepoNotFound")
        if rest:
            files = self.server.repositories[name]
            told = [{"type": "file", "path": p, "size": 1, "oid": "0"} for p in files]
            return self.answer(told)
        return self.answer({"id": name, "siblings": [], "private": True})

    def do_POST(self):
        sent, path = self.body(), self.path.partition("?")[0]
        if path == "/api/repos/create":
            asked = json.loads(sent)
            name = f"me/{asked['name']}"
            self.server.made.append(asked)
            self.server.repositories.setdefault(name, {})
            return self.answer({"url": f"{self.server.address}/{name}", "id": name})
        if path == "/api/validate-yaml":
            front = json.loads(sent)["content"].split("---\n")[1]
            return self.answer({"errors": [] if yaml.safe_load(front) else ["?"], "warnings": []})
        if path.endswith("/info/lfs/objects/batch"):
            asked = json.loads(sent)["objects"]
            upload = {"href": f"{self.server.address}/lfs/"}
            told = [
                {**o, "actions": {"upload": {"href": upload["href"] + o["oid"]}}} for o in asked
            ]
            return self.answer({"transfer": "basic", "objects": told})
        name, _, what = path.removeprefix("/api/models/").rpartition("/main")[0].rpartition("/")
        if what == "preupload":
            files = json.loads(sent)["files"]
            mode = {True: "lfs", False: "regular"}
            told = [
                {"path": f["path"], "uploadMode": mode[f["path"].endswith(".safetensors")]}
                for f in files
            ]
            return self.answer({"files": [{**each, "shouldIgnore": False} for each in told]})
        assert what == "commit", path
        files = self.server.repositories[name]
        for line in map(json.loads, sent.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.answer({"commitUrl": f"{self.server.address}/{name}/commit/1", "commitOid": "1"})

    def do_PUT(self):
        self.server.objects[self.path.rpartition("/")[2]] = self.body()
        self.answer({})


@pytest.fixture
def hub(monkeypatch):
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: server.token, raising=False)
    monkeypatch.setenv("HF_TOKEN", server.token)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def make(model_folder, data_dir, tmp_path):
    settings = {"nsamples": 2, "seqlen": 16, "epochs": 1, "precision": "float32", "report": False}

    def run(**more):
        model = model_folder("llama")
        places = {"output_dir": str(tmp_path / "run"), "save_dir": str(tmp_path / "saved")}
        return quantize(
            str(model), "W4A16", data_dir=str(data_dir), **{**places, **settings, **more}
        )

    return run


def test_a_checkpoint_is_pushed_whole(hub, make, tmp_path):
    make(push_to_hub="packed")
    assert [each["name"] for each in hub.made] == ["packed"]
    assert hub.made[0].get("visibility") == "private" or hub.made[0].get("private") is True
    files, place = hub.repositories["me/packed"], tmp_path / "saved"
    assert set(files) == {p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file()}
    own = {"README.md", "lrquant.yaml", "lrquant.sha256"}
    assert all(files[name] == (place / name).read_bytes() for name in files.keys() - own)
    for line in files["lrquant.sha256"].decode().splitlines():
        digest, _, name = line.partition("  ")
        assert hashlib.sha256(files[name]).hexdigest() == digest
    assert str(tmp_path).encode() not in b"".join(files[name] for name in own)
    assert yaml.safe_load(files["lrquant.yaml"])["wbits"] == 4
    card = files["README.md"].decode()
    assert "vllm serve me/packed" in card and 'from_pretrained("me/packed"' in card
    assert "vllm serve . " in (place / "README.md").read_text()


def test_a_finished_run_is_pushed_later(hub, make, tmp_path):
    make(save_dir=None)
    words = ["export", str(tmp_path / "run"), str(tmp_path / "other"), "--push-to-hub", "me/later"]
    assert main(words) == 0
    assert MANIFEST in hub.repositories["me/later"]
    lrquant.evaluate(str(tmp_path / "run"), ppl=("wikitext2",), limit=1)
    assert len(hub.made) == 1  # what is only measured goes nowhere


def test_what_is_there_is_replaced_only_where_that_is_asked(hub, make, tmp_path):
    hub.repositories["me/packed"] = {".gitattributes": b"", "notes.txt": b"mine"}
    with pytest.raises(LRQuantError, match="something else than a checkpoint of lrquant"):
        make(push_to_hub="me/packed", overwrite=True)
    old = {MANIFEST: b"", "model-0099.safetensors": b"", "notes.txt": b"mine"}
    hub.repositories["me/packed"] = dict(old)
    with pytest.raises(LRQuantError, match="replace it with --overwrite"):
        make(push_to_hub="me/packed")
    assert hub.repositories["me/packed"] == old and not (tmp_path / "run" / "blocks").exists()
    make(push_to_hub="me/packed", overwrite=True)
    files = hub.repositories["me/packed"]
    assert "model-0099.safetensors" not in files and files["notes.txt"] == b"mine"


def test_refusals_come_before_anything_is_learned(hub, make, tmp_path, monkeypatch):
    with pytest.raises(LRQuantError, match="there is no checkpoint; give --save-dir"):
        make(push_to_hub="me/packed", save_dir=None)
    with pytest.raises(LRQuantError, match="no name of a repository"):
        make(push_to_hub="me/pack ed/x")
    monkeypatch.setattr(hub, "token", "another")
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: "known", raising=False)
    with pytest.raises(LRQuantError, match="log in with `hf auth login`"):
        make(push_to_hub="me/packed")
    assert not (tmp_path / "run" / "blocks").exists() and hub.made == []


def test_without_a_network_that_is_said(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(LRQuantError, match=r"offline .*push when there is a network"):
        require_repository("me/packed", False)
