"""Records: what a line may say, who wins, what is served, and what torn, full, locked and foreign files do to that."""

import itertools
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec import data
from sparsec.analysis.signatures import MaskSignature
from sparsec.backends.base import Problem
from sparsec.device import device
from sparsec.errors import RecordError
from sparsec.records import Calibration, RecordBase, RecordKey, TuningRecord, Workload
from sparsec.records.upkeep import entries
from sparsec.template import Config, template

H100 = device("nvidia-h100")
BLOCKS = template("block_sparse")
DEFAULT = BLOCKS.default("cpu")
SMALL = Config.of(block_q=16, block_kv=16)
WIDE = Config.of(block_q=64, block_kv=128)
KEY = RecordKey("cpu-x86-64-avx512-2c", "block_sparse", BLOCKS.digest_of("cpu"), "cpu", "forward", "fp32", 64, 64, 1)
WINDOW = Workload(MaskSignature(8, 8, 0, 7, -1), 4096, 4096, 4, 1, 1_000_000)
WIDER = replace(WINDOW, mask=MaskSignature(9, 9, 0, 8, -1), nnz=2_000_000)


def record(config=DEFAULT, us=(100.0,), key=KEY, workload=WINDOW, **more) -> TuningRecord:
    return TuningRecord(key, workload, config, tuple(us), toolchain=more.pop("toolchain", "g++ 12"), **more)


@pytest.fixture
def base(tmp_path) -> RecordBase:
    return RecordBase([tmp_path / "shipped"], tmp_path / "own")


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "own" / f"{KEY.device}.jsonl"


# What a line says.


def test_a_record_reads_back_as_it_was_written():
    whole = record(us=(3.5, 4.25), date="2026-01-01T00:00:00+00:00", contest="a1", estimate_us=3.0, device_label="x")
    failed = record(us=(), failure="timeout", date="2026-01-01T00:00:00+00:00")
    for each in (whole, failed):
        assert TuningRecord.from_json(json.loads(json.dumps(each.to_json()))) == each
    calibration = Calibration(KEY.device, "probe 1", (("fma", 1e11),), date="2026-01-01T00:00:00+00:00")
    assert Calibration.from_json(calibration.to_json()) == calibration


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"schema": 0}, "schema 0"),
        ({"schema": True}, "schema True"),
        ({"device": ""}, "device ''"),
        ({"direction": "sideways"}, "direction 'sideways'"),
        ({"head_dim": 64.0}, "head_dim 64.0"),
        ({"group": 0}, "group 0"),
        ({"config": {"block_q": "64"}}, "block_q '64'"),
        ({"config": {"block_q": True}}, "block_q True"),
        ({"timings_us": [1.0, -2.0]}, "timings_us -2.0"),
        ({"timings_us": []}, "0 timings and failure None"),
        ({"failure": "launch"}, "1 timings and failure 'launch'"),
        ({"mask": None}, "mask None"),
        ({"work": {"q_len": 0}}, "q_len 0"),
        ({"head_dim": 10**400}, "head_dim 10"),
        ({"timings_us": [10**400]}, "timings_us 10"),
    ],
)
def test_a_line_that_cannot_be_says_which_field(change, named):
    with pytest.raises(RecordError, match=named):
        TuningRecord.from_json(record().to_json() | change)


# Who wins.


def served(base, key=KEY, workload=WINDOW, **more):
    return base.lookup(key, workload, toolchain=more.pop("toolchain", "g++ 12"), **more)


def test_the_fastest_is_served_and_says_how_near(base):
    base.extend([record(), record(SMALL, (50.0, 60.0, 55.0))])
    found = served(base)
    assert (found.config, found.us, found.default_us, found.nearness) == (SMALL, 55.0, 100.0, "exact")
    assert str(found) == "records of such a mask on this device (1 measurement)"
    near = served(base, workload=WIDER)
    assert (near.config, near.nearness) == (SMALL, "near")
    assert near.distance == pytest.approx(1.875)
    kin = served(base, key=replace(KEY, device="cpu-x86-64-avx512-64c"))
    assert (kin.config, kin.nearness) == (SMALL, "architecture")
    assert KEY.device in str(kin)


