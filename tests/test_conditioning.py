"""Time, class and text vectors against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from d2c.conditioning import DCEmbedding, LabelEmbedder, TimestepEmbedder, sinusoid

torch.set_num_threads(1)


def test_sinusoid_is_cosines_then_sines_without_rescaling_t() -> None:
    got = sinusoid(torch.tensor([0.25, 999.0]))
    want = [[f(t * 10000 ** (-i / 128)) for f in (math.cos, math.sin) for i in range(128)] for t in (0.25, 999.0)]
    assert got.shape == (2, 256)
    assert torch.allclose(got, torch.tensor(want), atol=2e-4)  # float32 holds 999 rad to about 6e-5
    assert torch.allclose(got[0], torch.tensor(want[0]), atol=1e-6)


def test_integer_steps_and_floats_embed_alike() -> None:
    embedder = TimestepEmbedder(8)
    assert torch.equal(embedder(torch.tensor([3, 999])), embedder(torch.tensor([3.0, 999.0])))


def test_null_is_the_last_row_of_the_class_table() -> None:
    embedder = LabelEmbedder(4, 8)
    assert embedder.embedding_table.weight.shape == (5, 8)
    got = embedder(torch.tensor([0, 1, 2]), torch.tensor([False, True, False]))
    assert torch.equal(got, embedder.embedding_table.weight[[0, 4, 2]])


def test_text_vector_is_the_papers_formula() -> None:
    torch.manual_seed(0)
    embedder = DCEmbedding(text_dim=6, text_tokens=5, width=8).double()
    torch.nn.init.normal_(embedder.norm.weight)
    text = torch.randn(3, 5, 6, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.uint8)
    kernel, bias = embedder.conv.weight, embedder.conv.bias
    assert bias is not None
    vectors = []
    for sentence, real in zip(text, mask, strict=True):
        vector = bias.clone()
        for place in range(5):
            if real[place]:
                vector = vector + kernel[:, :, place] @ sentence[place]
        vectors.append(vector)
    plain = torch.stack(vectors)
    w = embedder.state_dict()
    centred = plain - plain.mean(1, keepdim=True)
    normed = centred / (plain.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt() * embedder.norm.weight
    inner = F.silu(normed @ w["mlp.0.weight"].T + w["mlp.0.bias"])
    want = inner @ w["mlp.2.weight"].T + w["mlp.2.bias"] + plain
    assert torch.allclose(embedder(text, mask), want, atol=1e-12)


def test_masked_tokens_do_not_matter_and_null_reads_none() -> None:
    torch.manual_seed(0)
    embedder = DCEmbedding(text_dim=6, text_tokens=4, width=8)
    text, mask = torch.randn(2, 4, 6), torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 1]])
    changed = text.clone()
    changed[0, 2:] += 7
    assert torch.equal(embedder(text, mask), embedder(changed, mask))
    null = torch.tensor([True, False])
    got = embedder(text, mask, null)
    assert torch.allclose(got[0], embedder.absent(1)[0])
    assert torch.allclose(got[1], embedder(text, mask)[1])
    assert not torch.allclose(got[0], embedder(text, mask)[0], atol=1e-3)


@pytest.mark.parametrize(("width", "millions"), [(384, 12.9), (768, 26.3), (1024, 35.7), (1152, 40.4)])
def test_sizes(width: int, millions: float) -> None:
    with torch.device("meta"):
        embedder = DCEmbedding(2048, 16, width)
    assert sum(p.numel() for p in embedder.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)
