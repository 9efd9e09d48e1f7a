"""Read structs of Thrift's compact protocol: the form of Parquet's footer and page headers.

Source: the compact protocol of Apache Thrift; only what those use.
"""

from __future__ import annotations

from typing import Any

from formats.errors import FormatError

_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)
_DEEPEST = 8
_LONG_LIST = 15
_LAST = 2**15 - 1


def read_struct(data: memoryview, position: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """(field number -> value, position behind the struct).

    Raises:
        FormatError: these bytes are no struct of this kind.
    """
    fields: dict[int, Any] = {}
    number = 0
    if depth > _DEEPEST:
        raise FormatError("a header is nested too deeply", found=depth)
    try:
        while (head := data[position]) != 0:
            position += 1
            if head >> 4:
                number += head >> 4
            else:
                number, position = _signed(data, position)
            if not 0 < number <= _LAST or number in fields:
                # Readers differ in which of the two they take.
                raise FormatError("a header names a field twice, or none", found=f"field {number}")
            fields[number], position = _value(data, position, head & 15, depth)
    except IndexError as error:
        raise FormatError("a header runs over the end", found=f"byte {position}") from error
    return fields, position + 1


def _value(data: memoryview, position: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in (_TRUE, _FALSE):
        return kind == _TRUE, position
    if kind == _BYTE:
        return data[position], position + 1
    if kind in (_I16, _I32, _I64):
        return _signed(data, position)
    if kind == _DOUBLE:
        return None, position + 8
    if kind == _BINARY:
        length, position = _unsigned(data, position)
        return bytes(data[position : position + length]), position + length
    if kind == _STRUCT:
        return read_struct(data, position, depth + 1)
    if kind == _LIST:
        return _list(data, position, depth)
    raise FormatError("a header holds a type that headers do not have", found=kind)


def _list(data: memoryview, position: int, depth: int) -> tuple[list[Any], int]:
    head, position = data[position], position + 1
    count, kind = head >> 4, head & 15
    if count == _LONG_LIST:
        count, position = _unsigned(data, position)
    values = []
    for _ in range(count):
        # A truth value takes a byte here, unlike in a struct: every item does, so no count can outrun the data.
        value, position = _value(data, position, _BYTE if kind in (_TRUE, _FALSE) else kind, depth)
        values.append(value)
    return values, position


def _unsigned(data: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
    raise FormatError("a header holds an endless number", found=f"byte {position}")


def _signed(data: memoryview, position: int) -> tuple[int, int]:
    value, position = _unsigned(data, position)
    return (value >> 1) ^ -(value & 1), position
