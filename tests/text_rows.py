"""Small files of texts with labels: for the tests of text files, of their checks and of data sets."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from pathlib import Path

import pytest

GOOD = [("good one", "pos"), ("bad one", "neg"), ("good two", "pos"), ("bad two", "neg")]


def write(path: Path, rows: list[tuple], columns: tuple[str, ...] = ("text", "label")) -> Path:
    """Rows as CSV, TSV or JSON lines, by the suffix, compressed if it ends in .gz, .bz2 or .xz."""
    opened = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(path.suffix, open)
    with opened(path, "wt", encoding="utf-8", newline="") as file:
        if ".jsonl" in path.name or ".json" in path.name:
            for row in rows:
                file.write(json.dumps(dict(zip(columns, row, strict=True))) + "\n")
        else:
            writer = csv.writer(file, delimiter="\t" if ".tsv" in path.name else ",")
            writer.writerows([columns, *rows])
    return path


def parquet(path: Path, **columns: list) -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table(columns), path)
    return path


def held_out(folder: Path) -> Path:
    return write(folder / "held_out.csv", [("a fine film", "pos"), ("a poor film", "neg")])
