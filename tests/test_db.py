"""Record files as wholes: `sparsec db`, what is shipped, and how well records of other masks stand in."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from test_records import DEFAULT, KEY, SMALL, WIDE, WIDER, WINDOW, record

from sparsec.cli.entry import sparsec
from sparsec.cost import model_digest
from sparsec.records import Calibration, RecordBase, base
from sparsec.records.upkeep import entries

TOOLS = Path(__file__).resolve().parent.parent / "tools"
sys.path.insert(0, str(TOOLS))

import eval_transfer  # noqa: E402  # found beside the tests
import promote_records  # noqa: E402

OTHER = replace(KEY, device="cpu-x86-64-avx2-8c")
STALE = replace(KEY, source="0123456789abcdef")
NEWER = json.dumps(record(SMALL).to_json() | {"schema": 2, "surprise": []})

# Of today's cost model and of another, the last one of today's not the last of all.
CALIBRATIONS = [(model_digest(KEY.device), 2.0), (model_digest(KEY.device), 3.0), ("another model", 4.0)]


@pytest.fixture
def own(tmp_path, monkeypatch) -> RecordBase:
    made = RecordBase([tmp_path / "shipped"], tmp_path / "own")
    monkeypatch.setattr(base, "_database", lambda shipped, folder: made)
    return made


def db(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(sparsec, ["db", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def in_json(*arguments: object, code: int = 0):
    result = CliRunner().invoke(sparsec, ["db", *map(str, arguments), "--json"], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def file_of(own: RecordBase, key=KEY) -> Path:
    return own.own_folder / f"{key.device}.jsonl"


def test_without_records_every_command_says_so(own):
    for command in ("list", "show", "prune", "verify"):
        assert f"there are no records; tuning writes them to {own.own_folder}" in db(command).replace("\n", " ")
    assert in_json("list") == in_json("show") == in_json("prune") == []
    assert in_json("path") == {"own": str(own.own_folder), "shipped": [str(own.folders[0])]}
    assert db("path").splitlines()[0] == str(own.own_folder)


def test_list_counts_by_kernel(own):
    own.extend([record(), record(SMALL, (50.0,)), record(WIDE, (), failure="launch"), record(workload=WIDER)])
    own.extend([record(key=STALE), record(key=replace(OTHER, group=4)), Calibration(KEY.device, "1", (("fma", 1.0),))])
    listed = in_json("list")
    assert [(row["device"], row["group"]) for row in listed] == [(OTHER.device, 4), (KEY.device, 1)]
    counts = ("workloads", "measurements", "failures", "stale")
    assert [listed[1][name] for name in counts] == [2, 3, 1, 1]
    text = db("list", "--device", KEY.device)
    assert KEY.device in text
    assert OTHER.device not in text
    assert "and 1 calibration of the device" in text
    assert "did you mean nvidia-h100" in db("list", "--device", "h100", code=2)
    assert db("list", "--device", "nvidia-h100").startswith("there are no records of nvidia-h100")


def test_show_says_what_the_records_lead_to(own):
    own.extend([record(), record(SMALL, (50.0,)), record(workload=WIDER), record(WIDE, workload=WIDER, us=(200.0,))])
    own.extend([record(SMALL, key=replace(KEY, dtype="bf16")), record(key=STALE)])
    text = " ".join(db("show").split())
    assert "block_q=16 block_kv=16: 50 µs; the default 100 µs, 2.00× (2 records)" in text
    assert "the default, which nothing beats (2 records)" in text
    assert "nothing is served, as the default was not measured" in text
    assert "1 record of other sources: not served" in text
    shown = in_json("show", "--dtype", "fp32", "--template", "block_sparse", "--direction", "forward")
    assert [None if each["served"] is None else each["served"]["config"] for each in shown] == [
        SMALL.to_dict(),
        DEFAULT.to_dict(),
        None,
    ]
    assert "and 3 more; --limit shows them" in db("show", "--limit", 1)


def test_merge_sorts_by_device_adds_once_and_keeps_what_is_newer(own, tmp_path):
    mixed = tmp_path / "mixed.jsonl"
    lines = [json.dumps(each.to_json()) for each in (record(), record(key=OTHER), record(key=STALE), record(SMALL))]
    mixed.write_text("\n".join([*lines, lines[0], NEWER, "garbage", '{"schema": 1}', '{"torn']))
    own.append(record(WIDE))
    dry = in_json("merge", mixed, "--dry-run")
    assert not file_of(own, OTHER).exists()
    merged = in_json("merge", mixed)
    assert merged == dry
    assert merged["added"] == {str(file_of(own)): 4, str(file_of(own, OTHER)): 1}
    assert merged["duplicates"] == 1
    assert [problem.split(": ")[0] for problem in merged["problems"]] == [f"{mixed}:{n}" for n in (7, 8, 9)]
    assert "nothing to add" in db("merge", mixed, tmp_path)
    assert NEWER.encode() in file_of(own).read_bytes().splitlines()
    assert {each.config for each in own.records(KEY.device)} == {DEFAULT, SMALL, WIDE}
    assert "no such thing" in db("merge", tmp_path / "nowhere", code=1)
    db("merge", mixed, "--into", tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / file_of(own).name).exists()


def test_verify_finds_what_is_wrong_and_counts_what_is_not_served(own):
    illegal = record(replace(DEFAULT, items=(("block_q", 7), ("block_kv", 64))))
    own.extend([record(), record(key=STALE)])
    assert in_json("verify") == {"files": [{"path": str(file_of(own)), "usable": 1, "stale": 1}], "problems": []}
    own.append(illegal)
    with file_of(own).open("a") as lines:
        lines.write(f"{NEWER}\nrubbish\n{json.dumps(record(key=OTHER).to_json())}\n")
    found = in_json("verify", file_of(own), code=1)
    counts = {"usable": 1, "stale": 1, "illegal": 1, "newer": 1, "garbage": 1, "misplaced": 1}
    assert found["files"] == [{"path": str(file_of(own))} | counts]
    assert [problem.split(": ")[0] for problem in found["problems"]] == [f"{file_of(own)}:{n}" for n in (3, 5, 6)]
    assert "wrong: " in db("verify", code=1)


def test_prune_drops_only_what_can_never_be_served(own):
    own.extend([record(), record(), record(SMALL, (50.0,)), record(WIDE, (), failure="incorrect"), record(key=STALE)])
    with file_of(own).open("a") as lines:
        lines.write(f"{NEWER}\nrubbish\n")
    served = own.lookup(KEY, WINDOW)
    before = file_of(own).read_bytes()
    dry = in_json("prune", "--dry-run")
    assert file_of(own).read_bytes() == before
    assert in_json("prune") == dry
    assert dry == [{"path": str(file_of(own)), "dropped": {"usable": 1, "stale": 1, "garbage": 1}, "kept": 4}]
    assert own.lookup(KEY, WINDOW).config == served.config
    assert {entry.worth for entry in entries(file_of(own))} == {"usable", "newer"}
    assert "dropped nothing" in db("prune")


def test_prune_keeps_the_last_calibration_of_todays_cost_model(own):
    own.extend(Calibration(KEY.device, source, (("launch_us", us),)) for source, us in CALIBRATIONS)
    assert in_json("verify", file_of(own))["files"] == [{"path": str(file_of(own)), "usable": 2, "stale": 1}]
    assert in_json("prune")[0]["dropped"] == {"stale": 2}
    assert [dict(each.values)["launch_us"] for each in RecordBase([], own.own_folder).calibrations(KEY.device)] == [3.0]
    # Processors of one key that are other designs keep one each.
    own.extend(
        Calibration(KEY.device, model_digest(KEY.device), (("launch_us", us),), model="amd-26-2") for us in (4.0, 5.0)
    )
    assert in_json("prune")[0]["dropped"] == {"stale": 1}
    kept = RecordBase([], own.own_folder).calibrations(KEY.device)
    assert [(each.model, dict(each.values)["launch_us"]) for each in kept] == [("", 3.0), ("amd-26-2", 5.0)]


def test_an_unknown_command_names_the_nearest(own):
    assert "did you mean verify?" in db("verfy", code=2)


# Shipping.


def test_promoting_takes_winners_contestants_and_lasting_failures_once(own, tmp_path):
    configs = [replace(DEFAULT, items=(("block_q", q), ("block_kv", kv))) for q in (16, 32, 64) for kv in (16, 32, 128)]
    own.extend([record(), *(record(config, (20.0 + n,)) for n, config in enumerate(configs))])
    own.extend([record(WIDE, (), failure="timeout", workload=WIDER), record(key=STALE)])
    own.extend([record(configs[0], (), key=replace(KEY, dtype="bf16"), failure="launch")] * 2)
    own.extend(Calibration(KEY.device, source, (("launch_us", us),)) for source, us in CALIBRATIONS)
    into = tmp_path / "autotune_db"
    into.mkdir()

    def promote(*options: str):
        arguments = ["--from", str(own.own_folder), "--into", str(into), *options]
        return CliRunner().invoke(promote_records.promote, arguments, catch_exceptions=False)

    assert "nothing was written" in promote("--dry-run").output
    assert [*into.iterdir()] == []
    assert promote().exit_code == 0
    shipped = RecordBase([], into)
    assert {each.config for each in shipped.records() if each.failure is None} == {DEFAULT, *configs[:4]}
    assert [each.failure for each in shipped.records() if each.failure] == ["launch"]
    assert [each.values for each in shipped.calibrations(KEY.device)] == [(("launch_us", 3.0),)]
    assert shipped.lookup(KEY, WINDOW).config == own.lookup(KEY, WINDOW).config == configs[0]
    content = (into / f"{KEY.device}.jsonl").read_bytes()
    assert "nothing new" in promote().output
    assert (into / f"{KEY.device}.jsonl").read_bytes() == content
    assert [file.name for file in into.iterdir()] == [f"{KEY.device}.jsonl"]
    assert "there are no records of x" in promote("--device", "x").output


def test_what_is_shipped_is_sound():
    """Every line of autotune_db/ says something, and is in the file of its device."""
    shipped = Path(eval_transfer.__file__).parent.parent / "autotune_db"
    worths = {entry.worth for file in shipped.glob("*.jsonl") for entry in entries(file)}
    assert worths <= {"usable", "stale"}


# Standing in.


def test_a_mask_is_held_out_with_all_its_lengths(own, tmp_path):
    longer = replace(WINDOW, q_len=8192, kv_len=8192, nnz=2_000_000)
    for workload, best in ((WINDOW, SMALL), (longer, SMALL), (WIDER, WIDE)):
        own.extend([record(us=(100.0,), workload=workload), record(best, (50.0,), workload=workload)])
    own.append(record(SMALL, (80.0,), workload=WIDER))
    results = {each.workload: each for each in eval_transfer.held_out(own, least=2)}
    window, wider = results["4,096 × 4,096, 1,000,000 edges"], results["4,096 × 4,096, 2,000,000 edges"]
    # The other window length would have known better, and is not asked: what serves was never measured here.
    assert window.regret is None
    assert window.default_regret == pytest.approx(1.0)
    assert wider.regret == pytest.approx(0.6)
    file = tmp_path / "transfer.json"
    run = CliRunner().invoke(eval_transfer.evaluate, ["--least", "2", "--json", str(file), str(own.own_folder)])
    assert "MISSED: median regret of a held-out mask that others' records serve: 60.0%" in run.output
    written = json.loads(file.read_text())
    assert [aim["is_met"] for aim in written["aims"]] == [False]
    assert written["provenance"]["device"]
    summary = written["summary"]
    assert summary["masks held out"] == 3
    assert summary["median regret of transfer"] == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("tool", "code", "said"),
    [("promote_records.py", 0, "nothing was written"), ("eval_transfer.py", 1, "tune some masks first")],
)
def test_the_tools_run(tool, code, said, tmp_path):
    option = ["--from", str(tmp_path), "--into", str(tmp_path), "--dry-run"] if "promote" in tool else [str(tmp_path)]
    done = subprocess.run([sys.executable, TOOLS / tool, *option], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert said in done.stdout + done.stderr
