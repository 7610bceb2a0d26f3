from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

import lora_lens as ll
from lora_lens.spectrum.placement import (
    AfterEnergy,
    AtEffectiveRank,
    ByLayer,
    Components,
    HoldingEnergy,
    RandomComponents,
    SpreadComponents,
)
from lora_lens.spectrum.window import Placement

EVERY = (
    AtEffectiveRank(4),
    AfterEnergy(4, 0.9),
    HoldingEnergy(4, 0.01),
    Components((0, 3, 5, 11)),
    RandomComponents(4, seed=1),
    SpreadComponents(4),
)


@given(
    values=st.lists(st.floats(1e-3, 1e3), min_size=4, max_size=60),
    rank=st.integers(1, 4),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 5),
)
@settings(deadline=None)
def test_every_rule_gives_as_many_different_components_as_its_rank(values, rank, share, seed):
    s = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    for rule in (
        AtEffectiveRank(rank),
        AfterEnergy(rank, share),
        RandomComponents(rank, seed),
        SpreadComponents(rank),
    ):
        chosen = torch.arange(len(s))[rule.select(s, "w")]
        assert len(chosen) == rank and (chosen.diff() > 0).all()


def test_rules_read_the_spectrum():
    s = torch.tensor([2.0, 2.0, 2.0, 2.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    assert AtEffectiveRank(2).select(s) == slice(4, 6)  # four equal values have the effective rank 4
    assert AfterEnergy(2, 0.5).select(s) == slice(2, 4)  # two of four hold one half
    assert AfterEnergy(2, 0.51).select(s) == slice(3, 5)
    assert AfterEnergy(4, 0.99).select(s) == slice(4, 8)
    assert AtEffectiveRank(6).select(s) == slice(2, 8)  # moved up until it fits
    assert HoldingEnergy(2, 0.5).select(s) == slice(2, 4)
    assert HoldingEnergy(2, 0.25).select(s) == slice(3, 5)


def test_a_share_that_no_window_holds_names_the_weight_and_what_there_is():
    s = torch.ones(10, dtype=torch.float64)
    with pytest.raises(
        ValueError, match=r"no window of rank 2 holds 0.5 of the energy of fc: the first.*0.2"
    ):
        HoldingEnergy(2, 0.5).select(s, "fc")


def test_random_components_depend_on_seed_and_name_alone():
    s = torch.ones(50, dtype=torch.float64)
    one, same, seed, name = (
        RandomComponents(8, 0).select(s, "a"),
        RandomComponents(8, 0).select(s * 3, "a"),
        RandomComponents(8, 1).select(s, "a"),
        RandomComponents(8, 0).select(s, "b"),
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, seed) and not torch.equal(one, name)


def test_spread_components_reach_from_the_first_to_the_last():
    assert SpreadComponents(5).select(torch.ones(9)).tolist() == [0, 2, 4, 6, 8]
    assert SpreadComponents(1).select(torch.ones(9)).tolist() == [0]


@pytest.mark.parametrize("rule", EVERY, ids=str)
def test_every_rule_leaves_the_function_as_it_is(rule, model, source, spectra):
    adapted = ll.attach(model, rule, spectra=spectra)
    assert ll.function_error(adapted, model, source.test.inputs[:64]) < 1e-5
    for name, start in adapted.attachment.starts.items():
        assert torch.equal(start.components, spectra[name].components_of(rule))
        piece = adapted.base_model.model.get_submodule(name).get_delta_weight("default")
        torch.testing.assert_close(piece, spectra[name].component(rule), atol=1e-5, rtol=0)


def test_vectors_of_rules_alone_are_those_of_all():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 280), nn.ReLU(), nn.Linear(280, 270))
    few, every = ll.spectra(model, vectors=EVERY, cache=False), ll.spectra(model, cache=False)
    for name in every:
        assert len(few[name].components) < every[name].k / 3
        for rule in EVERY:
            torch.testing.assert_close(
                few[name].component(rule), every[name].component(rule), atol=1e-6, rtol=0
            )
    with pytest.raises(ValueError, match="holds vectors for other components than 0, 1, 9"):
        few["0"].vectors(Components((0, 1, 9)))


def test_a_placement_per_kind_of_layer(model, source, spectra):
    rules = {
        "all-attention": ll.Window.middle(8),
        "mlp.fc1": AtEffectiveRank(4),
        "all-mlp": ll.Window.last(2),
    }
    adapted = ll.attach(model, rules, spectra=spectra)
    table = ll.summary(adapted)
    ranks = table.groupby("kind")["rank"].unique().map(list).to_dict()
    assert ranks == {"attn.qkv": [8], "attn.proj": [8], "mlp.fc1": [4], "mlp.fc2": [2]}
    assert (table["last"] - table["first"] + 1 == table["rank"]).all()
    assert set(table.query("kind == 'mlp.fc2'")["last"]) == {95}
    assert (table["scaling"] == 1).all()
    assert ll.function_error(adapted, model, source.test.inputs[:64]) < 1e-5
    alone = ll.attach(model, rules, spectra=spectra, targets="blocks.0.*", alpha=16)
    assert set(alone.attachment.starts) == {n for n in spectra if n.startswith("blocks.0.")}
    assert set(ll.summary(alone)["scaling"]) == {2, 4, 8}


