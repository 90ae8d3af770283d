"""The bundled network: small, whole, and heads that turn."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from dnnlib.sources import DEMO_PATH
from inference.loading import load_generator
from inference.sampling import Truncation, make_head, orbit_labels
from legacy import load_snapshot

CARD = DEMO_PATH.with_name("README.md")
LARGEST_BYTES = 20_000_000
NUM_HEADS, NUM_VIEWS = 4, 8


@pytest.fixture(scope="module")
def views() -> dict[str, torch.Tensor]:
    """Return images `[heads, views, C, H, W]` by name, once around each head, the front first."""
    generator = load_generator("demo")
    labels = orbit_labels(NUM_VIEWS)
    heads = [make_head(generator, seed, Truncation(psi=0.7)) for seed in range(NUM_HEADS)]
    outputs = [[head.render(label) for label in labels] for head in heads]
    return {name: torch.stack([torch.cat([o[name] for o in head]) for head in outputs]) for name in outputs[0][0]}


def test_file_is_small_and_holds_the_moving_average_alone():
    assert DEMO_PATH.stat().st_size <= LARGEST_BYTES
    networks = load_snapshot("demo")
    assert [name for name in ("G", "D", "G_ema") if networks[name] is not None] == ["G_ema"]
    assert networks["G_ema"].config.representation == "dual_spherical"


def test_card_names_this_very_file():
    assert hashlib.sha256(DEMO_PATH.read_bytes()).hexdigest() in CARD.read_text(encoding="utf-8")


def test_heads_are_opaque_before_a_background(views):
    mask = views["image_mask"]
    side = mask.shape[-1]
    middle = slice(side * 3 // 8, side * 5 // 8)
    assert mask[..., middle, middle].mean() > 0.9
    assert mask[..., : side // 8, : side // 8].mean() < 0.1


def test_heads_differ_from_each_other_and_from_behind(views):
    images = views["image"]
    assert images.isfinite().all()
    front, back = images[:, 0], images[:, NUM_VIEWS // 2]
    assert (front - back).abs().mean() > 0.05
    assert all((front[i] - front[j]).abs().mean() > 0.05 for i in range(NUM_HEADS) for j in range(i))


def test_card_is_found_from_the_readme(repo_root: Path):
    assert "models/README.md" in (repo_root / "README.md").read_text(encoding="utf-8")
