"""What to train with, without any run of one's own: by the sweeps that are stored in ``data/results``."""

from __future__ import annotations

import pandas as pd
from torch import nn

from lora_lens._base.errors import InputError
from lora_lens._base.naming import Targets
from lora_lens._base.validate import instance
from lora_lens.adapters.attaching import planned
from lora_lens.adapters.methods import LoRA
from lora_lens.experiments.advisor import Advice
from lora_lens.tasks.task import Task
from lora_lens.training.regularizers.base import Regularized
from lora_lens.training.regularizers.l2_to_initial import L2ToInitial

NAN = float("nan")  # compared with itself
STRENGTH, RATE = 0.01, 5e-3
BEST, OWN_RATE = "LoRA, L2 to initial 0.01, 0.005", "own sweep of LoRA, L2 to initial 0.01"
MIDDLE = "window 0.5, 0.005"  # what the others are compared with
COLUMNS = (
    "goal", "rule", "families", "settings", "regret", "better", "difference", "low", "high", "p_holm",
)  # fmt: skip
# Rows of data/results/rules.csv; data/compare_rules.py says what they are, and a test that they agree.
EVIDENCE = (
    ("kept", "LoRA, L2 to initial 0.01, 0.005", 5, 6, 0.0001, 3, -0.0202, -0.0602, 0.0198, 1.0),
    ("kept", "LoRA, L2 to initial 0.01, 0.01", 5, 6, 0.0189, 4, -0.0014, -0.0548, 0.0521, 1.0),
    ("kept", "own sweep of LoRA, L2 to initial 0.01", 5, 6, -0.0089, 5, -0.0292, -0.0663, 0.0079, 1.0),
    ("kept", "LoRA, 0.005", 5, 13, 0.0237, 2, 0.0021, -0.024, 0.0282, 1.0),
    ("kept", "window 0.5, 0.005", 5, 15, 0.0157, 0, 0.0, 0.0, 0.0, NAN),
    ("kept", "own sweep of window 0.5", 5, 15, 0.0079, 2, -0.0078, -0.0216, 0.0059, 1.0),
    ("kept", "own sweep of windows", 5, 15, 0.0076, 4, -0.0081, -0.0231, 0.0068, 1.0),
    ("kept", "window 1, 0.005", 5, 15, 0.0305, 1, 0.0149, -0.0085, 0.0382, 1.0),
    ("kept", "window 0, 0.005", 5, 13, 0.2554, 0, 0.2338, 0.0541, 0.4135, 1.0),
    ("kept", "ridge on rate and position", 5, 15, 0.0125, 3, -0.0032, -0.0218, 0.0154, 1.0),
    ("area", "LoRA, L2 to initial 0.01, 0.005", 5, 6, -0.006, 4, -0.0094, -0.0239, 0.0052, 1.0),
    ("area", "own sweep of LoRA, L2 to initial 0.01", 5, 6, -0.006, 4, -0.0094, -0.0239, 0.0052, 1.0),
    ("area", "LoRA, 0.005", 5, 13, 0.009, 1, 0.0027, -0.0141, 0.0194, 1.0),
    ("area", "window 0.5, 0.005", 5, 15, 0.0083, 0, 0.0, 0.0, 0.0, NAN),
    ("area", "own sweep of window 0.5", 5, 15, 0.0083, 0, 0.0, 0.0, 0.0, NAN),
    ("area", "own sweep of windows", 5, 15, 0.0114, 1, 0.0031, -0.0054, 0.0116, 1.0),
    ("area", "window 1, 0.005", 5, 15, 0.0308, 1, 0.0225, -0.0063, 0.0512, 1.0),
    ("area", "window 0, 0.005", 5, 13, 0.1976, 0, 0.1912, 0.0468, 0.3356, 0.8511),
    ("area", "ridge on rate and position", 5, 15, 0.0122, 2, 0.0039, -0.0165, 0.0243, 1.0),
)  # fmt: skip


