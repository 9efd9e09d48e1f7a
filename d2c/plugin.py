"""A user's own selection method: ``package.module:name``, a function that is given the table and returns keys."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from d2c.errors import D2CError, UsageError
from formats.hashing import xxh3

Function: TypeAlias = Callable[[pa.Table, dict[int, int], "np.ndarray[Any, Any] | None"], Iterable[str]]
"""(table, quotas, features) -> keys in order of choice.

table: the scores, sorted by key (columns key, label, score and others). quotas: images that each label may give.
features: [N, D] in the table's order, where ``--features`` asks for some, else None.
"""


def load(name: str) -> Function:
    """Import the function; modules beside the working directory count too.

    Raises:
        UsageError: there is no such module or function.
    """
    module, _, attribute = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(
            "this selection method cannot be loaded",
            found=f"{name}: {error}",
            expected="package.module:function",
            hint="run where the module lies, or install its package",
        ) from error
    finally:
        sys.path.pop(0)
    if not callable(function):
        raise UsageError("this selection method is no function", found=name)
    checked: Function = function
    return checked


def digest(name: str) -> str:
    """Changes when the file of the function's module does."""
    load(name)
    file = getattr(sys.modules[name.partition(":")[0]], "__file__", None)
    return xxh3(Path(file).read_bytes()) if file else ""


def choose(
    function: Function, table: pa.Table, quotas: np.ndarray[Any, Any], features: np.ndarray[Any, Any] | None, name: str
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Rows of the keys that the function returns, in its order.

    Raises:
        D2CError: there are none, a key is unknown or there twice, or a class gives more than its quota.
    """
    returned: object = function(table, dict(enumerate(quotas.tolist())), features)
    if not isinstance(returned, Iterable):
        kind = type(returned).__name__
        raise D2CError("a selection method returned no keys", where=name, found=kind, expected="a list of keys")
    keys = pa.array([str(key) for key in returned], pa.string())
    if not len(keys):
        raise D2CError("a selection method chose no image", where=name, expected=f"up to {quotas.sum()}")
    rows = pc.index_in(keys, value_set=table["key"].combine_chunks())
    if rows.null_count:
        unknown = keys.filter(rows.is_null())
        raise D2CError(
            "a selection method returned keys that are not in the scores",
            where=name,
            found=f"{len(unknown)} of {len(keys)}, the first: {unknown[0]}",
        )
    found = np.asarray(rows.to_numpy(), dtype=np.int64)
    values, counts = np.unique(found, return_counts=True)
    if (counts > 1).any():
        twice = table["key"][int(values[counts > 1][0])]
        raise D2CError("a selection method returned a key twice", where=name, found=f"{twice}, {counts.max()} times")
    given = np.bincount(table["label"].to_numpy()[found], minlength=len(quotas))
    over = np.flatnonzero(given > quotas)
    if len(over):
        raise D2CError(
            "a selection method returned more images than its budget",
            where=name,
            found=f"{given[over[0]]} of label {over[0]}" + (f", and {len(over) - 1} more classes" * (len(over) > 1)),
            expected=f"at most {quotas[over[0]]}",
        )
    return found
