"""Compiled attentions as files: the mask, what `compile` was told, and what was chosen for each signature.

This file decides what such a file holds and when a saved choice is taken up again. A file is a zip archive of plain
members: `header.json`, one `.npy` for each array, and the digest of the header, which itself lists the digests of the
arrays. Nothing is compressed, unpickled or run; kernels are never in it. It must not know how plans are made.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import zipfile
from dataclasses import asdict, fields, replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, get_args

import numpy as np
import numpy.typing as npt

from sparsec import data
from sparsec.backends.base import DTYPES, Problem
from sparsec.cost import estimate
from sparsec.device import Device
from sparsec.errors import MaskError, RecordError, SparsecError, UnsupportedError
from sparsec.layout import EdgeOrder
from sparsec.masks import from_csr, parse, per_batch, per_head, ranges
from sparsec.masks.mask import BoundMask, Mask
from sparsec.planner import Group, Plan, Step, plan
from sparsec.planner.plans import Reorder
from sparsec.planner.works import build_work, span_of
from sparsec.request import Request, Tune, torch_device
from sparsec.runtime import Attention
from sparsec.score import ScoreMod, as_score_mod
from sparsec.template import Config, templates
from sparsec.tensors import Layout

if TYPE_CHECKING:
    from sparsec.expr import Expr
    from sparsec.score import ScoreFunction

logger = logging.getLogger(__name__)

FORMAT: Final = "sparsec attention"
SCHEMA: Final = 1
# Masks whose expression is longer are written as edges.
_MAX_TEXT = 1 << 16
_MAX_EDGES = 1 << 28

Arrays = dict[str, npt.NDArray[Any]]
# Values of a JSON header, as json gives them: checked where they are read.
Json = dict[str, Any]


def save(attention: Attention, path: str | os.PathLike[str]) -> None:
    """Writes an attention to a file, whole or not at all.

    Args:
        attention: With as many signatures as it has met.
        path: In a directory that exists.

    Raises:
        UnsupportedError: The mask is neither an expression that reads back nor a list of edges.
        SparsecError: The file cannot be written.
    """
    bound, request = attention.bound, attention.request
    arrays: Arrays = {}
    header = {
        "format": FORMAT,
        "schema": SCHEMA,
        "shape": list(bound.shape),
        "mask": _mask_entry(bound, request, arrays),
        "request": {f.name: getattr(request, f.name) for f in fields(request) if f.name != "score"},
        "score": None if request.score is None else request.score.digest,
        "plans": [_plan_entry(problem, device, made) for problem, device, made in attention.plans()],
    }
    members = {f"{name}.npy": _npy(array) for name, array in arrays.items()}
    header["arrays"] = {name: _sha256(content) for name, content in members.items()}
    members["header.json"] = json.dumps(header, indent=1, allow_nan=False).encode()
    members["digest"] = _sha256(members["header.json"]).encode()
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as writer:
        for name, content in members.items():
            # A fixed date: equal attentions are equal files.
            writer.writestr(zipfile.ZipInfo(name), content)
    data.publish(Path(path), archive.getvalue())


def load(path: str | os.PathLike[str], *, score_mod: ScoreMod | Expr | ScoreFunction | None = None) -> Attention:
    """The attention in a file that `Attention.save` wrote.

    A saved choice is taken up where device and template sources are the same; else a plan is made again, and its
    `config_source` says why.

    Args:
        path: The file.
        score_mod: The modifier it was compiled with: functions are not saved, and the same one must be given again.

    Raises:
        RecordError: There is no such file; it is truncated, tampered with, or of another version; or `score_mod` is
            not the one it was compiled with.
    """
    file = Path(path)
    header, arrays = _read(file)
    score = None if score_mod is None else as_score_mod(score_mod)
    try:
        wanted = header["score"]
        if wanted != (None if score is None else score.digest):
            _refuse(
                file,
                "it was compiled "
                + ("without a score_mod: leave it out" if wanted is None else "with a score_mod, and this is another")
                + ("; functions are not saved: give load the same score_mod" if wanted is not None else ""),
            )
        q_len, kv_len = (_int(length) for length in header["shape"])
        bound = _mask_of(header["mask"], arrays).bind(q_len, kv_len)
        attention = Attention(bound, _request_of(header["request"], score))
        entries = [_checked_plan(entry) for entry in header["plans"]]
        made = [
            (problem, where, _taken_up(entry, bound, problem, device, attention.request))
            for problem, where, entry in entries
            if (device := _found(file, where)) is not None
        ]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        # MaskError is a ValueError too: a mask that cannot be is a damaged file.
        if isinstance(error, RecordError):
            raise
        _refuse(file, f"its content makes no sense ({type(error).__name__}: {error})")
    for each in made:
        attention.install(*each)
    return attention


def _found(file: Path, name: str) -> Device | None:
    """The device of that name, where there is one."""
    try:
        return torch_device(name)
    except SparsecError as error:
        logger.warning("%s holds a plan for %s, which is not here (%s); it is left out", file, name, error)
        return None


# The archive.


def _read(file: Path) -> tuple[Json, Arrays]:
    """Header and arrays, after every digest was found right."""
    if not file.is_file():
        raise RecordError(f"load({str(file)!r}): there is no such file")
    try:
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
            if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
                _refuse(file, "it has compressed members, which sparsec never writes")
            members = {info.filename: archive.read(info) for info in infos}
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
        if isinstance(error, RecordError):
            raise
        _refuse(file, f"it is truncated or no such file ({error})")
    try:
        header = json.loads(members["header.json"])
        kind, schema = header["format"], header["schema"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        _refuse(file, f"it has no header of sparsec's ({type(error).__name__}: {error})")
    if kind != FORMAT or schema != SCHEMA:
        raise RecordError(
            f"load({str(file)!r}): it is {kind!r} of schema {schema!r}, and this sparsec reads {FORMAT!r} of schema "
            f"{SCHEMA}: compile and save again with this version"
        )
    if not isinstance(header.get("arrays"), dict):
        _refuse(file, f"its header lists no arrays (arrays = {header.get('arrays')!r})")
    expected = {"header.json", "digest", *header["arrays"]}
    if members.keys() != expected or len(infos) != len(expected):
        _refuse(file, f"its members are {', '.join(sorted(members))} where {', '.join(sorted(expected))} belong")
    found = {name: _sha256(content) for name, content in members.items()}
    if members["digest"] != found["header.json"].encode():
        _refuse(file, "its header is not what was written")
    changed = [name for name, digest in header["arrays"].items() if found[name] != digest]
    if changed:
        _refuse(file, f"{', '.join(changed)} are not what was written")
    try:
        arrays = {
            name.removesuffix(".npy"): np.load(io.BytesIO(members[name]), allow_pickle=False)
            for name in header["arrays"]
        }
    except (ValueError, EOFError) as error:
        _refuse(file, f"an array cannot be read ({error})")
    return header, arrays


def _refuse(file: Path, what: str) -> NoReturn:
    raise RecordError(f"load({str(file)!r}): {what}; the file is damaged or was changed: save it again")


def _npy(array: npt.NDArray[Any]) -> bytes:
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    return content.getvalue()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# The mask.


def _mask_entry(bound: BoundMask, request: Request, arrays: Arrays) -> Json:
    text = repr(bound.mask)
    if len(text) <= _MAX_TEXT and _reads_back(text, bound):
        return {"text": text}
    if not (bound.varies_by_head or bound.varies_by_batch):
        return _edges_entry(bound, arrays)
    n_heads = bound.n_heads or request.q_heads
    if bound.varies_by_head and not bound.varies_by_batch and n_heads is not None:
        return {"per_head": [_mask_entry(bound.select(0, h), request, arrays) for h in range(n_heads)]}
    if bound.varies_by_batch and not bound.varies_by_head and bound.n_batch is not None:
        return {"per_batch": [_mask_entry(bound.select(b, 0), request, arrays) for b in range(bound.n_batch)]}
    raise UnsupportedError(
        f"the mask {bound.mask} cannot be saved: it differs by head and batch element in a way that has no list of "
        "members; compile it from per_head or per_batch"
    )


def _reads_back(text: str, bound: BoundMask) -> bool:
    try:
        return parse(text).bind(*bound.shape).digest == bound.digest
    except MaskError:
        return False


def _edges_entry(bound: BoundMask, arrays: Arrays) -> Json:
    if bound.nnz > _MAX_EDGES:
        raise UnsupportedError(
            f"the mask {bound.mask} cannot be saved: its expression does not read back as text, and its {bound.nnz:,} "
            f"edges are more than {_MAX_EDGES:,}"
        )
    number = len(arrays) // 2
    indptr = np.concatenate(([0], np.cumsum(bound.degrees("q")))).astype(np.int64)
    arrays[f"indptr_{number}"], arrays[f"indices_{number}"] = indptr, ranges.to_edges(bound.rows())[1]
    return {"edges": number, "kv_len": bound.kv_len}


def _mask_of(entry: Json, arrays: Arrays) -> Mask:
    _check("mask", entry, isinstance(entry, dict))
    (kind,) = entry.keys() - {"kv_len"}
    if kind == "text":
        return parse(entry["text"])
    if kind == "edges":
        number = _int(entry["edges"])
        return from_csr(arrays[f"indptr_{number}"], arrays[f"indices_{number}"], _int(entry["kv_len"]))
    members = [_mask_of(member, arrays) for member in entry[kind]]
    return {"per_head": per_head, "per_batch": per_batch}[kind](members)


# What compile was told.

_OPTIONAL_INTS = ("q_heads", "kv_heads", "head_dim", "v_dim")
_OPTIONAL_TEXTS = ("device", "backend", "template")
_CHOICES: Final = {"layout": get_args(Layout), "tune": get_args(Tune), "reorder": get_args(Reorder)}


def _request_of(entry: Json, score: ScoreMod | None) -> Request:
    for name in _OPTIONAL_INTS:
        _check(name, entry[name], entry[name] is None or (_is_int(entry[name]) and entry[name] >= 1))
    for name in _OPTIONAL_TEXTS:
        _check(name, entry[name], entry[name] is None or isinstance(entry[name], str))
    for name, choices in _CHOICES.items():
        _check(name, entry[name], entry[name] in choices)
    _check("dtype", entry["dtype"], entry["dtype"] in (None, *DTYPES))
    _check("needs_grad", entry["needs_grad"], entry["needs_grad"] in (None, True, False))
    _check("scale", entry["scale"], entry["scale"] is None or isinstance(entry["scale"], int | float))
    return Request(**entry, score=score)


def _check(name: str, value: object, is_right: bool) -> None:
    if not is_right:
        raise ValueError(f"{name} = {value!r}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _int(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{value!r} where an int belongs")
    return value


# Plans.


def _plan_entry(problem: Problem, device: str, made: Plan) -> Json:
    return {
        "problem": asdict(problem),
        "device": device,
        "device_key": made.device.key,
        "groups": [
            {
                "heads": list(group.heads),
                "batch": list(group.batch),
                "steps": [_step_entry(step) for step in group.steps],
            }
            for group in made.groups
        ],
    }


def _step_entry(step: Step) -> Json:
    launch = step.launch
    return {
        "template": launch.template.name,
        "source_digest": launch.template.source_digest,
        "backend": launch.backend,
        "config": launch.config.to_dict(),
        "ordering": launch.work.ordering.name,
        "is_partial": launch.is_partial,
    }


def _checked_plan(entry: Json) -> tuple[Problem, str, Json]:
    problem = Problem(**entry["problem"])
    for f in fields(Problem):
        value = getattr(problem, f.name)
        is_flag = f.name in ("needs_grad", "has_score_mod")
        is_right = isinstance(value, bool) if is_flag else value in DTYPES if f.name == "dtype" else _is_int(value)
        _check(f.name, value, is_right)
    _check("device", entry["device"], isinstance(entry["device"], str))
    for group in entry["groups"]:
        for step in group["steps"]:
            _check("step", step, isinstance(step, dict) and isinstance(step["config"], dict))
            for key in ("template", "backend", "ordering"):
                _check(key, step[key], isinstance(step[key], str))
            _check("config", step["config"], all(_is_int(value) for value in step["config"].values()))
            _check(
                "keys", sorted(step), {"template", "source_digest", "backend", "ordering", "is_partial"} <= step.keys()
            )
    return problem, entry["device"], entry


def _taken_up(entry: Json, bound: BoundMask, problem: Problem, device: Device, request: Request) -> Plan:
    """The saved choices where they still hold; else what the planner says, with the reason."""
    steps = [step for group in entry["groups"] for step in group["steps"]]
    reason = _mismatch(entry, steps, device)
    # Naming what all launches share spares the planner the others; a mixture is found again among all.
    names, servers = ({step[key] for step in steps} for key in ("template", "backend"))
    is_one = reason is None and all(len(group["steps"]) == 1 for group in entry["groups"])
    made = plan(
        bound,
        problem,
        device,
        template=names.pop() if is_one and len(names) == 1 else request.template,
        backend=servers.pop() if is_one and len(servers) == 1 else request.backend,
        reorder=request.reorder,
        scale=request.scale,
        score=request.score,
        tune="off" if request.tune == "off" else "cached",
    )
    if reason is None and [_shape(group) for group in map(_group_entry, made.groups)] != [
        _shape(group) for group in entry["groups"]
    ]:
        reason = "the planner no longer splits or orders the mask as it did"
    if reason is None:
        pairs = zip(made.groups, entry["groups"], strict=True)
        chosen = [_with_configs(group, saved, problem, device) for group, saved in pairs]
        if None not in chosen:
            return replace(made, groups=tuple(group for group in chosen if group is not None))
        reason = "a saved configuration is no longer legal"
    logger.info("the saved plan for %s is not taken up: %s", device.name, reason)
    source = f"cost model; the saved plan is not taken up: {reason}"
    return replace(made, groups=tuple(replace(group, config_source=source) for group in made.groups))


def _mismatch(entry: Json, steps: list[Json], device: Device) -> str | None:
    if entry["device_key"] != device.key:
        return f"it was made on {entry['device_key']}, and this is {device.key}"
    for step in steps:
        known = templates().get(step["template"])
        if known is None or known.source_digest != step["source_digest"]:
            return f"the sources of {step['template']} have changed"
    return None


def _group_entry(group: Group) -> Json:
    return {
        "heads": list(group.heads),
        "batch": list(group.batch),
        "steps": [_step_entry(step) for step in group.steps],
    }


def _shape(group: Json) -> tuple[object, ...]:
    """What of a saved group a configuration does not change."""
    same = ("template", "backend", "ordering", "is_partial")
    return group["heads"], group["batch"], [tuple(step[key] for key in same) for step in group["steps"]]


def _with_configs(group: Group, saved: Json, problem: Problem, device: Device) -> Group | None:
    """The group with the saved configurations, or None where one is not legal."""
    steps: list[Step] = []
    for step, entry in zip(group.steps, saved["steps"], strict=True):
        launch = step.launch
        config = Config(tuple(entry["config"].items()))
        if config == launch.config:
            steps.append(step)
            continue
        if launch.template.violation(launch.backend, config) is not None:
            return None
        work = build_work(
            launch.template,
            config,
            launch.work.bound,
            problem,
            device,
            heads=len(group.heads),
            ordering=launch.work.ordering,
            span_keys=span_of(group.profile),
            edges=None if launch.work.numbers is None else EdgeOrder(launch.work.numbers.mask),
        )
        cost = estimate(work, problem, device, len(group.heads))
        steps.append(replace(step, launch=replace(launch, config=config, work=work), estimate=cost))
    total = reduce(lambda a, b: a + b, (step.estimate for step in steps))
    return replace(group, steps=tuple(steps), estimate=total, config_source="saved file")
