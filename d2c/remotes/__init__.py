"""Where artifacts are published: folders, object stores, the Hugging Face Hub."""

from d2c.remotes.base import EXTRAS, NotThereError, Outgoing, Store, UnavailableError
from d2c.remotes.opening import open_store
from d2c.remotes.transfer import Transfer, some, verified

__all__ = [
    "EXTRAS",
    "NotThereError",
    "Outgoing",
    "Store",
    "Transfer",
    "UnavailableError",
    "open_store",
    "some",
    "verified",
]
