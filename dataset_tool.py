"""Pack, check and synthesise data sets of images of heads with camera labels."""

from __future__ import annotations

import click

from dnnlib import cli


@click.command()
@cli.cli_errors()
def pack() -> None:
    """Pack a folder or zip of images into the format that training reads."""
    raise click.ClickException("not there yet")


@click.command()
@cli.cli_errors()
def check() -> None:
    """List every defect of a data set, and draw its poses and a contact sheet."""
    raise click.ClickException("not there yet")


# One command for each function above; click names them after it.
dataset_tool = click.Group(name="dataset_tool", help=__doc__, commands=[pack, check])


if __name__ == "__main__":
    dataset_tool()
