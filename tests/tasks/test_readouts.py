from __future__ import annotations

import pandas as pd
import pytest
import timm
import torch
from peft import PeftModel
from small_language import VOCABULARY, byte_tokenizer, part_of, small
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

import lora_lens as ll
from lora_lens.tasks.readouts import (
    HeadReadout,
    LabelWords,
    NextTokens,
    OwnHead,
    features_of,
    lengths_of,
    logits_of,
    next_token_logits,
    pooled_features,
    real_positions,
)
from lora_lens.tasks.tokens import TokenExamples

LENGTHS = (5, 3, 9, 1)
CAUSAL = ["llama", "gpt2"]
ALL_KINDS = ["bert", "bert classifier", *CAUSAL]


@pytest.fixture(scope="module")
def texts() -> TokenExamples:
    """Four texts of unlike length, in no order of length."""
    tokens = torch.randint(VOCABULARY, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    return TokenExamples(tokens.int(), torch.tensor(LENGTHS), torch.zeros(4, dtype=torch.long), pad=3)


@pytest.fixture(scope="module")
def batch(texts) -> dict[str, torch.Tensor]:
    return texts.batch(torch.arange(4))


def text(texts: TokenExamples, row: int) -> list[int]:
    return texts.batch(torch.tensor([row]))["input_ids"][0].tolist()


def likelihood(model: nn.Module, prompt: list[int], word: list[int]) -> float:
    """log P(word | prompt), token by token, each from a pass of its own without padding."""
    whole, found = list(prompt), 0.0
    for token in word:
        found += float(model(torch.tensor([whole])).logits[0, -1].log_softmax(-1)[token])
        whole.append(token)
    return found


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize(
    "words",
    [[[5], [77]], [[5, 6], [77, 8]], [[5], [77, 8, 9], [120, 4]]],
    ids=["one token", "two tokens", "unlike"],
)
@torch.no_grad()
def test_label_words_are_scored_as_by_hand(kind, words, texts, batch):
    model, labels = small(kind), torch.tensor([0, 1, 1, 0])
    given = {name: tensor.clone() for name, tensor in batch.items()}
    logits, right = LabelWords(words)(model, batch, labels)
    expected = [[likelihood(model, text(texts, row), word) for word in words] for row in range(4)]
    torch.testing.assert_close(logits, torch.tensor(expected), atol=1e-5, rtol=0)
    assert torch.tensor(expected).std(0).min() > 0.1  # texts differ, so that a mixed-up row would show
    assert torch.equal(right, labels)
    assert all(torch.equal(batch[name], given[name]) for name in given)


def test_the_loss_of_label_words_compares_them_among_themselves():
    corpus = ll.tasks.Corpus(
        "c", ("bad", "good"), ll.tasks.Texts(["a film", "no film"], [0, 1]), ll.tasks.Texts(["film"], [1])
    )
    tokenizer, model = byte_tokenizer(), small("llama")
    task = ll.tasks.label_word_task(corpus, tokenizer, prompt="{text} is", words=[" bad", " quite good"])
    found = ll.evaluate(model, task)
    prompt = tokenizer("film")["input_ids"] + tokenizer(" is")["input_ids"]
    with torch.inference_mode():
        bad, good = (likelihood(model, prompt, tokenizer(w)["input_ids"]) for w in (" bad", " quite good"))
    expected = -torch.tensor([bad, good]).log_softmax(0)[1]
    assert found.loss == pytest.approx(float(expected), abs=1e-5)
    assert found.predicted.tolist() == [int(good > bad)] and found.labels.tolist() == [1]


@pytest.mark.parametrize("kind", CAUSAL)
@torch.no_grad()
def test_logits_of_the_places_are_those_of_a_whole_pass(kind, batch):
    model = small(kind)
    places = torch.tensor([[4, 0], [2, 1], [8, 8], [0, 0]])
    whole = model(**batch).logits
    expected = torch.stack([torch.stack([whole[row, p] for p in places[row]]) for row in range(4)])
    torch.testing.assert_close(next_token_logits(model, batch, places), expected)
    adapted = ll.attach(model, ll.Window.middle(4))
    assert isinstance(adapted, PeftModel)
    torch.testing.assert_close(
        next_token_logits(adapted.eval(), batch, places), expected, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("kind", CAUSAL)
@torch.no_grad()
def test_next_tokens_are_each_predicted_from_those_before(kind):
    model, ids = small(kind), torch.randint(VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(2))
    logits, right = NextTokens()(model, {"input_ids": ids}, torch.zeros(3, dtype=torch.long))
    assert logits.shape == (3 * 6, VOCABULARY)
    assert right.tolist() == [int(ids[row, place]) for row in range(3) for place in range(1, 7)]
    alone = [model(ids[row : row + 1, : place + 1]).logits[0, -1] for row in range(3) for place in range(6)]
    torch.testing.assert_close(logits, torch.stack(alone), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("pooling", ["mean", "last"])
@torch.no_grad()
def test_features_are_pooled_over_each_text_s_own_tokens(kind, pooling, texts, batch):
    model = small(kind)
    found = pooled_features(model, batch, pooling)
    for row in range(4):
        hidden = model(torch.tensor([text(texts, row)]), output_hidden_states=True).hidden_states[-1][0]
        expected = hidden.mean(0) if pooling == "mean" else hidden[-1]
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-5)
    wider = {name: nn.functional.pad(tensor, (0, 6)) for name, tensor in batch.items()}
    torch.testing.assert_close(found, pooled_features(model, wider, pooling), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_features_of_the_model_s_own_pooling_are_what_its_classifier_reads(batch):
    model = small("bert classifier", num_labels=3)
    found = pooled_features(model, batch, "model")
    torch.testing.assert_close(found, model.bert(**batch).pooler_output)
    torch.testing.assert_close(model.classifier(found), model(**batch).logits)


@torch.no_grad()
def test_an_adapted_model_s_features_are_the_adapted_ones(batch):
    model = small("bert")
    adapted = ll.attach(model, ll.Window.first(4)).eval()
    for parameter in adapted.parameters():
        parameter += 0.05 * parameter.requires_grad
    merged = adapted.merge_and_unload()
    for pooling in ("mean", "last"):
        found = pooled_features(adapted, batch, pooling)
        torch.testing.assert_close(found, pooled_features(merged, batch, pooling), atol=1e-4, rtol=1e-4)
        assert (found - pooled_features(model, batch, pooling)).abs().max() > 0.01


def answers(model: PreTrainedModel, kind: str) -> list[ll.tasks.Answers]:
    """To texts of unlike length: all together, and one by one."""
    corpus = part_of("tweets", 4, 24)
    if kind == "bert classifier":
        task = ll.tasks.text_task(corpus, byte_tokenizer(), pooling="model")
    elif kind == "bert":
        task = ll.tasks.probed(model, ll.tasks.text_task(corpus, byte_tokenizer()))
    else:
        task = ll.tasks.label_word_task(corpus, byte_tokenizer())
    one_by_one = [ll.evaluate(model, task, examples=task.test.take(torch.tensor([i]))) for i in range(24)]
    return [ll.evaluate(model, task), *one_by_one]


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_batching_changes_no_answer(kind):
    together, *alone = answers(small(kind), kind)
    assert together.losses.tolist() == pytest.approx([float(a.losses[0]) for a in alone], abs=2e-5)
    assert together.predicted.tolist() == [int(a.predicted[0]) for a in alone]
    assert together.labels.tolist() == [int(a.labels[0]) for a in alone]
    assert together.losses.std() > 0.01


def test_readouts_ask_the_task():
    corpus, tokenizer = part_of("tweets", 4, 4), byte_tokenizer()
    classify, own, causal = ll.tasks.text_task(corpus, tokenizer), small("bert classifier"), small("llama")
    assert isinstance(classify.new_readout(causal, 0), HeadReadout)
    assert isinstance(classify.own_readout(own), OwnHead)
    assert isinstance(ll.tasks.probed(causal, classify).own_readout(causal), HeadReadout)
    words = ll.tasks.label_word_task(corpus, tokenizer)
    assert isinstance(words.new_readout(causal, 0), LabelWords)
    assert isinstance(ll.tasks.language_task(corpus, tokenizer, block=4).own_readout(causal), NextTokens)


def test_a_new_head_follows_its_seed_and_the_model_s_width(patch_vit):
    task = ll.tasks.text_task(part_of("tweets", 4, 4), byte_tokenizer())
    first, again, other = (task.new_readout(small("llama"), seed).head for seed in (0, 0, 1))
    assert (first.in_features, first.out_features) == (32, 2)
    assert torch.equal(first.weight, again.weight) and not torch.equal(first.weight, other.weight)
    with pytest.raises(ValueError, match=r"VisionTransformer has no config\.hidden_size"):
        task.new_readout(patch_vit, 0)


@torch.no_grad()
def test_images_are_read_by_the_same_readouts(patch_vit: VisionTransformer):
    images = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with features_of(patch_vit.head) as features:
        expected = patch_vit(images)
    assert torch.equal(pooled_features(patch_vit, images, "model"), features[0])
    assert torch.equal(OwnHead()(patch_vit, images, torch.zeros(3))[0], expected)
    assert not patch_vit.head._forward_pre_hooks
    assert real_positions(images) is None


def test_real_positions_and_lengths(batch):
    assert lengths_of(batch).tolist() == list(LENGTHS)
    assert real_positions(batch).sum(1).tolist() == list(LENGTHS)
    assert real_positions({"input_ids": batch["input_ids"]}) is None
    assert lengths_of({"input_ids": batch["input_ids"]}).tolist() == [9] * 4


def test_models_that_cannot_be_read_are_named(batch, patch_vit):
    with pytest.raises(ValueError, match=r"BaseModelOutput.* without logits; .* AutoModelForCausalLM"):
        logits_of(small("bert")(**batch))
    with pytest.raises(ValueError, match="VisionTransformer has no base_model that gives last_hidden_state"):
        pooled_features(patch_vit, batch, "mean")
    with pytest.raises(ValueError, match="BertModel has no linear classifier"):
        pooled_features(small("bert"), batch, "model")


class Answering(nn.Module):
    """Three linear layers; ``answer`` makes the output of the features and the last of them."""

    def __init__(self, answer, head: bool = False):
        super().__init__()
        self.body, self.fc = nn.Linear(4, 8), nn.Linear(8, 2)
        self.head = nn.Linear(8, 2) if head else None
        self.answer = answer

    def forward(self, x):
        return self.answer(self.body(x), self.fc)


@pytest.fixture(scope="module")
def points() -> ll.Task:
    examples = ll.Examples(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 2)
    return ll.Task("points", ("a", "b"), examples, examples)


def learnt(model: nn.Module, task: ll.Task) -> ll.Run:
    return ll.finetune(
        ll.attach(model, ll.Window.middle(2)), task, task, steps=1, evaluations=2, progress=False
    )


def plain(features, fc):
    return fc(features)


@pytest.mark.parametrize(
    ("model", "head"),
    [
        (Answering(plain, head=True), "head"),
        (Answering(lambda features, fc: nn.functional.linear(features, fc.weight)), "fc"),
    ],
    ids=["unused", "cosine"],
)
def test_a_head_that_is_never_called_is_named(model, head, points):
    with pytest.raises(ll.errors.InputError, match=f"Answering never calls its head '{head}'.*let it call"):
        learnt(model, points)


def test_class_numbers_are_no_logits(points):
    model = Answering(lambda features, fc: fc(features).argmax(-1))
    with pytest.raises(ll.errors.InputError, match=r"answers a batch of 1 with torch.int64.*without argmax"):
        learnt(model, points)


@pytest.mark.parametrize(
    "wrapped",
    [lambda logits: (logits,), lambda logits: {"logits": logits}, lambda logits: [None, logits]],
    ids=["tuple", "mapping", "list"],
)
def test_logits_in_a_tuple_or_mapping_are_found(wrapped, points):
    torch.manual_seed(0)
    model, other = Answering(plain), Answering(lambda features, fc: wrapped(fc(features)))
    other.load_state_dict(model.state_dict())
    pd.testing.assert_frame_equal(learnt(model, points).curve, learnt(other, points).curve)


def test_a_mapping_without_logits_is_refused(points):
    with pytest.raises(ll.errors.InputError, match="gives a dict without logits"):
        learnt(Answering(lambda features, fc: {"out": fc(features)}), points)


def test_a_classifier_that_reads_every_token_is_no_pooling(batch):
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, pad_token_id=3)
    with pytest.raises(ValueError, match=r'reads every token by itself.*pooling="last"'):
        pooled_features(GPT2ForSequenceClassification(config), batch, "model")


def test_a_classifier_that_looks_for_padding_reads_each_text_s_own_end():
    """transformers' decoders with a classifier take the last token that is not the model's pad token."""
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        pad_token_id=3, num_labels=2, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config).eval()
    texts = [[5, 6, 7, 8, 9, 10], [11, 12]]
    part = TokenExamples(
        torch.tensor(texts[0] + texts[1], dtype=torch.int32),
        torch.tensor([6, 2]),
        torch.tensor([0, 1]),
        pad=0,
    )
    task = ll.Task("t", ("a", "b"), part, part, pooling="model")
    with torch.no_grad():
        alone = [model(torch.tensor([ids])).logits[0] for ids in texts]
        together, _ = task.own_readout(model)(model, part.batch(torch.tensor([0, 1])), part.labels)
    assert torch.allclose(together, torch.stack(alone), atol=1e-5)
    model.config.pad_token_id = None
    with pytest.raises(ValueError, match="not take t, which holds texts: Cannot handle batch sizes"):
        task.own_readout(model)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 9, 9), (1, 8), (8, 8, 8, 8)], ids=str)
def test_images_of_another_size_or_channels_are_refused_before_work_begins(shape):
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, in_chans=1, depth=1, embed_dim=12, num_heads=1,
        num_classes=2,
    )  # fmt: skip
    model.train()
    fitting = ll.Examples(torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]))
    other = ll.Examples(torch.zeros(2, *shape), torch.tensor([0, 1]))
    ll.Task("fine", ("a", "b"), fitting, fitting).own_readout(model)
    for parts in ((other, fitting), (fitting, other)):
        task = ll.Task("odd", ("a", "b"), *parts)
        for ask in (task.own_readout, lambda model, task=task: task.new_readout(model, seed=0)):
            with pytest.raises(ValueError, match=r"VisionTransformer does not take odd, .*shape \(\d"):
                ask(model)
    assert model.training
