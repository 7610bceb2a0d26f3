from __future__ import annotations

import pytest
import torch

import lora_lens as ll
from lora_lens.adapters import PeftMethod
from lora_lens.experiments.continual.strategies import (
    Continued,
    Joint,
    Merged,
    Moving,
    Separate,
    Slot,
    Strategy,
)
from lora_lens.training import EWC, L2ToInitial, Orthogonal, Regularized, Replay


def test_strategies_are_plain_values_with_a_name():
    named = {
        "continued": Continued(),
        "continued, EWC 100": Continued(EWC(100)),
        "continued, EWC 100, 20 examples": Continued(EWC(100, examples=20)),
        "continued, replay 200": Continued(Replay(200)),
        "merged": Merged(),
        "merged, O-LoRA 0.5": Merged(Orthogonal(0.5)),
        "moving": Moving(),
        "separate": Separate(),
        "joint": Joint(),
    }
    assert [str(strategy) for strategy in named.values()] == list(named)
    assert all(isinstance(strategy, Strategy) for strategy in named.values())
    assert len(set(named.values())) == len(named) and Merged(Replay(5)) == Merged(Replay(5))


def test_a_regularizer_must_fit_the_strategy():
    with pytest.raises(TypeError, match=r"has one adapter for all; use Merged\(Orthogonal"):
        Continued(Orthogonal(1))
    with pytest.raises(TypeError, match=r"gives every task new ones; use Continued\(EWC"):
        Merged(EWC(1))
    for strategy in (Continued, Merged):
        for wrong in (200, "replay", Replay):
            with pytest.raises(TypeError, match=r"regularizer must be one such as Replay\(200\)"):
                strategy(wrong)


@pytest.mark.parametrize("position", [0, 0.3, 0.5, 1])
@pytest.mark.parametrize(("rank", "k"), [(4, 32), (5, 32), (8, 192)])
def test_slots_share_nothing_until_the_spectrum_is_used_up(position, rank, k):
    values, count = torch.ones(k), k // rank
    slots = [Slot(rank, position, shift).select(values) for shift in range(count)]
    covered = [i for slot in slots for i in range(slot.start, slot.stop)]
    assert sorted(covered) == list(range(count * rank)) and all(s.stop - s.start == rank for s in slots)
    starts = [slot.start for slot in slots]
    turn = starts.index(0)
    assert starts[turn:] + starts[:turn] == list(range(0, count * rank, rank))  # in a circle
    assert starts[0] == pytest.approx(position * (count - 1) * rank, abs=rank / 2)
    with pytest.raises(
        ValueError, match=f"which is {count} slots of rank {rank}, and task {count + 1} needs"
    ):
        Slot(rank, position, count).select(values, "a weight")


def test_the_first_slots_are_the_named_windows():
    values = torch.ones(32)
    for place in (0, 1):
        window = ll.Window(rank=4, position=place)
        assert Slot(4, place, 0).select(values) == window.select(values, "a weight")
    assert Slot(4, 1, 1).select(values) == slice(0, 4)  # past the last, from the largest on
    with pytest.raises(ValueError, match="rank 33 does not fit a weight: its spectrum has 32"):
        Slot(33, 0, 0).select(values, "a weight")
    with pytest.raises((TypeError, ValueError)):
        Slot(1.5, 0, 0)
    assert str(Slot(4, 0.5, 2)) == "slot of rank 4, 2 behind position 0.5"


def test_only_moving_changes_what_a_task_trains():
    window = ll.Window.middle(4)
    held = Regularized(window, L2ToInitial(1))
    for strategy in (Continued(), Merged(Replay(3)), Separate(), Joint()):
        for method in (window, held, ll.LoRA(4), ll.FullFineTuning()):
            strategy.require_method(method)
            assert strategy.method_at(method, 3) is method
    assert Moving().method_at(window, 3) == Slot(4, 0.5, 3)
    assert Moving().method_at(held, 2) == Regularized(Slot(4, 0.5, 2), L2ToInitial(1))


def test_methods_that_cannot_be_chained_are_refused():
    Moving().require_method(ll.Window.last(4))
    for method in (ll.Window(rank=4, start=3), ll.LoRA(4), ll.FullFineTuning()):
        with pytest.raises(TypeError, match="Moving moves a window with a position, not"):
            Moving().require_method(method)
    for method in (ll.LinearProbe(), PeftMethod("eva", 4), {"all-mlp": ll.Window.first(4)}):
        with pytest.raises(TypeError, match="is learnt by windows, LoRA, FullFineTuning, PEFT's"):
            Merged().require_method(method)
    Merged(Orthogonal(1)).require_method(Regularized(ll.LoRA(4), L2ToInitial(1)))
    with pytest.raises(TypeError, match=r"starts from given components: use LoRA\(rank\)"):
        Merged(Orthogonal(1)).require_method(ll.Window.middle(4))
