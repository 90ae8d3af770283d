"""What the documentation refers to exists: files, headings, pictures, options; and the import rules are kept."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import click
import pytest

from tests.docs.pages import REPO_ROOT, page_name, pages, prose

ARCHITECTURE = REPO_ROOT / "docs" / "architecture.md"
# Options of other programs: conda and pip, pytest, torchrun, SLURM's sbatch and srun.
FOREIGN_OPTIONS = {"--extra-index-url", "--editable", "--runslow"}
FOREIGN_OPTIONS |= {"--nnodes", "--nproc-per-node", "--max-restarts", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id"}
FOREIGN_OPTIONS |= {"--cpus-per-task", "--gpus-per-node", "--job-name", "--kill-on-bad-exit", "--nodes"}
FOREIGN_OPTIONS |= {"--ntasks-per-node", "--open-mode", "--output", "--requeue", "--signal", "--time"}

all_pages = pytest.mark.parametrize("page", pages(), ids=page_name)


# Links ----------------------------------------------------------------------------------------------------------------


def links(page: Path) -> list[str]:
    """Return the targets of links and pictures that are not on the web."""
    targets = re.findall(r"\]\(([^()\s]+)\)", prose(page))
    return [unquote(target) for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(page: Path) -> set[str]:
    """Return the names under which headings can be linked to, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@all_pages
def test_relative_links_and_pictures_resolve(page):
    broken = []
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        found = target.exists() and (not anchor or anchor in anchors(target))
        broken += [] if found else [link]
    assert not broken


def test_anchors_follow_github(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One, two: `three`\n```\n# no heading\n```\n## B-C d\n")
    assert anchors(page) == {"one-two-three", "b-c-d"}


# Options --------------------------------------------------------------------------------------------------------------


def commands() -> Iterator[click.Command]:
    """Yield the click commands of the scripts in the root, those of groups included."""
    for script in sorted(REPO_ROOT.glob("*.py")):
        if not re.search(r"click\.(command|group)", script.read_text(encoding="utf-8")):
            continue
        spec = importlib.util.spec_from_file_location(f"docs_test_{script.stem}", script)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for value in vars(module).values():
            if isinstance(value, click.Command):
                yield value
            if isinstance(value, click.Group):
                yield from value.commands.values()


@pytest.fixture(scope="module")
def known_options() -> set[str]:
    """Return every option of every script."""
    parameters = [parameter for command in commands() for parameter in command.params]
    return {name for parameter in parameters for name in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}


def mentioned_options(page: Path) -> set[str]:
    """Return what looks like a long option anywhere in a page."""
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", page.read_text(encoding="utf-8")))


@all_pages
def test_mentioned_options_exist(page, known_options):
    assert not mentioned_options(page) - known_options - FOREIGN_OPTIONS


# Names of files and modules -------------------------------------------------------------------------------------------


@all_pages
def test_files_named_in_code_exist(page):
    """Names such as `inference/video.py`: from the root, beside the page, or anywhere if without a folder."""
    names = re.findall(r"`([\w./-]+\.(?:py|sh|md|toml|yml))`", page.read_text(encoding="utf-8"))
    somewhere = {path.name for path in REPO_ROOT.rglob("*") if path.is_file() and ".venv" not in path.parts}
    assert not [
        name
        for name in names
        if not (REPO_ROOT / name).exists() and not (page.parent / name).exists() and name not in somewhere
    ]


# Who imports whom -----------------------------------------------------------------------------------------------------


def import_rules() -> dict[str, set[str]]:
    """Return the table of docs/architecture.md: part -> parts of this project that it may import."""
    table = re.search(
        r"^\| part \| may import \|\n\|.*\|\n((?:\|.*\|\n)+)", ARCHITECTURE.read_text(encoding="utf-8"), re.MULTILINE
    )
    rows = [row.strip("|").split("|")[:2] for row in table[1].splitlines()]
    return {re.search(r"`([\w*/.]+)`", part)[1]: set(re.findall(r"`(\w+)`", may)) for part, may in rows}


def imported_names(file: Path) -> set[str]:
    """Return the top-level names that a source file imports, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def test_imports_follow_the_table_of_the_architecture():
    rules = import_rules()
    own = {path.stem for path in REPO_ROOT.glob("*.py")} | {
        path.parent.name for path in REPO_ROOT.glob("*/__init__.py")
    }
    files_of = {
        part: set((REPO_ROOT / part).rglob("*.py") if "." not in part else REPO_ROOT.glob(part)) for part in rules
    }
    offences = []
    for part, allowed in rules.items():
        assert files_of[part], f"{part}: no such part"
        # A row for fewer files goes before one for more.
        narrower = set().union(*(files for files in files_of.values() if files < files_of[part]))
        for file in files_of[part] - narrower:
            itself = part.split("/")[0].split(".")[0]
            strangers = (imported_names(file) & own) - allowed - {itself}
            offences += [f"{file.relative_to(REPO_ROOT)} imports {name}" for name in sorted(strangers)]
    assert not offences


def test_dnnlib_never_imports_torch():
    files = (REPO_ROOT / "dnnlib").rglob("*.py")
    assert not [file.name for file in files if "torch" in imported_names(file)]


# Messages -------------------------------------------------------------------------------------------------------------


def test_error_messages_in_docs_exist_in_the_code():
    page = REPO_ROOT / "docs" / "checkpoints.md"
    table = page.read_text(encoding="utf-8").split("\n## Errors\n")[1]
    cells = re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE)
    quoted = [message for cell in cells for message in re.findall("`(.*?)`", cell)]
    parts = ("dnnlib", "inference", "torch_utils", "training")
    files = [*REPO_ROOT.glob("*.py"), *(file for part in parts for file in (REPO_ROOT / part).rglob("*.py"))]
    source = "\n".join(file.read_text(encoding="utf-8") for file in files)
    assert len(quoted) > 20
    assert not [message for message in quoted if message not in source]
