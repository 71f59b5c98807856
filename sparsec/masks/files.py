"""Reads masks from files: expressions in YAML, edges in SciPy's, Matrix Market's and numpy's formats.

This file decides which file means what. Nothing in a file is ever run or unpickled.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sparsec import data
from sparsec.errors import MaskError, SparsecError
from sparsec.masks.explicit import from_dense, from_sparse
from sparsec.masks.mask import Mask
from sparsec.masks.parse import parse


def load(path: str | os.PathLike[str]) -> Mask:
    """The mask in a file.

    Args:
        path: `.yaml` or `.yml` (a mask expression, or a mapping with `mask` and perhaps `q_len` and `kv_len`, which are
            checked), `.npz` (a SciPy sparse array), `.mtx` (Matrix Market) or `.npy` (a bool array).

    Raises:
        MaskError: There is no such file, it is damaged, or it holds no mask.
    """
    file = Path(path)
    readers: dict[str, Callable[[Path], Mask]] = {
        ".yaml": _yaml,
        ".yml": _yaml,
        ".npz": _npz,
        ".mtx": _mtx,
        ".npy": _npy,
    }
    reader = readers.get(file.suffix.lower())
    if reader is None:
        raise MaskError(
            f"load({str(file)!r}): masks are read from {', '.join(readers)}, and this is {file.suffix or 'none'}"
        )
    if not file.is_file():
        raise MaskError(f"load({str(file)!r}): there is no such file")
    try:
        return reader(file)
    except MaskError as error:
        raise MaskError(f"load({str(file)!r}): {error}") from error
    except SparsecError as error:
        raise MaskError(f"load({str(file)!r}): {error}") from error
    except (OSError, ValueError, KeyError, EOFError, TypeError, IndexError, zipfile.BadZipFile, zlib.error) as error:
        raise MaskError(
            f"load({str(file)!r}): the file is damaged or of another kind ({type(error).__name__}: {error}); "
            "write it again"
        ) from error


def _yaml(file: Path) -> Mask:
    content = data.read_yaml(file)
    if isinstance(content, str):
        return parse(content)
    known = {"mask", "q_len", "kv_len"}
    if not isinstance(content, dict) or "mask" not in content or not isinstance(content["mask"], str):
        raise MaskError(
            'the file must hold a mask expression, or a mapping with `mask: "…"` (a string) and perhaps q_len and '
            f"kv_len; it holds a {type(content).__name__}"
        )
    if extra := set(content) - known:
        raise MaskError(f"the keys {sorted(map(str, extra))} are not known; there are {sorted(known)}")
    mask = parse(content["mask"])
    if "kv_len" in content and "q_len" not in content:
        raise MaskError("kv_len is given without q_len; give both")
    if "q_len" in content:
        mask.bind(content["q_len"], content.get("kv_len"))
    return mask


def _npz(file: Path) -> Mask:
    import scipy.sparse

    # SciPy opens the archive with allow_pickle=False.
    return _two_dimensional(scipy.sparse.load_npz(file))


def _mtx(file: Path) -> Mask:
    import scipy.io

    return _two_dimensional(scipy.io.mmread(file))


# Any: SciPy's formats have no common type.
def _two_dimensional(array: Any) -> Mask:
    import scipy.sparse

    if not scipy.sparse.issparse(array):
        return from_dense(np.asarray(array) != 0)
    return from_sparse(array)


def _npy(file: Path) -> Mask:
    return from_dense(np.load(file, allow_pickle=False))
