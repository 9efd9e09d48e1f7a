"""The scripts that compare with the official code, as far as they run without it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from d2c.recipe import recipe
from d2c.sit import model_spec

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "benchmarks"))


def run(script: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"docs/benchmarks/{script}", *options]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("script", "options", "said"),
    [
        ("training.py", ("--repa", "nowhere"), "git clone https://github.com/sihyun-yu/REPA"),
        ("parity.py", ("--sit", "nowhere", "--repa", "nowhere"), "not a clone of the official code"),
    ],
)
def test_without_the_official_code_they_say_what_is_missing(script: str, options: tuple[str, ...], said: str) -> None:
    done = run(script, *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr


# Stands in for a clone: the same interfaces, d2c's own model behind them.
SIT = """
import torch
from torch import nn
from d2c.conditioning import LabelEmbedder
from d2c.sit import SiT as Ours, ModelSpec

class Embedder(LabelEmbedder):
    def token_drop(self, labels, force_drop_ids=None):
        return labels if force_drop_ids is None else torch.where(force_drop_ids, self.num_classes, labels)
    def forward(self, labels, null=None):
        return super().forward(self.token_drop(labels, None))

class SiT(nn.Module):
    def __new__(cls, input_size, patch_size, in_channels, hidden_size, depth, num_heads, num_classes,
                decoder_hidden_size, encoder_depth, z_dims, projector_dim, use_cfg, fused_attn, qk_norm):
        model = Ours(ModelSpec(name="x", objective="velocity", depth=depth, width=hidden_size, heads=num_heads,
                               patch=patch_size, input_size=input_size, channels=in_channels, num_classes=num_classes,
                               align_depth=encoder_depth, align_dim=z_dims[0], projector_width=projector_dim))
        model.y_embedder.__class__ = Embedder
        plain = model.forward
        def forward(x, t, y):
            velocity, tokens = plain(x, t, y, return_tokens=True)
            return velocity, [tokens]
        model.forward = forward
        return model
"""
LOSS = """
import torch
from d2c.transport import Velocity, alignment_loss

class SILoss:
    def __init__(self, **options): ...
    def __call__(self, model, images, model_kwargs, zs):
        t, noise = torch.rand((len(images), 1, 1, 1)), torch.randn_like(images)
        velocity, tokens = model((1 - t) * images + t * noise, t.flatten(), **model_kwargs)
        return Velocity().loss(velocity, images, noise, t), alignment_loss(tokens[0], zs[0])
"""
TRAIN = """
import accelerate_is_not_here

@torch.no_grad()
def sample_posterior(moments, latents_scale=1., latents_bias=0.):
    mean, std = moments.chunk(2, dim=1)
    return (mean + std * torch.randn_like(mean)) * latents_scale + latents_bias

@torch.no_grad()
def update_ema(ema, model, decay=0.9999):
    for one, other in zip(ema.parameters(), model.parameters()):
        one.lerp_(other, 1 - decay)
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    for name, text in (("models/sit.py", SIT), ("loss.py", LOSS), ("train.py", TRAIN)):
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_the_speed_page_ends_in_a_line_of_json(clone: Path) -> None:
    few = ("--batch", "1", "--rounds", "5", "--model", "sit-tiny/2", "--device", "cpu", "--json")
    done = run("training.py", "--repa", str(clone), *few)
    assert done.returncode in (0, 1), done.stderr  # 1: a bar was missed
    *page, last = done.stdout.splitlines()
    facts = json.loads(last)
    assert (facts["batch"], facts["against"], facts["ours"]) == (1, "REPA, fp32", "d2c, bf16")
    assert facts["least"] <= facts["speedup"] <= facts["most"]
    assert facts["peak_share"] is None
    assert done.returncode == (not facts["met"])
    assert sum(line.startswith(("| REPA, ", "| d2c, ")) for line in page) == 5


def test_a_step_of_the_stand_in_is_a_step_of_ours(clone: Path, tmp_path: Path) -> None:
    import parity
    from official import Repa

    rows = parity.own_step(Repa.load(clone), tmp_path, "sit-tiny/2")
    assert [row.what for row in rows if not row.met] == []
    assert len(rows) == 5


def test_what_is_not_a_number_or_has_another_name_is_not_met() -> None:
    from parity_rows import Row, compared, largest

    nan, one = torch.tensor(float("nan")), torch.ones(1)
    assert not compared("", one, nan, 1.0).met
    assert not Row("", largest({"a": one}, {"b": one}), 1.0).met
    assert compared("", one, one, 0.0).shown()[-1] == "met"


def test_samplers_are_judged_where_they_were_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [["one", "50", "2e-5", "1e-4"], ["two", "50", "2e-4", "1e-4"], ["three", "50", "not installed", "1e-4"]]
    (tmp_path / "parity_samplers.py").write_text(f"def rows(sit, repa): return {rows}", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "parity_samplers", raising=False)
    import parity

    judged = [row[-1] for row in parity.samplers(tmp_path, tmp_path)]
    monkeypatch.delitem(sys.modules, "parity_samplers")
    assert judged == ["met", "**missed**", "not compared"]


def test_operations_of_training_are_those_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode
    from training import training_flops

    from d2c.sit import SiT

    spec = model_spec("sit-tiny/2", 8, 4, 10, align_dim=24)
    model, inputs = SiT(spec), (torch.randn(3, 4, 8, 8), torch.rand(3), torch.zeros(3, dtype=torch.long))
    with FlopCounterMode(display=False) as counter:
        velocity, tokens = model(*inputs, return_tokens=True)
        (velocity.sum() + tokens.sum()).backward()
    # torch leaves out what nobody reads: gradients of the latents and of the sinusoid.
    assert counter.get_total_flops() == pytest.approx(3 * training_flops(spec), rel=0.02)


def test_the_made_artifact_has_the_shapes_of_imagenet(tmp_path: Path) -> None:
    from made_artifact import trainer, write

    built = trainer(
        write(tmp_path / "artifact", 4), tmp_path / "run", "sit-tiny/2", recipe("repa", batch_size=2), "fp32", "cpu"
    )
    batch = built.loader.batch(0)
    assert batch.raw.shape == (2, 2, 4, 32, 32)
    assert batch.tokens.shape == (2, 256, 768)
    assert built.settings.spec.num_classes == 1000
    assert torch.isfinite(built.step(0)).all()
