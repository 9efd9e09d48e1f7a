"""Scorers: frozen denoisers read from a run of ours, an official SiT, DiT or REPA file, or diffusers weights."""

from __future__ import annotations

import argparse
import math
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2c.errors import D2CError, UsageError
from d2c.sit import OBJECTIVES, SIZES, ModelSpec, ObjectiveName, SiT
from d2c.transport import Objective, objective_for
from formats.files import read_json
from formats.hashing import sha256_file, xxh3_array, xxh3_lines

MODEL_FILE, WEIGHTS_FILE, RUN_FILE = "model.json", "ema.safetensors", "run.json"
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
_DIFFUSERS_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
_BLOCK = r"transformer_blocks\.(\d+)\."
_FROM_DIFFUSERS = {  # stem of a diffusers name -> stem of the official name
    r"pos_embed\.proj": "x_embedder.proj",
    _BLOCK + r"norm1\.emb\.timestep_embedder\.linear_1": "t_embedder.mlp.0",
    _BLOCK + r"norm1\.emb\.timestep_embedder\.linear_2": "t_embedder.mlp.2",
    _BLOCK + r"norm1\.emb\.class_embedder\.embedding_table": "y_embedder.embedding_table",
    _BLOCK + r"norm1\.linear": r"blocks.\1.adaLN_modulation.1",
    _BLOCK + r"attn1\.to_([qkv])": r"blocks.\1.attn.\2",
    _BLOCK + r"attn1\.to_out\.0": r"blocks.\1.attn.proj",
    _BLOCK + r"ff\.net\.0\.proj": r"blocks.\1.mlp.fc1",
    _BLOCK + r"ff\.net\.2": r"blocks.\1.mlp.fc2",
    r"proj_out_1": "final_layer.adaLN_modulation.1",
    r"proj_out_2": "final_layer.linear",
}
_FAMILY = re.compile(r"(?<![a-z])(sit|dit|repa)(?![a-z])")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_ELSEWHERE = "give a local file or folder with --scorer FILE, or train one on this data with --scorer train"


@dataclass
class Denoiser:
    """A frozen model with its noising process, in the toolkit's time (t = 1 is noise).

    ``origin`` says where the weights came from: ``kind`` ("run", "file", "diffusers"), ``source`` as given, ``path``
    of the file read, ``weights_xxh3`` over the tensors (equal for equal weights in any container) and the file's
    ``sha256``.
    """

    model: SiT
    objective: Objective
    spec: ModelSpec
    origin: dict[str, str]
    reverse_time: bool = False  # official SiT: t = 1 is data and the velocity points to it
    classes: tuple[str, ...] | None = None  # the source's own names of the classes, where a run of ours tells them

    @property
    def grid(self) -> int:
        """Tokens along one side of ``hidden``."""
        return self.spec.grid

    def __call__(
        self,
        latents: Tensor,
        t: Tensor,
        labels: Tensor,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        /,
        *,
        null: Tensor | None = None,
    ) -> Tensor:
        """Predict as ``SiT`` does, in the toolkit's convention; so a scorer can be sampled from."""
        given = 1 - t if self.reverse_time else t
        output: Tensor = self.model(latents, given, labels, text, text_mask, null=null)
        return -output if self.reverse_time else output

    @torch.no_grad()
    def loss(self, latents: Tensor, noise: Tensor, t: Tensor | float, labels: Tensor) -> Tensor:
        """Denoising error of each image at time ``t``, float32 [N]; the mean over t and noise is the difficulty score.

        Args:
            latents: clean [N, C, H, W].
            noise: standard normal, the same shape.
            t: [N] or one number, 0..1 with 1 = noise.
            labels: the scorer's class indices [N].

        Raises:
            D2CError: the model was trained with text, without which its error means nothing.
        """
        times = self._times(t, latents)
        noisy = self.objective.corrupt(latents, noise, times)
        prediction = self(noisy, self.objective.model_time(times), labels)
        return self.objective.loss(prediction, latents, noise, times)

    @torch.no_grad()
    def hidden(self, latents: Tensor, t: Tensor | float, labels: Tensor, depth: int, noise: Tensor) -> Tensor:
        """Tokens after block ``depth`` for latents noised to ``t``, float32 [N, T, width]; raises as ``loss`` does."""
        times = self._times(t, latents)
        noisy = self.objective.corrupt(latents, noise, times)
        model_t = self.objective.model_time(times)
        return self.model.hidden(noisy, 1 - model_t if self.reverse_time else model_t, labels, depth).float()

    def _times(self, t: Tensor | float, latents: Tensor) -> Tensor:
        if self.spec.dc_embedding:
            hint = "use a run trained without text, or --scorer train"
            raise D2CError(
                "a model trained with text cannot score images that have none", found=self.spec.name, hint=hint
            )
        times = torch.as_tensor(t, dtype=torch.float32, device=latents.device)
        return times.expand(len(latents)) if times.ndim == 0 else times


