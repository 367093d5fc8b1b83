"""The page of ``regard inspect`` in a headless browser: first paint, time from hover to paint, errors, size; and, where
it is installed (``pip install bertviz``), BertViz's head and model views of the same model and text. Its pages load
require.min.js, d3.min.js and jquery.min.js from the network; here they come from the folder ``BERTVIZ_SCRIPTS``."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from benchmarks.rows import Report, Row, peak_growth, resident, run_alone
from regard.bench.subjects import read_text
from regard.inspect.capture import capture
from regard.inspect.exploration import explore_text
from regard.inspect.explore_page import render_explore
from regard.inspect.loading import load_text_model
from regard.inspect.metrics import summarize_heads

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Before anything of the page: errors are noted, and what is measured goes back to where the page came from.
_FIRST = """<script>
window.problems = [];
addEventListener("error", (event) => problems.push(String(event.message)));
addEventListener("unhandledrejection", (event) => problems.push(String(event.reason)));
console.error = (...all) => problems.push(all.join(" "));
window.tell = (what) => fetch("/told", {method: "POST", body: JSON.stringify({...what, problems,
  painted: (performance.getEntriesByName("first-contentful-paint")[0] || {}).startTime,
  loaded: performance.getEntriesByType("navigation")[0].loadEventEnd})});
</script>"""
# Drawn: the page says so, or has its picture.
_DRAWN = """<script>
const drawn = setInterval(() => {
  if (!document.querySelector("svg line, svg path, svg rect, [data-ready]")) return;
  clearInterval(drawn);
  const ready = performance.now();
  requestAnimationFrame(() => requestAnimationFrame(() => tell({ready, shown: performance.now()})));
}, 10);
</script>"""
_HOVER = """<script>
addEventListener("load", async () => {
  const wait = (ms) => new Promise((done) => setTimeout(done, ms));
  const painted = () => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
  await wait(500);
  const hovers = {};
  for (const mode of ["head", "all"]) {
    setMode(mode);
    await need([...Array(layers).keys()]);
    await painted();
    const list = (hovers[mode] = []);
    for (let i = 0; i < 40; i++) {
      const cell = cells[Math.floor((i + 0.5) * N / 40)];
      const began = performance.now();
      cell.dispatchEvent(new PointerEvent("pointermove", {bubbles: true}));
      await painted();
      list.push(performance.now() - began);
    }
  }
  const before = S.token;
  const places = [S.layer, S.head, S.mode, S.received];
  for (const key of ["ArrowRight", "ArrowDown", "]", "m", "r"])
    document.body.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
  const after = [S.layer, S.head, S.mode, S.received];
  tell({hovers, keyboard: S.token === before + 1 && places.every((place, i) => place !== after[i])});
});
</script>"""


def run(report: Report, quick: bool) -> list[Row]:
    """nano on the longest held-out module; 256 tokens and no targets when quick."""
    return [_capture(report, quick), *_page(report, quick)]


def _capture(report: Report, quick: bool) -> Row:
    """What watching all heads of a larger model holds at most, its own forward pass and weights included."""
    length = 512 if quick else 4096
    report(f"capture of 12 layers of 12 heads, {length} tokens")
    peak = int(run_alone("benchmarks.explore", str(length)))
    note = "metrics and best keys of every head, the model's forward pass included"
    return Row(f"capture, 12 layers of 12 heads, {length} tokens", peak / 1e9, "GB", 2.0, "<=", note)


def peak(length: int) -> int:
    """Bytes resident at most, beyond what Python and torch take, while a model of GPT-2's size is watched."""
    from transformers import GPT2Config, GPT2LMHeadModel

    def watch(tokens: int) -> None:
        ids = torch.arange(tokens)[None] % 50000
        with (
            torch.no_grad(),
            capture(
                model,
                summarize=summarize_heads(top=16, rows=128),
            ),
        ):
            model.transformer(input_ids=ids)

    before = resident()
    model = GPT2LMHeadModel(GPT2Config(n_positions=length)).eval()
    watch(64)
    held = resident()
    return peak_growth(lambda: watch(length)) + held - before


