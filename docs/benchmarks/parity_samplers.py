"""Our samplers beside those of the official SiT and REPA code, on one random model, from the same noise.

The clones' code is imported as it is, and so are its models; ours is read from the official model's file. What they
draw is replaced by what our images draw, so that both see one noise. The largest absolute difference of any latent
value is what rounding leaves: SiT keeps its state in float32 (its rows are also measured with a float64 state around
the same model), REPA and we in float64.

    python docs/benchmarks/parity_samplers.py --sit SiT --repa REPA

SiT's ODE samplers need torchdiffeq; its rows are left open where that is not installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from d2c import runtime
from d2c.sampling import ImageNoise, SamplerConfig, noise_for, sample
from d2c.scorers import Denoiser, load_denoiser

BAR = "1e-4"
SHAPE, SEEDS, LABELS = (4, 8, 8), [11, 12, 13], [3, 207, 999]
SIZE = {"input_size": 8, "hidden_size": 96, "depth": 2, "num_heads": 3, "num_classes": 1000}
NULL = 1000
Model = Callable[..., Tensor]


def rows(sit: Path, repa: Path) -> list[list[str]]:
    """What was compared, steps, the largest absolute difference, the bar; for clones of SiT and REPA."""
    return [*_repa(repa), *_sit(sit)]


def _repa(clone: Path) -> list[list[str]]:
    theirs: Any = _random(
        _module(clone / "models" / "sit.py").SiT, decoder_hidden_size=96, encoder_depth=1, qk_norm=False
    )
    ours, samplers, found = _read(theirs, "repa.pt"), _module(clone / "samplers.py"), []
    labels = torch.tensor(LABELS)
    for name, method, steps, scale, interval in (
        ("Euler", "euler", 50, 1.0, (0.0, 1.0)),
        ("Euler, guided 1.8 on 0 to 0.7", "euler", 50, 1.8, (0.0, 0.7)),
        ("Euler-Maruyama", "sde", 250, 1.0, (0.0, 1.0)),
        ("Euler-Maruyama, guided 1.8 on 0 to 0.7", "sde", 250, 1.8, (0.0, 0.7)),
    ):
        draw = samplers.euler_sampler if method == "euler" else samplers.euler_maruyama_sampler
        options = {"num_steps": steps, "cfg_scale": scale, "guidance_low": interval[0], "guidance_high": interval[1]}
        noise = _noise(steps)
        with mock.patch.object(torch, "randn_like", lambda like, noise=noise: next(noise).to(like)):
            want = draw(theirs, next(noise), labels, **options)
        config = SamplerConfig(method=method, steps=steps, guidance=scale, guidance_interval=interval)
        found.append([f"REPA: {name}", str(steps), _difference(ours, config, want), BAR])
    return found


def _sit(clone: Path) -> list[list[str]]:
    theirs: Any = _random(_module(clone / "models.py").SiT)
    ours = _read(theirs, "sit.pt")
    with _torchdiffeq() as installed:
        transport = _module(clone / "transport" / "__init__.py", "transport")
        sampler = transport.Sampler(transport.create_transport())
        found = []
        for name, method, steps, scale, draw in (
            # Theirs counts the points of the grid, ours the steps between them.
            ("Euler", "euler", 50, 1.0, lambda: sampler.sample_ode(sampling_method="euler", num_steps=51)),
            ("Euler, guided 4", "euler", 50, 4.0, lambda: sampler.sample_ode(sampling_method="euler", num_steps=51)),
            ("Heun", "heun", 50, 1.0, lambda: sampler.sample_ode(sampling_method="heun2", num_steps=51)),
            ("Heun, guided 4", "heun", 50, 4.0, lambda: sampler.sample_ode(sampling_method="heun2", num_steps=51)),
            ("dopri5 at 1e-6", "dopri5", 0, 1.0, lambda: sampler.sample_ode(atol=1e-6, rtol=1e-6, num_steps=2)),
            ("SDE, sigma", "sde", 250, 1.0, lambda: sampler.sample_sde(diffusion_form="sigma")),
            ("SDE, sigma, guided 4", "sde", 250, 4.0, lambda: sampler.sample_sde(diffusion_form="sigma")),
        ):
            given: dict[str, Any] = {"steps": steps} if steps else {"atol": 1e-6, "rtol": 1e-6}
            config = SamplerConfig(method=method, guidance=scale, guidance_channels=3, **given)
            for state in (torch.float32, torch.float64):
                what = f"SiT: {name}, state in {str(state).removeprefix('torch.')}"
                difference = "torchdiffeq is not installed"
                if installed or method == "sde":
                    difference = _difference(ours, config, _drawn_by_sit(theirs, draw(), scale, state))
                found.append([what, str(steps or "own"), difference, BAR])
    return found


def _drawn_by_sit(model: Any, draw: Callable[..., Any], scale: float, state: torch.dtype) -> Tensor:
    """As SiT's sample_ddp.py: with guidance every image stands there twice, and the first half is the result."""
    copies = 1 if scale == 1 else 2
    labels, noise = torch.tensor(LABELS), _noise(250)
    given: dict[str, Any] = {"y": labels}
    if copies == 2:
        given = {"y": torch.cat([labels, torch.full_like(labels, NULL)]), "cfg_scale": scale}

    def field(x: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        forward = model.forward_with_cfg if copies == 2 else model.forward
        predicted: Tensor = forward(x.float(), t.float(), **conditions)
        return predicted.to(state)

    def randn(*_: Any) -> Tensor:
        return next(noise).repeat(copies, 1, 1, 1)

    with torch.no_grad(), mock.patch.object(torch, "randn", randn):
        last: Tensor = draw(randn().to(state), field, **given)[-1]
    return last[: len(labels)]


def _noise(steps: int) -> Iterator[Tensor]:
    """The starting noise and that of every step, drawn before anything is patched."""
    noise = ImageNoise(SEEDS, SHAPE)
    return iter([noise.draw() for _ in range(steps)])


def _difference(denoiser: Denoiser, config: SamplerConfig, want: Tensor) -> str:
    got = sample(denoiser, denoiser.objective, SHAPE, torch.tensor(LABELS), SEEDS, config)
    assert (got - noise_for(SEEDS, SHAPE)).abs().max() > 0.1, "a model that moves nothing compares nothing"
    return f"{(got.double() - want.double()).abs().max().item():.1e}"


def _random(build: Any, **options: Any) -> Any:
    model = build(**SIZE, **options).eval().requires_grad_(False)
    generator = runtime.generator("parity")
    for name, parameter in model.named_parameters():
        if name != "pos_embed":
            parameter.normal_(std=0.05, generator=generator)
    return model


def _read(model: Any, name: str) -> Denoiser:
    """The model through a file in its own layout, as users have it."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"ema": model.state_dict()}, Path(folder) / name)
        return load_denoiser(Path(folder) / name, objective="velocity")


def _module(path: Path, name: str | None = None) -> types.ModuleType:
    """A file of a clone as a module, or a folder of one as a package named ``name``."""
    spec = importlib.util.spec_from_file_location(name or f"clone_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if name:
        sys.modules[name] = module  # relative imports look here
    spec.loader.exec_module(module)
    return module


@contextmanager
def _torchdiffeq() -> Iterator[bool]:
    """Whether torchdiffeq is there; where it is not, SiT's module can at least be imported."""
    installed = importlib.util.find_spec("torchdiffeq") is not None
    stub = types.ModuleType("torchdiffeq")
    stub.odeint = None  # type: ignore[attr-defined]
    with mock.patch.dict(sys.modules, {} if installed else {"torchdiffeq": stub}):
        yield installed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sit", type=Path, required=True, help="a clone of willisma/SiT")
    parser.add_argument("--repa", type=Path, required=True, help="a clone of sihyun-yu/REPA")
    given = parser.parse_args()
    print("| what | steps | largest absolute difference | bar |\n|---|---|---|---|")
    for row in rows(given.sit, given.repa):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
