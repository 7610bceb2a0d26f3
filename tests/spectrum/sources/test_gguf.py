from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest
import torch

import lora_lens as ll
from lora_lens.spectrum.sources.matrices import Weight, weights


def by_name(found: list[Weight]) -> dict[str, Weight]:
    return {w.name: w for w in found}


def write_gguf(path, tensors, quantized=()):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", "def"])
    writer.add_array("tokenizer.ggml.scores", [1.0, 2.0])
    writer.add_float32("llama.rope.freq_base", 10000.0)
    for name, array in tensors.items():
        if name in quantized:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def gguf_tensors():
    rng = np.random.default_rng(0)
    return {
        "token_embd.weight": rng.normal(size=(8, 64)).astype(np.float32),
        "blk.0.attn_q.weight": rng.normal(size=(32, 64)).astype(np.float32),
        "blk.0.attn_output.weight": rng.normal(size=(64, 64)).astype(np.float16),
        "blk.0.ffn_down_exps.weight": rng.normal(size=(3, 16, 64)).astype(np.float32),
        "blk.0.attn_norm.weight": np.ones(64, np.float32),
        "output.weight": rng.normal(size=(8, 64)).astype(np.float32),
    }


def test_gguf_is_dequantized_one_matrix_at_a_time(tmp_path, gguf_tensors):
    path = tmp_path / "model.gguf"
    write_gguf(path, gguf_tensors, quantized={"blk.0.attn_q.weight", "blk.0.ffn_down_exps.weight"})
    found = by_name(weights(path))
    assert list(found) == [
        "blk.0.attn_output",
        "blk.0.attn_q",
        *(f"blk.0.ffn_down_exps[{i}]" for i in range(3)),
    ]
    exact = torch.from_numpy(gguf_tensors["blk.0.attn_output.weight"])
    assert torch.equal(found["blk.0.attn_output"].load(), exact)
    reader = {t.name: t for t in gguf.GGUFReader(path).tensors}
    for name in ("blk.0.attn_q", "blk.0.ffn_down_exps"):
        tensor = reader[f"{name}.weight"]
        whole = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        for i, matrix in enumerate(whole if whole.ndim == 3 else [whole]):
            mine = found[f"{name}[{i}]" if whole.ndim == 3 else name].load()
            assert torch.equal(mine, matrix)
    assert [w.name for w in weights(tmp_path, ["token_embd", "output"])] == ["output", "token_embd"]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="ends early"):
        found["blk.0.ffn_down_exps[2]"].load()
    with pytest.raises(ValueError, match=r"model\.gguf is truncated or malformed .*reaches past its end"):
        weights(path)


def test_a_split_gguf_is_read_whole(tmp_path, gguf_tensors):
    names = list(gguf_tensors)
    for i, part in enumerate((names[:3], names[3:])):
        write_gguf(tmp_path / f"m-0000{i + 1}-of-00002.gguf", {name: gguf_tensors[name] for name in part})
    assert len(weights(tmp_path / "m-00001-of-00002.gguf")) == 5
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(FileNotFoundError, match=r"one of 2 files.*m-00002-of-00002\.gguf is missing"):
        weights(tmp_path / "m-00001-of-00002.gguf")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGUF",
        b"PK\x03\x04" + bytes(40),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63),
        # an array of 2**62 bytes, then of 2**62 strings, then arrays inside of arrays
        b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 0, 2**62),
        b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 8, 2**62),
        b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 9) + struct.pack("<IQ", 9, 1) * 5000,
        b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 2**62),
        b"GGUF" + struct.pack("<IQQQ1sIQQIQ", 3, 1, 0, 1, b"w", 2, 2**60, 2**60, 0, 0),
        b"GGUF" + struct.pack("<IQQQ17sII", 3, 0, 1, 17, b"general.alignment", 4, 0),
    ],
    ids=range(10),
)
def test_damaged_and_hostile_gguf_headers_are_refused_at_once(tmp_path, content):
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.gguf is truncated or malformed"):
        weights(tmp_path / "bad.gguf")


def test_a_gguf_cut_anywhere_is_refused(tmp_path, gguf_tensors):
    write_gguf(tmp_path / "whole.gguf", gguf_tensors)
    content, cut = (tmp_path / "whole.gguf").read_bytes(), tmp_path / "cut.gguf"
    for length in (*range(800), *range(800, len(content), 999)):
        cut.write_bytes(content[:length])
        with pytest.raises(ValueError, match="truncated or malformed"):
            weights(cut)


def test_a_folder_with_one_split_gguf_is_read_whole_and_with_two_models_refused(tmp_path, gguf_tensors):
    names = list(gguf_tensors)
    for i, part in enumerate((names[:3], names[3:])):
        write_gguf(tmp_path / f"m-0000{i + 1}-of-00002.gguf", {name: gguf_tensors[name] for name in part})
    (tmp_path / "._m-00001-of-00002.gguf").write_bytes(b"left by macOS")
    assert [w.name for w in weights(tmp_path)] == [
        w.name for w in weights(tmp_path / "m-00002-of-00002.gguf")
    ]
    write_gguf(tmp_path / "mmproj.gguf", {"v.blk.0.attn_q.weight": gguf_tensors["blk.0.attn_q.weight"]})
    with pytest.raises(ValueError, match=r"several: m-00001.*mmproj\.gguf; give the path of one"):
        weights(tmp_path)


