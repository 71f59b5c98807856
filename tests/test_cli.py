"""The command line: what it prints, where, how it ends, and how it meets mistakes.

`python tests/test_cli.py` writes the golden files anew.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
import scipy.sparse
from click.testing import CliRunner

import sparsec as sparsec_package
from sparsec import masks as m
from sparsec.cli import entry
from sparsec.cli.entry import run, sparsec
from sparsec.device import Device
from sparsec.records import base

# The package's own name for it is the function.
_DEVICE_MODULE = sys.modules["sparsec.device"]

GOLDEN = Path(__file__).parent / "golden" / "explain"
SCHEMA = Path(sparsec_package.__file__).parent / "report" / "SCHEMA.md"

# A processor of fixed abilities, so that plans do not depend on the machine.
PROCESSOR = Device(
    name="cpu",
    kind="cpu",
    label="two cores for tests",
    arch="x86-64",
    features=frozenset({"sse2", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"}),
    units=2,
    clock_hz=3.7e9,
    l1_bytes=32 * 2**10,
    l2_bytes=2**20,
    l3_bytes=32 * 2**20,
    shared_bytes_per_block=0,
    registers_per_unit=32,
    memory_bytes=16 * 2**30,
    memory_bandwidth=37e9,
    vector_flops=236e9,
    matrix_flops={"fp32": 236e9, "fp16": 236e9, "bf16": 472e9},
    launch_us=5.0,
    sources=("tests/test_cli.py",),
)

EXPLAINED = {
    "window": "window(255, 0) --seq-len 16384 --heads 4",
    "bigbird": "bigbird(64, 3, 2, 3, 0) --seq-len 4096 --heads 12 --dtype bf16",
    "dilated": "dilated(512, 8) --seq-len 8192 --heads 8 --kv-heads 2",
    "scattered": "random_edges(20, 0) --seq-len 4096 --heads 8 --head-dim 128 --v-dim 64",
    "dense": "full() --seq-len 1024 --kv-len 2048",
    "per-head": "per_head([causal(), window(64, 64), causal()]) --seq-len 1000",
    "not-reordered": "dilated(512, 8) --seq-len 8192 --reorder off",
    "h100": "window(255, 0) | global_tokens(16) --seq-len 64k --heads 8 --dtype bf16 --device nvidia-h100",
    "h100-graph": "random_edges(32, 1) --seq-len 16k --head-dim 128 --dtype fp16 --device nvidia-h100",
    "heavy-rows": "window(127, 0) | global_tokens([77, 4000]) --seq-len 8192",
}
EXPLAINED_NARROWLY = [
    ("explain", "window(9, 9)", "--seq-len", "256"),
    ("explain", "window(9, 9)", "--at", "64,256"),
    ("explain", "window(9, 9)", "--seq-len", "256", "--compare", "causal()"),
]
# Several plans side by side.
COMPARED = {
    "at-lengths": "window(127, 0) | global_tokens(4) --at 256,1k,16k --heads 4",
    "beside": "window(64, 64) --seq-len 4096 --compare dilated(512, 8)",
}


@pytest.fixture
def fixed_processor(monkeypatch):
    monkeypatch.setattr(_DEVICE_MODULE, "detect_cpu", lambda: PROCESSOR)


def invoke(*arguments: str):
    return CliRunner().invoke(sparsec, list(arguments), catch_exceptions=False)


def process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "sparsec.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=os.environ | {"PYTHONUTF8": "1"} | environment,
    )


def explained(command: str) -> str:
    mask, *options = command.split(" --")
    words = [word for option in options for word in f"--{option}".split(" ", 1)]
    result = invoke("explain", mask, *words)
    assert result.exit_code == 0, result.output
    return re.sub(r"planned in .*", "planned in (some time)", result.stdout)


# What explain says.


@pytest.mark.parametrize("name", [*EXPLAINED, *COMPARED])
def test_explain_says_what_it_said(name, fixed_processor):
    assert explained((EXPLAINED | COMPARED)[name]) == (GOLDEN / f"{name}.txt").read_text()


@pytest.mark.parametrize("name", EXPLAINED)
def test_explain_says_in_json_what_it_said(name, fixed_processor):
    assert json.loads(in_json(EXPLAINED[name])) == json.loads((GOLDEN / f"{name}.json").read_text())


@pytest.mark.parametrize("name", EXPLAINED)
def test_every_key_of_the_json_is_documented(name, fixed_processor):
    documented = set(re.findall(r"^\| `([^`]+)`", SCHEMA.read_text(), re.MULTILINE))
    found = set(keys_of(json.loads(in_json(EXPLAINED[name]))))
    assert found <= documented
    if name == "dilated":
        others = ("source", "devices", "lengths", "masks", "error", "groups[].backward.")
        optional = {key for key in documented if key.startswith(others)}
        assert documented - found - optional <= {"crossover_tokens"}


def keys_of(value, prefix=""):
    """`groups[].steps[].template` for every key of a document; what a configuration holds is the template's."""
    for name, item in value.items():
        path = f"{prefix}{name}"
        yield path
        inner = item if isinstance(item, list) else [item]
        mark = "[]" if isinstance(item, list) else ""
        for each in inner:
            if isinstance(each, dict) and name != "config":
                yield from keys_of(each, f"{path}{mark}.")


