from __future__ import annotations

import pytest
import torch
from peft import (
    AdaLoraConfig,
    C3AConfig,
    FourierFTConfig,
    HRAConfig,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    OSFConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    ShiraConfig,
    VeraConfig,
)
from peft.tuners.lora.config import KasaConfig

import lora_lens as ll
from lora_lens.forgetting.weight_drift import merged_copy
from lora_lens.spectrum.layer_weights import weight_matrix

SOME = "blocks.[05].*"
SHORT = {"steps": 4, "batch_size": 16, "evaluations": 2, "lr": 1e-2, "progress": False}
FEW = {name: value for name, value in SHORT.items() if name != "lr"}
CONFIGS = [
    OFTConfig(oft_block_size=8),
    OSFConfig(),
    ShiraConfig(r=4),
    HRAConfig(r=4),
    VeraConfig(r=256),
    LoHaConfig(r=2),
    LoraConfig(r=4, init_lora_weights="gaussian"),
]


@pytest.fixture(scope="module")
def tasks(source, digits) -> tuple[ll.Task, ll.Task]:
    return digits.first(100, 20), source.first(100, 20)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.peft_type.value)
def test_a_config_trains_exactly_the_targets_from_the_pretrained_function(config, model, tasks, source):
    images, before = source.test.inputs[:50], {n: p.clone() for n, p in model.named_parameters()}
    adapted = ll.attach(model, ll.PeftMethod(config), targets=SOME, seed=1)
    assert ll.function_error(adapted, model, images) < 1e-3
    run = ll.finetune(adapted, *tasks, **SHORT)
    assert ll.function_error(adapted, model, images) > 1e-3 and not run.diverged
    assert run.retained_before == ll.evaluate(model, tasks[1]).accuracy
    merged = merged_copy(adapted)
    assert ll.function_error(merged, adapted, images) < 1e-4
    planned = set(ll.spectrum.target_layers(model, SOME))
    for name, layer in ll.spectrum.target_layers(model).items():
        change = weight_matrix(merged.get_submodule(name)) - weight_matrix(layer)
        assert bool(change.abs().max() > 1e-5) == (name in planned)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_configs_stand_in_a_grid_with_their_drift(model, tasks, spectra, tmp_path):
    methods = [ll.PeftMethod(OFTConfig(oft_block_size=8)), ll.PeftMethod(ShiraConfig(r=2)), ll.LoRA(2)]
    settings = {"model": model, "task": tasks[0], "retain": tasks[1], "targets": SOME, "spectra": spectra}
    found = ll.sweep(ll.Grid(baselines=methods, lr=1e-2), **settings, **FEW, store=tmp_path, jobs=1)
    table = found.table
    assert table["method"].tolist()[:2] == ["PEFT's OFT, oft_block_size=8", "PEFT's SHIRA, r=2"]
    assert not table["failed"].any() and table["retained_before"].nunique() == 1
    drifts = found.drifts().groupby("run")["relative"].mean()
    assert len(drifts) == 3 and (drifts > 0).all()
    again = ll.sweep(ll.Grid(baselines=methods, lr=1e-2), **settings, **FEW, store=tmp_path, jobs=1)
    assert again.table.equals(table)


def test_what_starts_elsewhere_is_warned_of_and_forgets_from_the_pretrained_model(model, tasks):
    damaging = ll.PeftMethod(FourierFTConfig())
    with pytest.warns(UserWarning, match=r"changes blocks.* before the first step \(by"):
        adapted = ll.attach(model, damaging, targets=SOME)
    assert adapted.start_change > 0.1
    pretrained = ll.evaluate(model, tasks[1])
    damaged = ll.finetune(adapted, *tasks, **SHORT)
    assert damaged.retained_before < pretrained.accuracy - 0.1
    with pytest.warns(UserWarning, match="before the first step"):
        again = ll.attach(model, damaging, targets=SOME)
    run = ll.finetune(again, *tasks, before=ll.training.Before(retain=pretrained), **SHORT)
    assert run.retained_before == pretrained.accuracy and run.items["before"].equals(
        ll.finetune(ll.attach(model, ll.LoRA(2)), *tasks, **SHORT).items["before"]
    )
    assert run.retained_accuracy == damaged.retained_accuracy
    kasa = ll.PeftMethod(LoraConfig(r=4, kasa_config=KasaConfig()))
    with pytest.warns(UserWarning, match="before the first step"):
        table = ll.sweep(
            ll.Grid(baselines=[kasa, damaging, ll.LoRA(2)], lr=1e-2),
            **{"model": model, "task": tasks[0], "retain": tasks[1], "targets": SOME, "jobs": 1} | FEW,
        ).table
    assert table["retained_before"].tolist() == [pretrained.accuracy] * 3


def test_equal_settings_are_one_method_and_others_another():
    one, other = (ll.PeftMethod(OFTConfig(oft_block_size=size)) for size in (8, 4))
    assert one == ll.PeftMethod(OFTConfig(oft_block_size=8)) and hash(one) != hash(other) and one != other
    assert ll.PeftMethod("pissa", 4) != ll.PeftMethod("olora", 4) and ll.PeftMethod("pissa", 4).rank == 4
    assert ll.PeftMethod(ShiraConfig(r=3)).rank == 3 and one.rank is None
    with pytest.raises(ValueError, match="the same value twice"):
        ll.Grid(baselines=[one, ll.PeftMethod(OFTConfig(oft_block_size=8))])
    config = OFTConfig(oft_block_size=8)
    kept = ll.PeftMethod(config)
    config.oft_block_size = 4
    assert kept == one


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ll.PeftMethod("lora", 8), ValueError, "must be one of 'pissa', .* not 'lora'"),
        (lambda: ll.PeftMethod("pissa"), TypeError, "rank must be a whole number, not None"),
        (lambda: ll.PeftMethod("orthogonal", 3), ValueError, "needs an even rank, not 3"),
        (lambda: ll.PeftMethod(3, 8), TypeError, "or a config of PEFT's, not 3"),
        (lambda: ll.PeftMethod(OFTConfig(), 8), ValueError, "the rank is in the config"),
        (lambda: ll.PeftMethod(OFTConfig(target_modules=["fc1"])), ValueError, "names its own layers"),
        (lambda: ll.PeftMethod(LoraConfig(inference_mode=True)), ValueError, "is for inference"),
        (lambda: ll.PeftMethod(PromptTuningConfig()), ValueError, "PROMPT_TUNING trains no weights"),
        (lambda: ll.PeftMethod(PrefixTuningConfig()), ValueError, "PREFIX_TUNING trains no weights"),
        (lambda: ll.PeftMethod(AdaLoraConfig(total_step=9)), ValueError, "which finetune does not make"),
    ],
)
def test_what_has_no_place_beside_windows_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (C3AConfig(block_size=7), {}, "PEFT cannot put .*C3A"),
        (OFTConfig(), {"variant": ll.Variant(dora=True)}, "takes no variant, not dora"),
        (OFTConfig(), {"alpha": 4}, "from its config, and no alpha"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(config, settings, message, model):
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        ll.attach(model, ll.PeftMethod(config), targets=SOME, **settings)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    adapted = ll.attach(model, ll.PeftMethod(FourierFTConfig(init_weights=True)), targets=SOME)
    with pytest.raises(ValueError, match="config of PEFT's, use PEFT's own"):
        ll.summary(adapted)