def test_a_tensor_of_a_newer_type_says_so_and_the_others_are_read(tmp_path, gguf_tensors):
    path = tmp_path / "m.gguf"
    write_gguf(path, gguf_tensors)
    key = b"blk.0.attn_q.weight"
    content = bytearray(path.read_bytes())
    place = content.index(key) + len(key) + 4 + 2 * 8  # after the name: the count of dimensions, and they
    content[place : place + 4] = struct.pack("<I", 57)
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"^blk\.0\.attn_q is of GGML type 57, which .* gguf \d.*upgrade gguf"
    ):
        weights(path)
    (found,) = weights(path, "attn_output")
    assert torch.equal(found.load(), torch.from_numpy(gguf_tensors["blk.0.attn_output.weight"]))


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"GGUF" + struct.pack(">I", 3), "big-endian GGUF file; convert it"),
        (b"GGUF" + struct.pack("<I", 1), "of GGUF version 1, and only versions 2 and 3"),
        (b"GGUF" + struct.pack("<I", 9), "of GGUF version 9, and only versions 2 and 3"),
    ],
)
def test_other_byte_orders_and_versions_are_told_from_damage(tmp_path, head, message):
    (tmp_path / "m.gguf").write_bytes(head + bytes(40))
    with pytest.raises(ValueError, match=message):
        weights(tmp_path / "m.gguf")


@pytest.mark.parametrize(("alpha", "scaling"), [(8.0, 2.0), (0.0, 1.0)])
@pytest.mark.parametrize("out", [6, 12])  # the factors of a square layer fit either way round
def test_an_adapter_of_llama_cpp_is_scaled_as_llama_cpp_does(tmp_path, alpha, scaling, out):
    a, b = torch.randn(4, 12), torch.randn(out, 4)
    path = tmp_path / "lora.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    writer.add_tensor("blk.0.attn_q.weight.lora_a", a.numpy())
    writer.add_tensor("blk.0.attn_q.weight.lora_b", b.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (found,) = weights(path)
    assert found.name == "blk.0.attn_q"
    torch.testing.assert_close(found.load(), scaling * b @ a)
    values = ll.spectra(path, progress=False)["blk.0.attn_q"].singular_values
    torch.testing.assert_close(values, torch.linalg.svdvals(scaling * b.double() @ a.double())[:4])


def test_rows_that_comfyui_cut_anew_are_put_together(tmp_path):
    linear, conv = torch.randn(32, 40), torch.randn(8, 16, 3, 3)
    path = tmp_path / "unet.gguf"
    writer = gguf.GGUFWriter(path, "sdxl")
    stored = {}
    for name, weight in {"a.weight": linear, "b.weight": conv}.items():
        rows = gguf.quants.quantize(weight.reshape(-1, 64).numpy(), gguf.GGMLQuantizationType.Q8_0)
        writer.add_array(f"comfy.gguf.orig_shape.{name}", tuple(weight.shape))
        writer.add_tensor(name, rows, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        values = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType.Q8_0)
        stored[name[0]] = torch.from_numpy(values).reshape(len(weight), -1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = {w.name: w for w in weights(path, ["a", "b"])}
    assert {name: w.shape for name, w in found.items()} == {"a": (32, 40), "b": (8, 144)}
    assert all(torch.equal(w.load(), stored[name]) for name, w in found.items())


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_a_scale_that_llama_cpp_multiplies_by_is_part_of_the_weight(tmp_path, gguf_tensors, kind):
    name = "blk.0.attn_q"
    write_gguf(tmp_path / "m.gguf", gguf_tensors | {f"{name}.scale": np.array([0.5], dtype=kind)})
    found = by_name(weights(tmp_path / "m.gguf", [name]))[name].load()
    torch.testing.assert_close(found, 0.5 * torch.from_numpy(gguf_tensors[f"{name}.weight"]))


def test_scales_that_are_no_one_number_are_refused(tmp_path, gguf_tensors):
    rows = np.ones(32, dtype=np.float32)
    for beside in ("scale", "weight_scale"):
        write_gguf(tmp_path / "m.gguf", gguf_tensors | {f"blk.0.attn_q.{beside}": rows})
        with pytest.raises(ValueError, match=rf"has blk.0.attn_q.{beside} beside it, which is not read"):
            weights(tmp_path / "m.gguf", ["attn_q"])
    write_gguf(tmp_path / "m.gguf", gguf_tensors | {"blk.0.attn_q.input_scale": rows[:1]})
    weights(tmp_path / "m.gguf", ["attn_q"])  # of the inputs: it leaves the weight as it is
