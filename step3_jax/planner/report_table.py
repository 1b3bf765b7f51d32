"""The report's tables, printed and computed, for a reader and for scripts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from step3_jax.planner.efficiency import cross_check
from step3_jax.planner.published import AFD, EP
from step3_jax.planner.reproduction import Cell, PrintedTable

Tables = Sequence[tuple[PrintedTable, Sequence[Sequence[Cell]]]]
_HOW = (
    "Each cell: printed, ours (! where it differs), and in brackets what to expect: of MLA's FLOPs the smaller,\n"
    "right count, of USD what measured shares lead to."
)


def to_lines(tables: Tables, *, is_brief: bool) -> Iterator[str]:
    """The comparison as text.

    Args:
      tables: From `compare_report`.
      is_brief: Whether to leave out tables in which everything agrees.
    """
    if not is_brief:
        yield _HOW
        for table, rows in tables:
            yield ""
            yield from _table_lines(table, rows)
        yield ""
    cells = _all_cells(tables)
    agreeing = sum(cell.agrees for cell in cells)
    yield f"{agreeing} of {len(cells)} cells agree to the last printed digit ({_count_by_table(tables)})"
    for cell in cells:
        if not cell.agrees:
            reason = cell.reason or "NOT KNOWN: the arithmetic or the printed value is wrong"
            yield (
                f"  {cell.table}, {cell.row}, {cell.column}: printed {_number(float(cell.printed), cell)}, "
                f"ours {_number(float(cell.ours), cell)}. {reason}"
            )
    yield ""
    yield "Shares fitted on one measured run predict the tokens/s of the others with these errors:"
    for arrangement in (AFD, EP):
        for fitted, errors in _errors(arrangement).items():
            yield f"  {fitted}: " + ", ".join(f"{other} {error:+.1%}" for other, error in errors.items())


def to_dict(tables: Tables) -> dict[str, object]:
    """The comparison as a JSON object."""
    cells = _all_cells(tables)
    return {
        "cells": len(cells),
        "agree": sum(cell.agrees for cell in cells),
        "differ": [_cell_dict(cell) for cell in cells if not cell.agrees],
        "is_reproduced": not any(cell.is_wrong for cell in cells),
        "tables": [
            {"name": table.name, "title": table.title, "cells": [_cell_dict(cell) for row in rows for cell in row]}
            for table, rows in tables
        ],
        "cross_checks": {arrangement: _errors(arrangement) for arrangement in (AFD, EP)},
    }


def is_reproduced(tables: Tables) -> bool:
    """Whether every cell agrees, except those with a known reason."""
    return not any(cell.is_wrong for cell in _all_cells(tables))


def _table_lines(table: PrintedTable, rows: Sequence[Sequence[Cell]]) -> Iterator[str]:
    yield f"{table.name}: {table.title}"
    texts = [[_text(cell) for cell in row] for row in rows]
    labels = [row[0].row for row in rows]
    label = max(map(len, labels))
    widths = [max(len(column), *(len(row[number]) for row in texts)) for number, column in enumerate(table.columns)]
    yield "  ".join([" " * label, *(f"{column:>{width}}" for column, width in zip(table.columns, widths, strict=True))])
    for name, row in zip(labels, texts, strict=True):
        yield "  ".join([f"{name:<{label}}", *(f"{text:>{width}}" for text, width in zip(row, widths, strict=True))])


def _text(cell: Cell) -> str:
    mark = "" if cell.agrees else "!"
    text = f"{_number(float(cell.printed), cell)} {mark}{_number(float(cell.ours), cell)}"
    return text if cell.expected is None else f"{text} [{_number(cell.expected, cell)}]"


def _number(value: float, cell: Cell) -> str:
    places = -int(cell.printed.as_tuple().exponent)
    return f"{value:.{places}f}" if 0 < places < 6 else f"{value:.2e}"


def _all_cells(tables: Tables) -> list[Cell]:
    return [cell for _, rows in tables for row in rows for cell in row]


def _count_by_table(tables: Tables) -> str:
    counts: dict[str, int] = {}
    for table, rows in tables:
        counts[table.name] = counts.get(table.name, 0) + sum(len(row) for row in rows)
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _errors(arrangement: str) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for fitted, other, error in cross_check(arrangement):
        found.setdefault(fitted.name, {})[other.name] = error
    return found


def _cell_dict(cell: Cell) -> dict[str, object]:
    return {
        "table": cell.table,
        "row": cell.row,
        "column": cell.column,
        "printed": float(cell.printed),
        "ours": float(cell.ours),
        "unrounded": cell.exact,
        "expected": cell.expected,
        "agrees": cell.agrees,
        "reason": cell.reason,
    }
