from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from small_language import byte_tokenizer, part_of, small
from torch import Tensor, nn

import lora_lens as ll
from lora_lens._base.precision import autocast
from lora_lens.tasks.readouts import OwnHead, Readout
from lora_lens.training import prefix_cache as room
from lora_lens.training.prefix_cache import FrozenPrefix, frozen_prefix

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
OFTEN = 10**6  # visits
ROWS = torch.tensor([3, 17, 4, 9, 20])


@pytest.fixture(scope="module")
def corpus() -> ll.tasks.Corpus:
    return part_of("movies", 24, 8)


Trained = tuple[nn.Module, Readout, ll.Task]


def word_task(corpus: ll.tasks.Corpus) -> ll.Task:
    return ll.tasks.label_word_task(corpus, byte_tokenizer(), words=["-", "+"])  # of one token each


def trained(kind: str, corpus: ll.tasks.Corpus, method: ll.adapters.Method | None = None) -> Trained:
    """A model of four blocks, or of six images', with an adapter in the last two; and its readout."""
    if kind == "vision":
        model, task, upper = (
            ll.tasks.bundled.vision()[0],
            ll.tasks.bundled.digits().first(24, 8),
            "blocks.[45].*",
        )
    elif kind == "bert":
        model = small("bert", num_hidden_layers=4, **NO_DROPOUT)
        task, upper = ll.tasks.text_task(corpus, byte_tokenizer()), "*layer.[23].*"
    else:
        model, task = small("llama", num_hidden_layers=4), word_task(corpus)
        upper = "*layers.[23].*"
    adapted = ll.attach(model, method or ll.LoRA(4), targets=upper if method is None else None)
    for name, parameter in adapted.named_parameters():  # as after some steps, so that all have gradients
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return adapted.train(), task.new_readout(adapted, seed=0), task


def step(parts: Trained, prefix: FrozenPrefix, rows: Tensor) -> tuple[float, list[Tensor]]:
    """The loss of a batch, and the gradients of all that is trained."""
    model, readout, task = parts
    learnt = [p for p in [*model.parameters(), *readout.parameters()] if p.requires_grad]
    torch.manual_seed(0)
    with prefix.of(rows):
        logits, labels = readout(model, task.train.batch(rows), task.train.labels[rows])
    loss = nn.functional.cross_entropy(logits, labels)
    return loss.item(), [g for g in torch.autograd.grad(loss, learnt, allow_unused=True) if g is not None]


def prefix_of(parts: Trained, **settings: object) -> FrozenPrefix:
    return frozen_prefix(parts[0], parts[1], parts[2].train, **{"visits": OFTEN} | settings)


def assert_same_step(parts: Trained, prefix: FrozenPrefix, rows: Tensor) -> None:
    plain, whole = step(parts, FrozenPrefix(*parts[:2], parts[2].train, []), rows)
    loss, kept = step(parts, prefix, rows)
    assert loss == pytest.approx(plain, rel=1e-6)
    for ours, theirs in zip(kept, whole, strict=True):
        assert theirs.norm() > 0 and (ours - theirs).norm() <= 5e-6 * theirs.norm()


@pytest.mark.parametrize(("kind", "below"), [("bert", 2), ("llama", 2), ("vision", 4)])
def test_losses_and_gradients_are_those_of_the_whole_model(kind, below, corpus):
    parts = trained(kind, corpus)
    prefix = prefix_of(parts)
    assert len(prefix.blocks) == below
    for rows in (ROWS, ROWS, ROWS.flip(0)[:3], torch.tensor([17, 17, 5])):
        assert_same_step(parts, prefix, rows)


@pytest.mark.parametrize("kind", ["bert", "vision"])
def test_of_a_linear_probe_all_blocks_are_passed_over(kind, corpus):
    parts = trained(kind, corpus, ll.LinearProbe())
    prefix = prefix_of(parts)
    assert len(prefix.blocks) == {"bert": 4, "vision": 6}[kind]
    assert_same_step(parts, prefix, ROWS)
    assert_same_step(parts, prefix, ROWS)


def test_the_blocks_run_once_for_each_example(corpus):
    parts = trained("bert", corpus)
    prefix = prefix_of(parts)
    seen: list[int] = []
    inner = parts[0].get_base_model().encoder.layer[0].attention.self.query
    inner.register_forward_hook(lambda _module, given, _output: seen.append(len(given[0])))
    step(parts, prefix, torch.tensor([10, 11, 12]))
    step(parts, prefix, torch.tensor([12, 10]))
    step(parts, prefix, torch.tensor([12, 13]))
    assert seen == [3, 1]


