"""`sparsec doctor`: whether this machine has what sparsec needs, and what to do about what it lacks."""

from __future__ import annotations

import os
import platform
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, get_args

import click

from sparsec.cli.console import out, show, waiting

if TYPE_CHECKING:
    from sparsec.backends.base import Dtype
    from sparsec.device import Device
    from sparsec.template import Template

State = Literal["ok", "note", "broken"]

# What sparsec calls, and what for.
_PACKAGES: Final = {
    "torch": "tensors, and OpenMP",
    "numpy": "masks and layouts",
    "scipy": "edge lists and orderings",
    "networkx": "graph analysis",
    "optuna": "tuning",
    "triton": "GPU kernels; optional",
    "cuda-python": "GPU kernels; optional",
}
_OPTIONAL: Final = frozenset({"triton", "cuda-python"})
_REPORT: Final = "report it, with this text"
_OLDEST_PYTHON: Final = (3, 11)
_MARKS: Final = {"ok": ("✓", "green"), "note": ("–", "yellow"), "broken": ("✗", "bold red")}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        section: What it belongs to.
        name: What it is.
        state: `broken` is something needed; a `note` is something one can do without.
        found: What is there.
        remedy: What to do, where something is wrong.
    """

    section: str
    name: str
    state: State
    found: str
    remedy: str = ""


@click.command(short_help="Whether this machine has what sparsec needs.")
@click.option("--check", "runs_checks", is_flag=True, help="Compile every kernel and check it against the reference.")
@click.option("--json", "is_json", is_flag=True, help="Print JSON.")
@click.pass_context
def doctor(context: click.Context, runs_checks: bool, is_json: bool) -> None:
    """Looks at what sparsec needs here: packages, compiler, processor, cache, and whether kernels passed their check.

    Exits with 1 if something that is needed is broken.
    """
    with waiting("checking every kernel" if runs_checks else "looking"):
        findings = list(_findings(runs_checks))
    if is_json:
        from sparsec.report import json_text

        click.echo(json_text([asdict(finding) for finding in findings]))
    else:
        _show(findings)
    if any(finding.state == "broken" for finding in findings):
        context.exit(1)


def _findings(runs_checks: bool) -> Iterator[Finding]:
    from sparsec.errors import SparsecError

    yield _python()
    for package, purpose in _PACKAGES.items():
        yield _package(package, purpose)
    yield from _compilers()
    yield _openmp()
    try:
        from sparsec.device import detect_cpu

        processor = detect_cpu()
    except SparsecError as error:
        yield Finding("processor", "processor", "broken", str(error), "run where sparsec has kernels")
        processor = None
    if processor is not None:
        yield from _processor(processor)
    finding, gpu = _gpu()
    yield finding
    cache = _cache()
    yield cache
    for device in (processor, gpu):
        if device is not None and cache.state == "ok":
            yield from _gate(device, runs_checks)


def _python() -> Finding:
    version = f"{platform.python_implementation()} {platform.python_version()}"
    if tuple(map(int, platform.python_version_tuple()[:2])) < _OLDEST_PYTHON:
        return Finding("packages", "Python", "broken", version, "install Python 3.11 or newer")
    return Finding("packages", "Python", "ok", version)


def _package(name: str, purpose: str) -> Finding:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return Finding("packages", name, "ok", f"{version(name)} ({purpose})")
    except PackageNotFoundError:
        state: State = "note" if name in _OPTIONAL else "broken"
        return Finding("packages", name, state, f"not installed ({purpose})", f"pip install {name}")


def _compilers() -> Iterator[Finding]:
    from sparsec.backends.cpu import compiler
    from sparsec.errors import BackendMissingError

    try:
        found = compiler()
    except BackendMissingError as error:
        yield Finding("compiler", "C++", "broken", str(error), "install g++ or clang++, or set CXX")
        return
    yield Finding("compiler", "C++", "ok", f"{' '.join(found.command)}: {found.version}")


def _openmp() -> Finding:
    try:
        import torch
    except (ImportError, OSError) as error:
        return Finding("compiler", "OpenMP", "broken", f"torch cannot be imported: {error}", "install torch again")
    library = _openmp_library(Path(torch.__file__).parent)
    if library is None:
        remedy = "install a torch that brings libgomp or libiomp5: without it kernels run on one thread"
        return Finding("compiler", "OpenMP", "note", "torch has loaded no runtime", remedy)
    return Finding("compiler", "OpenMP", "ok", f"{library}, {torch.get_num_threads()} threads (torch.set_num_threads)")


def _openmp_library(torch_folder: Path) -> str | None:
    """The path of the OpenMP runtime in this process, torch's own first."""
    try:
        mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    except OSError:
        return None
    runtimes = [path for path in mapped if Path(path).name.startswith(("libgomp", "libiomp5", "libomp"))]
    return min(runtimes, key=lambda path: (not Path(path).is_relative_to(torch_folder), path), default=None)


