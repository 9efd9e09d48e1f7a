"""The official SiT, REPA and DiT code, imported by path and run as it is; parity.py and training.py use it.

git clone https://github.com/willisma/SiT
git clone https://github.com/sihyun-yu/REPA
git clone https://github.com/facebookresearch/DiT
"""

from __future__ import annotations

import ast
import contextlib
import copy
import importlib.util
import subprocess
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

REPA_WEIGHT = 0.5
"""REPA's default of --proj-coeff."""
SCALE = 0.18215
"""Of Stable Diffusion's latents, as train.py of all three writes it."""


def load(path: Path, name: str) -> Any:
    """A file, or a package's folder, as a module of this name: all three repositories call theirs ``models``."""
    folder = path.is_dir()
    spec = importlib.util.spec_from_file_location(
        name, path / "__init__.py" if folder else path, submodule_search_locations=[str(path)] if folder else None
    )
    if spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def functions(path: Path, *names: str) -> Any:
    """A module with these functions of a script that cannot be imported: REPA's train.py needs accelerate and wandb."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    module = types.ModuleType(path.stem)
    vars(module).update(torch=torch, OrderedDict=OrderedDict)
    exec(compile(tree, str(path), "exec"), vars(module))
    return module


def commit(folder: Path) -> str:
    """The first ten digits of the clone's commit."""
    done = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout[:10] or "unknown"


@dataclass(frozen=True)
class SiT:
    """https://github.com/willisma/SiT."""

    models: Any
    transport: Any
    update_ema: Any

    @staticmethod
    def load(folder: Path) -> SiT:
        missing = importlib.util.find_spec("torchdiffeq") is None
        if missing:
            # Its samplers' solver, which neither losses nor models touch.
            sys.modules["torchdiffeq"] = types.ModuleType("torchdiffeq")
            vars(sys.modules["torchdiffeq"]).update(odeint=None)
        transport = load(folder / "transport", "official_sit_transport")
        if missing:
            del sys.modules["torchdiffeq"]
        return SiT(load(folder / "models.py", "official_sit_models"), transport, _ema(folder))


@dataclass(frozen=True)
class DiT:
    """https://github.com/facebookresearch/DiT."""

    models: Any
    diffusion: Any
    update_ema: Any

    @staticmethod
    def load(folder: Path) -> DiT:
        diffusion = load(folder / "diffusion", "official_dit_diffusion")
        return DiT(load(folder / "models.py", "official_dit_models"), diffusion, _ema(folder))


@dataclass(frozen=True)
class Repa:
    """https://github.com/sihyun-yu/REPA."""

    models: Any
    loss: Any
    train: Any

    @staticmethod
    def load(folder: Path) -> Repa:
        return Repa(
            load(folder / "models" / "sit.py", "official_repa_sit"),
            load(folder / "loss.py", "official_repa_loss"),
            functions(folder / "train.py", "update_ema", "sample_posterior"),
        )

    def model(self, spec: Any, attention: dict[str, bool] | None = None) -> nn.Module:
        """REPA's model of the shape that d2c's ``spec`` describes."""
        made: nn.Module = self.models.SiT(
            **shape(spec),
            # Not in its sizes: S and B keep the 768 of the signature, with which S cannot run.
            decoder_hidden_size=spec.width,
            encoder_depth=spec.align_depth,
            z_dims=[spec.align_dim],
            projector_dim=spec.projector_width,
            use_cfg=True,
            **(attention or {"fused_attn": True, "qk_norm": False}),
        )
        return made


def _ema(folder: Path) -> Any:
    return functions(folder / "train.py", "update_ema").update_ema


def shape(spec: Any) -> dict[str, Any]:
    """Arguments that all three constructors share."""
    return {
        "input_size": spec.input_size,
        "patch_size": spec.patch,
        "in_channels": spec.channels,
        "hidden_size": spec.width,
        "depth": spec.depth,
        "num_heads": spec.heads,
        "num_classes": spec.num_classes,
    }


@dataclass
class RepaStep:
    """REPA's training step, line for line as in its train.py, for one process; accelerate's part is written out.

    What it would compute from images comes ready: the VAE's moments and DINOv2's tokens.
    """

    repa: Repa
    model: nn.Module
    precision: str = "fp32"
    lr: float = 1e-4
    ema: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.model.train()
        self.device = next(self.model.parameters()).device
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self.lr, betas=(0.9, 0.999), weight_decay=0.0, eps=1e-8
        )
        # accelerate does the same: scaling for fp16 alone.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.loss = self.repa.loss.SILoss(prediction="v", path_type="linear", weighting="uniform")

    def forward(self, *inputs: Tensor, **named: Tensor) -> Any:
        """The model under accelerate's autocast, which gives outputs back in fp32."""
        dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]
        with torch.autocast(self.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            velocity, tokens = self.model(*inputs, **named)
        return velocity.float(), [one.float() for one in tokens]

    def losses(self, moments: Tensor, labels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Denoising loss, and alignment loss before its weight; ``moments`` float [N, 8, H, W]."""
        latents = self.repa.train.sample_posterior(moments, latents_scale=SCALE, latents_bias=0.0)
        denoising, alignment = self.loss(self.forward, latents, {"y": labels}, zs=[tokens])
        return denoising.mean(), alignment.mean()

    def __call__(self, moments: Tensor, labels: Tensor, tokens: Tensor) -> tuple[float, float, float]:
        """Denoising loss, weighted alignment loss and gradient norm of one step, read by the host as its log does."""
        denoising, alignment = self.losses(moments, labels, tokens)
        self.scaler.scale(denoising + alignment * REPA_WEIGHT).backward()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.repa.train.update_ema(self.ema, self.model)
        return denoising.item(), alignment.item() * REPA_WEIGHT, norm.item()


@contextlib.contextmanager
def drawn(module: Any, name: str, **values: Tensor) -> Iterator[None]:
    """Let calls such as ``torch.rand`` inside ``module``, which knows torch as ``name``, return the given tensors."""

    class Fixed:
        def __getattr__(self, attribute: str) -> Any:
            return getattr(torch, attribute)

    fixed, before = Fixed(), getattr(module, name)
    for attribute, value in values.items():
        setattr(fixed, attribute, lambda *_, value=value, **__: value)
    setattr(module, name, fixed)
    try:
        yield
    finally:
        setattr(module, name, before)


def drop(embedder: Any, null: Tensor) -> None:
    """Let an official class embedder drop these classes, through its own ``force_drop_ids``."""
    plain = type(embedder).token_drop
    embedder.token_drop = lambda labels, _=None: plain(embedder, labels, null)
