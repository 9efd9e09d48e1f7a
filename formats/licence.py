"""Licence notes: an SPDX expression, and where the terms of the source can be read."""

from __future__ import annotations

import re

from formats.errors import FormatError

_ID = r"(?:DocumentRef-[A-Za-z0-9.-]+:)?[A-Za-z0-9.-]+\+?"
_EXPRESSION = re.compile(rf"\(*{_ID}\)*(?: (?:AND|OR|WITH) \(*{_ID}\)*)*")


def check_licence(spdx: str, source_terms: str) -> None:
    """Both may be empty, which says that nobody said.

    Raises:
        FormatError: ``spdx`` is no SPDX expression in form, or ``source_terms`` no http(s) URL.
    """
    if spdx and (not _EXPRESSION.fullmatch(spdx) or spdx.count("(") != spdx.count(")")):
        raise FormatError(
            "this is no SPDX licence expression",
            found=repr(spdx),
            expected="an id such as CC-BY-4.0, ids with AND, OR or WITH between, or LicenseRef-NAME for other terms",
        )
    if source_terms and not re.fullmatch(r"https?://[^\s/]+\S*", source_terms):
        raise FormatError(
            "this is no web address", found=repr(source_terms), expected="https://... of the terms of use"
        )
