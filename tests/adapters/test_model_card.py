from __future__ import annotations

import base64
import copy
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from explored import narrow_vit
from huggingface_hub import ModelCard
from peft import PeftModel
from torch import nn

import lora_lens as ll


@pytest.fixture(scope="module")
def narrow() -> nn.Module:
    return narrow_vit(0)


@pytest.fixture(scope="module")
def tasks(digits, source) -> tuple[ll.Task, ll.Task]:
    return digits.first(64, 40), source.first(64, 40)


@pytest.fixture(scope="module")
def trained(narrow, tasks) -> tuple[PeftModel, ll.Run]:
    adapted = ll.attach(narrow, ll.Window(rank=4, position=0.5))
    adapted.peft_config["default"].base_model_name_or_path = "somebody/narrow-vit"
    settings = {"steps": 3, "batch_size": 16, "lr": 2e-2, "progress": False}
    return adapted, ll.finetune(adapted, tasks[0], retain=tasks[1], **settings)


def test_the_card_says_what_was_trained_learned_and_forgotten(trained, tasks, tmp_path):
    adapted, run = trained
    ll.export(adapted, tmp_path / "full", run=run, task=tasks[0], retain=tasks[1])
    card = ModelCard.load(tmp_path / "full" / "README.md")
    assert card.data.base_model == "somebody/narrow-vit" and card.data.library_name == "peft"
    found = {(r.dataset_name, r.metric_type): (r.task_type, r.metric_value) for r in card.data.eval_results}
    new, old = tasks[0].name, tasks[1].name
    assert found == {
        (new, "accuracy"): ("image-classification", round(run.accuracy, 6)),
        (old, "accuracy"): ("image-classification", round(run.retained_accuracy, 6)),
        (old, "forgetting"): ("image-classification", round(run.forgetting, 6)),
        (old, "loss_rise"): ("image-classification", round(run.loss_rise, 6)),
    }
    for said in (
        "| start | window of rank 4 at position 0.5 |",
        "| rank in this file | 8 |",
        "| learning rate | 0.02 |",
        "| steps | 3 |",
        f"| {old} | accuracy | {100 * run.retained_before:.1f}% | {100 * run.retained_accuracy:.1f}% |",
        "PeftModel.from_pretrained(model,",
    ):
        assert said in card.text, said


def test_a_card_without_scores_says_so_and_that_of_a_point_has_its_own(trained, narrow, tasks, tmp_path):
    adapted, run = trained
    ll.export(adapted, tmp_path / "bare", rank=3)
    card = ModelCard.load(tmp_path / "bare" / "README.md")
    assert "Not measured" in card.text and card.data.eval_results is None
    assert "| rank in this file | 3 |" in card.text
    back = ll.rewind(adapted, *tasks, t=[0.5, 1], readout=run.head, progress=False)
    back.export(tmp_path / "point", 0.5)
    card = ModelCard.load(tmp_path / "point" / "README.md")
    assert "| rewound | whole update at t = 0.5 |" in card.text
    row = back.table.iloc[0]
    values = [r.metric_value for r in card.data.eval_results]
    expected = row[["accuracy", "retained_accuracy", "forgetting", "loss_rise"]].astype(float)
    assert values == expected.round(6).tolist()
    back.export(tmp_path / "point", 0.25)  # was not measured
    assert "Not measured" in (tmp_path / "point" / "README.md").read_text()


def test_own_answers_are_no_accuracy(trained, narrow, tasks, tmp_path):
    adapted, run = trained
    known = ll.tasks.agreement(narrow, tasks[1].test.inputs)
    left = ll.evaluate(adapted, known)
    ll.rewind(adapted, tasks[0], known, t=[1], readout=run.head, progress=False).export(tmp_path / "point", 1)
    settings = {"steps": 1, "batch_size": 16, "progress": False}
    again = ll.finetune(ll.attach(narrow, ll.LoRA(2)), tasks[0], retain=known, **settings)
    ll.export(adapted, tmp_path / "run", run=again, task=tasks[0], retain=known)
    for folder, after in (("point", left.accuracy), ("run", again.retained_accuracy)):
        card = ModelCard.load(tmp_path / folder / "README.md")
        assert f"| agreement | agreement | 100.0% | {100 * after:.1f}% |" in card.text
        told = [r for r in card.data.eval_results if r.dataset_name == "agreement"]
        measures = {r.metric_type: r.task_type for r in told}
        assert measures["agreement"] == "image-classification" and "accuracy" not in measures


