"""Codecs between pixels and latents: none (``rgb``) and Stable Diffusion's VAE (``vae``).

Three spaces, named so everywhere: ``pixels`` (uint8 [N, S, S, 3]), ``latents_raw`` (what is stored: moments
[N, M, C, H, W]) and ``latents`` (what a model sees: ``(raw - shift) * scale``, float32 [N, C, H, W]).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d2c.encoders import UNREADABLE, first_line, from_hub, frozen, local_path, revision_of, weights_digest
from d2c.errors import D2CError

VAE_REPO = "stabilityai/sd-vae-ft-ema"
VAE_SCALE = 0.18215
"""Latent diffusion's factor for the SD VAE, used where the VAE's own config has none."""
_REACH = "give --codec FOLDER (a folder saved by diffusers' AutoencoderKL), or work on pixels: --codec rgb --size 64"


@dataclass(frozen=True, kw_only=True)
class LatentSpec:
    """Everything a reader needs to turn stored latents into model latents, and to find the decoder again."""

    codec: str
    """``rgb`` or ``vae``."""
    dtype: str
    """NumPy name of the stored values: ``u1`` or ``f2``."""
    moments: tuple[str, ...]
    """``("mean",)`` or ``("mean", "std")``."""
    channels: int
    size: int
    """Side of the square latent."""
    downsample: int
    """Pixels per latent value along a side."""
    scale: float
    shift: float
    encoder: str
    """Hub id, or the name (not the path) of a local folder; empty for rgb."""
    revision: str = ""
    weights_xxh3: str = ""

    @property
    def pixels(self) -> int:
        """Side of the square image."""
        return self.size * self.downsample

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "moments": list(self.moments)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> LatentSpec:
        """Inverse of `to_dict`; fields of a later version are ignored.

        Raises:
            D2CError: a field is missing.
        """
        known = {f.name: value[f.name] for f in fields(cls) if f.name in value}
        missing = [f.name for f in fields(cls) if f.name not in known and f.name not in ("revision", "weights_xxh3")]
        if missing:
            raise D2CError("this latent description is incomplete", found=sorted(known), expected=", ".join(missing))
        return cls(**{**known, "moments": tuple(known["moments"])})


class LatentCodec(Protocol):
    """A frozen map between pixels and latents."""

    @property
    def spec(self) -> LatentSpec: ...

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[Any]:
        """uint8 [N, S, S, 3] -> latents_raw [N, M, C, H, W] of the spec's dtype."""
        ...

    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """Model latents [N, C, H, W] -> uint8 [N, S, S, 3]."""
        ...


def to_model(raw: Tensor, spec: LatentSpec, noise: Tensor | None = None) -> Tensor:
    """latents_raw [N, M, C, H, W] -> latents float32 [N, C, H, W] = (mean + std * noise - shift) * scale.

    Without ``noise`` (standard normal, [N, C, H, W]), or where no std is stored, the posterior mean is used.
    """
    values = raw[:, 0].float()
    if noise is not None and "std" in spec.moments:
        values = torch.addcmul(values, raw[:, spec.moments.index("std")].float(), noise.float())
    return (values - spec.shift) * spec.scale


def to_pixels(images: Tensor) -> NDArray[np.uint8]:
    """Float [N, 3, S, S] in [-1, 1] -> uint8 [N, S, S, 3], rounded to nearest: floor(clamp(127.5 x + 128)).

    That is SiT's formula; truncating ``255 (x + 1) / 2`` instead would darken by half a grey level.

    Raises:
        D2CError: a value is NaN or infinite.
    """
    values = images.float()
    if not torch.isfinite(values).all():
        raise D2CError(
            "the images to decode hold NaN or infinite values",
            hint="the model has diverged: sample from an earlier checkpoint, or train with --precision fp32",
        )
    whole = (127.5 * values + 128).clamp(0, 255).floor().to(torch.uint8)
    pixels: NDArray[np.uint8] = whole.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return pixels


class RgbCodec:
    """No compression: latents are the pixels themselves, channels first; encode and decode are exact inverses."""

    def __init__(self, size: int) -> None:
        self.spec = LatentSpec(
            codec="rgb",
            dtype="u1",
            moments=("mean",),
            channels=3,
            size=size,
            downsample=1,
            scale=1 / 127.5,
            shift=127.5,
            encoder="",
        )

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[Any]:
        _check_pixels(pixels, self.spec)
        return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)[:, None])

    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        return to_pixels(latents)


