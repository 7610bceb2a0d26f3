from __future__ import annotations

import multiprocessing
import os
import random
import resource
import tempfile
import threading
import time
import warnings
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_lens.spectrum.cache import (
    DAY,
    FORMAT,
    Factors,
    SpectrumCache,
    _checksum,
    default_folder,
    weight_key,
)
from lora_lens.spectrum.factorizing import factorize

KEYS = [f"{i:064x}" for i in range(8)]


def factors(seed: int, out: int = 40, inputs: int = 30) -> Factors:
    """Factors of the right shapes, different for every seed."""
    generator = torch.Generator().manual_seed(seed)
    k = min(out, inputs)
    values = torch.rand(k, generator=generator, dtype=torch.float64).sort(descending=True).values
    return torch.randn(out, k, generator=generator), values, torch.randn(k, inputs, generator=generator)


def equal(found: Factors | None, expected: Factors) -> bool:
    return found is not None and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        for a, b in zip(found, expected, strict=True)
    )


def names(folder: Path) -> list[str]:
    return sorted(f.name for f in folder.iterdir())


def entry(folder: Path, key: str) -> Path:
    return folder / f"{key}.spectrum.safetensors"


def ours(caught: Iterable[warnings.WarningMessage]) -> list[warnings.WarningMessage]:
    """Not those of a garbage collection that happens to come by."""
    return [w for w in caught if w.category is UserWarning]


