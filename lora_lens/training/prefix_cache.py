"""The frozen beginning of a model, whose hidden states are kept instead of computed at every step.

Where only the upper blocks are trained, the lower ones make the same of an example each time it comes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import takewhile

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.rnn import pad_sequence
from torch.utils._pytree import tree_map

from lora_lens._base.precision import autocast
from lora_lens._base.random_state import seeded
from lora_lens.tasks.readouts import Readout, ask, real_positions
from lora_lens.tasks.task import Examples

MOST_BYTES = 2 * 10**9  # of hidden states; those of further examples are computed each time
TRIED = 8  # examples on which it is tested that the model answers as without it
TRACED = 2  # of them, whose graph is kept for a moment
# Of states and answers, relative: the same products in another batch round otherwise.
ROUNDING = {"float32": 1e-4, "bfloat16": 0.01}
MOVED = 0.02  # by how much trained weights are moved before that, a usual size of weights


class FrozenPrefix:
    """Hands out kept hidden states in place of a model's first blocks; made by :func:`frozen_prefix`.

    Attributes:
        blocks: those that are passed over, in their order; none where the model runs as it is.
    """

    def __init__(self, model: nn.Module, readout: Readout, examples: Examples, blocks: list[nn.Module]):
        self.blocks = blocks
        self._model, self._readout, self._examples = model, readout, examples
        self._device = next(model.parameters()).device
        self._kept: dict[int, Tensor] = {}  # by example: (real tokens, features)
        self._bytes = 0
        self._in_tuple = False  # whether the blocks wrap what they give

    @contextmanager
    def of(self, rows: Tensor) -> Iterator[None]:
        """While it lasts, the model runs on the batch of these examples only; then it is as before.

        Args:
            rows: the examples' numbers, (batch,).
        """
        if not self.blocks:
            yield
            return
        states = self._states(rows)
        before = [block.__dict__.get("forward") for block in self.blocks]
        try:
            for block in self.blocks[:-1]:
                block.forward = lambda *given, **named: self._wrapped([*given, *named.values()][0])
            self.blocks[-1].forward = lambda *_given, **_: self._wrapped(states)
            yield
        finally:
            for block, own in zip(self.blocks, before, strict=True):
                block.__dict__.pop("forward", None)
                if own is not None:
                    block.forward = own

    def fits(self, precision: str) -> bool:
        """Whether the states depend on the example alone, and the answer on the blocks through them alone.

        That must hold not only now but while the model is trained, and a way around the last block may begin
        at a gate of zero. So ways are looked for in the graph of a pass, where a product with zero is an edge
        as any other; and what a graph does not show, such as detached tensors, is tried with the trained
        weights moved.
        """
        rows = torch.arange(min(TRIED, len(self._examples)))
        with seeded(0, self._device), autocast(self._device, precision):
            try:
                before = random_states(self._device)
                together = self._reached(rows)
                if together.requires_grad or random_states(self._device) != before:
                    return False
                with torch.no_grad():
                    alone = [self._by_example(self._reached(row), row)[0] for row in rows.split(1)]
            except _Unfit:
                return False
            rounding = ROUNDING[precision if together.dtype == torch.float32 else "bfloat16"]
            if not all(map(partial(_close, rounding=rounding), alone, self._by_example(together, rows))):
                return False
            if self._bypassed(rows[:TRACED]):
                return False
            return self._answers_as_before(rows, rounding)

    def _answers_as_before(self, rows: Tensor, rounding: float) -> bool:
        with torch.no_grad(), _moved(self._model):
            with seeded(0, self._device):
                plain = self._answer(rows)
            try:
                with self.of(rows), seeded(0, self._device):
                    kept = self._answer(rows)
            except torch.OutOfMemoryError:
                raise
            # What a model's own code raises where the first blocks hand on what they were given.
            except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError):
                return False
        return _close(kept, plain, rounding)

    def _bypassed(self, rows: Tensor) -> bool:
        """Whether a block runs out of turn, or the answer depends on one otherwise than through the last."""
        ran: list[nn.Module] = []
        marks: list[Tensor] = []  # all that the blocks are given

        def mark(value: object) -> object:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            marks.append(value.detach().requires_grad_())
            return marks[-1].clone()  # a block may change it in place

        def enter(block: nn.Module, given: tuple, named: dict) -> tuple[object, object]:
            ran.append(block)
            return tree_map(mark, given), tree_map(mark, named)

        def leave(_block: nn.Module, _given: object, output: object) -> object:
            return tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, output)

        handles = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in self.blocks]
        handles.append(self.blocks[-1].register_forward_hook(leave))
        try:
            with torch.enable_grad():
                answer = self._answer(rows)
        finally:
            for handle in handles:
                handle.remove()
        return ran != self.blocks or _depends(answer, marks)

    def _answer(self, rows: Tensor) -> Tensor:
        return ask(self._readout, self._model, self._examples, rows)[0].float()

    def _states(self, rows: Tensor) -> Tensor:
        """What the last block gives for a batch, (batch, tokens, features), 0 where it is padded."""
        found = {row: self._kept.get(row) for row in rows.tolist()}
        if new := [row for row, state in found.items() if state is None]:
            with torch.no_grad():
                states = self._by_example(self._reached(torch.tensor(new)), torch.tensor(new))
            for row, state in zip(new, states, strict=True):
                found[row] = state
                if self._bytes + state.nbytes <= MOST_BYTES:
                    self._kept[row] = state.clone()
                    self._bytes += state.nbytes
        return pad_sequence([found[row] for row in rows.tolist()], batch_first=True)

    def _by_example(self, states: Tensor, rows: Tensor) -> list[Tensor]:
        """The states of each example of a batch, without those of padding."""
        real = real_positions(self._examples.batch(rows))
        return (
            list(states) if real is None else [s[r.to(s.device)] for s, r in zip(states, real, strict=True)]
        )

    def _reached(self, rows: Tensor) -> Tensor:
        """What the last block gives for a batch, (batch, tokens, features); the model goes no further.

        Raises:
            _Unfit: that is nothing which could be kept for each example.
        """

        def stop(_block: nn.Module, _given: object, output: object) -> None:
            raise _Reached(output)

        handle = self.blocks[-1].register_forward_hook(stop)
        try:
            self._answer(rows)
        except _Reached as reached:
            output = reached.args[0]
        else:
            raise _Unfit
        finally:
            handle.remove()
        self._in_tuple = isinstance(output, tuple) and len(output) == 1
        states = output[0] if self._in_tuple else output
        real = real_positions(self._examples.batch(rows))
        expected = (len(rows),) if real is None else tuple(real.shape)
        if not isinstance(states, Tensor) or states.shape[: len(expected)] != expected or states.ndim < 2:
            raise _Unfit
        return states

    def _wrapped(self, states: Tensor) -> Tensor | tuple[Tensor]:
        return (states,) if self._in_tuple else states


class _Reached(Exception):
    """The model has come to the end of the blocks, with what the last one gives."""


class _Unfit(Exception):
    """The last block is not reached, or does not give one tensor with something for each example."""


def _depends(answer: Tensor, marks: Sequence[Tensor]) -> bool:
    """Whether one of the leaves is in the graph of the answer, whatever its gradient would be."""
    wanted, seen, nodes = {id(mark) for mark in marks}, set(), [answer.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if id(getattr(node, "variable", None)) in wanted:
            return True
        seen.add(node)
        nodes += [earlier for earlier, _ in node.next_functions]
    return False


@contextmanager
def _moved(model: nn.Module) -> Iterator[None]:
    """For a while all that is trained is a little way off, so that no gate is closed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    try:
        with torch.no_grad(), seeded(0, next(model.parameters()).device):
            for p in trained:
                p.add_(torch.randn_like(p), alpha=MOVED)
        yield
    finally:
        with torch.no_grad():
            for p, old in zip(trained, before, strict=True):
                p.copy_(old)