def _page(report: Report, quick: bool) -> list[Row]:
    browser = next((found for name in _BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        return [Row("explore.html", None, note=f"no browser here ({', '.join(_BROWSERS)})")]
    length = 256 if quick else 4096
    model, tokenizer = load_text_model("nano")
    text = max(read_text(None), key=len)
    report(f"explore.html of {length} tokens")
    page = render_explore(explore_text(model, tokenizer, text, name="nano", max_tokens=length, ablate_tokens=64))
    seen = _open(browser, page, _HOVER)
    one, all_heads = (sorted(seen["hovers"][mode]) for mode in ("head", "all"))
    size = f"{len(page.encode()) / 2**20:.1f} MB"
    rows = [
        Row(
            "explore.html, first paint",
            seen["painted"] / 1000,
            "s",
            None if quick else 2.0,
            "<=",
            f"{size}, {length} tokens",
        ),
        Row(
            "explore.html, hover to paint, one head",
            one[len(one) // 2],
            "ms",
            None if quick else 50.0,
            "<=",
            f"slowest of 40: {one[-1]:.0f} ms",
        ),
        Row(
            "explore.html, hover to paint, mean of all heads",
            all_heads[len(all_heads) // 2],
            "ms",
            None if quick else 50.0,
            "<=",
            f"slowest of 40: {all_heads[-1]:.0f} ms",
        ),
        Row("explore.html, errors in the console", len(seen["problems"]), "", 0, "<=", "; ".join(seen["problems"])),
        Row("explore.html, keys move token, layer, head and mode", float(seen["keyboard"]), "", 1, ">=", "1: they do"),
    ]
    return rows + _bertviz(report, browser, model, tokenizer, text, quick)


def _bertviz(report: Report, browser: str, model: Any, tokenizer: Any, text: str, quick: bool) -> list[Row]:
    if importlib.util.find_spec("bertviz") is None or "BERTVIZ_SCRIPTS" not in os.environ:
        return [Row("BertViz", None, note="not installed, or no BERTVIZ_SCRIPTS")]
    from bertviz import head_view, model_view

    rows = []
    for length in (64,) if quick else (64, 256, 512):
        ids = tokenizer(text)["input_ids"][:length]
        model.set_attn_implementation("eager")
        with torch.no_grad():
            attention = model(input_ids=torch.tensor([ids]), output_attentions=True).attentions
        model.set_attn_implementation("sdpa")
        tokens = [tokenizer.decode([i]) for i in ids]
        ours = render_explore(explore_text(model, tokenizer, text, name="nano", max_tokens=length, ablate_tokens=0))
        pages = {"explore.html": ours}
        for name, view in (("BertViz head_view", head_view), ("BertViz model_view", model_view)):
            pages[name] = view(attention, tokens, html_action="return").data
        for name, page in pages.items():
            report(f"{name} of {length} tokens")
            note = f"{len(page.encode()) / 2**20:.1f} MB"
            try:
                shown: float | None = _open(browser, page, _DRAWN)["shown"] / 1000
            except TimeoutError as error:
                shown, note = None, f"{note}; {error}"
            rows.append(Row(f"{name}, {length} tokens, until drawn", shown, "s", note=note))
    return rows


def _open(browser: str, page: str, last: str) -> dict[str, Any]:
    """What the page tells of itself after it was opened."""
    page = re.sub(r"https://cdnjs\.cloudflare\.com/[^'\"]*/", "/", page)
    whole = (page.replace("<head>", "<head>" + _FIRST, 1) if "<head>" in page else _FIRST + page) + last
    told: list[dict[str, Any]] = []
    done = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = whole.encode() if self.path == "/" else _script(self.path)
            self.send_response(200 if body else 404)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()
            done.set()

        def log_message(self, format: str, *args: Any) -> None:
            """Silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as folder:
        address = f"http://127.0.0.1:{server.server_port}/"
        options = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--window-size=1300,900",
            f"--user-data-dir={Path(folder)}",
        ]
        process = subprocess.Popen([browser, *options, address], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            if not done.wait(180):
                raise TimeoutError("The page told nothing of itself within three minutes.")
        finally:
            process.terminate()
            process.wait()
            server.shutdown()
    return told[0]


def _script(path: str) -> bytes:
    """A script that BertViz asks for, with or without its ending."""
    folder, name = os.environ.get("BERTVIZ_SCRIPTS"), path.strip("/").removesuffix(".js") + ".js"
    wanted = None if folder is None else Path(folder) / name
    return wanted.read_bytes() if wanted is not None and wanted.is_file() else b""


if __name__ == "__main__":
    print(peak(int(sys.argv[1])))