@pytest.fixture(scope="module")
def processes():
    """Real processes that start in a moment: each is forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["lora_lens.spectrum.cache", "lora_lens.spectrum.spectrum", "pytest", "hypothesis"]
    )
    return context


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(48, 20), (20, 48), (1, 1)])
def test_factors_come_back_bit_for_bit(tmp_path, dtype, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    s = factorize("w", weight)
    expected = s.left, s.singular_values, s.right
    key = weight_key(weight, "exact")
    cache = SpectrumCache(tmp_path)
    assert cache.get(key) is None
    cache.put(key, *expected)
    assert equal(cache.get(key), expected)
    assert equal(SpectrumCache(tmp_path).get(weight_key(weight.clone(), "exact")), expected)
    assert names(tmp_path) == [f"{key}.spectrum.safetensors"]


@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
@settings(deadline=None)
def test_a_key_changes_with_every_bit_and_with_nothing_else(data, dtype):
    rows, columns = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    seed = data.draw(st.integers(0, 99))
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    key = weight_key(weight, "m")
    assert key == weight_key(torch.nn.Parameter(weight.clone()), "m")
    assert key == weight_key(weight.T.contiguous().T, "m")
    padded = torch.zeros(rows, columns + 3, dtype=dtype)
    padded[:, 1 : columns + 1] = weight
    assert key == weight_key(padded[:, 1 : columns + 1], "m")

    flipped = weight.clone()
    raw = flipped.view(torch.uint8).view(-1)
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert key != weight_key(flipped, "m")
    assert key != weight_key(weight, "m2")


def test_a_key_tells_shapes_and_dtypes_of_equal_bytes_apart():
    zeros = [
        torch.zeros(s, dtype=d) for s in [(4, 6), (6, 4), (24,), (24, 1)] for d in [torch.half, torch.int16]
    ]
    keys = {weight_key(z, "m") for z in [*zeros, torch.zeros(2, 6, dtype=torch.float32)]}
    assert len(keys) == 9
    assert all(len(key) == 64 for key in keys)


def test_writing_to_what_was_read_changes_nothing_for_others(tmp_path):
    cache = SpectrumCache(tmp_path)
    cache.put(KEYS[0], *factors(0))
    for tensor in cache.get(KEYS[0]):
        tensor.zero_()
    assert equal(cache.get(KEYS[0]), factors(0))


def test_what_was_read_outlives_its_file(tmp_path):
    cache = SpectrumCache(tmp_path)
    cache.put(KEYS[0], *factors(0))
    found = cache.get(KEYS[0])
    cache.put(KEYS[0], *factors(1))
    assert equal(cache.get(KEYS[0]), factors(1))
    entry(tmp_path, KEYS[0]).unlink()
    assert equal(found, factors(0))


def test_the_least_recently_used_make_room(tmp_path):
    SpectrumCache(tmp_path).put(KEYS[0], *factors(0))
    size = entry(tmp_path, KEYS[0]).stat().st_size
    cache = SpectrumCache(tmp_path, max_bytes=3 * size + 100)
    for i in (1, 2):
        cache.put(KEYS[i], *factors(i))
    for age, i in enumerate([2, 1, 0]):  # the first is the oldest
        then = time.time() - 60 * (age + 1)
        os.utime(entry(tmp_path, KEYS[i]), (then, then))
    assert equal(cache.get(KEYS[0]), factors(0))  # now the youngest
    cache.put(KEYS[3], *factors(3))
    assert [cache.get(key) is not None for key in KEYS[:4]] == [True, False, True, True]


def test_only_our_own_files_are_ever_removed(tmp_path):
    others = ["model.safetensors", ".hidden", f"{KEYS[5]}.safetensors", "notes.spectrum"]
    for name in others:
        (tmp_path / name).write_bytes(bytes(9000))
        os.utime(tmp_path / name, (0, 0))
    cache = SpectrumCache(tmp_path, max_bytes=10_000)  # room for one
    for i in range(3):
        cache.put(KEYS[i], *factors(i))
    assert names(tmp_path) == sorted([*others, entry(tmp_path, KEYS[2]).name])


def test_factors_larger_than_the_limit_do_not_empty_the_cache(tmp_path):
    cache = SpectrumCache(tmp_path, max_bytes=10_000)
    cache.put(KEYS[0], *factors(0))
    cache.put(KEYS[1], *factors(1, out=100))
    assert names(tmp_path) == [entry(tmp_path, KEYS[0]).name]


def describe(**changes: str):
    """A damage: the same tensors under another description."""

    def damage(path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
        save_file(load_file(path), path, about | changes)

    return damage


def with_float64_vectors(path: Path) -> None:
    tensors = dict(zip(("left", "singular_values", "right"), factors(0), strict=True))
    tensors["left"] = tensors["left"].double()
    save_file(tensors, path)
    describe(format=FORMAT, key=KEYS[0], crc32=_checksum(tensors))(path)


def with_right_checksum(damaged: Factors):
    def damage(path: Path) -> None:
        SpectrumCache(path.parent).put(KEYS[0], *damaged)

    return damage


def flip(position: float):
    def damage(path: Path) -> None:
        raw = bytearray(path.read_bytes())
        raw[int(position * (len(raw) - 1))] ^= 4
        path.write_bytes(raw)

    return damage


LEFT, VALUES, RIGHT = factors(0)
DAMAGES = {
    "empty": lambda p: p.write_bytes(b""),
    "truncated": lambda p: p.write_bytes(p.read_bytes()[:-1]),
    "cut in the header": lambda p: p.write_bytes(p.read_bytes()[:50]),
    "longer": lambda p: p.write_bytes(p.read_bytes() + b"\0"),
    "garbage": lambda p: p.write_bytes(random.Random(0).randbytes(9000)),
    "zeros": lambda p: p.write_bytes(bytes(p.stat().st_size)),
    "a bit of the header": flip(0.01),
    "a bit of the vectors": flip(0.5),
    "the last bit": flip(1.0),
    "another weight's": lambda p: os.replace(entry(p.parent, KEYS[1]), p),
    "another program's": lambda p: save_file({"weight": torch.ones(3, 3)}, p),
    "another version's": describe(format="lora_lens spectrum 0"),
    "another checksum": describe(crc32="00000000"),
    "no description": lambda p: save_file(load_file(p), p),
    "NaN values": with_right_checksum((LEFT, VALUES * float("nan"), RIGHT)),
    "infinite values": with_right_checksum((LEFT, VALUES * float("inf"), RIGHT)),
    "ascending values": with_right_checksum((LEFT, VALUES.flip(0), RIGHT)),
    "negative values": with_right_checksum((LEFT, VALUES - 1, RIGHT)),
    "float64 vectors": with_float64_vectors,
    "a column too few": with_right_checksum((LEFT[:, 1:], VALUES, RIGHT)),
    "no component": with_right_checksum((LEFT[:, :0], VALUES[:0], RIGHT[:0])),
    "too few components": with_right_checksum((LEFT[:, :5], VALUES[:5], RIGHT[:5])),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_entry_is_named_removed_and_made_again(tmp_path, name):
    cache = SpectrumCache(tmp_path)
    for i in (0, 1):
        cache.put(KEYS[i], *factors(i))
    path = entry(tmp_path, KEYS[0])
    DAMAGES[name](path)
    with pytest.warns(UserWarning) as caught:
        assert cache.get(KEYS[0]) is None
    (warning,) = ours(caught)
    assert str(path) in str(warning.message) and "is computed again" in str(warning.message)
    assert warning.filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert cache.get(KEYS[0]) is None
        cache.put(KEYS[0], *factors(0))
        assert equal(cache.get(KEYS[0]), factors(0))


def unusable_folders(tmp_path: Path) -> list[Path]:
    (tmp_path / "file").write_text("no folder")
    folders = [tmp_path / "file", tmp_path / "file" / "below"]
    return folders + ([Path("/proc/lora_lens")] if Path("/proc/self").exists() else [])


def test_a_folder_that_cannot_be_made_warns_once(tmp_path):
    for folder in unusable_folders(tmp_path):
        cache = SpectrumCache(folder)
        with pytest.warns(UserWarning, match="are not kept in .*LORA_LENS_CACHE") as caught:
            for i in range(3):
                assert cache.get(KEYS[i]) is None
                cache.put(KEYS[i], *factors(i))
        (warning,) = ours(caught)
        assert str(folder) in str(warning.message)
        assert warning.filename == __file__
    assert names(tmp_path) == ["file"]


def test_a_read_only_folder_is_still_read(processes):
    with tempfile.TemporaryDirectory() as name:  # pytest's own are closed to the user whom root becomes
        folder = Path(name)
        SpectrumCache(folder).put(KEYS[0], *factors(0))
        entry(folder, KEYS[0]).chmod(0o444)
        folder.chmod(0o555)
        try:
            assert in_process(processes, use_as_nobody, folder) == ([True, False, False], 1)
            assert names(folder) == [entry(folder, KEYS[0]).name]
        finally:
            folder.chmod(0o755)


def use_as_nobody(folder: Path) -> tuple[list[bool], int]:
    if os.geteuid() == 0:  # whom permissions do not bind
        os.setuid(65534)
    return use(folder)


def test_a_full_disk_warns_once_and_leaves_nothing(tmp_path, processes):
    assert in_process(processes, use_with_full_disk, tmp_path) == ([False, False, False], 1)
    assert names(tmp_path) == []


def use_with_full_disk(folder: Path) -> tuple[list[bool], int]:
    """No disk can be filled without rights; a limit on file sizes makes writes fail half-way as well."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
    return use(folder)


