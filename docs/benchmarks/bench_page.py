"""Write a domain's page, report, figure and tables from what bench.py left: every figure is read, none is typed.

python docs/benchmarks/bench_page.py OUT DOMAIN [FOLDER]     # FOLDER/DOMAIN.{md,html,svg,json,parquet}
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from bench_arms import (
    ANEW_TOO,
    COMPARED,
    MEASURES,
    QUESTIONS,
    Arm,
    Arms,
    Group,
    Row,
    comparisons,
    counted,
    grouped,
    heading,
)
from bench_cells import MODELS, Cell, cells
from bench_figure import figure
from tables import read, table

from d2c import report
from formats.files import write_bytes, write_json

SUBSET_MEASURES = ("distance", "class_distance", "recall", "coverage")
TITLES = {
    "cifar10": "CIFAR-10",
    "longtail": "A long-tailed CIFAR-10",
    "unlabelled": "CIFAR-10 without its labels",
    "glyphs": "Letters and digits of fonts",
    "own": "These images",
}
STAGES = ("train_scorer", "score", "select", "attach", "train", "sample")
COVARIANCES = {"full": "full covariances", "diagonal": "variances alone, since images are fewer than features"}
FAR = 1.5
"""Times the random arm's class FD, beyond which a figure leaves an arm out."""
WIDTHS = "Mean ± standard deviation over the runs."
LIMITS = (
    "Arms are compared seed by seed, since runs of one seed share noise, held-out images and first weights. In "
    "brackets: standard errors of the difference. Better and worse: a t-test says p < 0.05, paired unless the line "
    "says otherwise. Nothing is corrected for the number of comparisons: of twenty, one is expected to look so by "
    "chance. Most rules make one subset from one scorer and one network of features, whose luck is not in the error; "
    "where they choose anew it is, and only those are counted where there are both. Scores of pixels are mostly "
    "texture: in a latent space rules may rank otherwise."
)


@dataclass(frozen=True)
class Section:
    """A part of the page: paragraphs, then tables (caption, header, rows), then a list."""

    title: str
    words: list[str]
    tables: list[tuple[str, list[str], list[list[str]]]] = field(default_factory=list)
    points: list[str] = field(default_factory=list)


def main(out: Path, domain: str, here: Path) -> None:
    """Read the results and write the five files."""
    facts = read(out / domain / "facts.json")
    rows = [read(path) for path in sorted((out / domain / "results").glob("*.json"))]
    chosen, trained = ([row for row in rows if (row["level"] == "a") == plain] for plain in (True, False))
    groups = grouped(trained)
    sections = [
        what(facts, trained),
        subsets(chosen),
        *[arms_section(group, arms) for group, arms in groups.items()],
        findings(groups),
        costs(chosen, trained),
    ]
    title = f"{TITLES[domain]}: does choosing and attaching help?"
    picture = None
    if groups:
        group, arms = next(iter(groups.items()))
        words = f"{TITLES[domain]}, {heading(group)}: runs, means, standard errors"
        picture = drawn(words, arms)
        write_bytes(here / f"{domain}.svg", picture.encode())
    write_bytes(here / f"{domain}.md", markdown(title, domain, sections, picture is not None).encode())
    report.write(here / f"{domain}.html", page(title, sections, picture))
    write_json(here / f"{domain}.json", {"facts": facts, "rows": rows})
    plain_rows = [flat(row) for row in rows]
    # pyarrow looks at the first row's names alone.
    names = dict.fromkeys(name for row in plain_rows for name in row)
    columns = {name: [row.get(name) for row in plain_rows] for name in names}
    pq.write_table(pa.table(columns), here / f"{domain}.parquet")


def drawn(words: str, arms: Arms) -> str:
    """The figure of a group: arms of three runs, but for those far beyond random ones, which would set the scale.

    An arm of one subset, whose luck no error bar shows, gives way to one that chose anew.
    """
    several = {name: arm for name, arm in arms.items() if len(arm.runs) >= 3 and name + ANEW_TOO not in arms} or arms
    limit = FAR * several["random"].mean("class_distance") if "random" in several else np.inf
    near = {name: arm for name, arm in several.items() if arm.mean("class_distance") <= limit}
    labels = {name: f"{name} ({len(arm.runs)})" for name, arm in near.items()}
    far = [name for name in several if name not in near]
    panels = []
    for measure in COMPARED:
        values = {labels[name]: arm.values(measure) for name, arm in near.items()}
        values = {label: found[~np.isnan(found)] for label, found in values.items()}
        if any(map(len, values.values())):
            panels.append((MEASURES[measure][0], values))
    return figure(words + (f" (off the scale: {', '.join(far)})" if far else ""), panels, labels.get("random"))


