"""Downloads from a local server: resumed, checked and cached; and those that timm starts. About 5 s."""

import hashlib
import json
import os
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import timm
import torch
from timm.models import set_pretrained_check_hash

from zoo import checkpoint_files, downloads, pretrained
from zoo.messages import UserError
from zoo.opening import open_model
from zoo.recipes.classify.model import build_model
from zoo.recipes.config import Config

CONTENT = bytes(range(256)) * 4
HASH = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Serves `server.content` at every address, in the way that the server's attributes set."""

    def do_GET(self):
        server, content = self.server, self.server.content
        asked = self.headers.get("Range")
        server.requests.append((self.path, asked))
        if server.status != 200:
            self.send_error(server.status)
            return
        since = self.headers.get("If-Unmodified-Since")
        if since and parsedate_to_datetime(since).timestamp() < server.modified:
            self.send_error(412)
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and server.ranges else 0
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start + server.shift}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        for name, value in server.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.flush()
            time.sleep(server.wait)
            self.wfile.write(content[start:][: server.cuts.pop(0) if server.cuts else None])

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    """A server that can close connections early (`cuts`: after how many bytes), ignore ranges, and so on."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.content, server.cuts, server.requests, server.headers = CONTENT, [], [], {}
        server.ranges, server.status, server.modified, server.shift, server.wait = True, 200, 0, 0, 0
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """The cache of torch.hub."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path / "hub/checkpoints"