def use(folder: Path) -> tuple[list[bool], int]:
    """Which of three entries come back after being put if missing, and how many warnings there were."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cache = SpectrumCache(folder)
        for i in range(3):
            if cache.get(KEYS[i]) is None:
                cache.put(KEYS[i], *factors(i))
        return [equal(cache.get(KEYS[i]), factors(i)) for i in range(3)], len(ours(caught))


def in_process(processes, function, folder: Path):
    receiver, sender = processes.Pipe(duplex=False)
    process = processes.Process(target=send, args=(sender, function, folder))
    process.start()
    sender.close()
    try:
        return receiver.recv()  # raises EOFError if the process fails
    finally:
        process.join()


def send(sender, function, folder: Path) -> None:
    sender.send(function(folder))


def test_kills_leave_whole_entries_and_scraps_that_go_after_a_day(tmp_path, processes):
    scraps: list[Path] = []
    while len(scraps) < 3:  # a kill may come just after the entry that it was meant for
        process = processes.Process(target=write_forever, args=(tmp_path,))
        process.start()
        while not any(tmp_path.glob("*.safetensors")) or not set(tmp_path.glob("*.partial")) - set(scraps):
            assert process.is_alive()
        process.kill()
        process.join()
        scraps = list(tmp_path.glob("*.partial"))

    cache = SpectrumCache(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for i, key in enumerate(KEYS):
            if entry(tmp_path, key).exists():
                assert equal(cache.get(key), factors(i, 600, 500))
    cache.put(KEYS[0], *factors(0))
    assert all(s.exists() for s in scraps)
    for s in scraps[1:]:
        os.utime(s, (time.time() - DAY - 60,) * 2)
    SpectrumCache(tmp_path).put(KEYS[0], *factors(0))  # its first look at the folder
    assert list(tmp_path.glob("*.partial")) == scraps[:1]


def write_forever(folder: Path) -> None:
    cache = SpectrumCache(folder)
    many = [factors(i, 600, 500) for i in range(len(KEYS))]
    while True:
        for key, one in zip(KEYS, many, strict=True):
            cache.put(key, *one)


def test_processes_and_threads_share_a_folder(tmp_path, processes):
    """Each puts and gets eight entries in a folder with room for three, for a second and a half."""
    counts = processes.Queue()
    workers = [processes.Process(target=hammer, args=(tmp_path, seed, counts)) for seed in range(2)]
    for worker in workers:
        worker.start()
    threads = [threading.Thread(target=hammer, args=(tmp_path, seed, counts)) for seed in (2, 3)]
    for thread in threads:
        thread.start()
    for one in [*workers, *threads]:
        one.join(timeout=60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    found = [counts.get(timeout=5) for _ in range(4)]  # a thread that failed put none
    assert all(hits > 0 and misses > 0 for hits, misses in found), found
    left = list(tmp_path.iterdir())
    assert sum(f.stat().st_size for f in left) <= 30_000
    assert not [f for f in left if f.name.endswith(".partial")]


def hammer(folder: Path, seed: int, counts) -> None:
    warnings.simplefilter("error", UserWarning)
    cache = SpectrumCache(folder, max_bytes=30_000)
    many = [factors(i) for i in range(len(KEYS))]
    choose, end = random.Random(seed), time.monotonic() + 1.5
    hits = misses = 0
    while time.monotonic() < end or not (hits and misses):
        i = choose.randrange(len(KEYS))
        found = cache.get(KEYS[i])
        if found is None:
            misses += 1
            cache.put(KEYS[i], *many[i])
        else:
            assert equal(found, many[i])
            hits += 1
    assert not cache._failed
    counts.put((hits, misses))


def test_the_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LORA_LENS_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_folder() == tmp_path / ".cache" / "lora_lens"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert default_folder() == tmp_path / "x" / "lora_lens"
    monkeypatch.setenv("LORA_LENS_CACHE", "~/mine")
    assert default_folder() == SpectrumCache().folder == tmp_path / "mine"
    assert names(tmp_path) == []  # made by the first put only


def test_files_of_others_are_never_removed_to_make_room(tmp_path):
    cache = SpectrumCache(tmp_path, max_bytes=4000)
    names = ("mine.spectrum.safetensors", "mine.spectrum.partial", f"{'a' * 64}.spectrum.safetensors.bak")
    for name in names:
        (tmp_path / name).write_bytes(bytes(5000))
        os.utime(tmp_path / name, (0, 0))
    (tmp_path / f"{'b' * 64}.spectrum.safetensors").symlink_to(tmp_path / names[0])
    factors = torch.eye(8), torch.ones(8), torch.eye(8)
    for i in range(12):
        cache.put(weight_key(torch.full((8, 8), float(i)), "test"), *factors)
    assert all((tmp_path / name).stat().st_size == 5000 for name in names)
    assert (tmp_path / f"{'b' * 64}.spectrum.safetensors").is_symlink()
    assert 0 < len(list(tmp_path.iterdir())) - 4 < 12  # its own made room


def test_the_folder_is_looked_at_once_while_there_is_room(tmp_path, monkeypatch):
    looks = []
    monkeypatch.setattr(
        SpectrumCache, "_tidy", lambda self, tidy=SpectrumCache._tidy: (looks.append(1), tidy(self))
    )
    cache = SpectrumCache(tmp_path)
    for seed, key in enumerate(KEYS):
        cache.put(key, *factors(seed))
    assert len(looks) == 1
    small = SpectrumCache(tmp_path, max_bytes=3 * entry(tmp_path, KEYS[0]).stat().st_size)
    small.put(KEYS[0], *factors(0))
    assert len(names(tmp_path)) == 3