def what(facts: Row, trained: list[Row]) -> Section:
    """The networks and the protocol."""
    trust = facts["trust"]
    right = {name: f"{facts[name]['accuracy']:.0%}" for name in ("chooser", "teacher") if name in facts}
    ranks = f"{trust['evaluations']} evaluations an image, split-half rank correlation inside a class"
    networks = [
        f"{facts['images']:,} images of {facts['classes']} classes at {facts['size']} px, as pixels.",
        f"Scorer: {facts['scorer']}, {ranks} {trust['split_half']:.2f}.",
        f"Features that choose: a convolutional network's, right on {right['chooser']} of held-out images."
        if "chooser" in right
        else "Features that choose: the scorer's.",
        *(
            [f"Attached tokens: a small vision transformer's, right on {right['teacher']}."]
            if "teacher" in right
            else []
        ),
        f"Judge, in whose features all is measured: another convolutional network, right on {facts['judge']:.0%}.",
        "These networks share the images and labels, no weights."
        + (" The judge is the chooser's kind of network: rules that look at features choose in a space like its own. "
           "So runs are measured a second time, as far as there is a figure, in the teacher's (the network of the "
           "attached tokens), which is of another kind and which no rule saw." if "chooser" in right else ""),
        "No distance here is FID.",
    ]  # fmt: skip
    words = [" ".join(networks)]
    if trained:
        protocol = trained[0]["protocol"]
        sampler = protocol["sampler"]
        solvers = {MODELS[row["objective"]]: row["protocol"]["sampler"]["method"] for row in trained}
        drawn = " and ".join(f"{method} of {model}" for model, method in sorted(solvers.items(), reverse=True))
        words.append(
            f"Runs: recipe `{protocol['recipe']}`, batch {protocol['batch_size']}; {protocol['samples']:,} samples by "
            f"{drawn}, {sampler['steps']} steps, guidance {sampler['guidance']}, against "
            f"{protocol['reference_images']:,} real images. FD: Fréchet distance. Class FD: its mean over classes, by "
            f"{COVARIANCES[trained[0]['figures']['class_covariance']]}. Held-out loss: denoising loss of the averaged "
            "weights on 256 images that were not chosen. Copies, by the nearest neighbours in pixels or in features: "
            "0.01 is what unseen real images have. Random rules and `ot`, by the same features, choose anew in each "
            "run. Runs of another rule differ in the training seed alone, except where the row says anew: there each "
            "has its own scorer and features, so its own subset."
        )
    there = {Cell(**{field.name: row[field.name] for field in fields(Cell)}).name for row in trained}
    planned = {level: {cell.name for cell in cells(level, facts["domain"])} for level in "bc"}
    done = [
        f"{len(there & names)} of {len(names)} runs of level {level.upper()}"
        for level, names in planned.items()
        if names
    ]
    words.append(f"Done so far: {', '.join(done)}.")
    return Section("What was measured", [*words, facts["machine"]])


def subsets(rows: list[Row]) -> Section:
    """Level A."""
    tables = []
    names = {measure: MEASURES[measure][0] for measure in SUBSET_MEASURES}
    for budget in sorted({row["budget"] for row in rows}):
        chosen = [row for row in rows if row["budget"] == budget]
        first = chosen[0]["measures"]
        draws = [f"{first[m]['random_mean']:.3f} ± {first[m]['random_sd']:.3f}" for m in names]
        body = [["random, 5 draws", *draws, ""]]
        for row in sorted(chosen, key=lambda row: row["measures"]["class_distance"]["value"]):
            found = [row["measures"][m] for m in names]
            cells = [f"{one['value']:.3f} ({one['z']:+.1f})" for one in found]
            body.append([row["method"], *cells, f"{row['seconds']:.0f}"])
        tables.append((f"{budget} images a class", ["rule", *names.values(), "s"], body))
    words = (
        "The chosen images themselves against all images. In brackets: distance from random in standard deviations of "
        "five draws. The row `random` is a sixth draw: its own distance shows how far these can be trusted. Class FD "
        f"is by {COVARIANCES['diagonal']}: not to be compared with that of runs. s: seconds of choosing, on a shared "
        "core."
    )
    return Section("Subsets, without training", [words if rows else "Not run yet."], tables)


def arms_section(group: Group, arms: Arms) -> Section:
    """Levels B and C."""
    passes = max(arm.runs[0]["protocol"]["passes_per_image"] for arm in arms.values())
    header = ["rule", "runs", *(name for name, _ in MEASURES.values())]
    body = [
        [name, str(len(arm.runs)), *(spread(arm, measure, digits) for measure, (_, digits) in MEASURES.items())]
        for name, arm in arms.items()
    ]
    words = [f"{passes:,.0f} passes an image. {WIDTHS}"]
    quarters = [
        [name, *(f"{value:.3f}" for value in np.mean([run["figures"]["held_out_bins"] for run in arm.runs], axis=0))]
        for name, arm in arms.items()
    ]
    bins = ("Held-out loss by quarter of the noise", ["rule", "least", "second", "third", "most"], quarters)
    return Section(heading(group), words, [("", header, body), bins])


