"""Singular values of whole models: lora_lens against WeightWatcher, in one run.

    python benchmarks/values.py [--threads 1 2] [--repeats 3] [--out benchmarks/results]

ViT-B/16 has random weights (its shapes decide the cost), SmolLM2-135M its own, through
transformers. Both tools get the same model in memory and the same linear layers; reading the model
is not measured, and neither keeps anything from one repeat to the next. Nothing is reported unless
both took the same layers and every singular value agrees to 1e-6 of its weight's largest.

``analyze()`` always fits a power law to each spectrum as well, which no option turns off, and never
returns the values. So two pairs of rows compare like with like:

- singular values: ours with ``vectors=False``; WeightWatcher with its fit replaced by nothing, which
  leaves its SVD and norms. This is the cheapest it can be, cheaper than any of its settings;
- singular values and power laws: ours with ``power_law`` of each spectrum; ``analyze()`` as it is
  by default (its plots, randomization and Marchenko-Pastur fits are off by default).

On a machine without CUDA its ``svd_method`` makes no difference: "fast", the default, is SciPy's
LAPACK in float64 like "accurate". With CUDA "fast" would be torch in float32 on the GPU, so
"accurate" is asked for here.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from measuring import (
    OTHERS,
    OURS,
    alternating,
    machine,
    markdown,
    models,
    options,
    publish,
    seconds,
    spread,
    threads,
    weightwatcher,
)
from torch import nn

import lora_lens as ll
from lora_lens.spectrum.measures import power_law
from lora_lens.spectrum.sources.matrices import weights

AGREEMENT = 1e-6  # of the largest singular value
VALUES, WW_VALUES = "lora_lens: values", "WeightWatcher: values, its fit removed"
FITS, WW_FITS = "lora_lens: values and power laws", "WeightWatcher: analyze()"

ww = weightwatcher()


class ValuesOnly(ww.WeightWatcher):
    """WeightWatcher without its power-law fit, which keeps each layer's eigenvalues."""

    def apply_esd(self, layer, params=None):
        layer = super().apply_esd(layer, params)
        self.eigenvalues[layer.longname] = layer.evals
        return layer

    def apply_powerlaw(self, layer, params=None):
        layer.add_column("alpha", 1.0)  # its norms are computed with this exponent
        return layer

    def analyze(self, *arguments, **settings):
        self.eigenvalues = {}
        return super().analyze(*arguments, **settings)


def values(model: nn.Module) -> ll.SpectrumSet:
    return ll.spectra(model, vectors=False, cache=False, progress=False)


class Contest:
    """Both tools on one model, each of which remembers its last result."""

    def __init__(self, model: nn.Module):
        self.model, self.ours = model, ll.SpectrumSet([])
        self.plain, self.bare = ww.WeightWatcher(model=model), ValuesOnly(model=model)
        # No layer may be cut off: max_evals=0 is no limit, min_evals=1 keeps the smallest.
        limits = {"min_evals": 1, "max_evals": 0}
        known = self.plain.describe(**limits)
        ids = known.layer_id[known.longname.isin([w.name for w in weights(model)])].tolist()
        self.settings = {"layers": ids, "svd_method": "accurate", **limits}

    def rows(self) -> dict[str, Callable[[], float]]:
        return {
            VALUES: lambda: seconds(self.values),
            WW_VALUES: lambda: seconds(lambda: self.bare.analyze(**self.settings)),
            FITS: lambda: seconds(lambda: [power_law(s.singular_values) for s in self.values().values()]),
            WW_FITS: lambda: seconds(lambda: self.plain.analyze(**self.settings)),
        }

    def values(self) -> ll.SpectrumSet:
        self.ours = values(self.model)
        return self.ours

    def agreement(self) -> float:
        """The largest difference of a singular value, as a share of its weight's largest."""
        for layers in (set(self.bare.eigenvalues), set(self.plain.details.longname)):
            if layers != set(self.ours):
                raise SystemExit(f"the tools took different layers: {sorted(layers ^ set(self.ours))}")
        worst = max(self.difference(spectrum) for spectrum in self.ours.values())
        if worst > AGREEMENT:
            raise SystemExit(f"values differ by {worst:.1e} of the largest, more than {AGREEMENT}")
        return worst

    def difference(self, spectrum: ll.Spectrum) -> float:
        theirs = torch.from_numpy(self.bare.eigenvalues[spectrum.name]).clamp_min(0).sqrt().flip(0)
        if len(theirs) != spectrum.k:
            raise SystemExit(f"{spectrum.name}: {len(theirs)} values against {spectrum.k}")
        return float((theirs - spectrum.singular_values).abs().max() / theirs[0])


def table(measured: dict[str, list[float]]) -> str:
    median = {name: statistics.median(times) for name, times in measured.items()}
    against = {WW_VALUES: VALUES, WW_FITS: FITS}
    rows = [
        (name, spread(times), f"{median[name] / median[against[name]]:.1f}x" if name in against else "")
        for name, times in measured.items()
    ]
    return markdown(("contender", "median s (min to max)", "over lora_lens"), rows)


def picture(measured: dict[str, dict[str, list[float]]]) -> Figure:
    figure, axes = plt.subplots(
        len(measured), 1, figsize=(8, 0.6 + 1.5 * len(measured)), squeeze=False, layout="constrained"
    )
    for axis, (title, rows) in zip(axes[:, 0], measured.items(), strict=True):
        middle = [statistics.median(times) for times in rows.values()]
        around = [
            [m - min(times) for m, times in zip(middle, rows.values(), strict=True)],
            [max(times) - m for m, times in zip(middle, rows.values(), strict=True)],
        ]
        colors = [OURS if name.startswith("lora_lens") else OTHERS for name in rows]
        axis.barh(list(rows), middle, xerr=around, color=colors)
        axis.invert_yaxis()
        axis.set_title(title, loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("seconds: median, smallest and largest")
    return figure


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    logging.getLogger("weightwatcher").setLevel(logging.ERROR)

    measured: dict[str, dict[str, list[float]]] = {}
    parts = ["# Singular values of whole models", f"{machine()}, WeightWatcher {ww.__version__}"]
    for name, model in models().items():
        contest = Contest(model)
        for count in arguments.threads:
            title = f"{name}, {count} thread{'s' if count > 1 else ''}"
            with threads(count):
                measured[title] = alternating(contest.rows(), arguments.repeats, title)
            agreed = f"values agree to {contest.agreement():.0e} of the largest"
            parts += [f"## {title}", f"{len(contest.ours)} weights, {agreed}", table(measured[title])]
    publish(arguments.out, "values", "\n\n".join(parts), picture(measured))


if __name__ == "__main__":
    main()
