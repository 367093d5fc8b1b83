"""A session with an annotator: what is said is kept, shown and passed on."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from regard.errors import OptionError, ShapeError
from regard.models.probabilistic_attention import InteractiveSession, ProbabilisticSegmenter


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 6, 7, generator=torch.Generator().manual_seed(0))


def model(**options: float) -> ProbabilisticSegmenter:
    torch.manual_seed(0)
    return ProbabilisticSegmenter(3, 3, embed_dim=8, max_size=7, **options)  # type: ignore[arg-type]


@pytest.mark.paper("probabilistic_attention")
def test_outputs_are_probabilities_and_gradients_reach_everything() -> None:
    made = model()
    out = made.train()(images())
    assert out.shape == (2, 3, 6, 7)
    torch.testing.assert_close(out.exp().sum(1), torch.ones(2, 6, 7))
    out.sin().sum().backward()
    assert all(p.grad is not None for p in made.parameters())


@pytest.mark.paper("probabilistic_attention")
def test_training_adapts_nothing() -> None:
    made = model()
    plain = made.train()(images())
    torch.testing.assert_close(made.eval()(images(), key_iters=0, value_iters=0), plain)
    assert (made(images()) - plain).abs().max() > 1e-4


@pytest.mark.paper("probabilistic_attention")
def test_a_session_keeps_and_shows_what_was_said() -> None:
    made = model()
    before = copy.deepcopy(made.state_dict())
    session = InteractiveSession(made, images())
    first = session.predict()
    session.annotate(torch.tensor([[[1, 2], [5, 6]], [[0, 0], [3, 3]]]), torch.tensor([[2, 0], [1, -1]]))
    said = session.predict()
    assert (said[0, 1, 2], said[0, 5, 6], said[1, 0, 0]) == (2, 0, 1)
    assert int((session.annotations >= 0).sum()) == 3, "a negative label is no click"
    session.annotate(torch.tensor([[[1, 2]], [[0, 0]]]), torch.tensor([[1], [-1]]))
    assert session.predict()[0, 1, 2] == 1, "a later word on a place counts"
    assert first.shape == said.shape == (2, 6, 7)
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, before[name]), "the weights stay"


@pytest.mark.paper("probabilistic_attention")
def test_propagation_moves_other_places_toward_the_label() -> None:
    """With values alone fitted, a label raises its class at every other place, and most where pixels are alike."""
    made, x = model(key_iters=0, value_prior_precision=0.1), images(1)
    said = torch.full((1, 6, 7), -1)
    said[0, 2, 3] = 1
    made.eval()
    without, passed_on = (made(x, said, value_iters=n).exp()[0, 1] for n in (0, 1))
    elsewhere = said[0] < 0
    assert (passed_on - without)[elsewhere].min() > 0
    assert made(x, said).argmax(1)[0, 2, 3] == 1


@pytest.mark.paper("probabilistic_attention")
def test_wrong_calls_are_explained() -> None:
    session = InteractiveSession(model(), images(1))
    session.annotate([[1, 2]], [1])
    assert session.annotations[0, 1, 2] == 1
    with pytest.raises(OptionError, match="outside"):
        session.annotate([[6, 0]], [1])
    with pytest.raises(ShapeError, match="Clicks"):
        session.annotate([[1, 0]], [[1, 2, 3]])  # type: ignore[list-item]
    with pytest.raises(ShapeError, match="model takes"):
        model()(torch.zeros(1, 4, 6, 7))
    with pytest.raises(ShapeError, match="Images"):
        InteractiveSession(model(), torch.zeros(3, 6, 7))
