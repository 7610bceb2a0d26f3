from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings, strategies as st
from peft import LoraConfig
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from sklearn.covariance import ledoit_wolf
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_lens as ll
from lora_lens.spectrum import Metric
from lora_lens.spectrum.layer_inputs import input_metrics
from lora_lens.spectrum.spectrum import require_plain

WINDOWS = [ll.Window.first(3), ll.Window.middle(3), ll.Window.last(3)]


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uneven(count: int, size: int, seed: int = 0) -> torch.Tensor:
    """Inputs whose directions differ by a factor of 30 in size, mixed."""
    return (
        numbers(count, size, seed=seed) * torch.logspace(0, 1.5, size) @ numbers(size, size, seed=9)
    ).float()


def layer(out: int, inputs: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, out))


def in_metric(model: nn.Module, metric: object, name: str = "0") -> ll.Spectrum:
    return ll.spectra(model, name, metric=metric, progress=False)[name]


def dense(weight: torch.Tensor, moment: torch.Tensor, power: float):
    """U, S and V^T C^-p by the definition, all in float64 and without a shortcut."""
    values, vectors = np.linalg.eigh(moment.numpy())
    root, inverse = (vectors * values**p @ vectors.T for p in (power, -power))
    u, s, v = np.linalg.svd(weight.double().numpy() @ root, full_matrices=False)
    return u, s, v @ inverse


@pytest.mark.parametrize("power", [0.5, 1.0, -0.5, 0.0])
@pytest.mark.parametrize("shape", [(12, 8), (8, 8), (8, 12)])
def test_it_is_the_decomposition_by_the_definition(shape, power):
    model, x = layer(*shape), uneven(60, shape[1])
    found = in_metric(model, Metric(x, power=power, shrinkage=0.1))
    second = x.double().T @ x.double()
    moment = 0.9 * second / second.trace() * shape[1] + 0.1 * torch.eye(shape[1], dtype=torch.float64)
    u, s, right = dense(model[0].weight.detach(), moment, power)
    np.testing.assert_allclose(found.singular_values, s, rtol=1e-9)
    for window in WINDOWS:
        part = window.slice(found.k)
        expected = u[:, part] * s[part] @ right[part]
        np.testing.assert_allclose(found.component(window), expected, atol=2e-5)
    gram = found.left.T @ found.left
    assert (gram - torch.eye(found.k)).abs().max() < 1e-5
    alone = ll.spectra(model, metric=Metric(x, power=power, shrinkage=0.1), vectors=False, progress=False)[
        "0"
    ]
    np.testing.assert_allclose(alone.singular_values, s, rtol=1e-6)
    assert alone.left is None and alone.metric == found.metric


