"""Scorers: frozen denoisers read from a run of ours, an official SiT, DiT or REPA file, or diffusers weights."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2c import checkpoint
from d2c.diffusers_map import convert_diffusers, grid_and_heads
from d2c.errors import D2CError, UsageError
from d2c.runs import MODEL, RUN, TEXT, WEIGHTS, Run
from d2c.sit import OBJECTIVES, SIZES, ModelSpec, ObjectiveName, SiT
from d2c.transport import Objective, objective_for
from d2c.weight_files import SUFFIXES, read_tensors
from formats.files import read_json
from formats.hashing import sha256_file, xxh3_array, xxh3_lines

_DIFFUSERS_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
_FAMILY = re.compile(r"(?<![a-z])(sit|dit|repa)(?![a-z])")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_NAMED = 4
"""Tensors named for each fault; a file of another model has hundreds."""
_ELSEWHERE = "give a local file or folder with --scorer FILE, or train one on this data with --scorer train"


@dataclass
class Denoiser:
    """A frozen model with its noising process, in the toolkit's time (t = 1 is noise).

    ``origin`` says where the weights came from: ``kind`` ("run", "file", "diffusers"), ``source`` as given, ``path``
    of the file read, ``weights_xxh3`` over the tensors (equal for equal weights in any container) and the file's
    ``sha256``. ``text`` is what a run of ours trained with text was given for each class: embeddings
    [classes, text_tokens, text_dim] and mask [classes, text_tokens]; an image is scored with its own class's.
    """

    model: SiT
    objective: Objective
    spec: ModelSpec
    origin: dict[str, str]
    reverse_time: bool = False  # official SiT: t = 1 is data and the velocity points to it
    classes: tuple[str, ...] | None = None  # the source's own names of the classes, where a run of ours tells them
    text: tuple[Tensor, Tensor] | None = None

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
        class_token: Tensor | None = None,
    ) -> Any:
        """Predict as ``SiT`` does, in the toolkit's convention; so a scorer can be sampled from."""
        given = 1 - t if self.reverse_time else t
        output = self.model(latents, given, labels, text, text_mask, null=null, class_token=class_token)
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
            D2CError: the model was trained with text that is not at hand, or with class tokens: without them its error
                means nothing.
        """
        times = self._times(t, latents)
        noisy = self.objective.corrupt(latents, noise, times)
        prediction = self(noisy, self.objective.model_time(times), labels, *self._text(labels))
        return self.objective.loss(prediction, latents, noise, times)

    @torch.no_grad()
    def hidden(self, latents: Tensor, t: Tensor | float, labels: Tensor, depth: int, noise: Tensor) -> Tensor:
        """Tokens after block ``depth`` for latents noised to ``t``, float32 [N, T, width]; raises as ``loss`` does."""
        times = self._times(t, latents)
        noisy = self.objective.corrupt(latents, noise, times)
        model_t = self.objective.model_time(times)
        given = 1 - model_t if self.reverse_time else model_t
        return self.model.hidden(noisy, given, labels, depth, *self._text(labels)).float()

    def _text(self, labels: Tensor) -> tuple[Tensor, Tensor] | tuple[()]:
        if self.spec.class_dim is not None:
            raise D2CError(
                "a model that denoises a class token too cannot judge images, which come without one",
                where=self.origin.get("path"),
                hint="give a model without REG's class token, or --scorer train",
            )
        if not self.spec.dc_embedding:
            return ()
        if self.text is None:
            raise D2CError(
                "a model trained with text cannot score without its classes' text",
                where=self.origin.get("path"),
                found=f"no {TEXT} beside the weights",
                hint="give the whole folder of the run, a run trained without text, or --scorer train",
            )
        embeds, mask = self.text
        return embeds[labels].float(), mask[labels]

    def _times(self, t: Tensor | float, latents: Tensor) -> Tensor:
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
        reverse_time: whether the file's t = 1 is data; by default true for the files of others with SiT weights
            that have no projectors of REPA's.

    Raises:
        UsageError: ``objective`` is neither, or contradicts what the weights say of themselves.
        D2CError: the scorer cannot be reached, read or recognised.
    """
    if objective is not None and objective not in OBJECTIVES.values():
        raise UsageError("unknown scorer objective", found=objective, expected="velocity or eps")
    kind, weights = _locate(str(source))
    state, ours = read_tensors(weights)
    text = None
    if kind == "run":
        place = weights.parent / MODEL
        spec = ModelSpec.from_dict(read_json(place), where=str(place))
        text = _run_text(weights.parent / TEXT, spec)
    elif kind == "diffusers":
        spec, state = _from_diffusers(weights, state)
    else:
        projectors = [key for key in state if key.startswith("projectors.")]
        named = objective or ("velocity" if projectors else _family(weights))
        spec = infer_spec(state, "velocity" if named == "velocity" else "eps", weights)
        if reverse_time is None:
            reverse_time = not (ours or projectors or "repa" in f"{weights.parent.name}/{weights.name}".lower())
        state = {key: value for key, value in state.items() if key not in projectors}
    if objective is not None and objective != spec.objective:
        raise UsageError("this scorer has another objective", where=weights, found=spec.objective, expected=objective)
    reverse = spec.objective == "velocity" and kind == "file" and bool(reverse_time)
    model = _build(spec, state, weights)
    origin = {
        "kind": kind,
        "source": str(source),
        "path": str(weights),
        "weights_xxh3": weights_digest(model, text),
        "sha256": sha256_file(weights),
    }
    if text is not None:
        text = (text[0].to(device), text[1].to(device))
    classes = _run_classes(weights, kind)
    return Denoiser(model.to(device), objective_for(spec.objective), spec, origin, reverse, classes, text)


