"""The Step-3 report's tables and figures, recomputed: compares `configs/planner/report.yaml` with the arithmetic.

Rounded half up, once, from unrounded values; cells that do not follow are listed in the file with the reason.
"""

from __future__ import annotations

import dataclasses
import decimal
import functools
from collections.abc import Callable, Mapping, Sequence

from step3_jax import resources
from step3_jax.layout.hardware import Hardware, load_hardware
from step3_jax.planner.cost import (
    SECONDS_PER_HOUR,
    attention_seconds,
    bandwidth_bytes_per_s,
    count_token_work,
    ffn_seconds,
    peak_flops,
    smallest_active_share,
    usd_per_million_tokens,
)
from step3_jax.planner.data_file import Reader, read_yaml
from step3_jax.planner.estimate import CostAnswer, estimate_cost
from step3_jax.planner.shape import load_shape

_FILE = "configs/planner/report.yaml"
# The hardware compared in Table 4.
HARDWARE = ("h800", "h20", "a800", "910b")
_AFD = "afd"
_SIGNIFICANT = 3


@dataclasses.dataclass(frozen=True)
class PrintedRow:
    """A row of a printed table.

    Attributes:
      label: For people, and the key of differences.
      model: The row's model; None without one.
      hardware: The row's hardware; None without one.
      context_tokens: The row's context; 0 without one.
      values: One for each column.
    """

    label: str
    model: str | None
    hardware: str | None
    context_tokens: int
    values: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class PrintedTable:
    """A table or figure of the report.

    Attributes:
      name: Its number in the report.
      title: What it shows.
      what: How it is computed.
      columns: Names of its columns.
      decimals: Decimals of each column; None for three significant digits.
      rows: Its rows.
    """

    name: str
    title: str
    what: str
    columns: tuple[str, ...]
    decimals: tuple[int, ...] | None
    rows: tuple[PrintedRow, ...]