class Kinds(nn.Module):
    """A convolution of each sort, GPT-2's layer and linear ones, one of low rank and one with dead inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.strided, self.even = nn.Conv2d(2, 6, 3, stride=2, padding=1), nn.Conv2d(6, 5, 2, padding="same")
        self.one, self.three = nn.Conv1d(5, 7, 3, padding=2), nn.Conv3d(1, 4, (1, 2, 2))
        self.gpt2, self.dead, self.low = Conv1D(12, 7), nn.Linear(12, 20), nn.Linear(20, 9)
        with torch.no_grad():
            self.low.weight.copy_(torch.randn(9, 2) @ torch.randn(2, 20))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        images = self.even(self.strided(x))
        self.three(images[:, None])
        tokens = self.gpt2(self.one(images.flatten(2)).mT.contiguous())
        return self.low(torch.tanh(self.dead(tokens * (torch.arange(12) < 9))))


@pytest.fixture(scope="module")
def kinds() -> tuple[Kinds, torch.Tensor]:
    torch.manual_seed(0)
    return Kinds(), torch.randn(9, 2, 7, 7)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("metric", [{}, {"power": 1}, {"shrinkage": 1e-4}, {"power": -0.5}])
def test_all_components_sum_to_the_weight_for_every_kind_of_layer(metric, kinds):
    model, images = kinds
    names = [name for name, _ in model.named_children()]
    for name, spectrum in ll.spectra(model, names, metric=Metric(images, **metric), progress=False).items():
        weight = getattr(model, name).weight.detach()
        weight = weight.T if name == "gpt2" else weight.flatten(1)
        whole = spectrum.component(ll.Window(spectrum.k, start=0))
        assert torch.linalg.norm(whole - weight) < 3e-6 * torch.linalg.norm(weight), name
        a = spectrum.singular_values.sqrt()[:, None] * spectrum.right
        assert a.isfinite().all() and a.abs().max() < 100


def test_the_values_are_those_of_the_layer_s_outputs(kinds):
    """Of power 1/2 without shrinkage, s^2 is the outputs' mean square along u, in units of the inputs'."""
    model, images = kinds
    for name in ("strided", "one"):
        given: list[torch.Tensor] = []
        hook = getattr(model, name).register_forward_hook(lambda _m, x, y, given=given: given.extend([*x, y]))
        model(images)
        hook.remove()
        found, module = in_metric(model, Metric(images, shrinkage=0.0), name), getattr(model, name)
        outputs = (given[1] - module.bias.reshape(-1, *[1] * (given[1].ndim - 2))).transpose(0, 1).flatten(1)
        along = (found.left.T @ outputs).square().mean(1).double()
        shares = found.singular_values.square() / found.singular_values.square().sum()
        torch.testing.assert_close(along / along.sum(), shares, rtol=1e-4, atol=1e-7)


@settings(max_examples=10)
@given(st.integers(2, 40), st.integers(1, 12), st.integers(0, 1000))
def test_shrinkage_is_ledoit_and_wolf_s(count, size, seed):
    x = uneven(count, size, seed)
    _, expected = ledoit_wolf(x.double().numpy(), assume_centered=True)
    assert in_metric(layer(3, size), x).shrinkage == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_positions_of_one_example_are_one_observation():
    x, model = uneven(6, 8), layer(4, 8)
    once, often = in_metric(model, x), in_metric(model, x[:, None].expand(6, 50, 8))
    assert often.shrinkage == pytest.approx(once.shrinkage, rel=1e-6)
    assert in_metric(model, x.repeat(50, 1)).shrinkage < once.shrinkage / 10


def test_white_inputs_and_equal_inputs_give_the_plain_spectrum():
    model, x = layer(6, 8), uneven(50, 8)
    plain = ll.spectra(model, progress=False)["0"]
    white = torch.linalg.qr(numbers(50, 8))[0].float() * 7
    for metric in (white, Metric(x, relative_to=x), Metric(x, shrinkage=1.0), Metric(x, power=0)):
        found = in_metric(model, metric)
        torch.testing.assert_close(found.singular_values, plain.singular_values, rtol=1e-5, atol=0)
        for window in WINDOWS:
            torch.testing.assert_close(found.component(window), plain.component(window), rtol=0, atol=1e-5)


def test_the_scale_of_the_inputs_changes_nothing():
    model, x = layer(6, 8), uneven(50, 8)
    torch.testing.assert_close(
        in_metric(model, 1000 * x).singular_values, in_metric(model, x).singular_values, rtol=1e-5, atol=0
    )


def test_relative_metrics_have_the_generalized_eigenvalues():
    new, retained = uneven(80, 6, seed=1), uneven(80, 6, seed=2)
    metric = Metric(new, relative_to=retained, shrinkage=0.05)
    moment, _ = input_metrics(layer(4, 6), ["0"], metric)["0"]
    (a, _), (b, _) = (
        input_metrics(layer(4, 6), ["0"], Metric(x, shrinkage=0.05))["0"] for x in (new, retained)
    )
    expected = scipy.linalg.eigh(a.numpy(), b.numpy(), eigvals_only=True)
    np.testing.assert_allclose(np.linalg.eigvalsh(moment.numpy()), expected / expected.mean(), rtol=1e-6)


@pytest.mark.parametrize(("mode", "window"), [("kpm", ll.Window.last(3)), ("ipm", ll.Window.first(3))])
def test_of_power_one_it_is_the_start_of_peft_s_corda(mode, window):
    """PEFT divides each call's inputs by their largest entry, so all are given in one call."""
    model, x = layer(10, 8), uneven(60, 8)
    found = ll.spectra(model, metric=Metric(x, power=1, shrinkage=0.01 / 1.01), progress=False)
    ours = ll.attach(model, window, targets="0", spectra=found)
    base = layer(10, 8)
    config = LoraConfig(
        r=3, lora_alpha=3, target_modules=["0"], init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=mode),
    )  # fmt: skip
    preprocess_corda(base, config, run_model=lambda: base[0](x[None]))
    eigens = base[0].eigens
    theirs = eigens.U_WC * eigens.S_WC @ eigens.V_WC.T
    torch.testing.assert_close(found["0"].component(window), theirs, rtol=0, atol=1e-4)
    a = ours.get_parameter("base_model.model.0.lora_A.default.weight").detach()
    for mine, other in ((found["0"].left[:, window.slice(8)], eigens.U_WC), (a.T, eigens.V_WC)):
        angles = scipy.linalg.subspace_angles(mine.double().numpy(), other.double().numpy())
        assert angles.max() < 1e-3


