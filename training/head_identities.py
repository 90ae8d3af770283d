"""Read who is in the images of a data set.

`dataset.json` may have, beside `labels`, the key `identities`: a list of [path, identity], where an identity is a whole
number or a string. Images of one identity show the same head from several views.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from training.head_labels import label_by_name
from training.image_reading import HeadReader
from training.image_sources import LABELS_NAME, FolderSource, ZipSource, printable, read_labels_file, without_extension

IDENTITIES_KEY = "identities"
SYNTHETIC_NOTE = "synthetic_heads.json"
"""Beside synthetic data sets; it says what they hold."""
_NUMBER = re.compile(r"(\d{8,})\.\w+$")  # at the end of the names of synthetic images

Identity = int | str


def parse_identities(data: bytes, where: str) -> dict[str, Identity] | None:
    """Read the identities in the text of `dataset.json`.

    Args:
        data: the text.
        where: what it is called in messages.

    Returns:
        Identities by path with forward slashes; None where there are none.

    Raises:
        ValueError: they are broken; the message says what was expected and what came.
    """
    if f'"{IDENTITIES_KEY}"'.encode() not in data:  # labels of many images take a while to read
        return None
    try:
        entries = json.loads(data).get(IDENTITIES_KEY)
    except (ValueError, RecursionError, AttributeError) as error:
        raise ValueError(f"{where}: expected a JSON object, came {str(error)[:200]}") from None
    if entries is None:
        return None
    if not isinstance(entries, list):
        raise ValueError(f"{where}: identities: expected a list of [path, identity], came {repr(entries)[:80]}")
    table: dict[str, Identity] = {}
    for position, entry in enumerate(entries):
        fits = (
            isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str) and type(entry[1]) in (int, str)
        )
        if not fits:
            raise ValueError(
                f"{where}: identities[{position}]: expected [path, whole number or string], came {repr(entry)[:80]}"
            )
        name = entry[0].replace("\\", "/").removeprefix("./")
        if table.setdefault(name, entry[1]) != entry[1]:
            raise ValueError(f"{where}: identities: expected one for {printable(name)}, came several that differ")
    return table


def read_identities(
    source: FolderSource | ZipSource, names: Sequence[str], use_basename: bool = False
) -> list[Identity | None] | None:
    """Return the identities of images of a root, None for those without; None where the root names none.

    Entries are found as `head_labels.collect_labels` finds labels: by path, or by path without extension.

    Synthetic sets from before `dataset.json` had identities are known by the note beside them: the views of an identity
    follow each other.

    Args:
        source: the root.
        names: paths of its images.
        use_basename: find entries by file name alone, without folders.

    Raises:
        ValueError: as `parse_identities`.
    """
    text = read_labels_file(source)
    table = None if text is None else parse_identities(text, f"{printable(source.path)}/{LABELS_NAME}")
    if table is not None:
        if use_basename:
            table, names = {_basename(name): one for name, one in table.items()}, [*map(_basename, names)]
        stems = label_by_name(table)
        return [table.get(name, stems.get(without_extension(name))) for name in names]
    views = _synthetic_views(Path(source.path).parent / SYNTHETIC_NOTE)
    if views is None:
        return None
    numbers = [_NUMBER.search(name) for name in names]
    return [None if number is None else int(number[1]) // views for number in numbers]


def _basename(name: str) -> str:
    return name.rsplit("/", 1)[-1]


def _synthetic_views(note: Path) -> int | None:
    """Return how many views of each identity a synthetic set has; None where there is no such note."""
    try:
        views = json.loads(note.read_bytes())["views_per_identity"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return views if type(views) is int and views >= 1 else None


def number_identities(reader: HeadReader) -> np.ndarray | None:
    """Number the identities of all images; those of different roots differ, and so do images without one.

    Returns:
        int64 [N]; None where no root names identities.

    Raises:
        ValueError: as `parse_identities`.
    """
    found: list[tuple[int, Identity | None]] = []
    named = False
    for number, roots in enumerate(reader.roots):
        names = [item.image for item in reader.items if item.root == number]
        identities = read_identities(roots.images, names)
        named |= identities is not None
        found += [(number, identity) for identity in identities or [None] * len(names)]
    if not named:
        return None
    numbers: dict[object, int] = {}
    keys = [(root, identity) if identity is not None else position for position, (root, identity) in enumerate(found)]
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)
