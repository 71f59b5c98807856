"""The CPU back end: the templates' C++ kernels, compiled on this machine and called through ctypes.

This file decides the compiler and its flags, the cache of binaries, the binary interface (`Arguments`, mirrored in
`templates/shared/arguments.hpp`) and which OpenMP runtime carries the threads: the one torch has loaded, so that there
is one pool of threads. It must not know how work is chosen.

A binary is keyed by its sources, flags, compiler and instruction sets, published by atomic rename under a lock, and
checked against its own digest before it is loaded.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from sparsec import data
from sparsec.backends.base import Launch, Problem
from sparsec.device import Device
from sparsec.errors import BackendMissingError, CompileError
from sparsec.layout import RowLists
from sparsec.template import Template

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_FLAGS: Final = ("-std=c++17", "-O3", "-fPIC", "-shared", "-ffp-contract=fast", "-fno-math-errno", "-w")
_DTYPE_NAMES: Final = {"fp32": "float", "fp16": "sx::fp16", "bf16": "sx::bf16"}
_ROW_FORMS: Final = {"edges": 0, "ranges": 1, "offsets": 2}

# Compiler options of an instruction set, widest first. The levels x86-64-v3 and v4 are AVX2 and AVX-512 with what
# processors that have those always have beside them.
_ISA_FLAGS: Final = (
    ("avx512_bf16", ("-march=x86-64-v4", "-mavx512bf16")),
    ("avx512f", ("-march=x86-64-v4",)),
    ("avx2", ("-march=x86-64-v3",)),
    ("sse2", ("-march=x86-64",)),
    ("neon", ("-march=armv8-a",)),
)


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("row", ctypes.c_int64),
    ]


def _int64s(names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_int64) for name in names.split()]


def _pointers(names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_void_p) for name in names.split()]


class Arguments(ctypes.Structure):
    """`sx::Arguments`, field by field; every field is eight bytes wide."""

    _fields_ = [
        *[(name, _Tensor) for name in ("q", "k", "v", "out")],
        *_pointers("lse"),
        *_int64s("lse_batch lse_head batch q_heads kv_heads q_len kv_len head_dim v_dim"),
        *_pointers("heads"),
        *_int64s("n_heads"),
        ("scale", ctypes.c_double),
        *_int64s("out_is_fp32 block_q block_kv"),
        *_pointers("tile_columns tile_pattern patterns gathered_columns gathered_lanes"),
        *_int64s("row_form"),
        *_pointers("row_indptr row_start row_stop row_step"),
        *_int64s("n_offsets"),
        *_pointers("offset_start offset_stop offset_step q_order kv_order"),
        *_int64s("n_items"),
        *_pointers("item_unit item_slot tile_start tile_stop column_start column_stop edge_start edge_stop"),
        *_int64s("n_merges n_slots"),
        *_pointers("merge_unit merge_indptr partial parallel"),
        *_int64s("threads"),
    ]


class CpuKernel:
    """A loaded kernel bound to the index arrays of one launch."""

    def __init__(self, launch: Launch, library: ctypes.CDLL, sources: tuple[Path, ...]) -> None:
        self.launch = launch
        self._sources = sources
        self._run = library.forward
        self._run.argtypes, self._run.restype = [ctypes.POINTER(Arguments)], None
        self._arrays: list[np.ndarray[Any, Any]] = []
        self._arguments = Arguments()
        self._fill()
        self._parallel = openmp_parallel()
        problem = launch.problem
        self._is_whole_batch = launch.batch == tuple(range(problem.batch))

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self._arrays) + self._partial_words(len(self.launch.batch)) * 4

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None
    ) -> None:
        if self._is_whole_batch:
            self._call(q, k, v, out, lse)
            return
        for b in self.launch.batch:
            one = slice(b, b + 1)
            self._call(q[one], k[one], v[one], out[one], None if lse is None else lse[one])

    def source(self) -> dict[str, str]:
        return {path.name: path.read_text() for path in self._sources}

    def _call(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None
    ) -> None:
        import torch

        # A copy of the prepared arguments: two threads may call one kernel.
        a = Arguments.from_buffer_copy(self._arguments)
        a.q, a.k, a.v, a.out = (_Tensor(t.data_ptr(), *t.stride()[:3]) for t in (q, k, v, out))
        a.batch, a.kv_len = q.shape[0], k.shape[2]
        if lse is not None:
            a.lse, a.lse_batch, a.lse_head = lse.data_ptr(), lse.stride(0), lse.stride(1)
        words = self._partial_words(q.shape[0])
        partial = np.empty(words, np.float32)
        a.partial = partial.ctypes.data
        a.threads = torch.get_num_threads()
        a.parallel = self._parallel
        self._run(ctypes.byref(a))

    def _partial_words(self, batch: int) -> int:
        launch = self.launch
        slots = launch.work.schedule.n_slots * batch * len(launch.heads)
        return slots * (launch.problem.v_dim + 2) * launch.work.block_q

    def _fill(self) -> None:
        launch, a = self.launch, self._arguments
        problem, work = launch.problem, launch.work
        a.q_heads, a.kv_heads = problem.q_heads, problem.kv_heads
        a.q_len, a.head_dim, a.v_dim = work.bound.q_len, problem.head_dim, problem.v_dim
        a.heads, a.n_heads = self._pointer(np.array(launch.heads, np.int32)), len(launch.heads)
        a.scale, a.out_is_fp32 = launch.scale, int(launch.is_partial)
        a.block_q = work.block_q
        a.q_order, a.kv_order = self._pointer(work.ordering.q_order), self._pointer(work.ordering.kv_order)
        schedule = work.schedule
        a.n_items, a.n_merges, a.n_slots = schedule.n_items, len(schedule.merge_unit), schedule.n_slots
        a.item_unit, a.item_slot = self._pointer(schedule.unit), self._pointer(schedule.slot)
        a.merge_unit, a.merge_indptr = self._pointer(schedule.merge_unit), self._pointer(schedule.merge_indptr)
        if work.tiles is not None:
            tiles = work.tiles
            a.block_kv = tiles.tile_map.block_kv
            a.tile_columns = self._pointer(tiles.tile_map.indices)
            a.tile_pattern = self._pointer(tiles.patterns.index)
            a.patterns = self._pointer(tiles.lane_masks())
        if work.gathered is not None:
            a.gathered_columns = self._pointer(work.gathered.columns)
            a.gathered_lanes = self._pointer(work.gathered.lanes)
        if work.rows is not None:
            self._fill_rows(work.rows)
        if work.items is not None:
            for name in ("tile_start", "tile_stop", "column_start", "column_stop", "edge_start", "edge_stop"):
                setattr(a, name, self._pointer(getattr(work.items, name)))
        elif work.tiles is not None:
            a.tile_start, a.tile_stop = self._pointer(schedule.start), self._pointer(schedule.stop)
        else:
            a.edge_start, a.edge_stop = self._pointer(schedule.start), self._pointer(schedule.stop)

    def _fill_rows(self, rows: RowLists) -> None:
        a = self._arguments
        a.row_form = _ROW_FORMS[rows.form]
        a.row_indptr = self._pointer(rows.indptr)
        if rows.form == "edges":
            a.row_start = self._pointer(rows.columns)
        elif rows.form == "ranges":
            a.row_start, a.row_stop, a.row_step = (self._pointer(x) for x in (rows.start, rows.stop, rows.step))
        else:
            a.n_offsets = len(rows.start)
            a.offset_start, a.offset_stop, a.offset_step = (
                self._pointer(x) for x in (rows.start, rows.stop, rows.step)
            )

    def _pointer(self, array: np.ndarray[Any, Any] | None) -> int | None:
        """The address of an array, which is kept alive and contiguous."""
        if array is None:
            return None
        kept = np.ascontiguousarray(array)
        self._arrays.append(kept)
        return int(kept.ctypes.data)


class CpuBackend:
    """C++ kernels for the processor at hand."""

    name = "cpu"

    def missing(self, device: Device) -> str | None:
        try:
            compiler()
        except BackendMissingError as error:
            return str(error)
        return None

    def refusal(self, template: Template, problem: Problem, device: Device) -> str | None:
        if device.kind != "cpu":
            return f"it serves processors, and {device.name} is a GPU"
        return None

    def toolchain(self) -> str:
        return compiler().version

    def lower(self, launch: Launch) -> CpuKernel:
        sources = source_files(launch.template)
        path = compiled(sources, launch.problem.dtype, launch.device)
        return CpuKernel(launch, _load(path, sources[0]), sources)


@cache
def backend() -> CpuBackend:
    return CpuBackend()


@dataclass(frozen=True, slots=True)
class Compiler:
    """A C++ compiler: its command and the first line of its version."""

    command: tuple[str, ...]
    version: str


@cache
def compiler() -> Compiler:
    """`$CXX`, else g++, else clang++.

    Raises:
        BackendMissingError: None of them runs.
    """
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["g++", "clang++"]:
        command = tuple(name.split())
        if not command or shutil.which(command[0]) is None:
            continue
        asked = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
        if asked.returncode == 0 and asked.stdout:
            return Compiler(command, asked.stdout.splitlines()[0])
    found = f"$CXX is {wanted!r}, which does not run" if wanted else "neither g++ nor clang++ is on the PATH"
    raise BackendMissingError(
        f"the cpu back end compiles its kernels on this machine, and {found}; "
        "install a C++17 compiler (Debian: apt install g++) or set CXX to one"
    )


def isa_flags(device: Device) -> tuple[str, ...]:
    """Compiler options for the instruction sets of a processor."""
    for feature, flags in _ISA_FLAGS:
        if feature in device.features:
            return flags
    return ()


def source_files(template: Template) -> tuple[Path, ...]:
    """The kernel of a template and the headers it may include, the kernel first."""
    shared = sorted((template.folder.parent / "shared").glob("*.hpp"))
    return (template.kernel_path("cpu"), *shared)


def compiled(sources: tuple[Path, ...], dtype: str, device: Device, defines: tuple[str, ...] = ()) -> Path:
    """The shared library of a kernel, from the cache or the compiler.

    Raises:
        CompileError: The compiler refused; carries the source's path and the log.
    """
    flags = (*_FLAGS, *isa_flags(device), f"-DSX_DTYPE={_DTYPE_NAMES[dtype]}", *defines)
    key = hashlib.sha256("\0".join([compiler().version, *compiler().command, *flags]).encode())
    for path in sources:
        key.update(path.name.encode() + b"\0" + path.read_bytes())
    binary = data.cache_dir() / "cpu" / f"{sources[0].parent.name}-{dtype}-{key.hexdigest()[:24]}.so"
    if _is_intact(binary):
        return binary
    binary.parent.mkdir(mode=0o700, exist_ok=True)
    with data.entry_lock(binary):
        if not _is_intact(binary):
            content = _compile(sources[0], flags)
            data.publish(_digest_path(binary), hashlib.sha256(content).hexdigest().encode())
            data.publish(binary, content)
    return binary


def _digest_path(binary: Path) -> Path:
    return binary.with_suffix(".sha256")


def _is_intact(binary: Path) -> bool:
    """Whether a cached binary is all there; one that is not is compiled again, never loaded."""
    try:
        content, expected = binary.read_bytes(), _digest_path(binary).read_text()
    except OSError:
        return False
    if hashlib.sha256(content).hexdigest() == expected:
        return True
    logger.warning("the cached kernel %s is damaged; it is compiled again", binary)
    return False


def _compile(source: Path, flags: tuple[str, ...]) -> bytes:
    with tempfile.TemporaryDirectory(prefix="sparsec-") as folder:
        target = Path(folder) / "kernel.so"
        command = [*compiler().command, *flags, str(source), "-o", str(target)]
        logger.debug("compiling: %s", " ".join(command))
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CompileError(f"{compiler().version} could not compile {source.name}", source, done.stderr)
        return target.read_bytes()


@cache
def _load(path: Path, source: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise CompileError(f"the kernel {path} does not load: {error}", source) from error
    library.sx_abi.restype = ctypes.c_int64
    if library.sx_abi() != ctypes.sizeof(Arguments):
        raise CompileError(
            f"{path.name} takes {library.sx_abi()} bytes of arguments and this sparsec passes "
            f"{ctypes.sizeof(Arguments)}: templates/shared/arguments.hpp and backends/cpu.py disagree",
            source,
        )
    return library


@cache
def openmp_parallel() -> int | None:
    """The address of `GOMP_parallel` in the OpenMP runtime torch has loaded; None where it has none (one thread)."""
    import torch

    beside_torch = str(Path(torch.__file__).parent)
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    names = ("libgomp", "libiomp5", "libomp")
    runtimes = [path for path in loaded if Path(path).name.startswith(names)]
    for path in sorted(runtimes, key=lambda path: not path.startswith(beside_torch)):
        function = getattr(ctypes.CDLL(path), "GOMP_parallel", None)
        if function is not None:
            return ctypes.cast(function, ctypes.c_void_p).value
    logger.warning("torch has loaded no OpenMP runtime; sparsec's CPU kernels run on one thread")
    return None
