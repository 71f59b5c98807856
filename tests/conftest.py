"""What all tests share: a cache of their own, a fixed number of threads, and the marker `gpu`."""

from __future__ import annotations

import itertools
import os

import pytest

_numbers = itertools.count()


def pytest_configure(config: pytest.Config) -> None:
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if needing and not _has_gpu():
        for item in needing:
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and torch sees none"))


def _has_gpu() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()
