"""Which configurations of a template are worth costing on a device, and which do not fit it.

This file decides how far the search looks round the default. It must not know a cost, nor any kernel.
"""

from __future__ import annotations

import math

from sparsec.backends.base import Problem, backend
from sparsec.device import Device
from sparsec.planner.plans import Refusal
from sparsec.template import Config, Template

# Of a decoding step, or of a few tokens that are checked together.
_FEW_QUERIES = 16


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
        by_distance = sorted(
            each.configs(backend_name), key=lambda config: _distance(config, each.default(backend_name))
        )
        fitting = (config for config in by_distance if server.config_refusal(each, config, problem, device) is None)
        kept = [config for config in [next(fitting, None)] if config is not None]
    if not kept:
        refusals.append(Refusal(title, f"no configuration of it fits {device.name}"))
    return tuple(kept), tuple(refusals)


def _default_and_heights(each: Template, backend_name: str, problem: Problem) -> list[Config]:
    """The default, and for tiles the other heights: what changes the work most."""
    default = each.default(backend_name)
    if each.layout != "tiles" or backend_name == "reference":
        return [default]
    heights = next((t.values for t in each.tunables[backend_name] if t.name == "block_q"), ())
    others = [
        Config(tuple((key, height if key == "block_q" else value) for key, value in default.items))
        for height in heights
    ]
    others += _packed(each, backend_name, problem, heights)
    legal = [config for config in others if config != default and each.violation(backend_name, config) is None]
    return [default, *legal]


def _packed(each: Template, backend_name: str, problem: Problem, heights: tuple[int, ...]) -> list[Config]:
    """For a few queries of grouped heads, the smallest tiles that the heads of a group fill together."""
    packs = next((t.values for t in each.tunables[backend_name] if t.name == "pack_gqa"), (1,))
    pack = max((n for n in packs if problem.group % n == 0), default=1)
    if pack == 1 or problem.q_len > _FEW_QUERIES:
        return []
    default = each.default(backend_name).to_dict()
    configs = [Config.of(**{**default, "block_q": h, "pack_gqa": pack}) for h in sorted(heights) if h >= problem.q_len]
    return [config for config in configs if each.violation(backend_name, config) is None][:1]


def _distance(config: Config, default: Config) -> tuple[int, float]:
    """How many parameters differ, and by how many doublings."""
    changed = [(value, default[name]) for name, value in config.items if value != default[name]]
    return len(changed), sum(abs(math.log2(max(value, 0.5) / max(other, 0.5))) for value, other in changed)
