"""What a user can do about a plan, in a sentence or two.

This file decides which advice is worth its place: what should change the time by a fifth or more comes first, and two
sentences are enough. Every figure is an estimate of this plan or of another that was made the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from sparsec.errors import SparsecError
from sparsec.planner.ceiling import matrix_rate, tile_fill
from sparsec.planner.lengths import SHORTEST, dense_crossover, dense_us, rounded_tokens
from sparsec.planner.plans import COST_MODEL, Plan
from sparsec.planner.search import again
from sparsec.planner.words import duration

_SENTENCES = 2
# A mask that fits into a command within a sentence.
_SHORT_MASK = 60
# What changes the time by less is not worth a user's trouble.
_WORTH = 1.2
# Shares of the time at which starting a kernel, or waiting for the last worker, is what to do something about.
_LAUNCH_SHARE, _IDLE_SHARE = 0.3, 0.15
# Below this density, when dense attention would win is a question.
_SPARSE = 0.4


def advice(made: Plan) -> tuple[str, ...]:
    """What could make it faster, at most two sentences, the more useful first; none where nothing is known."""
    sentences = []
    for sentence in _sentences(made):
        sentences.append(sentence)
        if len(sentences) == _SENTENCES:
            break
    return tuple(sentences)


def _sentences(made: Plan) -> Iterator[str]:
    if made.asked.reorder == "off":
        yield from _on_reordering(made)
    dense = dense_us(made)
    is_dense = any(step.launch.template.layout == "none" for step in made.steps)
    if dense * _WORTH < made.estimate.us and not is_dense:
        yield (
            f"Dense attention over all pairs, with a mask added to the scores, should take {duration(dense)}: at this "
            "length the mask leaves too little out, or its edges lie too far apart, for sparsity to pay."
        )
    yield from _on_starting(made)
    yield from _on_idling(made)
    # From here on, what is good to know.
    if made.estimate.us < dense and max(group.profile.density for group in made.groups) < _SPARSE:
        yield from _on_length(made)
    yield from _on_dtype(made)
    yield from _on_scatter(made)
    yield from _on_tuning(made)


def _on_reordering(made: Plan) -> Iterator[str]:
    try:
        other = again(replace(made, asked=replace(made.asked, reorder="auto")), made.mask, made.problem)
    except SparsecError:
        return
    if other.estimate.us * _WORTH >= made.estimate.us:
        return
    fill = tile_fill(other.steps)
    name = next((step.launch.work.ordering.name for step in other.steps if step.launch.work.ordering.nbytes), "")
    raised = " would"
    if fill is not None:
        raised = f" would raise tile fill from {made.groups[0].profile.fill(64).fill:.0%} to {fill:.0%}, and"
    yield (
        f"Reordering tokens ({name}){raised} bring {duration(made.estimate.us)} down to "
        f"{duration(other.estimate.us)}: pass reorder='auto'."
    )


def _on_length(made: Plan) -> Iterator[str]:
    crossover = dense_crossover(made)
    if crossover is not None and crossover > SHORTEST:
        yield f"Dense attention is the faster one below about {rounded_tokens(crossover)} tokens."


def _on_starting(made: Plan) -> Iterator[str]:
    if made.estimate.launch_us > _LAUNCH_SHARE * made.estimate.us:
        yield (
            f"Starting kernels is {made.estimate.launch_us / made.estimate.us:.0%} of the time: put more heads or "
            "sequences into a call."
        )


def _on_idling(made: Plan) -> Iterator[str]:
    estimate = made.estimate
    if estimate.idle_us > _IDLE_SHARE * estimate.us and estimate.compute_us + estimate.idle_us >= estimate.memory_us:
        yield (
            f"{estimate.idle_us / estimate.us:.0%} of the time some of the {made.device.units} workers have nothing "
            "to do: more heads or sequences in a call would fill them."
        )


def _on_dtype(made: Plan) -> Iterator[str]:
    """In a dtype with faster matrix units."""
    if made.problem.dtype != "fp32" or "arithmetic" not in made.estimate.limiter:
        return
    if all(step.launch.template.layout == "rows" for step in made.steps):
        return
    times = matrix_rate(replace(made.problem, dtype="bf16"), made.device) / matrix_rate(made.problem, made.device)
    if times > _WORTH:
        yield f"Most of it is arithmetic, and this device's is {times:.2g}× as fast in bf16."


def _on_tuning(made: Plan) -> Iterator[str]:
    """Where nothing was measured yet."""
    if made.config_source != COST_MODEL:
        return
    problem, mask = made.problem, str(made.mask.mask)
    words = [f"sparsec tune '{mask}'" if len(mask) <= _SHORT_MASK and "'" not in mask else "sparsec tune MASK"]
    words.append(f"--seq-len {problem.q_len}")
    options = (
        ("kv-len", problem.kv_len, problem.q_len),
        ("heads", problem.q_heads, 1),
        ("kv-heads", problem.kv_heads, problem.q_heads),
        ("head-dim", problem.head_dim, 64),
        ("v-dim", problem.v_dim, problem.head_dim),
        ("batch", problem.batch, 1),
    )
    words += [f"--{name} {value}" for name, value, usual in options if value != usual]
    words.append(f"--dtype {problem.dtype}")
    words += ["--needs-grad"] if problem.needs_grad else []
    words += [f"--device {made.device.name}"] if made.device.name != "cpu" else []
    yield f"Nothing was measured for this shape on this device yet: `{' '.join(words)}` there finds what is fastest."


def _on_scatter(made: Plan) -> Iterator[str]:
    profile = made.groups[0].profile
    by_rows = all(step.launch.template.layout == "rows" for step in made.steps)
    if by_rows and profile.fill(64).fill < 0.1:
        fill = f"{profile.fill(64).fill:.1%}" if profile.fill(64).fill >= 0.001 else "less than 0.1%"
        yield (
            f"Tiles of 64 would be {fill} full, so edges are walked one by one: keys nearer to "
            "each other, in blocks of 16 or more, would bring matrix units into use."
        )
