from __future__ import annotations

import pytest
import torch

from regard.errors import ShapeError
from regard.models.transnormer import SGLU, TransNormerBlock, TransNormerLLM


def test_sglu_has_no_activation() -> None:
    glu, x = SGLU(6).double(), torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(glu(2 * x), 4 * glu(x))


def test_language_model_decodes_as_it_reads() -> None:
    model = TransNormerLLM(19, 12, 3, 3).double()
    tokens = torch.randint(19, (2, 30))
    logits = model(tokens)
    state, parts = model.init_state(2), []
    for piece in tokens.split((11, 1, 1, 17), 1):
        out, state = model.step(piece, state)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), logits)
    changed = tokens.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 19
    torch.testing.assert_close(model(changed)[:, :20], logits[:, :20])
    with pytest.raises(ShapeError):
        model(tokens.float())


def test_block_is_two_normed_residual_branches() -> None:
    block = TransNormerBlock(12, 3, 1, 4).double()
    x = torch.randn(2, 9, 12, dtype=torch.float64)

    def norm(t: torch.Tensor) -> torch.Tensor:
        return t / t.square().mean(-1, keepdim=True).sqrt()

    middle = x + block.attention(norm(x))
    torch.testing.assert_close(block(x), middle + block.glu(norm(middle)))
