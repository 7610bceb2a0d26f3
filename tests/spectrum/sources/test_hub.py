"""Models on a hub: a server of this machine stands for it, and counts the bytes that it sends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import huggingface_hub
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

import lora_lens as ll
from lora_lens.spectrum.sources.matrices import weights

COMMIT, OLDER = "a" * 40, "b" * 40


class Hub:
    """Folders as repositories, at their main branch; what is sent of weights is counted.

    Attributes:
        gated, hidden: repositories that give no files, and that are not there for whoever asks.
        sent: bytes of .safetensors files that were sent, and paths that were asked for.
    """

    def __init__(self, root):
        self.root, self.sent, self.asked = root, 0, []
        self.gated, self.hidden = set(), {"org/missing"}
        self.ranges = True
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                self.do_GET()

            def do_GET(self):
                hub.answer(self)

            def reply(self, status, content=b"", **more):
                self.send_response(status)
                for key, value in more.items():
                    self.send_header(key.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, request):
        path = request.path.partition("?")[0].strip("/")
        self.asked.append(path)
        api = path.startswith("api/models/")
        parts = path.removeprefix("api/models/").split("/")
        repo, rest = "/".join(parts[:2]), parts[2:]
        folder = self.root / repo
        if repo in self.hidden or not folder.is_dir():
            return request.reply(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        revision = (rest[1] if len(rest) > 1 else "main").replace("%2F", "/")
        commit = {"main": COMMIT, COMMIT: COMMIT, "v1": OLDER, OLDER: OLDER}.get(revision)
        if commit is None:
            return request.reply(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
        folder = self.root / f"{repo}-v1" if commit == OLDER else folder
        files = {str(f.relative_to(folder)): f for f in sorted(folder.rglob("*")) if f.is_file()}
        if api:
            facts = {"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
            tree = [
                {"type": "file", "path": n, "size": f.stat().st_size, "oid": "0"} for n, f in files.items()
            ]
            return request.reply(200, json.dumps(tree if rest[:1] == ["tree"] else facts).encode())
        if repo in self.gated:
            return request.reply(403, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
        name = "/".join(rest[2:])
        if name not in files:
            return request.reply(404, X_Error_Code="EntryNotFound", X_Error_Message="no such file")
        content, more = files[name].read_bytes(), {"X_Repo_Commit": commit, "ETag": f'"{commit}{name}"'}
        if (wanted := request.headers.get("Range")) and self.ranges and request.command == "GET":
            first, last = wanted.removeprefix("bytes=").split("-")
            part = content[int(first) : int(last or len(content)) + 1]
            self.sent += len(part) if name.endswith(".safetensors") else 0
            more["Content_Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
            return request.reply(206, part, **more)
        self.sent += len(content) if name.endswith(".safetensors") and request.command == "GET" else 0
        return request.reply(200, content, **more)

    def holds(self, repo, tensors, name="model.safetensors", about=None, **files):
        """Put a file of weights, and others, into a repository."""
        folder = self.root / repo
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / name, about)
        for other, facts in files.items():
            (folder / f"{other}.json").write_text(json.dumps(facts))
        return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path / "hub")
    cache = tmp_path / "cache"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.address)
    url = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.HfFileSystem.clear_instance_cache()
    monkeypatch.chdir(tmp_path)
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def layers(count=12, size=96):
    torch.manual_seed(0)
    return {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(2 * size, size) for i in range(count)}


def header_of(path):
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def test_of_the_weights_only_the_chosen_ones_are_sent(hub):
    tensors = layers()
    folder = hub.holds("org/model", tensors, config={"model_type": "llama"})
    found = ll.spectra("org/model", "layers.3.mlp.up_proj", progress=False)
    expected = torch.linalg.svdvals(tensors["model.layers.3.mlp.up_proj.weight"].double())
    torch.testing.assert_close(found["model.layers.3.mlp.up_proj"].singular_values, expected)
    headers, layer = header_of(folder / "model.safetensors"), 2 * 96 * 96 * 4
    assert layer < hub.sent <= 1.05 * layer + headers
    assert [w.name for w in weights("org/model")] == [w.name for w in weights(folder)]


def test_of_a_float8_checkpoint_in_shards_the_scale_comes_too(hub):
    weight, scale = torch.randn(256, 256).to(torch.float8_e4m3fn), torch.rand(2, 2)
    hub.holds("org/f8", {"a.weight": weight, "b.weight": weight.clone()}, "m-00001-of-00002.safetensors")
    places = {f"{k}.weight": "m-00001-of-00002.safetensors" for k in "ab"}
    places |= {f"{k}.weight_scale_inv": "m-00002-of-00002.safetensors" for k in "ab"}
    index = {"model.safetensors.index": {"weight_map": places}}
    settings = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    scales = {"a.weight_scale_inv": scale, "b.weight_scale_inv": scale.clone()}
    folder = hub.holds("org/f8", scales, "m-00002-of-00002.safetensors", config=settings, **index)
    (found,) = weights("org/f8", "b")
    expected = weight.float() * scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    torch.testing.assert_close(found.load(), expected)
    headers = sum(header_of(path) for path in folder.glob("*.safetensors"))
    assert hub.sent == 256 * 256 + 16 + headers


def test_one_expert_of_a_stack_is_sent_alone(hub):
    stack = torch.randn(8, 64, 32)
    config = {"model_type": "mixtral", "hidden_size": 32, "num_local_experts": 8}
    folder = hub.holds("org/moe", {"mlp.experts.up_proj": stack}, config=config)
    (found,) = weights("org/moe", "experts.up_proj[5]")
    assert torch.equal(found.load(), stack[5])
    assert hub.sent == 64 * 32 * 4 + header_of(folder / "model.safetensors")


def test_revisions(hub):
    new, old = layers(1), layers(1)
    old = {key: 2 * tensor for key, tensor in old.items()}
    hub.holds("org/model", new)
    hub.holds("org/model-v1", old)
    (key,) = new
    for source, revision, expected in (
        ("org/model", None, new),
        ("org/model", "v1", old),
        ("org/model", COMMIT, new),
        ("hf://org/model@v1", None, old),
        ("hf://org/model@v1/model.safetensors", None, old),
        ("hf://org/model/model.safetensors", "v1", old),
    ):
        (found,) = weights(source, revision=revision)
        assert torch.equal(found.load(), expected[key])
    assert ll.spectra("org/model", revision="v1", vectors=False, progress=False)
    with pytest.raises(
        FileNotFoundError, match="the Hugging Face Hub has org/model, and not this at revision v2"
    ):
        weights("org/model", revision="v2")
    with pytest.raises(ValueError, match="the address names revision 'v1', and revision is 'main'; give one"):
        weights("hf://org/model@v1", revision="main")
    with pytest.raises(TypeError, match="revision must be a branch, a tag or a commit"):
        weights("org/model", revision=1)
    with pytest.raises(
        ValueError, match="revision='v1' is one of a model on the Hub, and source is a model in"
    ):
        weights(nn.Linear(3, 3), revision="v1")


def test_a_folder_of_the_same_name_goes_first(hub, tmp_path):
    hub.holds("org/model", layers(1))
    own = {"own.weight": torch.eye(3)}
    (tmp_path / "org/model").mkdir(parents=True)
    save_file(own, tmp_path / "org/model/model.safetensors")
    assert [w.name for w in weights("org/model")] == ["own"]
    with pytest.raises(ValueError, match="org/model lies on this disk, which goes first"):
        weights("org/model", revision="main")
    assert [w.name for w in weights("hf://org/model")] == ["model.layers.0.mlp.up_proj"]


def test_what_the_cache_holds_is_read_from_there_also_without_the_hub(hub, monkeypatch):
    tensors = layers(2)
    folder = hub.holds("org/model", tensors, config={"model_type": "llama"})
    huggingface_hub.snapshot_download("org/model")
    sent = hub.sent
    assert sent == (folder / "model.safetensors").stat().st_size
    (found,) = weights("org/model", "layers.1.*")
    assert torch.equal(found.load(), tensors["model.layers.1.mlp.up_proj.weight"])
    assert hub.sent == sent
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (found,) = weights("org/model", "layers.1.*")
    assert torch.equal(found.load(), tensors["model.layers.1.mlp.up_proj.weight"])
    with pytest.raises(
        FileNotFoundError, match="no file or folder org/other on this disk, and the Hugging Face Hub"
    ):
        weights("org/other")


def test_an_adapter(hub, tmp_path):
    model = get_peft_model(nn.Sequential(nn.Linear(12, 8)), LoraConfig(r=2, target_modules=["0"]))
    nn.init.normal_(model.base_model.model[0].lora_B["default"].weight)
    model.save_pretrained(hub.root / "org/lora")
    for source in ("org/lora", "hf://org/lora/adapter_model.safetensors"):
        (found,), (expected,) = weights(source), weights(hub.root / "org/lora")
        assert torch.equal(found.load(), expected.load())


def test_folders_of_a_repository(hub):
    hub.holds("org/pipe", {"a.weight": torch.eye(4)}, "unet/diffusion_pytorch_model.safetensors")
    assert [w.name for w in weights("hf://org/pipe/unet")] == ["a"]
    with pytest.raises(
        FileNotFoundError, match="org/pipe holds no safetensors but in its folders; give one of hf://o"
    ):
        weights("org/pipe")


def test_what_cannot_be_read_says_why(hub):
    hub.holds("org/gated", layers(1))
    hub.gated.add("org/gated")
    with pytest.raises(
        ValueError, match=r"^org/gated is gated: ask for access on its page, and log in with `hf auth"
    ):
        weights("org/gated")
    with pytest.raises(
        FileNotFoundError, match="no file or folder org/missing on this disk, and no model of that"
    ):
        weights("org/missing")
    for name, message in (
        (
            "model-q4.gguf",
            r"holds no safetensors, but model-q4\.gguf: download .* `hf download org/x model-q4\.gguf`",
        ),
        ("pytorch_model.bin", r"holds no safetensors, but pytorch_model\.bin: pickled files are not opened"),
        ("readme.md", "org/x holds no safetensors$"),
    ):
        (hub.root / "org/x").mkdir(parents=True, exist_ok=True)
        (hub.root / "org/x" / name).write_bytes(b"x")
        with pytest.raises(FileNotFoundError, match=message):
            weights("org/x")
        (hub.root / "org/x" / name).unlink()
    for name in "ab":
        folder = hub.holds("org/two", {"a.weight": torch.eye(3)}, f"{name}.safetensors")
    with pytest.raises(
        ValueError, match=r"org/two holds several: a\.safetensors, b\.safetensors; give the path"
    ):
        weights("org/two")
    assert len(weights("hf://org/two/b.safetensors")) == 1
    (folder / "b.safetensors").write_bytes(b"12345678" * 4)
    with pytest.raises(ValueError, match=r"org/two/b\.safetensors is truncated or malformed"):
        weights("hf://org/two/b.safetensors")
    hub.holds("org/plain", layers(1))
    hub.ranges = False
    with pytest.raises(
        ValueError, match=r"org/plain/model\.safetensors ends early, or its server sends no ranges"
    ):
        weights("org/plain")


def test_by_the_environment_that_users_of_hugging_face_set(hub, tmp_path):
    hub.holds("org/model", layers(1))
    program = "from lora_lens.spectrum import weights; print(weights('org/model')[0].load().shape)"
    env = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_x"}
    ran = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | env, capture_output=True, text=True, timeout=120
    )
    assert ran.stdout.strip() == "torch.Size([192, 96])", ran.stderr
