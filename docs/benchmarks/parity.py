"""Write parity.md: d2c's models, losses and training step against the official SiT, REPA and DiT code.

PYTHONPATH=. python docs/benchmarks/parity.py --sit DIR --repa DIR --dit DIR > docs/benchmarks/parity.md
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from machine import machine, note
from made_artifact import trainer, write
from official import REPA_WEIGHT, DiT, Repa, RepaStep, SiT, commit, drawn, drop, shape
from parity_rows import MISSED, Row, compared, draw_anew, largest, moved
from tables import table
from torch import Tensor, nn

from d2c import sit
from d2c.ema import Ema
from d2c.recipe import RECIPES
from d2c.scorers import Denoiser
from d2c.sit import ModelSpec, model_spec
from d2c.transport import STEPS, Velocity, alignment_loss, objective_for

FORWARD, LOSS, STEP = 1e-5, 1e-6, 1e-6
BATCH = 4
DECAY = 0.9
"""Of the averages: the usual 0.9999 would hide a mistake in them."""
PACKAGES = "torch timm numpy".split()
TEXT = """# Parity with the official code

[parity.py](parity.py) made this page: `PYTHONPATH=. python docs/benchmarks/parity.py --sit DIR --repa DIR --dit DIR`,
from clones of {clones}.
The models have S/2's width and {depth} blocks, latents of 4 x 32 x 32 and, for REPA, a projector to 768; every tensor,
gates and positions too, is drawn anew, since zeros would hide mistakes. Both sides get the same {batch} images, times,
noise and dropped classes. All is fp32 on one CPU; each figure is the largest absolute difference, beside the size (root
mean square) of what is compared. Bars are absolute; that of gradient norms is {loss} of the norm.

- *loads*: state dicts go strictly, without a map of names, from theirs to ours and from ours to theirs.
- *loss*: of each image; theirs is what `SILoss`, `Transport.training_losses` and `GaussianDiffusion.training_losses`
  return, with the draws put in the place of theirs. SiT's own time runs from noise to data and its velocity points to
  the data: d2c reads it through `Denoiser(reverse_time=True)`, as it reads the released files.
- *step*: the gradient of the mean loss, clipped to a norm of 1 (SiT and DiT do not clip; here both sides do), AdamW
  with REPA's numbers, then the average (decay {decay}). Theirs is plain AdamW and their `update_ema`; ours is the fused
  AdamW and `d2c.ema.Ema` that `d2c train` uses. The size is that of the change, not of the parameters.
- *`d2c train`'s own step*: not its parts but `d2c.training` as it runs, on an artifact with 8-bit tokens, SiT-S/2 with
  all 12 blocks, against REPA's step with REPA's EMA decay; REPA is given the decoded tokens and the same draws.
- DiT's models predict a variance too (`learn_sigma`), which its loss trains by a variational bound. d2c computes that
  half of the output and drops it. So the rows of DiT compare the term `mse`, which leaves the bound out; the rows of
  DiT without variance, which is what `d2c train` trains, compare DiT's whole loss. Training DiT here is therefore not
  training the published objective to the last term.

