"""USTAR headers, byte for byte. One fixed form, so that equal samples give equal shards and any change shows."""

from __future__ import annotations

BLOCK = 512
RECORD = 10240
"""Archives end with two zero blocks and are padded to this size, as tar programs write them."""

LONGEST_NAME = 100
_ZERO = b"0000000\0"
_OWNER = b"0000644\0" + _ZERO + _ZERO
_TIME = b"00000000000\0"
_REST = b"".join((b"0".ljust(101, b"\0"), b"ustar\0", b"00".ljust(66, b"\0"), _ZERO, _ZERO)).ljust(356, b"\0")
# What the checksum adds up to without name and size; it counts itself as eight blanks.
_SUM = sum(_OWNER + _TIME + _REST) + 8 * ord(" ")


def tar_header(name: str, size: int) -> bytes:
    """The 512-byte USTAR header of a regular file: mode 0644, owner 0:0 without a name, time 0."""
    named, sized = name.encode("ascii"), b"%011o" % size
    checksum = b"%06o\0 " % (_SUM + sum(named) + sum(sized))
    return b"".join((named.ljust(LONGEST_NAME, b"\0"), _OWNER, sized, b"\0", _TIME, checksum, _REST))


def padded(size: int, unit: int = BLOCK) -> int:
    """Bytes that ``size`` bytes of data take in an archive, which is made of blocks and, as a whole, of records."""
    return -(-size // unit) * unit
