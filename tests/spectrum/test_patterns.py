from __future__ import annotations

import pytest

from lora_lens.spectrum.patterns import matching, routers

NAMES = [f"layers.{i}.{part}" for i in range(13) for part in ("attn.q_proj", "attn.k_proj", "mlp.fc1")]


def layers(pattern: str) -> list[int]:
    return sorted({int(name.split(".")[1]) for name in matching(NAMES, pattern)})


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("layers.[0-11].attn.q_proj", list(range(12))),
        ("layers.[0-2].*", [0, 1, 2]),
        ("layers.[9-12].mlp.fc1", [9, 10, 11, 12]),
        ("layers.[0, 3,10-11].mlp.fc1", [0, 3, 10, 11]),
        ("layers.[!0].mlp.fc1", list(range(1, 13))),
        ("layers.[^2-12].mlp.fc1", [0, 1]),
        ("layers.[1].*", [1]),
        ("layers.1[0-1].*", [10, 11]),
        ("layers.[05].*", [0, 5]),
        ("layers.[!05].*", [1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12]),
        ("layers.?.*", list(range(10))),
        ("layers.{0,12}.*", [0, 12]),
        ("1.mlp.fc1", [1]),
    ],
)
def test_brackets_hold_whole_numbers(pattern, expected):
    assert layers(pattern) == expected


def test_letters_texts_and_whole_parts():
    assert {n.split(".")[-1] for n in matching(NAMES, "[qk]_proj")} == {"q_proj", "k_proj"}
    assert {n.split(".")[-1] for n in matching(NAMES, "[!q]_proj")} == {"k_proj"}
    assert {n.split(".")[-1] for n in matching(NAMES, "{q_proj,fc*}")} == {"q_proj", "fc1"}
    assert not matching(NAMES, "proj") and not matching(NAMES, "roj")
    assert matching(["blocks.0.attn.qkv[q]", "a(b)"], "qkv[q]") == {"blocks.0.attn.qkv[q]"}
    assert matching(["x.a(b)"], "a(b)") == {"x.a(b)"}


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        (".*q_proj$", "looks like a regular expression"),
        ("q_proj|v_proj", r"looks like a regular expression \('\|'\).*as a list"),
        (r"layers\.[0-3]\..*", "looks like a regular expression"),
        ("layers.[11-0].*", "from a lower number to a higher one"),
        ("layers.[0-", "opens '\\[' without closing"),
        ("layers.0]", "closes '\\]' without opening"),
        ("layers.[10-x].*", "neither whole numbers"),
        ("layers.{0..11}.*", "between commas.*written \\[0-11\\]"),
    ],
)
def test_what_is_no_pattern_is_refused_in_words(pattern, says):
    with pytest.raises(ValueError, match=says):
        matching(NAMES, pattern)


def test_routers_are_told_from_the_gates_of_attention():
    names = ["l.0.mlp.gate", "l.0.mlp.experts.0.w1", "l.1.mlp.shared_expert_gate", "l.2.ffn.router.layer"]
    others = ["l.0.attn.gate", "l.0.mlp.gate_proj", "l.0.mlp.experts.gate_up_proj", "l.0.mlp.experts"]
    hunyuan = ["l.3.mlp.gate.wg", "l.3.mlp.experts.0.up_proj"]
    expected = {names[0], names[2], names[3], "l.3.mlp.gate.wg"}
    assert routers([*names, *others, *hunyuan, "blk.0.ffn_gate_inp"]) == expected | {"blk.0.ffn_gate_inp"}