def test_dropout_above_draws_as_without(corpus):
    model = small("llama", num_hidden_layers=4)
    task = word_task(corpus)
    adapted = ll.attach(model, ll.LoRA(4), targets="*layers.3.*", variant=ll.Variant(dropout=0.5)).train()
    nn.init.normal_(adapted.get_base_model().model.layers[3].mlp.up_proj.lora_B["default"].weight)
    parts = (adapted, task.new_readout(adapted, 0), task)
    prefix = prefix_of(parts)
    assert len(prefix.blocks) == 3
    plain, _ = step(parts, prefix_of(parts, visits=1), ROWS)
    assert step(parts, prefix, ROWS)[0] == pytest.approx(plain, rel=1e-6)
    adapted.eval()
    assert step(parts, prefix, ROWS)[0] != pytest.approx(plain, rel=1e-3)


def with_dropout(corpus: ll.tasks.Corpus) -> Trained:
    parts = trained("bert", corpus)
    parts[0].get_base_model().encoder.layer[1].output.dropout.p = 0.1
    return parts


def with_trained_embedding(corpus: ll.tasks.Corpus) -> Trained:
    parts = trained("llama", corpus)
    parts[0].get_base_model().get_input_embeddings().requires_grad_(True)
    return parts


def adapted_everywhere(corpus: ll.tasks.Corpus) -> Trained:
    return trained("bert", corpus, ll.LoRA(4))


def with_words_of_two_tokens(corpus: ll.tasks.Corpus) -> Trained:
    model, _, _ = trained("llama", corpus)
    task = ll.tasks.label_word_task(corpus, byte_tokenizer(), words=[" zq", " qz"])
    assert min(len(word) for word in task.words) > 1
    return model, task.new_readout(model, 0), task


class ReadsEveryBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        states = [x]
        for block in self.blocks:
            states.append(block(states[-1]))
        return self.head(sum(states))


def with_a_head_that_reads_every_block(_corpus: ll.tasks.Corpus) -> Trained:
    torch.manual_seed(0)
    model = ReadsEveryBlock().requires_grad_(False).train()
    model.blocks[2].requires_grad_(True)
    examples = ll.Examples(torch.randn(24, 8), torch.arange(24) % 2)
    task = ll.Task("two", ("a", "b"), examples, examples)
    return model, task.own_readout(model), task


class Lateral(nn.Module):
    """Four blocks and a way around the second, whose trained gate is closed; ``kind`` is how it is taken."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Lateral.Block() for _ in range(4))
        self.head, self.kind = nn.Linear(8, 2), kind
        self.gate = nn.Parameter(torch.zeros(()))
        self.matrix = nn.Linear(8, 8, bias=False)
        nn.init.zeros_(self.matrix.weight)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor, shared: dict[str, Tensor]) -> Tensor:
            shared.setdefault("inside", self.linear(x))  # as keys and values that later blocks share
            x += torch.tanh(self.linear(x))  # in place
            return x

    def forward(self, x: Tensor) -> Tensor:
        states, shared = [x.clone()], {}
        for number, block in enumerate(self.blocks):
            states.append(block(states[-1].clone(), shared))
            if number == 1 and self.kind == "ladder":
                shared["side"] = self.matrix(states[1].detach())
        by_kind = {
            "skip": lambda: self.gate * states[1],
            "two gates": lambda: self.gate * self.matrix(states[1]),
            "almost closed": lambda: torch.sigmoid(self.gate - 30) * states[1],
            "detached": lambda: self.gate * states[1].detach(),
            "ladder": lambda: shared["side"],
            "shared inside": lambda: self.gate * shared["inside"],
            "input of the second": lambda: self.gate * states[1].relu(),
            "choice": lambda: self.gate * (states[1] > 0).float(),
            "branch": lambda: states[1] if self.gate != 0 else 0.0,
            "twice": lambda: 0 * self.blocks[1](states[3].clone(), shared),
            "none": lambda: 0.0,
        }
        return self.head(states[-1] + by_kind[self.kind]())


LATERAL = [
    "skip", "two gates", "almost closed", "detached", "ladder", "shared inside", "input of the second",
    "choice", "branch", "twice",
]  # fmt: skip


@pytest.mark.parametrize("kind", [*LATERAL, "none"])
def test_a_way_around_the_blocks_is_found_while_its_gate_is_closed(kind):
    torch.manual_seed(0)
    model = Lateral(kind).requires_grad_(False).train()
    for part in (model.blocks[2], model.blocks[3], model.matrix):
        part.requires_grad_(True)
    model.gate.requires_grad_(True)
    examples = ll.Examples(torch.randn(24, 8), torch.arange(24) % 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prefix = frozen_prefix(model, OwnHead(), examples, visits=OFTEN)
    assert len(prefix.blocks) == (2 if kind == "none" else 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


class OfTheBatch(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / x.abs().max()


class Counts(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * np.random.rand()  # noqa: NPY002 - as others do


@pytest.mark.parametrize(("first", "kept"), [(nn.Linear, 2), (OfTheBatch, 0), (Counts, 0)])
def test_states_that_depend_on_more_than_the_example_are_not_kept(first, kept):
    torch.manual_seed(0)
    model = nn.Sequential(first(8, 8), nn.Tanh(), nn.Linear(8, 2)).requires_grad_(False).train()
    model[2].requires_grad_(True)
    examples = ll.Examples(torch.randn(24, 8), torch.arange(24) % 2)
    assert len(frozen_prefix(model, OwnHead(), examples, visits=OFTEN).blocks) == kept


class Breaks(nn.Module):
    """Between its blocks it counts on the first one's output."""

    def __init__(self, error: BaseException | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 2)])
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        if x.shape[-1] != 6:
            raise self.error
        return self.blocks[2](self.blocks[1](x))


