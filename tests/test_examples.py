"""The worked examples in miniature: that they run as their users run them, and show what they say they show."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import byte_gpt
import graph_transformer


@pytest.fixture(autouse=True)
def _one_thread():
    # The operations are too small for more.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _run(example, out, *options):
    pytest.importorskip("matplotlib")
    done = CliRunner().invoke(example.main, [*options, "--out", str(out)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    name = example.__name__
    assert (out / f"{name}.png").stat().st_size > 10_000
    return json.loads((out / f"{name}.json").read_text())


def test_byte_gpt_learns_alike_with_sparse_and_dense_attention(tmp_path):
    options = "--steps 12 --seq-len 96 --width 32 --layers 2 --heads 2 --window 16 --global-tokens 3 --limit-mib 0.1"
    found = _run(byte_gpt, tmp_path, *options.split())
    sparse, dense = (np.array(found["losses"][name]) for name in ("sparsec", "dense"))
    assert len(sparse) == 12
    assert np.abs(sparse - dense).max() < 1e-4
    assert found["validation"]["sparsec"] == pytest.approx(found["validation"]["dense"], abs=1e-4)
    assert sparse[0] == pytest.approx(np.log(256), abs=0.05)
    assert sparse[-1] < sparse[0] - 0.5


def test_byte_gpt_validates_on_what_it_was_not_trained_on():
    settings = byte_gpt.Settings(1, 50, 64, 8, 1, 1, 8, 1, 0)
    seen, unseen = (
        set(next(byte_gpt.batches(torch.arange(5000), settings, is_training=is_training))[0].flatten().tolist())
        for is_training in (True, False)
    )
    assert seen
    assert unseen
    assert not seen & unseen


def test_graph_transformer_learns_more_with_attention(tmp_path):
    found = _run(graph_transformer, tmp_path, "--packages", "2000", "--steps", "30", "--width", "16", "--layers", "2")
    explained = {name: values[-1] for name, values in found["explained_variance"].items()}
    assert explained["attention"] > explained["alone"] + 0.02
    assert explained["alone"] > 0.2


def test_packages_needed_are_those_that_can_be_reached(monkeypatch):
    # Several runs over the bits, and cycles.
    monkeypatch.setattr(graph_transformer, "BITS", 16)
    dense = np.random.default_rng(0).random((70, 70)) < 0.02
    dense |= np.eye(70, dtype=bool)
    reach = np.linalg.matrix_power(dense.astype(float), 70) > 0
    assert (graph_transformer.packages_needed(sp.csr_array(dense)) == reach.sum(1)).all()