def test_where_inputs_leave_directions_out_the_last_window_reads_from_these_alone_as_lora_null_does():
    """LoRA-Null takes A from the null space N of the inputs, as the right factor of W N N^T."""
    model, x = layer(10, 8), uneven(60, 8)
    kept, null = torch.linalg.qr(numbers(8, 8))[0].float().split([5, 3], dim=1)
    x = x @ kept @ kept.T
    spectra = ll.spectra(model, metric=Metric(x, shrinkage=1e-9), progress=False)
    adapted = ll.attach(model, ll.Window.last(3), targets="0", spectra=spectra)
    a = adapted.get_parameter("base_model.model.0.lora_A.default.weight").detach()
    theirs = torch.linalg.svd(model[0].weight.detach() @ null @ null.T)[2][:3]
    angles = scipy.linalg.subspace_angles(a.T.double().numpy(), theirs.T.double().numpy())
    assert angles.max() < 1e-5
    assert (x @ a.T).abs().max() < 1e-4 * x.abs().max() * a.abs().max()
    assert ll.function_error(adapted, model, x) < 1e-5


def test_it_says_that_it_is_one_and_what_of():
    model, x, y = layer(6, 8), uneven(50, 8), uneven(50, 8, seed=5)
    found = ll.spectra(model, metric=x, progress=False)
    assert found.metric == found["0"].metric == str(Metric(x))
    assert found.metric in repr(found) and found.metric in repr(found["0"])
    others = [
        Metric(y),
        Metric(x, power=1),
        Metric(x, shrinkage=0.1),
        Metric(x, relative_to=y),
        Metric(x[:49]),
    ]
    assert len({str(Metric(x)), *map(str, others)}) == 6
    table = found.table()
    assert table["above_mp"].isna().all() and table["shrinkage"].between(0, 1).all()
    plain = ll.spectra(model, progress=False)
    assert plain.metric is None and "shrinkage" not in plain.table()
    with pytest.raises(ValueError, match="in one metric, not in no metric, metric of 50 inputs"):
        ll.SpectrumSet(
            [plain["0"], ll.Spectrum("1", (6, 8), found["0"].singular_values, metric=found.metric)]
        )


def test_the_data_of_a_task_are_those_of_its_examples(model, source):
    few = source.subset(30, 10)
    metrics = [Metric(few), Metric(few.train), Metric(few.train.inputs)]
    hashes = {str(metric).rpartition(" ")[2] for metric in metrics}
    assert len(hashes) == 1
    values = [in_metric(model, m, "blocks.0.attn.qkv").singular_values for m in metrics]
    torch.testing.assert_close(values[0], values[2])
    assert str(Metric(few, examples=20)) != str(Metric(few))
    assert str(Metric(few)).startswith(f"metric of {source.name} (")


