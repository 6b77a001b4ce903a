"""A group of options behaves as if its fields stood in the command's own signature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer
from typer.testing import CliRunner

from tandem.cli.options import with_groups


@dataclass(frozen=True)
class Colour:
    red: Annotated[int, typer.Option(help="How red.")] = 1
    names: Annotated[list[str] | None, typer.Argument(help="What it is called.")] = None


def paint(colour: Colour, coats: Annotated[int, typer.Option(help="How often.")] = 2) -> None:
    """Paint a wall."""
    typer.echo(f"{colour} {coats}")


def painted(*args: str) -> str:
    app = typer.Typer()
    app.command()(with_groups(paint))
    result = CliRunner().invoke(app, list(args))
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


def test_defaults_are_those_of_the_group() -> None:
    assert painted() == f"{Colour()} 2"


def test_options_and_arguments_reach_their_fields() -> None:
    assert painted("--red", "5", "--coats", "3", "rose", "rust") == f"{Colour(5, ['rose', 'rust'])} 3"


def test_help_shows_them_all_under_the_commands_own_words() -> None:
    shown = painted("--help")
    for words in ("Paint a wall.", "--red", "How red.", "--coats", "What it is called."):
        assert words in shown
