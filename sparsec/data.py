"""Where files live, and how they are read and written.

This file decides three things: where `templates/`, `autotune_db/` and the user's cache are; that every YAML and JSON
file is read by the readers below, which name file and line when they refuse; and that a file in the cache appears whole
or not at all. The three environment variables of sparsec's own are read here, and the WORLD_SIZE of distributed jobs; a
compiler's CXX is read where it is looked for. It must not know what any of the files mean.
"""

from __future__ import annotations

import json
import os
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn

from sparsec.errors import SparsecError

CACHE_DIR_VARIABLE: Final = "SPARSEC_CACHE_DIR"
TUNE_VARIABLE: Final = "SPARSEC_TUNE"
ISA_VARIABLE: Final = "SPARSEC_ISA"

TUNE_MODES: Final = ("off", "cached", "auto", "quick", "full")

_YAML_MAX_DEPTH = 64

_PACKAGE = Path(__file__).resolve().parent


def templates_dir() -> Path:
    """The directory with one folder per kernel template."""
    return _bundled("templates")


def autotune_db_dir() -> Path:
    """The read-only directory of shipped tuning records."""
    return _bundled("autotune_db")


def _bundled(name: str) -> Path:
    # A wheel carries the folder inside the package; a checkout has it beside the package.
    for candidate in (_PACKAGE / "_data" / name, _PACKAGE.parent / name):
        if candidate.is_dir():
            return candidate
    raise SparsecError(
        f"sparsec's own folder {name}/ was looked for in {_PACKAGE / '_data'} and {_PACKAGE.parent}, "
        "and is in neither; the installation is incomplete: install sparsec again"
    )


def cache_dir() -> Path:
    """The user's own cache directory, made with mode 0700 if it is not there yet.

    It is `$SPARSEC_CACHE_DIR`, else the platform's cache directory for `sparsec`. Compiled kernels are loaded from it,
    so it must be writable by this user and by nobody else.

    Raises:
        SparsecError: It cannot be made, belongs to someone else, or others can write to it.
    """
    path = _cache_path()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except OSError as error:
        _refuse_cache(path, f"cannot be made ({error.strerror})")
    if status.st_uid != os.geteuid():
        _refuse_cache(path, f"belongs to user {status.st_uid}, and this process runs as user {os.geteuid()}")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        mode = stat.S_IMODE(status.st_mode)
        _refuse_cache(path, f"has mode {mode:04o}, so that others can write to it", f"run `chmod 700 {path}`, or ")
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        _refuse_cache(path, "cannot be written to", f"run `chmod 700 {path}`, or ")
    return path


def records_dir() -> Path:
    """Where the user's tuning records lie or would lie: a folder of the cache, which is not made by asking."""
    return _cache_path() / "records"


def made_records_dir(path: Path) -> None:
    """Makes the folder of records at `path`, with mode 0700 where it is the cache's.

    Raises:
        SparsecError: It cannot be made.
    """
    if path == records_dir():
        cache_dir()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise SparsecError(f"the folder of records {path} cannot be made ({error.strerror})") from None


def _cache_path() -> Path:
    chosen = os.environ.get(CACHE_DIR_VARIABLE)
    if chosen:
        return Path(chosen).expanduser().absolute()
    import platformdirs

    return Path(platformdirs.user_cache_dir("sparsec"))


def _refuse_cache(path: Path, found: str, remedy: str = "") -> NoReturn:
    raise SparsecError(
        f"the cache directory {path} {found}; {remedy}set {CACHE_DIR_VARIABLE} to a directory that is this user's alone"
    )


def forced_tune_mode() -> str | None:
    """The tuning mode that `$SPARSEC_TUNE` puts in place of the default, or None.

    Raises:
        SparsecError: It is set to something that is no mode.
    """
    mode = os.environ.get(TUNE_VARIABLE) or None
    if mode is not None and mode not in TUNE_MODES:
        raise SparsecError(f"{TUNE_VARIABLE}={mode!r} is no tuning mode; set it to one of {', '.join(TUNE_MODES)}")
    return mode