def load_denoiser(
    source: str | Path,
    device: torch.device | str = "cpu",
    *,
    objective: str | None = None,
    reverse_time: bool | None = None,
) -> Denoiser:
    """Read a frozen denoiser from a run folder, a weight file, a diffusers folder or a hub id.

    Args:
        source: see above; ``facebook/DiT-XL-2-256`` is a hub id.
        device: where the model goes.
        objective: "velocity" (SiT, REPA) or "eps" (DiT); needed only where neither weights nor names tell.
        reverse_time: whether the file's t = 1 is data; by default true for SiT files without REPA's projectors.

    Raises:
        UsageError: ``objective`` is neither, or contradicts what the weights say of themselves.
        D2CError: the scorer cannot be reached, read or recognised.
    """
    if objective is not None and objective not in OBJECTIVES.values():
        raise UsageError("unknown scorer objective", found=objective, expected="velocity or eps")
    kind, weights = _locate(str(source))
    state = _unwrap(_read_tensors(weights), weights)
    if kind == "run":
        place = weights.parent / MODEL_FILE
        spec = ModelSpec.from_dict(read_json(place), where=str(place))
    elif kind == "diffusers":
        spec, state = _from_diffusers(weights, state)
    else:
        projectors = [key for key in state if key.startswith("projectors.")]
        named = objective or ("velocity" if projectors else _family(weights))
        spec = infer_spec(state, "velocity" if named == "velocity" else "eps", weights)
        if reverse_time is None:
            reverse_time = not projectors and "repa" not in f"{weights.parent.name}/{weights.name}".lower()
        state = {key: value for key, value in state.items() if key not in projectors}
    if objective is not None and objective != spec.objective:
        raise UsageError("this scorer has another objective", where=weights, found=spec.objective, expected=objective)
    reverse = spec.objective == "velocity" and kind == "file" and bool(reverse_time)
    model = _build(spec, state, weights).to(device)
    origin = {
        "kind": kind,
        "source": str(source),
        "path": str(weights),
        "weights_xxh3": weights_digest(model),
        "sha256": sha256_file(weights),
    }
    return Denoiser(model, objective_for(spec.objective), spec, origin, reverse, _run_classes(weights, kind))


def _run_classes(weights: Path, kind: str) -> tuple[str, ...] | None:
    facts = weights.parent / RUN_FILE
    if kind != "run" or not facts.is_file():
        return None
    return tuple(str(row["source_id"]) for row in read_json(facts)["classes"])


def weights_digest(model: SiT) -> str:
    """xxh3 over the names, shapes and bytes of the learned tensors; the fixed position table is left out."""
    state = model.state_dict()
    names = sorted(state.keys() - {"pos_embed"})
    return xxh3_lines(f"{name} {tuple(state[name].shape)} {xxh3_array(state[name].cpu().numpy())}" for name in names)


