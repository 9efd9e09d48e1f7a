"""Token codecs: what is stored, what comes back, and what it cost, on tokens of a real network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coded_fixture import TOKENS, agree, cost_of, write_coded
from formats_fixture import FIELDS
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from formats import FormatError, codecs, open_artifact, verify
from formats.repack import Changes, repack
from formats.schema import INT4, INT8, RMS, ClassRow
from formats.shards import Sample
from formats.writer import ArtifactWriter

CODED = (INT8, INT4)
DRAWN = arrays.arrays(
    np.float16, (3, 5, 8), elements=st.floats(-60000, 60000, width=16, allow_subnormal=False), fill=st.just(0)
)


def round_trip(codec: str, tokens: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    rms = codecs.channel_rms([tokens])
    return codecs.decode(codec, *codecs.encode(codec, tokens, rms), rms)


@settings(deadline=None)
@given(DRAWN)
def test_int8_is_off_by_half_a_step_of_its_token_at_most(tokens: np.ndarray[Any, Any]) -> None:
    rms = codecs.channel_rms([tokens])
    codes, scale = codecs.encode(INT8, tokens, rms)
    assert np.abs(codes.astype(int)).max(initial=0) <= 127
    step = np.abs(np.divide(tokens, rms, where=rms > 0, out=np.zeros(tokens.shape, "f4"))).max(-1, keepdims=True) / 127
    # Half a step, and what float16 rounds the scale by: 2^-11 of the largest code. Tokens that are 500 times smaller
    # than the average have subnormal scales.
    error = np.abs(codecs.decode(INT8, codes, scale, rms) - tokens.astype("f4"))
    bound = (0.5 + 127 * 2**-10) * step * rms + 1e-6 * np.abs(tokens)
    assert ((error <= bound) | (scale < 2**-14)[..., None]).all()


@settings(deadline=None)
@given(DRAWN, st.sampled_from(CODED))
def test_what_comes_back_is_finite_and_as_declared(tokens: np.ndarray[Any, Any], codec: str) -> None:
    rms = codecs.channel_rms([tokens])
    codes, scale = codecs.encode(codec, tokens, rms)
    column, scales = codecs.columns("t", codec, tokens.shape[1:])
    assert (codes.dtype, codes.shape[1:]) == (column.numpy, column.shape)
    assert (scale.dtype, scale.shape[1:]) == (scales.numpy, scales.shape)
    decoded = codecs.decode(codec, codes, scale, rms)
    assert (decoded.dtype, decoded.shape[1:]) == (np.float32, column.values_shape)
    assert np.isfinite(decoded).all()
    np.testing.assert_array_equal(decoded[..., rms == 0], 0)
    np.testing.assert_array_equal(decoded[~tokens.any(-1)], 0)


def test_int4_packs_the_even_channel_into_the_low_nibble() -> None:
    codes = np.array([[[0x0F, 0x80]]], np.uint8)
    decoded = codecs.decode(INT4, codes, np.array([[0.5]], "f2"), np.array([1, 2, 4, 8], "f4"))
    np.testing.assert_array_equal(decoded, [[[7.5, -15, -30, 4]]])


def test_int8_is_codes_times_scale_times_rms() -> None:
    codes = np.array([[[-127, 0, 3]]], np.int8)
    decoded = codecs.decode(INT8, codes, np.array([[0.5]], "f2"), np.array([1, 2, 4], "f4"))
    np.testing.assert_array_equal(decoded, [[[-63.5, 0, 6]]])


def test_an_outlier_channel_costs_the_others_nothing() -> None:
    tokens = np.random.default_rng(0).standard_normal((4, 64, 96)).astype("f2")
    plain = codecs.cosines(tokens, round_trip(INT8, tokens))
    tokens[..., 7] *= 1000
    loud = codecs.cosines(np.delete(tokens, 7, -1), np.delete(round_trip(INT8, tokens), 7, -1))
    assert plain.min() > 0.9999
    assert loud.min() > 0.9999


def test_tokens_of_a_real_network_keep_their_direction_at_half_the_bytes() -> None:
    import timm
    import torch

    torch.manual_seed(0)
    model: Any = timm.create_model("vit_base_patch16_224", img_size=256).eval()
    image = torch.nn.functional.interpolate(torch.randn(2, 3, 16, 16), 256, mode="bicubic")
    with torch.no_grad():
        tokens = model.forward_features(image)[:, model.num_prefix_tokens :].numpy().astype("f2")
    assert tokens.shape[1:] == (256, 768)
    assert sum(column.nbytes for column in codecs.columns("t", INT8, (256, 768))) <= 197_200
    assert sum(column.nbytes for column in codecs.columns("t", INT4, (256, 768))) <= 98_900
    eight, four = (cost_of(tokens, round_trip(codec, tokens)) for codec in CODED)
    assert eight["tokens"] == 512
    assert eight["mean"] >= 0.9999
    assert eight["p01"] >= 0.9998
    assert four["mean"] >= 0.99


def test_a_shape_that_a_codec_cannot_hold_is_refused() -> None:
    with pytest.raises(FormatError, match="cannot hold this shape"):
        codecs.columns("t", INT4, (4, 7))
    with pytest.raises(FormatError, match="unknown codec"):
        codecs.columns("t", "i2-magic", (4, 8))


@pytest.mark.parametrize("codec", CODED)
@pytest.mark.parametrize("container", ["tar", "parquet"])
def test_an_artifact_gives_decoded_tokens_and_says_what_they_lost(tmp_path: Path, codec: str, container: str) -> None:
    path = write_coded(tmp_path / "a", codec, container)
    assert verify(path, "deep").ok
    artifact = open_artifact(path)
    expected = cost_of(TOKENS, artifact.values("tokens", range(20)))
    column = next(column for column in artifact.columns if column.name == "tokens")
    assert agree(column.fidelity, expected)
    assert f"codec:{codec}" in artifact.manifest["format"]["required_features"]
    sample = artifact.sample(3)
    assert set(sample.arrays) == {"latent", "tokens"}
    np.testing.assert_array_equal(sample.arrays["tokens"], artifact.values("tokens", [3])[0])
    assert artifact.array(3, "tokens").dtype == column.numpy


@pytest.mark.parametrize("codec", CODED)
def test_content_id_covers_codec_and_rms_but_not_container(tmp_path: Path, codec: str) -> None:
    ids = {
        open_artifact(write_coded(tmp_path / f"{container}{shards}", codec, container, shards)).content_id
        for container, shards in (("tar", 1), ("tar", 3), ("parquet", 2))
    }
    assert len(ids) == 1
    other = open_artifact(write_coded(tmp_path / "other", codec, measured=slice(5)))
    assert other.content_id not in ids


def test_a_changed_rms_is_found_and_never_used(tmp_path: Path) -> None:
    path = write_coded(tmp_path / "a", INT8)
    file = path / "codec/tokens_rms.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert {fault.path for fault in verify(path).faults} == {"codec/tokens_rms.npy"}
    with pytest.raises(FormatError, match="codec array changed"):
        open_artifact(path).sample(0)


def test_a_resumed_writer_keeps_the_rms_that_its_shards_were_made_with(tmp_path: Path) -> None:
    columns = codecs.columns("tokens", INT8, (6, 8))
    first = np.arange(8, dtype="f4")
    with ArtifactWriter(tmp_path / "a", "tar", columns, 1, "digest") as writer:
        writer.codec_array("tokens", RMS, lambda: first)
    with ArtifactWriter(tmp_path / "a", "tar", columns, 1, "digest") as writer:
        np.testing.assert_array_equal(writer.codec_array("tokens", RMS, lambda: first + 1), first)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=200), st.integers(1, 5))
def test_what_was_lost_is_gathered_in_pieces_and_never_promises_too_much(values: list[float], pieces: int) -> None:
    flat = np.array(values, "f4")
    whole = codecs.Fidelity()
    for piece in np.array_split(flat, pieces):
        part = codecs.Fidelity()
        if len(piece):
            part.add(piece)
        whole.merge(codecs.Fidelity.from_dict(json.loads(json.dumps(part.to_dict()))))
    found = whole.summary()
    exact = np.sort(flat)[max(0, int(np.ceil(0.01 * len(flat))) - 1)]
    assert found["tokens"] == len(flat)
    assert found["min"] <= flat.min()
    assert found["min"] <= found["p01"] <= exact + 1e-9
    assert found["p01"] >= exact - 0.011 * (1 - exact) - 2e-6
    assert found["mean"] == pytest.approx(flat.astype(float).mean(), abs=2e-6)


def test_a_channel_that_few_images_use_is_measured_on_all(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).standard_normal((3000, 2, 8)).astype("f2")
    tokens[np.arange(3000) % 7 != 3, :, 3] = 0
    columns = codecs.columns("tokens", "raw", (2, 8))
    with ArtifactWriter(tmp_path / "raw", "parquet", columns, 2, "digest") as writer:
        for shard, rows in enumerate((range(1500), range(1500, 3000))):
            writer.write(shard, [Sample(f"{i:04d}", 0, {"tokens": tokens[i]}, {}) for i in rows])
        writer.finish(FIELDS, [ClassRow(0, "one", "one", "", 3000)], {}, [])
    after = repack(tmp_path / "raw", tmp_path / "coded", Changes(tokens=INT8))
    assert agree(after.columns[0].fidelity, cost_of(tokens, after.values("tokens", range(3000))))
    assert after.columns[0].fidelity["min"] > 0.999  # type: ignore[index]


def test_small_tokens_keep_their_direction() -> None:
    tokens = np.random.default_rng(0).standard_normal((2, 8, 64)).astype("f4")
    tokens[0] *= 1e-5
    assert codecs.cosines(tokens, round_trip(INT8, tokens)).min() > 0.999


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_tokens_that_are_not_finite_are_refused(tmp_path: Path, bad: float) -> None:
    tokens = np.array([[1.0, bad]], "f2")
    with pytest.raises(FormatError, match="NaN or infinity"):
        codecs.channel_rms([tokens])
    with (
        ArtifactWriter(tmp_path / "a", "tar", codecs.columns("t", INT8, (1, 2)), 1, "digest") as writer,
        pytest.raises(FormatError, match="NaN or infinity"),
    ):
        writer.codec_array("t", RMS, lambda: tokens[0].astype("f4"))
