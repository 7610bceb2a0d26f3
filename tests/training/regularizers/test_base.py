from __future__ import annotations

import pytest

import lora_lens as ll
from lora_lens.adapters import PeftMethod
from lora_lens.training import EWC, KLAnchor, L2ToInitial, Orthogonal, Regularized, Replay


def test_methods_under_a_regularizer_are_plain_values():
    anchored = Regularized(ll.LoRA(8), KLAnchor(1))
    assert str(anchored) == "LoRA of rank 8, KL anchor 1" and anchored.rank == 8
    assert anchored == Regularized(ll.LoRA(8), KLAnchor(1.0)) and hash(anchored) == hash(
        Regularized(ll.LoRA(8), KLAnchor(1.0))
    )
    assert anchored != Regularized(ll.LoRA(8), L2ToInitial(1)) and KLAnchor(1) != L2ToInitial(1)
    assert str(Regularized(ll.FullFineTuning(), L2ToInitial(0.01))) == "full fine-tuning, L2 to initial 0.01"
    assert Regularized(ll.FullFineTuning(), L2ToInitial(1)).rank is None
    assert str(Regularized(PeftMethod("olora", 8), KLAnchor(0.5))) == "PEFT's olora of rank 8, KL anchor 0.5"
    assert len({Regularized({"all-mlp": ll.Window.first(4)}, KLAnchor(1))}) == 1
    with pytest.raises(TypeError, match="expected a method that trains weights"):
        Regularized(ll.LinearProbe(), KLAnchor(1))
    with pytest.raises(TypeError, match="regularizer must be one such as KLAnchor"):
        Regularized(ll.LoRA(8), 1.0)


def test_regularizers_are_plain_values():
    assert [str(m) for m in (EWC(100), EWC(0.5, 30), Orthogonal(0.5), Replay(200))] == [
        "EWC 100",
        "EWC 0.5, 30 examples",
        "O-LoRA 0.5",
        "replay 200",
    ]
    assert EWC(1) == EWC(1.0) and len({Replay(2), Replay(2), Replay(3)}) == 2
    for strength in (-1, float("inf"), float("nan")):
        for regularizer in (EWC, Orthogonal):
            with pytest.raises(ValueError, match="strength must be at least 0 and finite, not"):
                regularizer(strength)
    with pytest.raises(ValueError, match="size must be at least 1, not 0"):
        Replay(0)
    with pytest.raises(ValueError, match="examples must be at least 1, not 0"):
        EWC(1, examples=0)
    for wrong in (lambda: Replay(2.5), lambda: Replay(True), lambda: EWC("1")):
        with pytest.raises(TypeError):
            wrong()


def test_in_a_run_by_itself_ewc_and_replay_guard_the_retained_task(adapt, tasks):
    settings = {"steps": 30, "batch_size": 16, "evaluations": 2, "lr": 5e-2, "progress": False}
    rise = {
        regularizer: ll.finetune(adapt(ll.LoRA(4)), *tasks, regularizer=regularizer, **settings).loss_rise
        for regularizer in (None, EWC(0), EWC(1e5, examples=50), Replay(100))
    }
    assert rise[EWC(0)] == rise[None]
    assert rise[EWC(1e5, examples=50)] < 0.8 * rise[None] and rise[Replay(100)] < 0.8 * rise[None]


def test_what_guards_earlier_tasks_says_what_it_needs(adapt, tasks):
    settings = {"steps": 1, "batch_size": 1, "progress": False}
    for regularizer in (EWC(1), Replay(10)):
        with pytest.raises(ValueError, match="nothing is retained: give finetune retain="):
            ll.finetune(adapt(ll.LoRA(4)), tasks[0], regularizer=regularizer, **settings)
    with pytest.raises(ValueError, match="half of each batch, and batch_size is 1"):
        ll.finetune(adapt(ll.LoRA(4)), *tasks, regularizer=Replay(10), **settings)
    with pytest.raises(ValueError, match="a run by itself has none: give it to the strategy"):
        ll.finetune(adapt(ll.LoRA(4)), *tasks, regularizer=Orthogonal(1), **settings)