def spread(arm: Arm, measure: str, digits: int) -> str:
    """Mean and standard deviation of an arm."""
    values = arm.values(measure)
    if np.isnan(values).any():
        return ""
    return f"{values.mean():.{digits}f}" + (f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else "")


def findings(groups: dict[Group, Arms]) -> Section:
    """What the runs say to each question, and the comparisons behind it."""
    found = comparisons(groups)
    points = []
    for question, words in QUESTIONS.items():
        told = []
        for measure in COMPARED:
            verdicts = [one.gap(measure)[2] for one in counted(found) if one.question == question]
            counts = [f"{word} in {verdicts.count(word)}" for word in ("better", "worse", "noise") if word in verdicts]
            if counts:
                told.append(f"{MEASURES[measure][0]}: {', '.join(counts)} of {len(verdicts) - verdicts.count('')}")
        if any(one.question == question for one in found):
            points.append(f"*{words}* {'; '.join(told)}.")
    measures = ("distance", *COMPARED, "copies_pixels", "copies_features")
    header = ["comparison", "where", *(MEASURES[measure][0] for measure in measures)]
    body = [[one.words, short(one.where), *(one.cell(measure) for measure in measures)] for one in found]
    return Section("What follows", [LIMITS], [("Comparisons", header, body)] if body else [], points)


def costs(chosen: list[Row], rows: list[Row]) -> Section:
    """Seconds by stage: choosing from level A, the rest from trained runs."""
    if not rows:
        return Section("Cost", ["Nothing was trained yet."])
    spent = {name: [row["costs"].get(name) or 0 for row in rows] for name in STAGES}
    spent["select"] = [row["seconds"] for row in chosen] or [0]
    body = [[name, f"{np.median(values):,.0f}", f"{max(values):,.0f}"] for name, values in spent.items()]
    hours = sum(sum(spent[name]) for name in ("attach", "train", "sample")) / 3600
    words = (
        "Seconds of one CPU thread, on cores that were shared with other work. Scoring is done once for all runs. "
        f"{len(rows)} runs took {hours:.1f} h. Choosing: every rule and budget of level A."
    )
    return Section("Cost", [words], [("", ["stage", "median", "most"], body)])


def markdown(title: str, domain: str, sections: Sequence[Section], figured: bool) -> str:
    """The page."""
    made = (
        "[bench.py](bench.py) made the figures, [bench_page.py](bench_page.py) this page and [the same with its figure "
        f"inside]({domain}.html). Every run: [{domain}.json]({domain}.json), [{domain}.parquet]({domain}.parquet)."
    )
    parts = [f"# {title}", made]
    parts += [f"![Every run, with means and standard errors]({domain}.svg)"] if figured else []
    for section in sections:
        parts += [f"## {section.title}", *section.words]
        for caption, header, body in section.tables:
            parts += [*([f"### {caption}"] if caption else []), table(header, body)]
        parts += ["\n".join(f"- {point}" for point in section.points)] if section.points else []
    return "\n\n".join(parts) + "\n"


def page(title: str, sections: Sequence[Section], picture: str | None) -> str:
    """The report: one file, without script or network."""
    found = [report.chart(picture, "Each run, and mean and standard error of the rule")] if picture else []
    for section in sections:
        inside = [report.text(plain(word)) for word in section.words]
        for caption, header, body in section.tables:
            cells = [[plain(cell) for cell in line] for line in body]
            inside.append(report.table(caption or section.title, header, cells))
        inside += [report.text(plain(point)) for point in section.points]
        found.append(report.section(section.title, *inside))
    return report.page(title, found)


def short(group: Group) -> str:
    """Where two arms are compared, as far as the comparison's words do not say it."""
    objective, _, _, budget, steps = group
    return f"{budget} a class, {steps:,} steps" + (", DiT" if objective == "dit" else "")


def plain(markdown: str) -> str:
    """Markdown's words, where they are not Markdown."""
    return markdown.replace("`", "").replace("*", "")


def flat(row: Row) -> Row:
    """A row of plain columns."""
    found = {key: value for key, value in row.items() if not isinstance(value, dict | list)}
    for part in ("figures", "costs"):
        found |= {f"{part}_{key}": value for key, value in row.get(part, {}).items()}
    for measure, values in row.get("measures", {}).items():
        found |= {f"{measure}_{key}": value for key, value in values.items()}
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]) if len(sys.argv) > 3 else Path(__file__).parent)
