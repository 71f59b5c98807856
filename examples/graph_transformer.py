#!/usr/bin/env python3
"""A graph transformer: how many packages does installing a Debian package bring along?

    python examples/graph_transformer.py

A package attends those that it depends on, and itself: `masks.from_sparse` of the graph (63,666 nodes, 340,845 edges)
is the attention mask, and the whole graph is one sequence. The target is the logarithm of how many packages a package
needs in all, with those that its dependencies need. All that the model is told of a package is how many it names and
how many name it; how far that reaches, it must learn to gather through its layers.

Two others of as many parameters are trained beside it, in which each package sees only itself: one is told the same,
the other also what a random walk along dependencies meets after one to three steps, fixed averages over the
surroundings.

The number of direct dependencies itself would be no target: attention alone gives it away, as an even average over n
packages weighs the package itself by 1/n. How many are needed in all hangs on edges beyond the reach of the layers, and
no package's target is an input of another.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import click
import networkx as nx
import numpy as np
import scipy.sparse as sp
import torch
from torch import nn

import sparsec
from sparsec import masks

GRAPH = Path(sparsec.__file__).parent / "demo_data" / "debian_depends.npz"
WALK_STEPS = 3
# Packages whose reach is worked out at a time, as bits of one number for each package.
BITS = 8192


def load_graph(n_packages: int | None) -> sp.csr_array:
    """The dependencies, `[package, needed package]`, each with itself; of the first few packages where told."""
    graph = sp.csr_array(sp.load_npz(GRAPH))
    return graph if n_packages is None else sp.csr_array(graph[:n_packages][:, :n_packages])


def packages_needed(graph: sp.csr_array) -> np.ndarray:
    """How many packages each package needs, directly or not, itself included."""
    needs = nx.from_scipy_sparse_array(graph, create_using=nx.DiGraph)
    # Packages that need each other need the same; what is left has no cycles, and is walked from its end.
    groups = nx.condensation(needs)
    backwards = list(reversed(list(nx.topological_sort(groups))))
    count = np.zeros(graph.shape[0], np.int64)
    for first in range(0, graph.shape[0], BITS):
        reached: dict[int, int] = {}
        for group in backwards:
            members = groups.nodes[group]["members"]
            bits = sum(1 << (member - first) for member in members if first <= member < first + BITS)
            for needed in groups.successors(group):
                bits |= reached[needed]
            reached[group] = bits
            count[list(members)] += bits.bit_count()
    return count


def features_of(graph: sp.csr_array, walk_steps: int) -> torch.Tensor:
    """Logarithms of how many packages each names and of how many name it, then their means where a walk has come to.

    Returns:
        `[packages, 2 + 2 · walk_steps]`, each column of mean 0 and deviation 1.
    """
    names = np.log(np.diff(graph.indptr))
    named = np.log(np.bincount(graph.indices, minlength=graph.shape[1]))
    step = sp.diags_array(1 / np.diff(graph.indptr)) @ graph.astype(float)
    columns = [names, named]
    for _ in range(walk_steps):
        names, named = step @ names, step @ named
        columns += [names, named]
    features = np.stack(columns, 1)
    return torch.from_numpy((features - features.mean(0)) / features.std(0)).float()


class Layer(nn.Module):
    """Attention and a small network, each beside a path that skips it."""

    def __init__(self, attention: nn.Module, width: int) -> None:
        super().__init__()
        self.attention = attention
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.network = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.network(self.norms[1](x))


def make_model(mask: masks.Mask, n_features: int, width: int, layers: int, heads: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(n_features, width),
        *(Layer(sparsec.SparseAttention(mask, width, heads), width) for _ in range(layers)),
        nn.LayerNorm(width),
        nn.Linear(width, 1),
        nn.Flatten(0),
    )


@dataclass
class Trained:
    """A training's course: the share of the target's variance that is explained on packages it was not trained on."""

    explained: list[float]
    predicted: np.ndarray
    seconds: float


def train(model: nn.Module, features: torch.Tensor, target: torch.Tensor, is_test: torch.Tensor, steps: int) -> Trained:
    """Trains on all packages but the test's, all at once in every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    explained = []
    started = time.perf_counter()
    with click.progressbar(range(steps), label="training") as bar:
        for _ in bar:
            predicted = model(features[None])
            error = (predicted - target).square()
            explained.append(1 - (error[is_test].mean() / target[is_test].var()).item())
            optimizer.zero_grad()
            error[~is_test].mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return Trained(explained, predicted.detach().numpy(), time.perf_counter() - started)


def plot(path: Path, courses: dict[str, Trained], target: np.ndarray, is_test: np.ndarray) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for (name, course), colour in zip(courses.items(), ("#E69F00", "#009E73", "#0072B2"), strict=True):
        left.semilogy([1 - share for share in course.explained], color=colour, label=name)
        right.plot(target[is_test], course.predicted[is_test], ".", color=colour, markersize=1, alpha=0.3)
    left.set(xlabel="step", ylabel="share of the variance not explained", ylim=(None, 1))
    left.legend(frameon=False)
    low, high = target.min(), target.max()
    right.plot([low, high], [low, high], color="black", linewidth=0.8)
    right.set(xlabel="logarithm of packages needed", ylabel="predicted")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("How many packages does a Debian package need? Those that were not trained on", fontsize=10)
    figure.savefig(path, dpi=120, metadata={"Software": None})


@click.command()
@click.option("--steps", default=100, show_default=True, help="Training steps, each over the whole graph.")
@click.option("--packages", type=click.IntRange(100), help="Only the first so many packages; all by default.")
@click.option("--width", default=32, show_default=True, help="Numbers a package has between layers.")
@click.option("--layers", default=4, show_default=True, help="Each sees one dependency further.")
@click.option("--heads", default=2, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(__file__).parent / "results",
    help="Folder of the plot and the figures.",
)
def main(steps: int, packages: int | None, width: int, layers: int, heads: int, seed: int, out: Path) -> None:
    """Trains a graph transformer on Debian's dependencies, and two models without attention."""
    graph = load_graph(packages)
    n = graph.shape[0]
    target = np.log(packages_needed(graph))
    is_test = np.random.default_rng(seed).random(n) < 0.2
    click.echo(f"{n:,} packages, {graph.nnz:,} dependencies, {is_test.sum():,} packages to test on")
    alone, graph_mask = masks.window(0, 0), masks.from_sparse(graph)
    kinds = {"alone": (alone, 0), "alone, random walks": (alone, WALK_STEPS), "attention": (graph_mask, 0)}
    courses = {}
    for name, (mask, walk_steps) in kinds.items():
        features = features_of(graph, walk_steps)
        torch.manual_seed(seed)
        model = make_model(mask, features.shape[1], width, layers, heads)
        course = train(model, features, torch.from_numpy(target).float(), torch.from_numpy(is_test), steps)
        courses[name] = course
        click.echo(f"{name}: {course.explained[-1]:.3f} of the variance explained, {course.seconds:.0f} s")
    out.mkdir(parents=True, exist_ok=True)
    figures = {
        "packages": n,
        "dependencies": int(graph.nnz),
        "settings": {"steps": steps, "width": width, "layers": layers, "heads": heads, "seed": seed},
        "explained_variance": {name: [round(value, 4) for value in each.explained] for name, each in courses.items()},
    }
    (out / "graph_transformer.json").write_text(json.dumps(figures, indent=1) + "\n")
    plot(out / "graph_transformer.png", courses, target, is_test)
    click.echo(f"written: {out / 'graph_transformer.png'}")


if __name__ == "__main__":
    main()
