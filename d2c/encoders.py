"""What every frozen encoder shares: the record of which one it was, the digest of its weights, and fetching them."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn

from d2c.errors import D2CError

UNREADABLE = (
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    TypeError,
    AssertionError,
    EOFError,
    pickle.UnpicklingError,
    SafetensorError,
)
"""What torch, safetensors and the model libraries raise on a weights file that is broken or of another model."""


HUB = "hf://"


@dataclass(frozen=True, kw_only=True)
class EncoderInfo:
    """Which encoder made the tokens, and how; fields that do not apply to it are None.

    ``source`` says where the weights came from without naming a folder of this machine: ``hf://REPO``,
    ``file:NAME``, ``open_clip:TAG`` or ``built in``. ``weights_xxh3`` is `weights_digest` of the tensors as read,
    before any resampling to another grid (T5's in float32, whatever they are stored in); empty for an encoder without
    weights. ``layer`` names the layer read.
    """

    name: str
    source: str
    revision: str
    weights_xxh3: str
    dim: int
    tokens: int
    layer: str
    grid: int | None = None
    """Side of the square token grid; vision tokens are in row-major order, the top left first."""
    input_px: int | None = None
    """Side of the square image that the encoder sees."""
    resize: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    view: str | None = None
    """``orig``: the image as cropped, not mirrored."""
    class_token: bool | None = None
    """Whether the encoder has a class token, and gives it before the others."""
    settings: tuple[tuple[str, int | float | str], ...] = ()
    """What else decides the tokens, by name (e.g. block, timestep and seed of ``scorer``)."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, without the fields that do not apply."""
        fields = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if v is not None}
        fields["settings"] = dict(self.settings)
        return fields


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """xxh3-128 over the tensors sorted by name: name, dtype, shape, then the C-order bytes of each."""
    digest = xxhash.xxh3_128()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def frozen(model: nn.Module, device: torch.device) -> nn.Module:
    """``model`` in eval mode on ``device``, without gradients."""
    return model.eval().requires_grad_(False).to(device)


def local_path(name: str) -> Path | None:
    """The file or folder called ``name``, or None where it can only be a hub id.

    Raises:
        D2CError: ``name`` is written as a path and there is nothing there.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise D2CError("there is no such file or folder of weights", where=name, hint="check the path")
    return None


def from_hub(repo: str, patterns: Sequence[str], *, hint: str) -> Path:
    """Folder that holds the files of the hub repository ``repo`` matching ``patterns``: cached, else downloaded.

    Raises:
        D2CError: the repository is neither cached nor reachable; the error gives ``hint``.
    """
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:
        raise D2CError(
            f"the pretrained weights {repo} are neither in the local cache nor reachable",
            found=first_line(error),
            hint=hint,
        ) from error


def weights_at(place: str, *, hint: str) -> tuple[Path, str]:
    """The file at ``place``, a path or ``hf://OWNER/REPO/FILE``, and what to say of where it came from.

    Raises:
        D2CError: there is no such file.
    """
    if not place.startswith(HUB):
        path = Path(place).expanduser()
        if not path.is_file():
            raise D2CError("there is no such weights file", where=path, hint=hint)
        return path, f"file:{path.name}"
    owner, repo, *file = place.removeprefix(HUB).split("/")
    if not file:
        raise D2CError("this names no file on the hub", found=place, expected="hf://OWNER/REPO/FILE")
    name = "/".join(file)
    path = from_hub(f"{owner}/{repo}", (name,), hint=hint) / name
    if not path.is_file():
        raise D2CError(f"the hub repository {owner}/{repo} has no {name} in the local cache", hint=hint)
    return path, place


def revision_of(path: Path) -> str:
    """The commit of a file or folder inside the hub cache (``.../snapshots/<commit>/...``); empty elsewhere."""
    parts = path.parts
    position = len(parts) - 1 - parts[::-1].index("snapshots") if "snapshots" in parts else len(parts)
    return parts[position + 1] if position + 1 < len(parts) else ""


def first_line(error: BaseException) -> str:
    """An exception in one line, for the ``found`` part of an error."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    text = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@dataclass(frozen=True)
class OpenClip:
    """An open_clip model with its checkpoint loaded, and where that came from."""

    model: nn.Module
    name: str
    source: str
    revision: str
    weights_xxh3: str


