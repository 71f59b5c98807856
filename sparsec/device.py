"""What a device can do: `Device`, the facts of `devices.yaml`, and the processor and GPU at hand.

This file decides how a device is described, named and keyed, and what is assumed of one that tells little about itself.
It must not know what a kernel does with the facts, and it imports torch only when asked for the GPU at hand.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from sparsec import data
from sparsec.errors import BackendMissingError, SparsecError

if TYPE_CHECKING:
    import torch

Kind = Literal["cpu", "nvidia", "amd"]


@dataclass(frozen=True, slots=True)
class Device:
    """One processor as the planner sees it.

    Attributes:
        name: `cpu` or a name of `devices.yaml`.
        kind: Which family of back ends can serve it.
        label: The product's name; provenance only, nothing is decided by it.
        arch: `sm_90`, `gfx942`, `x86-64`, `aarch64`.
        features: CPU: instruction sets (`avx2`, `avx512_bf16`, `neon`, …). GPU: `mma`, `wgmma`, `tma`, `mfma`, ….
        units: Streaming multiprocessors, compute units, or cores this process may use.
        clock_hz: Boost clock; on a CPU the highest one the system admits to.
        l1_bytes: First-level data cache of one unit; on a GPU with the shared memory in it.
        l2_bytes: Of the whole GPU, or of one core.
        l3_bytes: Of the whole GPU, or the one a core shares with its neighbours; 0 where there is none.
        shared_bytes_per_block: The most a block may ask for; 0 on a CPU.
        registers_per_unit: 32-bit registers of an SM or CU; vector registers of a core.
        memory_bytes: Device memory, or what this process may use of the machine's.
        memory_bandwidth: Bytes read and written a second.
        vector_flops: fp32 FLOP/s of all units without matrix units.
        matrix_flops: Dense FLOP/s of all units by dtype (`fp32`, `fp16`, `bf16`), fp32 accumulation, no TF32.
        launch_us: Cost of one kernel launch, or of one parallel region.
        sources: Where the figures come from.
        factors: Measured over estimated time by name (`tiles_fp32`, `rows_bf16`, …), where it was calibrated.
        model: CPU: which design it is, by the vendor's own numbers (`amd-26-2`); "" where it does not tell, and on a
            GPU, whose architecture says it. Rates may differ twice between processors of one key: calibrations name it.
    """

    name: str
    kind: Kind
    label: str
    arch: str
    features: frozenset[str]
    units: int
    clock_hz: float
    l1_bytes: int
    l2_bytes: int
    l3_bytes: int
    shared_bytes_per_block: int
    registers_per_unit: int
    memory_bytes: int
    memory_bandwidth: float
    vector_flops: float
    matrix_flops: Mapping[str, float] = field(hash=False)
    launch_us: float
    sources: tuple[str, ...]
    factors: tuple[tuple[str, float], ...] = ()
    model: str = ""

    def factor(self, name: str) -> float:
        """What an estimate of that kind is to be multiplied by; 1 where it was not calibrated."""
        return dict(self.factors).get(name, 1.0)

    @property
    def key(self) -> str:
        """What the silicon is, for tuning records: `nvidia-sm_90-132sm-hbm141g`, `cpu-x86-64-avx512-bf16-2c`."""
        if self.kind == "cpu":
            return f"cpu-{self.arch}-{self.isa.replace('_', '-')}-{self.units}c"
        unit = "sm" if self.kind == "nvidia" else "cu"
        memory = "hbm" if "hbm" in self.features else "gddr"
        return f"{self.kind}-{self.arch}-{self.units}{unit}-{memory}{round(self.memory_bytes / 2**30)}g"

    @property
    def isa(self) -> str:
        """The highest instruction set of a CPU that is there in full, a name `$SPARSEC_ISA` takes; "" on a GPU."""
        complete = [name for name, needed in _ISA_LEVELS.get(self.arch, {}).items() if needed <= self.features]
        return complete[-1] if complete else ""

    def to_dict(self) -> dict[str, object]:
        """The facts, the key and the instruction set as plain JSON values."""
        facts: dict[str, object] = {"key": self.key, "isa": self.isa}
        for item in fields(self):
            facts[item.name] = getattr(self, item.name)
        return facts | {
            "features": sorted(self.features),
            "matrix_flops": dict(self.matrix_flops),
            "sources": list(self.sources),
            "factors": dict(self.factors),
        }


def family_of(key: str) -> str:
    """The part of a device key that devices of one architecture share: without how many units, and how much memory."""
    match = re.fullmatch(r"(cpu-.+)-\d+c|((?:nvidia|amd)-[^-]+)-.+", key)
    return (match[1] or match[2]) if match else key


def device(name: str) -> Device:
    """The device of that name: `cpu` is this machine's, the others are described in `devices.yaml`.

    Raises:
        SparsecError: There is no device of that name; the nearest names are in the message.
    """
    if name == "cpu":
        return detect_cpu()
    known = _described_devices()
    if name not in known:
        import difflib

        names = ["cpu", *known]
        near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.5)
        near = near or [other for other in names if name and name.lower() in other]
        hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(names)}"
        raise SparsecError(f"no device is called {name!r}; {hint}")
    return known[name]


def devices() -> list[Device]:
    """The processor at hand, then every device of `devices.yaml` in its order."""
    return [detect_cpu(), *_described_devices().values()]


# Rates further than this from what is known of the silicon are of a machine that was busy, or of another.
_CREDIBLE: Final = 3.0
_FACTORS: Final = re.compile(r"(tiles|rows)_(fp32|fp16|bf16)")


def calibrated(found: Device, values: Mapping[str, float]) -> Device:
    """A device with rates and factors that were measured on one; values that cannot be believed are left out."""

    def believed(name: str, known: float) -> float:
        value = values.get(name, known)
        return value if known / _CREDIBLE <= value <= known * _CREDIBLE else known

    matrix = {dtype: believed(f"{dtype}_flops", flops) for dtype, flops in found.matrix_flops.items()}
    vector_flops = believed("vector_flops", found.vector_flops)
    if found.kind == "cpu":
        # fp16 is widened to fp32 for its sums.
        matrix |= {"fp32": vector_flops, "fp16": vector_flops}
    factors = {name: value for name, value in values.items() if _FACTORS.fullmatch(name)}
    if not all(1 / _CREDIBLE <= value <= _CREDIBLE for value in factors.values()):
        factors = {}
    return replace(
        found,
        memory_bandwidth=believed("memory_bandwidth", found.memory_bandwidth),
        vector_flops=vector_flops,
        matrix_flops=matrix,
        launch_us=believed("launch_us", found.launch_us),
        sources=(*found.sources, "rates and factors measured by `sparsec tune --calibrate`"),
        factors=tuple(factors.items()),
    )


# What devices.yaml says.

_DESCRIPTION: Final = Path(__file__).with_name("devices.yaml")


@cache
def _described_devices() -> dict[str, Device]:
    return {name: _from_description(name, entry) for name, entry in data.read_yaml(_DESCRIPTION).items()}


# The entry is sparsec's own file, held to its shape by a test.
def _from_description(name: str, entry: Mapping[str, Any]) -> Device:
    return Device(
        name=name,
        kind=entry["kind"],
        label=entry["label"],
        arch=entry["arch"],
        features=frozenset(entry["features"]),
        units=entry["units"],
        clock_hz=entry["clock_mhz"] * 1e6,
        l1_bytes=entry["l1_kib"] * 2**10,
        l2_bytes=entry["l2_mib"] * 2**20,
        l3_bytes=entry["l3_mib"] * 2**20,
        shared_bytes_per_block=entry["shared_kib_per_block"] * 2**10,
        registers_per_unit=entry["registers_per_unit"],
        memory_bytes=entry["memory_gib"] * 2**30,
        memory_bandwidth=entry["memory_gb_per_s"] * 1e9,
        vector_flops=entry["vector_tflops"] * 1e12,
        matrix_flops={dtype: tflops * 1e12 for dtype, tflops in entry["matrix_tflops"].items()},
        launch_us=float(entry["launch_us"]),
        sources=tuple(entry["sources"]),
    )


@cache
def _stand_ins() -> dict[str, str]:
    """The name of the described device that stands for each architecture without an entry."""
    entries = data.read_yaml(_DESCRIPTION)
    return {arch: name for name, entry in entries.items() for arch in entry.get("stands_for", ())}


# The GPU at hand.


def detect_gpu(index: int | None = None) -> Device:
    """The GPU torch calls `cuda:<index>` (the current one by default), described by `devices.yaml` where it is there.

    Raises:
        BackendMissingError: torch is missing or sees no GPU.
        SparsecError: The GPU's architecture is not described, nor stood for.
    """
    try:
        import torch
    except ImportError as error:
        raise BackendMissingError(
            "the GPU at hand was asked for, and torch cannot be imported; install torch"
        ) from error
    if not torch.cuda.is_available():
        raise BackendMissingError(
            f"the GPU at hand was asked for, and torch {torch.__version__} sees none; "
            "check the driver, or install a torch built for it"
        )
    properties = torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index)
    return _match_gpu(properties, is_amd=torch.version.hip is not None)


def _match_gpu(properties: torch.cuda._CudaDeviceProperties, is_amd: bool) -> Device:
    """The described device with this architecture, unit count and memory, else one made of what the driver says."""
    arch = properties.gcnArchName.split(":")[0] if is_amd else f"sm_{properties.major}{properties.minor}"
    known = _described_devices()
    same_arch = [device for device in known.values() if device.arch == arch]
    for candidate in same_arch:
        # The driver keeps some memory to itself, and ECC on GDDR a sixteenth.
        has_its_memory = 0.88 < properties.total_memory / candidate.memory_bytes < 1.05
        if candidate.units == properties.multi_processor_count and has_its_memory:
            return candidate
    if not same_arch and arch in _stand_ins():
        same_arch = [known[_stand_ins()[arch]]]
    if not same_arch:
        raise SparsecError(
            f"the GPU {properties.name} has architecture {arch}, and sparsec describes "
            f"{', '.join(sorted({device.arch for device in known.values()} | set(_stand_ins())))}; "
            "add it to sparsec/devices.yaml"
        )
    return _scale_gpu(same_arch[0], arch, properties)


def _scale_gpu(kin: Device, arch: str, properties: torch.cuda._CudaDeviceProperties) -> Device:
    """A device with its own driver's facts, and what the driver does not say from `kin` by unit and clock."""

    # Which of these a torch release reports has changed over time.
    def reported(name: str, otherwise: float) -> float:
        return float(getattr(properties, name, 0) or otherwise)

    units = properties.multi_processor_count
    clock_hz = reported("clock_rate", kin.clock_hz / 1e3) * 1e3
    scale = units * clock_hz / (kin.units * kin.clock_hz)
    bus_bits = reported("memory_bus_width", 0)
    # Double data rate: two transfers a clock of the memory; kHz and bits.
    bandwidth = 2 * reported("memory_clock_rate", 0) * 1e3 * bus_bits / 8
    features = kin.features
    if bus_bits:
        features = features - {"hbm", "gddr"} | {"hbm" if bus_bits >= 1024 else "gddr"}
    return replace(
        kin,
        name=f"{kin.kind}-{arch}",
        label=properties.name,
        arch=arch,
        features=features,
        units=units,
        clock_hz=clock_hz,
        l2_bytes=int(reported("L2_cache_size", kin.l2_bytes)),
        shared_bytes_per_block=int(reported("shared_memory_per_block_optin", kin.shared_bytes_per_block)),
        registers_per_unit=int(reported("regs_per_multiprocessor", kin.registers_per_unit)),
        memory_bytes=properties.total_memory,
        memory_bandwidth=bandwidth or kin.memory_bandwidth * units / kin.units,
        vector_flops=kin.vector_flops * scale,
        matrix_flops={dtype: flops * scale for dtype, flops in kin.matrix_flops.items()},
        sources=("the driver, through torch", f"rates by unit and clock of {kin.name}"),
    )


