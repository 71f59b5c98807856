"""`sparsec explain --html`: the page and what goes into it."""

from sparsec.report.page.writing import page_text, write_page

__all__ = ["page_text", "write_page"]
