"""Blocks of large results: reused when nobody holds them, and never before."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

import sparsec
from sparsec import buffers, masks

CPU = torch.device("cpu")
LARGE = (3, 1 << 20)


@pytest.fixture(autouse=True)
def _no_free_blocks():
    buffers.release()
    yield
    buffers.release()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_freed_block_serves_the_next_result_of_its_size(dtype):
    first = buffers.empty(LARGE, dtype, CPU)
    assert (first.shape, first.dtype, first.is_contiguous()) == (LARGE, dtype, True)
    assert first.data_ptr() % 64 == 0
    at = first.data_ptr()
    del first
    assert buffers.empty(LARGE, dtype, CPU).data_ptr() == at


def test_a_block_in_use_is_never_given_out():
    first = buffers.empty(LARGE, torch.float32, CPU)
    view = first[1, 5:7]
    view.fill_(7.0)
    at = first.data_ptr()
    del first
    second = buffers.empty(LARGE, torch.float32, CPU).fill_(1.0)
    assert second.data_ptr() != at
    assert view.tolist() == [7.0, 7.0]
    array = view.numpy()
    del view
    assert buffers.empty(LARGE, torch.float32, CPU).fill_(2.0).data_ptr() != at
    assert array.tolist() == [7.0, 7.0]


def test_small_results_are_torchs_own():
    small = buffers.empty((2, 3), torch.float32, CPU)
    del small
    assert buffers.free_bytes() == 0


def test_what_is_kept_is_bounded(monkeypatch):
    monkeypatch.setattr(buffers, "_KEPT_BYTES", 24 << 20)
    held = [buffers.empty((8 << 20,), torch.uint8, CPU) for _ in range(5)]
    held.clear()
    assert buffers.free_bytes() == 24 << 20
    buffers.release()
    assert buffers.free_bytes() == 0


def test_blocks_that_come_back_while_one_is_taken(monkeypatch):
    """As when the garbage collector runs just then, and what comes back pushes others out."""

    class Block:
        def __init__(self, n, then=None):
            self.n, self.then = n, then

        def numel(self):
            then, self.then = self.then, None
            if then is not None:
                then()
            return self.n

    for size in (4, 6, 8):
        monkeypatch.setattr(buffers, "_KEPT_BYTES", 100)
        free = buffers._FreeBlocks()
        blocks = {n: Block(n) for n in (4, 6, 8)}
        for block in blocks.values():
            free.give(block)

        def come_back(free=free):
            monkeypatch.setattr(buffers, "_KEPT_BYTES", 18)
            free.give(Block(10))

        blocks[size].then = come_back
        found = free.take(size)
        assert (found.n if found is not None else None) == (None if size < 8 else 8), size
        assert free.nbytes <= 18


def test_the_default_device_is_not_that_of_the_blocks():
    attn = sparsec.compile(masks.window(3, 3), 9000, tune="off")
    q, k, v = torch.randn(3, 1, 4, 9000, 64)
    wanted = attn(q, k, v)
    buffers.release()
    torch.set_default_device("meta")
    try:
        found = attn(q, k, v)
    finally:
        torch.set_default_device(None)
    assert torch.equal(found, wanted)


def test_threads_never_share_a_block():
    wrong = []

    def work(number: int) -> None:
        for _ in range(50):
            mine = buffers.empty((4 << 20,), torch.uint8, CPU)
            mine[:: 1 << 12] = number
            if not bool((mine[:: 1 << 12] == number).all()):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_results_that_are_kept_stay_as_they_were():
    attention = sparsec.compile(masks.window(3, 3), 40_000, q_heads=1, head_dim=32, dtype="fp32")
    q, k, v = (torch.randn(1, 1, 40_000, 32) for _ in range(3))
    first = attention(q, k, v)
    copy, at = first.clone(), first.data_ptr()
    assert attention(-q, k, v).data_ptr() != at
    torch.testing.assert_close(first, copy, rtol=0, atol=0)
    del first
    gc.collect()
    torch.testing.assert_close(attention(q, k, v), copy, rtol=0, atol=0)


def test_a_result_saved_for_backward_is_not_overwritten():
    attention = sparsec.compile(masks.window(3, 3), 40_000)
    q, k, v = (torch.randn(1, 1, 40_000, 32, requires_grad=True) for _ in range(3))
    first = attention(q, k, v)
    d_out = torch.randn_like(first)
    expected = torch.autograd.grad(attention(q, k, v), (q, k, v), d_out)
    node = first.sum() * 0 + (first * d_out).sum()
    del first
    with torch.no_grad():
        attention(-q, k, v)
    for found, wanted in zip(torch.autograd.grad(node, (q, k, v)), expected, strict=True):
        torch.testing.assert_close(found, wanted)
