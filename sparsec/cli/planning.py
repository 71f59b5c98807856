"""From what a command line says to a mask, a problem and its plan.

This file decides how the options of `explain` and `bench` become a `Problem`. It must not know what is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from sparsec.cli.arguments import DTYPES, known_backend, known_devices, known_template, seq_length

if TYPE_CHECKING:
    from sparsec.backends.base import Dtype, Problem
    from sparsec.device import Device
    from sparsec.masks import BoundMask, Mask
    from sparsec.planner import Plan
    from sparsec.planner.plans import PlanTune, Reorder

_Command = TypeVar("_Command", bound=Callable[..., Any])  # Any: a command as click takes it

_HEAD_DIM: Final = 64


@dataclass(frozen=True, slots=True)
class Asked:
    """The options that say what is planned, as they were given."""

    seq_len: int | None
    kv_len: int | None
    heads: int | None
    kv_heads: int | None
    head_dim: int | None
    v_dim: int | None
    dtype: Dtype
    batch: int | None
    devices: tuple[Device, ...]
    template: str | None
    backend: str | None
    reorder: Reorder
    needs_grad: bool
    tune: PlanTune

    @property
    def device(self) -> Device:
        """The device asked for; of all of them, the first."""
        return self.devices[0]

    def at(self, seq_len: int) -> Asked:
        """The same for so many queries and keys."""
        return replace(self, seq_len=seq_len, kv_len=None)

    def bound(self, mask: Mask) -> BoundMask:
        """The mask with its lengths.

        Raises:
            UsageError: They were not given, and the mask does not know them.
            MaskError: The mask has others.
        """
        from sparsec.errors import MaskError

        if self.seq_len is None:
            if self.kv_len is not None:
                raise click.UsageError("--kv-len goes with --seq-len")
            try:
                return mask.bind(None)
            except MaskError as error:
                raise click.UsageError(f"give the number of queries with --seq-len ({error})") from error
        return mask.bind(self.seq_len, self.kv_len)

    def problem(self, bound: BoundMask) -> Problem:
        """The shape for a mask; heads and batch elements as many as it has, where none were given."""
        from sparsec.backends.base import Problem

        heads, head_dim = self.heads or bound.n_heads or 1, self.head_dim or _HEAD_DIM
        kv_heads = self.kv_heads or heads
        if heads % kv_heads:
            raise click.BadParameter(
                f"{heads} query heads over {kv_heads} key heads: the first must be a multiple of the second",
                param_hint="'--kv-heads'",
            )
        return Problem(
            q_len=bound.q_len,
            kv_len=bound.kv_len,
            q_heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            v_dim=self.v_dim or head_dim,
            dtype=self.dtype,
            batch=self.batch or bound.n_batch or 1,
            needs_grad=self.needs_grad,
        )

    def plan(self, bound: BoundMask, device: Device | None = None) -> Plan:
        """The plan for a mask, on the device asked for or on another.

        Raises:
            UnsupportedError: Nothing can serve it.
        """
        from sparsec.planner import plan

        return plan(
            bound,
            self.problem(bound),
            device or self.device,
            template=self.template,
            backend=self.backend,
            reorder=self.reorder,
            tune=self.tune,
        )


def count(name: str, text: str, most: int | None = None) -> Callable[[_Command], _Command]:
    """An option that takes a positive number."""
    return click.option(name, type=click.IntRange(1, most), metavar="N", help=text)


def shape_options(command: _Command) -> _Command:
    """Lengths, heads, dimensions and dtype."""
    options = (
        click.option(
            "--seq-len",
            callback=seq_length,
            metavar="N",
            help="Queries, such as 4096 or 64k (k is 1,024); may be left out where the mask knows its lengths.",
        ),
        click.option("--kv-len", callback=seq_length, metavar="N", help="Keys, where they are not as many."),
        count("--heads", "Query heads; as many as the mask has, or 1, by default."),
        count("--kv-heads", "Key and value heads; as many by default."),
        count("--head-dim", "Of q and k, up to 256; 64 by default.", 256),
        count("--v-dim", "Of v; as that of q and k by default.", 256),
        count("--batch", "Batch elements; as many as the mask has, or 1, by default."),
        click.option(
            "--dtype", type=click.Choice(DTYPES), default="fp32", show_default=True, help="Of q, k, v and out."
        ),
    )
    return _with(command, options)


def planning_options(command: _Command) -> _Command:
    """The options of `Asked`."""
    options = (
        click.option(
            "--device",
            "devices",
            default="cpu",
            callback=known_devices,
            metavar="NAME",
            help="One of `sparsec devices`, or in `explain` `all`; this machine by default.",
        ),
        click.option("--template", callback=known_template, metavar="NAME", help="Consider only this template."),
        click.option("--backend", callback=known_backend, metavar="NAME", help="Consider only this back end."),
        click.option(
            "--reorder",
            type=click.Choice(["auto", "off", "force"]),
            default="auto",
            show_default=True,
            help="Whether other orders of tokens compete, or must win.",
        ),
        click.option("--needs-grad", is_flag=True, help="For a forward pass that a backward pass will follow."),
        click.option(
            "--tune",
            type=click.Choice(["cached", "off"]),
            default="cached",
            show_default=True,
            help="Whether to go by tuning records where there are any, or by the cost model alone.",
        ),
    )
    return shape_options(_with(command, options))


def _with(command: _Command, options: Sequence[Callable[[_Command], _Command]]) -> _Command:
    for option in reversed(options):
        command = option(command)
    return command
