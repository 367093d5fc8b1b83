"""The command itself, and the terminal that it writes to."""

from __future__ import annotations

from typing import Any

import click
from rich.console import Console

from regard.errors import RegardError

__all__ = ["console", "main"]

console = Console()


class _Commands(click.Group):
    """Shows this library's errors as one readable line instead of a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except RegardError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="regard")
def main() -> None:
    """Every attention mechanism behind one PyTorch interface."""
