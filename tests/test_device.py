"""Devices: what is described, what is detected, and how the wrong name is met."""

import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest

from sparsec import data
from sparsec import device as dv
from sparsec.errors import BackendMissingError, SparsecError

GPUS = [device for device in dv.devices() if device.kind != "cpu"]
ZEN4_FLAGS = "sse2 avx2 fma f16c avx512f avx512bw avx512vl avx512dq avx512_bf16 avx512_vnni"


@pytest.fixture(autouse=True)
def no_forced_isa(monkeypatch):
    monkeypatch.delenv(data.ISA_VARIABLE, raising=False)


def test_the_promised_devices_are_there():
    names = ["a100", "h100", "h100-pcie", "h200", "b200", "l40s", "rtx4090"]
    assert [device.name for device in dv.devices()] == [
        "cpu",
        *(f"nvidia-{name}" for name in names),
        "amd-mi250x",
        "amd-mi300x",
    ]


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_facts_hang_together(gpu):
    assert gpu.kind in ("nvidia", "amd")
    assert gpu.name.startswith(gpu.kind)
    assert gpu.arch.startswith("sm_" if gpu.kind == "nvidia" else "gfx")
    assert len(gpu.sources) >= 2
    assert set(gpu.matrix_flops) == {"fp32", "fp16", "bf16"}
    # 64 lanes (A100, CDNA) or 128 lanes of one FMA a clock; CDNA 3 issues two.
    lanes = gpu.vector_flops / gpu.units / gpu.clock_hz / 2
    assert min(abs(lanes / expected - 1) for expected in (64, 128)) < 0.02
    assert gpu.matrix_flops["bf16"] >= 2 * gpu.vector_flops
    assert gpu.l1_bytes >= gpu.shared_bytes_per_block >= 64 * 2**10
    assert 1e11 < gpu.memory_bandwidth < 1e13
    assert 2**34 < gpu.memory_bytes < 2**38


def test_keys_say_what_the_silicon_is():
    keys = {device.name: device.key for device in GPUS}
    assert keys["nvidia-h200"] == "nvidia-sm_90-132sm-hbm141g"
    assert keys["nvidia-rtx4090"] == "nvidia-sm_89-128sm-gddr24g"
    assert keys["amd-mi300x"] == "amd-gfx942-304cu-hbm192g"
    assert len(set(keys.values())) == len(keys)


