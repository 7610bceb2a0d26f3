from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from small_language import byte_tokenizer, part_of, small
from torch import nn
from transformers import PreTrainedModel

import lora_lens as ll
from lora_lens.tasks.evaluation import Answers, example_features

CAUSAL = ["llama", "gpt2"]


@pytest.fixture(scope="module")
def running() -> ll.Task:
    return ll.tasks.language_task(part_of("tweets", 10, 40), byte_tokenizer(), block=16)


def plain_loss(model: PreTrainedModel, task: ll.Task) -> float:
    """transformers' own next-token loss, one block at a time; all blocks predict as many tokens."""
    with torch.inference_mode():
        blocks = task.test.tokens.long().split(task.test.lengths.tolist())
        return float(np.mean([float(model(input_ids=ids[None], labels=ids[None]).loss) for ids in blocks]))


def test_scores_by_hand():
    found = Answers(np.array([0, 1, 1, 0]), np.array([0, 1, 0, 1]), np.array([0.5, 1.5, 2.0, 4.0]))
    assert (found.accuracy, found.loss) == (0.5, 2.0)


def test_nan_is_no_answer():
    class Breaks(nn.Module):
        def forward(self, model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor):
            return torch.where(labels[:, None] == 0, float("nan"), torch.tensor([1.0, 5.0])), labels

    labels = torch.tensor([0, 0, 1, 1])
    examples = ll.Examples(torch.zeros(4, 2), labels)
    answers = ll.evaluate(nn.Linear(2, 2), ll.Task("t", ("a", "b"), examples, examples), Breaks())
    assert answers.accuracy == 0.5 and np.isnan(answers.loss)


def test_a_classification_by_hand():
    model = nn.Sequential()
    model.head = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.head.weight.copy_(torch.eye(2))
    inputs = torch.tensor([[0.0, math.log(3.0)], [math.log(4.0), 0.0], [0.0, math.log(9.0)]])
    task = ll.Task("t", ("a", "b"), *(ll.Examples(inputs, torch.tensor([1, 1, 0])) for _ in range(2)))
    found = ll.evaluate(model, task)
    assert found.labels.tolist() == [1, 1, 0] and found.predicted.tolist() == [1, 0, 1]
    assert found.losses.tolist() == pytest.approx([math.log(4 / 3), math.log(5), math.log(10)])
    assert found.accuracy == pytest.approx(1 / 3)


@pytest.mark.parametrize("kind", CAUSAL)
def test_the_loss_of_running_text_is_that_of_plain_transformers(kind, running):
    model = small(kind)
    found = ll.evaluate(model, running)
    assert found.loss == pytest.approx(plain_loss(model, running), abs=1e-5)
    assert found.losses.shape == (len(running.test) * 15,)
    assert found.accuracy == float(np.mean(found.predicted == found.labels))


def test_items_come_in_the_order_of_the_texts_and_their_tokens(running):
    found = ll.evaluate(small("llama"), running)
    expected = [ids[1:].tolist() for ids in running.test.tokens.split(16)]
    assert found.labels.tolist() == [token for ids in expected for token in ids]
    words = ll.tasks.label_word_task(part_of("tweets", 4, 40), byte_tokenizer())
    assert ll.evaluate(small("llama"), words).labels.tolist() == words.test.labels.tolist()
    lengths = words.test.lengths.tolist()
    assert lengths != sorted(lengths)  # so that batches of like length are in another order
    one = torch.tensor([7])
    alone = ll.evaluate(small("llama"), words, examples=words.test.take(one))
    assert ll.evaluate(small("llama"), words).losses[7] == pytest.approx(alone.losses[0], abs=1e-5)


def test_features_come_in_the_order_of_the_examples():
    task, model = ll.tasks.text_task(part_of("tweets", 4, 60), byte_tokenizer()), small("bert")
    found = example_features(model, task, task.test)
    assert found.shape == (60, 32) and found.dtype == torch.float32 and not found.requires_grad
    for row in (0, 31, 59):
        ids = task.test.batch(torch.tensor([row]))["input_ids"]
        with torch.inference_mode():
            expected = model(ids).last_hidden_state[0].mean(0)
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-5)
    low = example_features(model, task, task.test, precision="bfloat16")
    assert low.dtype == torch.float32 and 0 < (low - found).norm() / found.norm() < 0.02


def test_another_readout_and_other_examples_may_be_asked():
    task, model = ll.tasks.text_task(part_of("tweets", 30, 20), byte_tokenizer()), small("llama")
    readout = task.new_readout(model, seed=3)
    found = ll.evaluate(model, task, readout, examples=task.train)
    features = example_features(model, task, task.train)
    logits = nn.functional.linear(features, readout.head.weight, readout.head.bias)
    assert found.predicted.tolist() == logits.argmax(-1).tolist()
    losses = nn.functional.cross_entropy(logits, task.train.labels, reduction="none")
    assert found.losses.tolist() == pytest.approx(losses.tolist(), abs=1e-5)


def test_a_model_is_left_as_it_was(running):
    model = small("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5).train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    expected = ll.evaluate(small("gpt2"), running)
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    assert np.array_equal(ll.evaluate(model, running).losses, expected.losses)  # no dropout
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_bfloat16_changes_the_loss_by_little_and_only_when_asked(running):
    model = small("llama")
    exact, low = (ll.evaluate(model, running, precision=p) for p in ("float32", "bfloat16"))
    assert low.losses.dtype == np.float32 and not np.array_equal(low.losses, exact.losses)
    assert low.loss == pytest.approx(exact.loss, rel=0.01)
    assert np.array_equal(ll.evaluate(model, running).losses, exact.losses)


def test_a_task_of_another_model_is_refused_before_it_is_asked(running):
    with pytest.raises(ValueError, match=r"BaseModelOutput.* without logits"):
        ll.evaluate(small("bert"), running)
    with pytest.raises(ValueError, match=r"has \d+ tokens: they were tokenized for another model"):
        ll.evaluate(small("llama", vocabulary=50), running)
    classify = ll.tasks.text_task(part_of("tweets", 4, 4), byte_tokenizer())
    with pytest.raises(ValueError, match="tweets has 2 classes, but the model's own head has 3"):
        ll.evaluate(small("bert classifier", num_labels=3), classify)
