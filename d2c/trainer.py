"""One training step: ``loss = denoising + lambda * alignment`` (paper, section 3.4), on one rank's part of the batch.

Batches, times, noise and dropped conditions are pure functions of (seed, step), drawn for the whole batch and then
shared out, so that a resumed run repeats an undisturbed one and any number of ranks trains on the same draws.
"""

from __future__ import annotations

import contextlib
import gc
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from d2c import runtime, sharding
from d2c.checkpoint import Parts
from d2c.ema import Ema
from d2c.errors import D2CError
from d2c.latents import to_model
from d2c.loading import Loader
from d2c.recipe import Recipe
from d2c.runtime import Ranks
from d2c.sit import ModelSpec, SiT
from d2c.throughput import compile_blocks
from d2c.transport import Objective, alignment_loss, objective_for, spatial_norm
from formats import Artifact


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a step depends on besides the artifact."""

    recipe: Recipe
    spec: ModelSpec
    token_column: str | None
    class_column: str | None
    precision: str
    seed: int
    compile: bool
    micro_batch: int | None
    """Images that a rank computes at once; None: its whole part of the batch."""
    shard: bool = False
    """Cut the training state up among the ranks."""


@dataclass(frozen=True)
class _Work:
    """Images [n] with their draws."""

    raw: Tensor
    labels: Tensor
    t: Tensor
    noise: Tensor
    null: Tensor
    posterior: Tensor | None
    tokens: Tensor | None
    class_token: Tensor | None
    class_noise: Tensor | None
    text: Tensor | None
    mask: Tensor | None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, part: slice) -> _Work:
        given = {name: value for name, value in vars(self).items() if value is not None}
        return replace(self, **{name: value[part] for name, value in given.items()})


@dataclass
class Trainer:
    """Everything that one rank holds while it trains."""

    settings: Settings
    parts: Parts
    model: SiT
    wrapped: nn.Module
    objective: Objective
    loader: Loader
    device: torch.device
    ranks: Ranks

    @staticmethod
    def build(settings: Settings, artifact: Artifact, device: torch.device, ranks: Ranks) -> Trainer:
        """A model with fresh weights, and all that belongs to it."""
        recipe, spec = settings.recipe, settings.spec
        # Weights are drawn on the CPU, so that they do not depend on the device.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(runtime.seed_of("init", settings.seed))
            model = SiT(spec)
        if settings.compile:
            compile_blocks(model, device)
        if settings.shard:
            sharding.shard(model, device, ranks.world, settings.precision)
        else:
            model = model.to(device)
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad],
            lr=recipe.lr,
            betas=recipe.betas,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        wrapped: nn.Module = model
        if ranks.world > 1 and not settings.shard:
            ids = [device.index] if device.type == "cuda" else None
            wrapped = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
        loader = Loader(
            artifact,
            batch_size=recipe.batch_size,
            seed=settings.seed,
            device=device,
            token_column=settings.token_column,
            class_column=settings.class_column,
            text=spec.text_dim is not None,
            flip=recipe.flip,
            rank=ranks.rank,
            world=ranks.world,
        )
        # Small gradients vanish in fp16; for other precisions the scaler does nothing.
        scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
        parts = Parts(model, Ema(model, recipe.ema_decay), optimizer, scaler)
        return Trainer(settings, parts, model, wrapped, objective_for(spec.objective), loader, device, ranks)

    def step(self, step: int) -> Tensor:
        """One optimizer step; returns `STATS` as a tensor, without waiting for the device.

        A step whose gradient is not finite changes no weights.

        Raises:
            D2CError: the GPU's memory is too small; the error names what fits.
        """
        work = self._work(step)
        try:
            return self._step(work, step)
        except torch.OutOfMemoryError as error:
            # What was computed until then lives on in these frames, and trying what fits needs the memory.
            traceback.clear_frames(error.__traceback__)
            message = str(error)
        raise self._too_large(work, step, message)

    def _step(self, work: _Work, step: int) -> Tensor:
        denoising, alignment = self._backward(work, step)
        scaler, optimizer, model = self.parts.scaler, self.parts.optimizer, self.parts.model
        scaler.unscale_(optimizer)
        norm = sharding.whole(nn.utils.clip_grad_norm_(model.parameters(), self.settings.recipe.clip_norm))
        skipped = (~torch.isfinite(norm)).float()
        if not scaler.is_enabled():
            optimizer.found_inf = skipped  # type: ignore[attr-defined] # fused AdamW then leaves everything as it is
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        self.parts.ema.update(model)
        loss = torch.stack([denoising, alignment])
        counted = torch.isfinite(loss).all()
        return torch.cat([loss.nan_to_num(0, 0, 0) * counted, _when(1 - skipped, norm), counted[None], skipped[None]])

    @contextlib.contextmanager
    def averaged(self) -> Iterator[SiT | None]:
        """The model with the averaged weights, for the first rank; the others come too, and get None."""
        spec, ema, main = self.settings.spec, self.parts.ema, self.ranks.main
        if self.settings.shard:
            # The first rank alone looks at samples and losses, and nobody would hand it the others' rows meanwhile.
            weights = sharding.host_copies(ema.state_dict(), keep=main)
            yield sharding.assembled(spec, weights, self.device) if main else None
        elif main:
            with ema.applied(self.model):
                yield self.model
        else:
            yield None

    def _work(self, step: int) -> _Work:
        batch = self.loader.batch(step)
        t, noise, posterior, null = self.loader.draws(step, self.objective, self.settings.recipe.class_dropout)
        class_noise = None if batch.class_token is None else self.loader.class_noise(step, batch.class_token.shape[1])
        return _Work(
            raw=batch.raw, labels=batch.labels, t=t, noise=noise, null=null, posterior=posterior, tokens=batch.tokens,
            class_token=batch.class_token, class_noise=class_noise, text=batch.text, mask=batch.mask,
        )  # fmt: skip

    def _backward(self, work: _Work, step: int) -> tuple[Tensor, Tensor]:
        """Leave the gradients of this rank's images; returns their mean denoising and alignment losses."""
        size = self.settings.micro_batch or len(work)
        starts = range(0, len(work), size)
        sums = torch.zeros(2, device=self.device)
        for start in starts:
            piece = work[start : start + size]
            with self._no_sync() if start != starts[-1] else contextlib.nullcontext():
                losses = torch.stack(self.losses(piece, step)) * (len(piece) / len(work))
                torch.autograd.backward(self.parts.scaler.scale(losses.sum()))
            sums += losses.detach()
        return sums[0], sums[1]

    def losses(self, work: _Work, step: int) -> tuple[Tensor, Tensor]:
        """Mean denoising loss of some images, and the weighted losses of what is attached to them: scalars."""
        recipe, objective = self.settings.recipe, self.objective
        latents = to_model(work.raw, self.loader.latent, work.posterior)
        token, noise = work.class_token, work.class_noise
        given = None if token is None or noise is None else objective.corrupt(token, noise, work.t)
        with runtime.autocast(self.settings.precision, self.device):
            output = self.wrapped(
                objective.corrupt(latents, work.noise, work.t),
                objective.model_time(work.t),
                work.labels,
                work.text,
                work.mask,
                null=work.null,
                return_tokens=work.tokens is not None,
                class_token=given,
            )
        prediction, *others = output if isinstance(output, tuple) else (output,)
        attached = torch.zeros((), device=self.device)
        if token is not None and noise is not None:
            attached += recipe.class_token * objective.loss(others.pop(), token, noise, work.t).mean()
        if work.tokens is not None:
            targets = spatial_norm(work.tokens, recipe.spatial_norm) if recipe.spatial_norm else work.tokens
            if token is not None:
                targets = torch.cat([token[:, None], targets.float()], dim=1)
            # Beyond its last step the alignment still counts, but nothing: several ranks wait for every gradient.
            weight = recipe.align_weight * (not recipe.align_until or step < recipe.align_until)
            attached += weight * alignment_loss(others.pop(), targets)
        return objective.loss(prediction, latents, work.noise, work.t).mean(), attached

    def _no_sync(self) -> contextlib.AbstractContextManager[None]:
        # A model that is cut up adds its gradients up each time: waiting would keep all of them on every GPU.
        wrapped = self.wrapped
        return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else contextlib.nullcontext()

    def _too_large(self, work: _Work, step: int, message: str) -> D2CError:
        tried = min(self.settings.micro_batch or len(work), len(work))
        if self.settings.shard:
            # Finding out what fits would take the other ranks' rows, and these do not know of it.
            more = "more GPUs or a smaller model"
            hint = f"try --micro-batch {tried // 2}, or {more}" if tried > 1 else f"use {more}"
        elif fits := next((size for size in _halves(tried) if self._fits(work[:size], step)), None):
            hint = f"--micro-batch {fits} computes the same step in pieces"
        else:
            hint = f"not even one image fits: use {'--shard yes or ' * (self.ranks.world > 1)}a smaller model"
        return D2CError(
            "a GPU's memory is too small for its part of the batch",
            found=f"{tried} images at once; {message.splitlines()[0]}",
            hint=hint,
        )

    def _fits(self, work: _Work, step: int) -> bool:
        """Whether these images can be computed at once. Afterwards nothing can be trained any more."""
        parameters = [parameter for group in self.parts.optimizer.param_groups for parameter in group["params"]]
        self.parts.optimizer.zero_grad(set_to_none=True)
        # Of the bare model: after a failed pass the wrapper, and its buckets, wait for gradients that never come.
        self.wrapped = self.model
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
            self.parts.optimizer.step()  # before the first step there are no moments
            # Unlike backward, this does not call the wrapper's hooks.
            torch.autograd.grad(torch.stack(self.losses(work, step)).sum(), parameters, allow_unused=True)
        except torch.OutOfMemoryError:
            return False
        return True