def kept(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_download_is_cached_where_torch_hub_looks(server, folder):
    path = downloads.fetch(f"{server.url}/model.pth")
    assert path == folder / "model.pth"
    assert path.read_bytes() == CONTENT
    assert json.loads((folder / "model.pth.download.json").read_text()) == {
        "url": f"{server.url}/model.pth",
        "sha256": HASH,
    }
    assert kept(folder) == ["model.pth", "model.pth.download.json"]
    assert downloads.fetch(f"{server.url}/model.pth") == path
    assert len(server.requests) == 1


def test_file_in_torch_hubs_cache_is_used(server, folder):
    folder.mkdir(parents=True)
    (folder / "model.pth").write_bytes(b"by torch.hub")
    assert downloads.fetch(f"{server.url}/model.pth").read_bytes() == b"by torch.hub"
    assert not server.requests


def test_other_folder(server, tmp_path):
    assert downloads.fetch(f"{server.url}/model.pth", tmp_path / "mine") == tmp_path / "mine/model.pth"


def test_broken_connection_is_resumed(server, folder):
    server.cuts = [300, 300, 300]
    assert downloads.fetch(f"{server.url}/model.pth").read_bytes() == CONTENT
    assert [asked for _, asked in server.requests] == [None, "bytes=300-", "bytes=600-", "bytes=900-"]


def broken_off(server):
    """Leave 300 bytes of a download."""
    server.cuts = [300, 0]
    with pytest.raises(RuntimeError) as raised:
        downloads.fetch(f"{server.url}/model.pth")
    server.requests.clear()
    return str(raised.value)


def test_next_call_resumes(server, folder):
    message = broken_off(server)
    assert f"{server.url}/model.pth broke off after 300 of 1,024 bytes; try again to resume, " in message
    assert not (folder / "model.pth").exists()
    assert downloads.fetch(f"{server.url}/model.pth").read_bytes() == CONTENT
    assert [asked for _, asked in server.requests] == ["bytes=300-"]
    assert kept(folder) == ["model.pth", "model.pth.download.json"]


def test_server_without_ranges_starts_again(server, folder):
    broken_off(server)
    server.ranges = False
    assert downloads.fetch(f"{server.url}/model.pth").read_bytes() == CONTENT


@pytest.mark.parametrize(
    "change", [{"modified": 4e9}, {"content": b"shorter"}, {"shift": 1}], ids=["modified", "shorter", "other-range"]
)
def test_what_can_not_be_resumed_starts_again(change, server, folder):
    broken_off(server)
    for name, value in change.items():
        setattr(server, name, value)
    assert downloads.fetch(f"{server.url}/model.pth").read_bytes() == server.content
    assert [asked for _, asked in server.requests] == ["bytes=300-", None]


def test_server_that_always_breaks_off_is_given_up(server, folder):
    server.ranges, server.cuts = False, [300] * 9
    with pytest.raises(RuntimeError, match=r"model\.pth broke off after 300 of 1,024 bytes"):
        downloads.fetch(f"{server.url}/model.pth")
    assert len(server.requests) == 2


@pytest.mark.parametrize("sha256", ["0" * 64, "00000000"])
def test_wrong_hash_is_refused(sha256, server, folder):
    message = (
        rf"/model\.pth gave a file of sha256 {HASH[: len(sha256)]}, not {sha256}, which is published; it was not kept"
    )
    with pytest.raises(RuntimeError, match=message):
        downloads.fetch(f"{server.url}/model.pth", sha256=sha256)
    assert kept(folder) == []


def test_right_hash_is_accepted(server, folder):
    assert downloads.fetch(f"{server.url}/model.pth", sha256=HASH[:8]).exists()


def test_later_download_has_to_have_the_hash_of_the_first(server, folder):
    path = downloads.fetch(f"{server.url}/model.pth")
    path.unlink()
    server.content = b"something else"
    with pytest.raises(RuntimeError, match=rf"not {HASH}, which \S+/model\.pth\.download\.json has from an earlier"):
        downloads.fetch(f"{server.url}/model.pth")
    assert not path.exists()
    server.content = CONTENT
    assert downloads.fetch(f"{server.url}/model.pth") == path


def test_web_page_is_refused(server, folder):
    server.content = b"\n<!DOCTYPE html><html>Sign in</html>"
    with pytest.raises(RuntimeError, match=r"/model\.pth gave 36 bytes that were not kept: this is a web page"):
        downloads.fetch(f"{server.url}/model.pth", check=checkpoint_files.read)
    assert kept(folder) == []


@pytest.mark.parametrize(("status", "reason"), [(404, "Not Found"), (503, "Service Unavailable")])
def test_error_of_the_server_is_reported(status, reason, server, folder):
    server.status = status
    with pytest.raises(RuntimeError, match=rf"/model\.pth gives no file \({status} {reason}\); check the address, or"):
        downloads.fetch(f"{server.url}/model.pth")
    assert kept(folder) == []


def test_without_network(server, folder):
    server.shutdown()
    server.server_close()
    with pytest.raises(
        RuntimeError, match=r"can't be reached \(\[Errno \d+\] Connection refused\); check the connection"
    ) as e:
        downloads.fetch(f"{server.url}/model.pth")
    assert "pretrained=<file> to zoo-train and zoo-eval (distill.weights=<file> for a teacher)" in str(e.value)
    assert "pretrained_cfg_overlay=dict(file=...) in Python." in str(e.value)


@pytest.fixture
def silent(monkeypatch):
    """The address of a server that accepts connections and never answers."""
    monkeypatch.setattr(downloads, "_FIRST_TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_server_that_never_answers(silent, folder):
    with pytest.raises(RuntimeError, match=r"be reached \(no answer in 0\.3 seconds\); check the connection") as e:
        downloads.fetch(f"{silent}/model.pth")
    assert "pretrained=<file> to zoo-train and zoo-eval (distill.weights=<file> for a teacher)" in str(e.value)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_name_that_never_resolves(monkeypatch, folder):
    monkeypatch.setattr(downloads, "_FIRST_TIMEOUT", 0.3)
    monkeypatch.setattr("socket.getaddrinfo", lambda *args, **kwargs: threading.Event().wait(60))
    with pytest.raises(RuntimeError, match=r"can't be reached \(no answer in 0\.3 seconds\)"):
        downloads.fetch("http://example.invalid/model.pth")


def test_name_that_does_not_exist(folder):
    with pytest.raises(RuntimeError, match=r"can't be reached \(.+\); check the connection and proxy"):
        downloads.fetch("http://example.invalid/model.pth")


@pytest.mark.slow
def test_slow_network_has_time_after_the_first_answer(server, folder, monkeypatch):
    monkeypatch.setattr(downloads, "_FIRST_TIMEOUT", 1.5)
    server.cuts, server.wait = [300], 2
    assert downloads.fetch(f"{server.url}/model.pth").read_bytes() == CONTENT


def test_proxy_of_the_environment(server, folder, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.setattr("urllib.request._opener", None)  # the default opener read the environment earlier
    assert downloads.fetch("http://nowhere.invalid/model.pth").read_bytes() == CONTENT
    assert server.requests == [("http://nowhere.invalid/model.pth", None)]


def test_one_downloads_and_the_others_wait(server, folder):
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(downloads.fetch, [f"{server.url}/model.pth"] * 4))
    assert {path.read_bytes() for path in paths} == {CONTENT}
    assert len(server.requests) == 1


def test_files_of_one_name_are_kept_apart(server, folder):
    first = downloads.fetch(f"{server.url}/a/model.pth")
    server.content = b"another"
    second = downloads.fetch(f"{server.url}/b/model.pth")
    assert (first.read_bytes(), second.read_bytes()) == (CONTENT, b"another")
    assert second.name.startswith("model-")
    assert [downloads.fetch(f"{server.url}/{part}/model.pth") for part in "ab"] == [first, second]


@pytest.fixture
def hub(server, monkeypatch):
    """A hub that serves one file under every name."""
    server.headers = {"X-Repo-Commit": "1" * 40, "ETag": f'"{HASH}"'}
    download = partial(huggingface_hub.hf_hub_download, endpoint=server.url, token=False)
    monkeypatch.setattr(downloads, "hf_hub_download", download)
    monkeypatch.setattr(downloads, "hf_hub_url", partial(huggingface_hub.hf_hub_url, endpoint=server.url))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    return server


HUB_URL = "https://huggingface.co/nvidia/GCViT/resolve/main/gcvit.pth.tar?download=true"


def test_file_from_the_hub(hub, tmp_path):
    path = downloads.fetch(HUB_URL, tmp_path)
    assert path.read_bytes() == CONTENT
    assert path.relative_to(tmp_path).parts[0] == "models--nvidia--GCViT"
    assert {address for address, _ in hub.requests} == {"/nvidia/GCViT/resolve/main/gcvit.pth.tar"}
    hub.shutdown()
    hub.server_close()
    assert downloads.fetch(HUB_URL, tmp_path) == path


def test_damaged_file_from_the_hub_is_refused(hub, tmp_path):
    hub.content = CONTENT[::-1]
    message = rf"gcvit\.pth\.tar of nvidia/GCViT, on the Hugging Face hub, gave .* not {HASH}, which the hub has"
    with pytest.raises(RuntimeError, match=message):
        downloads.fetch(HUB_URL, tmp_path)
    hub.content = CONTENT
    assert downloads.fetch(HUB_URL, tmp_path).read_bytes() == CONTENT


def test_hub_without_the_file(hub, tmp_path):
    hub.status = 404
    with pytest.raises(
        RuntimeError, match=r"of nvidia/GCViT, on the Hugging Face hub, can't be downloaded \(.*404"
    ) as e:
        downloads.fetch(HUB_URL, tmp_path)
    assert "\n" not in str(e.value)


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("answer", ["silent", "refused"])
def test_hub_without_network(answer, silent, tmp_path, monkeypatch):
    endpoint = silent if answer == "silent" else "http://127.0.0.1:9"
    monkeypatch.setattr(downloads, "hf_hub_url", partial(huggingface_hub.hf_hub_url, endpoint=endpoint))
    message = r"gcvit\.pth\.tar of nvidia/GCViT, on the Hugging Face hub, can't be downloaded \(.*check the connection"
    with pytest.raises(RuntimeError, match=message) as e:
        downloads.fetch(HUB_URL, tmp_path)
    assert "pretrained=<file> to zoo-train and zoo-eval (distill.weights=<file> for a teacher)" in str(e.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "resnet18.a1_in1k", "hf-hub:timm/resnet18.a1_in1k"])
def test_timms_own_downloads_without_network(name, silent, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "hf_hub_url", partial(huggingface_hub.hf_hub_url, endpoint=silent))
    monkeypatch.setattr("zoo.pretrained.try_to_load_from_cache", lambda *args: None)
    with pytest.raises(
        UserError, match=r"model\.safetensors of timm/resnet18\.a1_in1k, .*\(no answer in 0\.3 seconds\)"
    ):
        build_model(Config(model=name, pretrained=True), num_classes=5)
    with pytest.raises(
        UserError, match=r"model\.safetensors of timm/resnet18\.a1_in1k, .*\(no answer in 0\.3 seconds\)"
    ):
        open_model(name, pretrained=True)


@pytest.mark.parametrize(
    ("name", "overlay", "address"),
    [
        ("van_b0", {}, "https://huggingface.co/Visual-Attention-Network/VAN-Tiny-original/resolve/main/van_tiny_754.pth.tar"),
        ("maxvit_tiny", {}, "https://huggingface.co/timm/maxvit_tiny_tf_224.in1k/resolve/main/model.safetensors"),
        ("maxvit_tiny", {"url": "http://mine/model.pth"}, "http://mine/model.pth"),
        ("maxvit_tiny", {"hf_hub_id": "me/mine"}, None),
        ("maxvit_tiny", {"url": "http://mine/model.pth", "hf_hub_id": "me/mine"}, None),
        ("van_b0", {"file": "model.pth"}, None),
        ("van_b0", {"state_dict": {"x": 1}}, None),
        ("van_b0", {"source": "hf-hub", "hf_hub_id": "me/mine"}, None),
        ("van_b0", {"url": "file:///model.pth"}, None),
        ("van_b0", {"url": ("http://mine/model.pth", "other.pth")}, None),
        ("test_van", {}, None),
    ],
)  # fmt: skip
def test_what_is_downloaded_here(name, overlay, address):
    assert pretrained._download_url(name, {"pretrained_cfg_overlay": overlay}) == address


def test_known_hashes():
    url = timm.get_pretrained_cfg("van_b0.in1k_mmseg").url
    assert pretrained._known_hash(url) == "956f5e0d"
    named = "http://mine/model-20240131.pth"
    assert pretrained._known_hash(named) == ""
    set_pretrained_check_hash(True)
    try:
        assert pretrained._known_hash(named) == "20240131"
    finally:
        set_pretrained_check_hash(False)


def create(url, **kwargs):
    return timm.create_model("test_van", pretrained=True, pretrained_cfg_overlay={"url": url}, **kwargs)


@pytest.fixture
def weights(server, tmp_path):
    """The weights that `server` serves, in a file as official training writes it."""
    state_dict = timm.create_model("test_van").state_dict()
    torch.save({"state_dict": state_dict, "accuracy": torch.ones(1).numpy()[0]}, tmp_path / "saved.pth")
    server.content = (tmp_path / "saved.pth").read_bytes()
    return state_dict


@pytest.mark.slow
@pytest.mark.parametrize("kwargs", [{}, {"features_only": True}, {"num_classes": 7}], ids=["plain", "features", "7"])
def test_model_gets_downloaded_weights(kwargs, weights, server, folder):
    model = create(f"{server.url}/model.pth", **kwargs)
    loaded = next(value for key, value in model.state_dict().items() if key.endswith("stages.3.norm.weight"))
    assert torch.equal(loaded, weights["stages.3.norm.weight"])
    assert "state_dict" not in model.pretrained_cfg
    assert model.pretrained_cfg["url"] == f"{server.url}/model.pth"


@pytest.mark.slow
def test_model_with_a_folder_for_downloads(weights, server, tmp_path):
    create(f"{server.url}/model.pth", cache_dir=tmp_path / "mine")
    assert (tmp_path / "mine/model.pth").exists()


@pytest.mark.slow
def test_address_of_a_local_file_is_timms(weights, tmp_path, folder):
    torch.save(weights, tmp_path / "plain.pth")
    model = create((tmp_path / "plain.pth").as_uri())
    assert torch.equal(model.head.weight, weights["head.weight"])


def test_damaged_file_in_the_cache_is_named(server, folder):
    folder.mkdir(parents=True)
    (folder / "model.pth").write_text("<html>")
    with pytest.raises(
        RuntimeError, match=r"/hub/checkpoints/model\.pth can't be used; delete it.*: this is a web page"
    ):
        create(f"{server.url}/model.pth")


def test_hostile_download_runs_nothing(server, folder, tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    torch.save({"state_dict": Hostile()}, tmp_path / "hostile.pth")
    server.content = (tmp_path / "hostile.pth").read_bytes()
    with pytest.raises(RuntimeError, match=r"asks for posix\.mkdir, which could run any code"):
        create(f"{server.url}/model.pth")
    assert kept(folder) == []
    assert not (tmp_path / "made").exists()
