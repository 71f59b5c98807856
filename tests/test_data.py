"""Directories, readers and writers: what they give, and how they refuse."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparsec import data
from sparsec.errors import SparsecError


@pytest.fixture
def private_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cache"
    monkeypatch.setenv(data.CACHE_DIR_VARIABLE, str(path))
    return path


def test_bundled_folders_are_found():
    assert data.templates_dir().name == "templates"
    assert data.autotune_db_dir().name == "autotune_db"


def test_missing_bundled_folder_says_where_it_was_looked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "_PACKAGE", tmp_path / "sparsec")
    with pytest.raises(SparsecError, match="install sparsec again"):
        data.templates_dir()


def test_folder_inside_the_package_comes_first(monkeypatch, tmp_path):
    inside, beside = tmp_path / "sparsec/_data/templates", tmp_path / "templates"
    inside.mkdir(parents=True)
    beside.mkdir()
    monkeypatch.setattr(data, "_PACKAGE", tmp_path / "sparsec")
    assert data.templates_dir() == inside
    inside.rmdir()
    assert data.templates_dir() == beside


def test_cache_dir_is_made_for_its_user_alone(private_dir):
    assert data.cache_dir() == private_dir
    assert private_dir.stat().st_mode & 0o777 == 0o700
    assert data.cache_dir() == private_dir


def test_cache_dir_defaults_to_the_platforms(monkeypatch, tmp_path):
    monkeypatch.setenv(data.CACHE_DIR_VARIABLE, "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data.cache_dir().is_relative_to(tmp_path)


def test_cache_dir_expands_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(data.CACHE_DIR_VARIABLE, "~/kernels")
    assert data.cache_dir() == tmp_path / "kernels"


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777])
def test_cache_dir_that_others_can_write_is_refused(private_dir, mode):
    private_dir.mkdir()
    private_dir.chmod(mode)
    with pytest.raises(SparsecError, match=rf"mode {mode:04o}.*chmod 700"):
        data.cache_dir()


def test_cache_dir_of_someone_else_is_refused(private_dir, monkeypatch):
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(SparsecError, match=f"belongs to user {owner}.*{data.CACHE_DIR_VARIABLE}"):
        data.cache_dir()


def test_unwritable_cache_dir_is_refused(private_dir, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(SparsecError, match="cannot be written to"):
        data.cache_dir()


def test_cache_dir_below_a_file_is_refused(private_dir):
    private_dir.write_text("")
    with pytest.raises(SparsecError, match=r"cannot be made.*SPARSEC_CACHE_DIR"):
        data.cache_dir()


def test_environment_is_read_and_checked(monkeypatch):
    monkeypatch.setenv(data.TUNE_VARIABLE, "")
    monkeypatch.setenv(data.ISA_VARIABLE, "avx2")
    assert data.forced_tune_mode() is None
    assert data.forced_isa() == "avx2"
    monkeypatch.setenv(data.TUNE_VARIABLE, "cached")
    assert data.forced_tune_mode() == "cached"
    monkeypatch.setenv(data.TUNE_VARIABLE, "always")
    with pytest.raises(SparsecError, match=r"'always' is no tuning mode.*off, cached"):
        data.forced_tune_mode()


def test_yaml_gives_plain_data(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("x: &a {p: 1}\ny:\n  <<: *a\n  q: [2, 3.5, yes, null, text]\n")
    assert data.read_yaml(path) == {"x": {"p": 1}, "y": {"p": 1, "q": [2, 3.5, True, None, "text"]}}


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("a: 1\nb: &b [*b]", 2, "part of"),
        ("\n&a {b: {c: *a}}", 2, "part of"),
        ("a: 1\na: 2", 2, "second time"),
        ("a: 1\n2: 3", 2, "no string"),
        ("on: push", 1, "no string"),
        ("a: !!python/object/apply:os.system [true]", 1, "python/object"),
        ("a: 1\n--- b", 2, "document"),
        ("a: [1\nb: 2", 2, "expected"),
        ("a: *nowhere", 1, "undefined alias"),
        ("[" * 100_000, 1, "deeper than"),
        ("- " * 100_000, 1, "deeper than"),
    ],
)
def test_yaml_refusals_name_file_and_line(tmp_path, text, line, reason):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(SparsecError, match=rf"bad\.yaml:{line}: .*{reason}"):
        data.read_yaml(path)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"a: \x00", b"a: 2001-99-99"])
def test_yaml_refusals_name_the_file(tmp_path, content):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(SparsecError, match=r"bad\.yaml: "):
        data.read_yaml(path)
    with pytest.raises(SparsecError, match="No such file"):
        data.read_yaml(tmp_path / "absent.yaml")


@pytest.mark.parametrize(("text", "where"), [('{\n"a": }', ":2"), ("[NaN]", ""), ("[" * 100_000, "")])
def test_json_refusals_name_the_file(tmp_path, text, where):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(SparsecError, match=rf"bad\.json{where}: "):
        data.read_json(path)


def test_json_lines_survive_bad_and_torn_lines(tmp_path):
    path = tmp_path / "records.jsonl"
    data.append_json_line(path, {"a": 1})
    with path.open("a") as file:
        file.write('not json\n[1]\n\n{"a": Infinity}\n{"a": 2, "tor')
    data.append_json_line(path, {"a": "µs"})
    lines = data.read_json_lines(path)
    assert lines.rows == ((1, {"a": 1}), (7, {"a": "µs"}))
    assert [problem.split(": ")[0] for problem in lines.problems] == [f"{path}:{n}" for n in (2, 3, 5, 6)]


def test_json_line_on_a_full_disk_says_so(tmp_path, monkeypatch):
    path = tmp_path / "records.jsonl"
    monkeypatch.setattr(os, "write", lambda descriptor, line: len(line) - 1)
    with pytest.raises(SparsecError, match="is the disk full"):
        data.append_json_line(path, {"a": 1})


def test_json_line_holds_no_nan(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        data.append_json_line(tmp_path / "records.jsonl", {"a": float("nan")})


def test_publish_replaces_whole_files(tmp_path):
    path = tmp_path / "kernel.so"
    data.publish(path, b"one")
    data.publish(path, b"two")
    assert path.read_bytes() == b"two"
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_publish_on_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "kernel.so"
    data.publish(path, b"old")

    def no_space(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(SparsecError, match="No space left"):
        data.publish(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_publish_without_a_directory_is_refused(tmp_path):
    with pytest.raises(SparsecError, match="No such file"):
        data.publish(tmp_path / "absent" / "kernel.so", b"")


_PUBLISHER = """
import sys
from pathlib import Path
from sparsec import data
path, letter = Path(sys.argv[1]), sys.argv[2].encode()
for _ in range(40):
    data.publish(path, letter * 300_000)
    seen = path.read_bytes()
    assert len(seen) == 300_000 and len(set(seen)) == 1, (len(seen), set(seen))
    data.append_json_line(path.with_suffix(".jsonl"), {"writer": sys.argv[2], "filler": "x" * 5000})
