"""The Step-3 report's tables, recomputed: every cell is a test."""

from __future__ import annotations

import dataclasses
import json

import pytest

from step3_jax.cli import plan_report
from step3_jax.cli.main import main
from step3_jax.planner.reproduction import Cell, Report, compare_report, load_report, round_half_up

CELLS = [cell for _, rows in compare_report(load_report()) for row in rows for cell in row]
KNOWN = {
    ("Table 5", "h800", "usd_per_flop"),
    ("Figure 3", "llama4-maverick 131,072", "usd_h800"),
}


def key(cell: Cell) -> tuple[str, str, str]:
    return cell.table, cell.row, cell.column


@pytest.mark.parametrize(
    ("table", "count"),
    [
        ("Table 2", 36),
        ("Table 3", 36),
        ("Table 5", 8),
        ("Table 6", 108),
        ("Table 7", 4),
        ("Figure 1", 9),
        ("Figure 2", 10),
        ("Figure 3", 16),
        ("Figure 4", 6),
    ],
)
def test_every_cell_is_the_printed_one_but_for_those_known_to_differ(table: str, count: int) -> None:
    cells = [cell for cell in CELLS if cell.table == table]
    assert len(cells) == count
    wrong = [f"{cell.row} {cell.column}: {cell.printed}, {cell.ours}" for cell in cells if cell.is_wrong]
    assert not wrong, f"{table}, printed and ours: {'; '.join(wrong)}"
    assert {key(cell) for cell in cells if not cell.agrees} == {one for one in KNOWN if one[0] == table}


def test_each_known_difference_has_its_reason() -> None:
    assert {key(cell) for cell in CELLS if cell.reason} == KNOWN


def test_mlas_right_count_is_what_is_expected_of_it() -> None:
    cell = next(cell for cell in CELLS if key(cell) == ("Table 2", "dsv3 8,192", "attention_flops"))
    assert cell.expected is not None
    assert cell.expected / cell.exact == pytest.approx(1088 / 1152)


def test_the_command_prints_ours_beside_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "report"]) == 0
    text = capsys.readouterr().out
    assert "0.048 0.048" in text
    assert "231 of 233 cells agree" in text
    assert "2.80e-19 !2.81e-19" in text
    assert "step3-2a2f: step3-3a2f -19.6%" in text


def test_the_command_prints_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "report", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["cells"], found["agree"], len(found["differ"])) == (233, 231, 2)
    assert set(found["cross_checks"]) == {"afd", "ep"}


def test_a_cell_that_should_agree_and_does_not_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def plant() -> Report:
        report = load_report()
        table = next(table for table in report.tables if table.name == "Table 7")
        row = table.rows[0]
        wrong = dataclasses.replace(table, rows=(dataclasses.replace(row, values=(0.059,)), *table.rows[1:]))
        tables = tuple(wrong if one is table else one for one in report.tables)
        return dataclasses.replace(report, tables=tables)

    monkeypatch.setattr(plan_report, "load_report", plant)
    assert main(["plan", "report", "--brief"]) == 1
    text = capsys.readouterr().out
    assert "Table 7, h800, minimum: printed 0.059, ours 0.058. NOT KNOWN" in text
    assert "230 of 233" in text


@pytest.mark.parametrize(
    ("value", "decimals", "rounded"),
    [(0.0625, 3, "0.063"), (0.078125, 3, "0.078"), (2.8058e-19, None, "2.81E-19"), (1.0734e9, None, "1.07E+9")],
)
def test_rounding_is_half_up_of_the_unrounded_number(value: float, decimals: int | None, rounded: str) -> None:
    assert str(round_half_up(value, decimals)) == rounded