def test_nothing_is_served_for_what_was_not_measured(base):
    base.extend([record(), record(SMALL, (50.0,))])
    others = [
        {"device": "cpu-x86-64-avx2-2c"},
        {"source": "another"},
        {"direction": "backward"},
        {"dtype": "bf16"},
        {"head_dim": 128},
        {"v_dim": 32},
        {"group": 4},
        {"backend": "triton"},
        {"template": "hybrid"},
    ]
    assert [served(base, key=replace(KEY, **other)) for other in others] == [None] * len(others)
    # Of sources that are no more, not even to who asks for them.
    gone = replace(KEY, source="another")
    base.extend([record(key=gone), record(SMALL, (50.0,), key=gone)])
    assert served(base, key=gone) is None
    far = replace(WINDOW, mask=MaskSignature(15, 15, 6, 14, -9))
    assert served(base, workload=far) is None


def test_a_near_tie_goes_to_the_default(base):
    base.extend([record(us=(100.0,)), record(SMALL, (99.0,))])
    assert served(base).config == DEFAULT
    base.append(record(WIDE, (90.0,)))
    assert served(base).config == WIDE


def test_a_small_lead_does_not_carry_over_to_another_mask(base):
    base.extend([record(us=(100.0,)), record(SMALL, (96.5,))])
    assert served(base).config == SMALL
    assert served(base, workload=WIDER).config == DEFAULT
    base.append(record(WIDE, (93.0,)))
    assert served(base, workload=WIDER).config == WIDE


def test_a_planted_fast_looking_outlier_does_not_win(base):
    base.extend([record(us=(us,)) for us in (100.0, 101.0, 99.0)])
    base.extend([record(SMALL, (us,)) for us in (10.0, 120.0, 121.0)])
    assert served(base).config == DEFAULT


def test_a_slow_configuration_measured_without_the_default_is_not_served(base):
    base.append(record(SMALL, (500.0,)))
    assert served(base) is None


def test_where_the_default_does_not_fit_another_takes_its_part(base):
    """On a device with little shared memory, what would run without records is not the template's default."""
    base.extend([record(SMALL, (50.0,)), record(WIDE, (49.5,))])
    assert served(base) is None
    assert served(base, default=SMALL).config == SMALL
    assert served(base, default=SMALL, is_allowed=lambda config: config != SMALL).config == WIDE


def test_interleaved_measurements_outweigh_a_busy_day(base):
    # Alone, the default met a busy machine and looks slow; side by side it is the faster one.
    base.extend([record(us=(200.0,)), record(us=(210.0,)), record(SMALL, (100.0,))])
    assert served(base).config == SMALL
    base.extend([record(us=(80.0,), contest="a"), record(SMALL, (100.0,), contest="a")])
    assert served(base).config == DEFAULT


def test_measurements_with_the_toolchain_at_hand_come_first(base):
    base.extend([record(), record(SMALL, (50.0,)), record(WIDE, (90.0,))])
    assert served(base, toolchain="g++ 13").config == SMALL
    newer = [record(), record(SMALL, (80.0,)), record(WIDE, (70.0,))]
    base.extend(replace(each, toolchain="g++ 13") for each in newer[1:])
    # The default was not measured beside them.
    assert served(base, toolchain="g++ 13").config == SMALL
    base.append(replace(newer[0], toolchain="g++ 13"))
    assert served(base, toolchain="g++ 13").config == WIDE
    assert served(base).config == SMALL


