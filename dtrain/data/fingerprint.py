"""The SHA-256 over the rows of a split, from Arrow's buffers: independent of chunks, files, slices and formats.

Blocks of rows are hashed by several threads, and the result is the hash of their hashes in order.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dtrain.distributed.cpu import allowed_cpus

BLOCK_ROWS = 4096
MAX_THREADS = 8


def fingerprint(rows: datasets.Dataset) -> str:
    """Returns the SHA-256 over the column names, their types and the rows in order."""
    names = sorted(rows.column_names)
    columns = rows.with_format("arrow").select_columns(names)

    def block(start: int) -> bytes:
        digest = hashlib.sha256()
        table: pa.Table = columns[start : start + BLOCK_ROWS]
        for name in names:
            chunks = table.column(name)
            _update(digest, chunks.chunk(0) if chunks.num_chunks == 1 else _combined(chunks))
        return digest.digest()

    total = hashlib.sha256(json.dumps([names, [str(columns.data.schema.field(name).type) for name in names]]).encode())
    total.update(len(rows).to_bytes(8, "little"))
    # hashlib and Arrow release the interpreter's lock, so that threads are enough.
    with ThreadPoolExecutor(min(MAX_THREADS, len(allowed_cpus()))) as pool:
        for digest in pool.map(block, range(0, len(rows), BLOCK_ROWS)):
            total.update(digest)
    return total.hexdigest()


def _combined(chunks: pa.ChunkedArray) -> pa.Array:
    return pa.concat_arrays(chunks.chunks) if chunks.num_chunks else pa.array([], chunks.type)


def _update(digest: Any, array: pa.Array) -> None:
    """Hashes the values of an array, and nothing that only its layout in memory decides."""
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    kind = array.type
    digest.update(f"{len(array)} {array.null_count}".encode())
    if array.null_count:
        digest.update(np.packbits(array.is_valid().to_numpy(zero_copy_only=False)).tobytes())
    if pa.types.is_null(kind):
        return
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        lengths = pc.list_value_length(array).fill_null(0)
        digest.update(lengths.to_numpy(zero_copy_only=False).astype("<i8").tobytes())
        _update(digest, array.flatten())
    elif pa.types.is_struct(kind):
        for child in array.flatten():
            _update(digest, child)
    elif pa.types.is_map(kind):
        _update(digest, array.cast(pa.list_(pa.struct([("key", kind.key_type), ("value", kind.item_type)]))))
    elif _is_text(kind):
        _update_text(digest, array.fill_null(b"" if "binary" in str(kind) else "") if array.null_count else array)
    elif pa.types.is_boolean(kind):
        digest.update(np.packbits(array.fill_null(False).to_numpy(zero_copy_only=False)).tobytes())
    else:
        _update_numbers(digest, array)


def _is_text(kind: pa.DataType) -> bool:
    types = pa.types
    return any(
        is_kind(kind) for is_kind in (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    )


def _update_text(digest: Any, array: pa.Array) -> None:
    width = "<i8" if str(array.type).startswith("large") else "<i4"
    _, offsets_buffer, values = array.buffers()
    if offsets_buffer is None or not len(array):
        return
    offsets = np.frombuffer(offsets_buffer, width)[array.offset : array.offset + len(array) + 1]
    digest.update(np.diff(offsets).astype("<i8").tobytes())
    if values is not None:
        digest.update(memoryview(values)[int(offsets[0]) : int(offsets[-1])])


def _update_numbers(digest: Any, array: pa.Array) -> None:
    """Hashes values of a fixed width: integers, floats, times, decimals."""
    if array.null_count:
        array = array.drop_null()  # the bytes below a null are undefined
    values = array.buffers()[1]
    if values is None or not len(array):
        return
    width = array.type.bit_width // 8
    digest.update(memoryview(values)[array.offset * width : (array.offset + len(array)) * width])
