"""Dataset condensation for diffusion models: score, select, attach, pack, train and measure.

Importing this package loads neither torch nor any other heavy library.
"""

from __future__ import annotations

import formats

__all__ = ["__version__"]
__version__ = "0.1.0"


def _foreign_formats() -> str:
    """One line on the package that took the name ``formats``, and how to get rid of it."""
    from importlib.metadata import packages_distributions  # slow, and only a failing import needs it

    owners = [name for name in packages_distributions().get("formats", []) if name != "d2c-toolkit"]
    place = formats.__file__ or ", ".join(formats.__path__)
    whose = f"distribution {owners[0]!r} at {place}" if owners else place
    remedy = f"run `pip uninstall {owners[0]}`, then reinstall d2c-toolkit" if owners else "move it off the Python path"
    return f"`formats` is not d2c-toolkit's package but {whose}; the two cannot share an environment: {remedy}"


if not getattr(formats, "D2C_TOOLKIT", False):
    raise ImportError(_foreign_formats())
