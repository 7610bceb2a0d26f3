"""O-LoRA: each task's adapter reads other directions."""

from __future__ import annotations

from dataclasses import dataclass

from peft import PeftModel
from torch import Tensor, nn

from lora_lens._base.errors import InputError
from lora_lens.adapters.injection import ADAPTER, lora_layers
from lora_lens.adapters.start import factor_matrix
from lora_lens.training.regularizers.base import LossTerm, Past, Regularizer, check_strength
from lora_lens.training.settings import Training


@dataclass(frozen=True)
class Orthogonal(Regularizer):
    """Each task's LoRA reads other directions of the input than the earlier ones: O-LoRA.

    The term is strength * sum_i ||A_i A^T||_F^2 over the earlier tasks i and all layers, with A (rank, in) of
    the current task (Wang et al. 2023, "Orthogonal subspace learning for language model continual
    learning", arXiv 2310.14152, equation 8). It is the trace of A G A^T with G = sum_i A_i^T A_i, so one
    (in, in) matrix per layer is kept however many tasks there were. The earlier adapters stay in the weights.

    Attributes:
        strength: the weight of the term, lambda_1 in the paper; 0 or more.

    Raises:
        ValueError: ``strength`` is negative or not finite; or a run starts that is not part of a sequence.

    Example:
        >>> import lora_lens as ll
        >>> print(ll.experiments.continual.Merged(ll.training.Orthogonal(0.5)))
        merged, O-LoRA 0.5
    """

    strength: float

    def __post_init__(self) -> None:
        check_strength(self)

    def __str__(self) -> str:
        return f"O-LoRA {self.strength:.15g}"

    def begin(self, model: nn.Module, past: Past, config: Training) -> LossTerm:
        if past.kept is None:
            raise InputError(
                "Orthogonal keeps a task's adapter apart from those of earlier tasks, and a run by itself "
                "has none: give it to the strategy of a sequence, Merged(Orthogonal(...))"
            )
        pairs = [
            (layer.lora_A, past.kept[name].to(layer.lora_A[ADAPTER].weight))
            for name, layer in _adapters(model).items()
        ]

        def size(a: Tensor, gram: Tensor) -> Tensor:
            return ((a @ gram) * a).sum()

        def extra() -> Tensor:
            return self.strength * sum(size(a[ADAPTER].weight.flatten(1), gram) for a, gram in pairs)

        return extra

    def keep(self, model: nn.Module, past: Past, config: Training) -> dict[str, Tensor]:
        grams = {}
        for name, layer in _adapters(model).items():
            a = factor_matrix(layer.lora_A).float().cpu()
            grams[name] = a.T @ a + past.kept.get(name, 0)
        return grams


def _adapters(model: nn.Module) -> dict[str, nn.Module]:
    return lora_layers(model) if isinstance(model, PeftModel) else {}
