"""``regard env``: what this machine offers."""

from __future__ import annotations

import importlib.util

import click

from regard.cli.group import console, main

__all__ = ["env"]


@main.command()
@click.option(
    "--tuning", is_flag=True, help="What was measured here to choose among forms of kernels, and where it is."
)
def env(tuning: bool) -> None:
    """Show what this machine offers: versions, devices, optional parts."""
    if tuning:
        _show_tuning()
        return
    import platform

    import torch

    import regard
    from regard.kernels import native

    kernels = native.status()
    rows = {
        "regard": regard.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "native": f"{kernels.state} ({kernels.detail})",
    }
    for extra in ("transformers", "matplotlib", "natten", "sklearn"):
        rows[extra] = "yes" if importlib.util.find_spec(extra) is not None else "not installed"
    for name, value in rows.items():
        console.print(f"{name:14}{value}", highlight=False)


def _show_tuning() -> None:
    from regard.kernels.tuning import records, tuning_file

    console.print(str(tuning_file()), highlight=False, soft_wrap=True)
    found = records()
    if not found:
        console.print(
            "Nothing is measured yet: call .tune(query, key, value) of a regard.program, or build it with tune=True."
        )
    for kernel, classes in found.items():
        for shapes, record in classes.items():
            console.print(f"\n[bold]{kernel}[/bold]  {shapes}  ({record.date})", highlight=False, soft_wrap=True)
            for name, seconds in sorted(record.seconds.items(), key=lambda item: item[1]):
                mark = "*" if name == record.best else " "
                console.print(f"  {mark} {name:16}{1e3 * seconds:10.2f} ms", highlight=False)
            for name, why in record.failed.items():
                console.print(f"    {name:16}{why}", style="dim", highlight=False, soft_wrap=True)
