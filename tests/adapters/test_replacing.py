from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from clean_processes import printed
from peft import PeftModel
from torch import nn

import lora_lens as ll

SHARED = """
import json, os, resource, signal, sys, traceback, warnings
from pathlib import Path
import torch
from torch import nn
import lora_lens as ll
from peft import PeftModel
from safetensors.torch import load_model

warnings.simplefilter("ignore")
os.fsync = lambda handle: None  # a killed process loses nothing that it wrote, and this takes long
folder = Path(sys.argv[1])

def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8)).eval()

model, x = small_model(), torch.randn(5, 12, generator=torch.Generator().manual_seed(1))

def trained(seed, method=ll.Window(rank=3, start=0)):
    adapted = ll.attach(model, method)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
    return adapted
"""


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8)).eval()


def adapted_model(seed: int = 0, start: int = 0) -> PeftModel:
    adapted = ll.attach(small_model(), ll.Window(rank=3, start=start))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator))
    return adapted


X = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


WRITERS = {"save": ll.save, "export": ll.export, "export_residual": ll.export_residual}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_what_others_put_into_the_folder_stays(write, tmp_path):
    folder = tmp_path / "run"
    write(adapted_model(0), folder)
    first = content(folder)
    foreign = {
        "notes.md": b"years of work",
        "checkpoint-10/adapter_model.safetensors": b"trained for days",
        "on_residual/notes.txt": b"a",
        "base/tokenizer.json": b"b",
        "base/model-best.safetensors": b"d",
        ".git/HEAD": b"ref",
        ".lora_lens.0123456789abcdef/thesis.txt": b"c",
    }
    for name, text in foreign.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(text)
    (folder / "link").symlink_to(folder / "notes.md")
    inodes = {name: (folder / name).stat().st_ino for name in foreign}
    write(adapted_model(1, start=2), folder)
    now = content(folder)
    assert foreign.items() <= now.items()
    assert now.keys() == first.keys() | foreign.keys() | {"link"}
    assert {name: (folder / name).stat().st_ino for name in foreign} == inodes
    assert now["lora_lens.json"] != first["lora_lens.json"]


def test_each_kind_takes_the_place_of_the_others(tmp_path):
    folder, names = tmp_path / "run", {}
    for key, write in WRITERS.items():
        write(adapted_model(1), tmp_path / key)
        names[key] = content(tmp_path / key).keys()
    for before in WRITERS.values():
        for key, after in WRITERS.items():
            before(adapted_model(0), folder)
            (folder / "notes.md").write_text("mine")
            after(adapted_model(1), folder)
            assert content(folder).keys() == names[key] | {"notes.md"}
            assert not [p for p in folder.rglob("*") if p.is_dir() and not any(p.iterdir())]


@pytest.mark.parametrize(
    "name, write",
    [
        ("start.safetensors", ll.save),
        ("on_residual/adapter_config.json", ll.save),
        ("adapter_config.json", ll.export),
        ("buffers.safetensors", ll.export),
        ("base/model-00001-of-00002.safetensors", ll.export_residual),
        ("adapter/lora_lens.json", ll.export_residual),
    ],
)
@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_a_foreign_file_in_the_way_is_refused_before_anything_is_written(name, write, kind, tmp_path):
    folder = tmp_path / "run"
    other = ll.export if write is ll.save else ll.save
    other(adapted_model(0), folder)
    (folder / name).parent.mkdir(exist_ok=True)
    if kind == "file":
        (folder / name).write_text("mine")
    elif kind == "link":
        (folder / name).symlink_to(tmp_path / "elsewhere")
    else:
        (folder / name).mkdir()
    before = content(folder)
    with pytest.raises(ValueError, match=f"{Path(name).name} (is in the way|was not written by lora_lens)"):
        write(adapted_model(1), folder)
    assert content(folder) == before and not list(folder.glob(".lora_lens*"))


def test_what_was_changed_since_is_refused_by_name(tmp_path):
    folder = tmp_path / "run"
    ll.export(adapted_model(0), folder)
    about = json.loads((folder / "lora_lens.json").read_text())
    changes = {
        "adapter_config.json": b"{}",
        "adapter_model.safetensors": b"mine",
        "lora_lens.json": json.dumps({**about, "method": "mine"}).encode(),
    }
    for name, changed in changes.items():
        known = (folder / name).read_bytes()
        (folder / name).write_bytes(changed)
        with pytest.raises(
            ValueError, match=f"{name} (was changed since|was not written by lora_lens or was)"
        ):
            ll.export(adapted_model(1), folder)
        assert (folder / name).read_bytes() == changed
        (folder / name).write_bytes(known)
    (folder / "on_residual").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="on_residual is in the way"):
        ll.save(adapted_model(1), folder)
    (folder / "on_residual").unlink()
    ends = json.dumps(about, sort_keys=True).replace(", ", ",\r\n")  # as Git does to texts
    (folder / "lora_lens.json").write_bytes(ends.encode())
    ll.save(adapted_model(1), folder)


