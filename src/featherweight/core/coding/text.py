"""The text of a header in few bytes: by LZMA, or, where it is short, by deflate that knows the words of skeletons.

A small model's header holds little but words that every header holds. `words.txt` is a piece of such text, with the
most usual last; what is packed with it can only be unpacked with it, so it is part of the format (and never changes).
"""

from __future__ import annotations

import functools
import lzma
import zlib
from pathlib import Path

FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 2**20}]
BY_LZMA, BY_DEFLATE = b"\x00", b"\x01"  # the first byte says which
WINDOW = -15  # 2**15 bytes, no header or checksum of deflate's own


@functools.cache
def words() -> bytes:
    """The text that short headers are packed with."""
    return (Path(__file__).parent / "words.txt").read_bytes()


def pack(text: bytes) -> bytes:
    """`text` in as few bytes as either way takes."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, WINDOW, 9, zlib.Z_DEFAULT_STRATEGY, words())
    by_deflate = BY_DEFLATE + deflate.compress(text) + deflate.flush()
    return min(by_deflate, BY_LZMA + lzma.compress(text, lzma.FORMAT_RAW, filters=FILTERS), key=len)


def unpack(data: bytes, size: int) -> bytes:
    """The text, of `size` bytes; `ValueError` if that is not what the bytes hold. No more is made room for."""
    try:
        if data[:1] == BY_DEFLATE:
            found = zlib.decompressobj(WINDOW, words()).decompress(data[1:], size + 1)
        elif data[:1] == BY_LZMA:
            found = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=FILTERS).decompress(data[1:], size + 1)
        else:
            raise ValueError("packed in no known way")
    except (lzma.LZMAError, zlib.error) as error:
        raise ValueError(str(error)) from error
    if len(found) != size:
        raise ValueError("another length")
    return found