# The processor at hand.

_AVX2: Final = frozenset({"sse2", "avx2", "fma", "f16c"})
_AVX512: Final = _AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}

# Instruction sets from low to high, and what each needs in full; `$SPARSEC_ISA` takes these names.
_ISA_LEVELS: Final[Mapping[str, Mapping[str, frozenset[str]]]] = {
    "x86-64": {
        "sse2": frozenset({"sse2"}),
        "avx2": _AVX2,
        "avx512": _AVX512,
        "avx512_bf16": _AVX512 | {"avx512_bf16"},
    },
    "aarch64": {
        "neon": frozenset({"neon"}),
        "neon_bf16": frozenset({"neon", "bf16"}),
    },
}

# Beyond the levels: used where a kernel asks for them by name, and dropped whenever `$SPARSEC_ISA` is set.
_EXTRA_FEATURES: Final = frozenset({"avx512_fp16", "amx_tile", "amx_bf16", "amx_fp16", "fp16", "sve", "sve2"})

# What Linux on Arm calls them in /proc/cpuinfo.
_ARM_FLAGS: Final = {"asimd": "neon", "asimdhp": "fp16"}

_VENDORS: Final = {"AuthenticAMD": "amd", "GenuineIntel": "intel"}

_ARCHES: Final = {"x86_64": "x86-64", "amd64": "x86-64", "aarch64": "aarch64", "arm64": "aarch64"}

