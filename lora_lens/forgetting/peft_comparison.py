"""PEFT's method comparison: its results as a table of runs, and experiments for windows in its format.

What it calls forgetting is the mean next-token loss, in nats per token, on a sample of Wikipedia after
training minus before, so here it is the rise of the loss, ``loss_rise``. Until PEFT #3419, merged on 14 July
2026, the loss compared each token with itself instead of the next one, and "before" was taken with the
adapter as it begins, which for some methods is no identity: such numbers are void. Since then "before" is the
model with its adapter disabled. That is the pretrained model, except where a start has taken something out of
the base (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA, and windows in the residual form): it then is the residual, and
such numbers are void, too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from lora_lens._base.errors import InputError, MissingFileError
from lora_lens._base.naming import counted
from lora_lens._base.validate import instance, number
from lora_lens._base.warning import warn
from lora_lens.adapters.injection import (
    attached,
    lora_config,
    lora_layers,
    require_unmerged,
)
from lora_lens.adapters.saving import save
from lora_lens.adapters.start import trained_update
from lora_lens.spectrum.svd import product_norm

FIXED = datetime.fromisoformat("2026-07-14T13:22:56+00:00")  # PEFT #3419
FIXED_IN = (0, 19, 2)  # of PEFT, in development then
RELEASE = re.compile(r"(\d+)\.(\d+)\.(\d+)")
RESIDUAL = ("pissa", "olora", "corda", "loftq", "lora_ga")  # starts that change the base
HOW = """\
# {name}

For PEFT's method comparison (`method_comparison/MetaMathQA`), written by lora_lens {version}: {method}.

`adapter_config.json` alone makes an ordinary LoRA; the window is in `start`. In `utils.py`, `get_model`, put

    import lora_lens as ll
    model = ll.load(base_model, "<this folder>/start")

