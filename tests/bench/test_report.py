"""The page: self-contained, and without an error in a real browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from regard.bench.compare import Comparison, Row
from regard.bench.pictures import implied_map, map_sprite
from regard.bench.report import render_report, write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def comparison() -> Comparison:
    maps = [map_sprite(implied_map("full", 32, seed=seed), 16) for seed in range(2)]
    rows = [
        Row("full", "exact", {}, 1.2, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, maps=maps),
        Row("sliding_window", "training-free", {"window": 8}, 1.3, 0.1, 0.02, 0.3, 0.6, None, 0.9, maps=maps),
        Row("moba", "untrained", {}, 1.5, 0.3, 0.2, 0.3, 0.7, None, 0.9, True),
        Row("cbam", "not applicable", reason="a feature with </script> in its reason"),
    ]
    fingerprint = {"model": "tiny", "text": "some text", "length": 32, "windows": 2, "tokens": "0"}
    passage = ["<b>", "</script>", "\n", "é"] * 8
    reference = {
        "bits_per_byte": 1.2,
        "bytes": 62,
        "parameters": 1000,
        "loss_first_eighth": 3.0,
        "loss_second_half": 2.0,
        "passage": passage,
    }
    return Comparison(fingerprint, reference, rows)


def test_the_page_needs_no_network() -> None:
    page = render_report(comparison())
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", page)
    assert "@import" not in page and "url(" not in page
    assert "__COMPARISON__" not in page


def test_text_cannot_end_the_data() -> None:
    page = render_report(comparison())
    assert page.count("</script>") == 2


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("size", ["1200,900", "400,800"])
def test_a_browser_draws_it_without_errors(tmp_path: Path, size: str) -> None:
    page = write_report(comparison(), tmp_path)
    command = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={size}",
        "--virtual-time-budget=3000",
        "--dump-dom",
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    table = done.stdout[done.stdout.index("<tbody>") : done.stdout.index("</tbody>")]
    assert table.count("<tr>") == 3
    assert done.stdout.count("<circle") == 3
    assert done.stdout.count('class="head"') == 4
    assert "full attention, layer 1, head 0" in done.stdout
    assert "cbam (not applicable)" in done.stdout
