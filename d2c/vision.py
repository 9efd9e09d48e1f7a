"""Frozen vision encoders: one token per cell of the trained model's grid, for every picked image.

Tokens are stored for the image as cropped (``view="orig"``), in row-major order from the top left, as the tokens of
a SiT or DiT are. No encoder ever runs with random weights: a checkpoint is loaded whole, or there is an error.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from d2c.encoders import (
    HUB,
    UNREADABLE,
    EncoderInfo,
    checked_tokens,
    first_line,
    from_hub,
    frozen,
    load_open_clip,
    revision_of,
    weights_at,
    weights_digest,
)
from d2c.errors import D2CError
from d2c.latents import LatentCodec
from d2c.scorer_tokens import Scorer, ScorerTokens, scorer_point
from d2c.weight_files import read_tensors

DINOV2 = "vit_base_patch14_dinov2.lvd142m"
"""What the paper attached (section 3.3): ViT-B/14, 256 tokens of 768 at 224 px."""
BICUBIC = "normalise, then bicubic (half-pixel centres, no antialiasing)"
_SCORER = "or use the scorer's own tokens, which need no download: --vision scorer"
_GRAMMAR = "scorer[:BLOCK[@TIME]], dinov2, timm:MODEL[:FILE] or open_clip:MODEL:TAG_OR_FILE"


class VisionEncoder(Protocol):
    """A frozen map from images to a grid of tokens."""

    @property
    def info(self) -> EncoderInfo: ...

    def encode(self, pixels: NDArray[np.uint8], labels: NDArray[Any]) -> NDArray[np.float16]:
        """uint8 [N, S, S, 3] and class ids [N] -> float16 [N, grid * grid, dim], the class token, if any, before them.

        Only ``scorer`` reads the labels, and it takes those that the scorer was trained with.

        Raises:
            D2CError: a token is NaN or does not fit float16, or the tokens do not make the grid.
        """
        ...


def open_vision(
    name: str,
    grid: int,
    device: torch.device,
    *,
    scorer: Scorer | None = None,
    codec: LatentCodec | None = None,
    seed: int = 0,
) -> VisionEncoder:
    """The encoder ``name`` for a ``grid`` x ``grid`` token grid.

    ``dinov2``, ``timm:MODEL`` (weights of timm's hub repository), ``timm:MODEL:FILE``,
    ``open_clip:MODEL:TAG_OR_FILE`` (a FILE may be ``hf://OWNER/REPO/FILE``), or ``scorer``, ``scorer:BLOCK``,
    ``scorer:BLOCK@TIME`` with ``scorer``, ``codec`` and ``seed`` given.

    Raises:
        D2CError: unknown name, a grid the encoder cannot make, or weights that are missing or unreachable.
    """
    family, _, rest = name.partition(":")
    if family == "scorer" and scorer is not None and codec is not None:
        depth, timestep = scorer_point(rest)
        return ScorerTokens(scorer, codec, grid, device, depth=depth, timestep=timestep, seed=seed)
    if name == "dinov2":
        return TimmTokens(DINOV2, None, grid, device)
    if family == "timm" and rest:
        model, _, file = rest.partition(":")
        return TimmTokens(model, file or None, grid, device)
    if family == "open_clip" and rest:
        return OpenClipTokens(rest, grid, device)
    raise D2CError(f"there is no vision encoder {name!r} here", expected=_GRAMMAR, hint="for example dinov2")


class TimmTokens:
    """Tokens of a plain vision transformer from timm, after its final norm: the class token, if it has one, and those
    of the patches; registers are dropped.
    """

    def __init__(self, name: str, file: str | None, grid: int, device: torch.device) -> None:
        import timm

        hint = f"give a weights file: --vision timm:{name}:FILE; {_SCORER}"
        architecture = name.split(".", maxsplit=1)[0]
        if not timm.is_model(architecture):
            raise D2CError(f"timm knows no model {name!r}", hint="--vision dinov2, or see timm.list_models('vit_*')")
        path, source = weights_at(file, hint=hint) if file else _timm_weights(name, hint)
        input_px = _timm_input(architecture, grid)
        state, _ = read_tensors(path)
        try:
            model: Any = timm.create_model(name, pretrained=False, img_size=input_px, num_classes=0)
            convert = getattr(inspect.getmodule(timm.model_entrypoint(architecture)), "checkpoint_filter_fn", None)
            given = convert(dict(state), model) if convert else state
            # A classifier may be left over; what is missing would silently stay random.
            missing = model.load_state_dict(given, strict=False).missing_keys
        except UNREADABLE as error:
            raise D2CError(
                f"this file does not fit timm's {name} at {grid} x {grid} tokens ({input_px} px)",
                where=path,
                found=first_line(error),
                hint=hint,
            ) from error
        if missing:
            raise D2CError("the weights are incomplete", where=path, found=f"no {', '.join(missing[:3])}", hint=hint)
        config: dict[str, Any] = model.pretrained_cfg
        self.info = EncoderInfo(
            name=f"timm:{name}",
            source=source,
            revision=revision_of(path),
            weights_xxh3=weights_digest(state),
            dim=int(model.num_features),
            tokens=grid * grid,
            layer="forward_features, registers dropped",
            grid=grid,
            input_px=input_px,
            resize=BICUBIC,
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            view="orig",
            class_token=getattr(model, "cls_token", None) is not None,
        )
        self._prefix = int(model.num_prefix_tokens)
        self._model: Any = frozen(model, device)
        self._device = device

    @torch.inference_mode()
    def encode(self, pixels: NDArray[np.uint8], labels: NDArray[Any]) -> NDArray[np.float16]:
        images = _prepare(pixels, self.info, self._device)
        tokens = self._model.forward_features(images)
        kept = tokens[:, self._prefix :]
        return checked_tokens(torch.cat([tokens[:, :1], kept], 1) if self.info.class_token else kept, self.info)


class OpenClipTokens:
    """Class token and patch tokens of an open_clip image tower, after its last block and post layer norm."""

    def __init__(self, spec: str, grid: int, device: torch.device) -> None:
        import open_clip
        from open_clip.transformer import VisionTransformer

        name = spec.partition(":")[0]
        hint = f"give a checkpoint file: --vision open_clip:{name}:FILE; {_SCORER}"
        config = (open_clip.get_model_config(name) or {}).get("vision_cfg", {})
        if not config.get("patch_size") or config.get("attentional_pool"):
            raise D2CError(
                f"{name} is no open_clip model with a plain vision transformer",
                hint=f"its tower is timm's, which reads open_clip's files too: --vision timm:{tower}:FILE"
                if (tower := config.get("timm_model_name"))
                else "such as open_clip:ViT-L-14:TAG",
            )
        patch = int(config["patch_size"])
        loaded = load_open_clip(spec, device, image_size=grid * patch, hint=hint)
        visual: Any = loaded.model.visual
        assert isinstance(visual, VisionTransformer)
        self._visual = visual
        self._device = device
        self.info = EncoderInfo(
            name=f"open_clip:{loaded.name}",
            source=loaded.source,
            revision=loaded.revision,
            weights_xxh3=loaded.weights_xxh3,
            dim=int(config["width"]),
            tokens=grid * grid,
            layer="last block, post layer norm",
            grid=grid,
            input_px=grid * patch,
            resize=BICUBIC,
            mean=tuple(visual.image_mean),
            std=tuple(visual.image_std),
            view="orig",
            class_token=True,
        )

    @torch.inference_mode()
    def encode(self, pixels: NDArray[np.uint8], labels: NDArray[Any]) -> NDArray[np.float16]:
        features = self._visual.forward_intermediates(
            _prepare(pixels, self.info, self._device),
            indices=1,
            normalize_intermediates=True,
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        prefix, patches = features["image_intermediates_prefix"][-1], features["image_intermediates"][-1]
        return checked_tokens(torch.cat([prefix[:, :1], patches], 1), self.info)


def _timm_weights(name: str, hint: str) -> tuple[Path, str]:
    """The weights file that timm itself names on the hub (safetensors), and where it came from."""
    import timm

    config = timm.models.get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id:
        raise D2CError(f"timm has no hub weights for {name}", hint=hint)
    wanted = config.hf_hub_filename or "model.safetensors"
    path = from_hub(config.hf_hub_id, (wanted,), hint=hint) / wanted
    if not path.is_file():
        raise D2CError(f"the hub repository {config.hf_hub_id} has no {wanted} in the local cache", hint=hint)
    return path, f"{HUB}{config.hf_hub_id}"


def _timm_input(architecture: str, grid: int) -> int:
    """Side in pixels of the image that gives ``grid`` x ``grid`` patch tokens, tried without making any weights.

    Raises:
        D2CError: the architecture gives none.
    """
    import timm
    from timm.layers.helpers import to_2tuple

    refused = D2CError(
        f"timm's {architecture} is no plain vision transformer, so it has no grid of {grid} x {grid} patch tokens",
        hint="--vision dinov2, or another timm model of the vit_* and eva* families",
    )
    with torch.device("meta"), torch.inference_mode():
        probe: Any = timm.create_model(architecture, pretrained=False, num_classes=0)
        patch = getattr(getattr(probe, "patch_embed", None), "patch_size", None)
        if patch is None or not hasattr(probe, "num_prefix_tokens"):
            raise refused
        side = grid * int(to_2tuple(patch)[0])
        try:
            sized: Any = timm.create_model(architecture, pretrained=False, num_classes=0, img_size=side)
            shape = sized.eval().forward_features(torch.zeros(1, 3, side, side)).shape
        except UNREADABLE as error:
            raise refused from error
        if shape != (1, sized.num_prefix_tokens + grid * grid, sized.num_features):
            raise refused
    return side


def _prepare(pixels: NDArray[np.uint8], info: EncoderInfo, device: torch.device) -> Tensor:
    """uint8 [N, S, S, 3] -> the encoder's input float32 [N, 3, input_px, input_px], in REPA's order.

    Scale to [0, 1], normalise, and only then resize.
    """
    images = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (info.mean, info.std))
    images = (images - mean) / std
    side = info.input_px
    if side is None or images.shape[-1] == side:
        return images
    return F.interpolate(images, size=(side, side), mode="bicubic", align_corners=False)
