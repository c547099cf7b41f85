"""Writes GGUF version 3 files (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) with numpy alone.

Tensors are streamed: their shapes are known when the header is written, their values only when it is their turn.
"""

import struct

import numpy as np

F32, F16, BF16 = 0, 1, 30
ELEMENT_BYTES = {F32: 4, F16: 2, BF16: 2}
ALIGNMENT = 32

_U32, _I32, _F32, _BOOL, _STRING, _ARRAY, _U8 = 4, 5, 6, 7, 8, 9, 0


def to_bf16(values: np.ndarray) -> np.ndarray:
    """fp32 to the upper 16 bits, to nearest, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def _string(text) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def _value(value) -> tuple[int, bytes]:
    """The type number and the bytes of a metadata value, by its Python type; ints are u32."""
    if isinstance(value, bool):
        return _BOOL, struct.pack("<?", value)
    if isinstance(value, int):
        return _U32, struct.pack("<I", value)
    if isinstance(value, float):
        return _F32, struct.pack("<f", value)
    if isinstance(value, str):
        return _STRING, _string(value)
    if isinstance(value, np.ndarray):
        kind = {"uint8": _U8, "int32": _I32, "float32": _F32}[value.dtype.name]
        return _ARRAY, struct.pack("<IQ", kind, value.size) + value.tobytes()
    return _ARRAY, struct.pack("<IQ", _STRING, len(value)) + b"".join(map(_string, value))


def write(path, metadata: dict, tensors: list):
    """tensors: (name, shape, type, produce), row-major; produce() gives the values as fp32."""
    head = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
    for key, value in metadata.items():
        kind, raw = _value(value)
        head += _string(key) + struct.pack("<I", kind) + raw
    offset = 0
    for name, shape, kind, _ in tensors:
        dims = list(reversed(shape))
        head += _string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
        offset += -(-int(np.prod(shape)) * ELEMENT_BYTES[kind] // ALIGNMENT) * ALIGNMENT
    head += b"\0" * (-len(head) % ALIGNMENT)
    with open(path, "wb") as file:
        file.write(head)
        for name, shape, kind, produce in tensors:
            values = produce()
            assert values.shape == tuple(shape), (name, values.shape, shape)
            raw = {F32: lambda v: v.astype("<f4"), F16: lambda v: v.astype("<f2"), BF16: to_bf16}[kind](values).tobytes()
            file.write(raw + b"\0" * (-len(raw) % ALIGNMENT))


def interleave(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys as llama models in GGUF files have them: the pairs of the rotation side by side."""
    rest = values.shape[1:]
    size = values.shape[0] // heads
    return values.reshape(heads, 2, size // 2, *rest).swapaxes(1, 2).reshape(values.shape)


# Elements and bytes of a block, by type; 0x41545001 is atp's q4.
BLOCKS = {F32: (1, 4), F16: (1, 2), BF16: (1, 2), 2: (32, 18), 8: (32, 34), 12: (256, 144), 13: (256, 176), 14: (256, 210),
          0x41545001: (32, 18)}


def read(path) -> tuple[list, dict]:
    """A file's metadata entries, as they lie there, and its tensors: name -> (dims in the file's order, type, bytes)."""
    raw = open(path, "rb").read()
    at = 8

    def number(code):
        nonlocal at
        (value,) = struct.unpack_from("<" + code, raw, at)
        at += struct.calcsize(code)
        return value

    def text():
        nonlocal at
        size = number("Q")
        at += size
        return raw[at - size : at]

    def skip(kind):
        nonlocal at
        if kind == _STRING:
            text()
        elif kind == _ARRAY:
            element, count = number("I"), number("Q")
            for _ in range(count):
                skip(element)
        else:
            at += {0: 1, 1: 1, 2: 2, 3: 2, 7: 1, 10: 8, 11: 8, 12: 8}.get(kind, 4)

    tensor_count, entry_count = number("Q"), number("Q")
    entries, infos, tensors = [], [], {}
    for _ in range(entry_count):
        begin = at
        text()
        skip(number("I"))
        entries.append(raw[begin:at])
    for _ in range(tensor_count):
        name, rank = text(), number("I")
        infos.append((name, [number("Q") for _ in range(rank)], number("I"), number("Q")))
    start = -(-at // ALIGNMENT) * ALIGNMENT
    for name, dims, kind, offset in infos:
        elements, size = BLOCKS[kind]
        begin = start + offset
        tensors[name.decode()] = (dims, kind, raw[begin : begin + int(np.prod(dims)) // elements * size])
    return entries, tensors


def write_again(path, entries: list, tensors: dict):
    """What read() gave, or parts of it, as a file."""
    head = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(entries)) + b"".join(entries))
    offset = 0
    for name, (dims, kind, data) in tensors.items():
        head += _string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
        offset += -(-len(data) // ALIGNMENT) * ALIGNMENT
    with open(path, "wb") as file:
        file.write(head + b"\0" * (-len(head) % ALIGNMENT))
        for _, _, data in tensors.values():
            file.write(data + b"\0" * (-len(data) % ALIGNMENT))