class VaeCodec:
    """Stable Diffusion's autoencoder through diffusers; stores the posterior's mean and std in float16, unscaled.

    Storing both moments lets training draw a fresh latent each pass, as training on images would.
    """

    def __init__(self, model: Any, size: int, device: torch.device, *, encoder: str, revision: str) -> None:
        config = model.config
        downsample = 2 ** (len(config.block_out_channels) - 1)
        if size % downsample:
            raise D2CError(
                "this image size does not divide into the VAE's latents",
                found=f"{size} px",
                expected=f"a multiple of {downsample} px",
                hint=f"--size {max(downsample, size // downsample * downsample)}",
            )
        self.spec = LatentSpec(
            codec="vae",
            dtype="f2",
            moments=("mean", "std"),
            channels=config.latent_channels,
            size=size // downsample,
            downsample=downsample,
            scale=float(config.get("scaling_factor") or VAE_SCALE),
            shift=float(config.get("shift_factor") or 0.0),
            encoder=encoder,
            revision=revision,
            weights_xxh3=weights_digest(model.state_dict()),
        )
        self._model: Any = frozen(model, device)
        self._device = device

    @torch.inference_mode()
    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[Any]:
        """As `LatentCodec.encode`.

        Raises:
            D2CError: a moment does not fit float16.
        """
        _check_pixels(pixels, self.spec)
        images = torch.from_numpy(pixels).to(self._device).permute(0, 3, 1, 2).float() / 127.5 - 1
        # Always float32: a caller's autocast must not give the same image two latents.
        with torch.autocast(self._device.type, enabled=False):
            posterior = self._model.encode(images).latent_dist
        raw = torch.stack([posterior.mean, posterior.std], dim=1).half()  # [N, 2, C, H, W]
        if not torch.isfinite(raw).all():
            raise D2CError(
                "the VAE gave latents that are NaN or too large for float16",
                where=self.spec.encoder,
                hint="use another --codec",
            )
        values: NDArray[Any] = raw.cpu().numpy()
        return values

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        values = latents.to(self._device, torch.float32) / self.spec.scale + self.spec.shift
        with torch.autocast(self._device.type, enabled=False):
            return to_pixels(self._model.decode(values).sample)


def open_codec(name: str, size: int, device: torch.device) -> LatentCodec:
    """The codec ``name`` for ``size`` x ``size`` images: ``rgb``, ``vae``, a hub id, or a folder diffusers saved.

    Raises:
        D2CError: the VAE cannot be had, is incomplete, or does not fit ``size``.
    """
    if name == "rgb":
        return RgbCodec(size)
    repo = VAE_REPO if name == "vae" else name
    folder = local_path(repo)
    path = folder or from_hub(repo, ("config.json", "diffusion_pytorch_model.safetensors"), hint=_REACH)
    model = _load_vae(path)
    return VaeCodec(model, size, device, encoder=path.resolve().name if folder else repo, revision=revision_of(path))


def _load_vae(path: Path) -> Any:
    from diffusers import AutoencoderKL

    loader: Any = AutoencoderKL
    if (path / "vae" / "config.json").is_file():
        path = path / "vae"  # a whole pipeline was named
    try:
        model, report = loader.from_pretrained(
            path,
            torch_dtype=torch.float32,
            use_safetensors=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
            local_files_only=True,
        )
    except UNREADABLE as error:
        raise D2CError(
            "this folder holds no AutoencoderKL that diffusers can load",
            where=path,
            found=first_line(error),
            expected="config.json and diffusion_pytorch_model.safetensors",
            hint=_REACH,
        ) from error
    if report["missing_keys"]:
        raise D2CError(
            "the VAE's weights are incomplete", where=path, found=f"no {report['missing_keys'][0]}", hint=_REACH
        )
    return model


def _check_pixels(pixels: NDArray[np.uint8], spec: LatentSpec) -> None:
    expected = (spec.pixels, spec.pixels, 3)
    if pixels.dtype != np.uint8 or pixels.shape[1:] != expected:
        raise D2CError(
            "these pixels do not fit the codec",
            found=f"{pixels.dtype} {list(pixels.shape)}",
            expected=f"uint8 [N, {spec.pixels}, {spec.pixels}, 3]",
        )