@pytest.mark.parametrize("listed", ["../mine.txt", "/etc/hosts", "notes.md", "base/../../mine.txt"])
def test_a_list_that_names_others_files_is_not_followed(listed, tmp_path):
    folder = tmp_path / "run"
    ll.export_residual(adapted_model(0), folder)
    (tmp_path / "mine.txt").write_text("mine")
    (folder / "notes.md").write_text("mine")
    about = json.loads((folder / "lora_lens.json").read_text())
    about["files"][listed] = "0" * 64
    del about["sha256"]
    (folder / "lora_lens.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="no list of files as lora_lens writes it"):
        ll.save(adapted_model(1), folder)
    assert (tmp_path / "mine.txt").exists() and (folder / "notes.md").exists()


def forget_lists(folder: Path) -> None:
    """As an earlier version wrote it."""
    for path in folder.rglob("lora_lens.json"):
        about = json.loads(path.read_text())
        del about["files"], about["sha256"]
        path.write_text(json.dumps(about))


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_folder_of_an_earlier_version_is_known_by_its_names(write, tmp_path):
    folder = tmp_path / "run"
    write(adapted_model(0), folder)
    forget_lists(folder)
    (folder / "checkpoint-3").mkdir()
    (folder / "notes.md").write_text("mine")
    (folder / "start.bin").write_text("mine")
    ll.save(adapted_model(1), folder)
    assert sorted(p.name for p in folder.iterdir()) == [
        "checkpoint-3", "lora_lens.json", "notes.md", "on_residual", "start.bin", "start.safetensors"
    ]  # fmt: skip
    assert ll.function_error(ll.load(small_model(), folder), adapted_model(1), X) == 0


def test_folders_that_are_not_lora_lens_s_are_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "lora_lens.json").write_text("{}")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    before = content(tmp_path)
    for write in WRITERS.values():
        for name in ("mine", "file", "other"):
            with pytest.raises(ValueError, match=f"{name}.* (exists and was|was) not written by lora_lens"):
                write(adapted_model(), tmp_path / name)
        with pytest.raises(ValueError, match="folder must be the path of a folder"):
            write(adapted_model(), tmp_path / "circle")
        with pytest.raises(ValueError, match="would lie within a file"):
            write(adapted_model(), tmp_path / "file" / "run")
        with pytest.raises(TypeError, match="folder must be the path of a folder, not None"):
            write(adapted_model(), None)
        with pytest.raises(TypeError, match="folder must be the path of a folder, not 3"):
            write(adapted_model(), 3)
        with pytest.raises(ValueError, match="not an empty text"):
            write(adapted_model(), "")
    assert content(tmp_path) == before
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    ll.save(adapted_model(), tmp_path / "link")
    assert (tmp_path / "there" / "start.safetensors").is_file() and (tmp_path / "link").is_symlink()


