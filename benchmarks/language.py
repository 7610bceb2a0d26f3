"""What a step of language training costs, where its time goes, and what would make it faster.

    python benchmarks/language.py [--models MiniLM SmolLM2] [--repeats 3] [--out benchmarks/results]

all-MiniLM-L6-v2 learns the sentiment of 32 film snippets a step by a head, SmolLM2-135M-Instruct that of 16
by label words: LoRA of rank 8 on all linear layers, the same batches for ll.finetune, for the leanest loop
of PyTorch and PEFT that we can write, and for transformers' Trainer. "Trainer, as it comes" is what a user
gets who changes nothing: batches in random order, clipped gradients, fused attention.

One thread, and the processor's time in place of the clock's, so that other work on the machine does not count
(but for the caches that it shares). A step is the difference of a long and a short run over the steps
between, so that preparation and tests drop out; ratios are medians over pairs of runs that follow each other.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, product

import torch
from matplotlib.figure import Figure
from measuring import (
    OTHERS,
    OURS,
    alternating,
    machine,
    markdown,
    options,
    publish,
    seconds,
    spread,
    threads,
)
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, Trainer, TrainingArguments

import lora_lens as ll
from lora_lens._base.precision import PRECISIONS
from lora_lens.spectrum.adaptable_layers import target_layers
from lora_lens.tasks.task import shuffled_rows

RANK = 8
FINETUNE, LEAN = "ll.finetune", "PyTorch + PEFT, leanest"
SAME, AS_IT_COMES = "Trainer, same batches", "Trainer, as it comes"
OPERATIONS = 8  # of the profile, the costliest
SHAPES = ((1024, 1024, 1024), (512, 576, 1536), (512, 384, 384))  # (rows, inputs, outputs); of a step


@dataclass(frozen=True, eq=False)
class Case:
    """A model, what it learns, and how many steps the short and the long run have."""

    name: str
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    task: ll.Task
    batch_size: int
    short: int
    long: int

    def batches(self) -> list[Tensor]:
        """The numbers of the long run's examples, as ll.finetune takes them."""
        return list(islice(self.task.train.shuffled(self.batch_size, seed=0), self.long))

    def with_attention(self, kind: str) -> Case:
        model = copy.deepcopy(self.model)
        model.set_attn_implementation(kind)
        return replace(self, model=model)


def minilm() -> Case:
    model, tokenizer = ll.tasks.bundled.minilm(), ll.tasks.bundled.minilm_tokenizer()
    task = ll.tasks.text_task(ll.tasks.bundled_texts.sentiment("movies"), tokenizer)
    return Case("MiniLM", model, tokenizer, task, batch_size=32, short=2, long=12).with_attention("eager")


def smollm2() -> Case:
    model, tokenizer = ll.tasks.bundled.smollm2(), ll.tasks.bundled.smollm2_tokenizer()
    task = ll.tasks.label_word_task(ll.tasks.bundled_texts.sentiment("movies"), tokenizer)
    return Case("SmolLM2", model, tokenizer, task, batch_size=16, short=1, long=4).with_attention("eager")


CASES = {"MiniLM": minilm, "SmolLM2": smollm2}


# --- the runs to compare ---


