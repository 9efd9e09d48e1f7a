"""The command line as a user meets it: exit codes, JSON, precedence of options, typos, and what stays unloaded."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from d2c.errors import D2CError, InterruptedRunError, UsageError
from d2c_cli import reference
from d2c_cli.app import app
from formats.errors import IntegrityError, VersionError

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = (
    *"score select explain diff attach pack train sample fid fid-stats".split(),
    *"verify inspect repack push pull rebuild demo".split(),
)


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("D2C_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.chdir(tmp_path)


def d2c(*args: str | Path, env: dict[str, str] | None = None) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args], env=env, prog_name="d2c", catch_exceptions=False)


def python(*args: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, cwd=cwd, env=env)


class Asked:
    """Stands for a heavy stage, and keeps what the command line asked of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, outcome: BaseException | None = None) -> None:
        self.request: Any = None
        self.outcome = outcome
        monkeypatch.setattr("d2c.score_pipeline.score", self.score)

    def score(self, request: Any, progress: Any) -> tuple[Any, list[Any]]:
        from d2c.steps import Step

        self.request = request
        if self.outcome is not None:
            raise self.outcome
        progress.say("a note")
        summary = {
            "images": 12,
            "bad_files": 1,
            "classes": [{}, {}],
            "duplicates": None,
            "leaks": None,
            "codec": {"name": "rgb"},
            "size": 8,
            "scorer": {"spec": "runs/scorer"},
            "rank_correlation": {"expected": 0.9},
            "score": {"p50": 1.0},
        }
        record = SimpleNamespace(summary=summary, cost={"seconds": 3.5})
        result = SimpleNamespace(record=record, path=Path("d2c-workspace/scores"))
        return result, [Step("score", True, ["not run yet"], 3.5, {"images": 12})]


def test_help_of_every_command_fits_80_columns_and_shows_examples() -> None:
    assert d2c("--help").exit_code == 0
    for name in COMMANDS:
        result = d2c(name, "--help")
        assert result.exit_code == 0
        assert "In: " in result.stdout
        assert "Out:" in result.stdout
        assert max(map(len, result.stdout.splitlines())) <= 80
        assert len(re.findall(rf"^    d2c {name}", result.stdout, re.MULTILINE)) >= 2


def test_examples_name_only_options_that_exist() -> None:
    for name in COMMANDS:
        text = d2c(name, "--help").stdout
        for line in re.findall(rf"^    (d2c {name}.*)", text, re.MULTILINE):
            for option in re.findall(r"--[a-z-]+", line):
                assert re.search(rf"^  (-h, )?{option}\b", text, re.MULTILINE), (line, option)


def test_an_option_is_the_same_wherever_it_occurs() -> None:
    import typer

    commands: Any = typer.main.get_command(app)
    seen: dict[str, set[str]] = {}
    for command in commands.commands.values():
        for param in command.params:
            if param.param_type_name == "option":
                assert param.envvar == "D2C_" + param.opts[0].lstrip("-").upper().replace("-", "_")
                seen.setdefault(param.opts[0], set()).add(str(param.metavar))
    several = {option: units for option, units in seen.items() if len(units) > 1}
    assert several == {
        # Statistics and comparisons are the results that are a single file.
        "--out": {"DIR", "FILE.npz", "FILE.html"},
        # What samples can also do as the official samplers do.
        "--precision": {"auto|fp32|bf16|fp16", "auto|fp32|tf32|bf16|fp16"},
    }
    for option in (
        "--workspace --out --device --gpus --ratio --per-class --method --interval --container --model --recipe "
        "--steps --batch-size --seed --json --dry-run --overwrite"
    ).split():
        assert option in seen
    for name in COMMANDS:
        assert "--json" in [param.opts[0] for param in commands.commands[name].params]


@pytest.mark.parametrize("args", [["--help"], ["score", "--help"], ["verify", "nowhere"], ["inspect", "nowhere"]])
def test_torch_is_not_loaded_for(args: list[str]) -> None:
    code = (
        "import sys, d2c_cli.app as a\n"
        "try:\n    a.app(sys.argv[1:], prog_name='d2c')\n"
        "except SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules"
    )
    result = python("-c", code, *args)
    assert result.returncode == 0, result.stderr


