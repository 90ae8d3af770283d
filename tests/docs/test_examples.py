"""The Python code of the documentation runs, and prints what its comments say.

The blocks of a page run one after the other in one namespace, in an empty folder. A comment such as
``<!-- needs: spherehead.pkl -->`` above a block asks for a published SphereHead snapshot of that name. A line
``print(...)  # text`` must print the text.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from metrics import registry
from tests.docs.pages import PythonBlock, page_name, pages, python_blocks
from training import representations

PAGES_WITH_CODE = [page for page in pages() if python_blocks(page)]
SNAPSHOT = "golden/spherehead_128.pkl"  # below the folder of reference data


def run_block(block: PythonBlock, page: Path, namespace: dict) -> None:
    """Run a block; tracebacks show the line of the page."""
    code = compile("\n" * (block.line - 1) + block.code, str(page), "exec", dont_inherit=True)
    exec(code, namespace)


def announced_output(block: PythonBlock) -> list[str]:
    """Return what the comments behind prints say."""
    return re.findall(r"^ *print\(.*\)  # (.*)$", block.code, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES_WITH_CODE, ids=page_name)
def test_python_blocks_run_and_print_what_they_announce(page, tmp_path, monkeypatch, capsys, request):
    monkeypatch.chdir(tmp_path)
    # Examples register representations and metrics; what they add goes away with the test.
    monkeypatch.setattr(representations, "_REGISTRY", dict(representations._REGISTRY))
    monkeypatch.setattr(registry, "_FAMILIES", list(registry._FAMILIES))
    namespace = {"__name__": "documentation"}
    for block in python_blocks(page):
        if block.needs is not None:
            shared_dir = request.getfixturevalue("shared_dir")  # skips, with a reason, where there is none
            (tmp_path / block.needs).symlink_to(shared_dir / SNAPSHOT)
        run_block(block, page, namespace)
        assert capsys.readouterr().out.splitlines() == announced_output(block), f"line {block.line} of {page.name}"


def test_python_blocks_of_a_page_are_found_with_needs_and_lines(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "text\n<!-- needs: a.pkl -->\n```python\nx = 1\n```\n```bash\nls\n```\n```python\nprint(x)  # 1\n```\n"
    )
    blocks = python_blocks(page)
    assert [(block.needs, block.line) for block in blocks] == [("a.pkl", 4), (None, 10)]
    assert [announced_output(block) for block in blocks] == [[], ["1"]]
