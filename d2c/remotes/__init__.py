"""Where artifacts are published: folders, object stores, the Hugging Face Hub."""

from d2c.remotes.base import EXTRAS, NotThereError, Outgoing, Store, UnavailableError, filling, shown
from d2c.remotes.folder import Folder
from d2c.remotes.opening import open_store
from d2c.remotes.pieces import download, read_text
from d2c.remotes.transfer import Transfer, some, verified

__all__ = [
    "EXTRAS",
    "Folder",
    "NotThereError",
    "Outgoing",
    "Store",
    "Transfer",
    "UnavailableError",
    "download",
    "filling",
    "open_store",
    "read_text",
    "shown",
    "some",
    "verified",
]
