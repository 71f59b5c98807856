"""Explicit edges: dense arrays, CSR, sparse arrays of SciPy and torch, and graphs.

This file decides what is accepted as a list of edges and how it is kept: ascending CSR. A sparse array means what its
dense form means, whatever the values: explicit zeros are no edges.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import numpy.typing as npt

from sparsec.errors import MaskError
from sparsec.masks import ranges
from sparsec.masks.arguments import checked_int, flat_ints, int_array, is_int
from sparsec.masks.mask import Axis, Mask, Shape, call_text
from sparsec.masks.ranges import IntArray, RowRanges

if TYPE_CHECKING:
    import scipy.sparse

# int32, or int64 where keys do not fit it.
Columns = npt.NDArray[np.signedinteger[Any]]


@dataclass(frozen=True, eq=False, repr=False)
class Edges(Mask):
    """Edges in CSR, columns ascending within a row."""

    indptr: IntArray
    indices: Columns
    kv_len: int

    def _text(self, show: Callable[[object], str]) -> str:
        return call_text(show, "from_csr", self.indptr, self.indices, self.kv_len)

    def _fixed_lengths(self) -> tuple[int | None, int | None]:
        return len(self.indptr) - 1, self.kv_len

    def _row_weight(self, shape: Shape) -> float:
        return len(self._ranges.start) / max(1, shape[0])

    @cached_property
    def _ranges(self) -> RowRanges:
        return ranges.from_csr(self.indptr, self.indices)

    def _rows(self, shape: Shape, start: int, stop: int) -> RowRanges:
        return ranges.take_rows(self._ranges, start, stop)

    def _nnz(self, shape: Shape) -> int:
        return len(self.indices)

    def _to_csr(self, shape: Shape) -> scipy.sparse.csr_array:
        import scipy.sparse

        # The edges as they lie: nothing is looked at again. A copy, as SciPy changes its arrays in place.
        csr = scipy.sparse.csr_array(shape, dtype=np.bool_)
        csr.data, csr.indices = np.ones(len(self.indices), np.bool_), self.indices.copy()
        csr.indptr = self.indptr.astype(self.indices.dtype if len(self.indices) < 2**31 else np.int64)
        csr.has_sorted_indices = csr.has_canonical_format = True
        return csr

    def _degrees(self, shape: Shape, axis: Axis) -> IntArray:
        if axis == "q":
            return np.diff(self.indptr)
        return np.bincount(self.indices, minlength=self.kv_len).astype(np.int64)

    def _transpose(self, shape: Shape | None) -> Mask | None:
        row = np.repeat(np.arange(len(self.indptr) - 1, dtype=np.int64), np.diff(self.indptr))
        order = np.argsort(self.indices, kind="stable")
        indptr = np.zeros(self.kv_len + 1, np.int64)
        np.cumsum(np.bincount(self.indices, minlength=self.kv_len), out=indptr[1:])
        return Edges(indptr, _compact(row[order], len(self.indptr) - 1), len(self.indptr) - 1)

    def _sliced(self, shape: Shape, q: tuple[int, int], kv: tuple[int, int]) -> Mask | None:
        first, last = self.indptr[q[0]], self.indptr[q[1]]
        column = self.indices[first:last]
        row = np.repeat(np.arange(q[1] - q[0], dtype=np.int64), np.diff(self.indptr[q[0] : q[1] + 1]))
        inside = (column >= kv[0]) & (column < kv[1])
        return _from_sorted(row[inside], column[inside] - kv[0], (q[1] - q[0], kv[1] - kv[0]))

    def _constant(self, shape: Shape | None) -> bool | None:
        # Without lengths this mask is more than a constant: it fixes them.
        if shape is None:
            return None
        if not len(self.indices):
            return False
        return True if len(self.indices) == (len(self.indptr) - 1) * self.kv_len else None


def from_dense(mask: object) -> Mask:
    """The True entries of a bool array `[q_len, kv_len]` (numpy, torch, or nested lists).

    Raises:
        MaskError: Not two-dimensional, empty, or not bool.
    """
    dense = _numpy(mask)
    if dense.ndim != 2 or 0 in dense.shape:
        raise MaskError(f"from_dense: the array has shape {dense.shape}; give [q_len, kv_len], both ≥ 1")
    if dense.dtype != np.bool_:
        raise MaskError(
            f"from_dense: the array is {dense.dtype}, and a mask is bool; convert: array.astype(bool), or array == 0 "
            "for an additive mask of 0 and -inf"
        )
    row, column = np.nonzero(dense)
    return _from_sorted(row, column, (dense.shape[0], dense.shape[1]))


def from_csr(indptr: object, indices: object, kv_len: int) -> Mask:
    """Edges in CSR: row `i` attends `indices[indptr[i]:indptr[i + 1]]`, ascending.

    Raises:
        MaskError: `indptr` does not begin at 0, decreases, or does not end at `len(indices)`; columns that are
            negative, too large, unsorted or repeated. The message names the row.
    """
    pointers = int_array(indptr, "from_csr", "indptr")
    columns = flat_ints(indices, "from_csr", "indices")
    kv_len = checked_int(kv_len, "from_csr", "kv_len")
    if len(pointers) < 2 or pointers[0] != 0:
        raise MaskError(
            f"from_csr: indptr has {len(pointers)} entries, begins {pointers[:3].tolist()}; it needs one for each row "
            "and one more, and begins at 0"
        )
    falling = np.flatnonzero(np.diff(pointers) < 0)
    if len(falling):
        row = int(falling[0])
        raise MaskError(
            f"from_csr: indptr decreases at row {row}, from {pointers[row]} to {pointers[row + 1]}; rows are "
            "indices[indptr[i]:indptr[i + 1]], so it must not fall"
        )
    if pointers[-1] != len(columns):
        raise MaskError(
            f"from_csr: indptr ends at {pointers[-1]}, and there are {len(columns)} indices; they must agree"
        )
    # Three passes over the indices: one finds those out of range (as unsigned, negative ones are large), one those that
    # do not rise, one copies them.
    first = pointers[1:-1][(pointers[1:-1] > 0) & (pointers[1:-1] < len(columns))]
    rises = columns[1:] > columns[:-1]
    rises[first - 1] = True
    is_inside = not len(columns) or int(columns.view(f"u{columns.itemsize}").max()) < kv_len
    if not (is_inside and rises.all()):
        _raise_disorder(pointers, columns, kv_len)
    return Edges(pointers, _compact(columns, kv_len), kv_len)


def _raise_disorder(pointers: IntArray, columns: npt.NDArray[np.integer[Any]], kv_len: int) -> NoReturn:
    """Names the first index of a CSR that is out of range, out of order or repeated."""
    row_of = np.repeat(np.arange(len(pointers) - 1, dtype=np.int64), np.diff(pointers))
    _check_columns(row_of, columns, kv_len, "from_csr")
    same_row = row_of[1:] == row_of[:-1]
    for wrong, what, way_out in (
        (same_row & (columns[1:] < columns[:-1]), "unsorted columns", "sort each row (SciPy: array.sort_indices())"),
        (same_row & (columns[1:] == columns[:-1]), "a repeated column", "drop repeats (SciPy: array.sum_duplicates())"),
    ):
        if wrong.any():
            at = int(np.argmax(wrong))
            raise MaskError(f"from_csr: row {row_of[at]} has {what}: {columns[at]}, then {columns[at + 1]}; {way_out}")
    raise AssertionError("an index of from_csr is out of order, and none was found")


def is_sparse(array: object) -> bool:
    """Whether this is a sparse array of SciPy or torch; imports neither."""
    scipy_sparse, torch = sys.modules.get("scipy.sparse"), sys.modules.get("torch")
    if scipy_sparse is not None and scipy_sparse.issparse(array):
        return True
    return torch is not None and isinstance(array, torch.Tensor) and array.layout is not torch.strided


def from_sparse(array: Any) -> Mask:
    """The non-zero entries of a two-dimensional sparse array: SciPy's or torch's, in any format (COO, CSR, BSR, …).

    Explicit zeros are no edges; repeated COO entries are one edge when their sum is not zero, as in the array itself.

    Raises:
        MaskError: No sparse array, not two-dimensional, or NaN among its values.
    """
    # Any: SciPy's sparse formats and torch tensors have no common type.
    if not is_sparse(array):
        raise MaskError(f"from_sparse: a {type(array).__name__} is no sparse array; from_dense reads dense ones")
    if len(array.shape) != 2 or 0 in tuple(array.shape):
        raise MaskError(f"from_sparse: the array has shape {tuple(array.shape)}; give [q_len, kv_len], both ≥ 1")
    row, column, values = _torch_entries(array) if type(array).__module__.startswith("torch") else _scipy_entries(array)
    if values.dtype.kind == "f" and np.isnan(values).any():
        at = int(np.argmax(np.isnan(values)))
        raise MaskError(
            f"from_sparse: the entry at row {row[at]}, column {column[at]} is NaN; drop or fill such entries"
        )
    shape = (int(array.shape[0]), int(array.shape[1]))
    _check_columns(row, column, shape[1], "from_sparse")
    if values.dtype.kind == "b":
        values = values.astype(np.int64)
    order = np.lexsort((column, row))
    row, column, values = row[order], column[order], values[order]
    first = np.flatnonzero(np.concatenate(([True], (row[1:] != row[:-1]) | (column[1:] != column[:-1])))[: len(row)])
    if len(first) != len(row):
        values = np.add.reduceat(values, first)
        row, column = row[first], column[first]
    kept = values != 0
    return _from_sorted(row[kept], column[kept], shape)


def _scipy_entries(array: Any) -> tuple[IntArray, IntArray, npt.NDArray[Any]]:
    coo = array.tocoo()
    return coo.row.astype(np.int64), coo.col.astype(np.int64), np.asarray(coo.data)


def _torch_entries(tensor: Any) -> tuple[IntArray, IntArray, npt.NDArray[Any]]:
    coo = tensor.detach().cpu()
    if str(coo.layout) != "torch.sparse_coo":
        coo = coo.to_sparse_coo()
    indices = coo._indices().numpy().astype(np.int64)
    values = coo._values()
    # numpy has no bfloat16, and a smaller dtype would lose the smallest values.
    is_half = values.is_floating_point() and values.element_size() < 4
    return indices[0], indices[1], (values.float() if is_half else values).numpy()


def from_graph(graph: Any, num_nodes: int | None = None) -> Mask:
    """The edges of a graph: a node attends its successors (undirected: its neighbours).

    Args:
        graph: A networkx graph (nodes are numbered in the graph's own order), or an edge index `[2, n_edges]` of
            integers, sources first (repeated edges count once).
        num_nodes: For an edge index, the number of nodes; one more than the largest index when left out.
    """
    # Any: networkx graphs, arrays and tensors have no common type.
    networkx = sys.modules.get("networkx")
    if networkx is not None and isinstance(graph, networkx.Graph):
        if num_nodes is not None and num_nodes != graph.number_of_nodes():
            raise MaskError(f"from_graph: the graph has {graph.number_of_nodes()} nodes, and num_nodes = {num_nodes}")
        number = {node: i for i, node in enumerate(graph)}
        pairs = np.array([(number[a], number[b]) for a, b in graph.edges()], np.int64).reshape(-1, 2).T
        if not graph.is_directed():
            pairs = np.concatenate((pairs, pairs[::-1]), axis=1)
        n = len(number)
    else:
        edges = _numpy(graph)
        if edges.ndim != 2 or edges.shape[0] != 2 or (edges.size and edges.dtype.kind not in "iu"):
            raise MaskError(
                f"from_graph: the edge index is {edges.dtype} with shape {edges.shape}; give integers [2, n_edges] "
                "(sources, then targets), or a networkx graph"
            )
        pairs = edges.astype(np.int64)
        n = int(pairs.max(initial=-1)) + 1 if num_nodes is None else num_nodes
    if not is_int(n) or n < 1:
        raise MaskError(f"from_graph: {n!r} nodes; the graph needs at least one (num_nodes=)")
    return from_pairs(pairs[0], pairs[1], (int(n), int(n)), "from_graph")


def from_pairs(row: IntArray, column: IntArray, shape: Shape, name: str) -> Mask:
    """Edges in any order, repeats dropped.

    Raises:
        MaskError: An index is negative or too large; `name` says whose.
    """
    for part, length in ((row, shape[0]), (column, shape[1])):
        wrong = (part < 0) | (part >= length)
        if wrong.any():
            at = int(np.argmax(wrong))
            raise MaskError(
                f"{name}: edge {at} is ({row[at]}, {column[at]}); indices are from 0 to {length - 1}: give more nodes, "
                "or drop the edge"
            )
    order = np.lexsort((column, row))
    row, column = row[order], column[order]
    first = np.concatenate(([True], (row[1:] != row[:-1]) | (column[1:] != column[:-1])))[: len(row)]
    return _from_sorted(row[first], column[first], shape)


def _check_columns(row: IntArray, column: npt.NDArray[np.integer[Any]], kv_len: int, name: str) -> None:
    wrong = (column < 0) | (column >= kv_len)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise MaskError(
            f"{name}: row {row[at]} has column {column[at]}; columns are from 0 to kv_len - 1 = {kv_len - 1}: "
            "correct the index, or give a larger kv_len"
        )


def _from_sorted(row: IntArray, column: Columns, shape: Shape) -> Edges:
    indptr = np.zeros(shape[0] + 1, np.int64)
    np.cumsum(np.bincount(row, minlength=shape[0]), out=indptr[1:])
    return Edges(indptr, _compact(column, shape[1]), shape[1])


def _compact(column: npt.NDArray[np.integer[Any]], kv_len: int) -> Columns:
    compact: Columns = column.astype(np.int32 if kv_len < 2**31 else np.int64)
    return compact


def _numpy(array: object) -> npt.NDArray[Any]:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        result: npt.NDArray[Any] = array.detach().cpu().numpy()
        return result
    try:
        return np.asarray(array)
    except ValueError as error:
        raise MaskError(f"a {type(array).__name__} is no array: {error}") from error
