"""The pages of documentation, and what is taken out of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

REPO_ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(r"(?:<!-- needs: (\S+) -->\n+)?^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class PythonBlock(NamedTuple):
    """A fenced block marked ``python``."""

    needs: str | None
    """File that a comment ``<!-- needs: FILE -->`` just above the block asks for."""
    code: str
    line: int
    """Of its first line of code, in the page."""


def pages() -> list[Path]:
    """Return README.md, where there is one, and the pages in docs/."""
    return [path for path in (REPO_ROOT / "README.md",) if path.exists()] + sorted((REPO_ROOT / "docs").glob("*.md"))


def page_name(page: Path) -> str:
    """Return the path of a page from the root of the checkout."""
    return page.relative_to(REPO_ROOT).as_posix()


def python_blocks(page: Path) -> list[PythonBlock]:
    """Return the blocks marked ``python``, in order."""
    text = page.read_text(encoding="utf-8")
    matches = _BLOCK.finditer(text)
    return [PythonBlock(match[1], match[2], text.count("\n", 0, match.start(2)) + 1) for match in matches]


def prose(page: Path) -> str:
    """Return the text of a page without code, fenced or in line."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "`code`", text)
