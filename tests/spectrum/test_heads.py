from __future__ import annotations

import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn

import lora_lens as ll
from lora_lens.spectrum.adaptable_layers import target_layers
from lora_lens.spectrum.heads import classifier, head_layers
from lora_lens.spectrum.sources.matrices import weights


def language(kind: str, head: str = "ForSequenceClassification", **settings: object) -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = getattr(transformers, f"{kind}Config")
    return getattr(transformers, kind + head)(config(**sizes | {"vocab_size": 99} | settings))


def vision(name: str) -> nn.Module:
    return getattr(torchvision.models, name)(num_classes=7)


def clip() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    seeing = sizes | {"image_size": 32, "patch_size": 16}
    config = transformers.CLIPConfig(text_config=sizes | {"vocab_size": 99}, vision_config=seeing)
    return transformers.CLIPModel(config)


def own(head: nn.Module) -> nn.Module:
    model = nn.Module()
    model.body, model.head = nn.Linear(4, 4), head
    return model


DISTIL = {"dim": 32, "hidden_dim": 48, "n_layers": 1, "n_heads": 2}
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2}
BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}


def tiny(name: str, **size: object) -> nn.Module:
    with torch.device("cpu"):  # timm before 1.0.21 cannot build these two on the meta device
        return timm.create_model(name, **size)


@pytest.mark.parametrize(
    ("build", "last", "others"),
    [
        (lambda: vision("vit_b_32"), "heads.head", []),
        (lambda: vision("swin_t"), "head", []),
        (lambda: vision("resnet18"), "fc", []),
        (lambda: vision("convnext_tiny"), "classifier.2", []),
        (lambda: vision("mobilenet_v3_small"), "classifier.3", []),
        (lambda: language("Bert"), "classifier", []),
        (lambda: language("Bert", "ForTokenClassification"), "classifier", []),
        (lambda: language("Bert", "ForQuestionAnswering"), "qa_outputs", []),
        (lambda: language("Roberta"), "classifier.out_proj", ["classifier.dense"]),
        (lambda: language("Electra", embedding_size=32), "classifier.out_proj", ["classifier.dense"]),
        (lambda: language("DebertaV2"), "classifier", ["pooler.dense"]),
        (lambda: language("DistilBert", **DISTIL), "classifier", ["pre_classifier"]),
        (lambda: language("GPT2"), "score", []),
        (lambda: language("Llama"), "score", []),
        (lambda: language("Llama", "ForCausalLM"), "lm_head", []),
        (lambda: language("T5", **T5), "classification_head.out_proj", ["classification_head.dense"]),
        (lambda: language("Bart", **BART), "classification_head.out_proj", ["classification_head.dense"]),
        (lambda: language("ViT", "ForImageClassification", image_size=32), "classifier", []),
        (lambda: tiny("deit_tiny_distilled_patch16_224", depth=1), "head", ["head_dist"]),
        (lambda: tiny("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8)), "head.fc", []),
        (lambda: own(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3))), "head.1", []),
        (clip, None, []),
    ],
)
def test_heads_are_found_and_left_out(build, last, others):
    with torch.device("meta"):
        model = build()
    names = {id(module): name for name, module in model.named_modules()}
    found = classifier(model, required=False)
    assert (None if found is None else names[id(found)]) == last
    expected = {last, *others} - {None}
    assert {names[id(module)] for module in head_layers(model)} == expected
    usual = [w.name for w in weights(_with_values(model))] if _has_linear(model) else []
    assert not expected & set(usual)


def _has_linear(model: nn.Module) -> bool:
    return not isinstance(model, torchvision.models.ResNet) and "ConvNeXt" not in type(model).__name__


def _with_values(model: nn.Module) -> nn.Module:
    return model.to_empty(device="cpu")


def test_projections_of_clip_are_pretrained_and_stay():
    found = target_layers(clip())
    assert {"visual_projection", "text_projection"} <= set(found)


def test_the_transform_of_a_masked_language_model_is_pretrained_and_stays():
    found = target_layers(language("Bert", "ForMaskedLM"))
    assert "cls.predictions.transform.dense" in found and "cls.predictions.decoder" not in found


def test_a_model_without_a_classifier_is_refused():
    with pytest.raises(ValueError, match="Sequential has no linear classifier"):
        classifier(nn.Sequential(nn.Linear(2, 2)))


def test_torchvision_s_vit_is_finetuned_on_what_its_head_reads():
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(32, 8, 1, 2, 32, 64, num_classes=5)
    examples = ll.Examples(torch.randn(20, 3, 32, 32), torch.arange(20) % 4)
    task = ll.Task("four", tuple("abcd"), examples, examples)
    with pytest.warns(UserWarning, match="self_attention.out_proj: is bypassed"):
        adapted = ll.attach(model, ll.Window.middle(4))
    assert [name[-5:] for name in ll.summary(adapted)["layer"]] == ["mlp.0", "mlp.3"]
    run = ll.finetune(adapted, task, steps=2, batch_size=4, evaluations=2, progress=False)
    assert run.head.in_features == 32 and run.head.out_features == 4