def is_distributed_job() -> bool:
    """Whether a launcher started this process as one of several ranks: `$WORLD_SIZE`, as torchrun sets it."""
    size = os.environ.get("WORLD_SIZE", "")
    return size.isdigit() and int(size) > 1


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """What a process started by this one is given, so that it finds the same packages; with `extra` beside it."""
    paths = os.pathsep.join(path for path in sys.path if path)
    return {**os.environ, "PYTHONPATH": paths, **extra}


def forced_isa() -> str | None:
    """The instruction set that `$SPARSEC_ISA` puts as the highest to use, or None. `device.py` knows the names."""
    return os.environ.get(ISA_VARIABLE) or None


# Where each value of a document stands: keys and indices from the top, and the line.
Lines = dict[tuple[str | int, ...], int]


# What these files hold is only known to the caller, who checks it: hence `Any`.
def read_yaml(path: Path) -> Any:
    """The one document in a YAML file, made of plain lists, scalars, and dictionaries with string keys.

    Raises:
        SparsecError: As `read_yaml_with_lines`.
    """
    return _yaml_document(path)[0]


def read_yaml_with_lines(path: Path) -> tuple[Any, Lines]:
    """The document in a YAML file, as `read_yaml` has it, and the line of each value in it.

    Raises:
        SparsecError: As `read_yaml`.
    """
    value, node = _yaml_document(path)
    return value, {} if node is None else dict(_yaml_lines(node, (), set()))


def _yaml_document(path: Path) -> tuple[Any, Any]:
    """The value in a file and the node it was made from.

    Raises:
        SparsecError: The file cannot be read, is no YAML, holds more than one document, a tag beyond plain data, a key
            that is repeated or no string, or an alias inside its own anchor. The message names file and line.
    """
    import yaml

    # The C loader is ten times as quick; it is missing where libyaml was.
    loader_type = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    text = _read_text(path)
    try:
        _check_yaml_depth(path, yaml.parse(text, Loader=loader_type))
        loader = loader_type(text)
        node = loader.get_single_node()
        _check_yaml_node(path, node)
        if node is None:
            return None, None
        # Making the value merges what is to be merged into the nodes.
        return loader.construct_document(node), node
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = ", ".join(part for part in (error.context, error.problem) if part)
        raise SparsecError(_at(path, mark.line + 1 if mark else None, what)) from None
    except yaml.YAMLError as error:
        raise SparsecError(_at(path, None, f"is no YAML: {error}")) from None
    except (ValueError, OverflowError) as error:
        raise SparsecError(_at(path, None, f"holds a value that YAML cannot mean: {error}")) from None


def _check_yaml_depth(path: Path, events: Iterable[Any]) -> None:
    """Raise if collections are nested too deeply: the C loader recurses for each, and would overflow the stack."""
    import yaml

    depth = 0
    for event in events:
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _YAML_MAX_DEPTH:
            raise SparsecError(_at(path, event.start_mark.line + 1, f"is nested deeper than {_YAML_MAX_DEPTH} levels"))


def _check_yaml_node(path: Path, root: Any) -> None:
    """Raise if a node contains itself, or a mapping has a repeated or non-string key. `root` is a yaml.Node or None."""
    finished: set[int] = set()
    open_nodes: set[int] = set()
    # Depth first with an explicit stack; a node comes by twice, the second time when all below it is done.
    stack = [(root, False)] if root is not None else []
    while stack:
        node, is_done = stack.pop()
        if is_done:
            open_nodes.discard(id(node))
            finished.add(id(node))
            continue
        if id(node) in finished or node.id == "scalar":
            continue
        if id(node) in open_nodes:
            raise SparsecError(_at(path, node.start_mark.line + 1, "an alias refers to the value it is part of"))
        open_nodes.add(id(node))
        stack.append((node, True))
        if node.id == "mapping":
            _check_yaml_keys(path, node)
        stack.extend((child, False) for child in _yaml_children(node))