def _processor(device: Device) -> Iterator[Finding]:
    from sparsec.data import ISA_VARIABLE, forced_isa
    from sparsec.planner.words import size

    caches = [device.l1_bytes, device.l2_bytes, device.l3_bytes]
    lowered = f" ({ISA_VARIABLE} holds it there)" if forced_isa() else ""
    yield Finding("processor", "model", "ok", f"{device.label} ({device.key})")
    yield Finding("processor", "vectors", "ok", f"{device.isa}{lowered}: {', '.join(sorted(device.features))}")
    yield Finding("processor", "cores", "ok", f"{device.units} for this process, at {device.clock_hz / 1e9:.2f} GHz")
    yield Finding(
        "processor", "caches", "ok", ", ".join(f"L{level} {size(n)}" for level, n in enumerate(caches, 1) if n)
    )
    yield Finding("processor", "memory", "ok", size(device.memory_bytes))


def _gpu() -> tuple[Finding, Device | None]:
    from sparsec.device import detect_gpu
    from sparsec.errors import BackendMissingError, SparsecError

    try:
        device = detect_gpu()
    except BackendMissingError:
        return Finding("GPU", "GPU", "note", "torch sees none; kernels run on the processor"), None
    except (SparsecError, OSError) as error:
        return Finding("GPU", "GPU", "note", str(error)), None
    return Finding("GPU", "GPU", "ok", f"{device.label} ({device.key})"), device


def _cache() -> Finding:
    from sparsec import data
    from sparsec.errors import SparsecError
    from sparsec.planner.words import size

    try:
        path = data.cache_dir()
    except SparsecError as error:
        return Finding("cache", "directory", "broken", str(error), f"see above, or set {data.CACHE_DIR_VARIABLE}")
    sizes = [(Path(folder) / name).lstat().st_size for folder, _, names in os.walk(path) for name in names]
    mode = stat.S_IMODE(path.stat().st_mode)
    return Finding("cache", "directory", "ok", f"{path}, mode {mode:04o}, {len(sizes)} files, {size(sum(sizes))}")


def _gate(device: Device, runs_checks: bool) -> Iterator[Finding]:
    from sparsec.backends.base import BACKENDS, DTYPES, Problem, backend
    from sparsec.template import KERNEL_FILES, templates

    for template in templates().values():
        for name in template.backends():
            if name not in BACKENDS or name not in KERNEL_FILES:
                continue
            server = backend(name)
            if server.missing(device):
                continue
            for dtype in DTYPES:
                if server.refusal(template, Problem(1, 1, dtype=dtype), device):
                    continue
                yield _kernel(template, name, dtype, device, runs_checks)


def _kernel(template: Template, backend: str, dtype: Dtype, device: Device, runs_checks: bool) -> Finding:
    """Which directions of a kernel have passed their check; `runs_checks` does it anew."""
    from sparsec import gate
    from sparsec.errors import SparsecError, UnsupportedError

    title = f"{template.name} on {backend}, {dtype}"
    passed = []
    directions = [each for each in get_args(gate.Direction) if each == "forward" or template.has_backward(backend)]
    for direction in directions:
        try:
            if runs_checks:
                error = gate.check(template, backend, dtype, device, direction)
                if error is not None:
                    return Finding("kernels", title, "broken", f"{direction} gives wrong results: {error}", _REPORT)
                gate.ensure(template, backend, dtype, device, direction)
            if gate.is_passed(template, backend, dtype, device, direction):
                passed.append(direction)
        except UnsupportedError:
            continue
        except SparsecError as error:
            return Finding("kernels", title, "broken", f"{direction}: {error}", _REPORT)
    if passed == directions:
        return Finding("kernels", title, "ok", f"passed: {', '.join(passed)}")
    found = f"passed: {', '.join(passed)}; the rest not checked yet" if passed else "not checked yet"
    return Finding("kernels", title, "note", found, "is checked at its first use")


def _show(findings: list[Finding]) -> None:
    from rich.table import Table
    from rich.text import Text

    console = out()
    name_width = max(len(finding.name) for finding in findings)
    for section in dict.fromkeys(finding.section for finding in findings):
        show(console, Text(section, "bold"))
        grid = Table.grid(padding=(0, 1, 0, 0))
        grid.add_column(width=3, justify="right")
        grid.add_column(max_width=min(name_width, console.width // 2))
        grid.add_column()
        for finding in findings:
            if finding.section == section:
                mark, style = _MARKS[finding.state]
                grid.add_row(Text(mark, style), Text(finding.name), Text(finding.found))
        show(console, grid)
    problems = [finding for finding in findings if finding.state == "broken"]
    has_unchecked = any(finding.section == "kernels" and finding.state == "note" for finding in findings)
    show(console, "")
    for finding in problems:
        show(console, Text(f"✗ {finding.name}: {finding.remedy}", "bold red"))
    for finding in findings:
        if finding.name == "OpenMP" and finding.state == "note":
            show(console, Text(f"– {finding.name}: {finding.remedy}", "yellow"))
    if not problems:
        show(console, "Everything that is needed is here.")
    if has_unchecked:
        show(console, "Kernels are checked at their first use; `sparsec doctor --check` does it now.")
