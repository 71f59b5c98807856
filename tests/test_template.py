"""Templates: what their folders declare, and which configurations are legal."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from sparsec import data
from sparsec.backends.base import BACKENDS, backend
from sparsec.errors import SparsecError
from sparsec.template import KERNEL_FILES, Config, Constraint, template, templates

ALL = [pytest.param(made, name, id=f"{made.name}-{name}") for made in templates().values() for name in made.backends()]


def test_the_templates_are_the_folders():
    folders = {path.parent.name for path in data.templates_dir().glob("*/template.yaml")}
    assert set(templates()) == folders >= {"row_traversal", "block_sparse", "hybrid"}
    assert list(templates()) == sorted(templates())
    for name, made in templates().items():
        assert made.name == name == made.folder.name
        assert made.layout in ("rows", "tiles", "hybrid", "none")
        assert made.summary
        assert made.backends()


@pytest.mark.parametrize(("made", "name"), ALL)
def test_kernels_are_where_they_are_said_to_be(made, name):
    if name in made.declared_backends:
        assert name in BACKENDS
        backend(name)
    else:
        assert made.kernel_path(name).is_file()
        assert made.kernel_path(name).name == KERNEL_FILES[name]


@pytest.mark.parametrize(("made", "name"), ALL)
def test_every_configuration_is_legal_and_listed_once(made, name):
    configs = list(made.configs(name))
    assert configs[0] == made.default(name)
    assert len(set(configs)) == len(configs)
    # Of a large space, some from all over.
    for config in configs[:: max(1, len(configs) // 10_007)]:
        assert made.violation(name, config) is None
    for tunable in made.tunables_of(name):
        assert tunable.default in tunable.values
        assert list(tunable.values) == sorted(set(tunable.values))
        assert tunable.meaning


@pytest.mark.parametrize(("made", "name"), ALL)
def test_every_constraint_can_be_told(made, name):
    default = made.default(name)
    for constraint in made.constraints:
        assert constraint.because
        if constraint.backend in (None, name):
            assert constraint.holds(default.to_dict())


def test_what_makes_a_configuration_illegal():
    tiles = template("block_sparse")
    assert "block_q=48 is none of" in tiles.violation("cpu", Config.of(block_q=48, block_kv=64))
    assert "takes block_q, block_kv" in tiles.violation("cpu", Config.of(block_q=64))
    assert "takes no parameters" in template("dense").violation("torch", Config.of(block_q=64))


def test_the_reference_is_planned_like_a_cpu():
    tiles = template("block_sparse")
    assert tiles.default("reference") == tiles.default("cpu")


def test_constraints():
    assert Constraint("a * 2 + 1 <= b and b % 4 == 0", "", None).holds({"a": 3, "b": 8})
    assert not Constraint("a < b or a == 7", "", None).holds({"a": 3, "b": 3})
    for text in ("__import__('os')", "a ** 2", "a.b", "a < b < c", "[a]", "'x'"):
        with pytest.raises((SparsecError, KeyError)):
            Constraint(text, "", None).holds({"a": 1, "b": 2, "c": 3})


def test_values_make_a_configuration_in_declared_order():
    tiles = template("block_sparse")
    made = tiles.config_of("cpu", {"block_kv": 32, "block_q": 16})
    assert made == Config.of(block_q=16, block_kv=32)
    for values in ({"block_q": 16}, {"block_q": 16, "block_kv": 33}, {"block_q": 16, "block_kv": 32, "x": 1}):
        assert tiles.config_of("cpu", values) is None


def test_configurations():
    config = Config.of(block_q=64, block_kv=32)
    assert config["block_q"] == 64
    assert config.get("splits", 1) == 1
    assert config.to_dict() == {"block_q": 64, "block_kv": 32}
    assert str(config) == "block_q=64 block_kv=32"
    assert hash(config) == hash(Config.of(block_q=64, block_kv=32))
    assert str(Config()) == "(nothing to tune)"
    with pytest.raises(KeyError):
        config["splits"]


def test_an_unknown_template():
    with pytest.raises(SparsecError, match=r"no template 'flash'; the templates are .*block_sparse"):
        template("flash")


@pytest.fixture
def own_templates(tmp_path, monkeypatch):
    folder = tmp_path / "templates"
    shutil.copytree(data.templates_dir(), folder)
    monkeypatch.setattr(data, "templates_dir", lambda: folder)
    templates.cache_clear()
    yield folder
    monkeypatch.undo()
    templates.cache_clear()


@pytest.mark.parametrize("file", ["row_traversal/kernel_cpu.cpp", "row_traversal/template.yaml", "shared/simd.hpp"])
def test_the_digest_is_of_everything_a_kernel_is_made_from(file, own_templates):
    before = templates()
    with (own_templates / file).open("a") as source:
        source.write("\n")
    templates.cache_clear()
    after = templates()
    assert before["row_traversal"].source_digest != after["row_traversal"].source_digest
    is_shared = file.startswith("shared")
    assert (before["block_sparse"].source_digest != after["block_sparse"].source_digest) == is_shared


def test_a_back_end_has_a_digest_of_its_own_sources(own_templates):
    before = template("row_traversal")
    with (own_templates / "row_traversal" / "kernel_triton.py").open("a") as source:
        source.write("\n")
    with (own_templates / "row_traversal" / "template.yaml").open("a") as declared:
        declared.write("\n")
    templates.cache_clear()
    after = template("row_traversal")
    assert before.digest_of("triton") != after.digest_of("triton")
    assert before.digest_of("cpu") == after.digest_of("cpu") != after.digest_of("triton")
    with (own_templates / "shared" / "simd.hpp").open("a") as source:
        source.write("\n")
    templates.cache_clear()
    assert template("row_traversal").digest_of("cpu") != after.digest_of("cpu")


def test_kernels_include_nothing_that_their_digest_leaves_out():
    for path in [*data.templates_dir().rglob("*.cu"), *data.templates_dir().rglob("*.cuh")]:
        included = re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE)
        assert {Path(name).suffix for name in included} <= {".cuh"}, path
    for path in [*data.templates_dir().rglob("*.cpp"), *data.templates_dir().rglob("*.hpp")]:
        included = re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE)
        assert {Path(name).suffix for name in included} <= {".hpp"}, path


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        ("block_q <= 64 + nonsense", "it names nonsense"),
        ("fetch <= 64", r"holds for cpu, whose tunables are block_q; it names fetch"),
        ("block_q <=", "is none"),
        ("abs(block_q)", "it names abs"),
        ("block_q ** 2 > 1", "cannot say"),
    ],
)
def test_a_constraint_that_means_nothing_is_refused_when_read(constraint, message, own_templates):
    declared = own_templates / "row_traversal" / "template.yaml"
    declared.write_text(f"{declared.read_text()}  - require: {constraint}\n    because: of nothing\n")
    templates.cache_clear()
    with pytest.raises(SparsecError, match=message):
        templates()


def test_a_readme_is_no_source(own_templates):
    before = template("row_traversal").source_digest
    (own_templates / "row_traversal" / "README.md").write_text("words")
    templates.cache_clear()
    assert template("row_traversal").source_digest == before


def test_a_folder_is_a_template(own_templates):
    shutil.copytree(own_templates / "row_traversal", own_templates / "another")
    declared = own_templates / "another" / "template.yaml"
    declared.write_text(declared.read_text().replace("name: row_traversal", "name: another"))
    templates.cache_clear()
    assert "another" in templates()
    assert "cpu" in template("another").backends()
    (own_templates / "another" / "kernel_cpu.cpp").unlink()
    templates.cache_clear()
    assert "cpu" not in template("another").backends()