def infer_spec(state: Mapping[str, Tensor], objective: ObjectiveName, where: Path) -> ModelSpec:
    """The spec that tensors in the official layout imply.

    Raises:
        D2CError: a tensor is missing, or the shapes are no SiT or DiT.
    """
    try:
        width, channels, patch, _ = state["x_embedder.proj.weight"].shape
        rows = state["final_layer.linear.weight"].shape[0]
        tokens = state["pos_embed"].shape[1]
        num_classes = state["y_embedder.embedding_table.weight"].shape[0] - 1
        depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    except (KeyError, ValueError, IndexError) as error:
        raise _unrecognised(state, where) from error
    heads = {size.width: size.heads for size in SIZES.values()}.get(width)
    outputs = {patch**2 * channels: False, patch**2 * channels * 2: True}
    if heads is None or rows not in outputs or math.isqrt(tokens) ** 2 != tokens:
        raise _unrecognised(state, where)
    family = "sit" if objective == "velocity" else "dit"
    size_names = [name for name, size in SIZES.items() if (size.width, size.depth) == (width, depth)]
    return ModelSpec(
        name=f"{family}-{size_names[0] if size_names else 'custom'}/{patch}",
        objective=objective,
        depth=depth,
        width=width,
        heads=heads,
        patch=patch,
        input_size=math.isqrt(tokens) * patch,
        channels=channels,
        num_classes=num_classes,
        align_depth=min(8, depth),
        learn_sigma=outputs[rows],
    )


def convert_diffusers(state: Mapping[str, Tensor], where: Path) -> dict[str, Tensor]:
    """Tensors of ``diffusers.DiTTransformer2DModel`` under the official names, all but the fixed ``pos_embed``.

    Raises:
        D2CError: a tensor is unknown, or the blocks' copies of the embedders differ, which no official model can hold.
    """
    converted: dict[str, Tensor] = {}
    for key, value in state.items():
        stem, _, leaf = key.rpartition(".")
        name = next((re.sub(old, new, stem) for old, new in _FROM_DIFFUSERS.items() if re.fullmatch(old, stem)), None)
        if name is None:
            raise _unrecognised(state, where)
        earlier = converted.setdefault(f"{name}.{leaf}", value)
        if earlier is not value and not torch.equal(earlier, value):
            raise D2CError("the blocks of these diffusers weights use different embedders", where=where, found=key)
    for key in [key for key in converted if ".attn.q." in key]:
        # A part that is missing makes the joint tensor too small, which the strict load then names.
        parts = [converted.pop(key.replace(".q.", f".{part}."), torch.empty(0)) for part in "qkv"]
        converted[key.replace(".q.", ".qkv.")] = torch.cat([part for part in parts if part.numel()])
    return converted


def _locate(source: str) -> tuple[str, Path]:
    """What ``source`` is, and the file that holds its weights."""
    path = Path(source).expanduser()
    if path.is_file():
        is_run = path.name == WEIGHTS_FILE and (path.parent / MODEL_FILE).is_file()
        return ("run" if is_run else "file"), path
    if not path.exists() and _HUB_ID.fullmatch(source) and not source.endswith(_SUFFIXES):
        path = _download(source)
    if not path.exists():
        raise D2CError("scorer not reachable", where=path, found="no such file or folder", hint=_ELSEWHERE)
    if (path / MODEL_FILE).is_file() and (path / WEIGHTS_FILE).is_file():
        return "run", path / WEIGHTS_FILE
    for folder in (path / "transformer", path):
        for name in _DIFFUSERS_WEIGHTS:
            if (folder / name).is_file() and (folder / "config.json").is_file():
                return "diffusers", folder / name
    expected = f"{MODEL_FILE} with {WEIGHTS_FILE}, or config.json with {_DIFFUSERS_WEIGHTS[0]}"
    raise D2CError("this folder holds no scorer", where=path, expected=expected, hint=_ELSEWHERE)


def _download(hub_id: str) -> Path:
    """Local folder of a diffusers repository, from the hub or its cache; only the transformer is fetched."""
    from huggingface_hub import snapshot_download

    names = ["config.json", *_DIFFUSERS_WEIGHTS]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=[*names, *(f"transformer/{name}" for name in names)]))
    except (OSError, ValueError) as error:
        raise D2CError("scorer not reachable", where=hub_id, found=error, hint=_ELSEWHERE) from error


