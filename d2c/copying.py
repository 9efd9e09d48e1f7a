"""Whether generated images are copies: nearer to what was trained on than real unseen images are, and by how much.

A distance alone would accuse every blurred image, which is near to everything. So each image is asked whether it is
nearer to a training image than to a real image that nobody trained on, and by how much; real unseen images, asked the
same, say what is normal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from scipy import stats

from d2c.errors import D2CError
from d2c.neighbours import nearest_either

Array: TypeAlias = np.ndarray[Any, Any]

QUANTILE = 0.01
"""Share of real unseen images that count as copies: what chance, and near duplicates in the data, bring about."""
TIMES, CHANCE = 3, 0.001
RULE = (
    "An image's closeness is d(train) / (d(train) + d(unseen)), each the distance to the nearest image in either "
    f"orientation; it counts as a copy at or below the {QUANTILE:.0%} quantile of real unseen images' own closeness "
    "(each without itself; one that equals a training image is left out). Flagged: at least "
    f"{TIMES} times the rate of the unseen images, and Fisher's exact test, one-sided, below {CHANCE}, in pixels or in "
    "features."
)


@dataclass(frozen=True)
class CopyRate:
    """Share of generated images that count as copies, and who copies whom.

    ``interval``: Wilson's, 95 %. ``distance``, ``index`` and ``flipped`` [n] belong to the generated images: the
    nearest training image and whether it was the mirrored generated image that came so near; ``closeness`` [n] and
    ``threshold``: see `RULE`.
    """

    rate: float
    interval: tuple[float, float]
    held_out_rate: float
    threshold: float
    flagged: bool
    closeness: Array
    distance: Array
    index: Array
    flipped: Array

    def closest(self, count: int) -> Array:
        """Indices of the ``count`` generated images that most look like copies, the worst first."""
        return np.lexsort((self.distance, self.closeness))[:count]


def copy_rate(
    generated: Array,
    train: Array,
    held_out: Array,
    *,
    flipped_generated: Array | None = None,
    flipped_held_out: Array | None = None,
) -> CopyRate:
    """Copying by `RULE`, of images as vectors: ``generated`` [n, d], ``train`` [t, d], ``held_out`` [h, d].

    The flipped ones are the mirrored images; without them one orientation is looked at.

    Raises:
        D2CError: a set is empty, fewer than two held-out images are no training images, or the widths differ.
    """
    if (flipped_generated is None) != (flipped_held_out is None):
        raise ValueError("give both flipped sets or none: a threshold from one orientation does not fit two")
    other = generated if flipped_generated is None else flipped_generated
    other_held_out = held_out if flipped_held_out is None else flipped_held_out
    distance, index, flipped = nearest_either(generated, other, train)
    apart = nearest_either(held_out, other_held_out, train)[0]
    # A picture that is in both would excuse its own copies.
    unseen = apart > 0
    if unseen.sum() < 2:
        raise D2CError(
            "the images to tell copies by are themselves training images",
            found=f"{unseen.sum()} of {len(unseen)} differ from all of them",
            hint="name real images that nothing was trained on with --held-out",
        )
    apart, held_out, other_held_out = apart[unseen], held_out[unseen], other_held_out[unseen]
    usual = _closeness(apart, nearest_either(held_out, other_held_out, held_out, but_itself=True)[0])
    closeness = _closeness(distance, nearest_either(generated, other, held_out)[0])
    threshold = float(np.quantile(usual, QUANTILE, method="lower"))
    copies, of_them = int(np.count_nonzero(closeness <= threshold)), int(np.count_nonzero(usual <= threshold))
    rate, usual_rate = copies / len(closeness), of_them / len(usual)
    table = [[copies, len(closeness) - copies], [of_them, len(usual) - of_them]]
    unlikely = stats.fisher_exact(table, alternative="greater")[1] < CHANCE
    return CopyRate(
        rate=rate,
        interval=wilson(copies, len(closeness)),
        held_out_rate=usual_rate,
        threshold=threshold,
        flagged=bool(rate >= TIMES * usual_rate and unlikely),
        closeness=closeness,
        distance=distance,
        index=index,
        flipped=flipped,
    )


def wilson(hits: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927): fit for shares near 0 and few images."""
    z = 1.959964
    share, extra = hits / trials, z * z / trials
    middle = (share + extra / 2) / (1 + extra)
    reach = z * float(np.sqrt(share * (1 - share) / trials + extra / (4 * trials))) / (1 + extra)
    return max(0.0, middle - reach), min(1.0, middle + reach)


def _closeness(train: Array, unseen: Array) -> Array:
    """[n] in [0, 1]: 0 for a copy of a training image, 1/2 where a training and an unseen image are as near."""
    both = train + unseen
    share: Array = np.divide(train, both, out=np.full(len(both), 0.5), where=both > 0)
    return share