@dataclasses.dataclass(frozen=True)
class Report:
    """The printed report.

    Attributes:
      tables: Tables and figures.
      differences: Why a cell does not follow, by table, row and column.
    """

    tables: tuple[PrintedTable, ...]
    differences: Mapping[tuple[str, str, str], str]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One number, printed and computed.

    Attributes:
      table: Name of the table.
      row: Label of the row.
      column: Name of the column.
      printed: As printed.
      ours: Rounded as printed.
      exact: Unrounded.
      expected: The expectation from measured shares, or the smaller count of MLA; None without such a figure.
      reason: Why it differs; None if it is expected to agree.
    """

    table: str
    row: str
    column: str
    printed: decimal.Decimal
    ours: decimal.Decimal
    exact: float
    expected: float | None
    reason: str | None

    @property
    def agrees(self) -> bool:
        """Whether the rounded number is the printed one."""
        return self.printed == self.ours

    @property
    def is_wrong(self) -> bool:
        """Whether it differs without a known reason."""
        return not self.agrees and self.reason is None


@functools.cache
def load_report() -> Report:
    """Reads the printed tables.

    Raises:
      ValueError: If the file is wrong.
    """
    reader = Reader(read_yaml(resources.find(_FILE)), _FILE)
    reasons = {
        (one.text("table"), one.text("row"), one.text("column")): one.text("why")
        for one in reader.sections("differences")
    }
    return Report(tuple(_read_table(one) for one in reader.sections("tables")), reasons)


def compare_report(report: Report) -> list[tuple[PrintedTable, list[list[Cell]]]]:
    """Computes every cell.

    Returns:
      Each table with its rows of cells.
    """
    return [(table, [_compare_row(report, table, row) for row in table.rows]) for table in report.tables]


def round_half_up(value: float, decimals: int | None) -> decimal.Decimal:
    """Rounds like the report.

    Args:
      value: Any number except 0.
      decimals: Decimal places; None for three significant digits.
    """
    number = decimal.Decimal(value)
    place = -decimals if decimals is not None else number.adjusted() - _SIGNIFICANT + 1
    return number.quantize(decimal.Decimal(1).scaleb(place), rounding=decimal.ROUND_HALF_UP)


def _compare_row(report: Report, table: PrintedTable, row: PrintedRow) -> list[Cell]:
    cells = []
    for number, (column, printed) in enumerate(zip(table.columns, row.values, strict=True)):
        decimals = None if table.decimals is None else table.decimals[number]
        exact, expected = _FORMULAS[table.what](row, column)
        cells.append(
            Cell(
                table=table.name,
                row=row.label,
                column=column,
                printed=round_half_up(printed, decimals),
                ours=round_half_up(exact, decimals),
                exact=exact,
                expected=expected,
                reason=report.differences.get((table.name, row.label, column)),
            )
        )
    return cells


def _work(row: PrintedRow, column: str) -> tuple[float, float | None]:
    shape = _shape(row.model or "")
    work = count_token_work(shape, row.context_tokens)
    value = float(getattr(work, column))
    smaller = float(getattr(count_token_work(shape, row.context_tokens, rule="exact"), column))
    return value, smaller if smaller != value else None


def _unit_price(row: PrintedRow, column: str) -> tuple[float, float | None]:
    hardware = _hardware(row.hardware or "")
    rate = peak_flops(hardware) if column == "usd_per_flop" else bandwidth_bytes_per_s(hardware)
    return _price(hardware) / SECONDS_PER_HOUR / rate, None


def _attention_usd(row: PrintedRow, column: str) -> tuple[float, float | None]:
    return _attention(row.model or "", row.context_tokens, column), _one_kind(row, column)[0]


def _ffn_usd(row: PrintedRow, column: str) -> tuple[float, float | None]:
    return _ffn(row.model or "", column), _one_kind(row, column)[1]


def _active_share(row: PrintedRow, column: str) -> tuple[float, float | None]:
    return smallest_active_share(_shape("step3"), _hardware(row.hardware or "")), None


def _total_usd(row: PrintedRow, column: str) -> tuple[float, float | None]:
    model, context_tokens = row.model or "", row.context_tokens
    if column == _AFD:
        attention = min(_attention(model, context_tokens, name) for name in HARDWARE)
        return attention + min(_ffn(model, name) for name in HARDWARE), _answer(model, context_tokens).pair.expected_usd
    return _attention(model, context_tokens, column) + _ffn(model, column), sum(_one_kind(row, column))


def _hybrid(row: PrintedRow, column: str) -> tuple[float, float | None]:
    model = row.model or ""
    if column == "kv_gb":
        return _shape(model).kv_bytes_read(row.context_tokens) / 1e9, None
    return _total_usd(row, "h800")


def _ascend(row: PrintedRow, column: str) -> tuple[float, float | None]:
    """Decoding sums rounded cells of Table 6; training is three times the forward FLOPs."""
    model = row.model or ""
    if column == "training_8k":
        work, hardware = count_token_work(_shape(model), 8192), _hardware("910b")
        flops = 3 * (work.attention_flops + work.projection_flops + work.ffn_flops)
        return usd_per_million_tokens(flops / peak_flops(hardware), _price(hardware)), None
    context_tokens = {"decode_8k": 8192, "decode_32k": 32768}[column]
    parts = (_attention(model, context_tokens, "910b"), _ffn(model, "910b"))
    expected = sum(_one_kind(dataclasses.replace(row, context_tokens=context_tokens), "910b"))
    return float(sum(round_half_up(part, 3) for part in parts)), expected


_FORMULAS: Mapping[str, Callable[[PrintedRow, str], tuple[float, float | None]]] = {
    "work": _work,
    "unit_price": _unit_price,
    "attention_usd": _attention_usd,
    "ffn_usd": _ffn_usd,
    "active_share": _active_share,
    "best_usd": _total_usd,
    "total_usd": _total_usd,
    "hybrid": _hybrid,
    "ascend": _ascend,
}


def _attention(model: str, context_tokens: int, hardware_name: str) -> float:
    hardware = _hardware(hardware_name)
    seconds = attention_seconds(count_token_work(_shape(model), context_tokens), hardware)
    return usd_per_million_tokens(seconds, _price(hardware))


def _ffn(model: str, hardware_name: str) -> float:
    hardware = _hardware(hardware_name)
    return usd_per_million_tokens(ffn_seconds(count_token_work(_shape(model), 1), hardware), _price(hardware))


def _one_kind(row: PrintedRow, hardware_name: str) -> tuple[float, float]:
    """Expected USD of attention and of FFN on one kind of hardware."""
    answer = _answer(row.model or "", row.context_tokens)
    one = next(one for one in answer.one_kind if one.attention.hardware.name == hardware_name)
    return one.attention.expected_usd or 0.0, one.ffn.expected_usd or 0.0


@functools.cache
def _answer(model: str, context_tokens: int) -> CostAnswer:
    candidates = [_hardware(name) for name in HARDWARE]
    return estimate_cost(_shape(model), context_tokens=context_tokens, kv_dtype="fp8", candidates=candidates)


_hardware = functools.cache(load_hardware)
_shape = functools.cache(load_shape)


def _price(hardware: Hardware) -> float:
    if hardware.usd_per_hour is None:
        raise ValueError(f"configs/hardware/{hardware.name}.yaml has no usd_per_hour, which the report's tables need")
    return hardware.usd_per_hour


def _read_table(reader: Reader) -> PrintedTable:
    columns = reader.texts("columns")
    decimals = tuple(reader.counts("decimals")) if reader.has("decimals") else None
    rows = tuple(_read_row(one) for one in reader.sections("rows"))
    table = PrintedTable(
        reader.text("name"), reader.text("title"), reader.choice("what", _FORMULAS), tuple(columns), decimals, rows
    )
    lengths: Sequence[int] = [len(row.values) for row in rows]
    if any(length != len(columns) for length in lengths) or (decimals is not None and len(decimals) != len(columns)):
        raise ValueError(f"{reader.where}: {table.name} has {len(columns)} columns, and not as many values or decimals")
    return table


def _read_row(reader: Reader) -> PrintedRow:
    model = reader.text("model") if reader.has("model") else None
    hardware = reader.text("hardware") if reader.has("hardware") else None
    context_tokens = reader.count("context_tokens")
    label = " ".join(filter(None, (model, hardware, f"{context_tokens:,}" if context_tokens else None)))
    return PrintedRow(label, model, hardware, context_tokens, tuple(reader.numbers("values")))