def test_a_model_that_cannot_run_without_its_blocks_runs_with_them_but_memory_is_not_hidden():
    examples = ll.Examples(torch.randn(24, 8), torch.arange(24) % 2)
    for error, expected in ((ValueError("6 features"), None), (torch.OutOfMemoryError("full"), "full")):
        model = Breaks(error).requires_grad_(False).train()
        model.blocks[2].requires_grad_(True)
        if expected is None:
            assert not frozen_prefix(model, OwnHead(), examples, visits=OFTEN).blocks
            continue
        with pytest.raises(torch.OutOfMemoryError, match=expected):
            frozen_prefix(model, OwnHead(), examples, visits=OFTEN)


@pytest.mark.parametrize(
    "make",
    [
        with_dropout,
        with_trained_embedding,
        adapted_everywhere,
        with_words_of_two_tokens,
        with_a_head_that_reads_every_block,
    ],
)
def test_it_lets_the_model_run_where_it_would_change_the_training(make: Callable, corpus):
    parts = make(corpus)
    prefix = prefix_of(parts)
    assert not prefix.blocks
    plain, _ = step(parts, prefix, ROWS)
    model, readout, task = parts
    torch.manual_seed(0)
    logits, labels = readout(model, task.train.batch(ROWS), task.train.labels[ROWS])
    assert plain == nn.functional.cross_entropy(logits, labels).item()


def test_batch_norms_that_still_move_are_left_alone(digits):
    model = ll.tasks.bundled.vision_architecture()
    norm = nn.BatchNorm2d(1)
    whole = nn.Sequential(norm, model).requires_grad_(False)
    before, examples = norm.running_mean.clone(), digits.train.first(24)
    assert not frozen_prefix(whole.train(), OwnHead(), examples, visits=OFTEN).blocks
    assert torch.equal(norm.running_mean, before)
    assert len(frozen_prefix(whole.eval(), OwnHead(), examples, visits=OFTEN).blocks) == 2


def test_no_example_that_comes_twice_no_prefix(corpus):
    parts = trained("bert", corpus)
    assert not prefix_of(parts, visits=24).blocks
    assert len(prefix_of(parts, visits=25).blocks) == 2


def test_the_model_is_left_as_it_was_even_after_an_error(corpus):
    parts = trained("llama", corpus)
    model, readout, task = parts
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch, labels = task.train.batch(ROWS), task.train.labels[ROWS]
    before, _ = readout(model, batch, labels)
    random = torch.get_rng_state()
    prefix = prefix_of(parts)
    assert torch.equal(torch.get_rng_state(), random)
    with pytest.raises(RuntimeError, match="in the middle"), prefix.of(ROWS):
        raise RuntimeError("in the middle")
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(readout(model, batch, labels)[0], before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert model.training


def test_a_forward_of_the_block_s_own_comes_back(corpus):
    parts = trained("bert", corpus)
    block = parts[0].get_base_model().encoder.layer[0]
    block.forward = own = block.forward  # as accelerate's hooks set one
    with prefix_of(parts).of(ROWS):
        assert block.forward is not own
    assert block.forward is own


def test_beyond_its_memory_examples_are_computed_anew(corpus, monkeypatch):
    parts = trained("bert", corpus)
    monkeypatch.setattr(room, "MOST_BYTES", 10_000)  # of 32 numbers a token: 78 tokens
    prefix = prefix_of(parts)
    for rows in torch.arange(24).split(6):
        assert_same_step(parts, prefix, rows)
        assert_same_step(parts, prefix, rows)
    assert 0 < sum(state.nbytes for state in prefix._kept.values()) <= 10_000
    assert len(prefix._kept) < 24


def test_states_are_kept_in_the_run_s_precision(corpus):
    parts = trained("llama", corpus)
    prefix = prefix_of(parts, precision="bfloat16")
    assert len(prefix.blocks) == 2
    with autocast(torch.device("cpu"), "bfloat16"):
        plain, _ = step(parts, prefix_of(parts, visits=1), ROWS)
        kept, _ = step(parts, prefix, ROWS)
    assert kept == pytest.approx(plain, rel=0.02)
