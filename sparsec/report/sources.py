"""The source of every launch of a plan, read without the device it is for.

This file decides which files a reader is shown, and that a file shown once is only named again. It must not know what
is in them.
"""

from __future__ import annotations

from sparsec.backends.base import Launch, backend
from sparsec.planner import Plan


def plan_sources(made: Plan) -> dict[str, dict[str, str]]:
    """Source texts by launch and file; a file that an earlier launch has shown is only named."""
    shown: dict[str, str] = {}
    found: dict[str, dict[str, str]] = {}
    for number, step in enumerate(made.steps, 1):
        launch = step.launch
        title = f"{number}. {launch.template.name} on {launch.backend}"
        found[title] = {}
        for name, text in _launch_sources(launch).items():
            is_shown = shown.get(name) == text
            found[title][name] = "(as above)" if is_shown else text
            shown[name] = text
    return found


def _launch_sources(launch: Launch) -> dict[str, str]:
    # Lowering would want the device; sources and command are known without, and NVRTC compiles for any.
    if launch.backend == "cpu":
        from sparsec.backends import cpu

        sources = cpu.source_files(launch.template)
        command = " ".join(cpu.compile_command(launch.template, launch.problem.dtype, launch.device))
        return {"compiled by": command} | {path.name: path.read_text() for path in sources}
    if launch.backend == "cuda":
        from sparsec.backends import cuda

        return cuda.described(launch)
    if launch.backend == "triton":
        from sparsec.backends import triton

        return {
            str(path.relative_to(launch.template.folder.parent)): path.read_text()
            for path in triton.source_files(launch.template)
        }
    return backend(launch.backend).lower(launch).source()