def _yaml_lines(node: Any, place: tuple[str | int, ...], seen: set[int]) -> Iterator[tuple[tuple[str | int, ...], int]]:
    """Where each value below a node stands; what an alias stands for is told where it was first."""
    yield place, node.start_mark.line + 1
    if id(node) in seen or node.id == "scalar":
        return
    seen.add(id(node))
    for index, child in enumerate(node.value):
        if node.id == "sequence":
            yield from _yaml_lines(child, (*place, index), seen)
            continue
        key, value = child
        below = _yaml_lines(value, (*place, key.value), seen)
        # An entry stands where its key does.
        yield next(below)[0], key.start_mark.line + 1
        yield from below


def _yaml_children(node: Any) -> list[Any]:
    if node.id == "sequence":
        return list(node.value)
    return [value for _, value in node.value]


def _check_yaml_keys(path: Path, mapping: Any) -> None:
    seen: set[str] = set()
    for key, _ in mapping.value:
        line = key.start_mark.line + 1
        if key.tag == "tag:yaml.org,2002:merge":
            continue
        if key.tag != "tag:yaml.org,2002:str":
            raise SparsecError(_at(path, line, f"the key {key.value!r} is no string; put it in quotes"))
        if key.value in seen:
            raise SparsecError(_at(path, line, f"the key {key.value!r} is there a second time"))
        seen.add(key.value)


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        SparsecError: The file cannot be read or is no JSON; the message names file and line.
    """
    try:
        return json.loads(_read_text(path), parse_constant=_refuse_json_constant)
    except json.JSONDecodeError as error:
        raise SparsecError(_at(path, error.lineno, error.msg)) from None
    except (ValueError, RecursionError) as error:
        raise SparsecError(_at(path, None, str(error))) from None


class TextLine(NamedTuple):
    """One line of a file: its number, from 1, where it begins, and the line without its end."""

    number: int
    offset: int
    text: bytes


@dataclass(frozen=True, slots=True)
class JsonLine:
    """One line of a JSON Lines file.

    Attributes:
        number: From 1.
        text: The line, without its end.
        value: The object it holds, or None.
        problem: Why there is none, in one sentence that names file and line; "" where there is one.
    """

    number: int
    text: bytes
    value: dict[str, Any] | None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class JsonLines:
    """What a JSON Lines file held.

    Attributes:
        lines: Every line that is not blank, good or bad; the last one may be torn, and is then a bad one.
    """

    lines: tuple[JsonLine, ...]

    @property
    def rows(self) -> tuple[tuple[int, dict[str, Any]], ...]:
        """Line number and value of every line that is one JSON object."""
        return tuple((line.number, line.value) for line in self.lines if line.value is not None)

    @property
    def problems(self) -> tuple[str, ...]:
        """One sentence for every other line, a torn last line among them."""
        return tuple(line.problem for line in self.lines if line.value is None)


def read_json_lines(path: Path) -> JsonLines:
    """Every object in a JSON Lines file; a line that is none is reported, and does not spoil the others.

    Raises:
        SparsecError: The file cannot be read.
    """
    whole, unfinished = read_text_lines(path)
    lines = whole if unfinished is None else [*whole, unfinished]
    return JsonLines(tuple(parse_json_line(str(path), line.number, line.text) for line in lines))


def read_text_lines(path: Path, offset: int = 0, number: int = 1) -> tuple[list[TextLine], TextLine | None]:
    """The lines of a file that are not blank, and what follows the last line's end, which a writer may be at.

    Args:
        path: The file.
        offset: Where to begin: at the beginning of a line.
        number: The number of the line there.

    Raises:
        SparsecError: The file cannot be read.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            content = file.read()
    except OSError as error:
        raise SparsecError(f"cannot read {path} ({error.strerror})") from None
    lines = []
    for text in content.split(b"\n"):
        lines.append(TextLine(number, offset, text))
        number, offset = number + 1, offset + len(text) + 1
    last = lines.pop()
    return [line for line in lines if line.text.strip()], last if last.text.strip() else None