def evidence() -> pd.DataFrame:
    """Some rules of ``data/results/rules.csv``, in shares: a negative difference is less regret."""
    return pd.DataFrame(EVIDENCE, columns=COLUMNS)


def advise(model: nn.Module, task: Task, retain: Task, *, rank: int = 8, targets: Targets = None) -> Advice:
    """What to train with, by stored sweeps of other tasks: nothing is trained, and the task is not looked at.

    Of the rules that need no run it had the least regret in these sweeps, for accuracy with at most 2 points
    forgotten and for the area under the trade-off: ordinary LoRA under a small L2 (Li, Grandvalet and Davoine
    2018, arXiv 1802.01483), and no window. ``data/compare_rules.py`` has the rules and how they are judged;
    the evidence says how sure that is. A sweep of its rates says more, see :meth:`lora_lens.Sweep.best` of
    windows and ``docs/sweeps.md``.

    Args:
        model: the pretrained model; it is left as it was.
        task: what to learn.
        retain: what the model can do and should not forget.
        rank: of LoRA, at least 1.
        targets: the layers to adapt, as for :func:`lora_lens.attach`.

    Returns:
        Advice whose evidence has some rows of ``data/results/rules.csv``, one per goal and rule. Columns:
        goal (kept, area), rule; families (pairs of model and task) and settings that it was judged in;
        regret; better (families where it has less than the middle window at 0.005), difference (of the two,
        in shares; negative is less regret), low and high (its 95% interval over families) and
        p_holm.

    Raises:
        ValueError: no retained task, or the method does not fit the model.
        TypeError: an argument is of another type.

    Example:
        >>> import torch
        >>> from timm.models import VisionTransformer
        >>> import lora_lens as ll
        >>> shape = {"img_size": 28, "patch_size": 14, "in_chans": 1, "num_classes": 2}
        >>> model = VisionTransformer(**shape, embed_dim=16, depth=1, num_heads=2)  # random weights
        >>> images = ll.Examples(torch.randn(20, 1, 28, 28), torch.arange(20) % 2)
        >>> task = ll.Task("noise", ("even", "odd"), images, images)
        >>> advice = ll.advise(model, task, retain=task, rank=2)
        >>> print(advice.method, "with learning rate", advice.lr)
        LoRA of rank 2, L2 to initial 0.01 with learning rate 0.005
        >>> grid = ll.Grid(lr=[2e-3, advice.lr, 1e-2], baselines=[advice.method])
    """
    if retain is None:
        raise InputError(
            "advice needs the task that the model knows: its forgetting is half of what is weighed"
        )
    for name, given in (("task", task), ("retain", retain)):
        instance(given, Task, name, "a task, such as from ll.tasks.folder_task or ll.tasks.text_task")
    method = Regularized(LoRA(rank), L2ToInitial(STRENGTH))
    planned(model, method, targets=targets)  # raises where it does not fit
    table = evidence()
    of_goal = table[table["goal"] == "kept"]
    kept, own = (of_goal[of_goal["rule"] == rule].iloc[0] for rule in (BEST, OWN_RATE))
    words = (
        f"Take {method} with learning rate {RATE:g}, and no window. Nothing was trained, and your task was "
        f"not looked at: in stored sweeps of {kept['families']} pairs of model and task it was worth "
        f"{_gain(kept)} more than the middle window, where accuracy counts less what is forgotten beyond 2 "
        f"points; better in {kept['better']} of {kept['families']}, {_sure(kept)}. Its own best rate (try "
        f"0.002 to 0.02) was worth {_gain(own)} more, in {own['better']} of {own['families']}, {_sure(own)}."
    )
    interval = -float(kept["high"]), -float(kept["low"])
    return Advice(method, RATE, -float(kept["difference"]), interval, words, table, "stored")


def _gain(row: pd.Series) -> str:
    low, gain, high = (-100 * row[name] for name in ("high", "difference", "low"))
    return f"{gain:.1f} points (95% interval {low:.1f} to {high:.1f})"


def _sure(row: pd.Series) -> str:
    return f"p = {row['p_holm']:.2g} after Holm"
