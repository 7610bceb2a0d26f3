from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import save_file
from torch import nn

import lora_lens as ll
from lora_lens.spectrum.factorizing import factorize
from lora_lens.spectrum.svd import some_components, thin_svd


def orthonormal(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))[0]


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@given(
    out=st.integers(1, 40),
    inputs=st.integers(1, 40),
    rank=st.integers(0, 40),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
@settings(deadline=None)
def test_the_factors_give_the_weight_back(out, inputs, rank, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, rank, generator=generator) @ torch.randn(rank, inputs, generator=generator)
    s = factorize("w", weight.to(dtype))
    weight = weight.to(dtype).float()
    assert s.shape == (out, inputs) and s.k == min(out, inputs)
    assert (s.singular_values.diff() <= 0).all()
    eye = torch.eye(s.k)
    torch.testing.assert_close(s.left.T @ s.left, eye, atol=1e-5, rtol=0)
    torch.testing.assert_close(s.right @ s.right.T, eye, atol=1e-5, rtol=0)
    norm = float(torch.linalg.norm(weight))
    assert torch.linalg.norm(s.component(ll.Window(s.k, start=0)) - weight) <= 2e-6 * norm


MATRICES = {
    "random": torch.randn(96, 64, generator=torch.Generator().manual_seed(2)),
    "wide": torch.randn(40, 130, generator=torch.Generator().manual_seed(3)),
    "ill-conditioned": (orthonormal(96, 64, 0) * torch.logspace(0, -12, 64).double())
    @ orthonormal(64, 64, 1).T,
    "rank-deficient": orthonormal(96, 10, 0) @ orthonormal(64, 10, 1).T,
    "equal values": orthonormal(96, 64, 0),
    "a tiny tail": (orthonormal(64, 64, 0) * torch.tensor([1.0] * 56 + [1e-6] * 8).double())
    @ orthonormal(64, 64, 1).T,
    "zero columns": torch.cat(
        [torch.randn(50, 10, generator=torch.Generator().manual_seed(4)), torch.zeros(50, 20)], 1
    ),
    "zero": torch.zeros(30, 20),
    "one number": torch.full((1, 1), -3.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MATRICES)
def test_factors_are_exact_down_to_the_smallest_component(name, dtype):
    weight = MATRICES[name].to(dtype)
    s = factorize(name, weight)
    expected = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    assert np.abs(s.singular_values.numpy() - expected).max() <= 1e-6 * expected[0]
    eye = torch.eye(s.k, dtype=torch.float64)
    left, right = s.left.double(), s.right.double()
    assert (left.T @ left - eye).abs().max() <= 1e-5
    assert (right @ right.T - eye).abs().max() <= 1e-5
    difference = left * s.singular_values @ right - weight.double()
    assert torch.linalg.norm(difference) <= 1e-6 * torch.linalg.norm(weight.double())


def test_the_embedded_model_s_factors_are_lapack_s(model, spectra):
    for name, s in spectra.items():
        expected = torch.linalg.svdvals(model.get_submodule(name).weight.detach().double())
        assert (s.singular_values - expected).abs().max() <= 1e-12 * expected[0]


def test_ranks_and_energy_of_known_spectra():
    flat = factorize("w", orthonormal(32, 16, 0))
    assert flat.effective_rank == pytest.approx(16)
    assert flat.stable_rank == pytest.approx(16)
    assert flat.energy(ll.Window.middle(4)) == pytest.approx(0.25)

    one = factorize("w", torch.outer(torch.arange(1.0, 6), torch.ones(4)))
    assert one.effective_rank == pytest.approx(1, abs=1e-6)
    assert one.stable_rank == pytest.approx(1)
    assert one.energy(ll.Window.first(1)) == pytest.approx(1)

    two = factorize("w", torch.diag(torch.tensor([3.0, 1.0])))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert two.effective_rank == pytest.approx(math.exp(entropy))
    assert two.stable_rank == pytest.approx(10 / 9)
    assert two.energy(ll.Window.last(1)) == pytest.approx(0.1)


def test_a_zero_weight_has_rank_zero():
    zero = factorize("w", torch.zeros(4, 3))
    assert (zero.effective_rank, zero.stable_rank, zero.energy(ll.Window.first(1))) == (0, 0, 0)


def test_every_block_weight_of_the_model_is_there_and_the_head_is_not(model, spectra):
    kinds = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    assert list(spectra) == [f"blocks.{b}.{kind}" for b in range(6) for kind in kinds]
    for name, s in spectra.items():
        weight = model.get_submodule(name).weight.detach()
        torch.testing.assert_close(s.component(ll.Window(s.k, start=0)), weight, atol=1e-5, rtol=0)


def test_the_table(spectra):
    table = spectra.table(ll.Window.last(8))
    assert len(table) == 24 and set(table["k"]) == {96} and set(table["start"]) == {88}
    first = table.iloc[0]
    assert (first["layer"], first["block"], first["kind"]) == ("blocks.0.attn.qkv", 0, "attn.qkv")
    assert (first["out"], first["in"]) == (288, 96)
    assert table["effective_rank"].between(1, 96).all() and table["stable_rank"].between(1, 96).all()
    total = sum(spectra.table(w)["energy"] for w in (ll.Window(48, start=0), ll.Window(48, start=48)))
    np.testing.assert_allclose(total, 1)
    assert "energy" not in spectra.table()


def test_an_unknown_layer_is_answered_with_those_there_are(spectra):
    with pytest.raises(KeyError, match=r"no spectrum of 'blocks.9.attn.qkv'.*blocks.0.attn.qkv"):
        spectra["blocks.9.attn.qkv"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(patch_vit, bad):
    with torch.no_grad():
        patch_vit.blocks[1].mlp.fc1.weight[0, 0] = bad
    with pytest.raises(ValueError, match=r"blocks.1.mlp.fc1.weight holds NaN or infinite"):
        ll.spectra(patch_vit)
    with pytest.raises(ValueError, match=r"blocks.1.mlp.fc1.weight holds NaN or infinite"):
        ll.attach(patch_vit, ll.LoRA(4))


def test_plain_modules_work():
    assert list(ll.spectra(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))) == ["0", "2"]


def test_a_file_and_a_model_have_the_same_spectra(patch_vit, tmp_path):
    save_file(patch_vit.state_dict(), tmp_path / "model.safetensors")
    live, filed = ll.spectra(patch_vit), ll.spectra(tmp_path / "model.safetensors")
    assert set(live) == set(filed)
    for name, s in live.items():
        assert torch.equal(s.singular_values, filed[name].singular_values)
    adapted = ll.attach(patch_vit, ll.Window.last(4), spectra=filed)
    assert ll.function_error(adapted, patch_vit, torch.randn(2, 1, 28, 28)) < 1e-5


def test_an_adapter_s_spectrum_is_that_of_its_update(patch_vit, tmp_path):
    adapted = ll.attach(patch_vit, ll.Window.middle(4), alpha=12)
    adapted.save_pretrained(tmp_path)
    for name, s in ll.spectra(tmp_path).items():
        update = adapted.base_model.model.get_submodule(name).get_delta_weight("default").detach()
        expected = torch.linalg.svdvals(update.double())[:4]
        assert s.k == 4 and s.shape == tuple(update.shape)
        assert (s.singular_values - expected).abs().max() <= 1e-6 * expected[0]
        torch.testing.assert_close(s.component(ll.Window(4, start=0)), update, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", MATRICES)
def test_values_alone_are_as_exact_as_promised(name):
    model = nn.Sequential(nn.Linear(*reversed(MATRICES[name].shape), bias=False))
    model[0].weight.data = MATRICES[name].double()
    (s,) = ll.spectra(model, "0", vectors=False).values()
    expected = np.linalg.svd(MATRICES[name].double().numpy(), compute_uv=False)
    assert np.abs(s.singular_values.numpy() - expected).max() <= 1e-6 * expected[0]
    with pytest.raises(ValueError, match="the spectrum of 0 has no singular vectors"):
        s.component(ll.Window.first(1))


TALL = {
    "random": torch.randn(400, 300, generator=torch.Generator().manual_seed(5)),
    "wide": torch.randn(260, 700, generator=torch.Generator().manual_seed(6)),
    "decaying": (orthonormal(400, 300, 2) * torch.logspace(0, -4, 300).double()) @ orthonormal(300, 300, 3).T,
    "ill-conditioned": (orthonormal(400, 300, 2) * torch.logspace(0, -12, 300).double())
    @ orthonormal(300, 300, 3).T,
    "rank-deficient": orthonormal(400, 50, 2) @ orthonormal(300, 50, 3).T,
    "equal values": orthonormal(400, 300, 2),
    "diagonal": torch.diag(torch.linspace(3, 1, 300)),
    "blocks": torch.block_diag(
        torch.randn(150, 150, generator=torch.Generator().manual_seed(7)), torch.eye(150)
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", TALL)
def test_the_components_of_windows_alone_are_as_exact(name, dtype):
    weight = TALL[name].to(dtype)
    layer = nn.Linear(*reversed(weight.shape), bias=False, dtype=dtype)
    layer.weight.data = weight
    chosen = [ll.Window.first(16), ll.Window(16, position=0.4), ll.Window.last(16)]
    (s,) = ll.spectra(nn.Sequential(layer), "0", vectors=chosen, cache=False).values()
    k = min(weight.shape)
    assert len(s.components) == 48 and s.left.shape == (weight.shape[0], 48) and s.k == k
    exact = weight.double()
    expected = np.linalg.svd(exact.numpy(), compute_uv=False)
    assert np.abs(s.singular_values.numpy() - expected).max() <= 1e-6 * expected[0]
    eye = torch.eye(48, dtype=torch.float64)
    left, right = s.left.double(), s.right.double()
    assert (left.T @ left - eye).abs().max() <= 1e-5 and (right @ right.T - eye).abs().max() <= 1e-5
    # What is left of W without these components has nothing along them, on either side.
    rest = exact - left * s.singular_values[s.components] @ right
    assert (left.T @ rest).abs().max() <= 1e-6 * expected[0]
    assert (rest @ right.T).abs().max() <= 1e-6 * expected[0]


@given(
    out=st.integers(1, 40),
    inputs=st.integers(1, 40),
    rank=st.integers(0, 40),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
@settings(deadline=None)
def test_some_components_of_any_matrix_are_those_of_all(out, inputs, rank, dtype, data):
    k = min(out, inputs)
    picked = sorted(data.draw(st.sets(st.integers(0, k - 1))))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    matrix = torch.randn(out, rank, generator=generator) @ torch.randn(rank, inputs, generator=generator)
    matrix = matrix.to(dtype)
    wanted = torch.tensor(picked, dtype=torch.long)
    (left, values, right), components = some_components(matrix, lambda _: wanted)
    assert components is wanted
    assert left.shape == (out, len(picked)) and right.shape == (len(picked), inputs)
    _, every, _ = thin_svd(matrix)
    largest = float(every[0])
    torch.testing.assert_close(values, every, atol=1e-6 * largest, rtol=0)
    torch.testing.assert_close(left.T @ left, torch.eye(len(picked)), atol=1e-5, rtol=0)
    torch.testing.assert_close(right @ right.T, torch.eye(len(picked)), atol=1e-5, rtol=0)
    projected = left.T @ matrix.float() @ right.T
    torch.testing.assert_close(projected, values[picked].float().diag(), atol=1e-5 * largest + 1e-30, rtol=0)


def test_vectors_are_at_hand_for_the_windows_asked_for_and_no_others():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 280), nn.ReLU(), nn.Linear(280, 270))
    chosen = ll.windows(8, 3)
    few, every = ll.spectra(model, vectors=chosen, cache=False), ll.spectra(model, cache=False)
    for name in every:
        for window in [*chosen, ll.Window(4, start=2)]:
            torch.testing.assert_close(
                few[name].component(window), every[name].component(window), atol=1e-6, rtol=0
            )
        assert every[name].components is None
    with pytest.raises(ValueError, match=r"of 0 holds vectors for other components than \[4, 12\)"):
        few["0"].vectors(ll.Window(8, start=4))
    with pytest.raises(ValueError, match=r"rank 271 does not fit 2: its spectrum has 270"):
        ll.spectra(model, vectors=[ll.Window.first(271)])


def test_an_adapter_without_spectra_is_that_with_them():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 280), nn.ReLU(), nn.Linear(280, 290))
    window = ll.Window.middle(8)
    alone, given = (ll.attach(model, window, targets="0", spectra=s) for s in (None, ll.spectra(model)))
    a, b = (m.base_model.model.get_submodule("0").get_delta_weight("default") for m in (alone, given))
    torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_the_number_of_threads_changes_no_digit_and_is_left_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)), nn.Linear(64, 300), nn.Linear(300, 300))
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(ll.spectra(model, cache=False))
            assert torch.get_num_threads() == threads
            with ThreadPoolExecutor(1) as pool:
                assert pool.submit(torch.get_num_threads).result() == threads
    finally:
        torch.set_num_threads(before)
    one, three = found
    assert list(one) == list(three)
    for name in one:
        assert torch.equal(one[name].left, three[name].left)
        assert torch.equal(one[name].singular_values, three[name].singular_values)