in the place of `get_peft_model`. In the residual form the base then lacks the window, so the loss before
training must be taken of `base_model`, before that line: `model.disable_adapter()` shows the residual, whose
loss is another one, and what the script calls forgetting would be wrong.
"""


def method_comparison(results: str | Path) -> pd.DataFrame:
    """The results of PEFT's method comparison (MetaMathQA) as a table of runs, for the trade-off plane.

    ``ll.plots.tradeoff(table, y="loss_rise")`` draws it. A user's own results and the published ones are
    read alike. Forgetting there is a rise of loss, see the module; accuracies on a retained task there are
    none, so ``retained_accuracy`` and ``forgetting`` are NaN.

    Args:
        results: the folder ``results``, or one of its files.

    Returns:
        One row per file: run (its name), method (the experiment's), rank, position and start (None), lr,
        seed, accuracy (on GSM8K's test set), loss_rise (nats per token; NaN where it is void), trainable
        (parameters), created (when), peft (its version), void (why ``loss_rise`` is left out, else ""),
        failed and reason.

    Raises:
        ValueError: a file is none of these results, or of another comparison (image-gen measures the drift
            of images); or there are none.
        OSError: there is no such folder or file.

    Example:
        >>> import json, pathlib, tempfile
        >>> import lora_lens as ll
        >>> last = {"test accuracy": 0.478, "forgetting": 0.05}
        >>> config = {"optimizer_kwargs": {"lr": 1e-4}, "seed": 0}
        >>> about = {"experiment_name": "lora/rank32", "created_at": "2026-07-15T05:41:18+00:00"}
        >>> result = {
        ...     "run_info": about | {"train_config": config, "peft_config": {"peft_type": "LORA", "r": 32}},
        ...     "train_info": {"status": "success", "num_trainable_params": 9175040, "metrics": [last]},
        ...     "meta_info": {"package_info": {"peft-version": "0.19.2.dev0"}},
        ... }
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "lora--rank32.json"
        >>> _ = file.write_text(json.dumps(result))
        >>> ll.forgetting.method_comparison(file)[["method", "rank", "accuracy", "loss_rise"]]
                method  rank  accuracy  loss_rise
        0  lora/rank32    32     0.478       0.05
    """
    path = Path(instance(results, (str, Path), "results", "a folder or file"))
    if not path.exists():
        raise MissingFileError(f"there is no {path}")
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path} holds no results (*.json) of PEFT's method comparison")
    table = pd.DataFrame([_row(file) for file in files])
    if void := int((table["void"] != "").sum()):
        warn(
            f"{counted(void, 'row')} of {len(table)} have no loss_rise, because PEFT's script measured it "
            "wrongly; the column void says why",
        )
    return table


def _row(file: Path) -> dict[str, object]:
    try:
        found = json.loads(file.read_text())
        run, training = found["run_info"], found["train_info"]
        last: Mapping[str, Any] = (training["metrics"] or [{}])[-1]
        done, settings = training["status"] == "success", run["train_config"]
        config = run["peft_config"] or {}
        version = found["meta_info"]["package_info"]["peft-version"]
        created, name = datetime.fromisoformat(run["created_at"]), run["experiment_name"]
        lr, seed = float(settings["optimizer_kwargs"]["lr"]), int(settings["seed"])
        if done and "test accuracy" not in last:
            what = "of image-gen, which measures the drift of images" if "drift" in last else "another one"
            raise InputError(f"{file} is no result of PEFT's MetaMathQA comparison, but {what}")
    except (
        OSError,
        UnicodeDecodeError,
        KeyError,
        TypeError,
        IndexError,
        AttributeError,
        ValueError,
    ) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file} is no result of PEFT's method comparison: {error!r}") from error
    void = _void(created, version, config, last) if done else ""
    return {
        "run": file.stem,
        "method": name,
        "rank": config.get("r"),
        "position": None,
        "start": None,
        "lr": lr,
        "seed": seed,
        "accuracy": last.get("test accuracy", float("nan")),
        "retained_accuracy": float("nan"),
        "forgetting": float("nan"),
        "loss_rise": float("nan") if void or not done else last["forgetting"],
        "trainable": training.get("num_trainable_params"),
        "created": created,
        "peft": version,
        "void": void,
        "failed": not done,
        "reason": "" if done else str(training["status"]),
    }


def _void(created: datetime, version: str, config: Mapping[str, Any], last: Mapping[str, Any]) -> str:
    """Why what the script calls forgetting is none, if so."""
    if last.get("forgetting") is None:
        return "not measured"
    release = RELEASE.match(version or "")  # without one the date alone decides
    older = release is not None and tuple(map(int, release.groups())) < FIXED_IN
    if created.tzinfo is None:
        created = created.replace(tzinfo=FIXED.tzinfo)
    if older or created < FIXED:
        return "before PEFT #3419"
    start = str(config.get("init_lora_weights", "")).lower()
    return f"{start} changes the base" if start.startswith(RESIDUAL) else ""


def method_comparison_experiment(
    adapted: nn.Module, folder: str | Path, *, lr: float = 1e-4, weight_decay: float = 0.0
) -> None:
    """Write an experiment folder of PEFT's method comparison for a window, before it is trained.

    It holds ``adapter_config.json``, ``training_params.json``, the window's factors (``start``, as
    :func:`lora_lens.save` writes them) and a README that says which line of PEFT's script loads them.

    Args:
        adapted: the model of the comparison with a window, from :func:`lora_lens.attach`, not trained.
        folder: ``experiments/lora/NAME`` in ``method_comparison/MetaMathQA``.
        lr: AdamW's learning rate.
        weight_decay: AdamW's; the comparison's default is 0.1, which would shrink the pretrained components
            of a window, as it decays the factors.

    Raises:
        ValueError: ``adapted`` is none of attach's, is merged or trained, or a number is out of its range.
        OSError: ``folder`` cannot be written, or holds something else.

    Example:
        >>> import json, pathlib, tempfile
        >>> import torch
        >>> import lora_lens as ll
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32}
        >>> model = LlamaForCausalLM(LlamaConfig(**small, num_attention_heads=2, num_key_value_heads=1))
        >>> adapted = ll.attach(model, ll.Window.middle(4), targets=["q_proj", "v_proj"])
        >>> folder = pathlib.Path(tempfile.mkdtemp()) / "experiments" / "lora" / "small-middle-rank4"
        >>> ll.forgetting.method_comparison_experiment(adapted, folder, lr=3e-4)
        >>> sorted(path.name for path in folder.iterdir())
        ['README.md', 'adapter_config.json', 'start', 'training_params.json']
    """
    peft_model, record = attached(adapted)
    require_unmerged(peft_model)
    lr = number(lr, "lr", above=0)
    weight_decay = number(weight_decay, "weight_decay", least=0)
    for name, layer in lora_layers(peft_model).items():
        if float(product_norm(*trained_update(layer, record.starts.get(name)))) > 0:
            raise InputError(
                f"the adapter of {name} is trained already, and an experiment begins before training: attach "
                "the window again"
            )
    folder = Path(folder)
    save(adapted, folder / "start")
    lora_config(peft_model).save_pretrained(str(folder))
    settings = {"optimizer_kwargs": {"lr": lr, "weight_decay": weight_decay}}
    (folder / "training_params.json").write_text(json.dumps(settings, indent=2) + "\n")
    text = HOW.format(name=folder.name, version=version_of("lora_lens"), method=record.method)
    (folder / "README.md").write_text(text)
