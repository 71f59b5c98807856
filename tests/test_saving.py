"""Saved attentions: what comes back, what is taken up again, and what is refused."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
import stat
import zipfile
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from cases import by_degree, scattered

import sparsec
from sparsec import masks as m
from sparsec import saving
from sparsec.errors import RecordError, SparsecError, UnsupportedError
from sparsec.template import Config

pytestmark = pytest.mark.usefixtures("two_threads")


def _inputs(length=300, heads=(4, 2), dims=(32, 24), **options):
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads[0], dims[0]), (heads[1], dims[0]), (heads[1], dims[1]))
    return [torch.randn(2, h, length, d, generator=generator, **options) for h, d in shapes]


def _sources(made: sparsec.Attention) -> set[str]:
    return {group.config_source for group in made.plan.groups}


MASKS = [
    m.window(40, 10),
    m.window(5, 5) | m.global_tokens([7, 100, 200]),
    m.dilated(120, 8) | m.random_edges(2, 0),
    m.bigbird(16, 3, 1, 2, 0),
    scattered(300, 300, 0.3),
    by_degree([i % 12 for i in range(300)], 300) | m.window(2, 2),
    m.per_head([m.causal(), m.window(3, 3), m.causal(), ~m.full()]),
    m.per_head([scattered(300, 300, 0.3), m.window(3, 3), scattered(300, 300, 0.3, 5), m.causal()]),
    m.per_batch([m.causal(), m.documents([100, 200])]),
    m.from_mask_mod(lambda b, h, q, kv: (q - kv).abs() * 3 % 7 < 2),
]


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: str(mask)[:60])
def test_what_was_saved_comes_back(mask, tmp_path):
    made = sparsec.compile(mask, 300)
    q, k, v = _inputs()
    out, lse = made(q, k, v, return_lse=True)
    made.save(tmp_path / "attention.sparsec")
    again = sparsec.load(tmp_path / "attention.sparsec")
    assert again.request == made.request
    assert [entry[:2] for entry in again.plans()] == [entry[:2] for entry in made.plans()]
    assert _sources(again) == {"saved file"}
    steps = [[(s.launch.template.name, s.launch.config) for s in each.plan.steps] for each in (made, again)]
    assert steps[0] == steps[1]
    found, found_lse = again(q, k, v, return_lse=True)
    assert torch.equal(found, out)
    assert torch.equal(found_lse, lse)
    assert "configuration from the saved file" in " ".join(again.explain().split())


def test_every_signature_is_there_with_its_gradients(tmp_path):
    made = sparsec.compile(m.window(40, 10), 300, layout="bshd", scale=0.3)
    q, k, v = (t.transpose(1, 2).contiguous() for t in _inputs())
    made(q, k, v)
    made(q.bfloat16(), k.bfloat16(), v.bfloat16())
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    wanted = torch.autograd.grad(made(*leaves).sum(), leaves)
    made.save(tmp_path / "attention")
    again = sparsec.load(tmp_path / "attention")
    assert len(again.plans()) == 3
    found = torch.autograd.grad(again(*leaves).sum(), leaves)
    assert len(again.plans()) == 3
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_before_any_signature(tmp_path):
    sparsec.compile(m.causal(), 300).save(tmp_path / "attention")
    assert sparsec.load(tmp_path / "attention").plans() == []


def test_a_configuration_that_differs_from_the_default_is_kept(tmp_path):
    made = sparsec.compile(m.window(40, 10), 300, template="block_sparse")
    q, k, v = _inputs()
    made(q, k, v)
    ((problem, device, chosen),) = made.plans()
    launch = chosen.steps[0].launch
    other = next(
        config
        for config in launch.template.configs("cpu")
        if config != launch.config and config["block_q"] != launch.config["block_q"]
    )
    group = chosen.groups[0]
    entry = {"steps": [{"config": other.to_dict()}]}
    made.install(problem, device, replace(chosen, groups=(saving._with_configs(group, entry, problem, chosen.device),)))
    out = made(q, k, v)
    made.save(tmp_path / "attention")
    again = sparsec.load(tmp_path / "attention")
    assert again.plan.steps[0].launch.config == other
    assert again.plan.steps[0].launch.work.block_q == other["block_q"]
    assert torch.equal(again(q, k, v), out)


def test_equal_attentions_are_equal_files_of_this_user_alone(tmp_path):
    for name in "ab":
        made = sparsec.compile(scattered(300, 300, 0.3), 300)
        made(*_inputs())
        made.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600


def test_a_score_mod_must_be_given_again(tmp_path):
    slopes = np.array([0.5, 0.25, 0.125, 0.0625], np.float32)
    made = sparsec.compile(m.causal(), 300, score_mod=sparsec.score.alibi(slopes))
    q, k, v = _inputs()
    out = made(q, k, v)
    made.save(tmp_path / "attention")
    with pytest.raises(RecordError, match="give load the same score_mod"):
        sparsec.load(tmp_path / "attention")
    with pytest.raises(RecordError, match="this is another"):
        sparsec.load(tmp_path / "attention", score_mod=sparsec.score.soft_cap(20.0))
    again = sparsec.load(tmp_path / "attention", score_mod=sparsec.score.alibi(slopes))
    assert torch.equal(again(q, k, v), out)
    sparsec.compile(m.causal(), 300).save(tmp_path / "plain")
    with pytest.raises(RecordError, match="leave it out"):
        sparsec.load(tmp_path / "plain", score_mod=sparsec.score.soft_cap(20.0))


def test_a_mask_without_members_is_refused(tmp_path):
    mask = m.from_mask_mod(lambda b, h, q, kv: q >= kv + h) & scattered(300, 300, 0.9)
    with pytest.raises(UnsupportedError, match="cannot be saved"):
        sparsec.compile(mask, 300).save(tmp_path / "attention")
    assert not (tmp_path / "attention").exists()


# Files that do not fit any more. A header is changed as someone would who also mends its digest.


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    made = sparsec.compile(scattered(300, 300, 0.3), 300)
    made(*_inputs())
    file = tmp_path_factory.mktemp("saved") / "attention"
    made.save(file)
    return file


def _members(file) -> dict[str, bytes]:
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _write(file, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file


def _changed(saved, to, change):
    members = _members(saved)
    header = json.loads(members["header.json"])
    change(header)
    members["header.json"] = json.dumps(header).encode()
    members["digest"] = saving._sha256(members["header.json"]).encode()
    return _write(to, members)


def _other_sources(header):
    header["plans"][0]["groups"][0]["steps"][0]["source_digest"] = "0" * 64


def _other_device(header):
    header["plans"][0]["device_key"] = "cpu-of-long-ago"


def _other_order(header):
    header["plans"][0]["groups"][0]["steps"][0]["ordering"] = "by magic"


def _illegal_config(header):
    step = header["plans"][0]["groups"][0]["steps"][0]
    step["config"] = dict.fromkeys(step["config"], 7)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_other_sources, "the sources of .* have changed"),
        (_other_device, "it was made on cpu-of-long-ago"),
        (_other_order, "no longer splits or orders"),
        (_illegal_config, "no longer legal"),
    ],
)
def test_what_does_not_match_is_planned_again(saved, tmp_path, change, reason):
    again = sparsec.load(_changed(saved, tmp_path / "changed", change))
    (source,) = _sources(again)
    assert source.startswith("cost model; the saved plan is not taken up")
    assert re.search(reason, source)
    assert torch.equal(again(*_inputs()), sparsec.load(saved)(*_inputs()))


def test_a_plan_for_a_device_that_is_not_here_is_left_out(saved, tmp_path, caplog):
    def elsewhere(header):
        header["plans"][0]["device"] = "nowhere"

    with caplog.at_level(logging.WARNING):
        again = sparsec.load(_changed(saved, tmp_path / "changed", elsewhere))
    assert again.plans() == []
    assert "nowhere" in caplog.text


def test_another_version_is_refused(saved, tmp_path):
    def later(header):
        header["schema"] = saving.SCHEMA + 1

    with pytest.raises(RecordError, match=rf"schema {saving.SCHEMA + 1}, and this sparsec reads .* {saving.SCHEMA}"):
        sparsec.load(_changed(saved, tmp_path / "changed", later))


def test_no_file_and_other_files(tmp_path):
    with pytest.raises(RecordError, match="no such file"):
        sparsec.load(tmp_path / "nothing")
    (tmp_path / "text").write_text("not a zip")
    with pytest.raises(RecordError, match="truncated or no such file"):
        sparsec.load(tmp_path / "text")
    np.savez(tmp_path / "numbers.npz", a=np.arange(3))
    with pytest.raises(RecordError, match="no header"):
        sparsec.load(tmp_path / "numbers.npz")
    with pytest.raises(SparsecError, match="cannot write"):
        sparsec.compile(m.causal(), 30).save(tmp_path / "nowhere" / "attention")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_truncated_files_are_refused(saved, tmp_path, share):
    content = saved.read_bytes()
    (tmp_path / "cut").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(RecordError):
        sparsec.load(tmp_path / "cut")


def test_no_changed_byte_goes_unnoticed(saved, tmp_path):
    content = bytearray(saved.read_bytes())
    with zipfile.ZipFile(saved) as archive:
        starts = [info.header_offset + 30 + len(info.filename) for info in archive.infolist()]
        sizes = [info.file_size for info in archive.infolist()]
    rng = np.random.default_rng(0)
    for start, size in zip(starts, sizes, strict=True):
        for at in rng.integers(start, start + size, 5):
            torn = content.copy()
            torn[at] ^= 1 << int(rng.integers(8))
            (tmp_path / "torn").write_bytes(torn)
            with pytest.raises(RecordError):
                sparsec.load(tmp_path / "torn")


def test_tampering_that_minds_the_archive_is_refused(saved, tmp_path):
    members = _members(saved)
    array = next(name for name in members if name.endswith(".npy"))
    cases = {
        "header": members | {"header.json": members["header.json"].replace(b"bhsd", b"bshd")},
        "array": members | {array: members[array][:-8] + bytes(8)},
        "extra": members | {"more.npy": members[array]},
        "missing": {name: content for name, content in members.items() if name != array},
        "no digest": {name: content for name, content in members.items() if name != "digest"},
    }
    for name, changed in cases.items():
        with pytest.raises(RecordError):
            sparsec.load(_write(tmp_path / name, changed))
    with pytest.raises(RecordError, match="compressed"):
        sparsec.load(_write(tmp_path / "packed", members, zipfile.ZIP_DEFLATED))


def _set(path, value):
    def change(header):
        place = header
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        _set(["mask"], {"text": "__import__('os')"}),
        _set(["mask"], {"edges": 7, "kv_len": 300}),
        _set(["mask"], {"anything": []}),
        _set(["mask"], []),
        _set(["shape"], [299, 300]),
        _set(["shape"], "300"),
        _set(["request", "layout"], "sideways"),
        _set(["request", "q_heads"], -1),
        _set(["request", "q_heads"], True),
        _set(["request", "scale"], "1"),
        _set(["request"], {}),
        _set(["plans", 0, "problem", "q_len"], "300"),
        _set(["plans", 0, "problem", "dtype"], "fp8"),
        _set(["plans", 0, "problem"], {"q_len": 3}),
        _set(["plans", 0, "groups", 0, "steps", 0, "config"], {"block_q": "64"}),
        _set(["plans", 0, "groups", 0, "steps", 0], {}),
        _set(["plans", 0, "groups", 0, "steps", 0, "config"], [64]),
        _set(["plans"], 3),
    ],
)
def test_headers_that_make_no_sense_are_refused(saved, tmp_path, change):
    with pytest.raises(RecordError):
        sparsec.load(_changed(saved, tmp_path / "changed", change))


def test_nothing_is_unpickled(saved, tmp_path):
    members = _members(saved)
    array = next(name for name in members if name.endswith(".npy"))
    content = io.BytesIO()
    np.save(content, np.array([object()]), allow_pickle=True)
    members[array] = content.getvalue()

    def mend(header):
        header["arrays"][array] = saving._sha256(members[array])

    _write(tmp_path / "pickled", members)
    with pytest.raises(RecordError, match="array cannot be read"):
        sparsec.load(_changed(tmp_path / "pickled", tmp_path / "mended", mend))


def test_config_items_keep_their_order():
    assert Config(tuple(json.loads(json.dumps({"b": 1, "a": 2})).items())) == Config.of(b=1, a=2)


def rewritten(path, header):
    """The file with another header, its digest right."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["header.json"] = json.dumps(header).encode()
    members["digest"] = hashlib.sha256(members["header.json"]).hexdigest().encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as writer:
        for name, content in members.items():
            writer.writestr(zipfile.ZipInfo(name), content)


