"""The command for data sets."""

import inspect
import json
import re
import shlex
import zipfile

import click
import pytest
from click.testing import CliRunner
from PIL import Image

import dataset_tool
from tests.helpers.head_data import SIDE, HeadFiles, encoded, item_name, picture
from training.dataset import HeadDataset
from training.train_config import DataConfig

# click 8.1 joins the two streams unless told otherwise; later versions know no other way than apart.
_SEPARATE = {"mix_stderr": False} if "mix_stderr" in inspect.signature(CliRunner).parameters else {}
OWN = {"pack": dataset_tool.pack, "check": dataset_tool.check}


def run(*arguments, code=0):
    """Run the command in this process; return its two streams."""
    result = CliRunner(**_SEPARATE).invoke(dataset_tool.dataset_tool, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.stdout + result.stderr
    return result.stdout, result.stderr


def error(*arguments, code=1):
    """Run the command, check that it fails, and return its last line."""
    _, stderr = run(*arguments, code=code)
    assert "Traceback" not in stderr
    return stderr.strip().splitlines()[-1]


@pytest.fixture
def source(tmp_path):
    HeadFiles(6).write(tmp_path)
    return tmp_path


def pack_arguments(source, *more):
    roots = ["--source", source / "images", "--masks", source / "masks", "--parsing", source / "parsing"]
    dests = ["--dest", source / "a.zip", "--dest-masks", source / "m.zip", "--dest-parsing", source / "p.zip"]
    return ["pack", *roots, *dests, "--workers", 0, *more]


def test_pack_then_check_then_read(source):
    stdout, stderr = run(*pack_arguments(source))
    assert stdout.startswith("packed 6 images, left out 0: ")
    assert "6/6" in stderr, "a progress bar"
    roots = ["--source", source / "a.zip", "--masks", source / "m.zip", "--parsing", source / "p.zip"]
    stdout, _ = run("check", *roots, "--workers", 0, "--outdir", source / "report")
    assert stdout == "6 images can be used, 0 defects\n"
    assert sorted(path.name for path in (source / "report").iterdir()) == ["poses.png", "sheet.png", "summary.json"]
    assert json.loads((source / "report" / "summary.json").read_text())["num_usable"] == 6
    with Image.open(source / "report" / "poses.png") as poses:
        assert poses.size[0] > 720
    config = DataConfig(images=(str(source / "a.zip"),), masks=(str(source / "m.zip"),), resolution=SIDE)
    assert len(HeadDataset(config)) == 6


def test_published_spellings_are_understood(source):
    roots = ["--img_source", source / "images", "--seg_source", source / "masks"]
    dests = ["--img_dest", source / "i", "--seg_dest", source / "s"]
    size = ["--resolution", "16x16", "--transform", "center-crop", "--ext", ".jpg", "--max_images", 2]
    run("pack", *roots, *dests, *size, "--use_basename", "True", "--workers", 0)
    with Image.open(source / "i" / "00000" / "img00000001.jpg") as image:
        assert image.size == (16, 16)
    assert (source / "s" / "00000" / "img00000001.png").exists()


def test_what_is_left_out_is_said(source):
    (source / "images" / item_name(2)).write_bytes(b"x")
    assert "img00000002.png: not an image that can be read" in error(*pack_arguments(source))
    stdout, stderr = run(*pack_arguments(source, "--skip-bad"))
    assert stdout.startswith("packed 5 images (2 of them by an earlier run), left out 1: ")
    assert re.search(r"left out: .*img00000002.png: not an image", stderr)


def test_check_lists_defects_and_fails(source):
    (source / "images" / item_name(2)).write_bytes(encoded(picture(2, 16)))
    (source / "masks" / item_name(3)).unlink()
    stdout, _ = run("check", "--source", source / "images", "--masks", source / "masks", "--workers", 0, code=1)
    lines = stdout.splitlines()
    assert [line.split(":")[0] for line in lines[:-1]] == ["defect", "defect"]
    assert lines[-1] == "4 images can be used, 2 defects"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["pack", "--source", "nowhere", "--dest", "{}/x.zip"],
            1,
            "images: expected a folder or a zip file, came .*nowh",
        ),
        (["pack", "--source", "{}/images", "--dest", "{}/x", "--masks", "{}/masks"], 1, "expected both or neither"),
        (["pack", "--source", "{}/images", "--dest", "{}/x", "--resolution", "24x24"], 1, "power of two"),
        (["pack", "--source", "{}/images", "--dest", "{}/x", "--resolution", "16x8"], 1, "expected a square"),
        (["pack", "--source", "{}/images", "--dest", "{}/x", "--ext", "gif"], 2, "gif"),
        (
            ["check", "--source", "{}/images", "--masks", "a", "--masks", "b"],
            2,
            "expected none or one for each --source",
        ),
        (["check", "--source", "nowhere"], 1, "images: expected a folder or a zip file"),
    ],
)
def test_mistakes_are_one_line_errors(source, arguments, code, message):
    line = error(*(str(argument).replace("{}", str(source)) for argument in arguments), code=code)
    assert line.startswith("Error: ") and re.search(message, line)


def test_broken_zip_file_is_a_one_line_error(source):
    (source / "bad.zip").write_bytes(b"PK\x03\x04 not a zip")
    assert "bad.zip" in error("check", "--source", source / "bad.zip")


def test_hostile_zip_file_writes_nothing_outside(source):
    with zipfile.ZipFile(source / "evil.zip", "w") as archive:
        archive.writestr("../escaped.png", encoded(picture(1)))
        archive.writestr("good.png", encoded(picture(2)))
    assert "without '..'" in error("pack", "--source", source / "evil.zip", "--dest", source / "out" / "folder")
    run("pack", "--source", source / "evil.zip", "--dest", source / "out" / "folder", "--skip-bad", "--workers", 0)
    assert not list(source.rglob("escaped*"))


def test_examples_of_the_help_texts_are_understood():
    count = 0
    for name, command in OWN.items():
        for example in re.findall(rf"python dataset_tool.py {name} (.*)", command.help):
            command.make_context(name, shlex.split(example))
            count += 1
    assert count == 4


def test_both_commands_are_in_the_group():
    commands = dataset_tool.dataset_tool.commands
    assert isinstance(dataset_tool.dataset_tool, click.Group) and OWN.items() <= commands.items()
