"""Job files: a fleet of masks and shapes in YAML becomes a list of jobs, and a list of what is wrong with it.

This file decides what a job file may say. A job that makes no sense is named with its file and line and spoils none of
the others. It must not know how anything is searched, and needs neither torch nor the device.

    about: what this fleet is
    device: nvidia-h100          # cpu by default
    defaults: {heads: 32, kv_heads: 8, head_dim: 128, dtype: [fp16, bf16]}
    jobs:
      - {name: mistral, mask: "window(4095, 0)", length: [8192, 32768], needs_grad: true}
      - {name: a graph, mask: graph.npz}

A list of lengths or dtypes makes one job of each combination. A mask is an expression, or a file beside this one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from sparsec import data
from sparsec.backends.base import DTYPES, MAX_HEAD_DIM, Problem
from sparsec.device import Device
from sparsec.device import device as named_device
from sparsec.errors import MaskError, SparsecError
from sparsec.masks import load, parse
from sparsec.masks.mask import BoundMask, Mask

_FILE_KEYS: Final = ("about", "device", "defaults", "jobs")
_COUNTS: Final = ("length", "kv_len", "heads", "kv_heads", "head_dim", "v_dim", "batch")
_KEYS: Final = ("name", "mask", *_COUNTS, "dtype", "needs_grad")
# What may be a list, to be multiplied out.
_VARIED: Final = ("length", "dtype")
_MASK_FILES: Final = (".yaml", ".yml", ".npz", ".mtx", ".npy")


@dataclass(frozen=True, slots=True)
class Entry:
    """One job of a file: one mask, one shape.

    Attributes:
        name: What the tables call it.
        mask: Which query attends which key, with its lengths.
        problem: The shape.
    """

    name: str
    mask: BoundMask
    problem: Problem

    def __str__(self) -> str:
        p = self.problem
        heads = f"{p.q_heads}" if p.q_heads == p.kv_heads else f"{p.q_heads}:{p.kv_heads}"
        return f"{self.name}, {p.q_len:,} tokens, {heads} heads, d{p.head_dim}, {p.dtype}"


@dataclass(frozen=True, slots=True)
class Fleet:
    """What a job file holds.

    Attributes:
        about: One line for a person.
        device: What it is for.
        entries: The jobs that make sense.
        problems: One sentence for each that does not, naming file and line.
    """

    about: str
    device: Device
    entries: tuple[Entry, ...]
    problems: tuple[str, ...]


class _BadJobError(Exception):
    """Something is wrong with a job: which key, and what."""

    def __init__(self, key: str, what: str) -> None:
        super().__init__(what)
        self.key = key


def read_jobs(path: Path, device: Device | None = None) -> Fleet:
    """The fleet in a file.

    Args:
        path: The file.
        device: In place of the one it names.

    Raises:
        SparsecError: The file cannot be read, is no YAML, or is no job file at all; names file and line.
    """
    document, lines = data.read_yaml_with_lines(path)
    if not isinstance(document, dict) or not isinstance(document.get("jobs"), list):
        raise SparsecError(f"{path}: a job file is a mapping with a list of `jobs`; see tools/jobs for some")
    for key in document:
        if key not in _FILE_KEYS:
            raise SparsecError(f"{path}:{lines[key,]}: a job file has no {key!r}; it has {', '.join(_FILE_KEYS)}")
    target = _device(path, document, lines) if device is None else device
    defaults = document.get("defaults", {})
    if not isinstance(defaults, dict):
        raise SparsecError(f"{path}:{lines['defaults',]}: `defaults` is a mapping of {', '.join(_KEYS)}")
    for key in defaults:
        if key not in _KEYS:
            raise SparsecError(f"{path}:{lines['defaults', key]}: {_unknown(key)}")
    entries: list[Entry] = []
    problems: list[str] = []
    for number, job in enumerate(document["jobs"]):
        try:
            entries += _entries(job, defaults, path.parent)
        except _BadJobError as error:
            line = lines.get(("jobs", number, error.key), lines["jobs", number])
            problems.append(f"{path}:{line}: {error}")
    return Fleet(str(document.get("about", "")), target, tuple(entries), tuple(problems))


def one_job(name: str, mask: Mask, shape: Mapping[str, Any]) -> list[Entry]:
    """The jobs of one mask, from the values a job in a file would have.

    Raises:
        SparsecError: They make no sense.
    """
    try:
        return [_entry(name, mask, each) for each in _varied(dict(shape))]
    except _BadJobError as error:
        raise SparsecError(f"{error}") from None


def _device(path: Path, document: Mapping[str, Any], lines: data.Lines) -> Device:
    name = document.get("device", "cpu")
    try:
        return named_device(str(name))
    except SparsecError as error:
        raise SparsecError(f"{path}:{lines.get(('device',), 1)}: {error}") from None


def _entries(job: object, defaults: Mapping[str, Any], folder: Path) -> Iterator[Entry]:
    if not isinstance(job, dict):
        raise _BadJobError("", f"a job is a mapping of {', '.join(_KEYS)}; this is {str(job)[:60]!r}")
    for key in job:
        if key not in _KEYS:
            raise _BadJobError(key, _unknown(key))
    said = {**defaults, **job}
    if not isinstance(said.get("mask"), str):
        raise _BadJobError("mask", "a job needs a `mask`: an expression, or a file beside this one")
    mask = _mask(said["mask"], folder)
    for each in _varied(said):
        yield _entry(str(said.get("name", said["mask"])), mask, each)


def _unknown(key: str) -> str:
    import difflib

    near = difflib.get_close_matches(key, _KEYS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"a job has {', '.join(_KEYS)}"
    return f"a job has no {key!r}; {hint}"


def _mask(text: str, folder: Path) -> Mask:
    try:
        return load(folder / text) if text.lower().endswith(_MASK_FILES) else parse(text)
    except (MaskError, SparsecError) as error:
        raise _BadJobError("mask", f"the mask {text!r} cannot be read: {error}") from None


def _varied(said: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One mapping for each combination of the values that are lists."""
    options = []
    for key in _VARIED:
        value = said.get(key)
        if isinstance(value, list) and not value:
            raise _BadJobError(key, f"`{key}` is an empty list")
        options.append(value if isinstance(value, list) else [value])
    for values in itertools.product(*options):
        yield said | dict(zip(_VARIED, values, strict=True))


