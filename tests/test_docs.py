"""Python blocks of the documentation run, in the order of their page; so do `$ sparsec` commands of console blocks."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

ROOT = Path(__file__).parent.parent
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md"])
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<!!)\[[^\]\n]+\]\(([^)\s]+)\)")


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in _BLOCK.findall(page.read_text()) if kind == language]


def names(language: str) -> list:
    return [pytest.param(page, id=page.stem) for page in PAGES if blocks(page, language)]


@pytest.mark.parametrize("page", names("python"))
def test_python_blocks_run(page, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    for number, text in enumerate(blocks(page, "python"), 1):
        exec(compile(text, f"{page.name}, block {number}", "exec"), scope)


@pytest.mark.parametrize("page", names("console"))
def test_commands_succeed(page, tmp_path, monkeypatch):
    from sparsec.cli import sparsec as command

    monkeypatch.chdir(tmp_path)
    for line in "\n".join(blocks(page, "console")).splitlines():
        if not line.startswith("$ sparsec "):
            continue
        arguments = shlex.split(line.removeprefix("$ sparsec "), comments=True)
        result = CliRunner().invoke(command, arguments)
        assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception!r}"


@pytest.mark.parametrize("page", [pytest.param(page, id=page.name) for page in [*PAGES, *ROOT.glob("*.md")]])
def test_links_within_the_project_lead_somewhere(page):
    for target in _LINK.findall(page.read_text()):
        path = target.split("#")[0]
        if path and "://" not in path:
            assert (page.parent / path).exists(), f"{page.name} links to {target}"
