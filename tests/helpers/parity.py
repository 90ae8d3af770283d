"""Compare results with reference values, key by key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from tests.helpers.vectors import SampledTensor

PARITY = 1e-4
"""Tolerance of parity with the published systems: float32 sums of networks in another order of operations."""


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Return `max |ours - reference| / max(1, max |reference|)`; NaN anywhere gives infinity."""
    ours, reference = ours.detach().double(), reference.detach().double()
    error = (ours - reference).abs().max() / max(1.0, reference.abs().max().item())
    return error.item() if error.isfinite() else float("inf")


def compare(ours: torch.Tensor, reference: torch.Tensor | SampledTensor) -> float:
    """Return the relative error against a tensor or a sampled one; infinity for another shape."""
    if tuple(ours.shape) != tuple(reference.shape):
        return float("inf")
    if isinstance(reference, torch.Tensor):
        return relative_error(ours, reference)
    whole = ours.detach().double()
    sampled = whole.flatten()[:: reference.stride][: len(reference.values)]
    statistics = torch.stack([whole.mean(), whole.std(correction=0), whole.min(), whole.max()])
    expected = torch.tensor(reference.statistics, dtype=torch.float64)
    return max(relative_error(sampled, reference.values), relative_error(statistics, expected))


def assert_parity(
    ours: Mapping[str, torch.Tensor],
    reference: Mapping[str, torch.Tensor | SampledTensor],
    tolerance: float = PARITY,
    keys: Iterable[str] | None = None,
) -> None:
    """Check every key of the reference, or those given, and name all that differ by more than the tolerance."""
    keys = list(reference if keys is None else keys)
    assert keys, "nothing to compare"
    missing = [key for key in keys if key not in ours]
    assert not missing, f"not computed: {missing}"
    errors = {key: compare(ours[key], reference[key]) for key in keys}
    wrong = {key: error for key, error in errors.items() if not error <= tolerance}
    assert not wrong, f"relative errors above {tolerance:g} (inf: other shape or not finite): {wrong}"


def strip_prefix(prefix: str, values: Mapping[str, object]) -> dict:
    """Return the entries whose key begins with a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
