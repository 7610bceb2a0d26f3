"""Tables of text, such as CSV and TSV: where rows begin, and whether quotation marks enclose cells.

The csv module would raise one limit for the whole process to read long texts, and does not tell which cells
were in quotation marks. pandas takes cells such as "NA" for missing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from lora_lens._base.errors import InputError

DELIMITERS = {".csv": ",", ".tsv": "\t"}
OTHERS = (";", "\t", ",", "|")  # what a file of either kind may be delimited by as well
NUMBER = re.compile(r"[+-]?[0-9]*\.?[0-9]*(e[+-]?[0-9]+)?", re.IGNORECASE)


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
    header = content.lstrip("\r\n").partition("\n")[0]
    for delimiter in dict.fromkeys((usual, *OTHERS)):
        row = next(iter(_rows(header, delimiter, quoting=True)), (1, [], None))[1]
        if all(column in row for column in columns):
            return delimiter
    return usual


def _table(content: str, delimiter: str, quoting: bool) -> Table:
    lines, rows = [], []
    for line, row, problem in _rows(content, delimiter, quoting):
        if problem is None and rows and len(row) != len(rows[0]):
            problem = f"has {len(row)} cells, but the first line names {len(rows[0])} columns"
        if problem is not None:
            return Table([line], [], problem)
        lines.append(line)
        rows.append(row)
    return Table(lines, rows)


def _sound(source: str, table: Table, delimiter: str) -> Table:
    if table.problem is not None:
        what = {",": "commas", "\t": "tabs"}.get(delimiter, f"{delimiter!r}")
        raise InputError(
            f"{source}, line {table.lines[0]}, {table.problem}; a text with {what}, line breaks or quotation "
            "marks must be in quotation marks, and those within it doubled (if quotation marks belong to the "
            "texts instead, pass quoting=False)"
        )
    return table


def _rows(content: str, delimiter: str, quoting: bool) -> Iterator[tuple[int, list[str], str | None]]:
    """The line on which each row begins, its cells, and what is wrong with it; empty lines are no rows."""
    end = re.escape(delimiter)
    plain = rf"[^{end}\r\n]*+"
    cell = rf'(?:"((?:[^"]++|"")*+)"|((?!"){plain}))' if quoting else f"()({plain})"
    pattern = re.compile(rf"{cell}({end}|\r\n|[\r\n]|\Z)")
    breaks = "\n" if "\n" in content else "\r"
    line, start, position, row = 1, 1, 0, []
    while position < len(content) or row:
        found = pattern.match(content, position)
        if found is None:
            yield (
                start,
                row,
                "is damaged: a quotation mark opens or closes no cell there",
            )
            return
        enclosed, bare, stop = found.groups()
        row.append(bare if bare is not None else enclosed.replace('""', '"'))
        line += content.count(breaks, position, found.end())
        position = found.end()
        if stop != delimiter:
            if row != [""] or bare is None:
                yield start, row, None
            row, start = [], line


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
