"""``python -m d2c_cli`` is the same as ``d2c``."""

from __future__ import annotations

from d2c_cli.app import main

if __name__ == "__main__":
    main()
