"""``d2c report``."""

from __future__ import annotations

from pathlib import Path

import typer

from d2c_cli import options
from d2c_cli.output import Output

EXAMPLES = (
    "d2c report runs/*",
    "d2c report runs/random runs/interval --out comparison.html",
)


def report(
    ctx: typer.Context,
    runs: options.Runs,
    out: options.ReportOut = Path("report.html"),
    config: options.Config = None,
    json: options.Json = False,
) -> None:
    """Put measured runs side by side.

    In: runs that `d2c fid` measured, or folders that it wrote. Out: a table, the best first, and a page with the
    pictures, rows and protocols of all of them. It says where two protocols differ.
    """
    output = Output.open(ctx)
    from d2c import fid_page
    from d2c import report as html

    found = [fid_page.Measured.open(run) for run in runs]
    html.write(out, fid_page.several(found) if len(found) > 1 else fid_page.one(found[0]))
    names = ("distance", "class_distance", "precision", "recall", "coverage", "copy_rate")
    ranked = sorted(found, key=lambda measured: float(measured.generated["distance"]))
    rows = [{"run": measured.name, **{name: measured.generated.get(name) for name in names}} for measured in ranked]
    output.show({"report": out, "rows": rows, "notes": fid_page.incomparable(found)})
