"""Publishing to the hub through huggingface_hub's own request layer; the other end of the wire is `hub_server`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from formats_fixture import contents, make_samples, write_artifact
from hub_server import TOKEN, Hub, serve
from publishing_fixture import LICENCE, artifact, names, pull, push

from d2c import fetching, publishing
from d2c.errors import D2CError
from d2c.fetching import FetchingConfig
from d2c.publishing import PublishingConfig
from d2c.remotes import UnavailableError, pieces
from formats.errors import IntegrityError
from formats.files import read_json

ROOT = Path(__file__).resolve().parents[1]
URL = "hf://datasets/org/tiny"

# huggingface_hub calls its HTTP client the old way when it uploads without Xet.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serve() as served:
        # What HF_ENDPOINT and HF_HUB_DISABLE_XET set when the library is imported. Its other protocol, Xet, is a
        # library in Rust that talks to another service; what the hub stores and serves is the same by either way.
        template = served.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", served.endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield served


def published(hub: Hub, branch: str = "main") -> dict[str, bytes]:
    files = hub.repos["org/tiny"].files(branch)
    return {name: data for name, data in files.items() if name != ".gitattributes"}


@pytest.mark.parametrize("container", ["tar", "parquet"])
def test_round_trip_keeps_every_byte(tmp_path: Path, hub: Hub, container: str) -> None:
    made = artifact(tmp_path / "made", container)
    sent = push(made, "hf://org/tiny")
    assert published(hub) == contents(made)
    got = pull(URL, tmp_path / "got", root=sent.root)
    assert contents(tmp_path / "got") == contents(made)
    assert got.revision == sent.revision == hub.repos["org/tiny"].branches["main"]
    assert not hub.repos["org/tiny"].private


def test_all_of_it_is_one_commit(tmp_path: Path, hub: Hub) -> None:
    made = artifact(tmp_path / "made")
    push(made, URL)
    assert len(hub.repos["org/tiny"].commits) == 2
    assert push(made, URL).files == 0
    assert len(hub.repos["org/tiny"].commits) == 2


def test_what_a_stopped_push_has_sent_is_not_sent_again(tmp_path: Path, hub: Hub) -> None:
    made = artifact(tmp_path / "made")
    hub.before = lambda request: 403 if request.startswith("PUT") and hub.count("PUT") == 3 else None
    with pytest.raises(D2CError, match="denies access"):
        push(made, URL)
    with pytest.raises(D2CError, match="no published artifact"):
        pull(URL, tmp_path / "got")
    hub.before = lambda request: 403 if "/commit/" in request else None
    with pytest.raises(D2CError, match="denies access"):
        push(made, URL)
    large = sum(name.endswith((".tar", ".parquet", ".npy")) for name in contents(made))
    assert hub.count("PUT") == large + 1
    hub.before = lambda request: None
    push(made, URL)
    assert hub.count("PUT") == large + 1
    assert published(hub) == contents(made)


def test_a_stumbling_hub_is_asked_again(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    made = artifact(tmp_path / "made")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.before = lambda request: 503 if request.startswith("PUT") and hub.count("PUT") == 1 else None
    push(made, URL)
    hub.before = lambda request: 503 if "/resolve/" in request and len(hub.requests) % 3 == 0 else None
    pull(URL, tmp_path / "got")
    assert contents(tmp_path / "got") == contents(made)


def test_another_artifact_is_replaced_only_when_asked(tmp_path: Path, hub: Hub) -> None:
    old = write_artifact(tmp_path / "old", "tar", 3, licence=LICENCE)
    new = artifact(tmp_path / "new", samples=make_samples(12))
    push(old, URL)
    with pytest.raises(D2CError, match="another artifact is published"):
        push(new, URL)
    assert published(hub) == contents(old)
    push(new, URL, overwrite=True)
    assert published(hub) == contents(new)
    assert len(hub.repos["org/tiny"].commits) == 3


def test_two_pushes_at_once_do_not_mix(tmp_path: Path, hub: Hub) -> None:
    made = artifact(tmp_path / "made")
    push(made, URL)
    new = artifact(tmp_path / "new", samples=make_samples(12))
    plan = publishing.plan(PublishingConfig(artifact=new, destination=URL, overwrite=True))
    hub.repos["org/tiny"].commit("main", {"README.md": b"edited meanwhile"})
    with pytest.raises(UnavailableError, match="412"):
        publishing.run(plan)
    assert published(hub) == {"README.md": b"edited meanwhile"}


def test_every_file_comes_from_one_commit(tmp_path: Path, hub: Hub) -> None:
    made = artifact(tmp_path / "made")
    first = push(made, f"{URL}@v/1")
    plan = fetching.plan(FetchingConfig(source=f"{URL}@v/1", out=tmp_path / "got"))
    push(artifact(tmp_path / "new", samples=make_samples(12)), f"{URL}@v/1", overwrite=True)
    result = fetching.run(plan)
    assert result.revision == first.revision
    assert contents(tmp_path / "got") == contents(made)
    assert set(hub.repos["org/tiny"].files("main")) == {".gitattributes"}
    pull(f"{URL}@{first.revision}", tmp_path / "by-commit")
    assert contents(tmp_path / "by-commit") == contents(made)


def test_a_new_branch_takes_nothing_over(tmp_path: Path, hub: Hub) -> None:
    old = write_artifact(tmp_path / "old", "tar", 3, licence=LICENCE)
    (old / "LICENSE").write_text("of the old one")
    new = artifact(tmp_path / "new", samples=make_samples(12))
    push(old, URL)
    push(new, f"{URL}@v2")
    assert published(hub, "v2") == contents(new)
    assert published(hub) == contents(old)


def test_private_is_private(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    made = artifact(tmp_path / "made")
    push(made, URL, private=True)
    assert hub.repos["org/tiny"].private
    pull(URL, tmp_path / "got")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(D2CError, match="no published artifact") as caught:
        pull(URL, tmp_path / "other")
    assert "HF_TOKEN" in str(caught.value.hint)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.repos["org/tiny"].private = False
    with pytest.raises(D2CError, match="and public"):
        push(made, URL, private=True)


def test_a_tampered_shard_is_an_error_and_only_it_is_fetched_again(tmp_path: Path, hub: Hub) -> None:
    made = artifact(tmp_path / "made")
    push(made, URL)
    good = published(hub)
    name = "shards/train-00001-of-00004.tar"
    for bad in (good[name][:-1] + b"x", good[name][:1000]):
        hub.repos["org/tiny"].commit("main", {**good, name: bad})
        with pytest.raises(IntegrityError, match="train-00001-of-00004"):
            pull(URL, tmp_path / "got")
        assert names(tmp_path) == ["got.partial-pull", "made"]
    hub.repos["org/tiny"].commit("main", good)
    assert pull(URL, tmp_path / "got").files == len(read_json(made / "manifest.json")["files"]) - 1
    assert contents(tmp_path / "got") == contents(made)


@pytest.mark.parametrize("name", ["manifest.json", "meta/selection.json"])
def test_a_body_without_end_is_an_error(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    push(artifact(tmp_path / "made"), URL)
    monkeypatch.setattr(pieces, "_MOST_TEXT", 1 << 16)
    hub.endless = name
    with pytest.raises(IntegrityError, match="too large" if name == "manifest.json" else "does not arrive"):
        pull(URL, tmp_path / "got")


def test_a_file_that_ends_too_early_is_damage_and_an_empty_one_is_none(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = artifact(tmp_path / "made")
    (made / "LICENSE").write_text("")
    push(made, URL)
    pull(URL, tmp_path / "got")
    assert contents(tmp_path / "got") == contents(made)
    name = "shards/train-00001-of-00004.tar"
    hub.repos["org/tiny"].commit("main", {**published(hub), name: published(hub)[name][:4096]})
    monkeypatch.setattr(pieces, "PIECE", 1024)
    with pytest.raises(IntegrityError, match="does not arrive"):
        pull(URL, tmp_path / "other")


def test_errors_name_the_remedy(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    made = artifact(tmp_path / "made")
    with pytest.raises(D2CError, match="no such data set"):
        pull("hf://org/nothing", tmp_path / "got")
    hub.ignored = (".npy",)
    with pytest.raises(D2CError, match="did not keep every file"):
        push(made, URL)
    with pytest.raises(D2CError, match="no such revision"):
        pull(f"{URL}@nowhere", tmp_path / "got")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(D2CError, match="does not know you") as caught:
        push(made, "hf://org/other")
    assert "hf auth login" in str(caught.value.hint)
    assert names(tmp_path) == ["made"]


def test_from_the_shell(tmp_path: Path, hub: Hub) -> None:
    made = artifact(tmp_path / "made")

    def d2c(*args: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-m", "d2c_cli", *args]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    done = d2c("push", "made", URL, "--private")
    assert done.returncode == 0, done.stderr
    done = d2c("pull", URL, "got")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "got") == contents(made)
    done = d2c("pull", "hf://org/typo", "other")
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
