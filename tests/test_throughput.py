"""Helpers that matter on a GPU: on a CPU they change nothing, and what they do is right wherever it can be run."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_scorers import batch, random_model

from d2c.throughput import Coming, compile_blocks, one_behind, padded, pays, to_device

torch.set_num_threads(1)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_blocks_are_compiled_as_one_graph_and_only_for_a_gpu() -> None:
    latents, _, t, labels = batch()
    model = random_model("sit-tiny/2").requires_grad_(False)  # as a scorer is
    want = model(latents, t, labels)
    compile_blocks(model, CPU)
    assert all(block._compiled_call_impl is None for block in model.blocks)
    # The device is only asked for its kind, and `eager` compiles nothing: this runs here, and finds graph breaks.
    compile_blocks(model, CUDA, backend="eager")
    assert all(block._compiled_call_impl is not None for block in model.blocks)
    names = list(model.state_dict())
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(latents, t, labels)
    assert torch.allclose(model(latents, t, labels), want)
    assert torch.allclose(half.float(), want, atol=0.1 * float(want.abs().max()))
    assert names == list(random_model("sit-tiny/2").state_dict())


def test_a_process_may_meet_many_shapes() -> None:
    from torch._dynamo import reset

    reset()
    _, _, t, labels = batch()
    model = random_model("sit-tiny/2").requires_grad_(False)
    compile_blocks(model, CUDA, backend="eager")
    for count in range(1, 13):
        latents = torch.zeros(count, model.spec.channels, model.spec.input_size, model.spec.input_size)
        assert len(model(latents, t[:1].expand(count), labels[:1].expand(count))) == count


def test_compiling_is_for_a_gpu_with_a_lot_to_do() -> None:
    assert pays(CUDA, 8 * 1_281_167)
    assert not pays(CUDA, 1_000)
    assert not pays(CPU, 8 * 1_281_167)


@needs_gpu
def test_a_compiled_model_says_the_same_each_time_and_what_the_plain_one_says_but_for_rounding() -> None:
    latents, _, t, labels = (tensor.to(CUDA) for tensor in batch())
    model = random_model("sit-tiny/2").requires_grad_(False).to(CUDA)
    want = model(latents, t, labels)
    compile_blocks(model, CUDA)
    got = model(latents, t, labels)
    assert torch.equal(model(latents, t, labels), got)
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def test_a_short_batch_is_filled_with_its_last_row_for_a_gpu_alone() -> None:
    rows = torch.arange(6).view(3, 2)
    assert padded(rows, 5, CPU) is rows
    assert padded(rows, 5, CUDA).tolist() == [[0, 1], [2, 3], [4, 5], [4, 5], [4, 5]]
    assert padded(rows, 3, CUDA) is rows


def test_each_item_waits_for_the_next_ones_work_on_a_gpu_alone() -> None:
    started: list[int] = []

    def work() -> Iterator[int]:
        for item in range(3):
            started.append(item)
            yield item

    assert [(item, len(started)) for item in one_behind(work(), CUDA)] == [(0, 2), (1, 3), (2, 3)]
    started.clear()
    assert [(item, len(started)) for item in one_behind(work(), CPU)] == [(0, 1), (1, 2), (2, 3)]
    assert list(one_behind([], CUDA)) == []


def test_values_come_and_go_unchanged() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert np.array_equal(Coming(to_device(values, CPU)).numpy(), values)


def test_values_on_their_way_are_waited_for_on_their_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[Any] = []
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda *stream: recorded.append(stream)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch, "empty", lambda *_, **__: SimpleNamespace(copy_=lambda *_, **__: None))
    Coming(SimpleNamespace(device=torch.device("cuda:1"), shape=(2,), dtype=torch.float32))  # type: ignore[arg-type]
    assert recorded == [("stream of cuda:1",)]


@needs_gpu
def test_values_come_and_go_unchanged_through_a_gpu() -> None:
    values = np.random.default_rng(0).random((1000, 300), dtype=np.float32)
    there = to_device(values, CUDA)
    assert there.device.type == "cuda"
    assert np.array_equal(Coming(there).numpy(), values)
