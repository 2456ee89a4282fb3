"""One nucleotide, one token, one byte: text or bytes <-> ids, and the reverse complement of ids.

Ids follow the vocabulary that HyenaDNA and Caduceus share, so their weights load unrenumbered:

    [CLS] 0  [SEP] 1  [BOS] 2  [MASK] 3  [PAD] 4  [RESERVED] 5  [UNK] 6  A 7  C 8  G 9  T 10  N 11

Lower case has the same ids (soft masking is recorded beside the tokens, not in them) and U is read as T. Every other
symbol, the IUPAC ambiguity codes among them, is [UNK]. Models pad the vocabulary to 16 ids.
"""

from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch

    Ids = TypeVar("Ids", np.ndarray, torch.Tensor)

VOCAB = ("[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]", "A", "C", "G", "T", "N")
VOCAB_SIZE = len(VOCAB)
PADDED_VOCAB_SIZE = 16

CLS, SEP, BOS, MASK, PAD, RESERVED, UNK, A, C, G, T, N = range(VOCAB_SIZE)
BASES = (A, C, G, T)


def _encode_table() -> bytes:
    table = bytearray([UNK]) * 256
    for symbol, token in zip("ACGTUN", (A, C, G, T, T, N)):
        table[ord(symbol)] = table[ord(symbol.lower())] = token
    return bytes(table)


def _complement_table(size: int) -> np.ndarray:
    table = np.arange(size, dtype=np.uint8)
    table[[A, C, G, T]] = T, G, C, A
    return table


ENCODE = _encode_table()  # byte of text -> id, for bytes.translate
DIGITS = np.full(256, 4, np.uint8)  # id -> A C G T = 0 1 2 3, anything else 4
DIGITS[list(BASES)] = 0, 1, 2, 3
COMPLEMENT = _complement_table(PADDED_VOCAB_SIZE)  # (16,) uint8: id -> id on the other strand

# One character per id keeps coordinates. [UNK] is written N, as FASTA writes a base that is not known.
_DECODE = b"???_.?NACGTN".ljust(PADDED_VOCAB_SIZE, b"?").ljust(256, b"!")
_COMPLEMENT_BYTES = _complement_table(256).tobytes()


def encode(sequence: bytes | str | np.ndarray) -> np.ndarray:
    """Text -> ids (l) uint8, one id per character.

    `sequence` is text, bytes, or a uint8 array (of any shape, kept) of character codes. Never fails on content:
    symbols outside ACGTUN become [UNK]. Raises TypeError for anything else: bytes() of a number or a tensor is so many zeros.
    """
    if isinstance(sequence, np.ndarray):
        if sequence.dtype != np.uint8:
            raise ValueError(f"character codes must be a uint8 array, got {sequence.dtype}; pass bytes or str")
        return np.frombuffer(bytearray(sequence.tobytes().translate(ENCODE)), np.uint8).reshape(sequence.shape)
    if isinstance(sequence, str):
        sequence = sequence.encode("ascii", "replace")
    elif not isinstance(sequence, (bytes, bytearray, memoryview)):
        raise TypeError(f"sequence must be text, bytes or a uint8 array of character codes, got {type(sequence).__name__}")
    # bytes.translate looks up about 2 GB/s, twice what numpy's fancy indexing does; a bytearray keeps it writable
    return np.frombuffer(bytearray(bytes(sequence).translate(ENCODE)), np.uint8)


def decode(ids: "np.ndarray | torch.Tensor | list[int]") -> str:
    """Ids (l) -> text, one character per id: bases and N as such, [UNK] as N, [MASK] _, [PAD] ., the others ?.

    Raises ValueError for more than one dimension and for ids outside 0 .. 15.
    """
    ids = np.asarray(ids)
    if ids.ndim != 1:
        raise ValueError(f"ids must have one dimension, got shape {ids.shape}; decode row by row")
    if ids.size == 0:
        return ""
    _check(ids)
    return ids.astype(np.uint8).tobytes().translate(_DECODE).decode("ascii")


def reverse_complement(ids: "Ids") -> "Ids":
    """The same molecule read from the other strand: ids (... l), complemented and reversed along the last axis.

    Takes and returns a numpy array or a torch tensor of any integer dtype (a copy, the dtype kept). A <-> T and C <-> G;
    every other id is its own complement. Raises ValueError for ids outside 0 .. 15, TypeError for what is no array.
    """
    if isinstance(ids, np.ndarray):
        _check(ids)
        if ids.dtype != np.uint8:
            return COMPLEMENT[ids[..., ::-1]].astype(ids.dtype)
        flipped = bytearray(ids[..., ::-1].tobytes().translate(_COMPLEMENT_BYTES))
        return np.frombuffer(flipped, np.uint8).reshape(ids.shape)
    import torch

    if not isinstance(ids, torch.Tensor):
        raise TypeError(f"ids must be an array or a tensor, got {type(ids).__name__}; text: reverse_complement(encode(text))")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"ids must be integers, got {ids.dtype}")
    if ids.numel() and not (0 <= int(ids.min()) and int(ids.max()) < PADDED_VOCAB_SIZE):
        raise ValueError(_outside(int(ids.min()), int(ids.max())))
    table = torch.from_numpy(COMPLEMENT).to(device=ids.device, dtype=ids.dtype)
    return table[ids.flip(-1).long()]


def _check(ids: np.ndarray) -> None:
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"ids must be integers, got {ids.dtype}")
    if ids.size and (ids.max() >= PADDED_VOCAB_SIZE or ids.min() < 0):
        raise ValueError(_outside(int(ids.min()), int(ids.max())))


def _outside(low: int, high: int) -> str:
    return f"ids must lie in 0 .. {PADDED_VOCAB_SIZE - 1}, got {low} .. {high}"