def _entry(name: str, mask: Mask, said: Mapping[str, Any]) -> Entry:
    counts = {key: _count(key, said.get(key)) for key in _COUNTS}
    dtype = said.get("dtype") or "fp32"
    if dtype not in DTYPES:
        raise _BadJobError("dtype", f"dtype is {dtype!r}; sparsec takes {', '.join(DTYPES)}")
    needs_grad = said.get("needs_grad", False)
    if not isinstance(needs_grad, bool):
        raise _BadJobError("needs_grad", f"needs_grad is {needs_grad!r}; true or false is needed")
    try:
        bound = mask.bind(counts["length"], counts["kv_len"])
        heads = counts["heads"] or bound.n_heads or 1
        # A mask that is asked about its edges finds out what else does not fit.
        _check_members(bound, heads, counts["batch"])
    except MaskError as error:
        raise _BadJobError("length" if said.get("length") else "mask", str(error)) from None
    kv_heads, head_dim = counts["kv_heads"] or heads, counts["head_dim"] or 64
    if heads % kv_heads:
        raise _BadJobError("kv_heads", f"{heads} heads over {kv_heads} kv_heads: the first must be a multiple")
    v_dim = counts["v_dim"] or head_dim
    for key, dim in (("head_dim", head_dim), ("v_dim", v_dim)):
        if dim > MAX_HEAD_DIM:
            raise _BadJobError(key, f"{key} is {dim}; sparsec's kernels take 1 to {MAX_HEAD_DIM}")
    batch = counts["batch"] or bound.n_batch or 1
    problem = Problem(*bound.shape, heads, kv_heads, head_dim, v_dim, dtype, batch, needs_grad)
    return Entry(name, bound, problem)


def _check_members(bound: BoundMask, heads: int, batch: int | None) -> None:
    if bound.n_heads not in (None, heads):
        raise MaskError(f"the mask is of {bound.n_heads} heads, and the job has {heads}")
    if batch is not None and bound.n_batch not in (None, batch):
        raise MaskError(f"the mask is of {bound.n_batch} batch elements, and the job has {batch}")


def _count(key: str, value: object) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        _refuse(key, f"`{key}` is {value!r}; a whole number from 1 up is needed")
    return value


def _refuse(key: str, what: str) -> NoReturn:
    raise _BadJobError(key, what)
