"""Every template on every back end, in every dtype, on every case, against dense attention in fp64."""

from __future__ import annotations

import itertools

import pytest
import running
from cases import HARD, Case, cases

from sparsec.backends.base import DTYPES
from sparsec.template import Config

pytestmark = pytest.mark.usefixtures("two_threads")


def _matrix():
    for template, name in running.kernels():
        for dtype, case in itertools.product(DTYPES, cases()):
            if running.serves(template, name, case):
                made = case.with_dtype(dtype)
                yield pytest.param(
                    template, name, made, id=f"{case.id}-{dtype}-{template.name}-{name}", marks=running.marks(name)
                )


@pytest.mark.parametrize(("template", "backend_name", "case"), [*_matrix()])
def test_forward(template, backend_name, case: Case):
    running.check(case, *running.run(running.launch(template, backend_name, case), case))


def _configs():
    for template, name in running.kernels():
        for config, dtype in itertools.product(_chosen_configs(template, name), ("fp32", "bf16")):
            if running.serves(template, name, HARD.with_dtype(dtype)):
                values = "-".join(f"{key}{value}" for key, value in config.items)
                yield pytest.param(
                    template,
                    name,
                    config,
                    HARD.with_dtype(dtype),
                    id=f"{template.name}-{name}-{values}-{dtype}",
                    marks=running.marks(name),
                )


def _chosen_configs(template, name):
    """Every legal configuration; on a GPU, where each is compiled anew, the default and those of one other value."""
    if name not in running.GPU_BACKENDS:
        yield from template.configs(name)
        return
    default = template.default(name)
    yield default
    for tunable in template.tunables_of(name):
        for value in tunable.values:
            config = Config.of(**{**default.to_dict(), tunable.name: value})
            if config != default and template.violation(name, config) is None:
                yield config


@pytest.mark.parametrize(("template", "backend_name", "config", "case"), [*_configs()])
def test_every_configuration(template, backend_name, config, case):
    made = running.launch(template, backend_name, case, config=config)
    running.check(case, *running.run(made, case))