STATS = ("denoising", "alignment", "grad_norm", "counted", "skipped")
"""What `Trainer.step` gives: losses (0 where they are not finite), the norm of the gradient before clipping (0 where it
is not finite), whether the losses count, and whether the step was skipped."""


@dataclass
class Tally:
    """A rank's `STATS` summed since the last line of the log, float32 [5] on the device, of ``count`` steps.

    ``lost``: steps in a row, up to that line, that all went wrong.
    """

    total: Tensor
    count: int = 0
    lost: int = 0

    @staticmethod
    def of(saved: Mapping[str, Any] | None, device: torch.device, ranks: Ranks) -> Tally:
        """As `to_dict` gave it, or empty."""
        kept = saved or {"total": [0.0] * len(STATS), "count": 0, "lost": 0}
        totals = torch.tensor(kept["total"]).view(-1, len(STATS))
        # Other ranks than these once shared the steps: of the mean, all together give the same line.
        own = totals[ranks.rank] if len(totals) == ranks.world else totals.mean(0)
        return Tally(own.to(device), kept["count"], kept["lost"])

    def to_dict(self) -> dict[str, Any]:
        """For a checkpoint between two lines: the totals of all ranks, one after the other. Every rank calls this."""
        totals = runtime.told(self.total.cpu())
        return {"total": totals.flatten().tolist(), "count": self.count, "lost": self.lost}

    def add(self, stats: Tensor) -> None:
        """Count one step."""
        self.total += stats
        self.count += 1

    def line(self, step: int, ranks: Ranks, *, due: bool) -> tuple[dict[str, Any], bool]:
        """The line for the log, over all ranks, and whether any of them is ``due`` to save.

        Ranks do that together, though their clocks differ. The tally starts anew.
        """
        sums = torch.cat([self.total, self.total.new_tensor([float(due)])])
        if ranks.world > 1:
            dist.all_reduce(sums)
        denoising, alignment, norm, counted, skipped, saves = sums.tolist()
        steps = self.count * ranks.world
        line = {
            "step": step,
            "loss": _mean(denoising + alignment, counted),
            "denoising": _mean(denoising, counted),
            "alignment": _mean(alignment, counted),
            "grad_norm": _mean(norm, steps - skipped),
            "skipped": round(skipped / ranks.world),
        }
        useless = counted == 0 or skipped == steps
        self.total.zero_()
        self.count, self.lost = 0, self.lost + self.count if useless else 0
        return line, saves > 0


def _mean(total: float, count: float) -> float | None:
    return round(total / count, 6) if count else None


def _when(flag: Tensor, value: Tensor) -> Tensor:
    return torch.where(flag.bool(), value, 0)[None]


def _halves(size: int) -> Iterator[int]:
    while size > 1:
        size //= 2
        yield size
