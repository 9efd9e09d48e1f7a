"""The count of operations, against torch's own counter and the published figure."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from d2c.flops import forward_flops
from d2c.sit import SiT, model_spec

torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("name", "learn_sigma", "text_dim"),
    [("sit-tiny/4", False, None), ("dit-tiny/2", True, None), ("sit-s/8", True, 24)],
)
def test_torch_counts_the_same(name: str, learn_sigma: bool, text_dim: int | None) -> None:
    spec = model_spec(name, 16, 3, 10, text_dim=text_dim, learn_sigma=learn_sigma)
    model = SiT(spec).eval()
    text = (torch.zeros(2, spec.text_tokens, text_dim),) if text_dim else ()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, 3, 16, 16), torch.zeros(2), torch.zeros(2, dtype=torch.long), *text)
    assert counter.get_total_flops() == 2 * forward_flops(spec)


@pytest.mark.parametrize(("name", "published"), [("dit-xl/2", 118.64e9), ("dit-l/2", 80.71e9), ("dit-b/4", 5.56e9)])
def test_the_models_of_the_dit_paper_need_what_it_says(name: str, published: float) -> None:
    """Peebles & Xie, Tables 1 and 4: a multiplication with its addition is one operation there."""
    spec = model_spec(name, 32, 4, 1000, learn_sigma=True)
    assert forward_flops(spec) / 2 == pytest.approx(published, rel=2e-3)
