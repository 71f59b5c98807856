"""Templates: the ways attention can be computed, each a folder of `templates/`.

This file decides what a template declares (its layout, its tunables for each back end, its constraints) and which
configurations are legal. It must not know what a configuration costs, nor how a kernel is compiled.
"""

from __future__ import annotations

import ast
import hashlib
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal

from sparsec import data
from sparsec.errors import SparsecError

LayoutKind = Literal["rows", "tiles", "hybrid", "none"]

# The file that holds a template's kernels for each back end.
KERNEL_FILES: Final[Mapping[str, str]] = {
    "cpu": "kernel_cpu.cpp",
    "triton": "kernel_triton.py",
    "cuda": "kernel_cuda.cu",
}


@dataclass(frozen=True, slots=True)
class Config:
    """Values of a template's tunables, hashable and in the order they were declared."""

    items: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, **values: int) -> Config:
        return cls(tuple(values.items()))

    def __getitem__(self, name: str) -> int:
        return dict(self.items)[name]

    def get(self, name: str, default: int) -> int:
        return dict(self.items).get(name, default)

    def to_dict(self) -> dict[str, int]:
        return dict(self.items)

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.items) or "(nothing to tune)"


@dataclass(frozen=True, slots=True)
class Tunable:
    """One launch parameter: its values, its default, and what it means."""

    name: str
    values: tuple[int, ...]
    default: int
    meaning: str


@dataclass(frozen=True, slots=True)
class Constraint:
    """What a configuration must satisfy, and why; `backend` None means all."""

    require: str
    because: str
    backend: str | None

    def holds(self, names: Mapping[str, int]) -> bool:
        return bool(_evaluate(_parsed(self.require), names))

    @property
    def names(self) -> frozenset[str]:
        """The tunables it speaks of."""
        return frozenset(node.id for node in ast.walk(_parsed(self.require)) if isinstance(node, ast.Name))


@dataclass(frozen=True, slots=True)
class Template:
    """One folder of `templates/`.

    Attributes:
        name: The folder's name.
        summary: One line for a person.
        layout: Which index arrays its kernels walk.
        tunables: By back end.
        constraints: Checked by `violation`.
        declared_backends: Back ends that serve it without a kernel of ours.
        forward_only: Back ends whose kernels have no backward pass.
        without_edge_numbers: Back ends whose kernels tell a score modifier no numbers of edges.
        folder: Where the sources are.
        source_digest: Of everything its kernels are compiled from, on any back end.
        backend_digests: Of what the kernels of one back end are compiled from, by back end.
    """

    name: str
    summary: str
    layout: LayoutKind
    tunables: Mapping[str, tuple[Tunable, ...]]
    constraints: tuple[Constraint, ...]
    declared_backends: tuple[str, ...]
    forward_only: tuple[str, ...]
    without_edge_numbers: tuple[str, ...]
    folder: Path
    source_digest: str
    backend_digests: Mapping[str, str]

    def backends(self) -> tuple[str, ...]:
        """The back ends that can serve this template."""
        own = tuple(name for name, file in KERNEL_FILES.items() if (self.folder / file).is_file())
        return own + self.declared_backends

    def has_backward(self, backend: str) -> bool:
        """Whether a back end that serves this template computes gradients too."""
        return backend not in self.forward_only

    def counts_edges(self, backend: str) -> bool:
        """Whether a back end that serves this template tells a score modifier the numbers of edges."""
        return backend not in self.without_edge_numbers

    def kernel_path(self, backend: str) -> Path:
        """The file of its kernel; of a back end without files of its own, the folder."""
        return self.folder / KERNEL_FILES.get(backend, "")

    def digest_of(self, backend: str) -> str:
        """Digest of what its kernels on a back end are compiled from; a record made with other sources is not served.

        `template.yaml` is not in it: a record whose configuration is no longer legal is not served either.
        """
        return self.backend_digests.get(backend, self.name)

    def config_of(self, backend: str, values: Mapping[str, int]) -> Config | None:
        """The legal configuration with these values, in the order of declaration; None where there is none."""
        config = Config(tuple((t.name, values[t.name]) for t in self.tunables_of(backend) if t.name in values))
        is_whole = len(config.items) == len(values)
        return config if is_whole and self.violation(backend, config) is None else None

    def default(self, backend: str) -> Config:
        return Config(tuple((t.name, t.default) for t in self.tunables_of(backend)))

    def tunables_of(self, backend: str) -> tuple[Tunable, ...]:
        """What can be set; the reference, which has no kernels, is planned like a CPU."""
        return self.tunables.get("cpu" if backend == "reference" else backend, ())

    def configs(self, backend: str) -> Iterator[Config]:
        """Every legal configuration, the default first."""
        first = self.default(backend)
        yield first
        told: list[tuple[tuple[str, int], ...]] = [()]
        for tunable in self.tunables_of(backend):
            told = [(*items, (tunable.name, value)) for items in told for value in tunable.values]
            # Whatever speaks of this tunable and of no later one cuts off all that would follow.
            names = {name for name, _ in told[0]} if told else set()
            for each in self.constraints:
                if each.backend in (None, backend) and tunable.name in each.names <= names:
                    told = [items for items in told if each.holds(dict(items))]
        for items in told:
            if items != first.items:
                yield Config(items)

    def violation(self, backend: str, config: Config) -> str | None:
        """Why `config` is illegal, in one sentence, or None."""
        tunables = {t.name: t for t in self.tunables_of(backend)}
        values = config.to_dict()
        if values.keys() != tunables.keys():
            return f"{self.name} on {backend} takes {', '.join(tunables) or 'no parameters'}; got {config}"
        for name, value in values.items():
            if value not in tunables[name].values:
                return f"{name}={value} is none of {', '.join(map(str, tunables[name].values))}"
        for constraint in self.constraints:
            if constraint.backend in (None, backend) and not constraint.holds(values):
                return f"{config} breaks {constraint.require}: {constraint.because}"
        return None


