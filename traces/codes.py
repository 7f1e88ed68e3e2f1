"""Numbers as base64 strings of little-endian bytes: what token ids and log-probs look like in a trace.

Lists of numbers cost five to ten times the processor time as span attributes, and raw bytes are dropped or break the span in several
SDK versions and viewers. A string survives everywhere, bit for bit.
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Sequence


def pack_ids(ids: Sequence[int]) -> str:
    """Token ids as little-endian int32."""
    return base64.b64encode(struct.pack(f"<{len(ids)}i", *ids)).decode("ascii")


def unpack_ids(text: str) -> tuple[int, ...]:
    """Raises ValueError on anything ``pack_ids`` did not write."""
    return struct.unpack(f"<{_count(raw := _raw(text), 4)}i", raw)


def pack_floats(values: Sequence[float]) -> str:
    """Log-probs as little-endian float32."""
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode("ascii")


def unpack_floats(text: str) -> tuple[float, ...]:
    """Raises ValueError on anything ``pack_floats`` did not write."""
    return struct.unpack(f"<{_count(raw := _raw(text), 4)}f", raw)


def pack_bytes(values: bytes) -> str:
    """A mask, one byte a token."""
    return base64.b64encode(values).decode("ascii")


def unpack_bytes(text: str) -> bytes:
    return _raw(text)


def _raw(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"expected base64, got {text[:40]!r}") from error


def _count(raw: bytes, width: int) -> int:
    if len(raw) % width:
        raise ValueError(f"expected a multiple of {width} bytes, got {len(raw)}")
    return len(raw) // width