{patched}
"""
PATCHED = """\
Run as they are, but for three things. REPA's S and B need `decoder_hidden_size`, which its size table leaves at 768.
`update_ema` and `sample_posterior` are taken out of the train.py files by name, since these need accelerate,
wandb or a process group to be imported. Where torchdiffeq is not installed, SiT's transport is given an empty module
of that name; only its samplers use it."""


@dataclass(frozen=True)
class Fixed:
    """What both sides are given: t is 0..1 with 1 = noise."""

    latents: Tensor
    noise: Tensor
    t: Tensor
    labels: Tensor
    null: Tensor
    tokens: Tensor

    @staticmethod
    def draw(spec: ModelSpec) -> Fixed:
        generator = torch.Generator().manual_seed(1)
        latents, noise = torch.randn(
            2, BATCH, spec.channels, spec.input_size, spec.input_size, generator=generator
        ).unbind()
        t = torch.rand(BATCH, generator=generator)
        labels = torch.randint(spec.num_classes, (BATCH,), generator=generator)
        tokens = torch.randn(BATCH, spec.tokens, 768, generator=generator)
        return Fixed(latents, noise, t, labels, torch.arange(BATCH) % 3 == 1, tokens)


@dataclass(frozen=True)
class Case:
    """One published model: theirs, the shape of ours, and the losses [N] (+ an alignment loss) of both."""

    name: str
    theirs: nn.Module
    spec: ModelSpec
    their_loss: Callable[[nn.Module, Fixed], tuple[Tensor, Tensor]]
    update_ema: Callable[..., None]
    reverse_time: bool = False


def our_loss(case: Case, model: sit.SiT, fixed: Fixed) -> tuple[Tensor, Tensor]:
    """Denoising loss [N] and weighted alignment loss, by the functions that `d2c.training` calls."""
    objective = objective_for(case.spec.objective)
    z_t, t = objective.corrupt(fixed.latents, fixed.noise, fixed.t), objective.model_time(fixed.t)
    if case.reverse_time:
        output: Any = Denoiser(model, objective, case.spec, {}, reverse_time=True)(
            z_t, t, fixed.labels, null=fixed.null
        )
    else:
        output = model(z_t, t, fixed.labels, null=fixed.null, return_tokens=case.spec.align_dim is not None)
    if case.spec.align_dim is None:
        return objective.loss(output, fixed.latents, fixed.noise, fixed.t), torch.zeros(())
    denoising = objective.loss(output[0], fixed.latents, fixed.noise, fixed.t)
    return denoising, RECIPES["repa"].align_weight * alignment_loss(output[1], fixed.tokens)


def check(case: Case) -> list[Row]:
    theirs, fixed, rows = case.theirs, Fixed.draw(case.spec), []
    ours = sit.SiT(case.spec)
    positions = compared("positions of a fresh model", theirs.pos_embed, ours.pos_embed, FORWARD)
    draw_anew(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    back = copy.deepcopy(theirs)
    draw_anew(back, seed=1)
    back.load_state_dict(ours.state_dict(), strict=True)
    rows.append(
        Row(
            f"loads, both ways ({len(ours.state_dict())} tensors)", largest(theirs.state_dict(), back.state_dict()), 0.0
        )
    )
    rows.append(positions)
    given = objective_for(case.spec.objective).model_time(fixed.t)
    with torch.no_grad():
        labels = torch.where(fixed.null, case.spec.num_classes, fixed.labels)
        output: Any = theirs.eval()(fixed.noise, given, labels)
        aligned = case.spec.align_dim is not None
        mine: Any = ours.eval()(fixed.noise, given, fixed.labels, null=fixed.null, return_tokens=aligned)
        if aligned:
            rows.append(compared("forward, projected tokens", output[1][0], mine[1], FORWARD))
            # Near what the model gives: cosines of random tokens are all but zero.
            fixed = replace(fixed, tokens=output[1][0] + 0.5 * fixed.tokens)
            output, mine = output[0], mine[0]
        rows.append(compared("forward", output[:, : case.spec.channels], mine, FORWARD))
    theirs.train()
    drop(theirs.y_embedder, fixed.null)
    their_losses, our_losses = case.their_loss(theirs, fixed), our_loss(case, ours.train(), fixed)
    rows.append(compared("loss", their_losses[0], our_losses[0], LOSS))
    if aligned:
        rows.append(compared("loss, alignment with its weight", their_losses[1], our_losses[1], LOSS))
    rows += step(case, theirs, ours, sum_of(their_losses), sum_of(our_losses))
    return [replace(row, what=f"{case.name}: {row.what}") for row in rows]


def sum_of(losses: tuple[Tensor, Tensor]) -> Tensor:
    return losses[0].mean() + losses[1]


def step(case: Case, theirs: nn.Module, ours: sit.SiT, their_loss: Tensor, our_loss: Tensor) -> list[Row]:
    """One step of both from the same parameters."""
    recipe = RECIPES["repa"]
    before = {name: value.detach().clone() for name, value in ours.named_parameters()}
    their_ema, our_ema = copy.deepcopy(theirs).requires_grad_(False), Ema(ours, DECAY)
    numbers: dict[str, Any] = {"lr": recipe.lr, "betas": recipe.betas, "weight_decay": recipe.weight_decay}
    norms = []
    for model, loss, fused in ((theirs, their_loss, False), (ours, our_loss, True)):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=fused, **numbers)
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm))
        optimizer.step()
    case.update_ema(their_ema, theirs, decay=DECAY)
    our_ema.update(ours)
    parameters = dict(theirs.named_parameters())
    averages = dict(their_ema.named_parameters())
    return [
        compared("gradient norm before clipping", norms[0], norms[1], LOSS * float(norms[0])),
        Row("step, parameters", largest(parameters, dict(ours.named_parameters())), STEP, moved(parameters, before)),
        Row("step, averages", largest(averages, our_ema.state_dict()), STEP, moved(averages, before)),
    ]


def small(name: str, depth: int, **options: Any) -> ModelSpec:
    spec = model_spec(name, 32, 4, 10, **options)
    return replace(spec, depth=depth, align_depth=depth // 2)


def sit_case(code: SiT, depth: int, learn_sigma: bool) -> Case:
    spec = small("sit-s/2", depth, learn_sigma=learn_sigma)
    transport = code.transport.create_transport("Linear", "velocity")

    def loss(model: nn.Module, fixed: Fixed) -> tuple[Tensor, Tensor]:
        with drawn(code.transport.transport, "th", rand=1 - fixed.t, randn_like=fixed.noise):
            return transport.training_losses(model, fixed.latents, {"y": fixed.labels})["loss"], torch.zeros(())

    model = code.models.SiT(**shape(spec), learn_sigma=learn_sigma)
    name = "SiT" if learn_sigma else "SiT, no variance"
    return Case(name, model, spec, loss, code.update_ema, reverse_time=True)


def repa_case(code: Repa, depth: int) -> Case:
    spec = small("sit-s/2", depth, align_dim=768)
    silo = code.loss.SILoss()

    def loss(model: nn.Module, fixed: Fixed) -> tuple[Tensor, Tensor]:
        with drawn(code.loss, "torch", rand=fixed.t.view(-1, 1, 1, 1), randn_like=fixed.noise):
            denoising, alignment = silo(model, fixed.latents, {"y": fixed.labels}, zs=[fixed.tokens])
        return denoising, alignment.mean() * REPA_WEIGHT

    return Case("REPA", code.model(spec), spec, loss, code.train.update_ema)


def dit_case(code: DiT, depth: int, learn_sigma: bool) -> Case:
    spec = small("dit-s/2", depth, learn_sigma=learn_sigma)
    diffusion = code.diffusion.create_diffusion("", learn_sigma=learn_sigma)

    def loss(model: nn.Module, fixed: Fixed) -> tuple[Tensor, Tensor]:
        steps = (fixed.t * STEPS).long()
        terms = diffusion.training_losses(model, fixed.latents, steps, {"y": fixed.labels}, noise=fixed.noise)
        return terms["mse" if learn_sigma else "loss"], torch.zeros(())

    model = code.models.DiT(**shape(spec), learn_sigma=learn_sigma)
    return Case("DiT, term `mse`" if learn_sigma else "DiT, no variance", model, spec, loss, code.update_ema)


def own_step(code: Repa, folder: Path, model: str = "sit-s/2") -> list[Row]:
    """`d2c train`'s step as it runs against REPA's."""
    recipe = replace(RECIPES["repa"], batch_size=BATCH, class_dropout=0.5)
    ours = trainer(write(folder / "artifact", 2 * BATCH), folder / "run", model, recipe, "fp32", "cpu")
    # More would be clipped so far that much is as small as AdamW's epsilon, where rounding decides the step.
    draw_anew(ours.parts.model, gain=0.5)
    ours.parts.ema.load_state_dict(dict(ours.parts.model.named_parameters()))
    theirs = RepaStep(code, code.model(ours.settings.spec))
    for one in (theirs.model, theirs.ema):
        one.load_state_dict(ours.parts.model.state_dict(), strict=True)
    before = {name: value.detach().clone() for name, value in theirs.model.named_parameters()}
    batch = ours.loader.batch(0)
    t, noise, posterior, null = ours.loader.draws(0, Velocity(), recipe.class_dropout)
    drop(theirs.model.y_embedder, null)
    with (
        drawn(code.loss, "torch", rand=t.view(-1, 1, 1, 1), randn_like=noise),
        drawn(code.train, "torch", randn_like=posterior),
    ):
        told = torch.tensor(theirs(batch.raw.float().flatten(1, 2), batch.labels, batch.tokens))
    found = ours.step(0)
    parameters, averages = dict(theirs.model.named_parameters()), dict(theirs.ema.named_parameters())
    mine, averages_of_mine = dict(ours.parts.model.named_parameters()), ours.parts.ema.state_dict()
    rows = [
        compared("loss", told[0], found[0], LOSS),
        compared("loss, alignment with its weight", told[1], found[1], LOSS),
        compared("gradient norm before clipping", told[2], found[2], LOSS * float(told[2])),
        Row("parameters", largest(parameters, mine), STEP, moved(parameters, before)),
        Row("averages", largest(averages, averages_of_mine), STEP, moved(averages, before)),
    ]
    return [replace(row, what=f"`d2c train`'s own step: {row.what}") for row in rows]


def samplers(sit_folder: Path, repa_folder: Path) -> list[list[str]]:
    """Rows of parity_samplers.py, where there is one: what, steps, largest difference (or why none), bar, judgement."""
    if importlib.util.find_spec("parity_samplers") is None:
        return []
    import parity_samplers

    found = []
    for what, steps, difference, bar in parity_samplers.rows(sit_folder, repa_folder):
        try:
            judgement = "met" if float(difference) <= float(bar) else MISSED
        except ValueError:
            judgement = "not compared"
        found.append([what, steps, difference, bar, judgement])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sit", type=Path, required=True, help="a clone of github.com/willisma/SiT")
    parser.add_argument("--repa", type=Path, required=True, help="a clone of github.com/sihyun-yu/REPA")
    parser.add_argument("--dit", type=Path, help="a clone of github.com/facebookresearch/DiT")
    parser.add_argument("--depth", type=int, default=4)
    options = parser.parse_args()
    folders = {"SiT": options.sit, "REPA": options.repa, "DiT": options.dit}
    folders = {name: folder for name, folder in folders.items() if folder}
    for folder in folders.values():
        if not (folder / "train.py").is_file():
            parser.error(f"{folder} is not a clone of the official code: it has no train.py")
    torch.set_num_threads(1)
    sit_code, repa_code = SiT.load(options.sit), Repa.load(options.repa)
    cases = [sit_case(sit_code, options.depth, kind) for kind in (True, False)]
    cases.append(repa_case(repa_code, options.depth))
    if options.dit:
        dit_code = DiT.load(options.dit)
        cases += [dit_case(dit_code, options.depth, kind) for kind in (True, False)]
    rows = []
    for case in cases:
        note(case.name)
        rows += check(case)
    note("d2c train's own step")
    with tempfile.TemporaryDirectory() as folder:
        rows += own_step(repa_code, Path(folder))
    clones = ", ".join(f"{name} (commit {commit(folder)})" for name, folder in folders.items())
    print(
        TEXT.format(clones=clones, depth=options.depth, batch=BATCH, decay=DECAY, patched=PATCHED, loss=f"{LOSS:.0e}")
    )
    print(machine(PACKAGES) + "\n\n## Models, losses and steps\n")
    header = ["what", "largest difference", "size", "bar", ""]
    print(table(header, [row.shown() for row in rows]))
    sampled = samplers(options.sit, options.repa)
    if sampled:
        print("\n## Samplers\n\n" + table(["what", "steps", "largest difference", "bar", ""], sampled))
    return 0 if all(row.met for row in rows) and not any(row[-1] == MISSED for row in sampled) else 1


if __name__ == "__main__":
    sys.exit(main())