def test_a_device_travels():
    for device in dv.devices():
        assert pickle.loads(pickle.dumps(device)) == device
        assert hash(device) == hash(pickle.loads(pickle.dumps(device)))
        assert json.loads(json.dumps(device.to_dict()))["key"] == device.key


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("nvidia-h1000", "did you mean nvidia-h100"),
        ("H100", "did you mean nvidia-h100"),
        ("mi300x", "amd-mi300x"),
        ("toaster", "known are cpu, nvidia-a100"),
        ("", "known are cpu"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(name, hint):
    with pytest.raises(SparsecError, match=hint):
        dv.device(name)


# The processor at hand: a made-up machine is a `proc` and a `sys` tree below a folder.


def _machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def _zen4(root: Path, extra: dict[str, str] | None = None) -> Path:
    cpuinfo = "".join(
        f"processor\t: {cpu}\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\n"
        f"model name\t: AMD EPYC 9654\n"
        f"cpu MHz\t\t: {2400 + cpu}.0\nflags\t\t: {ZEN4_FLAGS}\n\n"
        for cpu in range(8)
    )
    files = {"proc/cpuinfo": cpuinfo}
    for index, (level, kind, size) in enumerate(
        [(1, "Data", "32K"), (1, "Instruction", "32K"), (2, "Unified", "1024K"), (3, "Unified", "32M")]
    ):
        folder = f"sys/devices/system/cpu/cpu0/cache/index{index}"
        files |= {f"{folder}/level": f"{level}\n", f"{folder}/type": f"{kind}\n", f"{folder}/size": f"{size}\n"}
    for cpu in range(8):
        files[f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"] = f"{cpu % 4},{cpu % 4 + 4}\n"
    return _machine(root, files | (extra or {}))


def _read(root: Path, cpus: int = 8, isa: str | None = None, machine: str = "x86_64") -> dv.Device:
    return dv._read_cpu(root, machine, isa, frozenset(range(cpus)))


def test_this_machine_is_detected():
    cpu = dv.detect_cpu()
    assert cpu == dv.device("cpu")
    assert cpu.units >= 1
    assert cpu.isa
    assert cpu.l1_bytes >= 2**13
    assert cpu.memory_bytes > 2**28
    assert cpu.matrix_flops["bf16"] >= cpu.matrix_flops["fp32"] == cpu.vector_flops > 1e9


def test_a_zen4_server_is_read(tmp_path):
    cpu = _read(_zen4(tmp_path))
    assert cpu.key == "cpu-x86-64-avx512-bf16-4c"
    assert (cpu.label, cpu.model) == ("AMD EPYC 9654", "amd-25-17")
    assert cpu.units == 4
    assert cpu.clock_hz == 2407e6
    assert (cpu.l1_bytes, cpu.l2_bytes, cpu.l3_bytes) == (2**15, 2**20, 2**25)
    assert cpu.vector_flops == 4 * 2407e6 * 32
    assert cpu.matrix_flops["bf16"] == 4 * 2407e6 * 64
    assert cpu.matrix_flops["fp16"] == cpu.vector_flops
    assert cpu.registers_per_unit == 32


@pytest.mark.parametrize(
    ("isa", "lanes_flops", "bf16_flops", "registers"),
    [("sse2", 8, 8, 16), ("avx2", 32, 32, 16), ("avx512", 32, 32, 32), ("avx512_bf16", 32, 64, 32)],
)
def test_a_forced_instruction_set_lowers_the_rest(tmp_path, isa, lanes_flops, bf16_flops, registers):
    cpu = _read(_zen4(tmp_path), isa=isa)
    assert cpu.isa == isa
    assert cpu.vector_flops == 4 * 2407e6 * lanes_flops
    assert cpu.matrix_flops["bf16"] == 4 * 2407e6 * bf16_flops
    assert cpu.registers_per_unit == registers


def test_an_instruction_set_the_machine_lacks_is_refused(tmp_path, monkeypatch):
    root = _machine(tmp_path, {"proc/cpuinfo": "flags\t: sse2 avx2 fma f16c\n"})
    with pytest.raises(SparsecError, match=r"SPARSEC_ISA='avx512'.*has sse2, avx2;"):
        _read(root, isa="avx512")
    monkeypatch.setenv(data.ISA_VARIABLE, "mmx")
    with pytest.raises(SparsecError, match="SPARSEC_ISA='mmx'"):
        dv.detect_cpu()


def test_half_an_instruction_set_is_none(tmp_path):
    root = _machine(tmp_path, {"proc/cpuinfo": "flags\t: sse2 avx2 fma f16c avx512f\n"})
    assert _read(root).isa == "avx2"


@pytest.mark.parametrize(
    ("files", "units"),
    [
        ({"proc/self/cgroup": "0::/job\n", "sys/fs/cgroup/job/cpu.max": "max 100000\n"}, 4),
        ({"proc/self/cgroup": "0::/job\n", "sys/fs/cgroup/job/cpu.max": "250000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "50000 100000\n"}, 1),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/job\n",
                "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "300000",
                "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            3,
        ),
    ],
    ids=["unlimited", "v2", "v2-parent", "v1"],
)
def test_control_groups_limit_the_cores(tmp_path, files, units):
    assert _read(_zen4(tmp_path, files)).units == units


def test_affinity_limits_the_cores(tmp_path):
    # Processors 0 to 2 are three cores; 0 and 4 would be one.
    assert _read(_zen4(tmp_path), cpus=3).units == 3
    assert dv._read_cpu(tmp_path, "x86_64", None, frozenset({0, 4})).units == 1


def test_control_groups_limit_the_memory(tmp_path):
    files = {"proc/self/cgroup": "0::/job\n", "sys/fs/cgroup/job/memory.max": f"{2**28}\n"}
    assert _read(_zen4(tmp_path, files)).memory_bytes == 2**28


def test_an_arm_server_is_read(tmp_path):
    root = _machine(
        tmp_path,
        {"proc/cpuinfo": "Features\t: fp asimd asimdhp bf16 sve\nCPU implementer\t: 0x41\nCPU part\t: 0xd49\n"},
    )
    cpu = _read(root, cpus=64, machine="aarch64")
    assert cpu.model == "arm-0x41-0xd49"
    assert cpu.features == {"neon", "fp16", "bf16", "sve"}
    assert cpu.key == "cpu-aarch64-neon-bf16-64c"
    assert _read(root, isa="neon", machine="arm64").features == {"neon"}


def test_a_machine_that_tells_nothing_still_has_a_description(tmp_path):
    cpu = _read(tmp_path, cpus=2)
    assert cpu.features == {"sse2"}
    assert cpu.model == ""
    assert cpu.units == 2
    assert (cpu.l1_bytes, cpu.l2_bytes, cpu.l3_bytes) == (2**15, 2**19, 0)
    assert _read(tmp_path, machine="arm64").isa == "neon"


def test_an_unknown_processor_is_refused(tmp_path):
    with pytest.raises(SparsecError, match="is a riscv64"):
        _read(tmp_path, machine="riscv64")


# The GPU at hand: what torch would say of one.


def _gpu(**facts: object) -> SimpleNamespace:
    return SimpleNamespace(**{"name": "a GPU", "major": 9, "minor": 0} | facts)


def test_a_described_gpu_is_recognised_whatever_it_is_called():
    h200 = _gpu(multi_processor_count=132, total_memory=143156 * 2**20)
    assert dv._match_gpu(h200, is_amd=False) == dv.device("nvidia-h200")
    h100 = _gpu(multi_processor_count=132, total_memory=81079 * 2**20)
    assert dv._match_gpu(h100, is_amd=False) == dv.device("nvidia-h100")
    l40s = _gpu(major=8, minor=9, multi_processor_count=142, total_memory=45500 * 2**20)
    assert dv._match_gpu(l40s, is_amd=False) == dv.device("nvidia-l40s")
    gcd = _gpu(gcnArchName="gfx90a:sramecc+:xnack-", multi_processor_count=110, total_memory=65520 * 2**20)
    assert dv._match_gpu(gcd, is_amd=True) == dv.device("amd-mi250x")


def test_another_gpu_is_described_by_its_driver():
    rtx3090 = _gpu(
        name="NVIDIA GeForce RTX 3090",
        major=8,
        minor=6,
        multi_processor_count=82,
        total_memory=24 * 2**30,
        clock_rate=1695000,
        memory_clock_rate=9751000,
        memory_bus_width=384,
        L2_cache_size=6 * 2**20,
        shared_memory_per_block_optin=101376,
    )
    device = dv._match_gpu(rtx3090, is_amd=False)
    assert device.key == "nvidia-sm_86-82sm-gddr24g"
    assert device.vector_flops == pytest.approx(35.6e12, rel=0.01)
    assert device.matrix_flops["fp16"] == pytest.approx(71e12, rel=0.01)
    assert device.memory_bandwidth == pytest.approx(936e9, rel=0.01)
    assert device.l2_bytes == 6 * 2**20
    assert dv._match_gpu(rtx3090, is_amd=False).name == "nvidia-sm_86"


def test_part_of_a_gpu_has_part_of_its_rates():
    h200 = dv.device("nvidia-h200")
    half = dv._match_gpu(_gpu(multi_processor_count=60, total_memory=70 * 2**30), is_amd=False)
    assert half.key == "nvidia-sm_90-60sm-hbm70g"
    assert half.matrix_flops["bf16"] == pytest.approx(dv.device("nvidia-h100").matrix_flops["bf16"] * 60 / 132)
    assert half.memory_bandwidth < h200.memory_bandwidth


def test_an_architecture_nobody_described_is_refused():
    with pytest.raises(SparsecError, match=r"architecture sm_30.*devices\.yaml"):
        dv._match_gpu(_gpu(major=3, multi_processor_count=8, total_memory=2**32), is_amd=False)


def test_no_gpu_is_a_clear_error(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendMissingError, match="sees none"):
        dv.detect_gpu()


@pytest.mark.gpu
def test_the_gpu_at_hand_is_detected():
    if not pytest.importorskip("torch").cuda.is_available():
        pytest.skip("no GPU here")
    gpu = dv.detect_gpu()
    assert gpu.kind in ("nvidia", "amd")
    assert gpu.units > 0