@pytest.mark.parametrize("failure", ["constraint", "compile", "launch", "timeout", "incorrect"])
def test_a_failed_configuration_is_never_served(base, failure):
    base.extend([record(), record(WIDE, (60.0,)), record(SMALL, (50.0,), workload=WIDER), record(workload=WIDER)])
    assert served(base, workload=WIDER).config == SMALL
    base.append(record(SMALL, (), failure=failure))
    assert served(base).config == WIDE
    # What failed on one mask may run on another, unless it was wrong or cannot run at all.
    found = served(base, workload=WIDER).config
    assert found == (SMALL if failure == "timeout" else DEFAULT)


def test_a_wrong_configuration_is_out_for_every_dtype_until_the_toolchain_changes(base):
    base.extend([record(), record(SMALL, (50.0,))])
    base.append(record(SMALL, (), key=replace(KEY, dtype="bf16", head_dim=128), failure="incorrect"))
    assert served(base).config == DEFAULT
    assert served(base, toolchain=None).config == DEFAULT
    assert served(base, toolchain="g++ 13").config == SMALL


def test_a_wrong_configuration_on_this_device_is_not_taken_from_its_kin(base):
    kin = replace(KEY, device="cpu-x86-64-avx512-64c")
    base.extend([record(key=kin), record(SMALL, (50.0,), key=kin)])
    assert served(base).config == SMALL
    base.append(record(SMALL, (), failure="incorrect"))
    assert served(base).config == DEFAULT


def test_what_ran_out_of_time_on_this_device_is_not_taken_from_its_kin(base):
    kin = replace(KEY, device="cpu-x86-64-avx512-64c")
    for workload in (WINDOW, WIDER):
        base.extend([record(key=kin, workload=workload), record(SMALL, (50.0,), key=kin, workload=workload)])
    base.append(record(SMALL, (), failure="timeout"))
    assert served(base).config == DEFAULT
    assert served(base, workload=WIDER).config == SMALL


def test_of_several_kin_the_nearest_workload_answers(base):
    for cores, config, workload in ((4, SMALL, WIDER), (8, WIDE, WINDOW), (16, SMALL, replace(WINDOW, nnz=9_000_000))):
        kin = replace(KEY, device=f"cpu-x86-64-avx512-{cores}c")
        base.extend([record(key=kin, workload=workload), record(config, (50.0,), key=kin, workload=workload)])
    found = served(base)
    assert (found.key.device, found.config, found.distance) == ("cpu-x86-64-avx512-8c", WIDE, 0.0)


