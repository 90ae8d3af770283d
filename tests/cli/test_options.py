"""Published command lines are understood, and the examples of the help texts work."""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest

from tests.cli.running import COMMANDS, succeed
from tests.helpers.head_data import encoded, picture, write_files
from tests.helpers.photos import write_photos

GENERATORS = ["gen_samples.py", "gen_videos.py", "gen_videos_interp.py"]


class Published(NamedTuple):
    """An option of a published script."""

    flag: str
    value: str
    """Given on the command line."""
    parameter: str | None
    """What ours is called; None passes nothing on."""
    parsed: Any
    default: Any
    """Of the published script."""


SAMPLES = [
    Published("--network", "a.pkl", "network", "a.pkl", None),
    Published("--seeds", "1,2,5-7", "seeds", [1, 2, 5, 6, 7], None),
    Published("--trunc", "0.5", "truncation_psi", 0.5, 0.7),
    Published("--trunc-cutoff", "6", "truncation_cutoff", 6, 14),
    Published("--class", "3", None, None, None),
    Published("--outdir", "out", "outdir", "out", None),
    Published("--shapes", "True", "shapes", True, False),
    Published("--shape-res", "256", "shape_res", 256, 512),
    Published("--shape-format", ".ply", "shape_format", "ply", ".mrc"),
    Published("--fov-deg", "20", "fov_deg", 20.0, 18),
    Published("--reload_modules", "True", None, None, True),
    Published("--pose_cond", "45", "pose_cond", 45.0, 90),
]
VIDEOS = [
    Published("--network", "a.pkl", "network", "a.pkl", None),
    Published("--seeds", "1,2,5-7", "seeds", [1, 2, 5, 6, 7], None),
    Published("--outdir", "out", "outdir", "out", None),
    Published("--output", "out.mp4", "output", "out.mp4", None),
    Published("--shuffle-seed", "1", "shuffle_seed", 1, None),
    Published("--grid", "2x3", "grid", (2, 3), (1, 1)),
    Published("--num-keyframes", "4", "num_keyframes", 4, None),
    Published("--w-frames", "60", "w_frames", 60, 240),
    Published("--trunc", "0.7", "truncation_psi", 0.7, 1.0),
    Published("--trunc-cutoff", "6", "truncation_cutoff", 6, 14),
    Published("--reload_modules", "True", None, None, True),
    Published("--cfg", "Head", "cfg", "Head", "FFHQ"),
    Published("--cfg", "Cats", "cfg", "Cats", "FFHQ"),
    Published("--image_mode", "image_raw", "image_mode", "image_raw", "image"),
    Published("--image_mode", "image_depth", "image_mode", "image_depth", "image"),
    Published("--sample_mult", "2", "sample_mult", 2.0, 1.0),
    Published("--nrr", "128", "nrr", 128, None),
    Published("--shapes", "True", "shapes", True, False),
    Published("--interpolate", "False", "interpolate", False, True),
    Published("--pose_cond", "45", "pose_cond", 45.0, 90),
]
PROJECTIONS = [
    Published("--network", "a.pkl", "network", "a.pkl", None),
    Published("--target", "photos", "target", "photos", None),
    Published("--target_img", "photos", "target", "photos", None),
    Published("--target_seg", "masks", "mask", "masks", None),
    Published("--filename", "0", "filename", "0", ""),
    Published("--outdir", "out", "outdir", "out", None),
    Published("--idx", "3", "idx", (3,), (0,)),
    Published("--num-steps", "10", "num_steps", 10, 500),
    Published("--num-steps-pti", "10", "num_steps_pti", 10, 350),
    Published("--seed", "1", "seed", 1, 303),
    Published("--save-video", "False", "save_video", False, True),
    Published("--fps", "60", "fps", 60, 30),
]
METRICS = [
    Published("--network", "a.pkl", "network", "a.pkl", None),
    Published("--metrics", "fid50k_full,kid50k_full", "metrics", "fid50k_full,kid50k_full", "fid50k_full"),
    Published("--data", "imgs.zip", "image_roots", ("imgs.zip",), None),
    Published("--img_data", "imgs.zip", "image_roots", ("imgs.zip",), None),
    Published("--seg_data", "masks.zip", "mask_roots", ("masks.zip",), None),
    Published("--mirror", "True", "mirror", True, None),
    Published("--mode", "back", "mode", "back", "all"),
    Published("--gpus", "2", "gpus", 2, 1),
    Published("--verbose", "False", "verbose", False, True),
]
CASES = [("gen_samples.py", option) for option in SAMPLES] + [
    (script, option) for script in GENERATORS[1:] for option in VIDEOS
]
CASES += [("projector.py", option) for option in PROJECTIONS]
CASES += [("calc_metrics.py", option) for option in METRICS]
NEEDED = {
    "gen_samples.py": {"--network": "a.pkl", "--seeds": "0"},
    "gen_videos.py": {"--network": "a.pkl"},
    "gen_videos_interp.py": {"--network": "a.pkl"},
    "projector.py": {"--network": "a.pkl", "--target": "photos", "--outdir": "out"},
    "calc_metrics.py": {"--network": "a.pkl"},
}
OUR_DEFAULTS = {
    ("gen_samples.py", "fov_deg"): (18.837, "published: declared an integer, which cuts the intended 18.837 to 18"),
    ("gen_samples.py", "shape_format"): ("mrc", "published: spelled with a dot, which is accepted"),
    ("calc_metrics.py", "metrics"): ("quick", "published: needs a download, and a GPU"),
    ("calc_metrics.py", "image_roots"): ((), "published: None, which means the same"),
    ("calc_metrics.py", "mask_roots"): ((), "published: None, which means the same"),
    ("calc_metrics.py", "mirror"): (False, "published: None, which for all metrics named _full is the same"),
    ("calc_metrics.py", "gpus"): (None, "published: 1; None is the processes that torchrun has started, or 1"),
}
OURS = {
    "gen_samples.py": [
        "--device",
        "--renderer",
        "--noise-mode",
        "--noise-seed",
        "--image-mode",
        "--dry-run",
        "--overwrite",
    ],
    "gen_videos.py": [
        "--device",
        "--renderer",
        "--noise-mode",
        "--noise-seed",
        "--latent",
        "--fov-deg",
        "--dry-run",
        "--overwrite",
    ],
}
OURS["gen_videos_interp.py"] = OURS["gen_videos.py"]


