"""Passes without gradients over many examples, in batches that fit in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lora_lens.tasks.task import Labelled

LARGEST = 2**27  # values in the largest tensor of a batch; in float32 they take half a GB

T = TypeVar("T")


def in_batches(
    model: nn.Module, examples: Labelled, run: Callable[[Tensor], T]
) -> Iterator[tuple[Tensor, T]]:
    """The examples' numbers, batch after batch, and what ``run`` makes of each batch.

    Batches are as large as :func:`batch_limit` allows. One that runs out of memory all the same is halved.

    Args:
        run: from the numbers of some examples, (batch,), to what is wanted of them; it may be called again
            with half of them.

    Raises:
        RuntimeError: a single example runs out of memory; whatever else ``run`` raises.
    """
    waiting = list(examples.in_batches(batch_limit(model, examples, run)))[::-1]
    while waiting:
        rows = waiting.pop()
        try:
            found = run(rows)
        except RuntimeError as error:
            if len(rows) == 1 or not should_reduce_batch_size(error):
                raise
            waiting += rows.tensor_split(2)[::-1]
        else:
            yield rows, found


def batch_limit(model: nn.Module, examples: Labelled, run: Callable[[Tensor], object]) -> int:
    """How many examples, or tokens of texts, a batch may have, for :meth:`lora_lens.Examples.in_batches`.

    The largest example is run alone to see the largest tensor that any module is given or gives. A batch
    may have as many as keep that tensor within ``LARGEST`` values, and at most ``examples.most``. So the
    limit depends on the model and the examples alone, not on the machine, and neither do the results.

    Args:
        run: as of :func:`in_batches`; it leaves nothing behind.
    """
    if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules()):
        return examples.most  # would be compiled again for one example
    row, size = examples.largest()
    values = 1

    def note(_module: nn.Module, given: object, output: object) -> None:
        nonlocal values
        tensors = [leaf for leaf in tree_leaves((given, output)) if isinstance(leaf, Tensor)]
        values = max(values, *(tensor.numel() for tensor in tensors))

    handles = [module.register_forward_hook(note) for module in model.modules()]
    try:
        run(torch.tensor([row]))
    finally:
        for handle in handles:
            handle.remove()
    return min(examples.most, LARGEST * size // values)
