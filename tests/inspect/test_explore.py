"""The page: what it says of a model is what capture and a plain forward pass say; and it opens in a browser."""

from __future__ import annotations

import base64
import json
import math
import re
import shutil
import subprocess
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner

import regard
from regard.cli import main
from regard.errors import OptionError
from regard.inspect.exploration import explore_image, explore_text
from regard.inspect.explore_page import METRIC_NOTES, render_explore, write_explore
from regard.inspect.intervene import ablate_heads, intervene
from regard.inspect.metrics import head_metrics
from regard.inspect.observation import Exploration
from regard.models.nano import load_nano, load_tokenizer
from regard.models.vit import VisionTransformer
from tests.retrofit.small_models import vit

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TEXT = "def area(radius):\n    return 3 * radius ** 2  # </script> <b>\n\n\ndef area(side):\n    return side ** 2\n"


@pytest.fixture(scope="module")
def explored() -> Exploration:
    return explore_text(load_nano().eval(), load_tokenizer(), TEXT, name="nano", ablate_tokens=24)


@torch.no_grad()
def test_what_is_shown_is_what_the_model_does(explored: Exploration) -> None:
    model, tokenizer = load_nano().eval(), load_tokenizer()
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(TEXT)["input_ids"]]])
    assert "".join(explored.tokens[1:]) == TEXT
    with regard.capture(model) as trace:
        logits = model(input_ids=ids).logits
    losses = F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")
    assert explored.losses[0] is None
    torch.testing.assert_close(torch.tensor(explored.losses[1:]), losses, atol=1e-3, rtol=0)
    for place, layer in enumerate(trace):
        assert layer.weights is not None
        best = layer.weights[0].topk(explored.keys[place].shape[-1], -1)
        torch.testing.assert_close(explored.weights[place].float() / 255, best.values, atol=0.003, rtol=0)
        found = head_metrics(layer.weights)
        for name, values in found.items():
            torch.testing.assert_close(torch.tensor(explored.metrics[name][place]), values[0], atol=1e-3, rtol=1e-3)
        # As few tokens as this are bins of one each.
        share = (layer.weights[0] / layer.weights[0].amax((-2, -1), keepdim=True)).sqrt()
        torch.testing.assert_close(explored.maps[place].float() / 255, share, atol=0.003, rtol=0)
    short = ids[:, :24]
    base = F.cross_entropy(model(input_ids=short).logits[0, :-1], short[0, 1:])
    group = explored.ablations[0]
    for heads, change in ((group.heads, group.change), ([(2, 3)], explored.head_changes[2][3])):
        with intervene(model, ablate_heads(heads)):
            worse = F.cross_entropy(model(input_ids=short).logits[0, :-1], short[0, 1:])
        assert change == pytest.approx(float(worse - base), abs=1e-4)
    text = ids[:, 1:129]
    twice, length = torch.cat((ids[:, :1], text, text), 1), text.shape[1]
    for heads, gain in (([], explored.repetition), (group.heads, group.repetition)):
        with intervene(model, ablate_heads(heads)):
            each = F.cross_entropy(model(input_ids=twice).logits[0, :-1], twice[0, 1:], reduction="none")
        assert gain == pytest.approx(float(each[1:length].mean() - each[length + 1 :].mean()), abs=1e-4)


def test_long_texts_are_cut_and_maps_reduced() -> None:
    found = explore_text(load_nano(), load_tokenizer(), TEXT * 12, max_tokens=400, ablate_tokens=0)
    assert len(found.tokens) == 400 and found.maps[0].shape == (6, 160, 160)
    assert not found.ablations and not found.head_changes
    # Nothing is attended to ahead.
    assert int(torch.triu(found.maps[1][0].int(), 1).max()) == 0


def test_a_text_of_which_little_is_ablated_has_a_loss_all_the_same() -> None:
    found = explore_text(load_nano(), load_tokenizer(), "def area", ablate_tokens=1)
    assert all(math.isfinite(group.change) for group in found.ablations)


def _element(name: str, page: str) -> str:
    found = re.search(rf'id="{name}">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_page_carries_all_of_it(explored: Exploration) -> None:
    page = render_explore(explored)
    data = json.loads(_element("data", page))
    assert data["tokens"] == explored.tokens and data["heads"] == [6] * 6
    assert set(data["metrics"]) <= set(METRIC_NOTES)
    packed = _element("layer2", page)
    raw, count = zlib.decompress(base64.b64decode(packed)), explored.keys[2].numel()
    assert np.array_equal(np.frombuffer(raw, "<u2", count), explored.keys[2].flatten().numpy())
    assert np.array_equal(np.frombuffer(raw, "u1", count, 2 * count), explored.weights[2].flatten().numpy())
    # Nothing of the text ends the script that carries it.
    assert page.count("</script>") == 2 + len(explored.keys)


def test_an_image_is_shown_by_its_patches() -> None:
    model = vit()
    size = model.config.image_size
    pixels = torch.randn(1, 3, size, size)
    found = explore_image(model, pixels, "data:image/png;base64,AAAA", name="vit")
    side = size // model.config.patch_size
    assert found.patches is not None and found.patches.grid == (side, side) and found.patches.before == 1
    assert set(found.metrics) == {"entropy", "distance in patches", "own patch", "patches around", "other tokens"}
    assert set(found.metrics) <= set(METRIC_NOTES) and found.repetition is None
    assert found.tokens[0] == "[CLS]" and found.tokens[1] == "patch 0, 0"
    assert "divergence" in found.measure and all(row >= 0 for layer in found.head_changes for row in layer)


def test_an_image_in_a_model_of_this_library() -> None:
    """It takes images without a name."""
    torch.manual_seed(0)
    model = VisionTransformer((8, 16), 2, 1, 5, embed_dim=12, depth=2, num_heads=3).eval()
    found = explore_image(model, torch.randn(1, 1, 8, 16), "data:image/png;base64,AAAA")
    assert found.patches is not None and found.patches.grid == (4, 8) and found.patches.before == 1
    assert found.heads == [3, 3] and len(found.head_changes) == 2


def _translator() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2}
    config = transformers.T5Config(vocab_size=len(load_tokenizer()), decoder_start_token_id=0, eos_token_id=1, **shape)
    return transformers.T5ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()


