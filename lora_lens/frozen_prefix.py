"""The frozen beginning of a model, whose hidden states are kept instead of computed at every step.

Where only the upper blocks are trained, the lower ones make the same of an example each time it comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import takewhile

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.rnn import pad_sequence

from lora_lens.errors import InputError
from lora_lens.precision import autocast
from lora_lens.readouts import Readout, ask, real_positions
from lora_lens.tasks import Examples

MOST_BYTES = 2 * 10**9  # of hidden states; those of further examples are computed each time
TRIED = 8  # examples on which it is tested that the model answers as without it
ROUNDING = 0.01  # of these answers, relative: matrix products in bfloat16 depend on the batch


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
        """Whether its states depend on nothing but the example, and the model answers as without it."""
        rows = torch.arange(min(TRIED, len(self._examples)))
        devices = [self._device] if self._device.type == "cuda" else []

        def seeded(answer: Callable[[Tensor], Tensor]) -> Tensor:
            torch.manual_seed(0)
            return answer(rows)

        try:
            with torch.random.fork_rng(devices), autocast(self._device, precision):
                first = seeded(self._draw)
                if seeded(self._reached).requires_grad or self._draw(rows) != first:
                    return False
                with torch.no_grad():
                    plain = seeded(self._answer)
                    with self.of(rows):
                        kept = seeded(self._answer)
        except Exception:  # a model may break in any way when blocks are passed over; then it runs as it is
            return False
        return bool((kept - plain).norm() <= ROUNDING * plain.norm())

    def _draw(self, _rows: Tensor) -> Tensor:
        return torch.rand(1, device=self._device)

    def _answer(self, rows: Tensor) -> Tensor:
        return ask(self._readout, self._model, self._examples, rows)[0].float()

    def _states(self, rows: Tensor) -> Tensor:
        """What the last block gives for a batch, (batch, tokens, features), 0 where it is padded."""
        found = {row: self._kept.get(row) for row in rows.tolist()}
        if new := [row for row, state in found.items() if state is None]:
            with torch.no_grad():
                states = self._reached(torch.tensor(new))
            real = real_positions(self._examples.batch(torch.tensor(new)))
            for place, row in enumerate(new):
                found[row] = states[place] if real is None else states[place, real[place].to(self._device)]
                if self._bytes + found[row].nbytes <= MOST_BYTES:
                    self._kept[row] = found[row].clone()
                    self._bytes += found[row].nbytes
        return pad_sequence([found[row] for row in rows.tolist()], batch_first=True)

    def _reached(self, rows: Tensor) -> Tensor:
        """What the last block gives for a batch, (batch, tokens, features); the model goes no further."""

        def stop(_block: nn.Module, _given: object, output: object) -> None:
            raise _Reached(output)

        handle = self.blocks[-1].register_forward_hook(stop)
        try:
            self._answer(rows)
        except _Reached as reached:
            output = reached.args[0]
        else:
            raise InputError("the model does not use these blocks")
        finally:
            handle.remove()
        self._in_tuple = isinstance(output, tuple)
        (states,) = output if self._in_tuple else (output,)
        return states

    def _wrapped(self, states: Tensor) -> Tensor | tuple[Tensor]:
        return (states,) if self._in_tuple else states


class _Reached(Exception):
    """The model has come to the end of the blocks, with what the last one gives."""


def frozen_prefix(
    model: nn.Module, readout: Readout, examples: Examples, *, visits: int, precision: str = "float32"
) -> FrozenPrefix:
    """What passes over the blocks of ``model`` below the first that is trained.

    Blocks are the modules of an nn.ModuleList or nn.Sequential. The model runs as it is where nothing would
    be gained (no example comes twice, no block is frozen), where something below is trained or random, as
    dropout is, and where the model would answer otherwise, as one whose upper blocks read from lower ones.

    Args:
        model: in training mode, as it will be trained.
        readout: how it is asked.
        examples: to train on.
        visits: how many of them all steps together take.
        precision: of the run.
    """
    blocks = _frozen_blocks(model)
    moving = any(isinstance(module, _BatchNorm) and module.training for module in model.modules())
    prefix = FrozenPrefix(model, readout, examples, blocks)
    useful = visits > len(examples) and blocks and not moving and prefix.fits(precision)
    return prefix if useful else FrozenPrefix(model, readout, examples, [])


def _frozen_blocks(model: nn.Module) -> list[nn.Module]:
    """The frozen beginning of a list of blocks, of that list where it holds the most weights."""
    stacks = [module for module in model.modules() if isinstance(module, (nn.ModuleList, nn.Sequential))]
    frozen = [
        list(takewhile(lambda b: not any(p.requires_grad for p in b.parameters()), stack)) for stack in stacks
    ]
    sizes = [sum(p.numel() for block in blocks for p in block.parameters()) for blocks in frozen]
    return frozen[sizes.index(max(sizes))] if max(sizes, default=0) else []