def places(value, path=()):
    """Every place in a JSON document."""
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from places(item, (*path, key))


def replaced(value, path, other):
    copy = json.loads(json.dumps(value))
    at = copy
    for key in path[:-1]:
        at = at[key]
    if other is _GONE:
        del at[path[-1]]
    else:
        at[path[-1]] = other
    return copy


_GONE = object()


def test_any_other_value_in_a_header_is_refused_or_means_something(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "_MAX_TEXT", 10)
    path = tmp_path / "attention.sparsec"
    sparsec.compile(scattered(24, 24, 0.3), 24, q_heads=2, head_dim=8, dtype="fp32", tune="off").save(path)
    with zipfile.ZipFile(path) as archive:
        header = json.loads(archive.read("header.json"))
    assert header["arrays"]
    content = path.read_bytes()
    refused = 0
    for place in places(header):
        for other in (None, -7, "x", [1], {"x": 1}, _GONE):
            path.write_bytes(content)
            rewritten(path, replaced(header, place, other))
            try:
                sparsec.load(path)
            except SparsecError:
                refused += 1
    assert refused > 200


@pytest.mark.parametrize("scale", [np.float32(0.3), np.float64(0.3), np.int64(2), Fraction(1, 3), 1], ids=repr)
def test_a_scale_of_any_kind_is_saved(scale, tmp_path):
    made = sparsec.compile(m.causal(), 40, q_heads=2, head_dim=8, dtype="fp32", scale=scale, tune="off")
    made.save(tmp_path / "attention.sparsec")
    again = sparsec.load(tmp_path / "attention.sparsec")
    assert type(again.request.scale) is float
    assert again.request.scale == float(scale)
    q, k, v = torch.randn(3, 1, 2, 40, 8)
    assert torch.equal(again(q, k, v), made(q, k, v))