def test_ranks_that_belong_to_a_name_do_not_reach_names_that_end_like_it():
    torch.manual_seed(0)
    inner = nn.Sequential()
    inner.add_module("fc", nn.Linear(8, 8))
    model = nn.Sequential()
    model.add_module("a", inner)
    model.add_module("fc", nn.Linear(8, 8))
    adapted = ll.attach(model, {"a.fc": ll.Window.middle(3), "fc": ll.Window.middle(2)})
    assert dict(zip(*ll.summary(adapted)[["layer", "rank"]].T.values, strict=True)) == {"a.fc": 3, "fc": 2}
    only = ll.attach(model, ll.Window.middle(2), targets="a.fc")
    assert list(only.attachment.starts) == ["a.fc"]
    # a pattern cannot tell them apart, but the chosen layer can
    outer = nn.Sequential(model.fc)
    outer.add_module("b", nn.Sequential(nn.Linear(8, 8)))
    first = ll.attach(outer, {"b.0": ll.Window.middle(2)})
    assert list(first.attachment.starts) == ["b.0"]


def test_a_rule_of_one_s_own(model, spectra):
    @dataclass(frozen=True)
    class SecondThird(Placement):
        rank: int

        def select(self, singular_values, name="this weight"):
            return slice(len(singular_values) // 3, len(singular_values) // 3 + self.rank)

    table = ll.summary(ll.attach(model, SecondThird(4), spectra=spectra))
    assert set(table["first"]) == {32}


def test_what_makes_no_placement_is_refused(model, spectra):
    with pytest.raises(ValueError, match=r"different whole numbers of at least 0, not \(1, 1\)"):
        Components((1, 1))
    with pytest.raises(ValueError, match="different whole numbers"):
        Components(())
    with pytest.raises(TypeError):
        Components((0.5,))
    with pytest.raises(ValueError, match="share of the energy must be in"):
        AfterEnergy(4, 1.0)
    with pytest.raises(ValueError, match="rank must be at least 1, not 0"):
        AtEffectiveRank(0)
    with pytest.raises(TypeError, match="expected a window or another placement for 'qkv', not 8"):
        ll.attach(model, {"qkv": 8}, spectra=spectra)
    with pytest.raises(ValueError, match="no placements"):
        ll.attach(model, {}, spectra=spectra)
    with pytest.raises(ValueError, match=r"component 99 does not fit blocks.0.attn.qkv: its spectrum has 96"):
        ll.attach(model, Components((1, 99)), spectra=spectra)
    with pytest.raises(ValueError, match="'nothing' matches no module"):
        ll.attach(model, {"nothing": ll.Window.middle(4)}, spectra=spectra)
    with pytest.raises(ValueError, match="no layer that targets='qkv' selects has a placement: all-mlp"):
        ll.attach(model, {"all-mlp": ll.Window.middle(4)}, spectra=spectra, targets="qkv")


def test_a_mapping_is_a_value():
    one, same = (ByLayer({"qkv": ll.Window.middle(4)}) for _ in range(2))
    assert one == same and hash(one) == hash(same)
    assert one != ByLayer({"qkv": ll.Window.middle(5)})
    assert str(one) == "qkv: window of rank 4 at position 0.5"


def test_a_sweep_runs_other_placements_beside_windows(patch_vit, digits, source):
    task, retain = digits.first(64, 20), source.first(1, 20)
    both = {"all-attention": ll.Window.middle(2), "all-mlp": ll.Window.last(2)}
    grid = ll.Grid(window=[ll.Window.middle(2)], baselines=[RandomComponents(2), both])
    table = ll.sweep(
        grid,
        model=patch_vit,
        task=task,
        retain=retain,
        steps=2,
        evaluations=2,
        jobs=1,
        progress=False,
        variant=ll.Variant(split="A"),
    ).table
    assert table["method"].tolist() == ["window", "2 random components, seed 0", str(ByLayer(both))]
    assert table["trainable"].nunique() == 1
    assert set(table["variant"]) == {"S in A"}


def test_the_summary_s_energy_is_that_of_the_spectrum(model, spectra):
    for alpha in (None, 32):
        table = ll.summary(ll.attach(model, ll.Window(8, position=0.1), spectra=spectra, alpha=alpha))
        expected = spectra.table(ll.Window(8, position=0.1)).set_index("layer")["energy"]
        assert table.set_index("layer")["energy"].to_dict() == pytest.approx(expected.to_dict(), rel=1e-4)


@pytest.mark.parametrize(
    ("found", "error", "message"),
    [
        (
            [0, 0, 1, 2],
            ValueError,
            r"Own\(.* must select 4 different components of 0, in ",
        ),
        (torch.tensor([3, 2, 1, 0]), ValueError, "in ascending order, of 0 to 11"),
        ([0, 1, 2, 12], ValueError, "of 0 to 11"),
        ([-1, 0, 1, 2], ValueError, "of 0 to 11"),
        (slice(0, 3), ValueError, "must select 4"),
        (slice(10, 14), ValueError, "must select 4"),
        (torch.arange(12) < 4, TypeError, "each component that .* must be a whole number, not True"),
        (None, TypeError, "what .* selects must be a sequence of whole numbers"),
    ],
)
def test_a_rule_of_your_own_must_select_what_it_says(found, error, message):
    @dataclass(frozen=True)
    class Own(Placement):
        rank: int = 4

        def select(self, singular_values, name="this weight"):
            return found

    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 2))
    spectra = ll.spectra(model, "all-linear", progress=False)
    with pytest.raises(error, match=message):
        ll.attach(model, Own(), targets="0", spectra=spectra)
    with pytest.raises(error, match=message):
        ll.attach(model, Own(), targets="0")