@cache
def templates() -> Mapping[str, Template]:
    """All templates by name, in alphabetical order."""
    root = data.templates_dir()
    shared = sorted(path for path in (root / "shared").glob("*") if path.is_file())
    folders = sorted(path.parent for path in root.glob("*/template.yaml"))
    return {folder.name: _read(folder, shared) for folder in folders}


def template(name: str) -> Template:
    """The template of that name.

    Raises:
        SparsecError: There is none.
    """
    found = templates().get(name)
    if found is None:
        raise SparsecError(f"there is no template {name!r}; the templates are {', '.join(templates())}")
    return found


def _read(folder: Path, shared: list[Path]) -> Template:
    declared = data.read_yaml(folder / "template.yaml")
    tunables = {
        backend: tuple(
            Tunable(name, tuple(entry["values"]), int(entry["default"]), str(entry["meaning"]))
            for name, entry in entries.items()
        )
        for backend, entries in declared.get("tunables", {}).items()
    }
    constraints = tuple(
        Constraint(entry["require"], entry["because"], entry.get("backend"))
        for entry in declared.get("constraints", ())
    )
    for constraint in constraints:
        _check(constraint, tunables, folder / "template.yaml")
    sources = [*sorted(path for path in folder.iterdir() if path.suffix in _SOURCE_SUFFIXES), *shared]
    return Template(
        name=str(declared["name"]),
        summary=str(declared["summary"]),
        layout=declared["layout"],
        tunables=tunables,
        constraints=constraints,
        declared_backends=tuple(declared.get("backends", ())),
        forward_only=tuple(declared.get("forward_only", ())),
        without_edge_numbers=tuple(declared.get("without_edge_numbers", ())),
        folder=folder,
        source_digest=_digest(sources),
        backend_digests={
            backend: _digest([path for path in sources if path.suffix in suffixes])
            for backend, suffixes in _BACKEND_SUFFIXES.items()
            if (folder / KERNEL_FILES[backend]).is_file()
        },
    )


def _check(constraint: Constraint, tunables: Mapping[str, tuple[Tunable, ...]], path: Path) -> None:
    """Raises where a constraint cannot be evaluated for a back end it holds for."""
    for backend, mine in tunables.items():
        if constraint.backend not in (None, backend):
            continue
        unknown = constraint.names - {tunable.name for tunable in mine}
        if unknown:
            raise SparsecError(
                f"{path}: the constraint {constraint.require!r} holds for {backend}, whose tunables are "
                f"{', '.join(tunable.name for tunable in mine)}; it names {', '.join(sorted(unknown))}"
            )
        constraint.holds({tunable.name: tunable.default for tunable in mine})


def _digest(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


# What the kernels of each back end are written in, and include: a change of one leaves the records of the others alone.
_BACKEND_SUFFIXES: Final[Mapping[str, frozenset[str]]] = {
    "cpu": frozenset({".cpp", ".hpp"}),
    "triton": frozenset({".py"}),
    "cuda": frozenset({".cu", ".cuh"}),
}
_SOURCE_SUFFIXES: Final = frozenset({".yaml"}).union(*_BACKEND_SUFFIXES.values())

_OPERATORS: Final[Mapping[type[ast.AST], Callable[[Any, Any], Any]]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}


@cache
def _parsed(text: str) -> ast.expr:
    try:
        return ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise SparsecError(f"a constraint is an expression over tunables; {text!r} is none ({error.msg})") from None


def _evaluate(node: ast.expr, names: Mapping[str, int]) -> Any:  # int or bool, as Python has it
    """The value of a constraint: arithmetic, comparisons, `and`, `or` over tunables."""
    match node:
        case ast.Constant(value=int(value)):
            return value
        case ast.Name(id=name):
            return names[name]
        case ast.BinOp(left, op, right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_evaluate(left, names), _evaluate(right, names))
        case ast.Compare(left, [op], [right]) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_evaluate(left, names), _evaluate(right, names))
        case ast.BoolOp(op, values):
            combine = all if isinstance(op, ast.And) else any
            return combine(_evaluate(value, names) for value in values)
        case _:
            raise SparsecError(f"a constraint cannot say {ast.unparse(node)!r}")
