"""How much arithmetic a model is, counted as torch counts it: matrix products alone, two operations each."""

from __future__ import annotations

from d2c.conditioning import FREQUENCIES
from d2c.sit import ModelSpec


def forward_flops(spec: ModelSpec) -> int:
    """Floating-point operations of one image's forward pass, without the projector that only training runs.

    Half of this is the "Gflops" of DiT's Table 1, which counts a multiplication with its addition as one.
    """
    width, tokens, pixels = spec.width, spec.tokens, spec.patch**2
    each_token = pixels * spec.channels * width + width * pixels * spec.out_channels
    attention = 4 * width**2 + 2 * tokens * width  # q, k, v and the output; scores and mixing
    mlp = 8 * width**2
    each_image = FREQUENCIES * width + width**2 + 2 * width**2  # time; modulation of the last layer
    each_image += spec.depth * 6 * width**2  # modulation of the blocks
    if spec.text_dim is not None:
        each_image += spec.text_tokens * spec.text_dim * width + 2 * width**2
    return 2 * (tokens * (each_token + spec.depth * (attention + mlp)) + each_image)
