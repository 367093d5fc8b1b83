from __future__ import annotations

import json
import lzma
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.errors import MissingExtraError, OptionError
from regard.models import nano
from regard.models.nano.corpus import Module, read_corpus, split_of

pytest.importorskip("transformers")

from regard.models.nano.evaluate import (
    BUCKETS,
    WINDOW,
    Bigram,
    bits_per_byte,
    evaluate,
    table,
    window_nats,
    xz_bits,
)
from regard.models.nano.train import (
    Muon,
    Plan,
    Run,
    Shape,
    Windows,
    cut,
    encode,
    new_model,
    orthogonalise,
    token_bytes,
    train_tokenizer,
)

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

needs_weights = pytest.mark.skipif(
    not (nano.WEIGHTS / "model.safetensors").is_file(), reason="nano is not trained in this tree"
)

TINY = Plan(
    steps=12,
    shape=Shape(vocabulary=300, hidden=16, intermediate=32, layers=1, heads=2, key_value_heads=1, context=64),
    stages=((0.0, 32), (0.5, 64)),
    tokens_per_step=128,
    checkpoint_seconds=0.0,
    held_out_windows=1,
    log_every=1,
)


@pytest.fixture(scope="module")
def held_out() -> list[Module]:
    return read_corpus("held_out")


@pytest.fixture(scope="module")
def some_modules(held_out: list[Module]) -> list[Module]:
    return [Module(module.name, module.text[:4000]) for module in held_out[:8]]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return nano.load_nano()


# the text


def test_the_splits_share_no_module_and_hold_about_their_share(held_out: list[Module]) -> None:
    train = read_corpus("train")
    names, apart = {module.name for module in train}, {module.name for module in held_out}
    assert not names & apart
    assert 0.04 < len(apart) / (len(names) + len(apart)) < 0.13
    assert all(split_of(name) == "held_out" for name in apart)
    assert [module.name for module in train] == sorted(names)
    assert train == read_corpus("train")


def test_a_module_is_in_the_same_split_everywhere() -> None:
    apart = ["fnmatch.py", "http/server.py", "statistics.py", "unittest/mock.py", "xml/etree/ElementInclude.py"]
    assert [split_of(name) for name in apart] == ["held_out"] * len(apart)
    assert [split_of(name) for name in ["ast.py", "json/decoder.py", "typing.py"]] == ["train"] * 3


def test_tests_third_parties_and_generated_files_are_left_out(tmp_path: Path) -> None:
    for name in ["a.py", "b/c.py", "test/d.py", "b/tests/e.py", "site-packages/f.py", "_sysconfigdata_x.py"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    (tmp_path / "table.py").write_text('"""Codec generated from CP1.TXT with gencodec.py."""\n')
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    found = [*read_corpus("train", tmp_path), *read_corpus("held_out", tmp_path)]
    assert {module.name for module in found} == {"a.py", "b/c.py"}
    assert {module.package for module in found} == {"", "b"}


def test_errors_of_the_corpus_say_what_to_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="'train', 'held_out'"):
        read_corpus("test")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="root="):
        read_corpus("train", tmp_path)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="full CPython"):
        read_corpus("train")


# training


def test_windows_hold_every_token_once_and_come_from_one_document_where_they_can() -> None:
    sizes = [("p", 95), ("p", 7), ("q", 33), ("", 12), ("", 11), ("q", 8)]
    ends = torch.tensor([size for _, size in sizes]).cumsum(0).tolist()
    documents = [(package, torch.arange(end - size, end)) for (package, size), end in zip(sizes, ends, strict=True)]
    windows = cut(documents, 10, random.Random(0))
    seen = torch.cat(windows)
    assert all(len(window) == 10 for window in windows)
    assert len(seen.unique()) == len(seen) == sum(size for _, size in sizes) // 10 * 10
    whole = sum(bool((window.diff() == 1).all()) for window in windows)
    assert whole >= 9 + 3 + 1 + 1


def test_the_stream_goes_on_where_it_was() -> None:
    documents = [("p", torch.arange(500)), ("q", torch.arange(500, 620))]
    stream = Windows(documents, seed=1)
    stream.next(16, 30)
    copy = Windows(documents, seed=1)
    copy.load_state_dict(stream.state_dict())
    assert torch.equal(stream.next(16, 20), copy.next(16, 20))
    assert torch.equal(stream.next(32, 5), copy.next(32, 5))
    with pytest.raises(OptionError, match="more text"):
        stream.next(1000, 1)


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    values = torch.linalg.svdvals(orthogonalise(torch.randn(3, 24, 40)))
    assert values.min() > 0.3
    assert values.max() < 1.4


