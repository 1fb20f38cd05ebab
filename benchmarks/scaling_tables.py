#!/usr/bin/env python3
"""The tables of docs/scaling.md, computed from the shapes: scaling_tables.py > tables.md. Nothing is measured."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from eightfold.bench.accounting import Formats, Peaks, Row, weight_format
from eightfold.bench.traffic import BLOCK_ROWS, Link, Split, exchange_seconds, messages, rank_seconds
from eightfold.random_checkpoint import SHAPES

INT8, HALF = weight_format("w8a8", "float16"), weight_format("dense", "bfloat16")
FORMATS = Formats(INT8, HALF, HALF)
CONTEXT = 1024
WHOLE = 1 << 20  # rows of a message between devices: all of a step


class Machine(NamedTuple):
    """Assumed figures of one rank and its links; `reached` is the part of its peaks that its kernels reach."""

    name: str
    peaks: Peaks
    link: Link
    reached: float = 0.7


def machine(name: str, int8: float, half: float, read: float, latency: float, bandwidth: float) -> Machine:
    """Tera-operations and gigabytes a second, microseconds."""
    peaks = Peaks({"int8": int8 * 1e12, "bf16": half * 1e12, "fp32": half * 5e11}, read * 1e9)
    return Machine(name, peaks, Link(latency * 1e-6, bandwidth * 1e9))


NPUS = (
    machine("NPU with HBM, HCCS", 600, 300, 1600, 20, 100),
    machine("chip of a 300I Duo, PCIe", 140, 70, 204, 40, 12),
)
CPU = (8.0, 4.0, 300.0)  # a server socket: tera-operations in int8 and bf16, gigabytes a second
NETWORKS: tuple[tuple[str, float, float], ...] = (
    ("memory of one machine", 5, 50),
    ("100 Gbit/s, RDMA", 10, 11),
    ("25 Gbit/s, TCP", 60, 2.8),
    ("1 Gbit/s, TCP", 100, 0.11),
)


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """One table in Markdown."""
    lines = [list(head)]
    lines += [["-"] * len(lines[0]), *([str(cell) for cell in row] for row in rows)]
    print("\n".join("| " + " | ".join(line) + " |" for line in lines), end="\n\n")


def traffic_tables() -> None:
    """Messages and bytes of a decode step of one sequence, and bytes a token of a prefill."""
    for shape, config in SHAPES.items():
        print(f"**{shape}**\n")
        rows = []
        for ranks in (2, 4, 8, 16):
            for ep in (1, 2, 8):
                for exact in (True, False):
                    split = Split(ranks, ep, exact)
                    if ranks % ep or (ep > 1 and not exact):
                        continue
                    one, many = messages(config, split, 1, 1), messages(config, split, 2048, 1)
                    way = ("exact" if exact else "cheap or float") if ep == 1 else "exact"
                    rows.append(
                        (
                            f"{ranks}",
                            f"{split.moe_tp} × {ep}",
                            way,
                            f"{sum(line.number for line in one):.0f}",
                            f"{sum(line.sent for line in one) / 1e6:.2f}",
                            f"{sum(line.sent for line in many) / 2048 / 1e6:.2f}",
                            f"{sum(line.number for line in many):.0f}",
                        )
                    )
        table(
            (
                "ranks",
                "moe_tp × moe_ep",
                "sums",
                "messages a decode step",
                "MB sent a decoded token",
                "MB sent a prompt token",
                "messages a prefill of 2048",
            ),
            rows,
        )


def speed(shape: str, split: Split, machine: Machine, block_rows: int = BLOCK_ROWS) -> tuple[str, str, str]:
    """Predicted: milliseconds of a decode step at batch 1, tokens a second at batch 32, and of a prefill of 2048."""
    config, cells = SHAPES[shape], []
    for batch, new in ((1, 1), (32, 1), (1, 2048)):
        rows = [Row(new, max(new, CONTEXT))] * batch
        work = rank_seconds(config, FORMATS, split, rows, batch, machine.peaks) / machine.reached
        sent = exchange_seconds(messages(config, split, batch * new, batch, block_rows), machine.link)
        total, share = work + sent, round(100 * sent / (work + sent))
        what = f"{1000 * total:.1f} ms" if batch == new == 1 else f"{batch * new / total:,.0f} tokens/s"
        cells.append(f"{what} ({share} %)")
    return cells[0], cells[1], cells[2]


def speed_tables() -> None:
    """What the arithmetic predicts for NPUs, and for several machines."""
    head = ("", "model", "moe_tp × moe_ep", "sums", "decode, batch 1", "decode, batch 32", "prefill 2048")
    splits = (Split(1), Split(8), Split(8, 1, False), Split(8, 2), Split(8, 8))
    rows = []
    for npu in NPUS:
        for shape in SHAPES:
            for split in splits:
                way = "" if split.ranks == 1 else "exact" if split.exact else "cheap"
                rows.append(
                    (npu.name, shape, f"{split.moe_tp} × {split.moe_ep}", way, *speed(shape, split, npu, WHOLE))
                )
    table(head, rows)
    rows = []
    for name, latency, bandwidth in NETWORKS:
        for split in (Split(1), Split(2), Split(2, 1, False), Split(2, 2), Split(4), Split(4, 4)):
            way = "" if split.ranks == 1 else "exact" if split.exact else "cheap"
            host = machine(name, *CPU, latency, bandwidth)
            if split.ranks > 1 or name == NETWORKS[0][0]:
                rows.append((name, "8x7b", f"{split.moe_tp} × {split.moe_ep}", way, *speed("8x7b", split, host)))
    table(head, rows)


if __name__ == "__main__":
    traffic_tables()
    speed_tables()
