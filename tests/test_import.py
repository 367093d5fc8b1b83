"""``import regard`` is light, and every public module says what it offers."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys

import pytest

import regard

HEAVY = ("torch", "numpy", "transformers", "matplotlib", "jinja2", "safetensors", "timm", "diffusers")
MODULES = sorted(m.name for m in pkgutil.walk_packages(regard.__path__, "regard.") if not m.name.endswith("__main__"))


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_bare_import_loads_nothing_heavy() -> None:
    found = run(f"import sys, regard; print([m for m in {HEAVY} if m in sys.modules])")
    assert found == "[]"


def test_attention_needs_torch_alone() -> None:
    """The main job works where transformers, matplotlib and jinja2 are absent."""
    optional = ("transformers", "matplotlib", "jinja2", "timm", "diffusers")
    code = (
        f"import sys\nfor name in {optional}: sys.modules[name] = None\n"
        "import torch, regard\nx = torch.ones(1, 2, 3, 4)\n"
        "print(tuple(regard.attention(x, x, x, 'sliding_window', causal=True).shape))"
    )
    assert run(code) == "(1, 2, 3, 4)"


def test_public_names() -> None:
    assert set(regard.__all__) <= set(dir(regard))
    with pytest.raises(AttributeError, match="no attribute 'atention'"):
        regard.atention  # noqa: B018
    for name in ("attention", "build", "catalogue", "create", "describe", "register", "use_backend", "Mechanism"):
        assert getattr(regard, name) is not None


def test_a_folder_does_not_hide_the_function_of_its_name() -> None:
    """``regard.catalogue`` is both: importing the folder leaves the function callable."""
    code = (
        "import regard\nfirst = regard.catalogue()\nimport regard.catalogue\nfrom regard import catalogue\n"
        "from regard.catalogue import entries\n"
        "assert list(catalogue.entries().values()) == list(entries().values())\n"
        "print(first == regard.catalogue() == catalogue() == list(entries().values()))"
    )
    assert run(code) == "True"


@pytest.mark.parametrize("name", MODULES)
def test_public_modules_are_documented(name: str) -> None:
    if any(part.startswith("_") for part in name.split(".")):
        pytest.skip("private")
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"
    if hasattr(module, "__path__"):
        return
    if name.startswith("regard.reproduce.") and callable(getattr(module, "run", None)):
        return  # an experiment offers its ``run`` and nothing else
    assert hasattr(module, "__all__"), f"{name} has no __all__"
    missing = [symbol for symbol in module.__all__ if not hasattr(module, symbol)]
    assert not missing, f"{name} lists what it lacks: {missing}"
