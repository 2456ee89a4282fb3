"""Words that some genome holds more than once: found by hand, on both strands, without what is not known."""

import numpy as np
import torch

from seqlab import repeats
from seqlab.heads.repeats import RepeatCounter


def digits(text):
    return np.array(["ACGTN".index(c) for c in text], np.uint8)


def code(word):
    other = word[::-1].translate(str.maketrans("ACGT", "TGCA"))
    return min(int("".join(str("ACGT".index(c)) for c in w), 4) for w in (word, other))


def test_words_are_found_on_both_strands_if_some_genome_repeats_them():
    # GATTACA twice in the first, once the other way round (TGTAATC); in the second once; N breaks words
    first = [digits("GATTACACCNTGTAATC")]
    second = [digits("GATTACA"), digits("GGGGGGGGG")]
    words, held = repeats.fit([first, second], 7)
    table = dict(zip(words.tolist(), held.tolist()))
    assert table == {code("GATTACA"): [True, True], code("GGGGGGG"): [False, True]}
    counter = RepeatCounter(2, 7)
    counter.fit(words, held)
    base = torch.tensor([["ACGT".find(c) for c in "TGTAATCGGGGGGGN"]])
    found = counter(base)[0]
    assert found[6].tolist() == [1, 1] and found[13].tolist() == [0, 1]
    assert found.sum() == found[6].sum() + found[13].sum()
    # in pieces
    tail = torch.full((1, 6), -1)
    pieces = []
    for piece in base.split([1, 5, 2, 7], 1):
        pieces.append(counter(piece, tail))
        tail = torch.cat([tail, piece], 1)[:, -6:]
    assert torch.equal(torch.cat(pieces, 1)[0], found)
    assert RepeatCounter(2, 7)(base).abs().sum() == 0  # before it is fitted


def test_pieces_of_a_genome_lose_no_word_and_the_most_frequent_are_kept(monkeypatch):
    genome = np.random.default_rng(0).integers(0, 4, 3000).astype(np.uint8)
    genome[2000:2100] = genome[40:140]
    whole = repeats.fit([[genome]], 12)
    assert len(whole[0]) >= 89 and whole[1].all()
    monkeypatch.setattr(repeats, "PIECE", 50)
    pieces = repeats.fit([[genome]], 12)
    assert all(np.array_equal(a, b) for a, b in zip(whole, pieces))
    genome[2500:2550] = genome[40:90]
    monkeypatch.setattr(repeats, "CAPACITY", 39)
    words, _ = repeats.fit([[genome]], 12)
    thrice = {code("".join("ACGT"[v] for v in genome[i : i + 12])) for i in range(40, 80)}  # what follows the third may be the same by chance
    assert len(words) == 39 and set(words.tolist()) <= thrice and (np.diff(words) > 0).all()
    monkeypatch.setattr(repeats, "MOST", 500)
    assert len(repeats._take([genome], 12)) == 10
    empty = repeats.fit([[genome[:5]], [np.full(100, 4, np.uint8)]], 12)
    assert empty[0].shape == (0,) and empty[1].shape == (0, 2)
