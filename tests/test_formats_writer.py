"""A pack that is killed, repeated, contended or pointed at the wrong place."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from formats_fixture import COLUMNS, FIELDS, contents, finish, make_samples, split, write_artifact, writer

from formats import FormatError, open_artifact, verify
from formats.files import write_json, write_rows
from formats.schema import ClassRow
from formats.writer import ArtifactWriter

PARTS = split(make_samples(), 4)


@pytest.mark.parametrize("container", ["tar", "parquet"])
def test_killed_pack_resumes_by_shard_with_the_same_bytes(tmp_path: Path, container: str) -> None:
    whole = contents(write_artifact(tmp_path / "whole", container, 4))
    out = tmp_path / "out"
    with writer(out, container, 4) as first:
        first.write(2, PARTS[2])
        first.write(0, PARTS[0])
    shard = next((tmp_path / "out.partial/artifact").rglob("train-00000*"))
    shard.with_name(".tmp-1-torn").write_bytes(b"left by a kill")
    with writer(out, container, 4) as second:
        assert second.done_shards() == {0, 2}
        assert second.labels().tolist() == [s.label for i in (0, 2) for s in PARTS[i]]
        for i in (3, 1):
            second.write(i, PARTS[i])
        finish(second)
    assert contents(out) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_shard_damaged_while_unfinished_is_not_done(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with writer(out, shards=4) as made:
        made.write(1, PARTS[1])
        made.write(2, PARTS[2])
        shard = next((tmp_path / "out.partial").rglob("train-00001*"))
        data = bytearray(shard.read_bytes())
        data[700] ^= 1
        shard.write_bytes(data)
        assert made.done_shards() == {2}


def test_failed_write_leaves_the_shard_undone(tmp_path: Path) -> None:
    def broken() -> object:
        yield PARTS[0][0]
        raise OSError("the disk is full")

    with writer(tmp_path / "out", shards=4) as made:
        made.write(0, PARTS[0])
        with pytest.raises(OSError, match="full"):
            made.write(0, broken())  # type: ignore[arg-type]  # a generator of samples that fails
        assert made.done_shards() == set()
        with pytest.raises(FormatError, match="not every shard"):
            finish(made)
    assert not (tmp_path / "out").exists()


def test_changed_config_wipes_the_unfinished_work(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with writer(out, shards=4) as made:
        made.write(0, PARTS[0])
    with ArtifactWriter(out, "tar", COLUMNS, 4, "another digest") as made:
        assert made.done_shards() == set()
    with pytest.raises(FormatError, match="no unfinished artifact of this configuration"):
        ArtifactWriter(out, "tar", COLUMNS, 4, "digest", lock=False)


def test_second_writer_gets_a_clear_error_and_helpers_do_not(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with writer(out, shards=4) as made:
        with pytest.raises(FormatError, match="another process is writing") as caught:
            writer(out, shards=4)
        assert str(os.getpid()) in str(caught.value)
        helper = ArtifactWriter(out, "tar", COLUMNS, 4, "digest", lock=False)
        for shard, part in enumerate(PARTS):
            (helper if shard % 2 else made).write(shard, part)
        with pytest.raises(FormatError, match="holds the lock"):
            finish(helper)
        finish(made)
    assert verify(out, "deep").ok
    writer(out, shards=4).close()


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FormatError, match=r"cannot be locked[\s\S]*flock"):
        writer(tmp_path / "out", shards=4)
    assert len(os.listdir("/proc/self/fd")) == before


def test_lock_dies_with_its_process(tmp_path: Path) -> None:
    code = """
        import sys, time
        from pathlib import Path
        from formats_fixture import make_samples, split, writer
        made = writer(Path(sys.argv[1]), shards=4)
        made.write(0, split(make_samples(), 4)[0])
        print("ready", flush=True)
        time.sleep(60)
    """
    here = Path(__file__).resolve().parent
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "out")]
    path = os.pathsep.join([str(here), str(here.parent)])
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        with pytest.raises(FormatError, match=f"held by process {child.pid}"):
            writer(tmp_path / "out", shards=4)
        child.send_signal(signal.SIGKILL)
    with writer(tmp_path / "out", shards=4) as made:
        assert made.done_shards() == {0}


@pytest.mark.parametrize("name", [".git/HEAD", ".notes", "shards/.keep", "LICENSE"])
def test_hidden_files_beside_an_artifact_are_not_deleted_with_it(tmp_path: Path, name: str) -> None:
    path = write_artifact(tmp_path / "a")
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_text("mine")
    with pytest.raises(FormatError, match=name):
        write_artifact(tmp_path / "a", "parquet")
    assert (path / name).read_text() == "mine"


def test_finished_artifact_is_replaced_only_by_a_finished_one(tmp_path: Path) -> None:
    out = write_artifact(tmp_path / "out")
    before = open_artifact(out).content_id
    with writer(out, shards=4) as made:
        made.write(0, PARTS[0])
        assert open_artifact(out).content_id == before
        for shard in (1, 2, 3):
            made.write(shard, PARTS[shard])
        finish(made, latent={**FIELDS["latent"], "scale": 2.0})
    assert open_artifact(out).content_id != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_kill_between_the_two_renames_of_a_swap_is_undone(tmp_path: Path) -> None:
    out = write_artifact(tmp_path / "out")
    before = contents(out)
    out.rename(tmp_path / ".tmp-1-out.replaced")
    (tmp_path / ".tmp-1-out.partial.deleted").mkdir()
    writer(out).close()
    assert contents(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.partial"]


def test_anything_else_at_out_is_refused_and_kept(tmp_path: Path) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    file.write_text("more")
    mixed = write_artifact(tmp_path / "mixed")
    (mixed / "notes.txt").write_text("mine")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "manifest.json").write_text('{"name": "a web app"}')
    for out in (folder, file, mixed, foreign):
        with pytest.raises(FormatError, match="something else"):
            writer(out)
    partial = tmp_path / "new.partial"
    partial.mkdir()
    (partial / "mine").write_text("x")
    with pytest.raises(FormatError, match="not an unfinished artifact"):
        writer(tmp_path / "new")
    assert (folder / "thesis.tex").exists()
    assert (mixed / "notes.txt").exists()
    empty = tmp_path / "empty"
    empty.mkdir()
    assert open_artifact(write_artifact(empty))
    assert not list(tmp_path.glob("*.lock"))


def test_finish_names_what_does_not_fit(tmp_path: Path) -> None:
    classes = [ClassRow(i, "", "", "", 5) for i in range(4)]
    with writer(tmp_path / "out", shards=4) as made:
        for shard, part in enumerate(PARTS):
            made.write(shard, part)
        with pytest.raises(FormatError, match="licence"):
            made.finish({k: v for k, v in FIELDS.items() if k != "licence"}, classes, {}, [])
        with pytest.raises(FormatError, match="content_id"):
            made.finish({**FIELDS, "content_id": "mine"}, classes, {}, [])
        with pytest.raises(FormatError, match="classes and labels"):
            made.finish(FIELDS, classes[:3], {}, [])
        with pytest.raises(FormatError, match="one row per class"):
            made.finish(FIELDS, classes, {"text": np.zeros((3, 2), "f2")}, [])
        with pytest.raises(FormatError, match="unknown dtype"):
            made.finish(FIELDS, classes, {"text": np.zeros((4, 2), "f8")}, [])
        with pytest.raises(FormatError, match="no shard of this number"):
            made.write(4, [])
        out = made.finish(FIELDS, classes, {}, [], created="2026-01-01T00:00:00Z")
    assert open_artifact(out).manifest["created"] == "2026-01-01T00:00:00Z"


def test_facts_are_the_same_for_every_sample(tmp_path: Path) -> None:
    samples = make_samples(4)
    samples[3].info["extra"] = 1
    with pytest.raises(FormatError, match="different facts"):
        write_artifact(tmp_path / "out", samples=samples)


def test_shard_without_samples_is_fine(tmp_path: Path) -> None:
    for container in ("tar", "parquet"):
        path = write_artifact(tmp_path / container, container, 4, make_samples(2))
        assert verify(path, "deep").faults == []
        assert len(open_artifact(path)) == 2


@pytest.mark.parametrize("rows", [[], [{"key": "ö", "rank": 1}], [{"a": [1, {"b": None}]}, {"key": "x", "score": 0.1}]])
def test_rows_are_written_one_by_one_with_the_bytes_of_the_whole(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    write_rows(tmp_path / "a", "picks", rows)
    write_json(tmp_path / "b", {"picks": rows})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("container", ["tar", "parquet", "recipe"])
def test_an_artifact_with_a_torn_manifest_is_replaced_and_nothing_else(tmp_path: Path, container: str) -> None:
    path = write_artifact(tmp_path / "a", container)
    sound = contents(path)
    (path / "manifest.json").write_bytes(sound["manifest.json"][:1000])
    (path / "shards").mkdir(exist_ok=True)
    (path / "shards/notes.txt").write_text("mine")
    with pytest.raises(FormatError, match=r"something else(.|\n)*notes\.txt"):
        writer(path, container)
    (path / "shards/notes.txt").unlink()
    assert contents(write_artifact(path, container)) == sound


@pytest.mark.parametrize("sums", [None, "", f"{'0' * 64}  manifest.json\n", f"{'0' * 64}  photo.png\n"])
def test_a_torn_manifest_alone_does_not_make_an_artifact(tmp_path: Path, sums: str | None) -> None:
    web = tmp_path / "web"
    web.mkdir()
    (web / "manifest.json").write_text('{"name": "a web app",')
    if sums is not None:
        (web / "SHA256SUMS").write_text(sums)
    before = contents(web)
    with pytest.raises(FormatError, match="something else") as caught:
        writer(web)
    assert caught.value.hint
    assert contents(web) == before


def test_an_unfinished_artifact_that_cannot_be_read_is_begun_anew(tmp_path: Path) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    with writer(out, shards=4) as made:
        for shard, part in enumerate(PARTS):
            made.write(shard, part)
    parts = sorted((partial / "parts").iterdir())
    parts[0].write_bytes(parts[0].read_bytes()[:100])
    data = bytearray(parts[2].read_bytes())
    digests = pq.read_metadata(parts[2]).row_group(0).column(pq.read_schema(parts[2]).get_field_index("tokens.xxh3"))
    data[(digests.dictionary_page_offset or digests.data_page_offset) + digests.total_compressed_size - 3] ^= 1
    parts[2].write_bytes(data)
    with writer(out, shards=4) as made:
        assert made.done_shards() == {1, 3}
    config = partial / "config.json"
    config.write_bytes(config.read_bytes()[:20])
    with pytest.raises(FormatError, match="no unfinished artifact"):
        ArtifactWriter(out, "tar", COLUMNS, 4, "digest", lock=False)
    (partial / "thesis.tex").write_text("years of work")
    with pytest.raises(FormatError, match="not an unfinished artifact"):
        writer(out, shards=4)
    assert (partial / "thesis.tex").exists()
    (partial / "thesis.tex").unlink()
    with writer(out, shards=4) as made:
        assert made.done_shards() == set()
        for shard, part in enumerate(PARTS):
            made.write(shard, part)
        finish(made)
    assert verify(out, "deep").ok
