"""Nucleotide tokens: ids by hand, round trips, reverse complement in numpy and torch."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqlab.tokenizers import nucleotide
from seqlab.tokenizers.nucleotide import COMPLEMENT, decode, encode, reverse_complement


def test_ids_are_those_of_published_checkpoints():
    assert encode("ACGTNacgtnR").tolist() == [7, 8, 9, 10, 11, 7, 8, 9, 10, 11, 6]
    assert encode("Uu").tolist() == [10, 10]  # RNA is read as T
    assert encode("RYSWKMBDHVryswkmbdhv-*.X7 \n\xe9").tolist() == [6] * 28
    assert nucleotide.VOCAB_SIZE == 12 and nucleotide.BASES == (7, 8, 9, 10)
    assert (nucleotide.MASK, nucleotide.PAD, nucleotide.UNK, nucleotide.N) == (3, 4, 6, 11)


@pytest.mark.parametrize("text", ["", "A", "ACGTN" * 1000])
def test_text_bytes_and_arrays_encode_alike(text):
    expected = encode(text)
    codes = np.frombuffer(text.encode(), np.uint8)
    assert expected.dtype == np.uint8 and len(expected) == len(text)
    for same in (text.encode(), bytearray(text.encode()), memoryview(text.encode()), codes):
        np.testing.assert_array_equal(encode(same), expected)
    expected[:] = 0  # writable: torch.from_numpy warns about arrays that are not


def test_encode_keeps_the_shape_of_an_array_and_refuses_other_dtypes():
    codes = np.frombuffer(b"ACGTNA", np.uint8).reshape(2, 3)
    assert encode(codes[:, ::-1]).tolist() == [[9, 8, 7], [7, 11, 10]]
    with pytest.raises(ValueError, match="uint8"):
        encode(np.array([65, 66]))


def test_every_id_decodes_to_one_character():
    assert decode(np.arange(16)) == "???_.?NACGTN????"
    assert decode(torch.tensor([7, 8, 9, 10])) == "ACGT"
    assert decode([]) == ""
    for bad in ([[7, 8]], [16], [-1], [7.5]):
        with pytest.raises(ValueError):
            decode(np.array(bad))


@given(st.text(alphabet="ACGTN"))
def test_decode_inverts_encode(text):
    assert decode(encode(text)) == text
    assert decode(encode(text.lower())) == text


def test_complement_table():
    assert COMPLEMENT.tolist() == [0, 1, 2, 3, 4, 5, 6, 10, 9, 8, 7, 11, 12, 13, 14, 15]


def test_reverse_complement_by_hand():
    assert decode(reverse_complement(encode("AACGTN"))) == "NACGTT"
    assert reverse_complement(np.array([[7, 3], [8, 6]], np.uint8)).tolist() == [[3, 10], [6, 9]]


@given(
    st.lists(st.integers(0, 15)),
    st.sampled_from([np.uint8, np.int32, np.int64]),
)
def test_reverse_complement_is_an_involution_and_the_same_in_torch(ids, dtype):
    array = np.array(ids, dtype)
    flipped = reverse_complement(array)
    assert flipped.dtype == dtype
    np.testing.assert_array_equal(reverse_complement(flipped), array)
    in_torch = reverse_complement(torch.from_numpy(array))
    assert in_torch.dtype == torch.from_numpy(array).dtype
    np.testing.assert_array_equal(in_torch.numpy(), flipped)


def test_reverse_complement_of_a_batch_is_row_by_row():
    batch = np.random.default_rng(0).integers(0, 12, (3, 4, 50), dtype=np.uint8)
    expected = np.stack([[reverse_complement(row) for row in rows] for rows in batch])
    np.testing.assert_array_equal(reverse_complement(batch), expected)
    np.testing.assert_array_equal(reverse_complement(torch.from_numpy(batch)).numpy(), expected)


@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_ids_outside_the_table_are_refused(make):
    with pytest.raises(ValueError, match="0 .. 15, got 7 .. 16"):
        reverse_complement(make([7, 16]))
    with pytest.raises(ValueError, match="integers"):
        reverse_complement(make([7.0]))


@pytest.mark.parametrize("sequence", [5, None, ["A"], torch.tensor([65, 67], dtype=torch.uint8)])
def test_what_is_no_text_is_refused(sequence):
    """bytes(5), and bytes() of a tensor, are zeros: they were encoded as so many unknown bases."""
    with pytest.raises(TypeError, match="sequence must be text, bytes or a uint8 array"):
        encode(sequence)


@pytest.mark.parametrize("ids", [[7, 8], "ACGT"])
def test_the_reverse_complement_of_what_is_no_array_is_refused(ids):
    with pytest.raises(TypeError, match="ids must be an array or a tensor"):
        reverse_complement(ids)