def _run_classes(weights: Path, kind: str) -> tuple[str, ...] | None:
    facts = weights.parent / RUN
    if kind != "run" or not facts.is_file():
        return None
    return tuple(str(row["source_id"]) for row in read_json(facts)["classes"])


def _run_text(path: Path, spec: ModelSpec) -> tuple[Tensor, Tensor] | None:
    """The text of each class that the run was trained with; None where there is none."""
    if not spec.dc_embedding or not path.is_file():
        return None
    tables, _ = checkpoint.load_tensors(path)
    found = {name: tuple(table.shape) for name, table in tables.items()}
    mask = (spec.num_classes, spec.text_tokens)
    if found != (expected := {"text_embeds": (*mask, spec.text_dim), "text_mask": mask}):
        raise D2CError("this text is not that of the model's classes", where=path, found=found, expected=expected)
    return tables["text_embeds"], tables["text_mask"]


def weights_digest(model: SiT, text: tuple[Tensor, Tensor] | None = None) -> str:
    """xxh3 over the names, shapes and bytes of the learned tensors and of the classes' text.

    The fixed position table is left out: not every container has it.
    """
    state = {name: value for name, value in model.state_dict().items() if name != "pos_embed"}
    state |= dict(zip(("text_embeds", "text_mask"), text or (), strict=False))
    lines = (f"{name} {tuple(state[name].shape)} {xxh3_array(state[name].cpu().numpy())}" for name in sorted(state))
    return xxh3_lines(lines)


def infer_spec(state: Mapping[str, Tensor], objective: ObjectiveName, where: Path) -> ModelSpec:
    """The spec that tensors in the official layout imply.

    Raises:
        D2CError: a tensor is missing, or the shapes are no SiT or DiT.
    """
    try:
        width, channels, patch, _ = state["x_embedder.proj.weight"].shape
        rows = state["final_layer.linear.weight"].shape[0]
        class_dim = state["cls_projectors2.weight"].shape[1] if "cls_projectors2.weight" in state else None
        tokens = state["pos_embed"].shape[1] - (class_dim is not None)
        num_classes = state["y_embedder.embedding_table.weight"].shape[0] - 1
        blocks = [int(key.split(".")[1]) for key in state if key.startswith("blocks.")]
        depth = 1 + max(blocks)
    except (KeyError, ValueError, IndexError) as error:
        raise _unrecognised(state, where) from error
    heads = {size.width: size.heads for size in SIZES.values()}.get(width)
    outputs = {patch**2 * channels: False, patch**2 * channels * 2: True}
    square = tokens > 0 and math.isqrt(tokens) ** 2 == tokens
    # A block without any tensor is no gap to name but a number out of thin air.
    if heads is None or rows not in outputs or not square or num_classes < 1 or depth > len(blocks):
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
        qk_norm="blocks.0.attn.q_norm.weight" in state,
        class_dim=class_dim,
        learn_sigma=outputs[rows],
    )