def test_what_needs_plain_spectra_refuses_it_and_subspaces_compare():
    model, x = layer(6, 8), uneven(50, 8)
    plain, found = ll.spectra(model, progress=False)["0"], in_metric(model, x)
    window = ll.Window.first(6)
    assert ll.spectrum.overlap(plain, found, window) == pytest.approx(1, abs=1e-5)
    assert ll.spectrum.overlap(plain, found, window, "right") == pytest.approx(1, abs=1e-5)
    assert 0 < ll.spectrum.overlap(plain, found, ll.Window.first(2), "right") < 0.999
    for refused in (
        lambda: ll.compare(plain, found),
        lambda: ll.spectrum.change(found, plain),
        lambda: ll.spectrum.overlap_matrix(plain, found, 2, "right"),
        lambda: ll.spectrum.intruder_dimensions(plain, found, side="right"),
        lambda: require_plain(found, "this"),
    ):
        with pytest.raises(
            ValueError, match=r"plain spectrum of 0, and this one is in the metric of 50 inputs"
        ):
            refused()
    assert ll.spectrum.overlap_matrix(plain, found, 2).sum() == pytest.approx(2, abs=1e-5)


def test_a_large_weight_s_plain_spectrum_on_disk_is_not_that_in_a_metric(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_LENS_CACHE", str(tmp_path))
    model = layer(256, 256)
    found = in_metric(model, uneven(30, 256))
    plain = ll.spectra(model, progress=False)["0"]
    again, metric = ll.spectra(model, progress=False)["0"], in_metric(model, uneven(30, 256))
    assert len(list(tmp_path.iterdir())) == 1
    assert torch.equal(plain.singular_values, again.singular_values)
    assert torch.equal(found.singular_values, metric.singular_values)
    assert not torch.allclose(found.singular_values, plain.singular_values, rtol=0.01)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ({"data": uneven(3, 8), "shrinkage": 0.0}, "span 3 of its 8 dimensions on these data.*shrinkage"),
        ({"data": uneven(1, 8)}, "one example reached 0, and Ledoit-Wolf shrinkage needs two or more"),
        ({"data": torch.zeros(4, 8)}, "only zeros reach 0"),
        ({"data": torch.full((4, 8), torch.nan)}, "the inputs of 0 hold NaN"),
        ({"data": torch.zeros(4, 7)}, "Sequential does not take these inputs: .*; give the metric data"),
    ],
)  # fmt: skip
def test_inputs_that_are_no_metric_are_refused(metric, message):
    with pytest.raises(ValueError, match=message):
        in_metric(layer(4, 8), Metric(**metric))


def test_a_sum_that_is_not_the_weight_is_refused():
    """Two thirds of the inputs are nearly dead, and the output has more dimensions than they."""
    x = uneven(60, 8) * torch.tensor([1.0] * 3 + [1e-6] * 5)
    with pytest.raises(ValueError, match=r"span 3 of its 8|do not sum to the weight"):
        in_metric(layer(20, 8), Metric(x, power=2, shrinkage=0.0))


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"data": "digits"}, TypeError, "metric must be a task, examples, or a batch"),
        ({"data": nn.Linear(2, 2)}, TypeError, "metric must be a task, examples, or a batch"),
        ({"data": torch.zeros(0, 8)}, ValueError, "metric holds no inputs"),
        ({"data": torch.ones(2, 8), "relative_to": 3}, TypeError, "relative_to must be a task"),
        ({"data": torch.ones(2, 8), "power": 3}, ValueError, r"power must be in \[-2, 2\]"),
        ({"data": torch.ones(2, 8), "shrinkage": "oas"}, ValueError, "must be 'ledoit-wolf' or a share"),
        ({"data": torch.ones(2, 8), "shrinkage": 10}, ValueError, "shrinkage must be a share"),
        ({"data": torch.ones(2, 8), "examples": 0}, ValueError, "examples must be at least 1"),
    ],
)  # fmt: skip
def test_settings_of_other_types_are_refused_by_name(settings, kind, message):
    with pytest.raises(kind, match=message):
        Metric(**settings)
