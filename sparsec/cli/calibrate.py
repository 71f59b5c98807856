"""`sparsec tune --calibrate`: what the device can really do, told and remembered."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from sparsec.cli.console import bar, out, show

if TYPE_CHECKING:
    from sparsec.device import Device
    from sparsec.records import Calibration


def calibrate(device: Device, where: str) -> None:
    """Measures, keeps and shows the ceilings of the device that is here."""
    from sparsec.records import database
    from sparsec.report import Column, table
    from sparsec.tuning.calibrate import calibrate as measured
    from sparsec.tuning.tuner import check_is_here

    check_is_here(device, where)
    progress = bar()
    with progress:
        shown = progress.add_task("calibrating", total=None)
        found = measured(device, where, lambda what: progress.update(shown, description=f"measuring {what}"))
    database().append(found)
    click.echo(f"{device.label} ({device.key}), as measured:\n")
    console = out()
    columns = [Column("what"), Column("measured", "right"), Column("described as", "right")]
    show(console, table(columns, _rows(found, device), console))


def _rows(found: Calibration, device: Device) -> list[tuple[str, str, str]]:
    known = {
        "vector_flops": device.vector_flops,
        "bf16_flops": device.matrix_flops.get("bf16"),
        "fp16_flops": device.matrix_flops.get("fp16"),
        "memory_bandwidth": device.memory_bandwidth,
        "launch_us": device.launch_us,
    }
    rows = []
    for name, value in found.values:
        described = known.get(name)
        rows.append((name.replace("_", " "), _text(name, value), "" if described is None else _text(name, described)))
    return rows


def _text(name: str, value: float) -> str:
    if name.endswith("flops"):
        return f"{value / 1e12:.1f} TFLOP/s" if value >= 1e13 else f"{value / 1e9:.0f} GFLOP/s"
    if name.endswith("bandwidth"):
        return f"{value / 1e9:.1f} GB/s"
    if name.endswith("us"):
        return f"{value:.1f} µs"
    return f"{value:.2f} of the estimate"