def test_muon_treats_tall_and_wide_matrices_alike() -> None:
    wide = torch.nn.Parameter(torch.zeros(8, 24))
    tall = torch.nn.Parameter(torch.zeros(24, 8))
    wide.grad = torch.randn(8, 24)
    tall.grad = wide.grad.T.clone()
    Muon([wide, tall], lr=0.1).step()
    torch.testing.assert_close(tall.detach(), 3**0.5 * wide.detach().T)


def test_rates_and_contexts_follow_the_plan() -> None:
    plan = Plan(minutes=1)
    assert [plan.context_at(p) for p in (0.0, 0.34, 0.35, 0.6, 1.0)] == [512, 512, 1024, 2048, 2048]
    assert 0 < plan.rate_at(0.0) < plan.rate_at(0.01) < plan.rate_at(0.3) == 1.0
    assert plan.rate_at(1.0) == 0.0
    with pytest.raises(OptionError, match="no end"):
        Plan()
    with pytest.raises(OptionError, match="Shorten the stage"):
        Plan(steps=1, stages=((0.0, 4096),), tokens_per_step=4096)


def test_minutes_end_a_run_that_has_steps_left(tmp_path: Path, some_modules: list[Module]) -> None:
    run = Run(replace(TINY, out=tmp_path, steps=None, minutes=10.0), some_modules, some_modules[:1])
    run.seconds = 300.0
    assert run.progress == 0.5
    run.seconds = 700.0
    assert run.progress == 1.0


KILLED = """
import sys
from pathlib import Path
from tests.models.test_nano import TINY, replace
from regard.models.nano.corpus import Module, read_corpus
from regard.models.nano.train import Run
import time, torch
torch.set_num_threads(1)
modules = [Module(m.name, m.text[:4000]) for m in read_corpus("held_out")[:8]]
plan = replace(TINY, out=Path(sys.argv[1]), weights=Path(sys.argv[1]) / "weights")
Run(plan, modules, modules[:1]).train(lambda run: time.sleep(0.2))
"""


def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(tmp_path: Path, some_modules: list[Module]) -> None:
    out = tmp_path / "killed"
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), str(root / "src"), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(out)], env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    )
    deadline = time.monotonic() + 120
    while not (out / "checkpoint.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL

    resumed = Run(replace(TINY, out=out, weights=out / "weights"), some_modules, some_modules[:1])
    assert 0 < resumed.step < 12
    resumed.train()
    straight_out = tmp_path / "straight"
    straight = Run(replace(TINY, out=straight_out, weights=straight_out / "weights"), some_modules, some_modules[:1])
    straight.train()

    assert resumed.step == straight.step == 12
    assert [entry["tokens"] for entry in resumed.log] == [entry["tokens"] for entry in straight.log]
    for name, tensor in straight.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], tensor)
    record = json.loads((out / "weights" / "training.json").read_text())
    assert record["steps"] == 12
    assert record["tokens"] == 12 * 128
    assert {path.name for path in out.iterdir()} == {"checkpoint.pt", "tokenizer.json", "weights"}


# baselines and measures


def test_xz_counts_whole_bytes_and_a_primer_helps() -> None:
    text = "".join(f"value_{i} = {i * i}\n" for i in range(500))
    assert xz_bits(text) == 8 * len(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME)) / len(text)
    assert xz_bits(text, primer=text) < 0.1 * xz_bits(text)


def test_the_bigram_is_a_distribution_and_its_prior_is_tuned() -> None:
    documents = [torch.randint(0, 9, (200,)) for _ in range(20)]
    bigram = Bigram.tuned(documents, 9)
    after = torch.stack([torch.full((9,), 4), torch.arange(9)], 1)
    total = sum(bigram.nats(pair).neg().exp().item() for pair in after)
    assert total == pytest.approx(1.0, abs=1e-5)
    assert bigram.prior >= 32  # the tokens are independent, so the pairs say nothing


def test_tokens_count_the_bytes_they_stand_for(some_modules: list[Module]) -> None:
    tokenizer = train_tokenizer((module.text for module in some_modules), 300)
    text = "def f():\n\treturn 'žluťoučký 🐎'\n"
    assert token_bytes(tokenizer)[tokenizer.encode(text).ids].sum() == len(text.encode())