def test_a_local_path_is_no_name_on_the_hub(narrow, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    for path in (str(tmp_path / "models"), "models/mine"):
        adapted = ll.attach(narrow, ll.LoRA(2))
        adapted.peft_config["default"].base_model_name_or_path = path
        ll.export(adapted, tmp_path / "out")
        card = ModelCard.load(tmp_path / "out" / "README.md")
        assert card.data.base_model is None and path not in str(card)


def test_people_may_change_the_card_and_nobody_overwrites_that(trained, narrow, tmp_path):
    adapted, _ = trained
    ll.export(adapted, tmp_path)
    ll.export(adapted, tmp_path)  # its own it replaces
    card = tmp_path / "README.md"
    card.write_text(card.read_text() + "\nMy own words.\n")
    again = ll.load(narrow, tmp_path)  # without a warning
    with pytest.raises(ValueError, match=r"README.md was changed since lora_lens wrote it, so it stays"):
        ll.export(adapted, tmp_path)
    card.unlink()
    images = torch.rand(2, 1, 28, 28)
    assert ll.function_error(ll.load(narrow, tmp_path), again, images) == 0
    ll.export(adapted, tmp_path)
    assert card.is_file()


def test_what_is_no_run_is_refused(trained, tasks, tmp_path):
    adapted, run = trained
    with pytest.raises(TypeError, match=r"run must be what ll\.finetune returns"):
        ll.export(adapted, tmp_path / "x", run={"accuracy": 1})
    with pytest.raises(TypeError, match="task must be the task that the run had"):
        ll.export(adapted, tmp_path / "x", run=run, task="digits")
    assert not (tmp_path / "x").exists()


@dataclass
class Hub:
    """A hub of this machine: what was sent to it, by repository and file."""

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    created: list[dict] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    known = Hub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def body(self) -> bytes:
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def answer(self, value: object, status: int = 200) -> None:
            sent = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        def do_GET(self) -> None:
            self.answer({"error": "not found"}, 404)

        def do_PUT(self) -> None:
            known.blobs[self.path.rpartition("/")[2]] = self.body()
            self.answer({})

        def do_POST(self) -> None:
            body = self.body()
            if self.path == "/api/repos/create":
                known.created.append(json.loads(body))
                self.answer({"url": f"{known.address}/somebody/mine", "id": "somebody/mine"})
            elif "/preupload/" in self.path:
                asked = json.loads(body)["files"]
                mode = {True: "lfs", False: "regular"}
                modes = [{"path": f["path"], "uploadMode": mode["safetensors" in f["path"]]} for f in asked]
                self.answer({"files": [{**m, "shouldIgnore": False, "oid": None} for m in modes]})
            elif self.path == "/api/validate-yaml":
                self.answer({"errors": [], "warnings": []})
            elif self.path.endswith("/objects/batch"):
                upload = [
                    {**o, "actions": {"upload": {"href": f"{known.address}/blobs/{o['oid']}"}}}
                    for o in json.loads(body)["objects"]
                ]
                self.answer({"transfer": "basic", "objects": upload})
            elif "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        known.files[value["path"]] = base64.b64decode(value["content"])
                    elif line["key"] == "lfsFile":
                        known.files[value["path"]] = known.blobs[value["oid"]]
                url = f"{known.address}/somebody/mine/commit/abc"
                self.answer({"commitUrl": url, "commitOid": "abc", "success": True})
            else:
                self.answer({"error": self.path}, 404)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    known.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # HF_ENDPOINT and HF_HUB_DISABLE_XET are read when huggingface_hub is first imported, which it is.
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", known.address)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", known.address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    yield known
    server.shutdown()
    server.server_close()


def test_an_export_is_uploaded_and_read_back(hub, trained, narrow, tmp_path):
    adapted, run = trained
    ll.export(adapted, tmp_path / "out", run=run)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    address = ll.adapters.push_to_hub(tmp_path / "out", "somebody/mine", private=True, token="hf_test")
    assert address == f"{hub.address}/somebody/mine/commit/abc"
    assert hub.created[0]["name"] == "mine" and hub.created[0]["visibility"] == "private"
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors", "lora_lens.json"}
    assert set(hub.files) == names
    for name in names:
        sent = hashlib.sha256(hub.files[name]).hexdigest()
        assert sent == hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest()
    (tmp_path / "read").mkdir()
    for name, content in hub.files.items():
        (tmp_path / "read" / name).write_bytes(content)
    plain = PeftModel.from_pretrained(copy.deepcopy(narrow), tmp_path / "read")
    assert ll.function_error(plain, adapted, torch.rand(4, 1, 28, 28)) < 1e-5


def test_what_fits_a_residual_only_is_not_uploaded(hub, narrow, tmp_path):
    adapted = ll.attach(narrow, ll.Window.first(4))
    ll.save(adapted, tmp_path / "saved")
    adapted.save_pretrained(tmp_path / "checkpoint")
    for folder in ("saved", "checkpoint"):
        with pytest.raises(ValueError, match=r"so ll\.export did not write it"):
            ll.adapters.push_to_hub(tmp_path / folder, "somebody/mine", token="hf_test")
    ll.export(adapted, tmp_path / "out")
    with pytest.raises(ValueError, match="repo_id is no name of a repository"):
        ll.adapters.push_to_hub(tmp_path / "out", "some body/mine/x", token="hf_test")
    assert not hub.created and not hub.files
