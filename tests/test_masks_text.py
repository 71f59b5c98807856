"""Masks read from text and from files."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.io
import scipy.sparse as sp

from sparsec import masks as m
from sparsec.errors import MaskError


@pytest.mark.parametrize(
    ("text", "mask"),
    [
        ("window(255, 0) & causal() | global_tokens(16)", (m.window(255, 0) & m.causal()) | m.global_tokens(16)),
        ("  causal('bottom_right')\n", m.causal("bottom_right")),
        ("~(strided(4) - window(1, 1)).T", ~(m.strided(4) - m.window(1, 1)).T),
        ("documents(cu_seqlens=[0, 3, 9])[1:5, :]", m.documents([3, 6])[1:5, :]),
        ("causal().bind(8, 6)[2:6, 0:4].mask", m.causal().bind(8, 6)[2:6, 0:4].mask),
        ("window(-2, 5)", m.window(-2, 5)),
        ("per_head([causal(), full()])", m.per_head([m.causal(), m.full()])),
        ("neighborhood((8, 8), 3, causal=(True, False))", m.neighborhood((8, 8), 3, causal=(True, False))),
    ],
)
def test_reads(text, mask):
    assert m.parse(text) == mask


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("windw(3, 0)", r"did you mean window"),
        ("causal", "call it: causal"),
        ("causal() & 3", "where a mask is needed"),
        ("causal() and full()", "only constructors"),
        ("causal(", "no expression"),
        ("", "no expression"),
        ("3", "is a int and no mask"),
        ("window(3)", "missing 1 required positional argument"),
        ("window(1, -2)", "holds no key"),
        ("__import__('os').system('true')", "can be called"),
        ("causal().__class__", "only constructors"),
        ("full()[0:4, 1]", "two slices"),
        ("full()[0:4:2, 0:4]", "step 2"),
        ("full().bind(4)", "leave .bind"),
        ("full().mask", ".mask is for a bound mask"),
        ("[x for x in (1,)]", "only constructors"),
        ("window(*[1, 2])", "only constructors"),
        ("window(**{'left': 1})", r"\*\* is not understood"),
        ("window(n, 0)", "'n' is not known"),
        ("full() + full()", "only constructors"),
        ("(" * 5000 + "full()" + ")" * 5000, "nested|cannot be read|no expression"),
        ("~" * 5000 + "full()", "nested|cannot be read|no expression"),
        ("full()\x00", "cannot be read|no expression"),
    ],
)
def test_refuses_with_the_place(text, complaint):
    with pytest.raises(MaskError, match=complaint):
        m.parse(text)


def test_the_caret_stands_under_the_fault():
    with pytest.raises(MaskError) as caught:
        m.parse("window(3, 0) | gloabl_tokens(4)")
    lines = str(caught.value).splitlines()
    assert lines[1].index("gloabl") == lines[2].index("^")


def test_not_text():
    with pytest.raises(MaskError, match="a int"):
        m.parse(3)


def test_files(tmp_path):
    dense = np.random.default_rng(1).random((9, 7)) < 0.4
    want = m.from_dense(dense)
    sp.save_npz(tmp_path / "a.npz", sp.csr_array(dense))
    scipy.io.mmwrite(tmp_path / "b.mtx", sp.coo_array(dense.astype(np.int64)))
    np.save(tmp_path / "c.npy", dense)
    for name in ("a.npz", "b.mtx", "c.npy"):
        assert m.load(tmp_path / name) == want
    (tmp_path / "d.yaml").write_text('"window(3, 0) | global_tokens(2)"\n')
    (tmp_path / "e.yml").write_text("mask: documents([4, 5])\nq_len: 9\n")
    assert m.load(tmp_path / "d.yaml") == m.window(3, 0) | m.global_tokens(2)
    assert m.load(str(tmp_path / "e.yml")) == m.documents([4, 5])


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.yaml", "- causal()\n", "must hold a mask expression"),
        ("a.yaml", "mask: 3\n", "must hold a mask expression"),
        ("a.yaml", "mask: [a, b]\n", "must hold a mask expression"),
        ("a.yaml", "&x [*x]\n", "a.yaml"),
        ("a.yaml", "mask: !!python/object/apply:os.getcwd []\n", "a.yaml"),
        ("a.yaml", "mask: causal()\nlength: 3\n", "length"),
        ("a.yaml", "mask: causal()\nkv_len: 3\n", "kv_len is given without q_len"),
        ("a.yaml", "mask: documents([4])\nq_len: 5\n", "cannot be bound"),
        ("a.yaml", "mask: causal()\nq_len: many\n", "must be an int"),
        ("a.yaml", "caussal()\n", "did you mean causal"),
        ("a.mtx", "not a matrix\n", "damaged"),
        ("a.npy", "not an array\n", "damaged"),
        ("a.npz", "not an archive\n", "damaged"),
        ("a.txt", "causal()\n", "masks are read from"),
    ],
)
def test_bad_files(tmp_path, name, content, complaint):
    (tmp_path / name).write_text(content)
    with pytest.raises(MaskError, match=complaint):
        m.load(tmp_path / name)


def test_truncated_and_pickled_files(tmp_path):
    sp.save_npz(tmp_path / "a.npz", sp.csr_array(np.eye(500, dtype=bool)))
    whole = (tmp_path / "a.npz").read_bytes()
    for share in (0.1, 0.5, 0.9):
        (tmp_path / "a.npz").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(MaskError, match="damaged"):
            m.load(tmp_path / "a.npz")
    np.save(tmp_path / "b.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(MaskError, match="damaged"):
        m.load(tmp_path / "b.npy")
    with pytest.raises(MaskError, match="no such file"):
        m.load(tmp_path / "none.npz")
    np.save(tmp_path / "c.npy", np.ones((2, 2)))
    with pytest.raises(MaskError, match="float64"):
        m.load(tmp_path / "c.npy")