def test_a_model_that_knows_nothing_measures_near_uniform(some_modules: list[Module]) -> None:
    tokenizer = train_tokenizer((module.text for module in some_modules), 300)
    report = evaluate(new_model(TINY.shape).eval(), tokenizer, some_modules, some_modules[:3])
    uniform = math.log2(300) / report["bytes_per_token"]
    assert report["nano"] == pytest.approx(uniform, rel=0.02)
    assert report["bytes"] == sum(len(module.text.encode()) for module in some_modules[:3])
    assert report["xz_after_train_text"] < report["xz"]  # that text is in the primer here
    assert report["whole_windows"] == 0 or report["by_position"][0]["nano"] == pytest.approx(uniform, rel=0.2)
    assert str(report["bytes"]) in table(report)


def test_a_window_sees_nothing_before_it() -> None:
    model = new_model(TINY.shape).eval()
    torch.nn.init.normal_(model.model.layers[0].self_attn.o_proj.weight)
    tokens = torch.randint(0, 300, (41,))
    changed = tokens.clone()
    changed[:16] = torch.randint(0, 300, (16,))
    nats, other = window_nats(model, tokens, 16), window_nats(model, changed, 16)
    assert nats.shape == (40,)
    torch.testing.assert_close(nats[16:], other[16:])
    assert not torch.allclose(window_nats(model, tokens, 40)[16:], nats[16:])


# the model that is carried


def test_an_absent_extra_and_absent_weights_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(nano, "WEIGHTS", tmp_path)
    for load in (nano.load_nano, nano.load_tokenizer):
        with pytest.raises(FileNotFoundError, match=r"python -m regard\.models\.nano\.train"):
            load()
    monkeypatch.setattr(nano, "find_spec", lambda name: None)
    for load in (nano.load_nano, nano.load_tokenizer):
        with pytest.raises(MissingExtraError, match=r"regard\[transformers\]"):
            load()


@needs_weights
def test_the_weights_are_small_and_load(model: LlamaForCausalLM) -> None:
    assert (nano.WEIGHTS / "model.safetensors").stat().st_size <= 8_000_000
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert nano.load_nano(torch.bfloat16).dtype == torch.bfloat16
    record = json.loads((nano.WEIGHTS / "training.json").read_text())
    assert record["parameters"] == sum(parameter.numel() for parameter in model.parameters())


@needs_weights
def test_the_tokenizer_gives_back_any_text() -> None:
    tokenizer = nano.load_tokenizer()

    @settings(max_examples=100, deadline=None)
    @given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
    def round_trip(text: str) -> None:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text

    round_trip()
    assert len(tokenizer) == 4096
    assert tokenizer.bos_token_id == tokenizer.convert_tokens_to_ids(nano.END_OF_TEXT) == 0


@needs_weights
def test_nano_predicts_unseen_text_better_than_xz_and_a_bigram(model: LlamaForCausalLM, held_out: list[Module]) -> None:
    tokenizer = nano.load_tokenizer().backend_tokenizer
    chosen = [module for module in held_out if 8_000 < len(module.text) < 12_500]
    assert len(chosen) >= 3
    documents = [tokens for _, tokens in encode(tokenizer, chosen)]
    text_bytes = torch.cat([token_bytes(tokenizer)[tokens[1:]] for tokens in documents])
    train = [tokens for _, tokens in encode(tokenizer, read_corpus("train")[::2])]
    bigram = Bigram.tuned(train, tokenizer.get_vocab_size())
    of_nano = bits_per_byte(torch.cat([window_nats(model, tokens) for tokens in documents]), text_bytes)
    of_bigram = bits_per_byte(torch.cat([bigram.nats(tokens) for tokens in documents]), text_bytes)
    of_xz = xz_bits("".join(module.text for module in chosen))
    assert of_nano < 0.9 * of_xz
    assert of_nano < 0.9 * of_bigram


@needs_weights
def test_nano_uses_its_whole_context(model: LlamaForCausalLM, held_out: list[Module]) -> None:
    tokenizer = nano.load_tokenizer().backend_tokenizer
    lengths = token_bytes(tokenizer)
    chosen = [module for module in held_out if len(module.text) > 20_000][:6]
    starts = [tokens[: WINDOW + 1] for _, tokens in encode(tokenizer, chosen)]
    nats = torch.stack([window_nats(model, tokens) for tokens in starts])
    short = torch.stack([window_nats(model, tokens, 256) for tokens in starts])
    text = torch.stack([lengths[tokens[1:]] for tokens in starts])
    by_bucket = [bits_per_byte(nats[:, first:last], text[:, first:last]) for first, last in BUCKETS]
    late = slice(*BUCKETS[-1])
    assert by_bucket[-1] < by_bucket[0] - 0.1
    assert by_bucket[-1] < bits_per_byte(short[:, late], text[:, late]) - 0.05
