"""Scorers: every layout that weights come in, the same numbers out of each, and refusals."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from d2c.errors import D2CError, UsageError
from d2c.sampling import SamplerConfig, sample
from d2c.scorers import Denoiser, load_denoiser
from d2c.sit import ModelSpec, SiT, model_spec
from d2c.transport import Eps, Velocity, alpha_bars
from formats.files import write_json
from formats.hashing import sha256_file

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def random_model(name: str, align_dim: int | None = None, learn_sigma: bool = False) -> SiT:
    spec = model_spec(name, 8, 4, 6, align_dim=align_dim, learn_sigma=learn_sigma)
    model = SiT(spec).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.05, generator=generator)
    return model


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(3, 4, 8, 8, generator=generator)
    noise = torch.randn(3, 4, 8, 8, generator=generator)
    return latents, noise, torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 3, 5])


def run_folder(model: SiT, folder: Path, spec: ModelSpec | None = None) -> Path:
    write_json(folder / "model.json", (spec or model.spec).to_dict())
    save_file(model.state_dict(), folder / "ema.safetensors")
    return folder


def test_a_run_of_ours(tmp_path: Path) -> None:
    model = random_model("sit-tiny/2", align_dim=5)
    run = run_folder(model, tmp_path / "run")
    denoiser = load_denoiser(str(run))
    latents, noise, t, labels = batch()
    assert denoiser.spec == model.spec
    assert not denoiser.model.training
    assert not any(p.requires_grad for p in denoiser.model.parameters())
    prediction = model((1 - t)[:, None, None, None] * latents + t[:, None, None, None] * noise, t, labels)
    want = (prediction - (noise - latents)).square().mean((1, 2, 3))
    assert torch.allclose(denoiser.loss(latents, noise, t, labels), want)
    file = run / "ema.safetensors"
    assert denoiser.origin["kind"] == "run"
    assert denoiser.origin["sha256"] == sha256_file(file)
    assert load_denoiser(file).origin["weights_xxh3"] == denoiser.origin["weights_xxh3"]


def save_plain(state: dict[str, Tensor], path: Path) -> None:
    torch.save(state, path)


def save_ema(state: dict[str, Tensor], path: Path) -> None:
    other = {key: value + 1 for key, value in state.items()}
    torch.save({"model": other, "ema": state, "opt": {"lr": 1e-4}, "args": argparse.Namespace(model="x")}, path)


def save_ddp_model(state: dict[str, Tensor], path: Path) -> None:
    torch.save({"model": {f"module.{key}": value for key, value in state.items()}}, path)


def save_old_format(state: dict[str, Tensor], path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


Save = Callable[[dict[str, Tensor], Path], None]


@pytest.mark.parametrize("save", [save_plain, save_ema, save_ddp_model, save_old_format])
@pytest.mark.parametrize(("family", "learn_sigma"), [("SiT", True), ("DiT", True), ("DiT", False)])
def test_official_files(save: Save, family: str, learn_sigma: bool, tmp_path: Path) -> None:
    model = random_model(f"{family}-tiny/2", learn_sigma=learn_sigma)
    path = tmp_path / f"{family}-XL-2-256.pt"
    save(model.state_dict(), path)
    denoiser = load_denoiser(path)
    assert denoiser.spec.to_dict() == {**model.spec.to_dict(), "align_depth": 4, "projector_width": 2048}
    assert denoiser.reverse_time == (family == "SiT")
    state = denoiser.model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_official_sit_runs_backwards(tmp_path: Path) -> None:
    """Official SiT: x_t = t x + (1 - t) noise and v = x - noise."""
    model = random_model("sit-tiny/2", learn_sigma=True)
    path = tmp_path / "SiT-XL-2-256.pt"
    save_plain(model.state_dict(), path)
    denoiser = load_denoiser(path)
    latents, noise, t, labels = batch()
    theirs = 1 - t
    mix = theirs[:, None, None, None]
    state = mix * latents + (1 - mix) * noise
    want = (model(state, theirs, labels) - (latents - noise)).square().mean((1, 2, 3))
    assert torch.allclose(denoiser.loss(latents, noise, t, labels), want, rtol=1e-5)
    assert torch.allclose(
        denoiser.hidden(latents, t, labels, 2, noise), model.hidden(state, theirs, labels, 2), atol=1e-5
    )
    drawn = sample(denoiser, Velocity(), (4, 8, 8), labels[:1], [7], SamplerConfig(steps=3, guidance=1.0))
    z = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(7))[None]
    for step in range(3):
        z = z + model(z, torch.tensor([step / 3]), labels[:1]) / 3
    assert torch.allclose(drawn, z, atol=1e-5)
    assert not load_denoiser(path, reverse_time=False).reverse_time


def test_repa_files_run_forwards_and_lose_their_projector(tmp_path: Path) -> None:
    model = random_model("sit-tiny/2", align_dim=5)
    path = tmp_path / "0400000.pt"
    save_ema(model.state_dict(), path)
    denoiser = load_denoiser(path)
    assert denoiser.spec.objective == "velocity"
    assert not denoiser.reverse_time
    latents, noise, t, labels = batch()
    same = Denoiser(model, Velocity(), model.spec, {})
    assert torch.equal(denoiser.loss(latents, noise, t, labels), same.loss(latents, noise, t, labels))


def test_equal_weights_have_one_digest_in_any_container(tmp_path: Path) -> None:
    model = random_model("dit-tiny/2", learn_sigma=True)
    digests = set()
    containers: list[tuple[Save, str]] = [
        (save_plain, "dit-a.pt"),
        (save_ema, "dit-b.pth"),
        (save_file, "dit-c.safetensors"),
    ]
    for save, name in containers:
        save(model.state_dict(), tmp_path / name)
        digests.add(load_denoiser(tmp_path / name).origin["weights_xxh3"])
    save_diffusers(model, tmp_path / "pipe" / "transformer")
    digests.add(load_denoiser(tmp_path / "pipe").origin["weights_xxh3"])
    assert len(digests) == 1
    with torch.no_grad():
        model.final_layer.linear.bias[0] += 1
    save_plain(model.state_dict(), tmp_path / "dit-a.pt")
    assert load_denoiser(tmp_path / "dit-a.pt").origin["weights_xxh3"] not in digests


def save_diffusers(model: SiT, folder: Path) -> Any:
    """Give diffusers' own model the weights of ``model`` and save it as diffusers does."""
    import diffusers

    spec = model.spec
    untyped: Any = diffusers
    theirs = untyped.DiTTransformer2DModel(
        num_attention_heads=spec.heads,
        attention_head_dim=spec.width // spec.heads,
        in_channels=spec.channels,
        out_channels=spec.out_channels,
        num_layers=spec.depth,
        sample_size=spec.input_size,
        patch_size=spec.patch,
        num_embeds_ada_norm=spec.num_classes,
        norm_eps=1e-6,
    ).eval()
    ours = model.state_dict()
    state: dict[str, Tensor] = {}
    for leaf in ("weight", "bias"):
        state[f"pos_embed.proj.{leaf}"] = ours[f"x_embedder.proj.{leaf}"]
        state[f"proj_out_1.{leaf}"] = ours[f"final_layer.adaLN_modulation.1.{leaf}"]
        state[f"proj_out_2.{leaf}"] = ours[f"final_layer.linear.{leaf}"]
    for i in range(spec.depth):
        block, emb = f"transformer_blocks.{i}", f"transformer_blocks.{i}.norm1.emb"
        state[f"{emb}.class_embedder.embedding_table.weight"] = ours["y_embedder.embedding_table.weight"]
        for leaf in ("weight", "bias"):
            for theirs_name, part in zip("qkv", ours[f"blocks.{i}.attn.qkv.{leaf}"].chunk(3), strict=True):
                state[f"{block}.attn1.to_{theirs_name}.{leaf}"] = part
            state[f"{block}.attn1.to_out.0.{leaf}"] = ours[f"blocks.{i}.attn.proj.{leaf}"]
            state[f"{block}.ff.net.0.proj.{leaf}"] = ours[f"blocks.{i}.mlp.fc1.{leaf}"]
            state[f"{block}.ff.net.2.{leaf}"] = ours[f"blocks.{i}.mlp.fc2.{leaf}"]
            state[f"{block}.norm1.linear.{leaf}"] = ours[f"blocks.{i}.adaLN_modulation.1.{leaf}"]
            for place, layer in ((0, 1), (2, 2)):
                state[f"{emb}.timestep_embedder.linear_{layer}.{leaf}"] = ours[f"t_embedder.mlp.{place}.{leaf}"]
    theirs.load_state_dict(state, strict=True)
    theirs.save_pretrained(folder)
    return theirs