KILLED = """
old, new = trained(1), trained(2, ll.Window(rank=4, start=2))

def found(place, inner):
    "Which of the two lies there, complete; None for neither."
    base, reference = model, {str(a.attachment.method): a for a in (old, new)}
    if inner:
        if not (place / ".lora_lens.ready").is_dir() and not (place / inner).is_dir():
            return None
        try:
            ll.load(model, place / inner)  # not its base, but this ends what was interrupted
        except ll.errors.InputError:
            base = small_model()
            load_model(base, str(place / "base" / "model.safetensors"))
    try:
        there = ll.load(base, place / inner)
    except ll.errors.MissingFileError as error:
        return None
    method = str(there.attachment.method)
    assert ll.function_error(there, model if inner else reference[method], x) < 1e-5
    return "old" if reference[method] is old else "new"

def ends(moment, place, write):
    "Whether a process that is killed before its so-manieth step in the folder comes to its end."
    child = os.fork()
    if child == 0:
        steps = iter(range(1, 10**6))

        def step(event, arguments):
            names = [str(a) for a in arguments[:2] if isinstance(a, (str, os.PathLike))]
            if event == "open" and not set("wxa+") & set(arguments[1] or ""):
                return  # only reads
            if event in EVENTS and any(n.startswith(str(place)) for n in names) and next(steps) == moment:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(step)
        write(new, place)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"}
CASES = [(ll.save, False), (ll.save, True), (ll.export, True), (ll.export_residual, True)]
for write, over_old in CASES:
    inner = "adapter" if write is ll.export_residual else ""
    seen, ended = [], False
    while not ended:
        place = folder / f"{write.__name__}{over_old}{len(seen)}"
        if over_old:
            write(old, place)
            (place / "notes.md").write_text("mine")
        ended = ends(len(seen) + 1, place, write)
        if write is ll.export and (place / "adapter_config.json").exists():
            theirs = PeftModel.from_pretrained(small_model(), place)
            assert min(ll.function_error(theirs, a, x) for a in (old, new)) < 1e-5, "PEFT reads a mixture"
        seen.append(found(place, inner))
        if over_old:
            assert (place / "notes.md").read_text() == "mine"
        write(old, place)
        assert found(place, inner) == "old" and not list(place.glob(".lora_lens*"))
    print(write.__name__, over_old, *seen)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_a_kill_at_any_step_leaves_all_of_the_old_or_all_of_the_new(tmp_path):
    cases = printed(SHARED + KILLED, tmp_path).splitlines()
    assert len(cases) == 4
    for case in cases:
        _, over_old, *seen = case.split()
        before = "old" if over_old == "True" else "None"
        assert seen == [before] * seen.count(before) + ["new"] * seen.count("new")  # one step decides
        assert seen.count(before) > 3 and seen.count("new") > 3


def test_what_is_saved_after_a_kill_into_one_of_two_folders_is_the_newest(monkeypatch, tmp_path):
    newer = adapted_model(1)
    ll.export_residual(newer, tmp_path)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            ll.export_residual(adapted_model(2, start=2), tmp_path)
    assert (tmp_path / ".lora_lens.ready" / "adapter").is_dir()
    ll.save(newer, tmp_path / "adapter")
    assert ll.function_error(ll.load(small_model(), tmp_path / "adapter"), newer, X) < 1e-6


FULL = """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that writing fails, as on a full disk
old, new = trained(1), trained(2, ll.Window(rank=4, start=2))

def files(place):
    return {str(p.relative_to(place)): p.read_bytes() for p in place.rglob("*") if p.is_file()}

for write in (ll.save, ll.export, ll.export_residual):
    place = folder / write.__name__
    write(old, place)
    (place / "notes.md").write_text("mine")
    before, refused = files(place), 0
    for most in range(0, 10**6, 100):
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
        try:
            write(new, place)
        except OSError:
            refused += 1
        else:
            break
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        assert files(place) == before, most
        assert not list(place.glob(".lora_lens*"))
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
            write(new, folder / "none" / "yet")
        except OSError:
            assert not (folder / "none" / "yet").exists()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    assert files(place)["notes.md"] == b"mine" and files(place) != before
    print(refused)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files")
def test_a_disk_that_is_full_at_any_byte_changes_nothing(tmp_path):
    refused = printed(SHARED + FULL, tmp_path).split()
    assert len(refused) == 3 and min(map(int, refused)) > 3


TWO = """
def writes(rank):
    mine = trained(rank, ll.Window(rank=rank, start=0))
    for turn in range(500):
        if turn >= 12 and len(list(folder.glob("*.seen"))) == 2:  # neither goes first
            break
        (ll.save if turn % 2 else ll.export)(mine, folder / "run")
        there = ll.load(model, folder / "run")
        rank = ll.summary(there)["rank"].max()
        rank = int(rank if there.attachment.starts else rank / 2)  # what is exported has twice the window's
        assert ll.function_error(there, expected[rank], x) < 1e-5
        seen.add(rank)
        if len(seen) == 2:
            (folder / f"{os.getpid()}.seen").touch()

expected, seen = {rank: trained(rank, ll.Window(rank=rank, start=0)) for rank in (3, 5)}, set()
children = []
for rank in (3, 5):
    if (child := os.fork()) == 0:
        try:
            writes(rank)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0 if len(seen) == 2 else 2)
    children.append(child)
assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="two forked processes")
def test_two_processes_that_save_and_load_at_once_never_read_a_mixture(tmp_path):
    printed(SHARED + TWO, tmp_path)
    assert {p.name for p in tmp_path.iterdir() if p.suffix != ".seen"} == {"run"}
    assert not list((tmp_path / "run").glob(".lora_lens*"))
