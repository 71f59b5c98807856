#!/usr/bin/env python3
"""A byte-level GPT with sparse causal attention, trained on the source of Python's standard library.

    python examples/byte_gpt.py

Each byte attends those before it within a window, and a few global ones at the start of the sequence: `(window(127,
0) | global_tokens(16)) & causal()`. The same model is trained a second time with dense attention under the same mask
as a matrix (`scaled_dot_product_attention`), from the same seed on the same batches: sparsec's attention is exact, so
that the two losses differ by rounding alone.
"""

from __future__ import annotations

import json
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import click
import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import sparsec
from sparsec import masks

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

BYTES = 256
# One in so many stretches of the text is kept for validation.
VALIDATION = 10


@dataclass(frozen=True)
class Settings:
    """Everything that decides the course of a training."""

    steps: int
    seq_len: int
    batch: int
    width: int
    layers: int
    heads: int
    window: int
    global_tokens: int
    seed: int

    @property
    def mask(self) -> masks.Mask:
        return (masks.window(self.window - 1, 0) | masks.global_tokens(self.global_tokens)) & masks.causal()


def library_source(limit_bytes: int) -> torch.Tensor:
    """The standard library's modules one after the other, as bytes."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))[:limit_bytes]
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def batches(
    text: torch.Tensor, settings: Settings, *, is_training: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless random stretches of the text, and each of their bytes' successors."""
    generator = torch.Generator().manual_seed(settings.seed if is_training else settings.seed + 1)
    stretches = text[: (len(text) - 1) // settings.seq_len * settings.seq_len + 1]
    n = (len(stretches) - 1) // settings.seq_len
    kept = [i for i in range(n) if (i % VALIDATION == 0) != is_training]
    while True:
        chosen = torch.randint(len(kept), (settings.batch,), generator=generator).tolist()
        starts = [kept[i] * settings.seq_len for i in chosen]
        yield (
            torch.stack([stretches[start : start + settings.seq_len] for start in starts]),
            torch.stack([stretches[start + 1 : start + settings.seq_len + 1] for start in starts]),
        )


def sparse_attention(settings: Settings) -> Attend:
    return sparsec.compile(settings.mask, settings.seq_len)


def dense_attention(settings: Settings) -> Attend:
    allowed = torch.from_numpy(settings.mask.bind(settings.seq_len).to_dense())
    return partial(scaled_dot_product_attention, attn_mask=allowed)


ATTENTIONS = {"sparsec": sparse_attention, "dense": dense_attention}


class Block(nn.Module):
    """Self-attention and a small network, each beside a path that skips it."""

    def __init__(self, width: int, heads: int, attend: Attend) -> None:
        super().__init__()
        self.heads, self.attend = heads, attend
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        self.network = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Each [batch, heads, tokens, head_dim].
        q, k, v = self.to_qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.to_out(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.network(self.norms[1](x))


class ByteGPT(nn.Module):
    """Predicts each next byte."""

    def __init__(self, settings: Settings, attend: Attend) -> None:
        super().__init__()
        self.bytes = nn.Embedding(BYTES, settings.width)
        self.places = nn.Embedding(settings.seq_len, settings.width)
        blocks = (Block(settings.width, settings.heads, attend) for _ in range(settings.layers))
        self.blocks = nn.Sequential(*blocks, nn.LayerNorm(settings.width))
        self.to_bytes = nn.Linear(settings.width, BYTES, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits `[batch, tokens, 256]`."""
        return self.to_bytes(self.blocks(self.bytes(tokens) + self.places.weight[: tokens.shape[1]]))


@dataclass
class Course:
    """How a training went: loss of each step, validation loss at its end (nats a byte), and seconds a step."""

    losses: list[float]
    validation: float
    step_s: float


def train(settings: Settings, text: torch.Tensor, attend: Attend, label: str) -> Course:
    torch.manual_seed(settings.seed)
    model = ByteGPT(settings, attend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    warm_up = max(1, settings.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warm_up))
    losses, took = [], []
    source = batches(text, settings, is_training=True)
    with click.progressbar(range(settings.steps), label=f"{label:8}") as bar:
        for _ in bar:
            started = time.perf_counter()
            loss = loss_of(model, *next(source))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            took.append(time.perf_counter() - started)
    with torch.no_grad():
        unseen = batches(text, settings, is_training=False)
        validation = [loss_of(model, *next(unseen)).item() for _ in range(8)]
    return Course(losses, sum(validation) / len(validation), sorted(took)[len(took) // 2])


def loss_of(model: nn.Module, tokens: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    return cross_entropy(model(tokens).flatten(0, 1), following.flatten())


def plot(path: Path, courses: dict[str, Course], settings: Settings) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    styles = {"dense": {"color": "#E69F00", "linewidth": 4}, "sparsec": {"color": "#0072B2", "linewidth": 1}}
    for name, style in styles.items():
        left.plot(courses[name].losses, label=name, **style)
    left.set(xlabel="step", ylabel="loss, nats a byte")
    left.legend(frameon=False)
    apart = [abs(a - b) for a, b in zip(courses["dense"].losses, courses["sparsec"].losses, strict=True)]
    right.semilogy(apart, ".", color="#0072B2", markersize=3)
    right.set(xlabel="step", ylabel="difference of the two losses")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Byte-level GPT, {settings.seq_len:,} bytes, {settings.mask}", fontsize=10)
    figure.savefig(path, dpi=120, metadata={"Software": None})


@click.command()
@click.option("--steps", default=150, show_default=True)
@click.option("--seq-len", default=1024, show_default=True, help="Bytes of a sequence.")
@click.option("--batch", default=2, show_default=True, help="Sequences a step.")
@click.option("--width", default=128, show_default=True)
@click.option("--layers", default=4, show_default=True)
@click.option("--heads", default=4, show_default=True)
@click.option("--window", default=128, show_default=True, help="Bytes that a byte sees, itself included.")
@click.option("--global-tokens", default=16, show_default=True, help="Bytes at the start that all later ones see.")
@click.option("--seed", default=0, show_default=True)
@click.option("--limit-mib", default=8.0, show_default=True, help="Of the library's source.")
@click.option("--only", type=click.Choice(list(ATTENTIONS)), help="Train one of the two; nothing is drawn.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(__file__).parent / "results",
    help="Folder of the plot and the figures.",
)
def main(limit_mib: float, only: str | None, out: Path, **options: int) -> None:
    """Trains a byte-level GPT with sparse attention, and again with dense attention under the same mask."""
    settings = Settings(**options)
    text = library_source(int(limit_mib * 2**20))
    edges = settings.mask.bind(settings.seq_len).nnz
    click.echo(f"{len(text):,} bytes of source; {edges:,} of {settings.seq_len**2:,} pairs attend")
    courses = {}
    for name in [only] if only else ATTENTIONS:
        courses[name] = train(settings, text, ATTENTIONS[name](settings), name)
        done = courses[name]
        click.echo(
            f"{name}: loss {done.losses[-1]:.3f}, unseen source {done.validation:.3f}, {done.step_s:.2f} s a step"
        )
    if only:
        return
    out.mkdir(parents=True, exist_ok=True)
    figures = {
        "settings": asdict(settings),
        "mask": str(settings.mask),
        "losses": {name: each.losses for name, each in courses.items()},
        "validation": {name: each.validation for name, each in courses.items()},
    }
    (out / "byte_gpt.json").write_text(json.dumps(figures, indent=1) + "\n")
    plot(out / "byte_gpt.png", courses, settings)
    click.echo(f"written: {out / 'byte_gpt.png'}")


if __name__ == "__main__":
    main()