def test_python_m_d2c_cli_is_d2c() -> None:
    result = python("-m", "d2c_cli", "--version")
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(r"d2c \d+\.\d+\.\d+\n", result.stdout)


def test_json_is_one_document_with_the_facts_of_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    Asked(monkeypatch)
    text = d2c("score", "photos", "--device", "cpu")
    document = json.loads(d2c("score", "photos", "--device", "cpu", "--json").stdout)
    assert text.exit_code == 0
    assert list(document)[:4] == ["command", "ok", "dry_run", "config"]
    assert document["command"] == "score"
    assert document["ok"] is True
    assert document["config"]["source"] == "photos"
    assert document["steps"] == [
        {"stage": "score", "ran": True, "reasons": ["not run yet"], "seconds": 3.5, "facts": {"images": 12}}
    ]
    for fact in ("images", "12", "bad files", "runs/scorer", "not run yet"):
        assert fact in text.stdout
    # stdout is data: the echo of options, notes and the next command are not.
    assert text.stderr.startswith("d2c score: source=photos workspace=d2c-workspace ")
    assert "a note\n" in text.stderr
    assert "next: d2c pack --ratio 0.008 --device cpu\n" in text.stderr
    assert "note" not in text.stdout


FAILURES = [
    (D2CError("no image", where="x", hint="look"), 1),
    (UsageError("contradiction"), 2),
    (IntegrityError("flipped bit"), 3),
    (VersionError("too new"), 4),
    (InterruptedRunError("stopped"), 75),
    (OSError(errno.ENOSPC, "No space left on device", "shards/x"), 1),
    (PermissionError(errno.EACCES, "Permission denied", "/root/x"), 1),
    (KeyboardInterrupt(), 130),
]


@pytest.mark.parametrize(("error", "code"), FAILURES, ids=lambda value: type(value).__name__)
def test_known_failures_have_a_message_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    Asked(monkeypatch, error)
    result = d2c("score", "photos", "--device", "cpu")
    assert result.exit_code == code
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    document = json.loads(d2c("score", "photos", "--device", "cpu", "--json").stdout)
    assert (document["command"], document["ok"]) == ("score", False)
    assert set(document["error"]) == {"kind", "what", "where", "found", "expected", "hint"}


def test_a_full_disk_says_that_nothing_is_lost_and_to_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    Asked(monkeypatch, OSError(errno.ENOSPC, "No space left on device", "shards/x"))
    message = d2c("score", "photos").stderr
    assert "the disk is full; nothing finished is lost" in message
    assert "shards/x" in message
    assert "run the same command again" in message


def test_ctrl_c_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    Asked(monkeypatch, KeyboardInterrupt())
    assert d2c("score", "photos").stderr.endswith("interrupted: run the same command again to resume\n")


def test_a_bug_keeps_its_plain_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import d2c.score_pipeline, d2c_cli.app as a\n"
        "def broken(*_):\n    raise ZeroDivisionError('a bug')\n"
        "d2c.score_pipeline.score = broken\n"
        "a.app(['score', 'x'], prog_name='d2c')"
    )
    result = python("-c", code)
    assert result.returncode == 1
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.endswith("ZeroDivisionError: a bug\n")
    assert "╭" not in result.stderr


@pytest.mark.parametrize(
    ("typed", "expected"), [("50k", 50_000), ("1.5M", 1_500_000), ("1.1k", 1_100), ("2_000", 2_000), ("7", 7)]
)
def test_counts_may_be_short(monkeypatch: pytest.MonkeyPatch, typed: str, expected: int) -> None:
    asked = Asked(monkeypatch)
    assert d2c("score", "photos", "--scorer-steps", typed).exit_code == 0
    assert asked.request.scorer_steps == expected