_CONFIGS = [
    Config(tuple(zip(("block_q", "block_kv"), values, strict=True)))
    for values in itertools.product((8, 16, 32, 64, 256), (16, 64, 128, 512))
]
_ANY_CONFIG = st.sampled_from([*_CONFIGS, Config(), Config.of(block_q=16), Config.of(block_q=16, block_kv=16, x=1)])
_ANY_RECORD = st.builds(
    lambda config, us, failure, workload, toolchain, contest: record(
        config, () if failure else (us,), workload=workload, failure=failure, toolchain=toolchain, contest=contest
    ),
    _ANY_CONFIG,
    st.floats(1.0, 1e6),
    st.sampled_from([None, None, None, "compile", "launch", "timeout", "incorrect"]),
    st.sampled_from([WINDOW, WIDER]),
    st.sampled_from(["g++ 12", "g++ 13"]),
    st.sampled_from(["", "a"]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(_ANY_RECORD, max_size=12), st.sampled_from([WINDOW, WIDER]))
def test_what_is_served_is_legal_never_failed_and_not_slower_than_the_default(tmp_path_factory, records, workload):
    base = RecordBase([], tmp_path_factory.mktemp("records"))
    base.extend([record(us=(1000.0,)), *records])
    found = served(base, workload=workload)
    if found is None:
        return
    assert BLOCKS.violation("cpu", found.config) is None
    mine = [each for each in [record(us=(1000.0,)), *records] if set(each.config.items) == set(found.config.items)]
    assert any(each.failure is None for each in mine)
    assert not any(each.failure == "incorrect" and each.toolchain == "g++ 12" for each in mine)
    assert found.records
    assert all(each.failure is None for each in found.records)


# Where it is kept.


def test_a_database_of_many_records_is_read_once_and_then_only_what_was_added(base, file):
    base.append(record())
    line = file.read_bytes()
    rest = [line.replace(b'"nnz":1000000', b'"nnz":%d' % n) for n in range(1, 5_000)]
    file.write_bytes(line + b"".join(rest))
    assert served(base).config == DEFAULT
    opened = base._files[file]
    assert opened.n_readings == 1
    shelf = base._shelves[KEY]
    for n in range(50):
        assert served(base, workload=replace(WINDOW, nnz=77 + n)) is not None
    assert opened.n_readings == 1
    assert base._shelves[KEY] is shelf
    RecordBase([], file.parent).append(record(SMALL, (9.0,)))
    assert served(base).config == SMALL
    assert opened.n_readings == 2
    assert opened._last.offset == len(line) + sum(map(len, rest))


def test_garbage_torn_and_foreign_lines_are_skipped_and_reported(base, file):
    base.append(record())
    newer = record(SMALL, (1.0,)).to_json() | {"schema": 2, "surprise": [1]}
    foreign = record(SMALL, (1.0,), key=replace(KEY, device="cpu-x86-64-avx2-2c")).to_json()
    with file.open("a") as lines:
        lines.write("not json\n[1]\n\x00\x00\n" + json.dumps(newer) + "\n" + json.dumps(foreign) + "\n")
        lines.write(json.dumps(record(SMALL, (1.0,)).to_json())[:-40])
    assert served(base).config == DEFAULT
    assert [problem.split(": ")[0] for problem in base.problems()] == [f"{file}:{n}" for n in (2, 3, 4, 5, 6, 7)]
    assert "schema 2, and this sparsec reads 1" in base.problems()[3]
    # The next writer begins on a line of its own, and the torn one stays torn.
    base.append(record(WIDE, (20.0,)))
    assert served(base).config == WIDE
    assert len(base.problems()) == 6


_JUNK = [None, True, -1, 0, 10**400, 1e308, 0.5, "", "x", "../..", [], {}, [[]], {"a": {}}, [1e308] * 300]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.sampled_from(_JUNK), st.booleans()), max_size=6))
def test_no_line_whatever_it_says_stops_a_lookup(tmp_path_factory, changes):
    folder = tmp_path_factory.mktemp("records")
    good = record(date="2026-01-01").to_json()
    places = [(name,) for name in good] + [("mask", name) for name in good["mask"]]
    places += [("work", name) for name in good["work"]] + [("config", "block_q"), ("config", "more")]
    lines = [good]
    for place, junk, is_failure in changes:
        bad = json.loads(json.dumps(good)) | ({"failure": "incorrect", "timings_us": []} if is_failure else {})
        *above, last = places[place % len(places)]
        (bad[above[0]] if above else bad)[last] = junk
        lines.append(bad)
    file = folder / f"{KEY.device}.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    base = RecordBase([], folder)
    found = served(base)
    assert found is None or BLOCKS.violation("cpu", found.config) is None
    n_usable = len(list(base.records()))
    assert len(base.problems()) + n_usable + len(base.calibrations(KEY.device)) == len(lines)
    assert len(list(entries(file))) == len(lines)


def test_a_file_that_is_replaced_or_shortened_is_read_anew(base, file):
    base.extend([record(), record(SMALL, (50.0,))])
    assert served(base).config == SMALL
    first = file.read_bytes().splitlines(keepends=True)[0]
    file.write_bytes(first)
    assert served(base).config == DEFAULT
    file.write_bytes(first.replace(b"100.0", b"200.0") + json.dumps(record(WIDE, (1.0,)).to_json()).encode())
    assert served(base).config == WIDE
    file.unlink()
    assert served(base) is None


