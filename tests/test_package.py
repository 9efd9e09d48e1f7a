"""The package as a whole: importing it, and the clash with a foreign package named formats."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import d2c

ROOT = Path(__file__).resolve().parents[1]


def _import_d2c(*first_on_path: Path) -> subprocess.CompletedProcess[str]:
    path = [str(place) for place in (*first_on_path, ROOT)]
    code = f"import sys; sys.path[:0] = {path!r}; import d2c; print('torch' in sys.modules)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=False)


def test_import_is_light_and_has_a_version() -> None:
    result = _import_d2c()
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "False"
    assert re.fullmatch(r"\d+\.\d+\.\d+", d2c.__version__)


def test_foreign_formats_package_is_one_clear_line(tmp_path: Path) -> None:
    foreign = tmp_path / "formats"
    foreign.mkdir()
    (foreign / "__init__.py").write_text("bank = {}\n")
    info = tmp_path / "formats-0.1.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: formats\nVersion: 0.1.1\n")
    (info / "top_level.txt").write_text("formats\n")
    (info / "RECORD").write_text("formats/__init__.py,,\n")

    result = _import_d2c(tmp_path)

    assert result.returncode != 0
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("ImportError")]
    assert str(foreign / "__init__.py") in line
    assert "distribution 'formats'" in line
    assert "pip uninstall formats" in line


def test_stray_formats_module_is_named_by_its_place(tmp_path: Path) -> None:
    stray = tmp_path / "formats.py"
    stray.write_text("")
    result = _import_d2c(tmp_path)
    assert result.returncode != 0
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("ImportError")]
    assert str(stray) in line
    assert "move it off the Python path" in line