def _locate(source: str) -> tuple[str, Path]:
    """What ``source`` is, and the file that holds its weights."""
    path = Path(source).expanduser()
    if path.is_file():
        is_run = path.name == WEIGHTS and (path.parent / MODEL).is_file()
        return _finished(path.parent) if is_run else ("file", path)
    if not path.exists() and _HUB_ID.fullmatch(source) and not source.endswith(SUFFIXES):
        path = _download(source)
    if not path.exists():
        raise D2CError("scorer not reachable", where=path, found="no such file or folder", hint=_ELSEWHERE)
    if (path / MODEL).is_file():
        return _finished(path)
    for folder in (path / "transformer", path):
        for name in _DIFFUSERS_WEIGHTS:
            if (folder / name).is_file() and (folder / "config.json").is_file():
                return "diffusers", folder / name
    expected = f"{MODEL} with {WEIGHTS}, or config.json with {_DIFFUSERS_WEIGHTS[0]}"
    raise D2CError("this folder holds no scorer", where=path, expected=expected, hint=_ELSEWHERE)


def _finished(run: Path) -> tuple[str, Path]:
    """A run of ours and its averaged weights, which it writes last."""
    reached, finished = Run(run).reached_steps(), Run(run).finished_steps()
    # A run that is being continued still has its earlier weights, but says of itself that it took more steps.
    if not (run / WEIGHTS).is_file() or reached > finished:
        raise D2CError(
            "this training run has not finished",
            where=run,
            found=f"{reached} steps saved, averaged weights of {finished or 'no'} steps",
            hint="run the same d2c train again: it goes on where it stopped",
        )
    return "run", run / WEIGHTS


def _download(hub_id: str) -> Path:
    """Local folder of a diffusers repository, from the hub or its cache; only the transformer is fetched."""
    from huggingface_hub import snapshot_download

    names = ["config.json", *_DIFFUSERS_WEIGHTS]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=[*names, *(f"transformer/{name}" for name in names)]))
    except (OSError, ValueError) as error:
        raise D2CError("scorer not reachable", where=hub_id, found=error, hint=_ELSEWHERE) from error


def _from_diffusers(weights: Path, state: Mapping[str, Tensor]) -> tuple[ModelSpec, dict[str, Tensor]]:
    place = weights.parent / "config.json"
    grid, heads = grid_and_heads(read_json(place), place)
    converted = convert_diffusers(state, weights)
    spec = infer_spec({**converted, "pos_embed": torch.empty(1, grid**2, 0)}, "eps", weights)
    if spec.width % heads:
        raise D2CError("these sizes of a DiT are impossible", where=place, found=f"width {spec.width}, {heads} heads")
    return replace(spec, heads=heads), converted


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
    want, have = ({key: tuple(value.shape) for key, value in one.items()} for one in (model.state_dict(), state))
    faults = {
        "missing": [f"{key} {want[key]}" for key in want.keys() - have.keys()],
        "unknown": [f"{key} {have[key]}" for key in have.keys() - want.keys()],
        "of another shape": [f"{k} {have[k]}, not {want[k]}" for k in want.keys() & have.keys() if want[k] != have[k]],
    }
    if any(faults.values()):
        told = [
            f"{len(keys)} {fault}: {'; '.join(sorted(keys)[:_NAMED])}" + ("; ..." if len(keys) > _NAMED else "")
            for fault, keys in faults.items()
            if keys
        ]
        raise D2CError(f"these weights do not fit {spec.name}", where=where, found=". ".join(told), hint=_ELSEWHERE)
    model.load_state_dict(state, strict=True, assign=True)
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