def in_json(command):
    mask, *options = command.split(" --")
    result = invoke("explain", mask, *(word for option in options for word in f"--{option}".split(" ", 1)), "--json")
    assert result.exit_code == 0, result.output
    return re.sub(r'"planning_us": [\d.]+', '"planning_us": 0', result.stdout)


@pytest.mark.parametrize("name", EXPLAINED)
def test_explain_in_json_says_the_same(name, fixed_processor):
    mask, *options = EXPLAINED[name].split(" --")
    result = invoke("explain", mask, *(word for option in options for word in f"--{option}".split(" ")), "--json")
    assert result.exit_code == 0
    assert result.stderr == ""
    document = json.loads(result.stdout)
    text = (GOLDEN / f"{name}.txt").read_text()
    for group in document["groups"]:
        assert f"{group['profile']['nnz']:,}" in text
        for step in group["steps"]:
            assert f"{step['template']} on {step['backend']}" in text


def test_explain_shows_the_sources_and_how_they_are_compiled(fixed_processor):
    result = invoke("explain", "window(9, 9)", "--seq-len", "256", "--template", "row_traversal", "--source")
    assert result.exit_code == 0
    assert "1. row_traversal on cpu: kernel_cpu.cpp" in result.stdout
    assert 'extern "C" void forward' in result.stdout
    assert re.search(r"compiled by\n\n.*-DSX_DTYPE=float .*kernel_cpu\.cpp", result.stdout)
    document = json.loads(
        invoke("explain", "full()", "--seq-len", "64", "--backend", "cpu", "--source", "--json").stdout
    )
    assert any(name.startswith("1. ") for name in document["source"])


def test_explain_reads_masks_from_files(tmp_path, fixed_processor):
    dense = np.tril(np.ones((50, 50), bool), -3)
    scipy.sparse.save_npz(tmp_path / "graph.npz", scipy.sparse.csr_array(dense))
    np.save(tmp_path / "dense.npy", dense)
    (tmp_path / "mask.yaml").write_text('mask: "window(3, 1)"\nq_len: 50\n')
    for name in ("graph.npz", "dense.npy"):
        result = invoke("explain", str(tmp_path / name))
        assert result.exit_code == 0
        assert "50 queries × 50 keys" in result.stdout
    assert invoke("explain", str(tmp_path / "mask.yaml"), "--seq-len", "50").exit_code == 0


def test_explain_takes_heads_and_batch_from_the_mask(fixed_processor):
    result = invoke("explain", "per_batch([prefix(3), full()])", "--seq-len", "64", "--json")
    assert json.loads(result.stdout)["problem"]["batch"] == 2


