"""Which configurations of a template are worth costing on a device, and which do not fit it.

This file decides how far the search looks round the default. It must not know a cost, nor any kernel.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from sparsec.backends.base import Problem, backend
from sparsec.device import Device
from sparsec.planner.plans import Refusal
from sparsec.template import Config, Template

# Of a decoding step, or of a few tokens that are checked together.
_FEW_QUERIES = 16
# Rows of packed heads up to which no backward kernel spills at 128 dimensions, on any architecture.
_PACKED_GRADIENT_ROWS = 64


def shortlist(
    each: Template, backend_name: str, problem: Problem, device: Device
) -> tuple[tuple[Config, ...], tuple[Refusal, ...]]:
    """`(configurations that fit, refusals of those that do not)`, the default first.

    Where none of the usual ones fits, it is the nearest to the default that does: the fewest parameters changed, by the
    fewest doublings.
    """
    server, title = backend(backend_name), f"{each.name} on {backend_name}"
    told = {
        config: server.config_refusal(each, config, problem, device)
        for config in _default_and_heights(each, backend_name, problem)
    }
    refusals = [Refusal(f"{title} ({config})", reason) for config, reason in told.items() if reason is not None]
    kept = [config for config, reason in told.items() if reason is None]
    if not kept:
        near = _by_distance(each, backend_name)
        fitting = (config for config in near if server.config_refusal(each, config, problem, device) is None)
        kept = [config for config in [next(fitting, None)] if config is not None]
    if not kept:
        refusals.append(Refusal(title, f"no configuration of it fits {device.name}"))
    return tuple(kept), tuple(refusals)


def _default_and_heights(each: Template, backend_name: str, problem: Problem) -> list[Config]:
    """The default, and for tiles the other heights: what changes the work most."""
    default = each.default(backend_name)
    if each.layout not in ("tiles", "hybrid") or backend_name == "reference":
        return [default]
    heights = _values(each, backend_name, "block_q")
    others = [_changed(default, block_q=height) for height in heights] if each.layout == "tiles" else []
    others += _packed(each, backend_name, problem, heights)
    legal = [config for config in others if config != default and each.violation(backend_name, config) is None]
    return [default, *dict.fromkeys(legal)]


def _packed(each: Template, backend_name: str, problem: Problem, heights: tuple[int, ...]) -> list[Config]:
    """For grouped heads, tiles that the heads of a group fill together: the lowest there are, and the tallest.

    In a tile of few queries little is fetched that some of them do not attend; in one of many rows a fetched key does
    much work. A hybrid gathers there whatever is not a full tile: a single edge would be fetched for one query alone.
    """
    # The backward pass keeps sums of keys and values beside: it spills beyond so many packed rows.
    most = _PACKED_GRADIENT_ROWS if problem.needs_grad else math.inf
    packs = (n for n in _values(each, backend_name, "pack_gqa") if problem.group % n == 0 and n <= most)
    pack = max(packs, default=1)
    if pack == 1 or (problem.needs_grad and not each.has_backward(backend_name)):
        return []
    default, wanted = each.default(backend_name), {"pack_gqa": pack}
    if 1 in _values(each, backend_name, "column_queries"):
        wanted |= {"column_queries": 1, "tile_percent": 100, "block_kv": 64}
    packed = [_changed(default, **wanted, block_q=height) for height in sorted(heights) if height * pack <= most]
    legal = [config for config in packed if each.violation(backend_name, config) is None]
    if problem.q_len <= _FEW_QUERIES:
        return [config for config in legal if config["block_q"] >= problem.q_len][:1]
    return legal[:1] + legal[-1:]


def _values(each: Template, backend_name: str, name: str) -> tuple[int, ...]:
    return next((t.values for t in each.tunables[backend_name] if t.name == name), ())


def _changed(config: Config, **values: int) -> Config:
    return Config(tuple((name, values.get(name, value)) for name, value in config.items))


def _by_distance(each: Template, backend_name: str) -> Iterator[Config]:
    """The legal configurations, nearest to the default first: by parameters that differ, then by doublings."""
    default, tunables = each.default(backend_name), each.tunables_of(backend_name)
    for n_changed in range(len(tunables) + 1):
        found = [
            _changed(default, **dict(zip((t.name for t in changed), values, strict=True)))
            for changed in itertools.combinations(tunables, n_changed)
            for values in itertools.product(*([v for v in t.values if v != t.default] for t in changed))
        ]
        legal = (config for config in found if each.violation(backend_name, config) is None)
        yield from sorted(legal, key=lambda config: _doublings(config, default))


def _doublings(config: Config, default: Config) -> float:
    changed = [(value, default[name]) for name, value in config.items if value != default[name]]
    return sum(abs(math.log2(max(value, 0.5) / max(other, 0.5))) for value, other in changed)