"""

_LOCKED_COUNTER = """
import sys
from pathlib import Path
from sparsec import data
path = Path(sys.argv[1])
for _ in range(100):
    with data.entry_lock(path):
        path.write_text(str(int(path.read_text()) + 1))
"""


def _run_together(script: str, *argument_lists: list[str]) -> None:
    processes = [subprocess.Popen([sys.executable, "-c", script, *arguments]) for arguments in argument_lists]
    assert [process.wait(60) for process in processes] == [0] * len(processes)


def test_concurrent_processes_never_see_half_a_file(tmp_path):
    path = tmp_path / "kernel.so"
    _run_together(_PUBLISHER, [str(path), "a"], [str(path), "b"], [str(path), "c"])
    lines = data.read_json_lines(path.with_suffix(".jsonl"))
    assert lines.problems == ()
    assert sorted(row["writer"] for _, row in lines.rows) == sorted("abc" * 40)
    assert {file.name for file in tmp_path.iterdir()} == {"kernel.so", "kernel.jsonl"}


def test_entry_lock_excludes_other_processes(tmp_path):
    path = tmp_path / "counter"
    path.write_text("0")
    _run_together(_LOCKED_COUNTER, *[[str(path)]] * 3)
    assert path.read_text() == "300"


def test_entry_lock_that_stays_held_is_an_error(tmp_path):
    path = tmp_path / "kernel.so"
    held, second = data.entry_lock(path), data.entry_lock(path, timeout_s=0.05)
    with held, pytest.raises(SparsecError, match=r"kernel\.so\.lock was held"), second:
        pass
    with data.entry_lock(path, timeout_s=0.05):
        pass


def test_entry_lock_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SparsecError, match="cannot make the lock"), data.entry_lock(tmp_path / "file" / "x"):
        pass


def test_only_data_reads_the_environment():
    package = Path(data.__file__).parent
    readers = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if "os.environ" in (text := path.read_text()) or "getenv" in text
    }
    # The CPU back end asks which compiler to use: `$CXX` is the system's variable, not sparsec's.
    assert readers <= {"data.py", "backends/cpu.py"}
