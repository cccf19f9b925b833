"""What stands beside LESSONS.md: breaks that mend themselves."""

import pytest
import torch

from lessons import lab


def test_what_is_broken_is_mended_even_after_a_failure():
    """`broken` and `kept_weights` put back what was there, whatever happens in their block."""

    class Thing:
        size = 3

    one, two = Thing(), Thing()
    with pytest.raises(ZeroDivisionError), lab.broken(one, two, size=4):
        assert one.size == two.size == 4
        1 / 0  # noqa: B018
    assert one.size == two.size == 3
    with pytest.raises(AttributeError), lab.broken(one, colour="red"):
        pass
    layer = torch.nn.Linear(2, 2)
    weight = layer.weight.detach().clone()
    with pytest.raises(ZeroDivisionError), lab.kept_weights(layer):
        torch.nn.init.zeros_(layer.weight)
        1 / 0  # noqa: B018
    assert torch.equal(layer.weight, weight)
