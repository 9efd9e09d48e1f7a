"""``d2c push`` and ``d2c pull``."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from d2c_cli import options
from d2c_cli.output import Output
from d2c_cli.paths import existing, quoted

if TYPE_CHECKING:
    from d2c.remotes import Transfer

PUSH_EXAMPLES = ("d2c push shards/ hf://my-org/in1k-d2c-10k --private", "d2c push shards/ s3://bucket/in1k-d2c-10k")
PULL_EXAMPLES = ("d2c pull hf://my-org/in1k-d2c-10k shards/", "d2c pull s3://bucket/in1k-d2c-10k shards/ --dry-run")


def push(
    ctx: typer.Context,
    artifact: options.Artifact,
    destination: options.Destination,
    private: options.Private = False,
    overwrite: options.Replace = False,
    dry_run: options.DryRun = False,
    config: options.Config = None,
    json: options.Json = False,
) -> None:
    """Publish an artifact: to the Hugging Face Hub, an object store or another folder.

    In: a folder that `d2c pack` wrote, intact and with its licence. Out: the same files at the destination, the
    manifest last, so that nobody reads a half artifact; and the root, a sha256 by which receivers prove all of it.

    What the destination has already is not sent again: an interrupted push goes on where it stopped. A card that was
    edited there is kept, unless --overwrite is given. Credentials are those of huggingface_hub (`hf auth login`) and of
    the AWS tools; AWS_ENDPOINT_URL names another S3.
    """
    from d2c.remotes import shown

    ctx.params["destination"] = shown(destination)
    output = Output.open(ctx)
    existing(artifact, "artifact", "d2c pack --ratio 0.008")
    from d2c import publishing

    request = publishing.PublishingConfig(
        artifact=artifact, destination=destination, private=private, overwrite=overwrite
    )
    plan = publishing.plan(request, output.progress)
    if dry_run:
        facts = {
            "destination": plan.store.url,
            "content_id": plan.content_id,
            "root": plan.root,
            "bytes": plan.bytes,
            "files": len(plan.files),
            "transfer_bytes": sum(file.bytes for file in plan.files),
            "skipped": plan.skipped,
            "kept": plan.kept,
            "send": [{"file": file.name, "bytes": file.bytes} for file in plan.files],
            "remove": plan.stale,
        }
        output.show(facts, dry_run=True)
        return
    result = publishing.run(plan, output.progress)
    output.show(_facts("destination", result))
    output.then(f"d2c pull {shlex.quote(result.place)} shards/ --root {result.root}")


def pull(
    ctx: typer.Context,
    source: options.Published,
    out: options.PullOut,
    root: options.Root = None,
    overwrite: options.Replace = False,
    dry_run: options.DryRun = False,
    config: options.Config = None,
    json: options.Json = False,
) -> None:
    """Fetch a published artifact and verify it before it appears.

    In: where `d2c push` put it. Out: the artifact at OUT, every file with the sha256 of its manifest. --root, told by
    somebody you trust, also proves that it is the one they mean.

    Nothing is fetched twice: an interrupted pull goes on where it stopped, in OUT.partial-pull; and where OUT holds a
    damaged copy, only the damaged files are fetched.
    """
    from d2c.remotes import shown

    ctx.params["source"] = shown(source)
    output = Output.open(ctx)
    from d2c import fetching

    request = fetching.FetchingConfig(source=source, out=out, root=root, overwrite=overwrite)
    plan = fetching.plan(request, output.progress)
    if dry_run:
        missing = plan.missing() if plan.reasons else []
        facts = {
            "artifact": out,
            "content_id": plan.manifest.content_id,
            "root": plan.root,
            "reasons": plan.reasons or ["up to date"],
            "bytes": sum(file.bytes for file in plan.manifest.files),
            "files": len(missing),
            "transfer_bytes": sum(file.bytes for file in missing),
            "skipped": len(plan.manifest.files) - len(missing),
            "revision": plan.store.revision,
            "fetch": [{"file": file.path, "bytes": file.bytes} for file in missing],
        }
        output.show(facts, dry_run=True)
        return
    result = fetching.run(plan, output.progress)
    output.show(_facts("artifact", result))
    output.then(f"d2c inspect {quoted(out)}")


def _facts(name: str, result: Transfer) -> dict[str, Any]:
    facts = asdict(result)
    return {name: facts.pop("place"), **facts}
