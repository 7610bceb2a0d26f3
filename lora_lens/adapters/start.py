"""Where an adapter started, in one of two forms of one function with the same gradients.

Residual: the base holds W - scaling B_0 A_0, and PEFT's layer adds scaling B A. Offset: the base stays W, and
the layer adds scaling (B A - B_0 A_0). What attaches, saves, exports, measures or restores asks these
objects; nobody else tells the forms apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_lens._base.errors import InputError
from lora_lens._base.hashing import digest_of
from lora_lens._base.precision import as_double
from lora_lens.adapters.offset import added_factors, set_offset, start_in, unmerged_base, widened
from lora_lens.adapters.peft_names import ADAPTER
from lora_lens.adapters.pretrained import require_same
from lora_lens.adapters.stacks import StackedLayer
from lora_lens.spectrum.layer_weights import Layer, set_weight_matrix, weight_matrix, weight_of
from lora_lens.spectrum.stacks import StackedMatrix
from lora_lens.spectrum.svd import product_norm


@dataclass(frozen=True, eq=False)
class Start:
    """Where the adapter of one weight started: what must be known to undo it.

    Attributes:
        components: (rank,) indices of the components, ascending; empty where the factors are not made
            of components, as those of most of PEFT's own starts.
        b, a: the factors as they were stored, (out_features, rank) and (rank, in_features).
        digest: of the pretrained weight as a matrix, see :func:`lora_lens._base.hashing.digest_of`; "" where
            the base still has it.
        original: that weight, shared with the model that was given, and the version it had then;
            None if the model was adapted in place.
    """

    components: Tensor
    b: Tensor
    a: Tensor
    digest: str = ""
    original: Tensor | None = None
    version: int = 0

    form: ClassVar[str]
    changes_base: ClassVar[bool]

    def __deepcopy__(self, memo: dict[int, object]) -> Start:
        return self

    @classmethod
    def noted(
        cls, layer: LoraLayer, components: Tensor, digest: str = "", original: Tensor | None = None
    ) -> Start:
        """The start of a layer whose factors are those of the start, before the first training step."""
        b, a = (factor_matrix(f).clone() for f in (layer.lora_B, layer.lora_A))
        return cls(components, b, a, digest, original, 0 if original is None else original._version)

    @staticmethod
    def put(layer: LoraLayer, config: LoraConfig, keep: bool) -> None:
        """Have a layer that has its first factors compute what it did without them.

        Args:
            config: PEFT's.
            keep: the base's values go to new memory before they are changed.
        """
        raise NotImplementedError

    def taken(self, layer: LoraLayer) -> tuple[Tensor, Tensor]:
        """B_0 and A_0, (out_features, rank) and (rank, in_features), as they act now."""
        return self.b, self.a

    def pretrained(self, layer: LoraLayer, rows: slice = slice(None)) -> Tensor:
        """Rows of the pretrained weight, float64, on the CPU."""
        raise NotImplementedError

    def residual(self, layer: LoraLayer) -> Tensor:
        """W - scaling B_0 A_0, (out_features, in_features)."""
        raise NotImplementedError

    def weight(self, name: str, layer: LoraLayer) -> Tensor:
        """The pretrained weight as it was, in the layout of its layer.

        Raises:
            ValueError: it was not kept, or its model was trained meanwhile.
        """
        if self.original is None:
            raise InputError(
                f"the pretrained weight of {name} was not kept, because the model was adapted in place; "
                "pass original=, the pretrained model or its file"
            )
        if self.original._version != self.version:
            raise InputError(
                f"the pretrained model was changed after attach (its {name}.weight); pass original=, "
                "the pretrained model or its file"
            )
        return self.original

    def digest_in(self, name: str, layer: LoraLayer) -> str:
        """The digest of the pretrained weight."""
        return self.digest

    def require_restorable(self, name: str, layer: LoraLayer, given: Tensor | None) -> None:
        """Raise a ValueError if :meth:`restore` would not give the pretrained model.

        Args:
            given: the pretrained weight as a matrix, from another model or a file.
        """
        weight = self.weight(name, layer) if given is None else given
        if given is not None:
            require_same(name, given, self.digest_in(name, layer))
        base = layer.get_base_layer()
        dtype = (weight_of(base) if given is None else weight_matrix(base)).dtype
        if dtype != weight.dtype:
            raise InputError(
                f"{name} was cast from {weight.dtype} to {dtype} after attach, so what else the model holds "
                "was rounded and is not the pretrained model any more; take that one itself"
            )

    def restore(self, name: str, layer: LoraLayer, given: Tensor | None) -> None:
        """Give the base its pretrained weight, in memory of its own."""
        raise NotImplementedError

    def energy(self, layer: LoraLayer) -> float:
        """The share of ||W||_F^2 that the components hold, in [0, 1]; NaN where there are none."""
        if not len(self.components):
            return float("nan")
        window = layer.scaling[ADAPTER] ** 2 * float(product_norm(*self.taken(layer))) ** 2
        base = float(torch.linalg.norm(weight_matrix(layer.get_base_layer()).float())) ** 2
        # Window and residual are orthogonal, so their squared norms add up to that of the weight.
        whole = base + window if self.changes_base else base
        return window / whole if whole > 0 else 0.0

    def error(self, layer: LoraLayer) -> float:
        """||effective weight - W||_F / ||W||_F with the factors as attached; NaN if W was not kept."""
        if self.original is None:
            return float("nan")
        base = layer.get_base_layer()
        original = self.original.to(weight_of(base).device)
        original = as_double(original.T if isinstance(base, Conv1D) else original.flatten(1))
        norm = torch.linalg.norm(original)
        difference = self._at_start(layer) - original
        return float(torch.linalg.norm(difference) / norm) if norm > 0 else 0.0

    def _at_start(self, layer: LoraLayer) -> Tensor:
        """The effective weight with the factors as attached, float64."""
        raise NotImplementedError


class Residual(Start):
    form, changes_base = "residual", True

    @staticmethod
    @torch.no_grad()
    def put(layer: LoraLayer, config: LoraConfig, keep: bool) -> None:
        if isinstance(layer, StackedLayer):
            return layer.subtract_start(keep)
        base, scaling = layer.get_base_layer(), layer.scaling[ADAPTER]
        weight = weight_of(base)
        if keep:
            weight.data = weight.data.clone()
        matrix = weight_matrix(base)
        exact = torch.promote_types(matrix.dtype, torch.float32)
        b, a = (factor_matrix(f).to(exact) for f in (layer.lora_B, layer.lora_A))
        if matrix.dtype == exact:
            residual = matrix.addmm_(b, a, alpha=-scaling)
        else:
            residual = torch.addmm(matrix.to(exact), b, a, alpha=-scaling)
        if residual.data_ptr() != weight.data_ptr():
            set_weight_matrix(base, residual)
        if is_dora(layer):  # as long as the rows of the sum now are
            magnitude: Any = layer.lora_magnitude_vector[ADAPTER]
            magnitude.update_layer(
                base_layer=base,
                lora_A=layer.lora_A[ADAPTER].weight,
                lora_B=layer.lora_B[ADAPTER].weight,
                scaling=scaling,
            )

    def pretrained(self, layer: LoraLayer, rows: slice = slice(None)) -> Tensor:
        b, a = (f.to("cpu", torch.float64) for f in (self.b[rows], self.a))
        return torch.addmm(base_rows(layer, rows), b, a, alpha=layer.scaling[ADAPTER])

    def residual(self, layer: LoraLayer) -> Tensor:
        return weight_matrix(layer.get_base_layer())

    def restore(self, name: str, layer: LoraLayer, given: Tensor | None) -> None:
        base = layer.get_base_layer()
        if given is None and isinstance(base, StackedMatrix):  # a part of a tensor
            weight_of(base).data.copy_(self.weight(name, layer))
        elif given is None:
            now = weight_of(base)
            now.data = self.weight(name, layer).to(now.device, copy=True)
        else:
            set_weight_matrix(base, given)

    def _at_start(self, layer: LoraLayer) -> Tensor:
        now, b, a = map(as_double, (weight_matrix(layer.get_base_layer()), self.b, self.a))
        return torch.addmm(now, b, a, alpha=layer.scaling[ADAPTER])


class Offset(Start):
    form, changes_base = "offset", False

    @staticmethod
    def put(layer: LoraLayer, config: LoraConfig, keep: bool) -> None:
        set_offset(layer, config)

    def taken(self, layer: LoraLayer) -> tuple[Tensor, Tensor]:
        b, a = start_in(layer) or (self.b, self.a)
        return b.flatten(1), a.flatten(1)

    def pretrained(self, layer: LoraLayer, rows: slice = slice(None)) -> Tensor:
        return base_rows(layer, rows)

    def residual(self, layer: LoraLayer) -> Tensor:
        matrix, scaling = weight_matrix(layer.get_base_layer()), layer.scaling[ADAPTER]
        b, a = (f.float() for f in self.taken(layer))
        return torch.addmm(matrix.float(), b, a, alpha=-scaling).to(matrix.dtype)

    def weight(self, name: str, layer: LoraLayer) -> Tensor:
        return weight_of(unmerged_base(layer)) if self.original is None else super().weight(name, layer)

    def digest_in(self, name: str, layer: LoraLayer) -> str:
        base = unmerged_base(layer)
        if self.original is None:
            return digest_of(weight_matrix(base))
        weight = self.weight(name, layer)
        return digest_of(weight.T if isinstance(base, Conv1D) else weight.flatten(1))

    def restore(self, name: str, layer: LoraLayer, given: Tensor | None) -> None:
        if layer.merged:
            layer.unmerge()
        if self.original is not None:  # whose memory it is
            weight = weight_of(layer.get_base_layer())
            weight.data = weight.data.clone()

    def error(self, layer: LoraLayer) -> float:
        return 0.0 if self.original is None else super().error(layer)

    def _at_start(self, layer: LoraLayer) -> Tensor:
        return as_double(weight_matrix(layer.get_base_layer()))


FORMS: Mapping[str, type[Start]] = {kind.form: kind for kind in (Residual, Offset)}


def form_for(name: str, layer: Layer, fixed: Mapping[str, str], wanted: str) -> type[Start]:
    """The form in which a layer starts: the wanted one, or offset where its base must not change.

    Args:
        fixed: why some bases must not, by name.

    Raises:
        ValueError: it is offset, and PEFT adapts the weight as a parameter.
    """
    form = FORMS["offset" if name in fixed else wanted]
    if not form.changes_base and isinstance(layer, StackedMatrix):
        why = fixed.get(name, "would start in the offset form")
        raise InputError(
            f"{name} {why}, and PEFT's adapters of parameters have the residual form alone; leave it out of "
            "the targets"
        )
    return form


def set_factors(layer: LoraLayer, b: Tensor, a: Tensor) -> None:
    """Give a layer its first factors, (out, rank) and (rank, in)."""
    with torch.no_grad():
        factor_matrix(layer.lora_B).copy_(b)
        factor_matrix(layer.lora_A).copy_(a)


def factor_matrix(factor: nn.ModuleDict) -> Tensor:
    """A layer's A (rank, in_features) or B (out_features, rank), a view, also of a convolution's."""
    return weight_of(factor[ADAPTER]).detach().flatten(1)


def is_dora(layer: LoraLayer) -> bool:
    return ADAPTER in getattr(layer, "lora_magnitude_vector", {})


def base_rows(layer: LoraLayer, rows: slice = slice(None)) -> Tensor:
    """Rows of what the base holds, float64, on the CPU."""
    return weight_matrix(layer.get_base_layer())[rows].to("cpu", torch.float64)


def effective_weight(layer: LoraLayer) -> Tensor:
    """The weight with its adapter, (out_features, in_features), float64, on the CPU."""
    b, a = (f.to("cpu", torch.float64) for f in added_factors(layer))
    weight = torch.addmm(base_rows(layer), b, a, alpha=layer.scaling[ADAPTER])
    if is_dora(layer):
        lengths = weight_of(layer.lora_magnitude_vector[ADAPTER]).detach().to("cpu", torch.float64)
        weight *= lengths.reshape(-1, 1) / torch.linalg.vector_norm(weight, dim=1, keepdim=True)
    return weight


def trained_update(layer: LoraLayer, start: Start | None) -> tuple[Tensor, Tensor]:
    """Factors (out, R) and (R, in) of what was trained, float32 or more."""
    scaling = layer.scaling[ADAPTER]
    b, a = (factor_matrix(f).cpu() for f in (layer.lora_B, layer.lora_A))
    exact = torch.promote_types(b.dtype, torch.float32)
    b, a = b.to(exact), a.to(exact)
    if start is None:
        return scaling * b, a
    b0, a0 = (f.cpu().to(exact) for f in start.taken(layer))
    if b.shape != b0.shape:  # rewound for a while, see lora_lens.rewind
        b, a = widened(b, a, b0, a0)
        return scaling * b, a
    b, a = product_change(b, a, b0, a0)
    return scaling * b, a


def product_change(b: Tensor, a: Tensor, b0: Tensor, a0: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of B A - B_0 A_0, which lose nothing where it is small; all are (out, r) or (r, in)."""
    if torch.equal(b, b0):
        return b, a - a0
    if torch.equal(a, a0):
        return b - b0, a
    return torch.cat([b - b0, b0], dim=1), torch.cat([a, a - a0])
