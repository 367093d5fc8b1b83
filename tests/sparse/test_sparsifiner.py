"""Sparsifiner: exact counts, masks of their own for every image and head, what has a gradient and what has none."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.layers.distillation import attention_reconstruction, cls_distillation, token_distillation
from regard.masks import KeyPadding
from regard.models.sparsifiner import SparsifinerViT
from regard.models.vit import VisionTransformer
from regard.sparse.sparsifiner import ConnectivityPredictor, SparsifinerAttention, mask_flops
from regard.train.sparsifiner import teacher_maps, train_backbone, train_predictors, train_sparsifiner

TIGHT = {"rtol": 1e-9, "atol": 1e-10}
TOKENS, DIM = 26, 8
SIZES: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 3, "mlp_ratio": 2.0}


def qkv(batch: int = 2, heads: int = 4, kv_heads: int = 4, length: int = TOKENS) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(7)
    return tuple(
        torch.randn(batch, h, length, DIM, generator=generator, dtype=torch.float64)
        for h in (heads, kv_heads, kv_heads)
    )


def predictor(**options: Any) -> ConnectivityPredictor:
    """With parameters large enough that maps are far from uniform."""
    torch.manual_seed(0)
    built = ConnectivityPredictor(DIM, TOKENS, **{"reduce_n": 5, "basis_topk": 3, **options}).double()
    with torch.no_grad():
        for parameter in (built.query.weight, built.key.weight, built.down):
            parameter.mul_(25)
    return built


def attention(**options: Any) -> SparsifinerAttention:
    module = SparsifinerAttention(DIM, tokens=TOKENS, **{"reduce_n": 5, "basis_topk": 3, **options}).double().eval()
    module.predictor.load_state_dict(predictor().state_dict())
    return module


def models(**options: Any) -> tuple[SparsifinerViT, VisionTransformer]:
    torch.manual_seed(1)
    teacher = VisionTransformer(10, 2, 1, 4, position_std=0.5, **SIZES).eval()
    student = SparsifinerViT(10, 2, 1, 4, **SIZES, attention={"reduce_n": 5, "basis_topk": 3}, **options)
    return student.load_dense(teacher).eval(), teacher


def images(count: int = 6) -> Tensor:
    return torch.randn(count, 1, 10, 10, generator=torch.Generator().manual_seed(2))


@pytest.mark.paper("sparsifiner")
@pytest.mark.parametrize("executor", ["gathered", "masked"])
def test_keeping_everything_is_dense_attention(executor: str) -> None:
    query, key, value = qkv(kv_heads=2)
    out = attention(keep=1.0, executor=executor)(query, key, value)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(query, key, value, enable_gqa=True), **TIGHT)
    student, teacher = models()
    student.set_mode("dense")
    torch.testing.assert_close(student(images()), teacher(images()))


@pytest.mark.paper("sparsifiner")
@pytest.mark.parametrize("keep", [0.01, 0.25, 0.5, 1.0])
def test_every_row_has_its_budget_and_the_class_token_sees_all(keep: float) -> None:
    query, key, _ = qkv()
    for sparse in (False, True):
        found = predictor(keep=keep)(query, key, sparse)
        assert found.mask.shape == (2, 4, TOKENS, TOKENS) and found.approx.shape == (2, 4, TOKENS - 1, TOKENS)
        counts = found.mask.sum(-1)
        assert bool((counts[:, :, 0] == TOKENS).all())
        assert bool((counts[:, :, 1:] == math.ceil(keep * TOKENS)).all())
        kept = found.approx.masked_fill(~found.mask[:, :, 1:], math.inf).amin(-1)
        left = found.approx.masked_fill(found.mask[:, :, 1:], -math.inf).amax(-1)
        assert bool((kept >= left).all())
    plain = predictor(keep=keep, class_token=False)(query, key)
    assert bool((plain.mask.sum(-1) == math.ceil(keep * TOKENS)).all())


@pytest.mark.paper("sparsifiner")
def test_masks_differ_between_images_and_between_heads() -> None:
    query, key, _ = qkv(batch=3)
    mask = predictor()(query, key).mask
    for first, second in ((mask[0], mask[1]), (mask[1], mask[2]), (mask[:, 0], mask[:, 1]), (mask[:, 2], mask[:, 3])):
        assert float((first ^ second).float().mean()) > 0.05


@pytest.mark.paper("sparsifiner")
def test_the_map_by_hand() -> None:
    query, key, _ = qkv(batch=1, heads=4, kv_heads=2)
    module = predictor()
    low = query @ module.query.weight.T + module.query.bias
    short = (key @ module.key.weight.T + module.key.bias).repeat_interleave(2, 1)
    summaries = torch.einsum("bhnd,nr->bhrd", short, module.down)
    coef = (torch.einsum("bhnd,bhrd->bhnr", low, summaries) * DIM**-0.5).softmax(-1)[:, :, 1:]
    dense = module(query, key, sparse=False)
    torch.testing.assert_close(dense.coef, coef, **TIGHT)
    torch.testing.assert_close(dense.approx, torch.einsum("bhnr,rm->bhnm", coef, module.basis), **TIGHT)
    sparse = module(query, key)
    assert bool(((sparse.coef != 0).sum(-1) == 3).all())
    basis = torch.zeros_like(module.basis)
    for r in range(5):
        for n in range(TOKENS):
            size = abs(float(module.basis[r, n].detach()))
            basis[r, n] = size if size > 0.02 else 0.0
    assert 0 < int((basis == 0).sum()) < basis.numel()
    top = coef.topk(3, -1)
    expected = (top.values[..., None] * basis[top.indices]).sum(-2)
    torch.testing.assert_close(sparse.approx, expected, **TIGHT)
    assert SparsifinerAttention(DIM, 4, tokens=TOKENS, official=True).predictor.scale == 0.5


@pytest.mark.paper("sparsifiner")
def test_the_choice_has_no_gradient_and_the_reconstruction_has_one() -> None:
    student, teacher = models()
    student.train()
    labels = torch.arange(6) % 4
    predictors = nn.ModuleList(layer.predictor for layer in student.layers)
    F.cross_entropy(student(images()), labels).backward()
    assert all(p.grad is None or not bool(p.grad.any()) for p in predictors.parameters())
    assert all(layer.approx is not None and layer.approx.requires_grad for layer in student.layers)
    assert bool(student.blocks[0].attention.query.weight.grad.any())
    student.zero_grad()
    student.set_mode("dense")
    student(images())
    maps = teacher_maps(teacher, images())
    for layer, wanted in zip(student.layers, maps, strict=True):
        assert layer.approx is not None
        attention_reconstruction(layer.approx, wanted).backward(retain_graph=True)
    # Biases of keys and the temperature of a softmax that begins flat may stand still; what makes the map may not.
    for layer in student.layers:
        for parameter in (layer.predictor.basis, layer.predictor.down, layer.predictor.query.weight):
            assert parameter.grad is not None and bool(parameter.grad.any())


@pytest.mark.paper("sparsifiner")
def test_the_map_has_low_rank_and_the_reconstruction_loss_fits_it() -> None:
    torch.manual_seed(0)
    query, key, _ = qkv(batch=1)
    module = ConnectivityPredictor(DIM, TOKENS, reduce_n=5).double()
    # A teacher's map of rank four: four groups of tokens with a pattern each, chosen by the query.
    patterns = torch.randn(4, TOKENS, dtype=torch.float64).mul(2).softmax(-1)
    member = (query @ torch.randn(DIM, 4, dtype=torch.float64) * 2).softmax(-1)
    teacher = member @ patterns
    optimizer = torch.optim.Adam(module.parameters(), lr=2e-2)
    losses = []
    for _ in range(400):
        approx = module(query, key, sparse=False).approx
        loss = attention_reconstruction(approx, teacher)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 10
    rank = TOKENS // 5
    values = torch.linalg.svdvals(module(query, key, sparse=False).approx.detach())
    assert float(values[..., rank:].max()) < 1e-12 < float(values[..., 0].min())


@pytest.mark.paper("sparsifiner")
def test_gathered_attention_is_masked_dense_attention() -> None:
    query, key, value = qkv(kv_heads=2)
    gathered, masked = attention(), attention(executor="masked")
    mask = gathered.predictor(query, key).mask
    expected = F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
    for module in (gathered, masked):
        torch.testing.assert_close(module(query, key, value), expected, **TIGHT)
        single = [t.float() for t in (query, key, value)]
        torch.testing.assert_close(module.float()(*single).double(), expected, atol=1e-5, rtol=1e-5)
        module.double()
    leaves = [t.clone().requires_grad_() for t in (query, key, value)]
    for module in (gathered, masked):
        module(*leaves).square().sum().backward()
    first = [leaf.grad for leaf in leaves]
    again = [t.clone().requires_grad_() for t in (query, key, value)]
    F.scaled_dot_product_attention(*again, mask, enable_gqa=True).square().sum().backward()
    for two, one in zip(first, again, strict=True):
        torch.testing.assert_close(two, 2 * one.grad, **TIGHT)  # type: ignore[operator]


@pytest.mark.paper("sparsifiner")
def test_hidden_tokens_are_chosen_by_nobody() -> None:
    query, key, _ = qkv()
    valid = torch.ones(2, TOKENS, dtype=torch.bool)
    valid[1, 3:22] = False
    weights = attention().weights(query, key, mask=KeyPadding(valid))
    assert not bool(weights[1, :, :, 3:22].any())
    # Seven are left, which is the budget.
    assert bool(((weights[1] > 0).sum(-1) == 7).all())
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, TOKENS, dtype=torch.float64))


@pytest.mark.paper("sparsifiner")
def test_another_image_size_interpolates_over_the_square() -> None:
    module = ConnectivityPredictor(DIM, 17, reduce_n=4).double()
    with torch.no_grad():
        rows = torch.arange(4.0, dtype=torch.float64).repeat_interleave(4)
        module.down.copy_(torch.cat((torch.tensor([9.0]), rows))[:, None].expand(-1, 4))
    fitted = module._fitted(module.down, 65)
    assert bool((fitted[0] == 9).all())
    # 4 x 4 patches whose numbers are their row, on 8 x 8: half a row a step, and flat beyond the middles of the border.
    steps = torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3], dtype=torch.float64)
    torch.testing.assert_close(fitted[1:, 0].view(8, 8), steps[:, None].expand(8, 8))
    for length in (1, 2, 11, 65):
        query, key, _ = qkv(length=length)
        assert module(query, key).mask.shape[-2:] == (length, length)


@pytest.mark.paper("sparsifiner")
def test_tokens_are_pruned_by_what_the_class_token_looks_at() -> None:
    student, _ = models(token_keep=0.6, prune_at=(0, 1))
    logits, tokens, kept = student.features(images())
    assert kept is not None and kept.sum(-1).tolist() == [math.ceil(0.36 * 25)] * 6
    first = student.blocks[0]
    embedded = student.embed(images())
    query, key, _ = first.attention.project(first.attention_norm(embedded))
    scores = (query[:, :, :1] @ key.transpose(2, 3) / 8**0.5).softmax(-1)[:, :, 0, 1:].mean(1)
    best = scores.topk(15, -1).indices
    assert all(set(kept[i].nonzero()[:, 0].tolist()) <= set(best[i].tolist()) for i in range(6))
    pruned = student.norm(torch.zeros(24))
    assert bool((tokens[~kept] == pruned).all()) and not bool((tokens[kept] == pruned).all(-1).any())
    plain, _ = models()
    assert plain.features(images())[2] is None
    assert not torch.allclose(plain(images()), logits)


@pytest.mark.paper("sparsifiner")
def test_operations_are_counted() -> None:
    query, key, _ = qkv()
    module = predictor()
    found = module(query, key)
    flops = mask_flops(found, module, DIM)
    pairs = TOKENS + 25 * 7
    assert flops.dense == 4 * 4 * TOKENS**2 * DIM and flops.attention == 4 * 4 * pairs * DIM
    low = 4 * (25 + 26) * (8 * 4 + 4 * 5)
    products = sum(int((found.basis[r] != 0).sum()) * int((found.coef[..., r] != 0).sum()) for r in range(5))
    assert flops.predictor == pytest.approx(2 * (low + products / 2))
    assert flops.reduction == pytest.approx(1 - (flops.attention + flops.predictor) / flops.dense)
    # DeiT-S: 197 tokens, 6 heads of 64. Attention itself is 357.7 million multiply-adds in 12 layers.
    small = SparsifinerAttention(64, 6, tokens=197, reduce_n=6).predictor
    query, key = torch.randn(2, 1, 6, 197, 64, generator=torch.Generator().manual_seed(0))
    flops = mask_flops(small(query, key), small, 64)
    assert 12 * flops.dense / 2 == pytest.approx(357.7e6, rel=1e-3)
    assert 0.4 < flops.reduction < 0.75


@pytest.mark.paper("sparsifiner")
def test_losses_by_hand() -> None:
    generator = torch.Generator().manual_seed(3)
    approx, teacher = torch.rand(2, 3, 4, 5, generator=generator), torch.rand(2, 3, 5, 5, generator=generator)
    expected = sum(
        float((approx[b, h, i, j] - teacher[b, h, i + 1, j]) ** 2)
        for b in range(2)
        for h in range(3)
        for i in range(4)
        for j in range(5)
    )
    assert float(attention_reconstruction(approx, teacher)) == pytest.approx(expected, rel=1e-5)
    student, wanted = torch.randn(2, 4, 5, generator=generator)
    p, q = wanted.softmax(-1), student.softmax(-1)
    assert float(cls_distillation(student, wanted)) == pytest.approx(float((p * (p / q).log()).sum() / 4), rel=1e-5)
    assert float(cls_distillation(student, student)) == pytest.approx(0, abs=1e-6)
    a, b = torch.randn(2, 3, 6, 5, generator=generator)
    kept = torch.rand(3, 6, generator=generator) < 0.5
    assert float(token_distillation(a, b)) == pytest.approx(float((a - b).square().mean()))
    assert float(token_distillation(a, b, kept)) == pytest.approx(float((a - b)[kept].square().mean()))
    with pytest.raises(ShapeError, match="does not fit"):
        attention_reconstruction(approx[..., :4], teacher)
    with pytest.raises(ShapeError, match="differ in shape"):
        cls_distillation(student, wanted[:, :3])


@pytest.mark.paper("sparsifiner")
def test_the_first_stage_moves_predictors_alone_and_the_second_the_rest() -> None:
    student, teacher = models()
    generator = torch.Generator().manual_seed(4)

    def draw() -> tuple[Tensor, Tensor]:
        index = torch.randint(6, (4,), generator=generator)
        return images()[index], index % 4

    def state() -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in student.state_dict().items()}

    before = state()
    history = train_predictors(student, teacher, draw, 60, lr=1e-2, final_lr=1e-3)
    after = state()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".predictor." in name for name in changed)
    assert history[-1] < history[0] / 2
    assert all(layer.mode == "sparse" for layer in student.layers)
    second = train_backbone(student, teacher, draw, 25, lr=2e-3)
    again = state()
    assert all(torch.equal(again[name], after[name]) for name in again if ".predictor." in name)
    assert not torch.equal(again["head.weight"], after["head.weight"])
    assert second[-1] < second[0] and all(p.requires_grad for p in student.parameters()) and not student.training
    histories = train_sparsifiner(student, teacher, draw, predictor_steps=2, steps=3)
    assert [len(history) for history in histories] == [2, 3]


def test_bad_settings_are_refused() -> None:
    for options in ({"keep": 0.0}, {"keep": 1.1}, {"reduce_n": 0}, {"basis_threshold": -1.0}):
        with pytest.raises(OptionError):
            ConnectivityPredictor(DIM, TOKENS, **options)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="executor"):
        SparsifinerAttention(DIM, executor="fast")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="mode"):
        attention().mode = "full"  # type: ignore[assignment]
    with pytest.raises(OptionError, match="token_keep"):
        models(token_keep=0.0)
    with pytest.raises(OptionError, match="do not match"):
        models()[0].load_dense(VisionTransformer(10, 2, 1, 4, **{**SIZES, "depth": 3}))
    with torch.device("meta"):
        small = SparsifinerViT()
    assert sum(p.numel() for n, p in small.named_parameters() if ".predictor." not in n) == 22_050_664
