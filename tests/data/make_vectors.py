"""Copy reference values of the published systems from the specification into this folder.

The values were computed by the published code, on a CPU in float32, with weights and inputs that can be made again
anywhere (`tests/helpers/published.py`). With them, a checkout by itself tests that its numbers are the published ones.

    python -m tests.data.make_vectors [path of the specification, by default ../shared/spec]

Files written here:
    generator_<system>.npz   results of the tiny generators, elements at a stride (`tests.helpers.vectors`)
    initial_weights.npz      first values and sums of squares of networks constructed after seed 0
    discriminators.npz       logits and resized images
    building_blocks.json.gz  small vectors of resampling, ray, sampling and marching formulas
    losses.json.gz           loss values, gradient norms and w_avg of every training phase of five configurations
    state_dicts.json.gz      names, shapes and kinds (P parameter, B buffer) of the entries of the 512-pixel networks
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.vectors import DATA_DIR, Vectors, write_json_gz, write_vectors

SYSTEMS = ("sphere", "pano", "eg3d")
_STATISTICS = ("mean", "std_population", "min", "max")
_BUILDING_BLOCKS = (
    "rays_R4",
    "spherical_box1",
    "sphere_sample_planes_RandomState1_1x2x3x32x8x8",
    "importance",
    "marcher",
    "box_limits",
    "resample",
    "conv_resample",
)
_NUM_FIRST = 3


def make_all(spec: Path, out: Path) -> None:
    """Write every file of the table above into the folder `out`."""
    fixtures = spec / "fixtures"
    for system in SYSTEMS:
        write_vectors(out / f"generator_{system}.npz", generator_vectors(_read(fixtures / f"generator_{system}.json")))
    initial = {system: _read(fixtures / f"init_seed0_{system}.json") for system in SYSTEMS}
    write_vectors(out / "initial_weights.npz", initial_vectors(initial))
    write_vectors(out / "discriminators.npz", discriminator_vectors(_read(fixtures / "discriminators.json")))
    misc = _read(fixtures / "misc.json")
    write_json_gz(out / "building_blocks.json.gz", {key: misc[key] for key in _BUILDING_BLOCKS})
    losses = {path.stem.removeprefix("loss_"): _read(path) for path in sorted(fixtures.glob("loss_*.json"))}
    write_json_gz(out / "losses.json.gz", losses)
    write_json_gz(out / "state_dicts.json.gz", state_dict_lists(spec / "state_dicts"))


def generator_vectors(fixture: dict[str, Any]) -> Vectors:
    """Return the results of one tiny generator."""
    arrays = {key: np.array(entry["flat_values"]) for key, entry in fixture.items()}
    tensors = {
        key: {
            "shape": entry["shape"],
            "stride": entry["flat_stride"],
            "statistics": [entry[name] for name in _STATISTICS],
        }
        for key, entry in fixture.items()
    }
    return Vectors(arrays, {"tensors": tensors})


def initial_vectors(fixtures: dict[str, dict[str, Any]]) -> Vectors:
    """Return the first values, padded with NaN, and sums of squares of initial weights."""
    arrays = {}
    for system, fixture in fixtures.items():
        padded = [[*entry["first"], *[np.nan] * _NUM_FIRST][:_NUM_FIRST] for entry in fixture.values()]
        arrays[f"{system}.first"] = np.array(padded)
        arrays[f"{system}.sumsq"] = np.array([entry["sumsq"] for entry in fixture.values()])
    shapes = {system: [[k, entry["shape"]] for k, entry in fixture.items()] for system, fixture in fixtures.items()}
    return Vectors(arrays, {"shapes": shapes})


def discriminator_vectors(fixture: dict[str, Any]) -> Vectors:
    """Return logits, constructor arguments and resized images."""
    resized = fixture["filtered_resizing"]
    variants = {key: entry for key, entry in fixture.items() if not key.startswith("filtered_resizing")}
    arrays = {f"logits/{key}": np.array(entry["logits"]) for key, entry in variants.items()}
    arrays |= {f"resized/{key}": np.array(values) for key, values in resized.items()}
    meta = {
        key: {"extra": entry.get("extra", {}), "n_params": entry.get("n_params")} for key, entry in variants.items()
    }
    return Vectors(arrays, {"variants": meta, "resized": list(resized)})


def state_dict_lists(folder: Path) -> dict[str, list[list[Any]]]:
    """Return network -> rows of name, shape and kind."""
    lists = {}
    for path in sorted(folder.glob("*.tsv")):
        rows = [line.split("\t") for line in path.read_text().splitlines() if line]
        lists[path.stem] = [[name, json.loads(shape), kind] for name, shape, _dtype, kind in rows]
    return lists


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


if __name__ == "__main__":
    default = DATA_DIR.parents[2] / "shared" / "spec"
    make_all(Path(sys.argv[1]) if len(sys.argv) > 1 else default, DATA_DIR)
