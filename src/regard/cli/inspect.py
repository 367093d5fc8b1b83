"""``regard inspect``: looking into a model."""

from __future__ import annotations

from pathlib import Path

import click

from regard.cli.arguments import read_setting
from regard.cli.group import console, main
from regard.errors import OptionError

__all__ = ["inspect_command"]


@main.command("inspect")
@click.option("--model", default="nano", show_default=True, help="nano, a folder, or a hub id.")
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Text to look at [default: held-out source of the standard library].",
)
@click.option(
    "--second",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Second text: of a pair, or what a decoder writes [default: what it writes by itself].",
)
@click.option(
    "--image", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Image, for a vision model."
)
@click.option("--max-tokens", default=1024, show_default=True, type=click.IntRange(2, 16384), help="Of the text.")
@click.option("--mechanism", metavar="KEY", help="Give the model this attention first [default: its own].")
@click.option("--option", "settings", multiple=True, metavar="NAME=VALUE", help="An option of the mechanism.")
@click.option(
    "--ablate-tokens", default=512, show_default=True, type=click.IntRange(0), help="To ablate heads on; 0: not at all."
)
@click.option("--out", default="runs/inspect", show_default=True, type=click.Path(file_okay=False, path_type=Path))
def inspect_command(
    model: str,
    text: Path | None,
    second: Path | None,
    image: Path | None,
    max_tokens: int,
    mechanism: str | None,
    settings: tuple[str, ...],
    ablate_tokens: int,
    out: Path,
) -> None:
    """Write explore.html: a page on which to explore a model's attention."""
    from regard.inspect.exploration import explore_image, explore_text
    from regard.inspect.explore_page import write_explore
    from regard.inspect.loading import load_image, load_text_model, load_vision_model
    from regard.retrofit import retrofit

    if image is not None and (text is not None or second is not None):
        raise OptionError("Give texts or --image, one of the two.")
    if settings and mechanism is None:
        raise OptionError("--option sets options of a mechanism: name it with --mechanism.")
    name = Path(model).name if mechanism is None else f"{Path(model).name} with {mechanism}"
    with console.status("loading") as status:
        network, reader = load_text_model(model) if image is None else load_vision_model(model)
        if mechanism is not None:
            retrofit(network, mechanism, **dict(read_setting(setting) for setting in settings))
        if image is not None:
            pixels, picture = load_image(image, reader)
            found = explore_image(network, pixels, picture, name=name, ablate=ablate_tokens > 0, progress=status.update)
        else:
            from regard.bench.subjects import read_text

            given = text.read_text(encoding="utf-8") if text is not None else max(read_text(None), key=len)
            found = explore_text(
                network,
                reader,
                given,
                None if second is None else second.read_text(encoding="utf-8"),
                name=name,
                max_tokens=max_tokens,
                ablate_tokens=ablate_tokens,
                progress=status.update,
            )
    target = write_explore(found, out)
    console.print(f"wrote {target} ({target.stat().st_size / 2**20:.1f} MB): open it in a browser")