_WITHOUT_TORCH = """
import sys
for name in ("torch", "triton", "cuda", "optuna"):
    sys.modules[name] = None
from sparsec.cli.entry import run
code = run(["explain", "window(255, 0)", "--seq-len", "4096", "--device", "nvidia-h100", *sys.argv[1:]])
print(code, file=sys.stderr)
"""


@pytest.mark.parametrize("options", [(), ("--json",)], ids=["text", "json"])
def test_explain_for_a_gpu_needs_no_torch(options):
    result = subprocess.run(
        [sys.executable, "-P", "-c", _WITHOUT_TORCH, *options], capture_output=True, text=True, check=True, timeout=120
    )
    assert "Traceback" not in result.stderr
    code = int(result.stderr.split()[-1])
    assert code in (0, 1)
    if options:
        document = json.loads(result.stdout)
        assert document["device"]["name"] == "nvidia-h100"
        assert code == 0 or document["refusals"]
    elif code == 1:
        assert "row_traversal on cpu: " in result.stderr


def test_explain_sets_every_device_beside_the_others(fixed_processor):
    command = ("explain", "window(255, 0)", "--seq-len", "4096", "--device", "all")
    text = invoke(*command).stdout
    document = json.loads(invoke(*command, "--json").stdout)
    names = [each["device"]["name"] for each in document["devices"]]
    assert names[0] == "cpu"
    assert {"nvidia-h100", "amd-mi300x"} <= set(names)
    assert all(name in text for name in names)
    estimates = re.findall(r"^ [\w-]+ +([\d.]+ \S?s) ", text, re.MULTILINE)
    scale = {"µs": 1.0, "ms": 1e3, "s": 1e6}
    times = [float(figure) * scale[unit] for figure, unit in map(str.split, estimates)]
    assert times == sorted(times)
    served = [each for each in document["devices"] if "estimate" in each]
    assert len(times) == len(served)
    # Below the table, each device's ceiling and what keeps its plan from it.
    words = " ".join(text.split())
    for each in served:
        said = re.search(rf"{each['device']['name']}: at best ([\d.]+ .s), .*? Of its time are (.*?)\.(?: |$)", words)
        assert said is not None
        lost = [part["name"] for part in each["spending"] if part["name"] != "useful arithmetic"]
        assert [word.split("% ")[1] for word in said[2].split(", ")] == lost[:3]


def test_explain_at_lengths_is_explain_of_each(fixed_processor):
    document = json.loads(invoke("explain", "window(127, 0)", "--at", "1k,4096", "--json").stdout)
    assert [each["problem"]["q_len"] for each in document["lengths"]] == [1024, 4096]
    alone = json.loads(invoke("explain", "window(127, 0)", "--seq-len", "4096", "--json").stdout)
    last = document["lengths"][1]
    assert last["dense_us"] > last["estimate"]["us"]
    assert {key: value for key, value in last.items() if key != "planning_us"} == {
        key: value for key, value in alone.items() if key != "planning_us"
    }


def test_a_refusal_is_told_in_both_forms(fixed_processor):
    command = ("explain", "causal()", "--seq-len", "64", "--template", "dense", "--backend", "cpu")
    result = invoke(*command)
    assert result.exit_code == 1
    assert "dense on cpu: " in result.stderr
    assert result.stdout == ""
    refused = invoke(*command, "--json")
    assert refused.exit_code == 1
    assert json.loads(refused.stdout)["refusals"][0]["what"] == "dense on cpu"


# Mistakes.

