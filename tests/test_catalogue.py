"""The catalogue says the truth: every module imports, every symbol is there, every example builds."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

import regard
from regard import catalogue, registry
from regard.catalogue import Entry, entries, evidence
from regard.errors import FileFormatError

ENTRIES = list(entries().values())
BUILDABLE = [entry for entry in ENTRIES if entry.module]
SIZES = {
    "num_heads": 4,
    "num_kv_heads": 4,
    "head_dim": 8,
    "embed_dim": 32,
    "channels": 32,
    "layer_index": 0,
    "num_layers": 2,
}


def each(rows: list[Entry]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("entry", rows, ids=[entry.key for entry in rows])


def resolve(dotted: str) -> Any:
    """The object behind a dotted name, however many of its parts are modules."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise AssertionError(f"no module of {dotted} imports")


@each(ENTRIES)
def test_fields(entry: Entry) -> None:
    assert entry.title and entry.home and entry.kind
    assert entry.summary.endswith("."), "the summary is a sentence"
    if entry.paper:
        assert entry.year and 1990 <= entry.year <= 2030
        assert entry.claim, "a paper's entry says what the paper claims"
        assert entry.symbols, "a paper's entry lists what is delivered"


@each(BUILDABLE)
def test_module_registers_the_key(entry: Entry) -> None:
    importlib.import_module(str(entry.module))
    if entry.kind in ("mechanism", "layer", "feature"):
        cls = registry.get(entry.key)
        assert cls.registered_name == entry.key  # type: ignore[attr-defined]
        assert registry.kind_of(cls) == entry.kind
        assert cls.__doc__, "the registered class says what it is"


@each(ENTRIES)
def test_symbols(entry: Entry) -> None:
    for symbol in entry.symbols:
        found = resolve(symbol)
        module = symbol.rpartition(".")[0]
        assert found is not None and symbol.startswith("regard."), symbol
        exported = getattr(resolve(module), "__all__", None)
        if exported is not None:
            assert symbol.rpartition(".")[2] in exported, f"{symbol} is not in its module's __all__"


@each([entry for entry in BUILDABLE if entry.kind in ("mechanism", "layer", "feature")])
def test_examples_build(entry: Entry) -> None:
    regard.build(entry.key, entry.example, **SIZES)
    unknown = set(entry.example) - set(registry.options(entry.key)) - set(registry.CONTEXT)
    assert not unknown


def test_keys_are_in_one_file_and_one_home() -> None:
    for entry in ENTRIES:
        if entry.module is not None and entry.kind in ("mechanism", "layer", "feature"):
            assert entry.module.split(".")[1] == entry.home, f"{entry.key} lives in {entry.module}, not in {entry.home}"


def test_a_broken_catalogue_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "__file__", str(tmp_path / "__init__.py"))
    table = '[[paper]]\nkey = "x"\ntitle = "X"\nhome = "dense"\nkind = "mechanism"\nsummary = "S."\n'
    for text, words in (
        (table + 'colour = "red"\n', "a.toml: entry 'x'"),
        (table + table, "'x' is in the catalogue twice"),
    ):
        (tmp_path / "a.toml").write_text(text, encoding="utf-8")
        entries.cache_clear()
        try:
            with pytest.raises(FileFormatError, match=words):
                entries()
        finally:
            entries.cache_clear()


def test_evidence_is_read_from_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "evidence_folder", lambda: tmp_path)
    (tmp_path / "full.json").write_text(json.dumps({"holds": True}), encoding="utf-8")
    assert evidence("full") == {"holds": True} == entries()["full"].evidence
    assert evidence("moba") is None
