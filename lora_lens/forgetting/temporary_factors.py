"""Other factors in an adapter's layers for a while, which put the model at a point of a way back.

An adapted layer computes W + scaling (X - B_0 A_0) for whatever product X of factors it is given, in the
residual form because its base holds W - scaling B_0 A_0. So X = t B A + (1 - t) B_0 A_0 makes it W + t dW:
the base is not touched, and all that a point needs is factors of twice the rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from peft import PeftModel
from torch import Tensor, nn

from lora_lens._base.errors import InputError
from lora_lens._base.naming import listed
from lora_lens.adapters.injection import (
    attached,
    lora_layers,
    moved_buffers,
    require_enabled,
    require_unmerged,
    whole_modules,
)
from lora_lens.adapters.peft_names import ADAPTER
from lora_lens.adapters.stacks import StackedLayer, layer_stack, packed
from lora_lens.adapters.start import Start, factor_matrix, is_dora, trained_update
from lora_lens.forgetting.rewind_paths import Moved, Part
from lora_lens.forgetting.weight_drift import (
    require_finite,
    require_start_of,
    some_rows,
    spectrum_of,
    start_rows,
)
from lora_lens.spectrum.factorizing import factorize
from lora_lens.spectrum.layer_weights import weight_of
from lora_lens.spectrum.spectrum import Spectrum, SpectrumSet

Factors = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class TrainedLayer:
    """The factors of one layer as they were when it was rewound, and those that it started from."""

    b: Tensor
    a: Tensor
    start: Factors | None
    scaling: float
    moved: Moved

    def factors(self, t: float, part: Part) -> Factors:
        """What makes the layer compute W + t dW + (1 - t) K, in its dtype and on its device."""
        of_update, of_part = part.coefficients(t)
        terms = [(of_update, self.b, self.a)]
        if self.start is not None:
            terms.append((1 - of_update, *self.start))
        if part.b is not None:
            terms.append((of_part / self.scaling, part.b, part.a))
        terms = [term for term in terms if term[0]] or [(0.0, self.b[:, :1], self.a[:1])]
        if terms[0][0] == 1 and len(terms) == 1:
            return terms[0][1:]
        exact = torch.promote_types(self.b.dtype, torch.float32)
        place = {"device": self.b.device, "dtype": exact}
        b = torch.cat([c * factor.to(**place) for c, factor, _ in terms], dim=1)
        a = torch.cat([factor.to(**place) for _, _, factor in terms])
        return b.to(self.b.dtype), a.to(self.a.dtype)

    def update(self, t: float, part: Part) -> Factors:
        """Factors of t dW + (1 - t) K."""
        of_update, of_part = part.coefficients(t)
        b, a = self.moved.b, self.moved.a
        if part.b is None or of_part == 0:
            return of_update * b, a
        if of_update == 0:
            return of_part * part.b.to(b.dtype), part.a.to(a.dtype)
        return torch.cat([of_update * b, of_part * part.b.to(b.dtype)], dim=1), torch.cat(
            [a, part.a.to(a.dtype)]
        )


def trained_layers(
    peft_model: PeftModel, starts: Mapping[str, Start], spectra: SpectrumSet | None
) -> dict[str, TrainedLayer]:
    """The adapted layers by name.

    Raises:
        ValueError: one holds NaN.
    """
    layers = lora_layers(peft_model).items()
    return {name: _trained(name, layer, starts.get(name), spectra) for name, layer in layers}


def _trained(name: str, layer: nn.Module, start: Start | None, spectra: SpectrumSet | None) -> TrainedLayer:
    """The factors of a layer as they are now, and how to get at its pretrained weight."""
    b, a = (factor_matrix(f).clone() for f in (layer.lora_B, layer.lora_A))
    require_finite(name, b)
    require_finite(name, a)

    def weight() -> Tensor:
        return start_rows(layer, start, slice(None))

    @cache
    def spectrum() -> Spectrum:
        if spectra is None:
            return factorize(name, weight())
        found = spectrum_of(spectra, name)
        require_start_of(found, name, weight()[some_rows(found)])
        return found

    first = None if start is None else start.taken(layer)
    moved = Moved(*trained_update(layer, start), weight, spectrum)
    return TrainedLayer(b, a, first, layer.scaling[ADAPTER], moved)


def require_rewindable(adapted: nn.Module) -> None:
    """Raise a ValueError if the pretrained model cannot be reached by other factors of this adapter."""
    peft_model, record = attached(adapted)
    require_unmerged(peft_model)
    require_enabled(peft_model)
    for name, layer in lora_layers(peft_model).items():
        if is_dora(layer):
            raise InputError(
                f"{name} has DoRA, whose update is no product of factors, so nothing can be scaled: merge "
                "it (merge_and_unload) and interpolate the weights"
            )
    if moved := moved_buffers(peft_model, record):
        raise InputError(
            f"training moved {listed(moved, most=2)}: statistics of batch norms fit the trained weights "
            "only, and a point between would need its own; train with the norms in eval mode"
        )
    for name, wrapper in whole_modules(peft_model).items():
        for key, buffer in wrapper.modules_to_save[ADAPTER].named_buffers():
            if not torch.equal(buffer, wrapper.original_module.get_buffer(key)):
                raise InputError(
                    f"training moved {name}.{key}, which has no value between; train it in eval mode"
                )


@contextmanager
def factors_in(
    adapted: nn.Module,
    layers: Mapping[str, TrainedLayer],
    parts: Mapping[str, Part],
    t: float,
    *,
    whole: bool,
) -> Iterator[None]:
    """Other factors in the adapter's layers, and of what PEFT trains in full other values, for a while.

    The parameters that were there come back themselves, not copies.
    """
    require_rewindable(adapted)
    peft_model, _ = attached(adapted)
    changes: list[tuple[nn.Module, str, Tensor]] = []
    stacked: dict[nn.Module, list[Factors]] = {}
    for name, layer in lora_layers(peft_model).items():
        b, a = layers[name].factors(t, parts[name])
        if isinstance(layer, StackedLayer):
            stacked.setdefault(layer.wrapper, []).append((b, a))
            continue
        of_b, of_a = layer.lora_B[ADAPTER], layer.lora_A[ADAPTER]
        changes.append((of_b, "weight", b.reshape(*b.shape, *weight_of(of_b).shape[2:])))
        changes.append((of_a, "weight", a.reshape(len(a), *weight_of(of_a).shape[1:])))
    for wrapper, factors in stacked.items():  # PEFT keeps those of all experts of a tensor in one
        a, b = packed(layer_stack(wrapper), factors)
        changes.append((wrapper.lora_B[ADAPTER], "weight", b))
        changes.append((wrapper.lora_A[ADAPTER], "weight", a))
    for wrapper in whole_modules(peft_model).values() if whole and t != 1 else ():
        for key, old in wrapper.original_module.named_parameters():
            owner, _, last = key.rpartition(".")
            module = wrapper.modules_to_save[ADAPTER].get_submodule(owner)
            now = getattr(module, last).detach()
            changes.append((module, last, ((1 - t) * old.detach() + t * now).to(now.dtype)))
    before = [getattr(module, key) for module, key, _ in changes]
    try:
        for module, key, values in changes:
            setattr(module, key, nn.Parameter(values, requires_grad=False))
        yield
    finally:
        for (module, key, _), old in zip(changes, before, strict=True):
            setattr(module, key, old)