MISUSED = {
    "no mask of that name": (("explain", "windwo(3, 1)", "--seq-len", "9"), "did you mean window"),
    "no expression": (("explain", "window(3,", "--seq-len", "9"), "cannot read the mask"),
    "no mask at all": (("explain", "3", "--seq-len", "9"), "no mask"),
    "wrong arguments": (("explain", "window(1.5, 1)", "--seq-len", "9"), "window"),
    "no length": (("explain", "window(3, 1)"), "--seq-len"),
    "keys without queries": (("explain", "window(3, 1)", "--kv-len", "9"), "--seq-len"),
    "another length": (("explain", "documents([3, 4])", "--seq-len", "9"), "7"),
    "no length above 0": (("explain", "full()", "--seq-len", "0"), "--seq-len"),
    "no such file": (("explain", "nothing.npz"), "there is no such file"),
    "no such device": (("explain", "full()", "--seq-len", "9", "--device", "nvidia-h10"), "nvidia-h100"),
    "no such template": (("explain", "full()", "--seq-len", "9", "--template", "blocksparse"), "block_sparse"),
    "no such back end": (("explain", "full()", "--seq-len", "9", "--backend", "cpus"), "did you mean cpu"),
    "no length in words": (("explain", "full()", "--seq-len", "4q"), "16k or 1m"),
    "no such dtype": (("explain", "full()", "--seq-len", "9", "--dtype", "fp64"), "bf16"),
    "heads that do not divide": (("explain", "full()", "--seq-len", "9", "--heads", "3", "--kv-heads", "2"), "heads"),
    "heads the mask has not": (("explain", "per_head([full(), full()])", "--seq-len", "9", "--heads", "4"), "2 heads"),
    "no length to plan at": (("explain", "full()", "--at", "4k,4q"), "4q"),
    "lengths and a length": (("explain", "full()", "--at", "4k", "--seq-len", "9"), "--at"),
    "two comparisons": (("explain", "full()", "--at", "4k", "--device", "all"), "go together"),
    "a picture of two": (("explain", "full()", "--seq-len", "9", "--compare", "causal()", "--png", "x.png"), "--png"),
    "no such command": (("explian",), "did you mean explain"),
    "no such option": (("explain", "full()", "--seqlen", "9"), "--seq-len"),
    "a length for all masks": (("masks", "--seq-len", "9"), "goes with a mask"),
    "no mask to draw": (("masks", "windwo"), "window"),
}


@pytest.mark.parametrize("name", MISUSED)
def test_a_mistake_is_met_with_a_message(name, capsys):
    arguments, expected = MISUSED[name]
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert expected in captured.err
    assert "Traceback" not in captured.err


def test_a_damaged_file_is_met_with_a_message(tmp_path, capsys):
    scipy.sparse.save_npz(tmp_path / "whole.npz", scipy.sparse.eye_array(500, format="csr"))
    damaged = tmp_path / "damaged.npz"
    damaged.write_bytes((tmp_path / "whole.npz").read_bytes()[:-200])
    assert run(["explain", str(damaged)]) == 2
    assert "damaged" in capsys.readouterr().err


def test_a_length_beyond_memory_is_met_with_a_message(capsys):
    assert run(["explain", "random_edges(3, 0)", "--seq-len", str(10**15)]) in (1, 2)
    assert "Traceback" not in capsys.readouterr().err


def test_a_mistake_leaves_no_traceback_in_a_process():
    result = process("explain", "window(3, 1) |", "--seq-len", "9")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Error: cannot read the mask")


# How it ends.


