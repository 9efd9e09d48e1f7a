"""``d2c repack``."""

from __future__ import annotations

import typer

from d2c_cli import options
from d2c_cli.output import Output
from d2c_cli.paths import existing, quoted

EXAMPLES = (
    "d2c repack shards/ shards-parquet/ --container parquet --shards 64",
    "d2c repack shards/ shards-int4/ --tokens int4",
    "d2c repack shards/ out/ --licence MIT --source-terms https://example.org",
)


def repack(
    ctx: typer.Context,
    artifact: options.Artifact,
    out: options.RepackOut,
    container: options.NewContainer = None,
    shards: options.NewShards = None,
    tokens: options.NewTokens = None,
    licence: options.NewLicence = None,
    source_terms: options.NewTerms = None,
    overwrite: options.Replace = False,
    config: options.Config = None,
    json: options.Json = False,
) -> None:
    """Rewrite an artifact: other container, shards, token codec or licence note.

    In: a folder that `d2c pack` wrote, here or elsewhere. Out: a new artifact. Its content id is the same where the
    content is; where tokens were encoded anew, it names the old one as its parent. Every array is verified on the way.
    Of a recipe, which has no arrays, the licence note alone can change. A LICENSE comes along, and the card is new.
    """
    output = Output.open(ctx)
    existing(artifact, "artifact", "d2c pack --ratio 0.008")
    from d2c.tokens import CODECS
    from formats.artifact import open_artifact
    from formats.repack import Changes, edited_card, finished
    from formats.repack import repack as rewrite

    before = open_artifact(artifact)
    notes = {"spdx": licence, "source_terms": source_terms}
    changes = Changes(
        container=container,
        shards=shards,
        tokens=CODECS[tokens] if tokens else None,
        licence={name: value for name, value in notes.items() if value is not None},
    )
    if (after := None if overwrite else finished(before, out, changes)) is not None:
        output.progress.say("repack: up to date")
    else:
        with output.progress.bar("repack", len(before), "image") as bar:
            after = rewrite(artifact, out, changes, bar.advance, overwrite=overwrite)
        if card := edited_card(before):
            output.progress.warn(f"{card} is not as generated, and not copied: bring edits over to {out / card.name}")
    output.show(
        {
            "artifact": out,
            "content_id": after.content_id,
            "same_content": after.content_id == before.content_id,
            "images": len(after),
            "bytes": after.bytes,
            "fidelity": {column.name: column.fidelity for column in after.columns if column.fidelity},
        }
    )
    output.then(f"d2c verify {quoted(out)}")