def open_clip_weights(spec: str, *, hint: str) -> tuple[str, str, Path]:
    """``MODEL:WEIGHTS`` -> architecture, tag or ``file:NAME``, and the checkpoint's path; tags are downloaded.

    Raises:
        D2CError: unknown architecture or tag, no weights named, or weights that cannot be had.
    """
    import open_clip

    name, _, weights = spec.partition(":")
    if name not in open_clip.list_models():
        raise D2CError(f"open_clip knows no architecture {name!r}", hint=f"one such as ViT-B-32; or {hint}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if not weights:
        raise D2CError(
            "open_clip weights must be named; random ones are never used",
            expected=f"open_clip:{name}:TAG_OR_FILE",
            hint=f"one of these tags: {', '.join(tags) or 'none'}; or a checkpoint file",
        )
    if weights.startswith(HUB):
        path, source = weights_at(weights, hint=hint)
        return name, source, path
    if weights not in tags:
        path = Path(weights).expanduser()
        if not path.is_file():
            raise D2CError(
                "these open_clip weights are neither a file nor a known tag",
                found=weights,
                expected=f"a checkpoint file, or one of: {', '.join(tags) or 'no tag is known'}",
                hint=hint,
            )
        return name, f"file:{path.name}", path
    _check_activation(name, weights)
    try:
        return name, weights, Path(open_clip.download_pretrained(open_clip.get_pretrained_cfg(name, weights)))
    except (OSError, ValueError, RuntimeError) as error:
        raise D2CError(
            f"the open_clip weights {name}:{weights} are neither in the local cache nor reachable",
            found=first_line(error),
            hint=hint,
        ) from error


def load_open_clip(spec: str, device: torch.device, *, image_size: int | None, hint: str) -> OpenClip:
    """Build ``MODEL:WEIGHTS`` (a tag of open_clip's or a checkpoint file) with every weight loaded.

    ``image_size`` resamples the image tower's position embeddings; None keeps the size it was trained at.

    Raises:
        D2CError: the model or weights are unknown or unreachable, or the checkpoint does not fit the model.
    """
    import open_clip
    from open_clip.factory import load_state_dict

    name, tag, path = open_clip_weights(spec, hint=hint)
    try:
        digest = weights_digest(load_state_dict(str(path)))
        model = open_clip.create_model(
            name,
            pretrained=str(path) if tag.startswith(("file:", HUB)) else tag,
            precision="fp32",
            force_image_size=image_size,
            require_pretrained=True,
        )
    except UNREADABLE as error:
        raise D2CError(
            f"this checkpoint does not fit open_clip's {name}", where=path, found=first_line(error), hint=hint
        ) from error
    source = tag if tag.startswith(("file:", HUB)) else f"open_clip:{tag}"
    return OpenClip(frozen(model, device), name, source, revision_of(path), digest)


def _check_activation(name: str, tag: str) -> None:
    """Refuse what open_clip only warns of: weights trained with QuickGELU in a model without it."""
    import open_clip

    trained = bool(open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False))
    built = bool(open_clip.get_model_config(name).get("quick_gelu", False))
    if trained != built:
        other = f"{name}-quickgelu" if trained else name.removesuffix("-quickgelu")
        raise D2CError(
            f"open_clip's {name} has another activation than the weights {tag} were trained with",
            hint=f"name the model open_clip:{other}:{tag}",
        )


def checked_tokens(tokens: Tensor, info: EncoderInfo) -> NDArray[np.float16]:
    """Tokens [N, T, D], or [N, 1 + T, D] with a class token, as float16, where they are what ``info`` promises."""
    expected = (info.tokens + bool(info.class_token), info.dim)
    if tuple(tokens.shape[1:]) != expected:
        raise D2CError(
            "the encoder made another number of tokens than the grid has",
            where=info.name,
            found=list(tokens.shape[1:]),
            expected=list(expected),
            hint="--vision dinov2",
        )
    half = tokens.to(torch.float16)
    if not torch.isfinite(half).all():
        raise D2CError(
            "the vision encoder gave tokens that are NaN or too large for float16",
            where=f"{info.name} ({info.source})",
            hint="check the weights file, or use another --vision",
        )
    values: NDArray[np.float16] = half.cpu().numpy()
    return values