_WRITER = """
import json, sys
from dataclasses import replace
from pathlib import Path
from sparsec.records import RecordBase, TuningRecord
base, record = RecordBase([], Path(sys.argv[1])), TuningRecord.from_json(json.loads(sys.argv[3]))
for n in range(25):
    base.append(replace(record, timings_us=(float(n + 1),) * 200, contest=sys.argv[2]))
"""


def test_many_processes_write_at_once_and_nothing_is_lost(tmp_path, file):
    file.parent.mkdir()
    file.write_bytes(b'{"schema": 1, "a writer died he')
    like = json.dumps(record().to_json())
    writers = [subprocess.Popen([sys.executable, "-c", _WRITER, str(file.parent), name, like]) for name in "abc"]
    assert [writer.wait(60) for writer in writers] == [0] * 3
    base = RecordBase([], file.parent)
    assert sorted((each.contest, each.timings_us[0]) for each in base.records()) == [
        (name, float(n + 1)) for name in "abc" for n in range(25)
    ]
    assert len(base.problems()) == 1


def test_threads_write_and_ask_at_once(base):
    base.append(record())
    faults = []

    def work(n):
        try:
            for m in range(15):
                base.append(record(SMALL, (50.0 + m,), contest=f"{n}"))
                assert served(base).config == SMALL
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert len(list(base.records())) == 1 + 6 * 15


def test_records_wait_in_memory_while_another_writer_holds_the_lock(base, file, monkeypatch, caplog):
    base.append(record())
    monkeypatch.setattr("sparsec.records.base._LOCK_TIMEOUT_S", 0.05)
    with data.entry_lock(file):
        base.append(record(SMALL, (50.0,)))
        assert served(base).config == SMALL
        assert base.n_unwritten == 1
    base.append(record(WIDE, (70.0,)))
    assert base.n_unwritten == 0
    assert len(file.read_bytes().splitlines()) == 3
    assert "was held by another process" in caplog.text


def test_a_full_disk_leaves_no_half_line_and_loses_nothing(base, file, monkeypatch, caplog):
    base.append(record())
    whole, write = file.read_bytes(), os.write
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", lambda descriptor, content: write(descriptor, content[: len(content) // 2]))
        base.append(record(SMALL, (50.0,)))
        base.append(record(WIDE, (70.0,)))
    assert file.read_bytes() == whole
    assert [entry.levelname for entry in caplog.records] == ["WARNING"]
    assert served(base).config == SMALL
    base.append(record(us=(101.0,)))
    assert base.problems() == ()
    assert [each.config for each in RecordBase([], file.parent).records()] == [DEFAULT, SMALL, WIDE, DEFAULT]


def test_a_folder_that_cannot_be_written_keeps_records_in_memory(tmp_path, caplog):
    (tmp_path / "file").write_text("no folder")
    base = RecordBase([], tmp_path / "file" / "own")
    base.extend([record(), record(SMALL, (50.0,))])
    base.append(record(WIDE, (70.0,)))
    assert served(base).config == SMALL
    assert len(list(base.records())) == 3
    assert len(caplog.records) == 1
    assert "for this process only" in caplog.text


def test_a_device_key_that_is_a_path_is_refused(base):
    with pytest.raises(RecordError, match="no key"):
        base.append(record(key=replace(KEY, device="../../etc/passwd")))


def test_clocks_that_jump_decide_nothing(base):
    base.extend([record(date="2999-01-01"), record(SMALL, (50.0,), date="1970-01-01"), record(WIDE, (60.0,), date="?")])
    assert served(base).config == SMALL


def test_a_key_comes_from_a_template_and_a_problem():
    problem = Problem(128, 128, q_heads=8, kv_heads=2, head_dim=64, v_dim=32, dtype="bf16")
    key = RecordKey.of(BLOCKS, "triton", problem, H100, "backward")
    assert (key.device, key.group, key.v_dim, key.direction) == ("nvidia-sm_90-132sm-hbm80g", 4, 32, "backward")
    assert key.source == BLOCKS.digest_of("triton") != BLOCKS.digest_of("cpu")
