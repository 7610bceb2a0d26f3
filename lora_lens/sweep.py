"""Many runs: a grid of windows, learning rates and seeds, kept on disk as the runs finish."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
from joblib import Parallel, delayed
from torch import nn

from lora_lens.adapter import FullFineTuning, LinearProbe, LoRA, Method, attach, fitting_layers
from lora_lens.layers import Targets, target_layers
from lora_lens.progress import progress_bar
from lora_lens.spectrum import SpectrumSet
from lora_lens.spectrum import spectra as compute_spectra
from lora_lens.tasks import Task
from lora_lens.training import Training, finetune
from lora_lens.window import Window

METHOD_NAMES = {
    Window: "window",
    LoRA: "LoRA",
    LinearProbe: "linear probe",
    FullFineTuning: "full fine-tuning",
}


@dataclass(frozen=True)
class Grid:
    """Every method at every learning rate with every seed.

    Attributes:
        window: the windows, such as ``windows(rank=8, count=9)``.
        lr: learning rates.
        seed: seeds.
        baselines: other methods to run beside the windows.
    """

    window: Sequence[Window] = ()
    lr: Sequence[float] = (1e-3,)
    seed: Sequence[int] = (0,)
    baselines: Sequence[Method] = ()

    def __post_init__(self) -> None:
        for name in ("window", "lr", "seed", "baselines"):
            value = getattr(self, name)
            values = tuple(value) if isinstance(value, (Sequence, range)) else (value,)
            if len(set(values)) != len(values):
                raise ValueError(f"{name} holds the same value twice: {values}")
            object.__setattr__(self, name, values)
        for method in self.methods:
            if type(method) not in METHOD_NAMES:
                raise TypeError(f"a grid is made of windows and baselines, not {method!r}")
        if not (self.methods and self.lr and self.seed):
            raise ValueError("a grid needs at least one window or baseline, one lr and one seed")

    @property
    def methods(self) -> tuple[Method, ...]:
        return (*self.window, *self.baselines)

    def __len__(self) -> int:
        return len(self.methods) * len(self.lr) * len(self.seed)

    def __iter__(self) -> Iterator[tuple[Method, float, int]]:
        """(method, lr, seed), a whole seed before the next, so that a stopped sweep is balanced."""
        return ((m, lr, s) for s in self.seed for lr in self.lr for m in self.methods)


@dataclass(frozen=True, eq=False)
class Experiment:
    """What all runs of a sweep share."""

    model: nn.Module
    task: Task
    retain: Task
    targets: list[str]
    alpha: float | None
    spectra: SpectrumSet
    training: Training

    def describe(self, method: Method, lr: float, seed: int) -> dict[str, object]:
        """The plain values that describe one run; their hash is its identity."""
        fields = asdict(method)
        return {
            "method": METHOD_NAMES[type(method)],
            "rank": fields.get("rank"),
            "position": fields.get("position"),
            "start": fields.get("start"),
            "alpha": None if self.alpha is None else float(self.alpha),
            "targets": " ".join(self.targets),
            **asdict(replace(self.training, lr=float(lr), seed=int(seed))),
        }


def sweep(
    grid: Grid,
    *,
    model: nn.Module,
    task: Task,
    retain: Task,
    store: str | Path | None = None,
    targets: Targets = None,
    alpha: float | None = None,
    spectra: SpectrumSet | None = None,
    jobs: int | None = None,
    progress: bool = True,
    **settings: float,
) -> pd.DataFrame:
    """Run every point of ``grid`` on a fresh copy of ``model``; one factorization serves all windows.

    Args:
        grid: what to vary.
        model, task, retain, targets, alpha: as for ``attach`` and ``finetune``.
        store: a folder that keeps one small file per finished run. A sweep
            that was interrupted, or a larger grid, runs only what is missing.
            Without it nothing is kept.
        spectra: of this model, if they are at hand.
        jobs: processes; default all cores (one where there is a GPU). Every
            run computes with one thread, so the numbers do not depend on it.
        settings: of :class:`lora_lens.Training`, the same for all runs.

    Returns:
        One row per run in the grid's order. Columns: run (identity), method
        (window, LoRA, linear probe, full fine-tuning), rank, position, start,
        alpha, lr, seed and the other settings; trainable (adapter parameters
        trained, without the new head); loss (nats, mean since the last
        evaluation); accuracy, retained_before, retained_accuracy (in [0, 1]);
        forgetting (retained_before - retained_accuracy; positive = forgot);
        diverged.

    Raises:
        ValueError: as ``attach`` and ``finetune`` do, before the first run;
            or ``store`` holds a different experiment.
    """
    if {"lr", "seed"} & set(settings):
        raise ValueError("lr and seed are the grid's: give them to Grid, not to sweep")
    training = Training(**settings)
    chosen = list(spectra) if targets is None and spectra is not None else targets
    layers = list(target_layers(model, chosen))
    for method in grid.methods:
        fitting_layers(model, method, targets=layers, alpha=alpha, spectra=spectra)
    for lr in grid.lr:
        replace(training, lr=lr)
    rehearsal = attach(model, LinearProbe())
    finetune(rehearsal, task.subset(1, 1), retain.subset(1, 1), steps=1, evaluations=2, progress=False)

    with _open_store(store, _experiment_identity(model, task, retain)) as folder:
        if spectra is None:
            spectra = compute_spectra(model, layers, progress) if grid.window else SpectrumSet([])
        experiment = Experiment(model, task, retain, layers, alpha, spectra, training)
        plan = [(point, folder / f"{_identity(experiment.describe(*point))}.json") for point in grid]
        missing = [(point, path) for point, path in plan if _read_run(path) is None]
        cores = 1 if torch.cuda.is_available() else os.cpu_count() or 1
        workers = min(jobs or cores, max(1, len(missing)))
        runs = Parallel(n_jobs=workers, return_as="generator_unordered")(
            delayed(_run_and_keep)(experiment, point, path) for point, path in missing
        )
        done = len(plan) - len(missing)
        with progress_bar(shown=progress, total=len(plan), initial=done, desc="sweep", unit="run") as bar:
            for _ in runs:
                bar.update()
        return pd.DataFrame([_row(_read_run(path)) for _, path in plan])


def curves(store: str | Path, table: pd.DataFrame) -> pd.DataFrame:
    """The evaluations along the way of every run in ``table``.

    Returns:
        One row per run and evaluation: run, step, loss, accuracy, retained_accuracy.

    Raises:
        FileNotFoundError: a run is not in the store.
    """
    parts = []
    for run in table["run"]:
        record = _read_run(Path(store) / "runs" / f"{run}.json")
        if record is None:
            raise FileNotFoundError(f"{store} holds no run {run}")
        parts.append(pd.DataFrame(record["curve"]).assign(run=run))
    return pd.concat(parts, ignore_index=True)[["run", "step", "loss", "accuracy", "retained_accuracy"]]


def _run_and_keep(experiment: Experiment, point: tuple[Method, float, int], path: Path) -> None:
    method, lr, seed = point
    with _one_thread():
        adapted = attach(
            experiment.model,
            method,
            targets=experiment.targets,
            alpha=experiment.alpha,
            spectra=experiment.spectra,
            seed=seed,
        )
        trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        config = replace(experiment.training, lr=lr, seed=seed)
        run = finetune(adapted, experiment.task, experiment.retain, config, progress=False)
    result = {
        "trainable": trainable,
        "loss": float(run.curve["loss"].iloc[-1]),
        "accuracy": run.accuracy,
        "retained_before": run.retained_before,
        "retained_accuracy": run.retained_accuracy,
        "forgetting": run.forgetting,
        "diverged": run.diverged,
    }
    record = {
        "run": path.stem,
        "settings": experiment.describe(*point),
        "result": result,
        "curve": run.curve.to_dict("list"),
        "seconds": run.seconds,
    }
    _write_atomically(path, record)


def _row(record: dict) -> dict[str, object]:
    return {"run": record["run"], **record["settings"], **record["result"]}


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _open_store(store: str | Path | None, identity: dict[str, str]) -> Iterator[Path]:
    """The folder of the runs, after making sure that it holds this experiment or none."""
    if store is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    store = Path(store)
    described = store / "experiment.json"
    if described.exists():
        found = json.loads(described.read_text())["identity"]
        different = [key for key in identity if found.get(key) != identity[key]]
        if different:
            details = "; ".join(f"{k}: there {found.get(k)}, here {identity[k]}" for k in different)
            raise ValueError(
                f"the results folder {store} holds a different experiment ({details}); "
                "choose another folder, or remove this one if you no longer need it"
            )
    elif store.exists() and any(store.iterdir()):
        raise ValueError(f"the folder {store} is not empty and holds no experiment; choose another one")
    else:
        (store / "runs").mkdir(parents=True, exist_ok=True)
        versions = {name: version(name) for name in ("torch", "timm", "peft", "accelerate")}
        _write_atomically(described, {"identity": identity, "versions": versions})
    yield store / "runs"


def _read_run(path: Path) -> dict | None:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError:
        warnings.warn(f"{path} is damaged; the run is done again", stacklevel=2)
        return None


def _write_atomically(path: Path, record: dict) -> None:
    """The file appears whole or not at all, also after a kill or on a full disk."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.")
    try:
        with os.fdopen(descriptor, "w") as stream:
            json.dump(record, stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _identity(settings: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _experiment_identity(model: nn.Module, task: Task, retain: Task) -> dict[str, str]:
    """What must be equal for runs to belong into one folder."""
    return {
        "lora_lens": version("lora_lens"),
        "model": _model_fingerprint(model),
        "task": f"{task.name} {task.fingerprint()}",
        "retain": f"{retain.name} {retain.fingerprint()}",
    }


def _model_fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