@torch.no_grad()
def test_a_decoder_looks_at_what_the_encoder_reads() -> None:
    model, tokenizer = _translator(), load_tokenizer()
    second = "the area of a disc"
    found = explore_text(model, tokenizer, TEXT, second, ablate_tokens=4)
    source = torch.tensor([tokenizer(TEXT)["input_ids"]])
    target = torch.tensor([[0, *tokenizer(second)["input_ids"]]])
    n, m = source.shape[1], target.shape[1]
    kinds = [(span.name, span.queries, span.keys) for span in found.spans]
    assert kinds[1:4] == [("encoder 1", (0, n), (0, n)), ("decoder 0", (n, m), (n, m)), ("cross 0", (n, m), (0, n))]
    out = model(input_ids=source, decoder_input_ids=target, output_attentions=True)
    theirs = {0: out.encoder_attentions[0], 2: out.decoder_attentions[0], 5: out.cross_attentions[1]}
    for layer, maps in theirs.items():
        best = maps[0].topk(found.keys[layer].shape[-1], -1)
        torch.testing.assert_close(found.weights[layer].float() / 255, best.values, atol=0.003, rtol=0)
        assert found.maps[layer].shape == maps.shape[1:]
    losses = F.cross_entropy(out.logits[0, :-1], target[0, 1:], reduction="none")
    assert found.losses[: n + 1] == [None] * (n + 1)
    torch.testing.assert_close(torch.tensor(found.losses[n + 1 :]), losses, atol=1e-3, rtol=0)
    assert found.metrics["distance"][3] == [None, None] and None not in found.metrics["entropy"][3]
    assert {group.name for group in found.ablations} >= {"cross 1", "all encoder layers", "all cross layers"}
    written = explore_text(model, tokenizer, TEXT, ablate_tokens=0)
    assert "".join(written.tokens[n:]) == tokenizer.decode(
        model.generate(source, max_new_tokens=64, do_sample=False)[0]
    )


def test_an_encoder_reads_two_texts() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=len(load_tokenizer()), **shape)).eval()
    found = explore_text(model, load_tokenizer(), "one text", " and another", ablate_tokens=8)
    assert "".join(found.tokens) == "one text and another" and not found.causal and not found.losses
    with pytest.raises(OptionError, match="left to right"):
        explore_text(load_nano(), load_tokenizer(), "one", "another")


def test_what_cannot_be_shown_is_refused() -> None:
    tokenizer = load_tokenizer()
    with pytest.raises(OptionError, match="two tokens"):
        explore_text(load_nano(), tokenizer, "")
    model = vit()
    size = model.config.image_size
    with pytest.raises(OptionError, match="one sequence"):
        explore_image(model, torch.randn(2, 3, size, size), "data:image/png;base64,AAAA")


@pytest.mark.skipif(CHROMIUM is None, reason="no browser here")
def test_the_page_opens_in_a_browser(explored: Exploration, tmp_path: Path) -> None:
    target = write_explore(explored, tmp_path)
    command = [
        str(CHROMIUM),
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=3000",
        "--dump-dom",
    ]
    dom = subprocess.run([*command, target.as_uri()], capture_output=True, text=True, check=True, timeout=120).stdout
    assert "data-ready=" in dom
    assert len(re.findall(r'role="gridcell" data-l="\d', dom)) == 36
    # The token that it begins with has its keys coloured.
    assert 'class="here"' in dom and "background-color: rgb" in dom


def test_the_command_writes_it(tmp_path: Path) -> None:
    (tmp_path / "some.txt").write_text(TEXT)
    asked = ["inspect", "--text", str(tmp_path / "some.txt"), "--ablate-tokens", "0", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(main, asked)
    assert done.exit_code == 0, done.output
    page = tmp_path / "out" / "explore.html"
    assert page.stat().st_size > 20_000


def test_the_command_gives_the_model_another_attention(tmp_path: Path) -> None:
    """A window of 8 tokens: no head looks further."""
    (tmp_path / "some.txt").write_text(TEXT)
    base = ["inspect", "--text", str(tmp_path / "some.txt"), "--ablate-tokens", "0", "--out", str(tmp_path)]
    done = CliRunner().invoke(
        main, [*base, "--mechanism", "sliding_window", "--option", "window=8", "--option", "sinks=0"]
    )
    assert done.exit_code == 0, done.output
    data = json.loads(_element("data", (tmp_path / "explore.html").read_text()))
    assert data["model"] == "nano with sliding_window"
    assert max(max(row) for row in data["metrics"]["distance"]) < 8
    refused = CliRunner().invoke(main, [*base, "--option", "window=8"])
    assert refused.exit_code != 0 and "--mechanism" in refused.output