def test_diffusers_computes_the_same(tmp_path: Path) -> None:
    theirs = save_diffusers(random_model("dit-tiny/2", learn_sigma=True), tmp_path)
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # the published formula, which the weights were trained with
    denoiser = load_denoiser(tmp_path)
    latents, noise, t, labels = batch()
    steps = torch.tensor([100, 500, 900])
    kept = alpha_bars(torch.device("cpu"))[steps].float()[:, None, None, None]
    noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
    with torch.no_grad():
        want = theirs(noisy, timestep=steps, class_labels=labels).sample[:, :4]
    got = denoiser(noisy, steps, labels)
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
    loss = denoiser.loss(latents, noise, t + 0.0005, labels)
    assert torch.allclose(loss, (want - noise).square().mean((1, 2, 3)), rtol=1e-4)
    assert isinstance(denoiser.objective, Eps)
    assert denoiser.origin["kind"] == "diffusers"


def test_a_hub_id_is_read_from_the_local_cache(tmp_path: Path) -> None:
    cached = tmp_path / "hub" / "models--facebook--DiT-XL-2-256"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    model = random_model("dit-tiny/2", learn_sigma=True)
    save_diffusers(model, cached / "snapshots" / ("0" * 40) / "transformer")
    denoiser = load_denoiser("facebook/DiT-XL-2-256")
    assert (denoiser.origin["kind"], denoiser.origin["source"]) == ("diffusers", "facebook/DiT-XL-2-256")
    assert torch.equal(denoiser.model.pos_embed, model.pos_embed)


