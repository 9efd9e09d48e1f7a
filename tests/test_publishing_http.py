"""Fetching from a web server, which may do as it likes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from formats_fixture import contents
from publishing_fixture import artifact, pull

from d2c.errors import D2CError
from d2c.remotes import pieces
from formats.errors import IntegrityError

pytest.importorskip("aiohttp", reason="http:// is read through aiohttp")


class _Handler(SimpleHTTPRequestHandler):
    """A server that knows no ranges."""

    root: Path
    endless = ""
    status = 200

    def log_message(self, *_: object) -> None:
        return None

    def translate_path(self, path: str) -> str:
        return str(self.root) + path

    def do_GET(self) -> None:
        if not self.endless or not self.path.endswith(self.endless):
            super().do_GET()
            return
        self.send_response(self.status)
        self.end_headers()
        with contextlib.suppress(OSError):  # the other side has had enough
            while True:
                self.wfile.write(bytes(1 << 20))


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[str, type[_Handler]]]:
    class Handler(_Handler):
        root = tmp_path

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", Handler
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_server_without_ranges_will_do(
    tmp_path: Path, site: tuple[str, type[_Handler]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = artifact(tmp_path / "made")
    monkeypatch.setattr(pieces, "PIECE", 5000)
    pull(f"{site[0]}/made", tmp_path / "got")
    assert contents(tmp_path / "got") == contents(made)
    with pytest.raises(D2CError, match="no published artifact"):
        pull(f"{site[0]}/nothing", tmp_path / "other")


@pytest.mark.parametrize("status", [200, 206])
@pytest.mark.parametrize("name", ["SHA256SUMS", "meta/selection.json"])
def test_a_body_without_end_is_an_error(
    tmp_path: Path, site: tuple[str, type[_Handler]], monkeypatch: pytest.MonkeyPatch, name: str, status: int
) -> None:
    artifact(tmp_path / "made")
    monkeypatch.setattr(pieces, "_MOST_TEXT", 1 << 16)
    site[1].endless, site[1].status = name, status
    with pytest.raises(IntegrityError, match="too large" if name == "SHA256SUMS" else "does not arrive"):
        pull(f"{site[0]}/made", tmp_path / "got")
