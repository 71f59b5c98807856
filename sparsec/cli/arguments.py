"""What several commands take: a mask as text or file, names of devices, templates and back ends.

This file decides how such an argument is read, and that one which means nothing is bad usage. It must not know what is
done with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from sparsec.cli.names import nearest

if TYPE_CHECKING:
    from sparsec.device import Device
    from sparsec.masks import Mask

DTYPES: Final = ("fp32", "fp16", "bf16")
# What `4k` and `1m` mean: lengths are powers of two.
_SCALES: Final = {"k": 2**10, "m": 2**20}
_SUFFIXES: Final = (".yaml", ".yml", ".npz", ".mtx", ".npy")


def read_mask(text: str) -> Mask:
    """The mask that an expression means or a file holds.

    Raises:
        MaskError: It is neither, and where.
    """
    from sparsec.masks import load, parse

    is_file = text.lower().endswith(_SUFFIXES) or ("(" not in text and Path(text).is_file())
    return load(text) if is_file else parse(text)


def known_devices(context: click.Context, parameter: click.Parameter, name: str) -> tuple[Device, ...]:
    """The device of that name, or all of them; the message of an unknown one lists the nearest."""
    from sparsec.device import device, devices
    from sparsec.errors import SparsecError

    try:
        return tuple(devices()) if name == "all" else (device(name),)
    except SparsecError as error:
        # Of this machine's own processor, the message is no matter of the name.
        if name == "cpu":
            raise
        raise click.BadParameter(str(error)) from error


def known_template(context: click.Context, parameter: click.Parameter, name: str | None) -> str | None:
    from sparsec.template import templates

    return _known("template", name, templates)


def known_backend(context: click.Context, parameter: click.Parameter, name: str | None) -> str | None:
    from sparsec.backends.base import BACKENDS

    return _known("back end", name, lambda: BACKENDS)


def seq_length(context: click.Context, parameter: click.Parameter, text: str | None) -> int | None:
    """`4096`, `4k` or `1m` as a number of tokens."""
    return None if text is None else _tokens(text)


def lengths(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, ...]:
    """`4k,16k,1m` as numbers of tokens, ascending."""
    return () if text is None else tuple(sorted(set(map(_tokens, text.split(",")))))


def _tokens(text: str) -> int:
    word = text.lower().strip()
    number, scale = (word[:-1], _SCALES[word[-1]]) if word[-1:] in _SCALES else (word, 1)
    if not number.isascii() or not number.isdigit() or int(number) < 1:
        raise click.BadParameter(f"{text!r} is no number of tokens; write 4096, 16k or 1m (k is 1,024)")
    return int(number) * scale


def _known(what: str, name: str | None, names: Callable[[], Iterable[str]]) -> str | None:
    if name is not None and name not in names():
        raise click.BadParameter(f"there is no {what} {name!r}; {nearest(name, names())}")
    return name