def test_an_interrupt_is_quiet(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(click.Group, "invoke", interrupt)
    assert run(["masks"]) == entry.INTERRUPTED == 130
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


@pytest.mark.parametrize(
    "arguments",
    [["masks"], ["devices", "--json"], ["--help"], ["devices"], ["explain", "causal()", "--seq-len", "64"]],
    ids=" ".join,
)
def test_a_closed_pipe_is_quiet(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        result = subprocess.run(
            [sys.executable, "-P", "-m", "sparsec.cli", *arguments],
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=120,
        )
    finally:
        os.close(writer)
    assert result.stderr == ""
    assert result.returncode == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_said():
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-P", "-m", "sparsec.cli", "devices"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=120,
        )
    assert result.returncode == 1
    assert "No space left on device" in result.stderr
    assert "Traceback" not in result.stderr


def test_output_is_plain_when_piped():
    for arguments in (("masks",), ("devices",), ("devices", "--verbose"), ("explain", "causal()", "--seq-len", "64")):
        result = process(*arguments, TERM="xterm-256color")
        assert result.returncode == 0
        assert result.stderr == ""
        assert "\x1b" not in result.stdout
        assert not any(line != line.rstrip(" ") for line in result.stdout.splitlines())


def test_a_terminal_without_unicode_still_gets_an_answer():
    result = process("masks", "causal", PYTHONUTF8="0", PYTHONIOENCODING="ascii", LC_ALL="C")
    assert result.returncode == 0
    assert "136 edges" in result.stdout or "2,080 edges" in result.stdout


def test_help_is_quick_to_say():
    statement = (
        "import sys; from sparsec.cli.entry import run; code = run(['--help']); "
        "print(code, [name for name in ('torch', 'scipy', 'rich', 'networkx', 'yaml') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-P", "-c", statement], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "0 []"


@pytest.mark.parametrize("command", ["", *sparsec.commands])
def test_every_command_has_help(command):
    result = invoke(*filter(None, [command]), "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith("Usage: ")
    assert max(map(len, result.stdout.splitlines())) <= 100


def test_the_version_is_told():
    assert re.fullmatch(r"sparsec \d+\.\d+\.\d+\n", process("--version").stdout)


# masks, devices, doctor.


def test_masks_shows_every_constructor():
    result = invoke("masks")
    assert result.exit_code == 0
    for name in m.CONSTRUCTORS:
        assert name in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


@pytest.mark.parametrize("name", m.CONSTRUCTORS)
def test_masks_shows_each_one_larger(name):
    result = invoke("masks", name)
    assert result.exit_code == 0
    assert result.stdout.startswith(f"{name}: ")
    assert ("nnz" in result.stdout) == bool(m.CONSTRUCTORS[name].example)


def test_masks_counts_what_it_draws():
    result = invoke("masks", "window(3, 1) | global_tokens(2)", "--seq-len", "5000")
    bound = (m.window(3, 1) | m.global_tokens(2)).bind(5000)
    assert result.exit_code == 0
    assert f"{bound.nnz:,} edges" in result.stdout
    assert "a dot is 128 × 128 pairs" in result.stdout


@pytest.mark.parametrize("columns", ["40", "80", "200"])
@pytest.mark.parametrize(
    "arguments", [("masks",), ("masks", "bigbird"), ("devices",), ("devices", "--verbose"), *EXPLAINED_NARROWLY]
)
def test_a_narrow_terminal_survives(arguments, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    assert invoke(*arguments).exit_code == 0


def test_devices_are_listed():
    document = json.loads(invoke("devices", "--json").stdout)
    names = [device["name"] for device in document]
    assert names[0] == "cpu"
    assert {"nvidia-h100", "amd-mi300x"} <= set(names)
    text = invoke("devices", "--verbose").stdout
    assert all(device["key"] in text.replace("\n", "") for device in document)
    assert all(name in invoke("devices").stdout for name in names)


def test_doctor_finds_nothing_broken_here(tmp_path):
    # A process of its own: what this one has checked already is remembered in memory too.
    result = process("doctor", "--json", SPARSEC_CACHE_DIR=str(tmp_path / "cache"))
    assert result.returncode == 0, result.stderr
    findings = {finding["name"]: finding for finding in json.loads(result.stdout)}
    for name in ("Python", "torch", "numpy", "scipy", "networkx", "optuna", "C++", "vectors", "directory"):
        assert findings[name]["state"] == "ok", findings[name]
    assert findings["block_sparse on cpu, bf16"]["found"] == "not checked yet"
    assert "0700" in findings["directory"]["found"]
    assert invoke("doctor").exit_code == 0


def test_doctor_says_what_to_do(tmp_path):
    open_to_all = tmp_path / "cache"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    result = process("doctor", SPARSEC_CACHE_DIR=str(open_to_all), CXX="no-such-compiler")
    assert result.returncode == 1
    assert "✗ C++: install g++ or clang++, or set CXX" in result.stdout
    assert "chmod 700" in result.stdout
    assert "Traceback" not in result.stderr


# The demo's parts; running it takes minutes.


@pytest.fixture(scope="module")
def small_graph():
    from sparsec.cli.demo_cases import Case, tensors

    mask = m.random_edges(5, 1) | m.window(0, 0) | m.global_tokens([3])
    case = Case("small", "", mask, 150, 2, ("fp32",), is_graph=True)
    return case, tensors(case, "fp32")


def test_every_peer_of_the_demo_is_right(small_graph):
    from sparsec.cli.demo_cases import Absent, peers
    from sparsec.cli.demo_measure import Oracle

    case, given = small_graph
    bound = case.mask.bind(case.seq_len)
    for some in (case, case._replace(is_graph=False)):
        found = list(peers(some, bound, "fp32", given, memory_bytes=2**30))
        assert not any(isinstance(peer, Absent) for peer in found)
        for peer in found:
            oracle = Oracle(given, peer.bound, "fp32", whole_heads=1)
            oracle.prepare(lambda: None)
            error = oracle.compare(peer.prepare()())
            assert error.is_exact, (peer.name, error)
            assert error.rows == 150 + 64


def test_the_demo_leaves_out_what_does_not_fit(small_graph):
    from sparsec.cli.demo_cases import Absent, peers

    case, given = small_graph
    first, *_ = peers(case, case.mask.bind(case.seq_len), "fp32", given, memory_bytes=1000)
    assert isinstance(first, Absent)
    assert "110 KiB" in first.reason


@pytest.mark.parametrize("wrong", [1e-3, float("nan")])
def test_the_demo_sees_a_wrong_answer(small_graph, wrong):
    from sparsec.cli.demo_cases import peers
    from sparsec.cli.demo_measure import Oracle

    case, given = small_graph
    bound = case.mask.bind(case.seq_len)
    oracle = Oracle(given, bound, "fp32", whole_heads=0)
    oracle.prepare(lambda: None)
    answer = next(iter(peers(case, bound, "fp32", given, memory_bytes=2**30))).prepare()()
    assert oracle.compare(answer).is_exact
    answer[0, 1, 3, 7] += wrong  # the row of most keys is always compared
    assert not oracle.compare(answer).is_exact


def test_the_demo_runs_what_is_slow_less_often():
    from sparsec.cli.demo_measure import timings

    counts = dict.fromkeys(("quick", "medium", "slow", "very slow"), 0)

    def counted(name):
        def run():
            counts[name] += 1

        return run

    first = {"quick": 0.01, "medium": 0.5, "slow": 2.0, "very slow": 9.0}
    times = timings({name: counted(name) for name in counts}, first, 3, lambda: None)
    assert counts == {"quick": 9, "medium": 3, "slow": 2, "very slow": 1}
    assert len(times["very slow"].seconds) == 2
    assert times["slow"].seconds[0] == 2.0


def test_the_demo_has_its_graph():
    from sparsec.cli.demo_cases import cases

    graph = cases((4096,))[-1]
    bound = graph.mask.bind(None)
    assert (bound.q_len, bound.nnz) == (63_666, 340_845)


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_DEVICE_MODULE, "detect_cpu", lambda: PROCESSOR)
        patch.setattr(base, "_database", lambda shipped, own: base.RecordBase([], Path(os.devnull)))
        for golden, command in (EXPLAINED | COMPARED).items():
            (GOLDEN / f"{golden}.txt").write_text(explained(command))
        for golden, command in EXPLAINED.items():
            (GOLDEN / f"{golden}.json").write_text(in_json(command))