def parse_json_line(title: str, number: int, text: bytes) -> JsonLine:
    """A line of the file `title`, with the object it holds or what is wrong with it."""
    try:
        value = json.loads(text, parse_constant=_refuse_json_constant)
    except (ValueError, RecursionError) as error:
        return JsonLine(number, text, None, f"{title}:{number}: skipped, no JSON: {error}")
    if not isinstance(value, dict):
        what = f"skipped, a {type(value).__name__} where an object is needed"
        return JsonLine(number, text, None, f"{title}:{number}: {what}")
    return JsonLine(number, text, value)


def json_line(row: Mapping[str, object]) -> bytes:
    """One object as a line, without its end."""
    return json.dumps(row, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode()


def append_lines(path: Path, lines: Sequence[bytes]) -> None:
    """Add lines to the end of a file, in one write, so that concurrent writers do not mix their lines.

    When they do not all fit, none stays. Writers on several machines must hold the `entry_lock` of the file as well.

    Raises:
        SparsecError: The file cannot be written.
    """
    content = b"".join(line + b"\n" for line in lines)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            # A writer that died half-way left a torn line; ours must not become part of it.
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                content = b"\n" + content
            written = os.write(descriptor, content)
            if written != len(content) and os.fstat(descriptor).st_size == size + written:
                os.ftruncate(descriptor, size)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise SparsecError(f"cannot add a line to {path} ({error.strerror})") from None
    if written != len(content):
        raise SparsecError(f"cannot add a line to {path}: {written} of {len(content)} bytes fitted; is the disk full?")


def append_json_line(path: Path, row: Mapping[str, object]) -> None:
    """Add one object to the end of a JSON Lines file, as `append_lines` does.

    Raises:
        SparsecError: The file cannot be written.
    """
    append_lines(path, [json_line(row)])


def _refuse_json_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _read_text(path: Path) -> str:
    try:
        return _read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise SparsecError(_at(path, None, f"is no UTF-8 text: {error.reason} at byte {error.start}")) from None


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SparsecError(f"cannot read {path} ({error.strerror})") from None


def _at(path: Path, line: int | None, what: str) -> str:
    return f"{path}: {what}" if line is None else f"{path}:{line}: {what}"


def publish(path: Path, content: bytes) -> None:
    """Put `content` at `path` so that every reader, at any moment, finds the old file or the new one, and whole.

    The new file has mode 0600. When it cannot be written in full, `path` stays as it was and nothing else is left.

    Raises:
        SparsecError: The directory is missing or unwritable, or the disk is full.
    """
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_directory(path.parent)
    except OSError as error:
        raise SparsecError(f"cannot write {path} ({error.strerror}); nothing was left half written") from None


def _sync_directory(directory: Path) -> None:
    # Makes the rename itself survive a power cut.
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def entry_lock(path: Path, timeout_s: float = 600.0) -> Iterator[None]:
    """Hold the lock of one cache entry against other processes and threads of this user.

    The lock is the file `<path>.lock` beside the entry; the system releases it when its holder dies.

    Raises:
        SparsecError: The lock was not free within `timeout_s` seconds, or its file cannot be made.
    """
    import filelock

    lock_path = path.with_name(path.name + ".lock")
    lock = filelock.FileLock(lock_path, timeout=timeout_s, mode=0o600)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise SparsecError(
            f"{lock_path} was held by another process for {timeout_s:g} s; wait for that process or end it"
        ) from None
    except OSError as error:
        raise SparsecError(f"cannot make the lock {lock_path} ({error.strerror})") from None
    try:
        yield
    finally:
        lock.release()
