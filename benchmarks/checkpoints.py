"""What a quantized checkpoint costs to read, and a LoRA to extract from two checkpoints.

    python benchmarks/checkpoints.py [--gigabytes 2] [--width 4096] [--threads 2] [--out benchmarks/results]

A Llama with random weights in FP8, with a scale for each block of 128 x 128, as DeepSeek and transformers
write it: the singular values of its linear layers by ``ll.spectra``, and by loading it through transformers,
which dequantizes it, and ``torch.linalg.svdvals`` in float32 of each layer. Each is measured in a process of
its own: seconds, and peak memory beyond the libraries over the largest matrix in float64.

The LoRA of rank 16 is extracted from SmolLM2-135M's shapes and a copy that learned an update of rank 8 (and
a little noise), by ``ll.extract`` and by mergekit-extract-lora, both as commands. The error is that of B A
to the whole change, in the Frobenius norm over all layers, over that of the best of this rank. Without
mergekit this part is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from measuring import done, machine, markdown, options, peak_of, publish, ready, threads
from peft import PeftConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, LlamaConfig, LlamaForCausalLM

import lora_lens as ll

BLOCK = 128
AIM = {"seconds": 3, "memory": 4}
RANK = 16


# --- a checkpoint in FP8 ---


def inner_width(width: int) -> int:
    """Of the MLPs, as Llama 7B has it, in whole blocks: transformers dequantizes no others."""
    return max(1, round(width * 11008 / 4096 / BLOCK)) * BLOCK


def write_fp8(folder: Path, width: int, gigabytes: float) -> None:
    hidden = inner_width(width)
    blocks = max(1, round(gigabytes * 1e9 / (4 * width * width + 3 * width * hidden)))
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=blocks,
        num_attention_heads=width // 128,
        vocab_size=256,
    ).to_dict()
    config["architectures"] = ["LlamaForCausalLM"]
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
    }
    (folder / "config.json").write_text(json.dumps(config))
    shapes = dict.fromkeys([f"self_attn.{part}_proj" for part in "qkvo"], (width, width)) | {
        "mlp.gate_proj": (hidden, width),
        "mlp.up_proj": (hidden, width),
        "mlp.down_proj": (width, hidden),
    }
    places: dict[str, str] = {}
    for block in range(blocks):
        tensors = {}
        for kind, (rows, columns) in shapes.items():
            name = f"model.layers.{block}.{kind}.weight"
            tensors[name] = torch.randn(rows, columns).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.rand(-(-rows // BLOCK), -(-columns // BLOCK)) / 100
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{block}.{norm}.weight"] = torch.ones(width)
        if block == 0:
            tensors["model.embed_tokens.weight"] = torch.randn(256, width)
            tensors["lm_head.weight"] = torch.randn(256, width)
            tensors["model.norm.weight"] = torch.ones(width)
        shard = f"model-{block + 1:05}-of-{blocks:05}.safetensors"
        save_file(tensors, folder / shard, {"format": "pt"})
        places |= dict.fromkeys(tensors, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def ours(folder: Path) -> dict[str, torch.Tensor]:
    found = ll.spectra(folder, vectors=False, cache=False, progress=False)
    return {name: spectrum.singular_values for name, spectrum in found.items()}


def theirs(folder: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    return {name: torch.linalg.svdvals(layer.weight.detach().float()) for name, layer in layers.items()}


TOOLS = {"lora_lens": ours, "transformers + svdvals": theirs}


def measure(tool: str, folder: Path, count: int) -> None:
    with threads(count), tempfile.TemporaryDirectory() as small:
        write_fp8(Path(small), BLOCK, 0)
        TOOLS[tool](Path(small))  # which loads and warms up the libraries
        ready()
        began = time.perf_counter()
        values = TOOLS[tool](folder)
        largest = [float(values[name].max()) for name in sorted(values)]
        done(json.dumps([time.perf_counter() - began, largest]))


def of_fp8(folder: Path, arguments: argparse.Namespace) -> str:
    write_fp8(folder, arguments.width, arguments.gigabytes)
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e9
    matrix = 8 * arguments.width * inner_width(arguments.width)
    rows, seconds, values = [], {}, {}
    for tool in TOOLS:
        command = [sys.executable, __file__, "--measure", tool, str(folder)]
        peak, answer = peak_of([*command, "--threads", str(arguments.threads)])
        seconds[tool], values[tool] = json.loads(answer)
        print(f"{tool}: {seconds[tool]:.0f} s", file=sys.stderr, flush=True)
        memory = [f"{part / 1e6:.0f} ({part / matrix:.2f}x)" for part in (peak.anonymous, peak.resident)]
        rows.append([tool, len(values[tool]), f"{seconds[tool]:.0f}", *memory])
    mine, others = (torch.tensor(values[tool]) for tool in TOOLS)
    apart = float(((mine - others) / others).abs().max())
    ratio = seconds["transformers + svdvals"] / seconds["lora_lens"]
    header = ("tool", "matrices", "seconds", "anonymous, MB (x largest)", "resident, MB (x largest)")
    return (
        f"## {size:.1f} GB in FP8, width {arguments.width}\n\n{markdown(header, rows)}\n\n"
        f"{ratio:.1f} times faster (aim: {AIM['seconds']}x, and at most {AIM['memory']}x the largest matrix "
        f"in memory). The largest singular values differ by {apart:.0e} at most."
    )


# --- a LoRA from two checkpoints ---


def write_pair(before: Path, after: Path) -> None:
    torch.manual_seed(0)
    shapes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 512}
    model = LlamaForCausalLM(LlamaConfig(**shapes, num_attention_heads=9, num_key_value_heads=3))
    model.save_pretrained(before)
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, torch.nn.Linear) and name != "lm_head":
                rows, columns = layer.weight.shape
                layer.weight += 1e-3 * torch.randn(rows, 8) @ torch.randn(8, columns)
                layer.weight += 1e-5 * torch.randn(rows, columns)
    model.save_pretrained(after)


def update(folder: Path) -> dict[str, torch.Tensor]:
    """B A of each layer, scaled."""
    config, tensors = PeftConfig.from_pretrained(folder), load_file(folder / "adapter_model.safetensors")
    found = {}
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            scaling = config.alpha_pattern.get(name, config.lora_alpha) / config.rank_pattern.get(
                name, config.r
            )
            found[name] = scaling * tensors[key.replace("lora_A", "lora_B")].double() @ a.double()
    return found


def of_pairs(folder: Path) -> str:
    if importlib.util.find_spec("mergekit") is None:
        return "## A LoRA from two checkpoints\n\nmergekit is not installed: pip install mergekit"
    before, after = folder / "before", folder / "after"
    write_pair(before, after)
    first, second = (load_file(path / "model.safetensors") for path in (before, after))
    script = "import sys, lora_lens as ll; ll.extract(*sys.argv[1:], rank=16, progress=False)"
    peer = ["-m", "mergekit.scripts.extract_lora", "--model", str(after), "--base-model", str(before)]
    commands = {
        "ll.extract": ["-c", script, str(before), str(after), str(folder / "ours")],
        "mergekit-extract-lora": [
            *peer,
            "--out-path",
            str(folder / "peer"),
            "--max-rank",
            str(RANK),
            "--quiet",
        ],
    }
    rows = []
    for (tool, command), written in zip(commands.items(), ("ours", "peer"), strict=True):
        times = []
        for _ in range(3):
            spent = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
            now = resource.getrusage(resource.RUSAGE_CHILDREN)
            times.append(now.ru_utime + now.ru_stime - spent.ru_utime - spent.ru_stime)
        found, missed, best = update(folder / written), 0.0, 0.0
        for name, product in found.items():
            change = second[f"{name}.weight"].double() - first[f"{name}.weight"].double()
            missed += float((change - product).square().sum())
            best += float(torch.linalg.svdvals(change)[RANK:].square().sum())
        rows.append([tool, len(found), f"{sorted(times)[1]:.1f}", f"{(missed / best) ** 0.5:.4f}"])
    header = ("tool", "layers", "processor seconds, libraries included", "error over the best of rank 16")
    return f"## A LoRA from two checkpoints\n\n{markdown(header, rows)}"


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--gigabytes", type=float, default=2, help="size of the checkpoint in FP8")
    parser.add_argument("--width", type=int, default=4096, help="width of its blocks, a multiple of 128")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        tool, folder = arguments.measure
        measure(tool, Path(folder), arguments.threads)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that a killed run, too, removes its files
    with tempfile.TemporaryDirectory(prefix="lora_lens_checkpoints_") as folder:
        parts = [of_pairs(Path(folder))]
        (Path(folder) / "fp8").mkdir()
        parts.append(of_fp8(Path(folder) / "fp8", arguments))
    publish(arguments.out, "checkpoints", "\n\n".join([f"# Checkpoints. {machine()}", *parts]))


if __name__ == "__main__":
    main()