def _read_tensors(path: Path) -> dict[str, Any]:
    """The mapping that a weight file holds; nothing in it is executed."""
    if path.suffix not in _SUFFIXES:
        expected = "a file ending in " + ", ".join(_SUFFIXES)
        raise D2CError("this is not a weight file", where=path, expected=expected, hint=_ELSEWHERE)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise D2CError("this weight file is damaged", where=path, found=error) from error
    try:
        # Training checkpoints keep their command line beside the tensors.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle can fail in any way: a dozen kinds were seen
        what = "this weight file is damaged, or holds more than tensors and was refused"
        found = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        hint = "save its tensors alone as .safetensors and give that file"
        raise D2CError(what, where=path, found=found, hint=hint) from error
    if not isinstance(content, dict):
        raise D2CError("this file holds no named tensors", where=path, found=type(content).__name__)
    return content


def _unwrap(content: Mapping[str, Any], where: Path) -> dict[str, Tensor]:
    """The named tensors, from under "ema" or "model" and without the prefix that DDP adds."""
    for nest in ("ema", "model"):
        if isinstance(content.get(nest), Mapping):
            content = content[nest]
            break
    state = {str(key).removeprefix("module."): value for key, value in content.items() if isinstance(value, Tensor)}
    if not state:
        raise D2CError("this file holds no named tensors", where=where, found=", ".join(list(content)[:5]))
    return state


def _from_diffusers(weights: Path, state: Mapping[str, Tensor]) -> tuple[ModelSpec, dict[str, Tensor]]:
    place = weights.parent / "config.json"
    config = read_json(place)
    if config.get("_class_name") != "DiTTransformer2DModel":
        raise D2CError(
            "these diffusers weights are no DiT", where=place, found=config.get("_class_name"), hint=_ELSEWHERE
        )
    converted = convert_diffusers(state, weights)
    # 32, 2 and 16 are what diffusers takes where the file is silent. Its files hold no positions; they are fixed.
    tokens = (config.get("sample_size", 32) // config.get("patch_size", 2)) ** 2
    spec = infer_spec({**converted, "pos_embed": torch.empty(1, tokens, 0)}, "eps", weights)
    return replace(spec, heads=config.get("num_attention_heads", 16)), converted


def _family(where: Path) -> ObjectiveName:
    """The objective that the name of a file, or else of its folder, tells; SiT and DiT weights look alike."""
    for name in (where.name, where.parent.name):
        told = {OBJECTIVES.get(word, "velocity") for word in _FAMILY.findall(name.lower())}
        if len(told) == 1:
            return told.pop()
    raise D2CError(
        "these weights could be a SiT (velocity) or a DiT (noise)",
        where=where,
        expected="SiT, DiT or REPA in the file's name",
        hint="say which: --objective velocity or --objective eps",
    )


def _build(spec: ModelSpec, state: Mapping[str, Tensor], where: Path) -> SiT:
    """A frozen float32 model in eval mode, with exactly the tensors of ``state``."""
    with torch.device("meta"):  # no time spent on initial values
        model = SiT(spec)
    state = {"pos_embed": model.pos_embed.detach(), **{key: value.float() for key, value in state.items()}}
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise D2CError(f"these weights do not fit {spec.name}", where=where, found=error) from error
    return model.requires_grad_(False).eval()


def _unrecognised(state: Mapping[str, Tensor], where: Path) -> D2CError:
    shapes = [f"{key} {tuple(value.shape)}" for key, value in list(state.items())[:4]]
    return D2CError(
        "these tensors are neither a SiT nor a DiT of a known width",
        where=where,
        found=", ".join(shapes),
        expected="the names of the official files; width " + ", ".join(str(size.width) for size in SIZES.values()),
        hint=_ELSEWHERE,
    )