def test_what_fails_in_a_thread_is_told_and_threads_are_left_as_they_were(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = {f"layers.{i}.weight": torch.randn(8, 8) for i in range(20)}
    tensors["layers.7.weight"][0, 0] = float("nan")
    save_file(tensors, path)
    before = torch.get_num_threads()
    with pytest.raises(ValueError, match=r"layers.7.weight holds NaN or infinite"):
        ll.spectra(path)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
@pytest.mark.parametrize("vectors", [True, False, [ll.Window.last(8)]], ids=["all", "none", "a window"])
def test_the_device_changes_nothing_but_rounding(device, vectors, patch_vit):
    expected = ll.spectra(patch_vit, vectors=vectors, cache=False)
    for name, s in ll.spectra(patch_vit, vectors=vectors, device=device, cache=False).items():
        assert s.singular_values.device.type == "cpu"
        torch.testing.assert_close(s.singular_values, expected[name].singular_values)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("vectors", [True, [ll.Window.middle(8)]], ids=["all", "a window"])
def test_the_default_dtype_changes_nothing(default, vectors, patch_vit):
    expected = ll.spectra(patch_vit, vectors=vectors, cache=False)
    torch.set_default_dtype(default)  # as those do who build large models
    try:
        found = ll.spectra(patch_vit, vectors=vectors, cache=False)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, s in found.items():
        assert torch.equal(s.singular_values, expected[name].singular_values)
        for basis, same in ((s.left, expected[name].left), (s.right, expected[name].right)):
            assert basis.dtype == torch.float32 and torch.equal(basis, same)


def test_windows_need_vectors(patch_vit):
    with pytest.raises(ValueError, match="has no singular vectors"):
        ll.attach(patch_vit, ll.Window.first(4), spectra=ll.spectra(patch_vit, vectors=False))


def test_a_large_weight_is_factorized_once_and_then_found_on_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_LENS_CACHE", str(tmp_path))
    model = nn.Sequential(nn.Linear(300, 280), nn.ReLU(), nn.Linear(280, 20))
    first = ll.spectra(model)
    (entry,) = tmp_path.iterdir()  # the small one is not worth a file
    written = entry.stat().st_ino
    second = ll.spectra(model)
    assert entry.stat().st_ino == written
    for name, s in first.items():
        assert torch.equal(s.singular_values, second[name].singular_values)
        assert torch.equal(s.left, second[name].left) and torch.equal(s.right, second[name].right)
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    assert not torch.equal(ll.spectra(model)["0"].left, first["0"].left)
    assert len(list(tmp_path.iterdir())) == 2


def test_the_cache_can_be_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_LENS_CACHE", str(tmp_path))
    ll.spectra(nn.Sequential(nn.Linear(300, 280)), cache=False)
    assert not list(tmp_path.iterdir())


def test_vectors_by_weight_are_those_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 280), nn.ReLU(), nn.Linear(280, 270))
    found = ll.spectra(model, vectors={"0": [ll.Window.middle(8)]}, cache=False)
    assert found["0"].components.tolist() == list(range(136, 144))
    assert found["2"].left is None and found["2"].k == 270


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"vectors": None}, TypeError, "vectors must be True, False or windows"),
        ({"vectors": 3}, TypeError, "vectors must be True, False or windows"),
        ({"vectors": [3]}, TypeError, "vectors must be windows or other placements"),
        ({"vectors": []}, ValueError, "vectors is empty: give False"),
        ({"vectors": {"00": [ll.Window.first(1)]}}, ValueError, "vectors names '00', .*; did you mean '0'"),
        ({"split_qkv": "yes"}, TypeError, "split_qkv must be True or False"),
        ({"progress": 1}, TypeError, "progress must be True or False"),
        ({"cache": "x"}, TypeError, "cache must be True or False"),
        ({"device": "gpu"}, ValueError, "device must be one that torch has here, such as 'cpu', not 'gpu'"),
        ({"device": "meta"}, ValueError, "device must be one that computes"),
    ],
)
def test_settings_of_other_types_are_refused_by_name(settings, kind, message):
    with pytest.raises(kind, match=message):
        ll.spectra(nn.Sequential(nn.Linear(4, 3)), **settings)


def test_one_window_counts_as_a_list_of_one_and_a_set_has_each_weight_once():
    model, window = nn.Sequential(nn.Linear(4, 3)), ll.Window.first(2)
    (one,), (several,) = (ll.spectra(model, vectors=given).values() for given in (window, [window]))
    assert torch.equal(one.left, several.left)
    with pytest.raises(ValueError, match="two spectra are of one weight, 0"):
        ll.SpectrumSet([one, several])
    with pytest.raises(TypeError, match="window must be a window or other placement"):
        one.energy(3)
