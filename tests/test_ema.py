"""The average against the recurrence it stands for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from d2c.ema import Ema


def test_it_is_the_recurrence_by_name() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    ema = Ema(model, decay=0.9)
    want = {name: value.detach().double().clone() for name, value in model.named_parameters()}
    for _ in range(20):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        ema.update(model)
        want = {name: 0.9 * want[name] + 0.1 * value.detach().double() for name, value in model.named_parameters()}
    state = ema.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.allclose(state[name].double(), want[name], atol=1e-5) for name in want)
    assert torch.equal(state["bias"], model.bias)  # what does not train does not drift


def test_it_continues_from_a_saved_average_and_is_lent_to_a_model() -> None:
    torch.manual_seed(0)
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    ema, again = Ema(model), Ema(other)
    again.load_state_dict({name: value.clone() for name, value in ema.state_dict().items()})
    with torch.no_grad():
        model.weight.add_(1)
    ema.update(model)
    again.update(model)
    own = other.weight.clone()
    with again.applied(other):
        assert torch.equal(other.weight, ema.state_dict()["weight"])
        assert not torch.equal(other.weight, own)
    assert torch.equal(other.weight, own)
    with pytest.raises(KeyError, match="bias"):
        ema.load_state_dict({"weight": torch.zeros(2, 3)})


def test_a_half_precision_model_is_averaged_in_float32() -> None:
    model = nn.Linear(2, 1).bfloat16()
    ema = Ema(model, decay=0.9999)
    before = ema.state_dict()["weight"].clone()
    with torch.no_grad():
        model.weight.add_(1)
    ema.update(model)
    assert ema.state_dict()["weight"].dtype == torch.float32
    assert torch.allclose(ema.state_dict()["weight"] - before, torch.tensor(1e-4), rtol=0.05)
