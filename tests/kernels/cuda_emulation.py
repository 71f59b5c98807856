"""CUDA kernels run without a GPU: the same text, compiled for this processor, behind the back end's own launches."""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from sparsec import data
from sparsec.backends.cuda_calls import Program
from sparsec.backends.cuda_compile import source_files

if TYPE_CHECKING:
    import torch

_HEADER = Path(__file__).with_name("cuda_emulation.hpp")
_MATRIX_HEADER = Path(__file__).with_name("cuda_matrix_emulation.hpp")
_KERNELS = {"forward": ("forward", "merge"), "backward": ("prepare", "backward", "add_up")}


class Emulation:
    """What stands for a GPU's driver."""

    def __init__(self) -> None:
        self.started: list[tuple[str, int, int]] = []
        self._calls: list[Callable[[], None]] = []

    def run(
        self,
        program: Program,
        name: str,
        blocks: int,
        threads: int,
        shared_bytes: int,
        arguments: ctypes.Structure,
        device: torch.device,
    ) -> None:
        assert device.type == "cpu"
        assert blocks > 0
        assert threads % 32 == 0
        self.started.append((name, blocks, threads))
        function = getattr(_library(program), f"launch_{name}")
        numbers = [ctypes.c_uint(number) for number in (blocks, threads, shared_bytes)]
        # The driver copies the arguments too.
        copied = type(arguments).from_buffer_copy(arguments)
        self._calls.append(lambda: function(*numbers, ctypes.byref(copied)))
        self._calls[-1]()

    def replay(self) -> None:
        """Starts everything again that was started, with the arguments it had, as a captured graph does."""
        for call in self._calls:
            call()


@cache
def _library(program: Program) -> ctypes.CDLL:
    sources = (*source_files(program.template), _HEADER, _MATRIX_HEADER)
    is_backward = any(name == "SX_BACKWARD" for name, _ in program.defines)
    text = f'#include "{sources[0]}"\n'
    for name in _KERNELS["backward" if is_backward else "forward"]:
        text += (
            f'extern "C" void launch_{name}(unsigned blocks, unsigned threads, unsigned bytes, const void* a) {{\n'
            f"  emulated::launch(blocks, threads, bytes, [=] {{ {name}(*(const sx::Arguments*)a); }});\n}}\n"
        )
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-w", f'-DSX_HOST="{_HEADER}"']
    flags += [f'-DSX_HOST_MATRIX="{_MATRIX_HEADER}"', f"-I{data.templates_dir()}"]
    flags += [f"-D{name}={value}" for name, value in (*program.defines, ("SX_RESIDENT", "1"))]
    if program.headers:
        generated = data.cache_dir() / f"emulated-{hashlib.sha256(repr(program.headers).encode()).hexdigest()[:24]}"
        generated.mkdir(exist_ok=True)
        for name, content in program.headers:
            (generated / name).write_text(content)
        flags.append(f"-I{generated}")
    key = hashlib.sha256("\0".join([*flags, text]).encode() + b"".join(path.read_bytes() for path in sources))
    path = data.cache_dir() / f"emulated-{key.hexdigest()[:24]}.so"
    if not path.is_file():
        command = ["g++", *flags, "-x", "c++", "-", "-o", str(path)]
        done = subprocess.run(command, input=text, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(path))
