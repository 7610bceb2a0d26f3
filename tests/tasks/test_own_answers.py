"""Agreement with the pretrained model's own answers, against numbers that are computed independently."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_language import byte_tokenizer, small
from torch import Tensor, nn

import lora_lens as ll
from lora_lens.tasks.own_answers import KEPT

TEXTS = ["a fine film", "what a waste of time this was", "well played by all", "dull", "a joy to see, I say"]
TINY = {"steps": 2, "batch_size": 4, "progress": False}


class Small(nn.Module):
    """Two numbers in, one of three classes out."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(2, 2), nn.Linear(2, len(weight), bias=False)
        with torch.no_grad():
            self.body.weight.copy_(torch.eye(2))
            self.body.bias.zero_()
            self.head.weight.copy_(weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


BEFORE = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
AFTER = torch.tensor([[1.0, 0.0], [0.0, 3.0], [-1.0, -1.0]])
INPUTS = torch.tensor([[2.0, 1.0], [1.0, 2.0], [-1.0, -1.0], [1.0, 0.5], [0.5, -2.0]])


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return (p * np.log(p / q)).sum(-1)


def moved(model: nn.Module, size: float = 0.1) -> nn.Module:
    """A copy whose weights are a little other ones."""
    other = copy.deepcopy(model)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for p in other.parameters():
            p.add_(torch.randn_like(p), alpha=size * float(p.std()) if p.numel() > 1 else 0.0)
    return other


def same_before(model: nn.Module, task: ll.Task) -> None:
    answers = ll.evaluate(model, task)
    assert answers.accuracy == 1 and answers.loss == 0


def test_five_examples_by_hand():
    before, after = Small(BEFORE), Small(AFTER)
    task = ll.tasks.agreement(before, INPUTS)
    same_before(before, task)
    x = INPUTS.numpy().astype(float)
    p, q = (softmax(x @ weight.numpy().astype(float).T) for weight in (BEFORE, AFTER))
    # First choices by hand: 0, 1, 2, 0, 2 before; of (2, 1) and (1, 0.5) the second class now has 3 and 1.5.
    assert p.argmax(-1).tolist() == [0, 1, 2, 0, 2] and q.argmax(-1).tolist() == [1, 1, 2, 1, 2]
    answers = ll.evaluate(after, task)
    assert answers.labels.tolist() == [0, 1, 2, 0, 2] and answers.predicted.tolist() == [1, 1, 2, 1, 2]
    assert answers.accuracy == 0.6
    np.testing.assert_allclose(answers.losses, divergence(p, q), rtol=1e-5, atol=1e-6)


def test_labels_play_no_part_and_all_kinds_of_inputs_are_one():
    model = Small(BEFORE)
    whole = ll.tasks.agreement(model, INPUTS)
    for labels in ([0, 1, 2, 0, 2], [2, 2, 0, 1, 1]):
        other = ll.tasks.agreement(model, ll.Examples(INPUTS, torch.tensor(labels)))
        assert torch.equal(other.test.labels, whole.test.labels)
        assert other.fingerprint() == whole.fingerprint()
    again = ll.tasks.agreement(model, whole.test)
    assert again.fingerprint() == whole.fingerprint() and again.classes == ("0", "1", "2")
    prints = {
        whole.fingerprint(),
        ll.tasks.agreement(model, INPUTS + 1).fingerprint(),
        ll.tasks.agreement(Small(AFTER), INPUTS).fingerprint(),
    }
    assert len(prints) == 3


def test_parts_of_it_keep_their_answers():
    before, after = Small(BEFORE), Small(AFTER)
    task = ll.tasks.agreement(before, INPUTS)
    every = ll.evaluate(after, task)
    some = pickle.loads(pickle.dumps(task.test.take(torch.tensor([3, 0]))))
    part = ll.evaluate(after, task, examples=some)
    np.testing.assert_array_equal(part.losses, every.losses[[3, 0]])
    assert ll.evaluate(after, task.subset(test=2)).losses.shape == (2,)
    assert task.test.shape == (2,) and len(task.test.sampled(3)) == 3


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_texts_of_any_length_are_compared_token_by_token(kind):
    model, tokenizer = small(kind), byte_tokenizer()
    other = moved(model)
    task = ll.tasks.agreement(model, TEXTS, tokenizer=tokenizer)
    same_before(model, task)
    answers, expected, chosen = ll.evaluate(other, task), [], []
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            p, q = (softmax(m(ids).logits[0].double().numpy()) for m in (model, other))
        expected += divergence(p, q).tolist()
        chosen += p.argmax(-1).tolist()
    assert answers.labels.tolist() == chosen and len(set(task.test.lengths.tolist())) > 1
    np.testing.assert_allclose(answers.losses, expected, rtol=1e-3, atol=2e-5)
    assert 0 < answers.accuracy < 1


def test_a_large_vocabulary_is_compared_by_its_likeliest_choices():
    model = small("llama", vocabulary=3000)
    other = moved(model, 0.05)
    task = ll.tasks.agreement(model, TEXTS, tokenizer=byte_tokenizer())
    same_before(model, task)
    assert task.test.choices.shape[-1] == KEPT
    whole, kept = [], []
    for text in TEXTS:
        ids = torch.tensor([byte_tokenizer()(text)["input_ids"]])
        with torch.no_grad():
            p, q = (softmax(m(ids).logits[0].double().numpy()) for m in (model, other))
        whole += divergence(p, q).tolist()
        likeliest = np.argsort(-p, axis=-1)[:, :KEPT]
        some = [np.take_along_axis(r, likeliest, axis=-1) for r in (p, q)]
        kept += divergence(*(np.c_[r, 1 - r.sum(-1)] for r in some)).tolist()
    found = ll.evaluate(other, task)
    np.testing.assert_allclose(found.losses, kept, rtol=2e-3, atol=2e-5)
    assert (np.array(kept) <= np.array(whole) + 1e-9).all()


def test_an_encoder_answers_with_the_nearest_of_the_other_texts():
    model, tokenizer = small("bert"), byte_tokenizer()
    other = moved(model, 0.3)
    task = ll.tasks.agreement(model, TEXTS, tokenizer=tokenizer)
    assert "nearest others to 5 inputs" in repr(task)
    same_before(model, task)
    vectors = []
    for one in (model, other):
        with torch.no_grad():
            hidden = [
                one(torch.tensor([tokenizer(t)["input_ids"]])).last_hidden_state[0].mean(0) for t in TEXTS
            ]
        vectors.append(nn.functional.normalize(torch.stack(hidden).double(), dim=-1).numpy())
    index, now = vectors
    others = ~np.eye(len(TEXTS), dtype=bool)
    p, q = (softmax((x @ index.T / 0.05)[others].reshape(len(TEXTS), -1)) for x in (index, now))
    answers = ll.evaluate(other, task)
    np.testing.assert_allclose(answers.losses, divergence(p, q), rtol=1e-3, atol=2e-5)
    cosines = np.where(others, now @ index.T, -1)
    assert answers.predicted.tolist() == cosines.argmax(-1).tolist()


def test_a_task_is_read_as_it_reads_itself():
    model, tokenizer = small("llama"), byte_tokenizer()
    corpus = ll.tasks.Corpus(
        "films", ("bad", "good"), ll.tasks.Texts(TEXTS[:2], [1, 0]), ll.tasks.Texts(TEXTS[2:], [1, 0, 1])
    )
    words = ll.tasks.label_word_task(corpus, tokenizer)
    task = ll.tasks.agreement(model, words)
    same_before(model, task)
    other = moved(model, 0.5)
    labelled = ll.evaluate(model, words).predicted
    assert ll.evaluate(other, task).labels.tolist() == labelled.tolist()
    assert ll.evaluate(other, task).predicted.tolist() == ll.evaluate(other, words).predicted.tolist()
    assert task.classes == ("bad", "good") and task.may_train

    encoder = small("bert")
    probed = ll.tasks.probed(encoder, ll.tasks.text_task(corpus, tokenizer))
    task = ll.tasks.agreement(encoder, probed)
    assert ll.evaluate(encoder, task).predicted.tolist() == ll.evaluate(encoder, probed).predicted.tolist()


def test_blocks_of_running_text():
    model, tokenizer = small("gpt2"), byte_tokenizer()
    corpus = ll.tasks.bundled_texts.articles()
    blocks = ll.tasks.language_task(corpus, tokenizer, block=16).first(train=4, test=4)
    task = ll.tasks.agreement(model, blocks)
    same_before(model, task)
    assert len(ll.evaluate(model, task).labels) == 4 * 16


def tiny_vit(seed: int = 0) -> nn.Module:
    from timm.models import VisionTransformer

    torch.manual_seed(seed)
    shape = {"img_size": 28, "patch_size": 14, "in_chans": 1, "num_classes": 3}
    return VisionTransformer(**shape, embed_dim=16, depth=1, num_heads=2)


@pytest.fixture(scope="module")
def images():
    """A tiny model, images of no known class, and a task to learn."""
    model = tiny_vit()
    noise = torch.randn(24, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    examples = ll.Examples(noise, torch.arange(24) % 2)
    return model, noise, ll.Task("noise", ("even", "odd"), examples, examples)


def test_it_is_retained_and_watched_by_a_sweep_and_found_again(images, tmp_path):
    model, noise, task = images
    known, more = ll.tasks.agreement(model, noise), ll.tasks.agreement(model, -noise, name="inverted")
    grid = ll.Grid([ll.Window.first(4), ll.Window.last(4)], lr=0.1)
    given = {"model": model, "task": task, "store": tmp_path, "jobs": 1, "spectra": ll.spectra(model)}
    sweep = ll.sweep(grid, retain=known, watch=[more], **given, **TINY)
    assert (sweep.table["retained_before"] == 1).all() and (sweep.table["loss_rise"] > 0).all()
    np.testing.assert_allclose(sweep.table["forgetting"], 1 - sweep.table["retained_accuracy"])
    assert (sweep.watched()["before"] == 1).all() and {"cka", "relative_change"} <= set(sweep.drifts())
    files = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    again = ll.sweep(grid, retain=ll.tasks.agreement(model, noise), watch=[more], **given, **TINY)
    assert files == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    assert again.table.equals(sweep.table)
    with pytest.raises(ValueError, match="retain"):
        ll.sweep(grid, retain=ll.tasks.agreement(model, noise[:20]), watch=[more], **given, **TINY)


def test_a_run_of_its_own_says_the_same(images):
    model, noise, task = images
    known = ll.tasks.agreement(model, noise)
    adapted = ll.attach(model, ll.Window.middle(4))
    run = ll.finetune(adapted, task, known, lr=0.1, **TINY)
    now = ll.evaluate(adapted, known)
    assert run.forgetting == pytest.approx(1 - now.accuracy) and run.loss_rise == pytest.approx(now.loss)
    assert run.items["before"].tolist() == known.test.labels.tolist()


def test_it_works_in_sequences_and_for_advice(images):
    model, noise, task = images
    known = ll.tasks.agreement(model, noise)
    advice = ll.advise(model, task, known, rank=2)
    assert advice.lr > 0
    grid = ll.Grid(baselines=[ll.LoRA(2)], lr=0.1)
    done = ll.experiments.continual_sweep(
        model, [task, replace(task, name="again")], ll.experiments.continual.Continued(), grid,
        retain=known, jobs=1, **TINY,
    )  # fmt: skip
    assert (done.table["retained_before"] == 1).all()


def test_regularizers_train_on_other_inputs_only(images):
    model, noise, task = images
    known = ll.tasks.agreement(model, noise[:12])
    for regularizer in (ll.training.KLAnchor(1.0), ll.training.Replay(4)):
        with pytest.raises(ValueError, match=r"train=") as refused:
            ll.finetune(ll.attach(model, ll.LoRA(2)), task, known, regularizer=regularizer, **TINY)
        assert "would seem remembered" in str(refused.value)
        apart = ll.tasks.agreement(model, noise[:12], train=noise[12:])
        run = ll.finetune(ll.attach(model, ll.LoRA(2)), task, apart, regularizer=regularizer, **TINY)
        assert not run.diverged
    ll.finetune(ll.attach(model, ll.LoRA(2)), task, known, regularizer=ll.training.L2ToInitial(0.1), **TINY)


def test_what_cannot_be_answered_is_refused(images):
    model, noise, _ = images
    with pytest.raises(ValueError, match=r"adapted already.*ll\.detach"):
        ll.tasks.agreement(ll.attach(model, ll.LoRA(2)), noise)
    with pytest.raises(ValueError, match="inputs hold nothing"):
        ll.tasks.agreement(model, noise[:0])
    with pytest.raises(ValueError, match="tokenizer="):
        ll.tasks.agreement(model, TEXTS)
    with pytest.raises(TypeError, match="inputs must be images"):
        ll.tasks.agreement(model, "one text")
    with pytest.raises(ValueError, match="does not take"):
        ll.tasks.agreement(model, torch.zeros(2, 3, 28, 28))
    with pytest.raises(ValueError, match=r"inputs are torch.int64.*not as numbers of tokens"):
        ll.tasks.agreement(small("llama"), torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="token"):
        ll.tasks.agreement(small("llama", vocabulary=20), TEXTS, tokenizer=byte_tokenizer())
    with pytest.raises(ValueError, match="inputs hold nothing"):
        ll.tasks.agreement(small("llama"), [], tokenizer=byte_tokenizer())
    with pytest.raises(ValueError, match="at least 3 inputs"):
        ll.tasks.agreement(small("bert"), TEXTS[:2], tokenizer=byte_tokenizer())
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.head.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        ll.tasks.agreement(broken, noise)


def test_texts_that_are_too_long_lose_their_end_with_a_warning():
    with pytest.warns(UserWarning, match="inputs: 2 of 5 texts have more than") as caught:
        task = ll.tasks.agreement(small("gpt2"), TEXTS, tokenizer=byte_tokenizer(), most_tokens=10)
    assert caught[0].filename == __file__ and int(task.test.lengths.max()) == 10


def test_what_it_is_not_for_is_refused(images):
    model, noise, task = images
    known = ll.tasks.agreement(model, noise)
    with pytest.raises(ValueError, match="learn another task"):
        ll.finetune(ll.attach(model, ll.LoRA(2)), known, task, **TINY)
    wider = Small(torch.cat([BEFORE, BEFORE]))
    with pytest.raises(ValueError, match="among 3, and this model's answers among 6"):
        ll.evaluate(wider, ll.tasks.agreement(Small(BEFORE), INPUTS))