def test_one_number_stands_for_every_time() -> None:
    model = random_model("sit-tiny/2")
    denoiser = Denoiser(model, Velocity(), model.spec, {})
    latents, noise, _, labels = batch()
    assert torch.equal(
        denoiser.loss(latents, noise, 0.3, labels), denoiser.loss(latents, noise, torch.full((3,), 0.3), labels)
    )
    assert denoiser.hidden(latents, 0.3, labels, 1, noise).shape == (3, 16, 96)


def test_a_name_that_tells_nothing_asks_for_the_objective(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    save_plain(random_model("dit-tiny/2").state_dict(), path)
    with pytest.raises(D2CError, match="--objective"):
        load_denoiser(path)
    assert load_denoiser(path, objective="eps").spec.objective == "eps"
    assert load_denoiser(path, objective="velocity").reverse_time
    with pytest.raises(UsageError, match="velocity or eps"):
        load_denoiser(path, objective="x0")
    run = run_folder(random_model("sit-tiny/2"), tmp_path / "run")
    with pytest.raises(UsageError, match="another objective"):
        load_denoiser(run, objective="eps")


@pytest.mark.parametrize("source", ["facebook/DiT-XL-2-256", "nowhere/DiT.pt", "missing-folder"])
def test_an_unreachable_scorer_names_the_two_ways_out(source: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(D2CError, match="scorer not reachable") as raised:
        load_denoiser(source)
    assert "--scorer FILE" in str(raised.value)
    assert "--scorer train" in str(raised.value)


def test_files_that_are_no_scorer(tmp_path: Path) -> None:
    model = random_model("dit-tiny/2")
    state = model.state_dict()
    damaged = tmp_path / "dit-damaged.pt"
    save_plain(state, damaged)
    damaged.write_bytes(damaged.read_bytes()[:5000])
    with pytest.raises(D2CError, match="damaged"):
        load_denoiser(damaged)
    (tmp_path / "dit.safetensors").write_bytes(b"nothing")
    with pytest.raises(D2CError, match="no readable weights"):
        load_denoiser(tmp_path / "dit.safetensors")
    torch.save([1, 2], tmp_path / "dit-list.pt")
    with pytest.raises(D2CError, match="no named tensors"):
        load_denoiser(tmp_path / "dit-list.pt")
    torch.save({"conv.weight": torch.zeros(2)}, tmp_path / "dit-unet.pt")
    with pytest.raises(D2CError, match="neither a SiT nor a DiT"):
        load_denoiser(tmp_path / "dit-unet.pt")
    del state["blocks.1.attn.qkv.bias"]
    save_plain(state, tmp_path / "dit-part.pt")
    with pytest.raises(D2CError, match=r"blocks\.1\.attn\.qkv\.bias"):
        load_denoiser(tmp_path / "dit-part.pt")
    (tmp_path / "dit.zip").write_bytes(b"")
    with pytest.raises(D2CError, match="not a weight file"):
        load_denoiser(tmp_path / "dit.zip")
    with pytest.raises(D2CError, match="holds no scorer"):
        load_denoiser(tmp_path)


def test_diffusers_weights_of_another_kind_are_refused(tmp_path: Path) -> None:
    save_diffusers(random_model("dit-tiny/2"), tmp_path / "a")
    write_json(tmp_path / "a" / "config.json", {"_class_name": "UNet2DModel"})
    with pytest.raises(D2CError, match="no DiT"):
        load_denoiser(tmp_path / "a")
    theirs = save_diffusers(random_model("dit-tiny/2"), tmp_path / "b")
    theirs.transformer_blocks[2].norm1.emb.class_embedder.embedding_table.weight.data += 1
    theirs.save_pretrained(tmp_path / "b")
    with pytest.raises(D2CError, match="different embedders"):
        load_denoiser(tmp_path / "b")


def test_a_run_with_text_can_be_sampled_but_not_score_without_that_text(tmp_path: Path) -> None:
    spec = model_spec("sit-tiny/2", 8, 4, 6, text_dim=5, text_tokens=2)
    model = SiT(spec)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.05)
    denoiser = load_denoiser(run_folder(model, tmp_path / "run"))
    labels, text, mask = torch.tensor([1, 2]), torch.randn(2, 2, 5), torch.ones(2, 2)
    config = SamplerConfig(steps=2)
    got = sample(denoiser, denoiser.objective, (4, 8, 8), labels, [1, 2], config, text=text, text_mask=mask)
    want = sample(model, Velocity(), (4, 8, 8), labels, [1, 2], config, text=text, text_mask=mask)
    assert torch.equal(got, want)
    latents, noise, t, classes = batch()
    with pytest.raises(D2CError, match="trained with text"):
        denoiser.loss(latents, noise, t, classes)
