"""The reference system's tables: benchmark CSV, performance CSV and its padded twin, each whole or not there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from eightfold.compat.timed import Timed
from eightfold.data_files import csv_text, write_text
from eightfold.eval.results import check_writable
from eightfold.types import EightfoldError

BENCHMARK_COLUMNS = (
    *("batch_size", "input_seq_len", "output_seq_len", "e2e_time(ms)", "prefill_time(ms)", "decoder_token_time(ms)"),
    *("prefill_count", "prefill_token_times", "decode_token_times", "prefill_average_time(ms)"),
)
PERFORMANCE_COLUMNS = (
    *("Model", "Batchsize", "In_seq", "Out_seq", "Total time(s)", "Prefill all time(ms)", "Prefill average time(ms)"),
    *("Non-first token time(ms)", "Non-first token Throughput(Tokens/s)", "Throughput(Tokens/s)"),
    *("Non-first token Throughput Average(Tokens/s)", "E2E Throughput Average(Tokens/s)"),
)
_FORMATTED_COLUMNS = {"Throughput(Tokens/s)": "E2E Throughput(Tokens/s)"}
_WIDTHS = (15, 15, 15, 15, 15, 25, 25, 25, 36, 25, 45, 35)


def benchmark_row(timed: Timed, input_len: int, output_len: int) -> list[str]:
    """Of a batch that ran together. Times in ms, but those of the single steps in seconds, as the reference has it."""
    batch, prefill = len(timed.outputs), timed.prefill_seconds
    total = prefill + sum(timed.decodes)
    decode = timed.decode_token_seconds(output_len)
    return [
        *(str(batch), str(input_len), str(output_len)),
        *(f"{1e3 * total:.2f}", f"{1e3 * prefill:.2f}", f"{1e3 * decode:.2f}"),
        *(str(len(timed.prefills)), ",".join(map(str, timed.prefills)), ",".join(map(str, timed.decodes))),
        f"{1e3 * prefill / batch:.2f}",
    ]


def write_benchmark(path: Path, timed: Timed, input_len: int, output_len: int) -> None:
    """A CSV of one row. Raises EightfoldError where it can't be written."""
    write_csv(path, BENCHMARK_COLUMNS, [benchmark_row(timed, input_len, output_len)])


def performance_cells(
    model: str, case: tuple[int, int], batch: int, seconds: float, prefill: float, prefill_average: float, decode: float
) -> list[str]:
    """A case's row, without the averages. Times in seconds; throughputs are batch / decode and batch · out / all."""
    decoding = batch / decode if decode else 0.0
    numbers = (seconds, 1e3 * prefill, 1e3 * prefill_average, 1e3 * decode, decoding, batch * case[1] / seconds)
    return [model, str(batch), *map(str, case), *(str(round(number, 10)) for number in numbers)]


def with_averages(rows: Sequence[list[str]]) -> list[list[str]]:
    """The rows, the last one with the means of both throughputs."""
    means = [sum(float(row[column]) for row in rows) / len(rows) for column in (8, 9)]
    return [*rows[:-1], [*rows[-1], *(str(round(mean, 10)) for mean in means)]]


def write_performance(path: Path, rows: Sequence[list[str]]) -> None:
    """`path` …_result.csv, and beside it …_formatted_result.csv. Raises EightfoldError where they can't be written."""
    rows = with_averages(rows)
    write_csv(path, PERFORMANCE_COLUMNS, [[*row, *[""] * (len(PERFORMANCE_COLUMNS) - len(row))] for row in rows])
    header = [_FORMATTED_COLUMNS.get(name, name) for name in PERFORMANCE_COLUMNS]
    lines = ["|".join(cell.ljust(width) for cell, width in zip(row, _WIDTHS, strict=False)) for row in (header, *rows)]
    formatted = path.with_name(path.name.removesuffix("_result.csv") + "_formatted_result.csv")
    write_text(make_folder_of(formatted), "\n".join(lines) + "\n")


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Raises EightfoldError where it can't be written."""
    write_text(make_folder_of(path), csv_text(header, rows))


def make_folder_of(path: Path) -> Path:
    """The path, whose folder is there now. Raises EightfoldError where it can't be made, or written into."""
    check_writable(path.parent)
    return path


def check_target(path: Path) -> None:
    """Raises EightfoldError if a file can't be written there, before the work of which it is to tell."""
    if path.is_dir():
        raise EightfoldError(f"cannot write {path}: it is a folder")
    check_writable(path.parent)
