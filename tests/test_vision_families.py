"""Every family of encoders that the documentation names, in miniature, against its library's own forward.

The architectures are timm's and open_clip's own, made shallow and narrow, with random weights; what a real checkpoint
differs in is its numbers alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from d2c.errors import D2CError
from d2c.vision import VisionEncoder, open_vision

CPU = torch.device("cpu")
NO_LABELS = np.zeros(2, np.int32)
SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3}
FAMILIES = {
    "DINOv2": "vit_small_patch14_dinov2",
    "DINOv2 with registers": "vit_small_patch14_reg4_dinov2",
    "DINOv3": "vit_small_patch16_dinov3",
    "DINOv3 with its biases": "vit_small_patch16_dinov3_qkvb",
    "MAE": "vit_base_patch16_224.mae",
    "SigLIP2": "vit_base_patch16_siglip_256.v2_webli",
    "SigLIP2 without its pooling": "vit_base_patch16_siglip_gap_256.v2_webli",
    "CLIP": "vit_base_patch16_clip_224",
    "PE-Spatial": "vit_pe_spatial_base_patch16_512",
    "PE-Core": "vit_pe_core_base_patch16_224",
}
"""Their class and register tokens, positions, norms and pooling all differ."""
GRID = 4


def shrink(monkeypatch: pytest.MonkeyPatch, **shape: Any) -> None:
    """Make every architecture of timm two blocks deep and 48 wide."""
    create = timm.create_model

    def small(name: str, **options: Any) -> Any:
        return create(name, **SMALL, **shape, **options)

    monkeypatch.setattr(timm, "create_model", small)


def randomised(model: torch.nn.Module) -> dict[str, Tensor]:
    """Its state with every tensor drawn anew: what starts as zeros or ones would hide a mistake."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(t.shape, generator=generator) * 0.2 for name, t in model.state_dict().items()}


def picture(side: int) -> NDArray[np.uint8]:
    """Two images that no mirroring, turning or transposing maps onto themselves."""
    return np.random.default_rng(0).integers(0, 256, (2, side, side, 3), np.uint8)


def prepared(images: NDArray[np.uint8], mean: Any, std: Any, side: int) -> Tensor:
    values = (torch.from_numpy(images) / 255 - torch.tensor(mean)) / torch.tensor(std)
    return F.interpolate(values.permute(0, 3, 1, 2), side, mode="bicubic")


def assert_stored(tokens: NDArray[np.float16], expected: Tensor) -> None:
    """Equal to 1e-5 before they were rounded to half precision."""
    assert tokens.shape == expected.shape
    assert expected.std() > 0.01
    np.testing.assert_allclose(tokens.astype(np.float64), expected.double().numpy(), atol=1e-5, rtol=2**-11)


def assert_in_place(encoder: VisionEncoder, grid: int) -> None:
    """A change in one cell of the image moves the token of that cell most: row-major, the top left first."""
    images = picture(grid * 16)
    before = encoder.encode(images, NO_LABELS).astype(np.float32)
    for row, column in ((0, grid - 1), (grid - 1, 0), (1, 2)):
        changed = images.copy()
        changed[:, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16] ^= 255
        moved = np.linalg.norm(encoder.encode(changed, NO_LABELS) - before, axis=-1)[:, -(grid**2) :]
        assert divmod(int(moved[0].argmax()), grid) == (row, column)


@pytest.mark.parametrize("name", FAMILIES.values(), ids=FAMILIES)
def test_a_family_of_timm_gives_the_librarys_own_patch_tokens(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch)
    model: Any = timm.create_model(name)
    save_file(state := randomised(model), tmp_path / "weights.safetensors")
    encoder = open_vision(f"timm:{name}:{tmp_path / 'weights.safetensors'}", GRID, CPU)
    side = GRID * model.patch_embed.patch_size[0]
    images = picture(64)

    model.load_state_dict(state)
    model.eval().set_input_size(img_size=(side, side))
    config = model.pretrained_cfg
    with torch.inference_mode():
        everything = model.forward_features(prepared(images, config["mean"], config["std"], side))
    tokens, patches = encoder.encode(images, NO_LABELS), everything[:, -GRID * GRID :]
    own = getattr(model, "cls_token", None) is not None
    assert encoder.info.class_token == own
    assert_stored(tokens, torch.cat([everything[:, :1], patches], 1) if own else patches)
    assert encoder.info.input_px == side
    assert encoder.info.dim == 48
    assert_in_place(encoder, GRID)


def save_open_clip(folder: Path, name: str, vision: dict[str, Any]) -> Any:
    """A model of open_clip with the image tower ``vision``, its random weights in ``folder``."""
    import open_clip

    text = {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    config = {"embed_dim": 24, "vision_cfg": {"image_size": 64, **vision}, "text_cfg": text}
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{name}.json")
    model: Any = open_clip.create_model(name)
    model.load_state_dict(state := randomised(model))
    save_file(state, folder / "open_clip.safetensors")
    return model.eval()


PLAIN = {"layers": 2, "width": 64, "patch_size": 16}


@pytest.mark.parametrize(
    "vision",
    [PLAIN, {**PLAIN, "no_ln_pre": True, "pool_type": "avg", "pos_embed_type": "sin_cos_2d"}],
    ids=["CLIP", "CLIPA"],
)
def test_a_tower_of_open_clip_gives_the_librarys_own_patch_tokens(vision: dict[str, Any], tmp_path: Path) -> None:
    import open_clip

    visual = save_open_clip(tmp_path, "tiny-tower", vision).visual
    encoder = open_vision(f"open_clip:tiny-tower:{tmp_path / 'open_clip.safetensors'}", GRID, CPU)
    images = picture(80)
    values = prepared(images, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD, 64)
    everything = []
    visual.ln_post.register_forward_hook(lambda _module, _inputs, output: everything.append(output))
    with torch.inference_mode():
        visual(values)
    assert_stored(encoder.encode(images, NO_LABELS), everything[0])
    assert_in_place(encoder, GRID)


def test_open_clips_siglip_goes_through_timm_with_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch)
    tower = "vit_base_patch16_siglip_256"
    model = save_open_clip(tmp_path, "tiny-siglip", {"timm_model_name": tower, "timm_pool": "map", "timm_proj": "none"})
    file = tmp_path / "open_clip.safetensors"
    with pytest.raises(D2CError, match=f"--vision timm:{tower}:FILE"):
        open_vision(f"open_clip:tiny-siglip:{file}", GRID, CPU)

    encoder, images = open_vision(f"timm:{tower}:{file}", 16, CPU), picture(256)
    with torch.inference_mode():
        expected = model.visual.trunk.forward_features(prepared(images, (0.5,) * 3, (0.5,) * 3, 256))
    assert_stored(encoder.encode(images, NO_LABELS), expected)


@pytest.mark.parametrize(
    "name", ["vit_small_r26_s32_224", "vit_base_mci_224", "samvit_base_patch16", "swin_tiny_patch4_window7_224"]
)
def test_a_model_whose_tokens_make_no_such_grid_is_refused_before_it_is_loaded(name: str, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "any.safetensors")
    with pytest.raises(D2CError, match="no grid of 4 x 4 patch tokens"):
        open_vision(f"timm:{name}:{tmp_path / 'any.safetensors'}", GRID, CPU)
