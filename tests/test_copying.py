"""The copy check: what it must flag, what it must not, and how sure it is."""

from __future__ import annotations

import numpy as np
import pytest
from features_fixture import features

from d2c.copying import copy_rate, wilson
from d2c.errors import D2CError


def test_copy_rate_flags_a_memoriser_and_not_a_good_generator() -> None:
    train, held_out, good = features(0, 400), features(1, 400), features(2, 500)
    picks = np.random.default_rng(3).integers(0, 400, 500)
    memoriser = train[picks] + 0.05 * features(4, 500)

    caught = copy_rate(memoriser, train, held_out)
    assert caught.rate > 0.95
    assert caught.flagged
    assert (caught.index == picks).mean() > 0.99
    assert caught.held_out_rate == pytest.approx(0.01, abs=0.003)
    closest = caught.closest(5)
    assert caught.closeness[closest].tolist() == sorted(caught.closeness)[:5]
    assert caught.interval[0] < caught.rate <= caught.interval[1]

    clean = copy_rate(good, train, held_out)
    assert clean.rate < 0.03
    assert not clean.flagged
    assert clean.threshold == caught.threshold


def test_copy_rate_sees_mirrored_copies_only_when_given_both_orientations() -> None:
    train, held_out = (features(seed, 300, d=36).reshape(-1, 6, 6) for seed in (0, 1))
    copies = train[:200, :, ::-1]
    flat = [x.reshape(len(x), -1) for x in (copies, train, held_out)]
    mirrored = {
        "flipped_generated": train[:200].reshape(200, -1),
        "flipped_held_out": held_out[:, :, ::-1].reshape(300, -1),
    }
    assert copy_rate(*flat).rate < 0.1
    both = copy_rate(*flat, **mirrored)
    assert both.rate == 1
    assert both.flipped.all()
    with pytest.raises(ValueError, match="both"):
        copy_rate(*flat, flipped_generated=mirrored["flipped_generated"])


def test_copies_are_caught_even_where_the_held_out_set_leaks_from_training() -> None:
    train, held_out = features(0, 300), features(1, 300)
    held_out[:30] = train[:30]
    caught = copy_rate(train[:100], train, held_out)
    assert caught.rate == 1
    # What leaked is not unseen: it neither excuses its copies nor moves the threshold.
    clean = copy_rate(train[:100], train, held_out[30:])
    assert (caught.threshold, caught.held_out_rate) == (clean.threshold, clean.held_out_rate)
    noisy = copy_rate(train[:100] + 0.05 * features(2, 100), train, held_out)
    assert noisy.rate > 0.95


def test_unseen_images_that_were_all_trained_on_say_so() -> None:
    train = features(0, 300)
    with pytest.raises(D2CError, match=r"themselves training images(.|\n)*1 of 41(.|\n)*--held-out"):
        copy_rate(features(1, 50), train, np.concatenate([train[:40], features(2, 1)]))


@pytest.mark.parametrize(
    ("copies", "total", "flagged"),
    [
        (40, 500, True),
        (1, 20, False),  # five times the held-out rate, but one image proves nothing
        (80, 10_000, False),  # beyond chance, but not even twice the held-out rate
    ],
)
def test_flag_needs_both_size_and_evidence(copies: int, total: int, flagged: bool) -> None:
    train, held_out, mixed = features(0, 300), features(1, 10_000), features(2, total)
    mixed[:copies] = train[:copies]
    result = copy_rate(mixed, train, held_out)
    assert result.rate > 1.5 * result.held_out_rate
    assert result.flagged is flagged


def test_images_that_are_near_to_everything_are_no_copies() -> None:
    """Blurred images: far nearer to the training images than real ones are, and as near to images never seen."""
    train, held_out = features(0, 400), features(1, 400)
    blurred = 0.1 * features(2, 500)
    apart = copy_rate(blurred, train, held_out)
    assert np.median(apart.distance) < 0.8 * np.median(copy_rate(held_out, train, features(3, 400)).distance)
    assert not apart.flagged
    assert apart.rate < 0.05


def test_the_interval_of_a_share_is_wilsons() -> None:
    # Values of Newcombe (1998), table I: 15 of 148, 0 of 20, 29 of 29.
    for hits, trials, expected in ((15, 148, (0.0624, 0.1605)), (0, 20, (0, 0.1611)), (29, 29, (0.8830, 1))):
        assert wilson(hits, trials) == pytest.approx(expected, abs=1e-4)