def parse(script: str, *arguments: str) -> dict[str, Any]:
    """Return the parameters that a script makes of a command line."""
    return COMMANDS[script].make_context(script, list(arguments)).params


def case_id(case: Any) -> str:
    return case if isinstance(case, str) else f"{case.flag}={case.value}"


@pytest.mark.parametrize(("script", "option"), CASES, ids=case_id)
def test_published_option_is_accepted_in_its_spelling_and_in_both(script, option):
    needed = [word for flag, value in NEEDED[script].items() if flag != option.flag for word in (flag, value)]
    for flag in {option.flag, option.flag.replace("_", "-"), "--" + option.flag[2:].replace("-", "_")}:
        parameters = parse(script, *needed, flag, option.value)
        if option.parameter is not None:
            parsed = parameters[option.parameter]
            assert option.parsed == (str(parsed) if isinstance(parsed, Path) else parsed)


@pytest.mark.parametrize(("script", "option"), CASES, ids=case_id)
def test_published_default_is_kept_unless_there_is_a_reason(script, option):
    needed = NEEDED[script]
    if option.parameter is None or f"--{option.parameter}" in needed:
        return
    ours = parse(script, *(word for pair in needed.items() for word in pair))[option.parameter]
    if (script, option.parameter) in OUR_DEFAULTS:
        expected, _ = OUR_DEFAULTS[script, option.parameter]
        assert ours == expected != option.default  # an exception that is none does not stay in the table
    else:
        assert ours == option.default


