"""What people and programs are shown: pictures of masks, tables, JSON documents."""

from sparsec.report.document import json_text
from sparsec.report.picture import Picture, picture
from sparsec.report.side_by_side import (
    devices_reasons,
    devices_table,
    launches,
    lengths_table,
    masks_table,
    masks_verdict,
    refused,
    side_by_side,
)
from sparsec.report.sources import plan_sources
from sparsec.report.tables import Column, table

__all__ = [
    "Column",
    "Picture",
    "devices_reasons",
    "devices_table",
    "json_text",
    "launches",
    "lengths_table",
    "masks_table",
    "masks_verdict",
    "picture",
    "plan_sources",
    "refused",
    "side_by_side",
    "table",
]