@pytest.mark.parametrize("typed", ["1.5", "1.2345k", "k", "5G", ""])
def test_what_is_no_count_is_a_usage_error(monkeypatch: pytest.MonkeyPatch, typed: str) -> None:
    Asked(monkeypatch)
    result = d2c("score", "photos", "--evals", typed)
    assert result.exit_code == 2
    assert "'--evals'" in result.stderr
    assert "is not a whole number, such as 50000, 50k or 1.5M" in result.stderr


def test_flag_beats_environment_beats_file_beats_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = Asked(monkeypatch)
    (tmp_path / "d2c.toml").write_text(
        'device = "cpu"\n[score]\nevals = 16\nbatch-size = 32\nseed = 1\n[pack]\ngpus = 7\n'
    )
    given = ["score", "photos", "--config", "d2c.toml"]
    result = d2c(*given, "--seed", "3", env={"D2C_SEED": "2", "D2C_BATCH_SIZE": "2"})
    assert result.exit_code == 0, result.stderr
    asked_for = asked.request
    assert (asked_for.seed, asked_for.batch_size, asked_for.evals, asked_for.gpus) == (3, 2, 16, 1)
    assert asked_for.device == "cpu"
    assert "batch-size=2 (environment)" in result.stderr
    assert "evals=16 (config file)" in result.stderr
    assert d2c("score", "photos", env={"D2C_CONFIG": "d2c.toml"}).exit_code == 0
    assert asked.request.evals == 16


def test_a_file_may_ask_for_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Asked(monkeypatch)
    (tmp_path / "d2c.toml").write_text("json = true\n")
    assert json.loads(d2c("score", "photos", "--config", "d2c.toml").stdout)["ok"] is True


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        ("[score]\nevls = 16\n", "did you mean evals?"),
        ("[scroe]\nevals = 16\n", "did you mean score?"),
        ("devise = 'cpu'\n", "did you mean device?"),
        # A mistake in another command's table is found as well.
        ("[train]\nbatchsize = 16\n", "did you mean batch_size?"),
        ("[score]\nevals = [1]\n", "evals = [1]"),
        ("[score\n", "not TOML"),
    ],
)
def test_mistakes_in_the_file_are_usage_errors(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str, hint: str
) -> None:
    Asked(monkeypatch)
    (tmp_path / "d2c.toml").write_text(content)
    result = d2c("score", "photos", "--config", "d2c.toml")
    assert result.exit_code == 2
    assert hint in result.stderr
    assert "d2c.toml" in result.stderr


def test_a_bad_value_that_nobody_typed_names_its_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Asked(monkeypatch)
    result = d2c("score", "photos", env={"D2C_EVALS": "many"})
    assert result.exit_code == 2
    assert "environment variable D2C_EVALS" in result.stderr
    (tmp_path / "d2c.toml").write_text("[score]\nevals = 'many'\n")
    assert "--config file" in d2c("score", "photos", "--config", "d2c.toml").stderr


def test_typos_get_a_suggestion(tmp_path: Path) -> None:
    command = d2c("scroe", "photos")
    assert (command.exit_code, "'score'" in command.stderr) == (2, True)
    option = d2c("score", "photos", "--evls", "3")
    assert (option.exit_code, "--evals" in option.stderr) == (2, True)
    value = d2c("pack", "--container", "zip")
    assert (value.exit_code, "parquet" in value.stderr) == (2, True)
    (tmp_path / "shards").mkdir()
    path = d2c("verify", "shard")
    assert (path.exit_code, "did you mean shards?" in path.stderr) == (1, True)
    source = tmp_path / "photos" / "cat"
    source.mkdir(parents=True)
    (source / "1.png").write_bytes(b"")
    path = d2c("score", "fotos", "--device", "cpu")
    assert (path.exit_code, "photos" in path.stderr) == (1, True)


def test_other_ranks_of_a_torchrun_job_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    Asked(monkeypatch)
    result = d2c("score", "photos", env={"RANK": "1"})
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")


def test_the_reference_page_is_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert page == reference.reference(), "stale: python -m d2c_cli.reference > docs/cli.md"