def random_states(device: torch.device) -> list[object]:
    """Of all generators that a model may draw from."""
    there = [] if device.type == "cpu" else [torch.get_device_module(device).get_rng_state(device)]
    of_torch = [state.numpy().tobytes() for state in (torch.get_rng_state(), *there)]
    _, numbers, place, *rest = np.random.get_state()  # noqa: NPY002 - the one that other libraries draw from
    return [*of_torch, random.getstate(), numbers.tobytes(), place, *rest]


def _close(found: Tensor, expected: Tensor, rounding: float) -> bool:
    """Never so if a value is NaN."""
    difference = (found.float() - expected.float()).norm()
    return bool(difference <= rounding * expected.float().norm())


def frozen_prefix(
    model: nn.Module, readout: Readout, examples: Examples, *, visits: int, precision: str = "float32"
) -> FrozenPrefix:
    """What passes over the blocks of ``model`` below the first that is trained.

    Blocks are the modules of an nn.ModuleList or nn.Sequential. The model runs as it is where nothing would
    be gained (no example comes twice, no block is frozen), where something below is trained or random, as
    dropout is, where a block's states depend on the other examples of a batch, where the model would answer
    otherwise, as one whose upper blocks read from lower ones, even through a gate that is still closed, and
    where it is compiled.

    Args:
        model: in training mode, as it will be trained.
        readout: how it is asked.
        examples: to train on.
        visits: how many of them all steps together take.
        precision: of the run.
    """
    blocks = _frozen_blocks(model)
    moving = any(
        isinstance(module, _NormBase) and module.training and module.track_running_stats
        for module in model.modules()
    )
    compiled = any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules())
    prefix = FrozenPrefix(model, readout, examples, blocks)
    useful = visits > len(examples) and blocks and not (moving or compiled) and prefix.fits(precision)
    return prefix if useful else FrozenPrefix(model, readout, examples, [])


def _frozen_blocks(model: nn.Module) -> list[nn.Module]:
    """The frozen beginning of a list of blocks, of that list where it holds the most weights."""
    stacks = [module for module in model.modules() if isinstance(module, (nn.ModuleList, nn.Sequential))]
    frozen = [
        list(takewhile(lambda b: not any(p.requires_grad for p in b.parameters()), stack)) for stack in stacks
    ]
    sizes = [sum(p.numel() for block in blocks for p in block.parameters()) for blocks in frozen]
    return frozen[sizes.index(max(sizes))] if max(sizes, default=0) else []
