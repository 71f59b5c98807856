"""What all tests share: a cache of their own, a fixed number of threads, and the marker `gpu`."""

from __future__ import annotations

import itertools
import os

import pytest

_numbers = itertools.count()
_LEFT_OUT = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    # NumPy's oracle multiplies small matrices: threads that wait for each other on shared cores cost it twenty times
    # the work. Read when NumPy is imported, which no plugin of ours does before.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    worker = getattr(config, "workerinput", None)
    if worker is None:
        return
    # A cache directory that is set stays, so that whoever runs one file again and again compiles once.
    os.environ.setdefault("SPARSEC_CACHE_DIR", worker["sparsec_cache_dir"])
    # Several processes share the cores: a thread that waits must not keep one busy.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node) -> None:  # of pytest-xdist: workers share one cache
    factory = node.config._tmp_path_factory
    node.workerinput["sparsec_cache_dir"] = str(factory.getbasetemp() / "sparsec-cache")


@pytest.fixture(scope="session", autouse=True)
def kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The directory every kernel of this run is compiled into, once."""
    folder = os.environ.setdefault("SPARSEC_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "sparsec-cache"))
    return folder


@pytest.fixture(autouse=True)
def no_records(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    """Every test begins without tuning records, shipped or anyone's own, and what it records is its own."""
    from sparsec.records import RecordBase, base

    number = next(_numbers)
    own = RecordBase([], tmp_path_factory.getbasetemp() / f"records-{number}")
    monkeypatch.setattr(base, "_database", lambda shipped, own_folder: own)
    # Nothing is measured unless a test asks for it.
    monkeypatch.setenv("SPARSEC_TUNE", os.environ.get("SPARSEC_TUNE", "cached"))
    return own


@pytest.fixture(scope="session")
def two_threads():
    """Torch with two threads, however many cores there are."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if needing and not _has_gpu():
        # Every kernel of a GPU, more than a thousand tests: one line says so, not one each.
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=needing)
        config.stash[_LEFT_OUT] = len(needing)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["sparsec_left_out"] = session.config.stash.get(_LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:  # of pytest-xdist: a worker's end
    node.config.stash[_LEFT_OUT] = getattr(node, "workeroutput", {}).get("sparsec_left_out", 0)


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if left_out := config.stash.get(_LEFT_OUT, 0):
        terminalreporter.write_line(f"left out, as torch sees no GPU: {left_out:,} tests")


def _has_gpu() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()