def test_network_is_the_bundled_one_unless_given():
    for script in GENERATORS:
        assert parse(script, "--seeds", "0")["network"] == "demo"
    assert parse("projector.py", "--target", "photos", "--outdir", "out")["network"] == "demo"


def test_published_required_options_are_required_but_for_the_network():
    with pytest.raises(click.MissingParameter):
        parse("gen_samples.py", "--network", "a.pkl")
    for missing in sorted(NEEDED["projector.py"].keys() - {"--network"}):
        with pytest.raises(click.MissingParameter):
            parse("projector.py", *(w for pair in NEEDED["projector.py"].items() if pair[0] != missing for w in pair))


def test_fov_deg_takes_the_published_default_that_the_published_script_rejects():
    assert parse("gen_samples.py", "--network", "a", "--seeds", "0", "--fov-deg", "18.837")["fov_deg"] == 18.837


@pytest.mark.parametrize("script", GENERATORS)
def test_own_options_are_there_and_repeatability_is_the_default(script):
    parameters = {flag for parameter in COMMANDS[script].params for flag in parameter.opts}
    assert set(OURS[script]) <= parameters
    values = parse(script, "--network", "a.pkl", "--seeds", "0")
    assert (values["noise_mode"], values["noise_seed"], values["device"]) == ("const", 0, "auto")
    assert values["renderer"] == "auto"
    assert not values["dry_run"]
    assert not values["overwrite"]


@pytest.mark.parametrize("script", GENERATORS)
def test_reload_modules_false_is_refused_because_nothing_is_executed(script):
    with pytest.raises(click.BadParameter, match="code stored in a network file is never run"):
        parse(script, "--network", "a.pkl", "--seeds", "0", "--reload_modules", "False")


def examples(script: str) -> list[str]:
    """Return the lines below 'Examples:' in the help text of a script."""
    _, _, text = COMMANDS[script].help.partition("Examples:\n")
    return [line.strip() for line in text.splitlines() if line.strip()]


EXAMPLES = [(script, line) for script in COMMANDS for line in examples(script)]


@pytest.mark.parametrize("script", COMMANDS)
def test_help_text_has_examples_that_are_shown_as_they_are(script):
    shown = succeed(script, "--help").stdout
    assert len(examples(script)) >= 2
    for line in examples(script):
        assert line in shown


@pytest.mark.parametrize(("script", "line"), EXAMPLES)
def test_example_parses(script, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line)
    launcher, arguments = words[: words.index(script)], words[words.index(script) + 1 :]
    several_nodes = ["torchrun", "--nnodes", "2", "--nproc-per-node", "8"]
    assert launcher in (["python"], ["torchrun", "--nproc-per-node", "8"], several_nodes)
    if script == "train.py":
        if launcher == several_nodes:
            monkeypatch.setenv("WORLD_SIZE", "16")
        for name in ("imgs.zip", "masks.zip"):
            write_files(tmp_path / name, {"a.png": encoded(picture(0, 512))})
    if script == "calc_metrics.py":
        for name in ("imgs.zip", "masks.zip"):
            write_files(tmp_path / name, {"a.png": encoded(picture(0, 512))})
        if launcher[0] == "torchrun":
            monkeypatch.setenv("WORLD_SIZE", "8")
    if script == "projector.py":
        write_photos(tmp_path / "photos", ["a.png", "b.png", "c.png", "d.png"])
        shutil.copytree(tmp_path / "photos", tmp_path / "masks")
        shutil.copyfile(tmp_path / "photos" / "a.png", tmp_path / "face.jpg")
    before = sorted(tmp_path.iterdir())
    if script == "convert_checkpoint.py":
        parse(script, *arguments)
    else:
        plan = json.loads(succeed(script, *arguments, "--dry-run").stdout)
        assert script == "train.py" or plan["network"] in ("spherehead.pkl", "init:debug", "demo")
    assert sorted(tmp_path.iterdir()) == before
