"""Optional packages."""

import sys

import click
import pytest

import shape_utils
from dnnlib.cli import cli_errors
from dnnlib.extras import MissingExtraError, import_extra


def test_import_extra_returns_the_module():
    assert import_extra("json.decoder", "any").JSONDecoder


def test_import_extra_of_an_absent_package_names_package_and_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "absent_package", None)
    with pytest.raises(MissingExtraError, match=r"absent_package.*\.\[some\]"):
        import_extra("absent_package", "some")


@pytest.mark.parametrize("package", ["trimesh", "mrcfile"])
def test_writing_a_shape_without_the_extra_is_one_line_on_the_command_line(package, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(click.ClickException, match=rf"{package}.*meshes"), cli_errors():
        if package == "trimesh":
            shape_utils.write_mesh(tmp_path / "a.ply", None)
        else:
            shape_utils.write_volume_mrc(tmp_path / "a.mrc", None, 1.0)
    assert not list(tmp_path.iterdir())
