"""The transformer against its published formulas, names and sizes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from d2c.errors import D2CError
from d2c.sit import ModelSpec, SiT, model_names, model_spec, parse_model, position_table

torch.set_num_threads(1)


def random_model(spec: ModelSpec, seed: int = 0) -> SiT:
    """A model whose every weight is random: a fresh one outputs zero, which would agree with anything."""
    model = SiT(spec).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.05, generator=generator)
    return model


def inputs(spec: ModelSpec, count: int = 3, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(count, spec.channels, spec.input_size, spec.input_size, generator=generator)
    return latents, torch.rand(count, generator=generator), torch.arange(count) % (spec.num_classes + 1)


def published(state: dict[str, Tensor], spec: ModelSpec, z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """DiT (Peebles & Xie, section 3 and figure 3) from its formulas, float64, loops where the model has reshapes."""
    w = {name: value.double() for name, value in state.items()}
    n, p, g, heads = len(z), spec.patch, spec.grid, spec.heads

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift

    def silu(x: Tensor) -> Tensor:
        return x / (1 + torch.exp(-x))

    angles = t.double()[:, None] * torch.tensor([10000 ** (-i / 128) for i in range(128)], dtype=torch.float64)
    time = linear(silu(linear(torch.cat([angles.cos(), angles.sin()], 1), "t_embedder.mlp.0")), "t_embedder.mlp.2")
    c = silu(time + w["y_embedder.embedding_table.weight"][labels])[:, None]
    kernel = w["x_embedder.proj.weight"].flatten(1)
    patches = [z.double()[:, :, r * p : r * p + p, k * p : k * p + p].flatten(1) for r in range(g) for k in range(g)]
    x = torch.stack([patch @ kernel.T + w["x_embedder.proj.bias"] for patch in patches], 1) + w["pos_embed"]
    for i in range(spec.depth):
        name = f"blocks.{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(c, f"{name}.adaLN_modulation.1").chunk(6, -1)
        q, k, v = linear(norm(x, shift1, scale1), f"{name}.attn.qkv").chunk(3, -1)
        mixed = []
        for q_h, k_h, v_h in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
            mixed.append((q_h @ k_h.transpose(1, 2) / math.sqrt(spec.width / heads)).softmax(-1) @ v_h)
        x = x + gate1 * linear(torch.cat(mixed, -1), f"{name}.attn.proj")
        h = linear(norm(x, shift2, scale2), f"{name}.mlp.fc1")
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + gate2 * linear(h, f"{name}.mlp.fc2")
    shift, scale = linear(c, "final_layer.adaLN_modulation.1").chunk(2, -1)
    out = linear(norm(x, shift, scale), "final_layer.linear")
    image = torch.zeros(n, spec.out_channels, spec.input_size, spec.input_size, dtype=torch.float64)
    for token in range(g * g):
        top, left = p * (token // g), p * (token % g)
        pixels = out[:, token].view(n, p, p, spec.out_channels).permute(0, 3, 1, 2)
        image[:, :, top : top + p, left : left + p] = pixels
    return image[:, : spec.channels]


@pytest.mark.parametrize(("name", "learn_sigma"), [("sit-tiny/2", False), ("dit-tiny/2", True), ("sit-tiny/4", False)])
def test_forward_is_the_published_formula(name: str, learn_sigma: bool) -> None:
    spec = model_spec(name, 8, 3, 10, learn_sigma=learn_sigma)
    model = random_model(spec)
    latents, t, labels = inputs(spec)
    if spec.objective == "eps":
        t = torch.tensor([0, 500, 999])
    want = published(model.state_dict(), spec, latents, t, labels)
    got = model(latents, t, labels)
    assert got.shape == latents.shape
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
    exact = model.double()(latents.double(), t, labels)
    assert (exact - want).abs().max() < 1e-5 * want.abs().max()  # the angles of t stay float32
    if spec.objective == "velocity":
        assert (exact - want).abs().max() < 1e-7 * want.abs().max()


def test_positions_encode_column_then_row() -> None:
    table = position_table(8, 3)  # tokens in row-major order; halves of 2 sines and 2 cosines
    assert table.shape == (9, 8)
    row, column = 2, 1
    want = [f(place * freq) for place in (column, row) for f in (math.sin, math.cos) for freq in (1.0, 0.01)]
    assert table[row * 3 + column] == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize(("name", "millions"), [("s", 33.0), ("b", 130.5), ("l", 458.1), ("xl", 675.1)])
def test_published_sizes(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = SiT(model_spec(f"SiT-{name.upper()}/2", 32, 4, 1000))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


def test_xl_has_exactly_the_official_tensors() -> None:
    with torch.device("meta"):
        model = SiT(model_spec("sit-xl/2", 32, 4, 1000, align_dim=768, learn_sigma=True))
    stems = ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2"]
    stems += ["final_layer.linear", "final_layer.adaLN_modulation.1", *(f"projectors.0.{i}" for i in (0, 2, 4))]
    parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
    stems += [f"blocks.{i}.{part}" for i in range(28) for part in parts]
    official = {"pos_embed", "y_embedder.embedding_table.weight"}
    official |= {f"{stem}.{leaf}" for stem in stems for leaf in ("weight", "bias")}
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert shapes.keys() == official
    assert shapes["pos_embed"] == (1, 256, 1152)
    assert shapes["y_embedder.embedding_table.weight"] == (1001, 1152)
    assert shapes["final_layer.linear.weight"] == (32, 1152)
    assert shapes["projectors.0.4.weight"] == (768, 2048)


def test_a_fresh_model_outputs_zero_and_every_block_starts_as_the_identity() -> None:
    spec = model_spec("sit-tiny/2", 8, 4, 5)
    model = SiT(spec)
    latents, t, labels = inputs(spec)
    assert not model(latents, t, labels).any()
    assert torch.equal(model.hidden(latents, t, labels, 1), model.hidden(latents, t, labels, 4))


def test_what_is_attached_leaves_the_first_weights_of_the_trunk() -> None:
    torch.manual_seed(0)
    plain = SiT(model_spec("sit-tiny/2", 8, 3, 4)).state_dict()
    torch.manual_seed(0)
    spec = replace(model_spec("sit-tiny/2", 8, 3, 4), text_dim=6, text_tokens=2, align_dim=5)
    attached = SiT(spec)
    assert all(torch.equal(attached.state_dict()[name], weights) for name, weights in plain.items())
    for module in (attached.text_embedder, attached.projectors):
        linear = next(part for part in module.modules() if isinstance(part, torch.nn.Linear))
        bound = math.sqrt(6 / sum(linear.weight.shape))
        assert 0.8 * bound < linear.weight.abs().max() <= bound
        assert not linear.bias.any()


def test_null_drops_class_and_text_together() -> None:
    spec = model_spec("sit-tiny/2", 8, 4, 5, text_dim=6, text_tokens=3)
    model = random_model(spec)
    latents, t, labels = inputs(spec)
    text, mask = torch.randn(3, 3, 6), torch.ones(3, 3)
    null = torch.tensor([False, True, False])
    mixed = model(latents, t, labels, text, mask, null=null)
    kept = model(latents, t, labels, text, mask)
    dropped = model(latents, t, torch.full((3,), spec.num_classes))  # the null class and no text
    assert torch.allclose(mixed[~null], kept[~null], atol=1e-6)
    assert torch.allclose(mixed[null], dropped[null], atol=1e-6)
    assert not torch.allclose(kept[null], dropped[null], atol=1e-3)
    other = model(latents, t, labels, text + 1, mask, null=null)
    assert torch.allclose(other[null], mixed[null], atol=1e-6)
    assert not torch.allclose(other[~null], mixed[~null], atol=1e-3)


def test_tokens_are_the_projected_hidden_tokens() -> None:
    spec = model_spec("sit-tiny/2", 8, 4, 5, align_dim=7)
    model = random_model(spec)
    latents, t, labels = inputs(spec)
    output, tokens = model(latents, t, labels, return_tokens=True)
    assert tokens.shape == (3, spec.tokens, 7)
    assert torch.equal(output, model(latents, t, labels))
    hidden = model.hidden(latents, t, labels, spec.align_depth)
    assert hidden.shape == (3, spec.tokens, spec.width)
    assert torch.allclose(model.projectors[0](hidden), tokens)


def test_what_the_model_was_not_built_for_is_refused() -> None:
    spec = model_spec("sit-tiny/2", 8, 4, 5)
    model = SiT(spec)
    latents, t, labels = inputs(spec)
    with pytest.raises(ValueError, match="text_dim"):
        model(latents, t, labels, torch.zeros(3, 16, 4))
    with pytest.raises(ValueError, match="align_dim"):
        model(latents, t, labels, return_tokens=True)
    with pytest.raises(ValueError, match=r"1\.\.4"):
        model.hidden(latents, t, labels, 5)


def test_bf16_autocast_keeps_time_and_output_in_float32() -> None:
    spec = model_spec("sit-tiny/2", 8, 4, 5, align_dim=7)
    model = random_model(spec)
    latents, t, labels = inputs(spec)
    with torch.autocast("cpu", torch.bfloat16):
        output, tokens = model(latents, t, labels, return_tokens=True)
        assert torch.equal(model.t_embedder(t), model.t_embedder(t.double()))
        assert model.t_embedder(t).dtype == torch.float32
    assert output.dtype == torch.float32
    assert tokens.dtype == torch.bfloat16
    exact = model(latents, t, labels)
    assert F.mse_loss(output, exact).sqrt() < 0.05 * exact.std()


def test_it_compiles_without_a_graph_break() -> None:
    spec = model_spec("sit-tiny/4", 8, 4, 5, text_dim=6, text_tokens=3, align_dim=7)
    model = random_model(spec)
    latents, t, labels = inputs(spec)
    text, mask, null = torch.randn(3, 3, 6), torch.ones(3, 3), torch.tensor([True, False, False])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    got = compiled(latents, t, labels, text, mask, null=null, return_tokens=True)
    want = model(latents, t, labels, text, mask, null=null, return_tokens=True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, want, strict=True))


def test_gradients_reach_every_trained_parameter() -> None:
    spec = model_spec("sit-tiny/4", 8, 4, 5, text_dim=6, text_tokens=3, align_dim=7)
    model = random_model(spec)
    latents, t, labels = inputs(spec)
    output, tokens = model(latents, t, labels, torch.randn(3, 3, 6), torch.ones(3, 3), return_tokens=True)
    (output.square().mean() + tokens.square().mean()).backward()
    still = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert still == []
    assert model.pos_embed.grad is None


def test_names() -> None:
    assert parse_model("SiT-XL/2") == ("sit", "xl", 2)
    assert parse_model("dit-tiny/1") == ("dit", "tiny", 1)
    assert all(parse_model(name) for name in model_names())
    with pytest.raises(D2CError, match=r"did you mean sit-xl/2\?") as raised:
        parse_model("sit-xxl/2")
    assert "dit-s/8" in str(raised.value)


def test_specs() -> None:
    spec = model_spec("SiT-L/2", 32, 4, 1000, 2048, 768)
    assert (spec.name, spec.objective, spec.grid, spec.tokens, spec.dc_embedding) == (
        "sit-l/2",
        "velocity",
        16,
        256,
        True,
    )
    assert (spec.align_depth, model_spec("sit-b/2", 32, 4, 10).align_depth) == (8, 4)
    assert ModelSpec.from_dict(spec.to_dict()) == spec
    with pytest.raises(D2CError, match="no multiple of the patch side 8") as raised:
        model_spec("dit-s/8", 28, 4, 10)
    assert "/2 or /4" in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 3}, "unknown fields height"),
        ({"objective": "x0"}, "neither"),
        ({"heads": 5}, "5 heads"),
        ({"align_depth": 9}, "1..4"),
    ],
)
def test_a_bad_description_is_refused(change: dict[str, object], message: str) -> None:
    values = {**model_spec("sit-tiny/2", 8, 4, 5).to_dict(), **change}
    with pytest.raises(D2CError, match=message):
        ModelSpec.from_dict(values, where="model.json")
    with pytest.raises(D2CError, match="missing"):
        ModelSpec.from_dict({"name": "sit-tiny/2"})
