"""What people and programs are shown: pictures of masks, tables, JSON documents."""

from sparsec.report.document import json_text
from sparsec.report.picture import Picture, picture
from sparsec.report.tables import Column, table

__all__ = ["Column", "Picture", "json_text", "picture", "table"]