# Every x86-64 and every aarch64 processor has these, whatever else cannot be read.
_BASELINE: Final = {"x86-64": frozenset({"sse2"}), "aarch64": frozenset({"neon"})}


def detect_cpu() -> Device:
    """The processor at hand: what this process may use of it, with `$SPARSEC_ISA` as the highest instruction set.

    Peaks are estimates, on the careful side, from clock, vector width and FMAs a clock; virtual machines do not show
    their boost clock.

    Raises:
        SparsecError: `$SPARSEC_ISA` names no instruction set of this processor.
    """
    return _read_cpu(Path("/"), platform.machine(), data.forced_isa(), _affinity())


def _affinity() -> frozenset[int]:
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


@cache
def _read_cpu(root: Path, machine: str, forced_isa: str | None, affinity: frozenset[int]) -> Device:
    """The processor that the `proc` and `sys` trees under `root` describe."""
    arch = _ARCHES.get(machine.lower())
    if arch is None:
        raise SparsecError(f"this processor is a {machine}; sparsec has kernels for {' and '.join(_BASELINE)}")
    info = _cpuinfo(root)
    features = _lower_features(arch, _cpu_features(arch, info), forced_isa)
    units = _usable_cores(root, affinity)
    clock_hz = _clock_hz(root, info)
    vector, bf16_dot = _flops_per_cycle(arch, features, info)
    caches = _cache_bytes(root)
    vector_flops = units * clock_hz * vector
    return Device(
        name="cpu",
        kind="cpu",
        label=info.get("model name") or platform.processor() or machine,
        arch=arch,
        features=features,
        units=units,
        clock_hz=clock_hz,
        l1_bytes=caches[1],
        l2_bytes=caches[2],
        l3_bytes=caches[3],
        shared_bytes_per_block=0,
        registers_per_unit=16 if arch == "x86-64" and "avx512f" not in features else 32,
        memory_bytes=_memory_bytes(root),
        memory_bandwidth=_bandwidth(units, info),
        vector_flops=vector_flops,
        # fp16 is widened to fp32 for its sums, and bf16 too where there are no dot units.
        matrix_flops={"fp32": vector_flops, "fp16": vector_flops, "bf16": units * clock_hz * max(vector, bf16_dot)},
        launch_us=5.0,
        sources=(f"{root / 'proc/cpuinfo'} and {root / 'sys/devices/system/cpu'}; rates estimated from them",),
        model=_model(info),
    )


