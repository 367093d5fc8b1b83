"""``explore.html``: one self-contained page on which a person explores a model's attention; it needs no network.

What the page holds of each layer (keys, weights, reduced maps) is deflated and unpacked by the browser when the layer
is first looked at, so that a long text opens at once.
"""

from __future__ import annotations

import base64
import html
import json
import zlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from regard.inspect.observation import Exploration
from regard.inspect.roles import ROLES

__all__ = ["METRIC_NOTES", "render_explore", "write_explore"]

METRIC_NOTES = {
    "entropy": "How spread a head's attention is: nats, 0 for one key.",
    "distance": "How far back a head looks, in tokens.",
    "sink": "Weight on the first token.",
    "previous": "Weight on the token before.",
    "self": "Weight on the token itself.",
    "local": "Weight within 16 tokens.",
    "distance in patches": "How far a patch looks: mean Euclidean distance, in patches.",
    "own patch": "Weight of a patch on itself.",
    "patches around": "Weight of a patch on the eight around it.",
    "other tokens": "Weight of a patch on the class token and registers.",
    "previous, repeated tokens": "Weight on the token before, in random tokens written twice.",
    "duplicate, repeated tokens": "Weight on the same token's first place, in random tokens written twice.",
    "induction, repeated tokens": "Weight on what followed the same token, in random tokens written twice.",
    "retrieval": "Share of a line hidden in the text that the head copies as the model repeats it.",
    "ablation": "What the model loses without the head.",
}
_PLACES = {"title": "__TITLE__", "data": "__DATA__", "blocks": "__BLOCKS__"}


def render_explore(found: Exploration) -> str:
    """The page as HTML text."""
    metrics: dict[str, Sequence[Sequence[float | None]]] = dict(found.metrics)
    if found.head_changes:
        metrics["ablation"] = found.head_changes
    data = {
        "model": found.model,
        "tokens": found.tokens,
        "losses": found.losses,
        "spans": [{"name": span.name, "queries": span.queries, "keys": span.keys} for span in found.spans],
        "heads": found.heads,
        "top": [keys.shape[-1] for keys in found.keys],
        "sides": [tuple(picture.shape[-2:]) for picture in found.maps],
        "metrics": metrics,
        "notes": {name: METRIC_NOTES.get(name, "") for name in metrics},
        "roles": found.roles,
        "roleNotes": ROLES,
        "ablations": [
            {
                "name": ablation.name,
                "heads": ablation.heads,
                "change": ablation.change,
                "repetition": ablation.repetition,
            }
            for ablation in found.ablations
        ],
        "measure": found.measure,
        "repetition": found.repetition,
        "causal": found.causal,
        "patches": None
        if found.patches is None
        else {"grid": found.patches.grid, "before": found.patches.before, "picture": found.patches.picture},
    }
    blocks = []
    for layer, (keys, weights, maps) in enumerate(zip(found.keys, found.weights, found.maps, strict=True)):
        packed = _packed(keys.to(torch.int32), weights, maps)
        blocks.append(f'<script type="text/plain" id="layer{layer}">{packed}</script>')
    page = resources.files("regard.inspect").joinpath("templates/explore.html").read_text(encoding="utf-8")
    # "</" would end the script element that carries the data.
    told = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/").replace("<!--", "<\\!--")
    filled = {"title": html.escape(found.model), "data": told, "blocks": "\n".join(blocks)}
    for name, place in _PLACES.items():
        page = page.replace(place, filled[name], 1)
    return page


def _packed(keys: Tensor, weights: Tensor, maps: Tensor) -> str:
    """Keys as little-endian 16 bits, weights and maps as bytes, one after the other, deflated, in base 64."""
    raw = keys.numpy().astype("<u2").tobytes() + weights.numpy().tobytes() + maps.numpy().tobytes()
    return base64.b64encode(zlib.compress(raw, 6)).decode("ascii")


def write_explore(found: Exploration, folder: Path) -> Path:
    """Write ``explore.html`` into ``folder`` and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "explore.html"
    target.write_text(render_explore(found), encoding="utf-8")
    return target
