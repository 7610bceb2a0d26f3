"""Make the embedded texts from their published source.

    python data/prepare_text.py [vaderSentiment-3.3.2.tar.gz]

The argument is the source archive of that package; without it pip downloads it.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import io
import json
import lzma
import re
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from lora_lens.tasks.corpus import same_text

HERE = Path(__file__).parent
SEED = 0
FILE = "corpora.json.xz"
ARCHIVE = "vaderSentiment-3.3.2"
ARCHIVE_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
SOURCES = {
    "movies": "movieReviewSnippets",
    "products": "amazonReviewSnippets",
    "tweets": "tweets",
    "newspaper": "nytEditorialSnippets",
}


@dataclass(frozen=True)
class Row:
    """A text with its mean rating and the number of the review, article, tweet or snippet it is of."""

    group: int
    rating: float
    text: str


def download(folder: Path) -> Path:
    """The source archive, fetched with pip."""
    requirement = ARCHIVE.replace("-", "==")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", requirement]
    subprocess.run([*command, "--dest", str(folder)], check=True)
    return folder / f"{ARCHIVE}.tar.gz"


def read_archive(path: Path) -> tuple[dict[str, str], str]:
    """The text of each corpus's file, and that of the licence."""
    raw = path.read_bytes()
    if hashlib.sha256(raw).hexdigest() != ARCHIVE_SHA256:
        raise ValueError(
            f"{path} is not the source archive of {ARCHIVE}: its SHA-256 is not {ARCHIVE_SHA256}"
        )
    with tarfile.open(fileobj=io.BytesIO(raw)) as outer:
        licence = outer.extractfile(f"{ARCHIVE}/LICENSE.txt").read().decode()
        inner = outer.extractfile(f"{ARCHIVE}/additional_resources/hutto_ICWSM_2014.tar.gz").read()
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        files = {
            name: archive.extractfile(f"hutto_ICWSM_2014/{stem}_GroundTruth.txt").read().decode()
            for name, stem in SOURCES.items()
        }
    return files, "\n".join(licence.splitlines())


def parse(file: str) -> list[Row]:
    """The rows of one file: id, tab, mean rating, tab, text. An id is ``group`` or ``group_sentence``."""
    rows = []
    for line in file.split("\n"):
        if line.strip():
            name, rating, text = line.split("\t")
            rows.append(Row(int(name.split("_")[0]), round(float(rating), 2), clean(text)))
    return rows


def clean(text: str) -> str:
    """The text with its HTML entities resolved, however often they were escaped, and single spaces."""
    while (plain := html.unescape(text)) != text:
        text = plain
    return " ".join(text.split())


def without_repeats(corpora: Mapping[str, Sequence[Row]]) -> dict[str, list[Row]]:
    """The rows whose text is not empty and was in no row before, of this corpus or an earlier one."""
    seen = {""}
    kept = {}
    for name, rows in corpora.items():
        kept[name] = []
        for row in rows:
            if (words := same_text(row.text)) not in seen:
                seen.add(words)
                kept[name].append(row)
    return kept


def families(rows: Sequence[Row], shared: float = 0.75) -> list[Row]:
    """The same rows, with those that share at least ``shared`` of their words in one group, the first one's.

    Some tweets were written from others to test a rating: louder, in capitals, with another adverb.
    """
    words = [set(re.findall(r"\w+", row.text.lower())) for row in rows]
    groups = [row.group for row in rows]
    for later, own in enumerate(words):
        for earlier, other in enumerate(words[:later]):
            both = len(own & other)
            if both and both >= shared * (len(own) + len(other) - both) and groups[earlier] != groups[later]:
                first, joined = sorted((groups[earlier], groups[later]))
                groups = [first if group == joined else group for group in groups]
    return [Row(group, row.rating, row.text) for group, row in zip(groups, rows, strict=True)]


def groups_to_test(name: str, rows: Sequence[Row], seed: int = SEED) -> set[int]:
    """A fifth of the groups, drawn by their hashes, so that no library's random numbers can change it."""
    groups = {row.group for row in rows}
    drawn = sorted(groups, key=lambda g: hashlib.sha256(f"{seed} {name} {g}".encode()).digest())
    return set(drawn[: round(len(groups) / 5)])


def packed(files: Mapping[str, str], licence: str) -> bytes:
    """The embedded file, made of the published ones alone: compressed JSON without a clock in it."""
    corpora = without_repeats({name: parse(file) for name, file in files.items()})
    if "tweets" in corpora:
        corpora["tweets"] = families(corpora["tweets"])
    content = {"licence": licence}
    for name, rows in corpora.items():
        test = groups_to_test(name, rows)
        content[name] = {
            "texts": [row.text for row in rows],
            "ratings": [row.rating for row in rows],
            "groups": [row.group for row in rows],
            "test": [int(row.group in test) for row in rows],
        }
    plain = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    return lzma.compress(plain, preset=9 | lzma.PRESET_EXTREME)


def write_checksum(path: Path) -> None:
    """Put the file's line into SHA256SUMS beside it, in place of an older one."""
    sums = path.parent / "SHA256SUMS"
    lines = sums.read_text().splitlines() if sums.exists() else []
    others = [line for line in lines if line.split()[1] != path.name]
    own = f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}"
    lines = sorted([*others, own], key=lambda line: line.split()[1])
    sums.write_text("".join(f"{line}\n" for line in lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("archive", type=Path, nargs="?", help=f"{ARCHIVE}.tar.gz")
    parser.add_argument("--output", type=Path, default=HERE)
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        content = packed(*read_archive(arguments.archive or download(Path(folder))))
    (arguments.output / FILE).write_bytes(content)
    write_checksum(arguments.output / FILE)


if __name__ == "__main__":
    main()
