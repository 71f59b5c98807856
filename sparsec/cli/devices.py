"""`sparsec devices`: what sparsec knows of each device, this machine's first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from sparsec.cli.console import out, show, waiting

if TYPE_CHECKING:
    from rich.console import Console

    from sparsec.device import Device

# What a machine with a driver for a GPU of NVIDIA or AMD has; without one, torch need not be asked.
_GPU_NODES: Final = ("/dev/nvidiactl", "/dev/kfd")


@click.command(short_help="The devices that can be planned for.")
@click.option("--verbose", is_flag=True, help="Also show keys, caches, instruction sets and sources.")
@click.option("--json", "is_json", is_flag=True, help="Print JSON.")
def devices(verbose: bool, is_json: bool) -> None:
    """Lists the devices that can be planned for: this machine's, then those described."""
    with waiting("looking at this machine"):
        found = list(_devices())
    if is_json:
        from sparsec.report import json_text

        click.echo(json_text([device.to_dict() for device in found]))
        return
    console = out()
    if verbose:
        for device in found:
            _show(console, device)
    else:
        _show_table(console, found)


def _devices() -> Iterator[Device]:
    from sparsec.device import detect_gpu, devices
    from sparsec.errors import SparsecError

    processor, *described = devices()
    yield processor
    if any(Path(node).exists() for node in _GPU_NODES):
        try:
            yield detect_gpu()
        except SparsecError as error:
            click.echo(f"the GPU at hand is left out: {error}", err=True)
    yield from described


def _show_table(console: Console, found: list[Device]) -> None:
    from sparsec.report import Column, table

    columns = [
        Column("device"),
        Column("arch"),
        Column("units", "right"),
        Column("memory", "right"),
        Column("GB/s", "right"),
        Column("fp32", "right"),
        Column("bf16", "right"),
    ]
    rows = [
        (
            device.name,
            device.arch,
            f"{device.units}",
            f"{device.memory_bytes / 2**30:.0f} GiB",
            f"{device.memory_bandwidth / 1e9:,.0f}",
            _tera(device.matrix_flops["fp32"]),
            _tera(device.matrix_flops["bf16"]),
        )
        for device in found
    ]
    show(console, table(columns, rows, console))
    show(console, "\nfp32, bf16: dense TFLOP/s with fp32 accumulation; GB/s: read and written.")
    show(console, f"cpu is this machine: {found[0].label}, {found[0].isa}. --verbose shows keys and sources.")


def _show(console: Console, device: Device) -> None:
    from rich.table import Table
    from rich.text import Text

    from sparsec.planner.words import size

    caches = [device.l1_bytes, device.l2_bytes, device.l3_bytes]
    facts = {
        "key": device.key,
        "units": f"{device.units} at {device.clock_hz / 1e9:.2f} GHz",
        "features": ", ".join(sorted(device.features)),
        "caches": ", ".join(f"L{level} {size(n)}" for level, n in enumerate(caches, 1) if n),
        "shared": f"{size(device.shared_bytes_per_block)} a block" if device.shared_bytes_per_block else "",
        "memory": f"{size(device.memory_bytes)}, {device.memory_bandwidth / 1e9:,.0f} GB/s",
        "TFLOP/s": f"vector {_tera(device.vector_flops)}; matrix "
        + ", ".join(f"{dtype} {_tera(flops)}" for dtype, flops in device.matrix_flops.items()),
        "launch": f"{device.launch_us:g} µs",
        "sources": "\n".join(device.sources),
    }
    show(console, Text.assemble((device.name, "bold"), f"  {device.label}"))
    grid = Table.grid(padding=(0, 2, 0, 0))
    for name, value in facts.items():
        if value:
            grid.add_row(Text(f"  {name}", "dim"), Text(value))
    show(console, grid)
    show(console, "")


def _tera(flops: float) -> str:
    return f"{flops / 1e12:.3g}" if flops < 1e15 else f"{flops / 1e12:,.0f}"