def _cpuinfo(root: Path) -> dict[str, str]:
    """The fields of the first processor in /proc/cpuinfo, and the highest `cpu MHz` of them all."""
    info: dict[str, str] = {}
    for line in _read_lines(root / "proc/cpuinfo"):
        name, colon, value = (part.strip() for part in line.partition(":"))
        if not colon:
            continue
        if name == "cpu MHz" and float(value) > float(info.get(name, "0")):
            info[name] = value
        info.setdefault(name, value)
    return info


def _cpu_features(arch: str, info: Mapping[str, str]) -> frozenset[str]:
    flags = (info.get("flags") or info.get("Features") or "").split()
    known = _EXTRA_FEATURES.union(*_ISA_LEVELS[arch].values())
    return _BASELINE[arch] | known.intersection(_ARM_FLAGS.get(flag, flag) for flag in flags)


def _model(info: Mapping[str, str]) -> str:
    """Vendor, family and model of an x86-64 processor, implementer and part of an Arm one; "" where it does not say."""
    vendor = _VENDORS.get(info.get("vendor_id", ""), info.get("vendor_id", ""))
    named = (vendor, info.get("cpu family"), info.get("model"))
    if not all(named):
        named = ("arm", info.get("CPU implementer"), info.get("CPU part"))
    return "-".join(part for part in named if part) if all(named) else ""


def _lower_features(arch: str, features: frozenset[str], forced_isa: str | None) -> frozenset[str]:
    """`features` without those above the instruction set `forced_isa`."""
    if forced_isa is None:
        return features
    levels = _ISA_LEVELS[arch]
    available = [name for name, needed in levels.items() if needed <= features]
    if forced_isa not in available:
        raise SparsecError(
            f"{data.ISA_VARIABLE}={forced_isa!r} was asked for, and this {arch} processor has "
            f"{', '.join(available)}; set it to one of these, or leave it unset"
        )
    return levels[forced_isa]


