"""Tables of text, such as CSV and TSV: where rows begin, and whether quotation marks enclose cells.

The csv module does not tell which cells were in quotation marks, so a table is read with and without them.
pandas takes cells that are missing at the end of a line for empty ones.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from threading import Lock

from lora_lens._base.errors import InputError

DELIMITERS = {".csv": ",", ".tsv": "\t"}
OTHERS = (";", "\t", ",", "|")  # what a file of either kind may be delimited by as well
NUMBER = re.compile(r"[+-]?[0-9]*\.?[0-9]*(e[+-]?[0-9]+)?", re.IGNORECASE)
_limiting = Lock()


@dataclass(frozen=True)
class Table:
    """The rows of a file, the header first, and the lines on which they begin; or what kept it from reading.

    Attributes:
        problem: what is wrong on the line ``line``, None where the file is a table.
    """

    lines: list[int]
    rows: list[list[str]]
    problem: str | None = None


def read_table(source: str, content: str, delimiter: str, columns: list[str], quoting: bool | None) -> Table:
    """The table that ``content`` holds, however it is quoted and delimited.

    Args:
        delimiter: what the file's name says; another where only that gives all of ``columns``.
        quoting: whether cells in quotation marks are to be read without them; None to find out.

    Raises:
        ValueError: it is no table, or the two readings differ and nothing tells which is meant.
    """
    delimiter = _delimiter(content, delimiter, columns)
    if quoting is not None:
        return _sound(source, _table(content, delimiter, quoting), delimiter)
    quoted = _table(content, delimiter, quoting=True)
    if not re.search(rf'(?:^|[\r\n{re.escape(delimiter)}])"', content):
        return _sound(source, quoted, delimiter)  # no cell begins with a quotation mark: one reading only
    plain = _table(content, delimiter, quoting=False)
    if plain.problem is not None:
        return _sound(source, quoted, delimiter)
    if quoted.problem is not None:
        if delimiter == "\t":  # such files are often written without quotation marks around cells
            return plain
        return _sound(source, quoted, delimiter)
    if len(quoted.rows) == len(plain.rows):
        if delimiter != "\t" or _as_a_writer_quotes(plain.rows, quoted.rows):
            return quoted
        if any(_bare(cell) for row in plain.rows for cell in row):  # a writer of quotes would have doubled it
            return plain
        what = "the same rows, with or without the quotation marks around some cells"
    else:
        if delimiter == "\t" and len(plain.rows[0]) > 1:
            return plain  # a cell whose line breaks fall just where rows end is unlikely beyond measure
        what = f"{len(quoted.rows) - 1} rows if quotation marks enclose cells, else {len(plain.rows) - 1}"
    raise InputError(
        f"{source} can be read in two ways: {what}; pass quoting=True if quotation marks enclose cells, "
        "quoting=False if they belong to the texts"
    )


def _delimiter(content: str, usual: str, columns: list[str]) -> str:
    """The usual one, unless the header has all columns only with another one."""
    header = re.split("[\r\n]", content.lstrip("\r\n"), maxsplit=1)[0]
    for delimiter in dict.fromkeys((usual, *OTHERS)):
        names = next(iter(_table(header, delimiter, quoting=True).rows), [])
        if all(column in names for column in columns):
            return delimiter
    return usual


def _table(content: str, delimiter: str, quoting: bool) -> Table:
    lines, rows, line = [], [], 1
    quotes = csv.QUOTE_MINIMAL if quoting else csv.QUOTE_NONE
    with _cells_of_any_length(content):
        reader = csv.reader(StringIO(content, newline=""), delimiter=delimiter, quoting=quotes, strict=True)
        try:
            for row in reader:
                if row and rows and len(row) != len(rows[0]):
                    what = f"has {len(row)} cells, but the first line names {len(rows[0])} columns"
                    return Table([line], [], what)
                if row:  # empty lines are no rows
                    lines.append(line)
                    rows.append(row)
                line = reader.line_num + 1
        except csv.Error:
            return Table([line], [], "is damaged: a quotation mark opens or closes no cell there")
    return Table(lines, rows)


@contextmanager
def _cells_of_any_length(content: str) -> Iterator[None]:
    """The csv module has one limit for the whole process."""
    with _limiting:
        before = csv.field_size_limit()
        csv.field_size_limit(max(before, len(content)))
        try:
            yield
        finally:
            csv.field_size_limit(before)


def _sound(source: str, table: Table, delimiter: str) -> Table:
    if table.problem is not None:
        what = {",": "commas", "\t": "tabs"}.get(delimiter, f"{delimiter!r}")
        raise InputError(
            f"{source}, line {table.lines[0]}, {table.problem}; a text with {what}, line breaks or quotation "
            "marks must be in quotation marks, and those within it doubled (if quotation marks belong to the "
            "texts instead, pass quoting=False)"
        )
    return table


def _as_a_writer_quotes(plain: list[list[str]], quoted: list[list[str]]) -> bool:
    """Whether the cells in quotation marks are just those that some program would put into them."""
    cells = [
        (raw.startswith('"'), value)
        for raws, values in zip(plain, quoted, strict=True)
        for raw, value in zip(raws, values, strict=True)
    ]
    needs = (
        lambda value: '"' in value,  # csv writers, of cells without delimiters and line breaks
        lambda value: '"' in value or "," in value,  # spreadsheets
        lambda value: True,
        lambda value: not NUMBER.fullmatch(value),
        lambda value: value not in quoted[0] and not NUMBER.fullmatch(value),  # with a bare header
    )
    return any(all(given == need(value) for given, value in cells) for need in needs)


def _bare(cell: str) -> bool:
    return not cell.startswith('"') and '"' in cell
