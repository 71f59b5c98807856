"""Grids: a YAML file of declared work becomes a list of cases.

This file decides what a grid may say. Every mistake is named with its file and key before anything runs. It must not
know how a case is measured, and it loads no torch.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final, Literal, NoReturn, get_args

from bench.names import FAMILIES, TEMPLATES, family, is_peer
from sparsec import data, masks
from sparsec.errors import MaskError, SparsecError

Measure = Literal["attention", "planning", "first_call", "metadata", "upload", "update", "longest"]
Dtype = Literal["fp32", "fp16", "bf16"]
Direction = Literal["forward", "forward_backward"]
PlotKind = Literal["bars", "lines"]

GRIDS: Final = Path(__file__).resolve().parent / "grids"
_DATA: Final = Path(__file__).resolve().parent / "data"


class GridError(SparsecError, ValueError):
    """A grid that cannot mean what it says; names file and key."""


@dataclass(frozen=True, slots=True)
class MaskSource:
    """Where a mask comes from: the text of an expression, or what a mapping of the grid says.

    Attributes:
        kind: `text`, `file`, `documents`, `graph`, `packed`, `queries_of` (so many queries and keys of an expression)
            or `turns` (an expression that takes turns with another).
        text: The expression, the file's name, the CSV's name, or the kind of graph.
        options: What else was said: numbers, mostly.
    """

    kind: str
    text: str
    options: dict[str, int | float | str] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.kind == "text":
            return self.text
        options = ", ".join(f"{key} {value}" for key, value in self.options.items())
        return f"{self.kind} {self.text}" + (f" ({options})" if options else "")


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to measure: peers on one mask and one shape.

    Attributes:
        name: What the tables call it.
        measure: What is measured.
        mask: Whose edges.
        length: Tokens; None where the mask knows.
        heads: Query heads.
        kv_heads: Key and value heads; 0 stands for `heads`.
        head_dim: Of q, k, v and the output.
        batch: Batch elements.
        dtype: Of the tensors.
        direction: Forward only, or backward too.
        threads: Of the CPU; 0 stands for all that this process may use.
        peers: Who is measured.
        varied: The parameters of `vary` and what they are here.
    """

    name: str
    measure: Measure
    mask: MaskSource
    length: int | None = None
    heads: int = 1
    kv_heads: int = 0
    head_dim: int = 64
    batch: int = 1
    dtype: Dtype = "fp32"
    direction: Direction = "forward"
    threads: int = 0
    peers: tuple[str, ...] = ("ours",)
    varied: dict[str, int | float | str] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """Tells cases of a grid apart and stays the same between runs; `--only` matches it."""
        parts = [self.name, *(f"{key}={value}" for key, value in self.varied.items())]
        if self.measure != "attention":
            parts.insert(0, self.measure)
        if self.length is not None:
            parts.append(f"n{self.length}")
        if self.batch != 1:
            parts.append(f"b{self.batch}")
        parts.append(f"h{self.heads}" + (f"x{self.kv_heads}" if self.kv_heads not in (0, self.heads) else ""))
        parts += [f"d{self.head_dim}", self.dtype]
        if self.direction != "forward":
            parts.append(self.direction)
        if self.threads:
            parts.append(f"t{self.threads}")
        return "/".join(parts)


