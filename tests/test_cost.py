"""The cost model: what must hold whatever its coefficients are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cases import HARD, Case, case, every_constructor

from sparsec import masks as m
from sparsec.analysis import analyse
from sparsec.backends.base import DTYPES, Problem
from sparsec.cost import Estimate, cost_model, dense_estimate, estimate, model_digest
from sparsec.device import detect_cpu, devices
from sparsec.device import device as named_device
from sparsec.layout import block_tiles, gathered_tiles
from sparsec.planner.sampling import Sample
from sparsec.planner.works import IDENTITY, build_work
from sparsec.template import Config, template

DEVICES = devices()
TILED = ("row_traversal", "block_sparse", "hybrid")


def _estimate(tried: Case, name: str, device=None, **problem) -> Estimate:
    device = device or detect_cpu()
    p = replace(tried.problem, **problem)
    work = build_work(template(name), template(name).default("cpu"), tried.bound, p, device, heads=p.q_heads)
    return estimate(work, p, device, p.q_heads)


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
@pytest.mark.parametrize("name", TILED)
def test_an_estimate_is_the_sum_of_its_parts(name, device):
    found = _estimate(HARD, name, device)
    assert found.us >= max(found.compute_us + found.idle_us, found.memory_us)
    assert min(found.compute_us, found.idle_us, found.memory_us, found.launch_us) >= 0.0
    assert found.flops == HARD.problem.flops(HARD.bound.nnz)
    assert found.limiter


@pytest.mark.parametrize("tried", every_constructor(), ids=lambda tried: tried.id)
def test_every_mask_has_an_estimate(tried):
    for name in TILED:
        found = _estimate(tried, name)
        assert np.isfinite(found.us)
        assert found.us > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_more_work_costs_more(device, dtype):
    small = case("window", m.window(100, 100), 4096, 4096)
    large = case("window", m.window(400, 400), 4096, 4096)
    for name in ("row_traversal", "block_sparse"):
        of_small = _estimate(small, name, device, dtype=dtype)
        assert _estimate(large, name, device, dtype=dtype).us > of_small.us
        assert _estimate(small, name, device, dtype=dtype, q_heads=64, kv_heads=64).us > of_small.us
        assert _estimate(small, name, device, dtype=dtype, batch=64).us > of_small.us
        assert _estimate(small, name, device, dtype=dtype, head_dim=256, v_dim=256).us > of_small.us


def test_full_tiles_cost_the_same_and_partial_ones_by_their_pattern():
    here = detect_cpu()
    model = cost_model(HARD.problem, here)
    full = model.tiles(block_tiles(m.full().bind(256), 64, 64))
    assert len(set(full.tolist())) == 1
    costs = model.tiles(block_tiles(m.window(3, 3).bind(256), 64, 64))
    assert costs.shape == (10,)
    assert costs.max() < full[0]


def test_keys_from_beyond_the_cache_cost_more():
    for device in DEVICES[:1]:
        model = cost_model(HARD.problem, device)
        assert model.edge(1e7) > model.edge(100)
    assert model.unit(64, is_rows=True) > 0
    assert model.unit(64, is_rows=False) > 0


def test_heads_that_share_a_fetched_key_pay_for_it_once():
    gpu, few = named_device("nvidia-h200"), gathered_tiles(m.random_edges(40, 1).bind(2000), 1)
    problem = Problem(2000, 2000, 128, 1, 128, 128, "bf16")

    def column(heads: int, kv_len: int = 2000) -> float:
        return cost_model(replace(problem, kv_len=kv_len), gpu).columns(few, heads)

    # Up to the rows of a matrix unit the fetch decides, and more heads are free; then each costs its arithmetic.
    assert column(1) == column(16)
    assert column(128) > column(64) >= column(16)
    per_key_ns = 2 * 128 * 256 / (gpu.matrix_flops["bf16"] / gpu.units * 1e-9)
    assert per_key_ns < column(128) < 3 * per_key_ns
    # Keys that the cache does not hold come from memory, which 128 rows a key do not hide.
    assert column(128, 10_000_000) > 1.2 * column(128)
    tiles = block_tiles(m.full().bind(2000), 1, 64)
    model = cost_model(problem, gpu)
    assert model.tiles(tiles, 128).sum() < 128 * model.tiles(tiles).sum() / 4


@pytest.mark.parametrize("heads", [1, 128])
def test_a_sample_costs_what_the_whole_does(heads):
    """For packed heads too, which walk one list together."""
    mask, gpu = m.random_edges(400, 1).bind(4096), named_device("nvidia-h200")
    problem = Problem(4096, 4096, heads, 1, 128, 128, "bf16")
    hybrid = template("hybrid")
    values = {"block_q": 1, "column_queries": 1, "pack_gqa": 128, "block_kv": 64} if heads > 1 else {}
    config = Config.of(**{**hybrid.default("triton").to_dict(), **values})
    sampled = Sample(mask, analyse(mask), IDENTITY).us(hybrid, config, problem, gpu, heads)
    whole = build_work(hybrid, config, mask, problem, gpu, heads=heads)
    assert sampled == pytest.approx(estimate(whole, problem, gpu, heads).us, rel=0.15)


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_rough_figures_are_near_the_exact_ones(device):
    # A rough figure decides what is not looked at: 2.5 times the best is passed over.
    for tried in (case("window", m.window(255, 255), 8192, 8192), case("full", m.full(), 4096, 4096)):
        profile = analyse(tried.bound)
        model = cost_model(tried.problem, device)
        tiles = block_tiles(tried.bound, 64, 64)
        ratio = model.rough_tiles(profile) / float(model.tiles(tiles).sum())
        assert 0.5 < ratio < 2.0


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_estimates(device, dtype):
    problem = replace(case("full", m.full(), 4096, 4096, heads=(8, 8)).problem, dtype=dtype)
    whole, half = dense_estimate(problem, device, 1.0), dense_estimate(problem, device, 0.5)
    assert whole.us > half.us > 0
    assert whole.flops == 2 * half.flops == problem.flops(4096 * 4096)


def test_two_launches_add_up():
    one = Estimate(10.0, 6.0, 2.0, 5.0, 2.0, 100.0)
    both = one + one
    assert (both.us, both.launch_us, both.flops) == (20.0, 4.0, 200.0)


def test_what_most_of_the_time_goes_to():
    assert Estimate(10.0, 8.0, 0.0, 1.0, 1.0, 1.0).limiter == "arithmetic and fetching keys"
    assert Estimate(10.0, 1.0, 8.0, 1.0, 1.0, 1.0).limiter == "uneven work"
    assert Estimate(10.0, 1.0, 0.0, 8.0, 1.0, 1.0).limiter == "moving q, k, v and out"
    assert Estimate(10.0, 1.0, 0.0, 1.0, 8.0, 1.0).limiter == "starting the kernel"


def test_a_calibration_is_of_the_model_of_its_own_kind_of_device():
    """What is learnt of GPUs sets no CPU's calibration aside."""
    h100 = named_device("nvidia-h100")
    assert model_digest(detect_cpu().key) == model_digest("cpu-x86-64-avx2-8c") != model_digest(h100.key)
    assert model_digest(h100.key) == model_digest("amd-gfx942-304cu-hbm192g")
