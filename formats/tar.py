"""USTAR headers, byte for byte. One fixed form, so that equal samples give equal shards and any change shows."""

from __future__ import annotations

BLOCK = 512
RECORD = 10240
"""Archives end with two zero blocks and are padded to this size, as tar programs write them."""

LONGEST_NAME = 100
_ZERO = b"0000000\0"


def tar_header(name: str, size: int) -> bytes:
    """The 512-byte USTAR header of a regular file: mode 0644, owner 0:0 without a name, time 0."""
    fields = b"".join(
        (
            name.encode("ascii").ljust(LONGEST_NAME, b"\0"),
            b"0000644\0",
            _ZERO,
            _ZERO,
            f"{size:011o}\0".encode("ascii"),
            b"00000000000\0",
            b" " * 8,
            b"0".ljust(101, b"\0"),
            b"ustar\0",
            b"00".ljust(66, b"\0"),
            _ZERO,
            _ZERO,
        )
    ).ljust(BLOCK, b"\0")
    return fields[:148] + f"{sum(fields):06o}\0 ".encode("ascii") + fields[156:]


def padded(size: int, unit: int = BLOCK) -> int:
    """Bytes that ``size`` bytes of data take in an archive, which is made of blocks and, as a whole, of records."""
    return -(-size // unit) * unit