def _usable_cores(root: Path, affinity: frozenset[int]) -> int:
    """Cores, not hardware threads, that the affinity and the control group leave to this process; at least 1."""
    siblings = {
        _read_text(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or str(cpu)
        for cpu in affinity
    }
    quota = min(_cgroup_cpu_quotas(root), default=float(len(siblings)))
    return max(1, min(len(siblings), int(quota)))


def _cgroup_cpu_quotas(root: Path) -> Iterator[float]:
    """How many processors each enclosing control group allows."""
    for directory in _cgroup_directories(root, "cpu"):
        limit = _read_text(directory / "cpu.max").split()
        if len(limit) == 2 and limit[0] != "max":
            yield int(limit[0]) / int(limit[1])
        quota = _read_text(directory / "cpu.cfs_quota_us")
        period = _read_text(directory / "cpu.cfs_period_us")
        if quota and period and int(quota) > 0:
            yield int(quota) / int(period)


def _cgroup_directories(root: Path, controller: str) -> Iterator[Path]:
    """This process's control group for `controller` and those around it, in the layouts of versions 2 and 1."""
    for line in _read_lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            mount = root / "sys/fs/cgroup" / controller
        else:
            continue
        inner = mount / path.strip().lstrip("/")
        yield from (directory for directory in (inner, *inner.parents) if directory.is_relative_to(mount))


def _clock_hz(root: Path, info: Mapping[str, str]) -> float:
    highest_khz = _read_text(root / "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq")
    if highest_khz:
        return int(highest_khz) * 1e3
    return float(info.get("cpu MHz", "2500")) * 1e6


def _flops_per_cycle(arch: str, features: frozenset[str], info: Mapping[str, str]) -> tuple[int, int]:
    """fp32 FLOP and bf16 dot FLOP one core does a clock; the second is 0 where there are no dot units.

    Source: https://uops.info/table.html (ports of VFMADD231PS and VDPBF16PS), Arm's software optimisation guides.
    """
    if arch == "aarch64":
        # Two 128-bit FMAs a clock: Neoverse N1 and N2. V1, V2 and Apple's cores have four.
        return 16, 32 if "bf16" in features else 0
    if "avx512f" not in features:
        # Two 256-bit FMAs; without AVX2, one 128-bit multiply and one add.
        return (32, 0) if {"avx2", "fma"} <= features else (8, 0)
    is_zen4 = info.get("vendor_id") == "AuthenticAMD" and int(info.get("cpu family", "0")) < 26
    is_intel_client = info.get("vendor_id") == "GenuineIntel" and "Xeon" not in info.get("model name", "")
    # Zen 4 pairs its two 256-bit FMA units into one 512-bit FMA a clock, measured: 117 GFLOP/s a core, bf16 dots 234.
    vector = 32 if is_zen4 or is_intel_client else 64
    return vector, 64 if "avx512_bf16" in features else 0


def _cache_bytes(root: Path) -> dict[int, int]:
    """Data cache of the first core by level (1, 2, 3)."""
    sizes = {1: 0, 2: 0, 3: 0}
    for index in sorted((root / "sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_read_text(index / name) for name in ("level", "type", "size"))
        if kind in ("Data", "Unified") and level in ("1", "2", "3"):
            sizes[int(level)] = _parse_size(size)
    # What nearly every server core of the last ten years has at least; the third level may be absent.
    return {1: sizes[1] or 32 * 2**10, 2: sizes[2] or 512 * 2**10, 3: sizes[3]}


def _parse_size(text: str) -> int:
    match = re.fullmatch(r"(\d+)([KMG]?)", text)
    return int(match[1]) * {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}[match[2]] if match else 0


def _memory_bytes(root: Path) -> int:
    """The machine's memory, or what the control group leaves of it."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for directory in _cgroup_directories(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _read_text(directory / name)
            if text.isdigit():
                limits.append(int(text))
    return min(limits)


def _bandwidth(units: int, info: Mapping[str, str]) -> float:
    """Bytes a second, read and written, that `units` cores move together.

    Measured on two Zen 4 server cores: 37 GB/s copied. With more cores the memory channels are the limit: eight of
    DDR4-3200 on a server, two on a desktop, of which about four fifths are reached.
    """
    is_server = units > 16 or re.search(r"EPYC|Xeon|Neoverse", info.get("model name", "")) is not None
    return min(units * 18.5e9, 160e9 if is_server else 40e9)


def _read_lines(path: Path) -> list[str]:
    return _read_text(path).splitlines()


def _read_text(path: Path) -> str:
    """The stripped text of a file of the kernel's; "" where the system has no such file or does not let it be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
