"""A kernel compiled for another processor, run in an emulator: its memory goes there in a file, and comes back.

The shared library is the very one that would be loaded on such a processor. `Library` stands where `ctypes.CDLL` stands
otherwise, so that everything above it is what users run.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from sparsec.backends.base import Launch
from sparsec.backends.cpu_kernels import Arguments, CpuGradient, CpuKernel

COMPILER = "aarch64-linux-gnu-g++"
EMULATOR = "qemu-aarch64"
SYSTEM = Path("/usr/aarch64-linux-gnu")


def missing() -> str:
    """What is not here for running Arm's kernels, in one sentence; "" where nothing is missing."""
    names = [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]
    return f"needs {' and '.join(names)} (Debian: g++-aarch64-linux-gnu, qemu-user)" if names else ""


@cache
def _driver() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="sparsec-emulated-"))
    source = Path(__file__).with_suffix(".cpp")
    subprocess.run([COMPILER, "-std=c++17", "-O1", str(source), "-o", str(folder / "emulated"), "-ldl"], check=True)
    return folder / "emulated"


@dataclass(frozen=True, slots=True)
class _Region:
    address: int
    size: int


class Library:
    """What `CpuKernel` and `CpuGradient` take a library to be: its functions, run in the emulator."""

    def __init__(self, path: Path, itemsize: int) -> None:
        self.forward = _Function(path, "forward", itemsize)
        self.backward = _Function(path, "backward", itemsize)


class _Function:
    # Set by the callers, as on a function of ctypes.
    argtypes: Any = None
    restype: Any = None

    def __init__(self, path: Path, name: str, itemsize: int) -> None:
        self._path, self._name, self._itemsize = path, name, itemsize
        # The index arrays of the one kernel this serves.
        self.arrays: list[np.ndarray[Any, Any]] = []

    def __call__(self, reference: Any) -> None:
        arguments = Arguments.from_buffer_copy(reference._obj)
        # The emulated process has no team of threads.
        arguments.parallel = None
        regions = [_Region(ctypes.addressof(arguments), ctypes.sizeof(arguments))]
        regions += [_Region(array.ctypes.data, array.nbytes) for array in self.arrays]
        tensors = _tensors(arguments, self._itemsize)
        regions += tensors.values()
        pointers = []
        for name, kind in arguments._fields_:
            field = getattr(Arguments, name)
            address = getattr(arguments, name).data if name in _TENSORS else getattr(arguments, name)
            if kind is not ctypes.c_int64 and kind is not ctypes.c_double and address:
                target = _holding(regions, address, name)
                pointers.append((0, field.offset, target, address - regions[target].address))
        with tempfile.NamedTemporaryFile(prefix="sparsec-") as file:
            header = [len(regions), len(pointers), *(region.size for region in regions), *sum(pointers, ())]
            file.write(np.array(header, np.int64).tobytes())
            start = file.tell()
            for region in regions:
                file.write(ctypes.string_at(region.address, region.size))
            file.flush()
            command = [EMULATOR, "-L", str(SYSTEM), str(_driver()), str(self._path), self._name, file.name]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
            assert done.returncode == 0, f"status {done.returncode}: {done.stderr}"
            file.seek(start)
            content = file.read()
        offset = 0
        for region in regions:
            if region in tensors.values():
                ctypes.memmove(region.address, content[offset : offset + region.size], region.size)
            offset += region.size


_TENSORS = ("q", "k", "v", "out", "d_out", "dq", "dk", "dv")


def _tensors(a: Arguments, itemsize: int) -> dict[str, _Region]:
    """Everything that is no index array, by name."""
    q, k = (a.batch, a.q_heads, a.q_len), (a.batch, a.kv_heads, a.kv_len)
    out_size = 4 if a.out_is_fp32 else itemsize
    known = {
        "q": (q, a.head_dim, itemsize),
        "k": (k, a.head_dim, itemsize),
        "v": (k, a.v_dim, itemsize),
        "out": (q, a.v_dim, out_size),
        "d_out": (q, a.v_dim, itemsize),
        "dq": (q, a.head_dim, itemsize),
    }
    found = {}
    for name, (counts, dim, size) in known.items():
        tensor = getattr(a, name)
        if tensor.data:
            strides = (tensor.batch, tensor.head, tensor.row)
            found[name] = _Region(tensor.data, (_reach(counts, strides) + dim) * size)
    for name in ("dk", "dv"):
        if getattr(a, name).data:
            # Sums in fp32, one set for each part.
            found[name] = _Region(getattr(a, name).data, a.n_parts * getattr(a, f"{name}_part") * 4)
    for name in ("lse", "d_lse"):
        if getattr(a, name):
            strides = (getattr(a, f"{name}_batch"), getattr(a, f"{name}_head"), 1)
            found[name] = _Region(getattr(a, name), (_reach(q, strides) + 1) * 4)
    if a.partial:
        found["partial"] = _Region(a.partial, a.batch * a.n_heads * a.n_slots * (a.v_dim + 2) * a.block_q * 4)
    if a.n_parts:
        found["part_indptr"] = _Region(a.part_indptr, (a.n_parts + 1) * 8)
    return found


def _reach(counts: tuple[int, ...], strides: tuple[int, ...]) -> int:
    return sum((count - 1) * stride for count, stride in zip(counts, strides, strict=True))


def _holding(regions: list[_Region], address: int, name: str) -> int:
    for index, region in enumerate(regions):
        if region.address <= address < region.address + max(1, region.size):
            return index
    raise AssertionError(f"{name} points to memory that nothing is known of")


def forward(launch: Launch, path: Path, itemsize: int) -> CpuKernel:
    library = Library(path, itemsize)
    kernel = CpuKernel(launch, library, ())
    library.forward.arrays = kernel._arrays
    return kernel


def backward(launch: Launch, path: Path, itemsize: int) -> CpuGradient:
    library = Library(path, itemsize)
    kernel = CpuGradient(launch, library, ())
    library.backward.arrays = kernel._arrays
    return kernel
