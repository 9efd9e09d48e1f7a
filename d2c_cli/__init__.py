"""The command line: options -> config -> one call of the library -> text or JSON. The only importer of typer."""
