"""A Sphinx directive that shows every mask constructor: its picture, its meaning, and an example that is run.

    ```{mask-gallery}
    ```

The entries come from `sparsec.masks.CONSTRUCTORS`, so a new mask is documented by being there.
"""

from __future__ import annotations

from html import escape
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive

from sparsec.errors import MaskError
from sparsec.masks import CONSTRUCTORS, BoundMask, parse

_TOKENS = 16
_CELL = 8
# Blue and grey stay apart for every kind of colour vision, on white and on black.
_ATTENDED, _EMPTY = "#2a78c8", "#8888882e"


def drawn(example: str) -> BoundMask:
    """The example with the lengths it knows, or else with 16 tokens; of several masks, the first."""
    mask = parse(example)
    try:
        bound = mask.bind()
    except MaskError:
        bound = mask.bind(_TOKENS)
    return bound.select(0, 0) if bound.varies_by_head or bound.varies_by_batch else bound


def svg(bound: BoundMask, title: str) -> str:
    """A small mask, one square a pair: queries from top to bottom, keys from left to right."""
    dense = bound.to_dense()
    q_len, kv_len = dense.shape
    squares = "".join(
        f'<rect x="{kv * _CELL}" y="{q * _CELL}" width="{_CELL - 1}" height="{_CELL - 1}" '
        f'fill="{_ATTENDED if dense[q, kv] else _EMPTY}"/>'
        for q in range(q_len)
        for kv in range(kv_len)
    )
    size = f'width="{kv_len * _CELL}" height="{q_len * _CELL}"'
    name = escape(title, quote=True)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{name}">{squares}</svg>'


class MaskGallery(Directive):
    """A definition list in the catalogue's order."""

    def run(self) -> list[nodes.Node]:
        gallery = nodes.definition_list()
        for name, constructor in CONSTRUCTORS.items():
            meaning = nodes.definition("", nodes.paragraph("", f"{constructor.summary}."))
            if constructor.example:
                picture = svg(drawn(constructor.example), constructor.example)
                meaning += nodes.raw("", picture, format="html")
                meaning += nodes.literal_block(constructor.example, constructor.example, language="python")
            term = nodes.term("", "", nodes.literal(name, name))
            gallery += nodes.definition_list_item("", term, meaning)
        return [gallery]


def setup(app: Any) -> dict[str, bool]:  # Sphinx's application, which has no types
    app.add_directive("mask-gallery", MaskGallery)
    return {"parallel_read_safe": True}