class Peer(nn.Module):
    """A PEFT model and its loss, as short as it can be: what the leanest loop and the Trainer train."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(target_layers(case.model, None)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model = get_peft_model(copy.deepcopy(case.model), config)
        words = getattr(case.task, "words", None)
        self.words = None if words is None else torch.tensor(words)[:, 0]
        self.head = nn.Linear(case.model.config.hidden_size, 2) if words is None else None

    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> dict:
        inner = self.model.get_base_model()
        body = inner if self.head is not None else inner.model
        hidden = body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if self.head is not None:
            logits = self.head((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
        else:  # what all words share drops out of the loss, so the other words' logits are not needed
            last = hidden[torch.arange(len(hidden)), mask.sum(1) - 1]
            logits = nn.functional.linear(last, inner.lm_head.weight[self.words])
        return {"loss": nn.functional.cross_entropy(logits.float(), labels), "logits": logits}


def finetune(case: Case, precision: str, steps: int) -> float:
    adapted = ll.attach(case.model, ll.LoRA(RANK))
    task = case.task.first(test=4)
    settings = {"steps": steps, "batch_size": case.batch_size, "precision": precision, "evaluations": 2}
    return cpu_seconds(lambda: ll.finetune(adapted, task, progress=False, **settings))


def leanest(
    case: Case, precision: str, steps: int, change: Callable[[Peer], nn.Module] = lambda peer: peer
) -> float:
    model = change(Peer(case).train())
    data, batches = case.task.train, case.batches()[:steps]
    inputs = [data.batch(rows) | {"labels": data.labels[rows]} for rows in batches]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def loop() -> None:
        for batch in inputs:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
                loss = model(**batch)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return cpu_seconds(loop)


class InThisOrder(Trainer):
    """A Trainer that takes the examples in the order in which they are given."""

    def _get_train_sampler(self, train_dataset: object = None) -> Sequence[int]:
        return range(len(train_dataset or self.train_dataset))


def trainer(case: Case, precision: str, steps: int, kind: type[Trainer] = InThisOrder) -> float:
    data = case.task.train
    if kind is Trainer:
        case = case.with_attention("sdpa")
        rows = torch.arange(len(data))
    else:
        rows = torch.cat(case.batches())
    examples = [
        {"input_ids": data.take(row[None]).tokens.tolist(), "labels": int(data.labels[row])} for row in rows
    ]
    settings = {} if kind is Trainer else {"max_grad_norm": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=case.batch_size,
            learning_rate=1e-3,
            bf16=precision == "bfloat16",
            use_cpu=True,
            report_to=[],
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **settings,
        )
        collator = DataCollatorWithPadding(case.tokenizer)
        made = kind(Peer(case), arguments, train_dataset=examples, data_collator=collator)
        return cpu_seconds(made.train)


def as_it_comes(case: Case, precision: str, steps: int) -> float:
    return trainer(case, precision, steps, Trainer)


RUNS = {FINETUNE: finetune, LEAN: leanest, SAME: trainer, AS_IT_COMES: as_it_comes}


def step_of(run: Callable[..., float], case: Case, precision: str, **more: object) -> float:
    """Seconds of one step: what the long run takes longer than the short one."""
    long, short = (run(case, precision, steps, **more) for steps in (case.long, case.short))
    return (long - short) / (case.long - case.short)


# --- what a step is made of ---


def tokens_of(case: Case) -> tuple[float, float]:
    """Real tokens and padded ones of a step, the mean of those that are measured."""
    lengths = [case.task.train.lengths[rows] for rows in case.batches()[case.short :]]
    return tuple(
        statistics.mean(float(x) for x in column)
        for column in zip(*((part.sum(), part.max() * len(part)) for part in lengths), strict=True)
    )


def padding(case: Case) -> dict[str, float]:
    """The share of positions that hold padding over one pass through the training texts."""
    data, count = case.task.train, len(case.task.train) // case.batch_size
    orders = {
        "texts of like length together": data.shuffled(case.batch_size, 0),
        "any texts together": shuffled_rows(len(data), case.batch_size, 0),
    }
    shares = {}
    for name, order in orders.items():
        lengths = [data.lengths[rows] for rows in islice(order, count)]
        whole = sum(int(part.max()) * len(part) for part in lengths)
        shares[name] = 1 - sum(int(part.sum()) for part in lengths) / whole
    return shares


def operations(case: Case) -> float:
    """Of a step with padding, 2 N forward and 2 N backward for each token: frozen weights need no gradient.

    N counts the numbers in the adapted linear layers. Attention's products, the adapters and the head come on
    top, and are left out.
    """
    weights = sum(layer.weight.numel() for layer in target_layers(case.model, None).values())
    return 4 * weights * tokens_of(case)[1]


def product_rates() -> dict[tuple[str, int, str], float]:
    """GFLOP/s by the clock, the best of many short tries, by precision, threads and shape."""
    found = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        for count in (1, 2):
            with threads(count):
                for rows, inputs, outputs in SHAPES:
                    a, w = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
                    best = min(seconds(lambda a=a, w=w: nn.functional.linear(a, w)) for _ in range(60))
                    shape = f"{rows} x {inputs} x {outputs}"
                    found[name, count, shape] = 2 * rows * inputs * outputs / best / 1e9
    return found


def profile(case: Case, precision: str) -> dict[str, float]:
    """Shares of a short run's time by PyTorch's operations, the costliest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        leanest(case, precision, case.short + 1)
    events = seen.key_averages()
    whole = sum(event.self_cpu_time_total for event in events)
    shares = {event.key: event.self_cpu_time_total / whole for event in events}
    return dict(sorted(shares.items(), key=lambda item: -item[1])[:OPERATIONS])


def cast_once(peer: Peer) -> Peer:
    """Frozen linear weights in bfloat16 for good: autocast would make the same of them at every step."""
    for module in peer.modules():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            module.to(torch.bfloat16)
    return peer


def compiled(case: Case, precision: str) -> dict[str, float]:
    """Seconds by the clock until the first two batches are done, and of a step from then on, in CPU time."""
    made = []

    def compile_it(peer: Peer) -> nn.Module:
        made.append(torch.compile(peer, dynamic=True))
        return made[-1]

    torch._dynamo.reset()
    before = seconds(lambda: leanest(case, precision, 2, compile_it))
    step = step_of(leanest, case, precision, change=lambda _: made[0])
    return {"first two steps, clock": before, "step": step}


# --- time and tables ---


def cpu_seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def paired(times: Mapping[str, Sequence[float]], name: str, base: str) -> float:
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))


