"""Places of weight files: what a name means, what is said without network, and digests that must be right."""

from __future__ import annotations

import hashlib
import http.server
import io
import logging
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from pipeline.errors import CorruptError, InputError, StorageError
from pipeline.progress import Progress
from stages.weights.places import DIGEST, PUBLISHED, HubWeights, WebFile, place_of
from tests.hub import Hub

BROKEN: Any = HfHubHTTPError.__bases__[0]  # of the library that the hub's client talks through
RAR = HubWeights(repository="yucornetto/RAR", file="rar_b.bin")
DATA = b"weights"
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.mark.parametrize(
    ("word", "place"),
    [
        ("somebody/things/model.safetensors", ("somebody/things", "model.safetensors", "main")),
        ("somebody/things/deep/model.ckpt@v1.0", ("somebody/things", "deep/model.ckpt", "v1.0")),
        ("other.bin", None),
        ("things/model.bin", None),
        ("digits/rar/generator", None),
        ("./some/folder/model.bin", None),
        ("/some/folder/model.bin", None),
    ],
)
def test_names_of_the_hub(word: str, place: tuple[str, str, str] | None) -> None:
    found = place_of(word)
    assert (None if found is None else (found.repository, found.file, found.revision)) == place


def test_published_files_have_a_revision_and_a_digest() -> None:
    assert place_of("rar_b.bin") == PUBLISHED["rar_b.bin"]
    assert len({(place.revision, place.sha256) for place in PUBLISHED.values()}) == 5
    for place in PUBLISHED.values():
        assert len(place.revision) == 40
        assert DIGEST.fullmatch(place.sha256 or "")


def test_a_file_is_downloaded_once_and_known_by_its_digest(hub: Hub) -> None:
    hub.keep(RAR.repository, RAR.file, DATA)
    assert RAR.find() is None
    said = io.StringIO()
    assert RAR.fetch(Progress(said)).read_bytes() == DATA
    assert "rar_b.bin of yucornetto/RAR" in said.getvalue()
    found = RAR.find()
    assert found is not None
    assert RAR.digest(found) == SHA256
    RAR.check(found)
    found.resolve().write_bytes(b"weightS")
    with pytest.raises(CorruptError, match=r"rar_b.bin of yucornetto/RAR has SHA-256 .* expected"):
        RAR.check(found)


def test_a_known_digest_finds_the_file_of_any_revision(hub: Hub) -> None:
    hub.keep(RAR.repository, RAR.file, DATA)
    RAR.fetch(Progress())
    pinned = RAR.model_copy(update={"revision": "0" * 40})
    assert pinned.find() is None
    found = pinned.model_copy(update={"sha256": SHA256}).find()
    assert found is not None
    assert found.read_bytes() == DATA


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set"),
        (BROKEN("slow"), "slow"),
        (OSError("no route"), "no route"),
    ],
)
def test_without_network_it_is_out_of_reach(
    failure: Exception, said: str, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*place: Any, **more: Any) -> str:
        raise failure

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", fail)
    with pytest.raises(StorageError, match=rf"is not on this machine and cannot be downloaded \({said}\)"):
        RAR.fetch(Progress())


def test_a_name_that_is_never_looked_up_takes_no_longer_than_patience(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *place, **more: time.sleep(20))
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "0.2")
    started = time.monotonic()
    with pytest.raises(StorageError, match="no answer"):
        RAR.fetch(Progress())
    assert time.monotonic() - started < 5


def test_the_hubs_client_is_quiet(hub: Hub, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def warn(*place: Any, **more: Any) -> None:
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", warn)
    with pytest.raises(StorageError):
        RAR.fetch(Progress())
    assert caplog.text == ""


def test_what_the_hub_does_not_have_is_bad_input(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    class Absent(OSError):
        response = type("Response", (), {"status_code": 404})

    def fail(*place: Any, **more: Any) -> None:
        raise Absent

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", fail)
    with pytest.raises(InputError, match=r"the hub does not give rar_b.bin of yucornetto/RAR"):
        RAR.fetch(Progress())


@pytest.fixture
def server() -> Iterator[str]:
    """Address of a server that gives DATA under every name but /absent."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404 if self.path == "/absent" else 200)
            self.send_header("Content-Length", str(len(DATA)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(DATA)

        do_HEAD = do_GET

        def log_message(self, *words: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_a_file_at_an_address(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    place = WebFile(what="weights of a test", url=f"{server}/some/weights.pth", sha256=SHA256)
    assert place.find() is None
    assert place.fetch(Progress()).read_bytes() == DATA
    assert place.find() == tmp_path / "hub" / "checkpoints" / "weights.pth"
    shutil.rmtree(tmp_path / "hub")
    with pytest.raises(CorruptError, match=r"/some/weights.pth is not weights.pth \(the weights of a test\)"):
        WebFile(what=place.what, url=place.url, sha256="0" * 64).fetch(Progress())
    with pytest.raises(StorageError, match="Not Found"):
        WebFile(what=place.what, url=f"{server}/absent", sha256=SHA256).fetch(Progress())
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_server_that_never_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "0.2")
    with socket.create_server(("127.0.0.1", 0)) as mute:
        place = WebFile(what="weights", url=f"http://127.0.0.1:{mute.getsockname()[1]}/w.pth", sha256=SHA256)
        with pytest.raises(StorageError, match=r"cannot be downloaded \(timed out\)"):
            place.fetch(Progress())
