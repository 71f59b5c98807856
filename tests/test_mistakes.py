"""What users get wrong: each mistake is met at once, by name, with what to do instead."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import sparsec
from sparsec import masks as m
from sparsec.errors import SparsecError

CAUSAL = m.causal()


def compiled(**options):
    return sparsec.compile(CAUSAL, 128, **options)


def tensor(*shape, dtype=torch.float32):
    return torch.zeros(*(shape or (1, 4, 128, 64)), dtype=dtype)


def called(*tensors, **options):
    return compiled(**options)(*(tensors or (tensor(),) * 3))


TOLD = {
    "a tensor for a mask": (lambda: sparsec.compile(torch.ones(9, 9).bool(), 9), "from_dense"),
    "an array for a mask": (lambda: sparsec.compile(np.ones((9, 9), bool), 9), "from_dense"),
    "text for a mask": (lambda: sparsec.compile("causal()", 9), "masks.parse('causal()')"),
    "a function for a mask": (lambda: sparsec.compile(lambda b, h, i, j: i >= j, 9), "from_mask_mod"),
    "a constructor, not called": (lambda: sparsec.compile(m.causal, 9), "masks.causal("),
    "no mask": (lambda: sparsec.compile(None, 9), "NoneType"),
    "no length": (lambda: sparsec.compile(CAUSAL), "seq_len"),
    "a length in text": (lambda: sparsec.compile(CAUSAL, "9"), "seq_len='9'"),
    "a length in floats": (lambda: sparsec.compile(CAUSAL, 9.0), "seq_len=9.0"),
    "lengths in a list": (lambda: sparsec.compile(CAUSAL, [9, 9]), "(q_len, kv_len)"),
    "three lengths": (lambda: sparsec.compile(CAUSAL, (1, 2, 3)), "(q_len, kv_len)"),
    "no tokens": (lambda: sparsec.compile(CAUSAL, 0), "≥ 1"),
    "more tokens than there are": (lambda: sparsec.compile(CAUSAL, 2**70), "≤"),
    "another length than the mask's": (lambda: sparsec.compile(m.documents([3, 4]), 9), "q_len = 7"),
    "no heads": (lambda: compiled(q_heads=0), "q_heads=0"),
    "heads in floats": (lambda: compiled(q_heads=4.0), "q_heads=4.0"),
    "heads that do not divide": (lambda: compiled(q_heads=6, kv_heads=4), "multiple"),
    "other heads than the mask's": (lambda: sparsec.compile(m.per_head([CAUSAL, m.full()]), 9, q_heads=3), "q_heads=3"),
    "no dimensions": (lambda: compiled(head_dim=0), "1 to 256"),
    "too many dimensions": (lambda: compiled(head_dim=512), "1 to 256"),
    "too many dimensions of v": (lambda: compiled(v_dim=257), "v_dim=257"),
    "a dtype by torch's name": (lambda: compiled(dtype="float16"), "did you mean 'fp16'"),
    "a dtype it has not": (lambda: compiled(dtype=torch.float64), "fp32, fp16, bf16"),
    "a device's name with a slip": (lambda: compiled(device="nvidia-h10"), "nvidia-h100"),
    "a device by number": (lambda: compiled(device=0), "'cuda:0'"),
    "a GPU of no number": (lambda: compiled(device="cuda:first"), "number"),
    "a template's name with a slip": (lambda: compiled(template="blocksparse"), "block_sparse"),
    "a back end's name with a slip": (lambda: compiled(backend="tritn"), "triton"),
    "tuning by another word": (lambda: compiled(tune="fast"), "'quick'"),
    "tuning by yes": (lambda: compiled(tune=True), "'quick'"),
    "reordering by another word": (lambda: compiled(reorder="yes"), "'force'"),
    "a layout it has not": (lambda: compiled(layout="bhld"), "'bshd'"),
    "gradients by a word": (lambda: compiled(needs_grad="yes"), "needs_grad='yes'"),
    "a scale in text": (lambda: compiled(scale="0.1"), "number"),
    "a scale in a tensor": (lambda: compiled(scale=torch.tensor(0.1)), "scale.item()"),
    "a scale that is none": (lambda: compiled(scale=math.nan), "finite"),
    "a scale of yes": (lambda: compiled(scale=True), "number"),
    "a score modifier that is none": (lambda: compiled(score_mod=3), "score_mod"),
    "a score modifier of one argument": (
        lambda: compiled(score_mod=lambda score: score),
        "(score, b, h, q_idx, kv_idx)",
    ),
    "three dimensions": (lambda: called(*[tensor(4, 128, 64)] * 3), "four dimensions"),
    "heads and tokens swapped": (lambda: called(*[tensor(1, 128, 4, 64)] * 3), "layout='bshd'"),
    "heads and tokens swapped back": (lambda: called(layout="bshd"), "layout='bhsd'"),
    "other lengths": (lambda: called(*[tensor(1, 4, 100, 64)] * 3), "128 queries and 128 keys"),
    "keys without values": (lambda: called(tensor(), tensor(), tensor(1, 4, 100, 64)), "only the last may differ"),
    "other batches": (lambda: called(tensor(2, 4, 128, 64), tensor(), tensor()), "batch 2"),
    "heads over heads": (lambda: called(tensor(), *[tensor(1, 3, 128, 64)] * 2), "multiple"),
    "other dimensions": (lambda: called(tensor(), tensor(1, 4, 128, 32), tensor()), "head_dim 64"),
    "two dtypes": (lambda: called(tensor(dtype=torch.float16), tensor(), tensor()), "one dtype"),
    "two devices": (lambda: called(tensor(), tensor().to("meta"), tensor()), "one device"),
    "doubles": (lambda: called(*[tensor(dtype=torch.float64)] * 3), "fp32, fp16, bf16"),
    "arrays": (lambda: called(*[tensor().numpy()] * 3), "torch tensors"),
    "another dtype than told": (lambda: called(dtype="bf16"), "dtype=bf16"),
    "other heads than told": (lambda: called(q_heads=8), "q_heads=8"),
    "tensors elsewhere than told": (lambda: called(device="nvidia-h100"), "the tensors are on cpu"),
    "a GPU's back end on a CPU": (lambda: called(backend="triton"), "does not serve cpu devices"),
    "an array to update with": (lambda: compiled().update(np.ones((128, 128), bool)), "from_dense"),
    "a plan before there is one": (lambda: compiled().plan, "call this attention on tensors"),
    "a dictionary for a problem": (lambda: sparsec.plan(CAUSAL, {"q_len": 9}, "nvidia-h100"), "sparsec.Problem"),
    "a problem's dtype": (lambda: sparsec.plan(CAUSAL, sparsec.Problem(9, 9, dtype="half")), "fp16"),
    "text to analyse": (lambda: sparsec.analyse("causal()", 9), "mask of sparsec.masks"),
    "text for attention's mask": (lambda: sparsec.attention(*[tensor()] * 3, "causal()"), "masks.parse"),
}


@pytest.mark.parametrize("name", TOLD)
def test_a_mistake_is_told_at_once(name):
    mistake, expected = TOLD[name]
    with pytest.raises(SparsecError) as caught:
        mistake()
    assert expected in str(caught.value)


def test_a_gpu_that_is_not_there_is_told_at_once():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    for name in ("cuda", "cuda:0", torch.device("cuda", 1)):
        with pytest.raises(sparsec.BackendMissingError, match="GPU"):
            compiled(device=name)


@pytest.mark.parametrize("length", [np.int64(128), (np.int32(128), 128), torch.Size([128, 128])], ids=repr)
def test_lengths_and_heads_are_any_kind_of_int(length):
    made = sparsec.compile(CAUSAL, length, q_heads=np.int64(4), head_dim=np.int32(64))
    assert made.bound.shape == (128, 128)
    assert type(made.request.q_heads) is int