@dataclass(frozen=True, slots=True)
class Goal:
    """A figure that is aimed at; the report says whether it was met.

    Attributes:
        what: In words.
        value: `ratio:<peer or family of peers>`, or one of `GOAL_VALUES`.
        cases: Patterns of case ids; several cases count by their geometric mean, or make one slope.
        peer: Whose figure.
        at_least: The figure, or None.
        at_most: Likewise; with both, it must lie between them.
    """

    what: str
    value: str
    cases: tuple[str, ...]
    peer: str = "ours"
    at_least: float | None = None
    at_most: float | None = None


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to measure.

    Attributes:
        seconds: Of calls, for each peer of a case.
        min_repeats: Calls of each peer at least, however slow.
        max_repeats: Calls of each peer at most.
        settled_memory: Whether memory is that of a second preparation and call, in a process that has made its kernels,
            measurements and imports already.
    """

    seconds: float = 3.0
    min_repeats: int = 7
    max_repeats: int = 60
    settled_memory: bool = False


@dataclass(frozen=True, slots=True)
class Grid:
    """A declared grid.

    Attributes:
        name: Of the file.
        about: What it is for, in a sentence.
        cases: In the order they are run.
        goals: What is aimed at.
        effort: How long to measure.
        plot: How its results are drawn.
        x: What lines are drawn over: `length`, `threads`, `density`, `edges` or a parameter of `vary`.
    """

    name: str
    about: str
    cases: tuple[Case, ...]
    goals: tuple[Goal, ...] = ()
    effort: Effort = Effort()
    plot: PlotKind = "bars"
    x: str = "length"

    @property
    def digest(self) -> str:
        """Changes with anything that is measured or how; not with the words about it, nor with goals."""
        content = [asdict(self.effort), [asdict(case) for case in self.cases]]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


_GRID_KEYS: Final = ("about", "defaults", "cases", "goals", "effort", "plot", "x")
# Keys of a case that may be lists, each of which multiplies the cases.
_LISTED: Final = ("mask", "length", "heads", "kv_heads", "head_dim", "batch", "dtype", "direction", "threads")
_CASE_KEYS: Final = ("name", "measure", "peers", "vary", *_LISTED)
_CHOICES: Final = {
    "measure": get_args(Measure),
    "dtype": get_args(Dtype),
    "direction": get_args(Direction),
}
_PEERS_OF: Final[Mapping[str, tuple[str, ...]]] = {
    "attention": tuple(name for name in FAMILIES if name not in ("cold", "warm")),
    "planning": ("ours",),
    "first_call": ("cold", "warm"),
    "metadata": ("ours",),
    **dict.fromkeys(("upload", "update", "longest"), ("ours",)),
}
# What can be measured where.
ON_CPU: Final = ("attention", "planning", "first_call", "metadata")
ON_GPU: Final = ("attention", "upload", "update", "longest")
_COUNTS: Final = {"length": 1, "heads": 1, "kv_heads": 0, "head_dim": 1, "batch": 1, "threads": 0}
# Options of each kind of mask that is no expression; the first is what it is named by.
_SOURCES: Final[Mapping[str, tuple[str, ...]]] = {
    "file": (),
    "documents": ("column", "total"),
    "graph": ("nodes", "degree", "rewired", "seed"),
    "packed": ("block", "count", "mean", "max", "seed"),
    "queries_of": ("queries", "keys"),
    "turns": ("other",),
}
# Slopes are those of a straight line through the logarithms of length and time or memory.
SLOPES: Final = ("slope:time", "slope:memory")
GOAL_VALUES: Final = (
    *("share_of_peak", "median_ms", "metadata_share", "backward_over_forward"),
    *("tflops", "edge_tb_s", "gather_share", "tokens", *SLOPES),
)
GRAPHS: Final = ("power_law", "small_world", "mesh", "bipartite")


def find_grid(name: str) -> Path:
    """The file of a grid: a path, or the name of one that is shipped.

    Raises:
        GridError: There is none.
    """
    for path in (Path(name), GRIDS / f"{name}.yaml"):
        if path.is_file():
            return path
    shipped = sorted(path.stem for path in GRIDS.glob("*.yaml"))
    raise GridError(f"there is no grid {name!r}: it is no file, and the grids are {', '.join(shipped)}")


def load_grid(path: Path) -> Grid:
    """The grid in a file.

    Raises:
        GridError: Anything in it that is not understood; names file and key.
    """
    return _Reader(path).grid()


def data_file(name: str, beside: Path | None = None) -> Path:
    """A data file by name: beside the grid, shipped with the benchmarks, or with sparsec's demo.

    Raises:
        GridError: There is none.
    """
    package = Path(data.__file__).parent
    folders = [*([beside] if beside else []), _DATA, package / "demo_data", package / "_data" / "demo_data"]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise GridError(f"there is no file {name!r} in {', '.join(map(str, folders))}")


class _Reader:
    def __init__(self, path: Path) -> None:
        self.path = path

    def grid(self) -> Grid:
        content = data.read_yaml(self.path)
        self.check_keys(content, _GRID_KEYS, "the grid")
        defaults = content.get("defaults") or {}
        self.check_keys(defaults, [key for key in _CASE_KEYS if key not in ("name", "mask", "vary")], "defaults")
        entries = content.get("cases")
        if not isinstance(entries, list) or not entries:
            self.refuse("cases", "must be a list of at least one case")
        cases = [case for index, entry in enumerate(entries) for case in self.cases(entry, defaults, f"cases[{index}]")]
        seen: set[str] = set()
        for case in cases:
            if case.id in seen:
                self.refuse("cases", f"two cases are called {case.id!r}; give one another name")
            seen.add(case.id)
        plot = content.get("plot", "bars")
        self.check_choice("plot", plot, get_args(PlotKind))
        return Grid(
            self.path.stem,
            str(content.get("about", "")),
            tuple(cases),
            self.goals(content.get("goals") or []),
            self.effort(content.get("effort") or {}),
            plot,
            str(content.get("x", "length")),
        )

    def cases(self, entry: object, defaults: dict[str, Any], where: str) -> Iterator[Case]:
        self.check_keys(entry, _CASE_KEYS, where)
        assert isinstance(entry, dict)
        # Default peers are those of attention.
        kept = {key: value for key, value in defaults.items() if key != "peers" or "measure" not in entry}
        said = {**kept, **entry}
        if "mask" not in said:
            self.refuse(f"{where}.mask", "is missing; give an expression, such as window(255, 0)")
        vary = said.get("vary") or {}
        if not isinstance(vary, dict) or not all(isinstance(values, list) and values for values in vary.values()):
            self.refuse(f"{where}.vary", "must map names to lists of values")
        measure = said.get("measure", "attention")
        self.check_choice(f"{where}.measure", measure, _CHOICES["measure"])
        peers = said["peers"] if "peers" in said else list(_PEERS_OF[measure]) if measure == "first_call" else ["ours"]
        peers = peers if isinstance(peers, list) else [peers]
        for peer in peers:
            if not is_peer(peer):
                known = [*FAMILIES, *(f"ours:{template}" for template in TEMPLATES)]
                self.refuse(f"{where}.peers", f"there is no peer {peer!r}{_nearest(str(peer), known)}")
        for peer in peers:
            if family(peer) not in _PEERS_OF[measure]:
                self.refuse(f"{where}.peers", f"{peer!r} is no peer of {measure}{_nearest(peer, _PEERS_OF[measure])}")
        lists = [[(key, value) for value in _listed(said[key])] for key in _LISTED if key in said]
        varied = [[(key, value) for value in values] for key, values in vary.items()]
        for chosen in itertools.product(*varied):
            for combination in itertools.product(*lists):
                values = dict(combination)
                for key, value in values.items():
                    self.check_value(f"{where}.{key}", key, value)
                mask = self.mask(values.pop("mask"), {**dict(chosen), "length": values.get("length")}, where)
                case = Case(
                    name=str(said.get("name", mask)),
                    measure=measure,
                    mask=mask,
                    peers=tuple(peers),
                    varied=dict(chosen),
                    **values,
                )
                if case.kv_heads and case.heads % case.kv_heads:
                    self.refuse(f"{where}.kv_heads", f"{case.heads} heads are no multiple of {case.kv_heads}")
                yield case

    def mask(self, said: object, parameters: dict[str, Any], where: str) -> MaskSource:
        key = f"{where}.mask"
        filled = self.filled(said, parameters, key)
        if isinstance(filled, str):
            try:
                masks.parse(filled)
            except MaskError as error:
                self.refuse(key, str(error))
            return MaskSource("text", filled)
        if not isinstance(filled, dict):
            self.refuse(key, f"must be an expression or a mapping; it is a {type(filled).__name__}")
        kinds = [name for name in _SOURCES if name in filled]
        if len(kinds) != 1:
            self.refuse(key, f"must say one of {', '.join(_SOURCES)}; it says {', '.join(map(repr, filled))}")
        kind, text = kinds[0], str(filled[kinds[0]])
        self.check_keys(filled, (kind, *_SOURCES[kind]), key)
        options = {name: filled[name] for name in _SOURCES[kind] if name in filled}
        if kind in ("file", "documents"):
            try:
                data_file(text, self.path.parent)
            except GridError as error:
                self.refuse(f"{key}.{kind}", str(error))
        if kind == "graph":
            self.check_choice(f"{key}.graph", text, GRAPHS)
        expressions = {kind: text} if kind in ("packed", "queries_of", "turns") else {}
        if kind == "turns":
            expressions["other"] = str(options.get("other", ""))
        for name, expression in expressions.items():
            try:
                masks.parse(expression)
            except MaskError as error:
                self.refuse(f"{key}.{name}", str(error))
        whole = {"documents": ("total",), "graph": ("nodes",), "turns": ()}
        needed = whole.get(kind, () if kind == "file" else _SOURCES[kind])
        for name in needed:
            if not isinstance(options.get(name), int):
                self.refuse(f"{key}.{name}", "must be a whole number")
        return MaskSource(kind, text, options)

    def filled(self, value: object, parameters: dict[str, Any], key: str) -> object:
        """`value` with `{name}` replaced by the parameters of this case."""
        if isinstance(value, dict):
            return {name: self.filled(each, parameters, key) for name, each in value.items()}
        if not isinstance(value, str):
            return value

        def parameter(match: re.Match[str]) -> str:
            if parameters.get(match[1]) is None:
                self.refuse(key, f"{{{match[1]}}} is no parameter{_nearest(match[1], list(parameters))}")
            return str(parameters[match[1]])

        text = re.sub(r"\{(\w+)\}", parameter, value)
        return int(text) if text != value and re.fullmatch(r"\d+", text) else text

    def goals(self, said: object) -> tuple[Goal, ...]:
        if not isinstance(said, list):
            self.refuse("goals", "must be a list")
        goals = []
        for index, entry in enumerate(said):
            where = f"goals[{index}]"
            self.check_keys(entry, [item.name for item in fields(Goal)], where)
            for key in ("what", "value", "cases"):
                if key not in entry:
                    self.refuse(f"{where}.{key}", "is missing")
            value = entry["value"]
            kind, _, rival = str(value).partition(":")
            if not (kind == "ratio" and is_peer(rival)):
                known = (*(f"ratio:{family}" for family in FAMILIES), *GOAL_VALUES)
                self.check_choice(f"{where}.value", value, known)
            if "peer" in entry and not is_peer(entry["peer"]):
                self.refuse(f"{where}.peer", f"there is no peer {entry['peer']!r}")
            if not entry.keys() & {"at_least", "at_most"}:
                self.refuse(where, "must say at_least or at_most")
            goals.append(Goal(**{**entry, "cases": tuple(_listed(entry["cases"]))}))
        return tuple(goals)

    def effort(self, said: object) -> Effort:
        self.check_keys(said, [item.name for item in fields(Effort)], "effort")
        assert isinstance(said, dict)
        for key, value in said.items():
            if key == "settled_memory":
                if not isinstance(value, bool):
                    self.refuse(f"effort.{key}", f"must be true or false; it is {value!r}")
            elif isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
                self.refuse(f"effort.{key}", f"must be a number above 0; it is {value!r}")
        return replace(Effort(), **said)

    def check_value(self, where: str, key: str, value: object) -> None:
        if key == "length" and value is None:
            # The mask knows.
            return
        if key in _CHOICES:
            self.check_choice(where, value, _CHOICES[key])
        elif key in _COUNTS and (isinstance(value, bool) or not isinstance(value, int) or value < _COUNTS[key]):
            self.refuse(where, f"must be a whole number of at least {_COUNTS[key]}; it is {value!r}")

    def check_choice(self, where: str, value: object, choices: tuple[str, ...]) -> None:
        if value not in choices:
            self.refuse(where, f"is {value!r}{_nearest(str(value), choices)}")

    def check_keys(self, content: object, known: Any, where: str) -> None:
        if not isinstance(content, dict):
            self.refuse(where, f"must be a mapping; it is a {type(content).__name__}")
        for key in content:
            if key not in known:
                self.refuse(f"{where}.{key}", f"is not known{_nearest(key, known)}")

    def refuse(self, where: str, what: str) -> NoReturn:
        raise GridError(f"{self.path}: {where} {what}")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _nearest(word: str, known: Any) -> str:
    near = difflib.get_close_matches(word, list(known), n=2)
    return f"; did you mean {' or '.join(near)}?" if near else f"; there are {', '.join(map(str, known))}"
