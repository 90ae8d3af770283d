"""Options of the video scripts."""

import click
import pytest
from click.testing import CliRunner

from dnnlib import cli_video


def parse(*arguments: str) -> dict | str:
    """Return the parameters that a command receives, or the text of its error."""
    received = {}

    @click.command()
    @cli_video.video_options(("Front", "Turn"), ("image", "depth"), ("ply", "mrc"), shape_level=7.5, fps=25)
    def command(**parameters):
        received.update(parameters)

    result = CliRunner().invoke(command, ["--network", "a.pkl", *arguments])
    return received if result.exit_code == 0 else result.output


def test_video_options_defaults_are_the_first_choices_and_those_given():
    values = parse()
    assert (values["cfg"], values["image_mode"], values["shape_format"]) == ("Front", "image", "ply")
    assert (values["shape_level"], values["fps"]) == (7.5, 25)
    assert values["seeds"] is None and values["latent"] is None and values["output"] is None


@pytest.mark.parametrize(
    ("flag", "value", "parameter", "parsed"),
    [
        ("--cfg", "Turn", "cfg", "Turn"),
        ("--image_mode", "depth", "image_mode", "depth"),
        ("--sample_mult", "2", "sample_mult", 2.0),
        ("--w_frames", "3", "w_frames", 3),
        ("--num_keyframes", "4", "num_keyframes", 4),
        ("--shuffle_seed", "5", "shuffle_seed", 5),
        ("--grid", "2,3", "grid", (2, 3)),
        ("--shape-format", ".MRC", "shape_format", "mrc"),
        ("--shape_level", "-3.5", "shape_level", -3.5),
        ("--interpolate", "False", "interpolate", False),
        ("--pose_cond", "-45.5", "pose_cond", -45.5),
    ],
)
def test_video_options_are_parsed(flag, value, parameter, parsed):
    assert parse(flag, value)[parameter] == parsed


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--cfg", "Dogs"),
        ("--image-mode", "mask"),
        ("--shape-format", "stl"),
        ("--w-frames", "0"),
        ("--num-keyframes", "0"),
        ("--shuffle-seed", "-1"),
        ("--grid", "0x1"),
        ("--fov-deg", "0"),
        ("--fov-deg", "nan"),
        ("--nrr", "0"),
        ("--sample-mult", "0"),
        ("--shape-res", "7"),
        ("--shape-level", "nan"),
        ("--fps", "0"),
        ("--pose-cond", "inf"),
        ("--reload-modules", "false"),
    ],
)
def test_video_options_out_of_range_are_usage_errors_that_name_the_option(flag, value):
    assert f"Invalid value for '{flag}'" in parse(flag, value)


@pytest.mark.parametrize("flag", ["--latent", "--output"])
def test_video_options_files_may_not_be_folders(flag, tmp_path):
    assert f"Invalid value for '{flag}'" in parse(flag, str(tmp_path))


def test_video_options_outdir_may_not_be_a_file(tmp_path):
    (tmp_path / "a").touch()
    assert "Invalid value for '--outdir'" in parse("--outdir", str(tmp_path / "a"))