def sections(names: Sequence[str], repeats: int, found: dict[str, object]) -> Iterator[str]:
    """The tables one after the other, as they are ready; their numbers go to ``found``."""
    rates = product_rates()
    found["GFLOP/s"] = {f"{p}, {t} threads, {s}": rate for (p, t, s), rate in rates.items()}
    shapes = list(dict.fromkeys(shape for *_, shape in rates))
    rows = [
        [f"{p}, {t} thread{'s' * (t > 1)}", *(f"{rates[p, t, s]:.0f}" for s in shapes)]
        for p, t in dict.fromkeys(key[:2] for key in rates)
    ]
    yield "Matrix products, GFLOP/s.\n\n" + markdown(["", *shapes], rows)
    best = {p: max(rate for (q, t, _), rate in rates.items() if (q, t) == (p, 1)) for p in PRECISIONS}
    for name in names:
        case = CASES[name]()
        with threads(1):
            yield from _training(case, repeats, best, found)
            yield from _variants(case, repeats, found)
    for name, precision in product(names, PRECISIONS):
        with threads(1):
            yield _compiled(CASES[name](), precision, found)


def _training(case: Case, repeats: int, best: Mapping[str, float], found: dict[str, object]) -> Iterator[str]:
    real, whole = tokens_of(case)
    for precision in PRECISIONS:
        rows = {name: partial(step_of, run, case, precision) for name, run in RUNS.items()}
        times = alternating(rows, repeats, f"{case.name}, {precision}")
        found[f"{case.name}, {precision}"] = times
        table = []
        for name, spent in times.items():
            middle = statistics.median(spent)
            speed = [f"{real / middle:.0f}", f"{whole / middle:.0f}"]
            share = f"{operations(case) / middle / 1e9 / best[precision]:.0%}"
            if name == AS_IT_COMES:  # it has other batches, of the same texts in the mean
                speed, share = [f"{real / middle:.0f}", ""], ""
            table.append([name, spread(spent), f"{paired(times, name, FINETUNE):.2f}x", *speed, share])
        header = ["", "s per step", "over ll.finetune", "tokens/s", "with padding", "of products' rate"]
        yield f"{case.name}, {precision}\n\n" + markdown(header, table)


def _variants(case: Case, repeats: int, found: dict[str, object]) -> Iterator[str]:
    shares = padding(case)
    found[f"{case.name}, padding"] = shares
    yield f"{case.name}, padding: " + ", ".join(f"{n} {s:.0%}" for n, s in shares.items())
    for precision in PRECISIONS:
        step = partial(step_of, leanest)
        rows = {
            "leanest": partial(step, case, precision),
            "fused attention": partial(step, case.with_attention("sdpa"), precision),
        }
        if precision == "bfloat16":
            rows["weights cast once"] = partial(step, case, precision, change=cast_once)
        times = alternating(rows, repeats, f"{case.name}, {precision}")
        costs = profile(case, precision)
        found[f"{case.name}, {precision}, variants"] = times
        found[f"{case.name}, {precision}, profile"] = costs
        table = [[n, spread(s), f"{paired(times, n, 'leanest'):.2f}x"] for n, s in times.items()]
        yield f"{case.name}, {precision}\n\n" + markdown(["", "seconds per step", "over leanest"], table)
        yield "Where the time goes: " + ", ".join(f"{name} {share:.0%}" for name, share in costs.items())


def _compiled(case: Case, precision: str, found: dict[str, object]) -> str:
    """Measured last: the compiler takes minutes."""
    try:
        quick = compiled(case, precision)
    except Exception as error:  # whatever stops the compiler is a result
        return f"{case.name}, {precision}: torch.compile fails: {str(error).splitlines()[0]}"
    found[f"{case.name}, {precision}, compiled"] = quick
    saved = statistics.median(found[f"{case.name}, {precision}, variants"]["leanest"]) - quick["step"]
    pays = f"pays after {quick['first two steps, clock'] / saved:.0f} steps" if saved > 0 else "never pays"
    numbers = ", ".join(f"{name} {spent:.3g} s" for name, spent in quick.items())
    return f"{case.name}, {precision}: torch.compile: {numbers}; {pays}"


def picture(found: Mapping[str, object]) -> Figure:
    kept = {n: t for n, t in found.items() if isinstance(t, Mapping) and FINETUNE in t}
    figure = Figure(figsize=(8, 0.6 + 1.5 * len(kept)), layout="constrained")
    axes = figure.subplots(max(len(kept), 1), squeeze=False)[:, 0]
    for ax, (title, times) in zip(axes, kept.items(), strict=False):
        for row, (name, spent) in enumerate(times.items()):
            ax.barh(row, statistics.median(spent), color=OURS if name == FINETUNE else OTHERS)
        ax.set_yticks(range(len(times)), times)
        ax.set_title(title)
        ax.invert_yaxis()
    axes[-1].set_xlabel("CPU seconds per step, 1 thread")
    return figure


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    found: dict[str, object] = {}
    text = f"Language training, CPU seconds, 1 thread; median and range. {machine()}."
    for section in sections(arguments.models, arguments.repeats, found):
        print(f"\n{section}\n", file=sys.stderr, flush=True)
        text += f"\n\n{section}"
    publish(arguments.out, "language", text, picture(found))
    (arguments.out / "language.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
