"""Pictures, tables and documents: what the command line shows."""

import io
import json
import math

import numpy as np
import pytest
from rich.console import Console
from rich.text import Text

from sparsec import masks as m
from sparsec.report import Column, json_text, picture, table


def dots(drawn) -> np.ndarray:
    """The dots of a picture, read back from its characters by another way than it was drawn."""
    rows = []
    for line in drawn.lines:
        codes = [ord(character) - 0x2800 for character in line]
        for bits in ((0, 3), (1, 4), (2, 5), (6, 7)):
            rows.append([code >> bit & 1 for code in codes for bit in bits])
    return np.array(rows, bool)


@pytest.mark.parametrize(
    "mask", [m.causal(), m.window(3, 1), m.strided(4), m.random_edges(4, 0), ~m.full(), m.full()], ids=str
)
@pytest.mark.parametrize("length", [5, 16, 63])
def test_a_dot_is_a_pair(mask, length):
    bound = mask.bind(length)
    drawn = picture(bound, length)
    assert (drawn.tokens, drawn.enlarged) == (1, 1)
    shown = dots(drawn)
    assert np.array_equal(shown[:length, :length], bound.to_dense())
    assert shown[length:].sum() == shown[:, length:].sum() == 0


def test_a_small_mask_is_enlarged():
    drawn = picture(m.from_dense([[True, False], [True, True]]).bind(None), 16)
    assert drawn.enlarged == 8
    assert drawn.lines == ("⣿⣿⣿⣿⠀⠀⠀⠀", "⣿⣿⣿⣿⠀⠀⠀⠀", "⣿⣿⣿⣿⣿⣿⣿⣿", "⣿⣿⣿⣿⣿⣿⣿⣿")
    assert drawn.width == 8


@pytest.mark.parametrize("shape", [(1000, 1000), (4096, 4096), (3000, 700), (100, 5000)], ids=str)
@pytest.mark.parametrize("mask", [m.window(40, 3), m.random_edges(1, 3), m.longformer(64, 2)], ids=str)
def test_a_dot_of_a_large_mask_is_set_where_there_is_an_edge(mask, shape):
    bound = mask.bind(*shape)
    drawn = picture(bound, 64)
    step = drawn.tokens
    q, kv = np.nonzero(bound.to_dense())
    expected = np.zeros([-(-length // step) for length in shape], bool)
    expected[q // step, kv // step] = True
    assert np.array_equal(dots(drawn)[: expected.shape[0], : expected.shape[1]], expected)
    assert 2 * drawn.width <= 64 + 1


def test_a_picture_of_millions_of_tokens_costs_no_dense_mask():
    drawn = picture(m.window(64, 64).bind(4_000_000), 32)
    assert len(drawn.lines) == math.ceil(math.ceil(4_000_000 / drawn.tokens) / 4)


def test_json_is_strict_whatever_is_in_it():
    document = {
        "numpy": np.int64(3),
        "array": np.arange(3),
        "infinite": math.inf,
        "none": np.float32("nan"),
        "set": frozenset({"b", "a"}),
        "tuple": (1, 2.5, None, True),
        7: m.causal(),
    }
    assert json.loads(json_text(document)) == {
        "numpy": 3,
        "array": [0, 1, 2],
        "infinite": None,
        "none": None,
        "set": ["a", "b"],
        "tuple": [1, 2.5, None, True],
        "7": "causal()",
    }


@pytest.mark.parametrize("width", [80, 40, 20])
def test_a_table_fits_any_console(width):
    console = Console(file=io.StringIO(), width=width)
    columns = [Column("device"), Column("memory", "right"), Column("rate", "right")]
    rows = [("nvidia-h100", "80 GiB", Text("3,350 GB/s")), ("cpu", "24 GiB", Text("37 GB/s"))]
    console.print(table(columns, rows, console, title="devices"))
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    for word in ("devices", "nvidia-h100", "80 GiB", "37 GB/s", "memory"):
        assert word in text
    is_side_by_side = any("nvidia-h100" in line and "80 GiB" in line for line in text.splitlines())
    assert is_side_by_side == (width >= 40)
