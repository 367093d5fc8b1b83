"""Every snippet of the README runs, and its table is the catalogue's."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from regard.cli import main

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
MAKEFILE = (Path(__file__).parents[1] / "Makefile").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]


def test_python_snippets_run_in_order() -> None:
    pytest.importorskip("transformers")
    names: dict[str, object] = {}
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(snippets) >= 2
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)
    assert names["weights"].shape == (1, 8, 1024, 1024)  # type: ignore[attr-defined]


def test_snippets_of_the_page_on_looking_inside_run() -> None:
    pytest.importorskip("transformers")
    page = (Path(__file__).parents[1] / "docs" / "inspect.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    for snippet in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(snippet, "inspect.md", "exec"), names)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c[0] == "regard"], ids=lambda c: " ".join(c[:3]))
def test_commands_run(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, command[1:], catch_exceptions=False)
    assert result.exit_code == 0, result.output


def test_make_targets_and_extras_exist() -> None:
    targets = {command[1] for command in COMMANDS if command[0] == "make"}
    assert targets and all(re.search(rf"^{target}:", MAKEFILE, re.MULTILINE) for target in targets)
    assert {command[0] for command in COMMANDS} <= {"make", "regard", "pip"}


def test_the_table_is_the_catalogue() -> None:
    between = re.search(r"<!-- mechanisms -->\n(.*?)\n?<!-- /mechanisms -->", README, re.DOTALL)
    assert between is not None
    made = CliRunner().invoke(main, ["list", "--markdown"], catch_exceptions=False).output.strip()
    assert between[1].strip() == made, "put the output of `regard list --markdown` into the README"
