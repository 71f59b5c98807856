"""The CPU back end: the templates' C++ kernels, compiled on this machine.

This file decides the compiler and its flags, and the cache of binaries. How a loaded binary is called is in
`cpu_kernels.py`. It must not know how work is chosen.

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
from typing import Final

from sparsec import data
from sparsec.backends.base import Launch, Problem
from sparsec.backends.cpu_kernels import Arguments, CpuGradient, CpuKernel
from sparsec.device import Device
from sparsec.errors import BackendMissingError, CompileError, SparsecError
from sparsec.score import ScoreMod
from sparsec.template import Config, Template

logger = logging.getLogger(__name__)

_FLAGS: Final = ("-std=c++17", "-O3", "-fPIC", "-shared", "-ffp-contract=fast", "-fno-math-errno", "-w")
_DTYPE_NAMES: Final = {"fp32": "float", "fp16": "sx::fp16", "bf16": "sx::bf16"}

# Compiler options of an instruction set that is there in full. The levels x86-64-v3 and v4 are AVX2 and AVX-512 with
# what processors that have those always have beside them.
_ISA_FLAGS: Final = {
    "avx512_bf16": ("-march=x86-64-v4", "-mavx512bf16"),
    "avx512": ("-march=x86-64-v4",),
    "avx2": ("-march=x86-64-v3",),
    "sse2": ("-march=x86-64",),
    "neon": ("-march=armv8-a",),
    "neon_bf16": ("-march=armv8-a",),
}


class CpuBackend:
    """C++ kernels for the processor at hand."""

    name = "cpu"

    def serves(self, device: Device) -> bool:
        return device.kind == "cpu"

    def missing(self, device: Device) -> str | None:
        try:
            compiler()
        except BackendMissingError as error:
            return str(error)
        return None

    def refusal(self, template: Template, problem: Problem, device: Device) -> str | None:
        return None

    def config_refusal(self, template: Template, config: Config, problem: Problem, device: Device) -> str | None:
        return None

    def toolchain(self) -> str:
        return compiler().version

    def lower(self, launch: Launch) -> CpuKernel:
        sources = source_files(launch.template)
        path = compiled(sources, launch.problem.dtype, launch.device, score_defines(launch.score))
        return CpuKernel(launch, _load(path, sources[0]), sources)

    def lower_backward(self, launch: Launch) -> CpuGradient:
        sources = source_files(launch.template)
        path = compiled(sources, launch.problem.dtype, launch.device, ("-DSX_BACKWARD", *score_defines(launch.score)))
        return CpuGradient(launch, _load(path, sources[0]), sources)


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
    return _ISA_FLAGS.get(device.isa, ())


def source_files(template: Template) -> tuple[Path, ...]:
    """The kernel of a template and the headers it may include, the kernel first."""
    shared = sorted((template.folder.parent / "shared").glob("*.hpp"))
    return (template.kernel_path("cpu"), *shared)


def score_defines(score: ScoreMod | None) -> tuple[str, ...]:
    """What includes a score modifier's generated header in a kernel; the header is in the cache afterwards."""
    if score is None:
        return ()
    text = score.cpp_header().encode()
    path = data.cache_dir() / "cpu" / f"score-{hashlib.sha256(text).hexdigest()[:24]}.hpp"
    if not path.is_file() or path.read_bytes() != text:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        data.publish(path, text)
    return (f'-DSX_SCORE_HEADER="{path}"',)


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
    try:
        binary.parent.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise SparsecError(
            f"compiled kernels are kept in {binary.parent}, which cannot be made ({error.strerror}); "
            "remove what is in its place, or set SPARSEC_CACHE_DIR to another directory"
        ) from None
    with data.entry_lock(binary):
        if not _is_intact(binary):
            content = _compile(sources[0], flags)
            data.publish(_digest_path(binary), _digest(content))
            data.publish(binary, content)
    return binary


def compile_command(template: Template, dtype: str, device: Device) -> tuple[str, ...]:
    """The command that compiles a template's kernel, for a person to read; the output goes to the cache."""
    flags = (*_FLAGS, *isa_flags(device), f"-DSX_DTYPE={_DTYPE_NAMES[dtype]}")
    return (*compiler().command, *flags, str(template.kernel_path("cpu")))


def _digest_path(binary: Path) -> Path:
    return binary.with_suffix(".sha256")


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def _is_intact(binary: Path) -> bool:
    """Whether a cached binary is all there; one that is not is compiled again, never loaded."""
    try:
        content, expected = binary.read_bytes(), _digest_path(binary).read_bytes()
    except OSError:
        return False
    if _digest(content) == expected:
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
            f"{ctypes.sizeof(Arguments)}: templates/shared/arguments.hpp and backends/cpu_kernels.py disagree",
            source,
        )
    return library
