"""Laws of the classifier: padding, pieces, strands, prefixes; and what a pretrained backbone may be loaded into."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from seqlab import homology
from seqlab.classifier import (
    ClassifierConfig,
    KmerEmbedding,
    SequenceClassifier,
    StreamState,
    load_pretrained,
)
from seqlab.errors import UserError
from seqlab.heads.classification import ClassificationHead, evenly_spread_ends
from seqlab.model import ModelConfig, build_model
from seqlab.tokenizers import nucleotide

SMALL = dict(d_model=16, n_layer=2, d_state=4)


def classifier(n_outputs=3, **options):
    torch.manual_seed(0)
    model = SequenceClassifier(ClassifierConfig(**{**SMALL, **options}), n_outputs).eval()
    with torch.no_grad():  # answers that differ visibly
        model.head.linear.weight.normal_(std=0.5)
        model.head.linear.bias.normal_()
        if model.head.next_base is not None:
            model.head.next_base.weight.normal_()
            model.head.gain.fill_(1.0)
        if model.head.length_scale is not None:
            model.head.length_scale.copy_(torch.tensor([0.3, 0.5]))
        if model.genes is not None:  # as if they had been fitted
            model.genes.emissions.copy_((0.5 * torch.randn_like(model.genes.emissions)).softmax(-1))
            model.genes.transitions.copy_(torch.randn_like(model.genes.transitions).softmax(-1))
            model.genes.start.copy_(torch.randn_like(model.genes.start).softmax(-1))
            model.gene_input.weight.normal_()
            model.head.mix.normal_(std=0.3)
            model.head.prior_scale.copy_(torch.tensor([0.7, 1.0, 1.2]))
        if model.repeats is not None:  # every other word
            words = np.arange(4**model.repeats.length, step=2)
            model.repeats.fit(words, np.stack([words % 7, words % 3, words % 5], 1) > 0)
            model.head.repeat_scale.copy_(torch.tensor([5.0, 0.5]))
        if model.homology is not None:  # as if fitted: the first classes hold what `sequence` gives
            held = [[sequence(100)[0].numpy() - nucleotide.A], [sequence(64, seed=64)[0].numpy() - nucleotide.A], []]
            model.homology.keep(homology.keep(held, 1000))
            for weight in model.homology.parameters():
                weight.normal_(std=0.3)
            model.homology.scale.copy_(torch.tensor([[1.5, 0.3]]))
        if model.composition is not None:
            model.composition.weight.normal_(std=5.0)
            model.composition.scale.copy_(torch.tensor([[1.5, 0.3]]))
    return model


def sequence(length, rows=1, seed=1):
    return torch.randint(7, 11, (rows, length), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


KINDS = [
    dict(pooling="mean", strand="none"),
    dict(pooling="mean", length_scale=True),
    dict(pooling="last"),
    dict(pooling="max", strand="augment"),
    dict(kmer=3),
    dict(kmer=3, period=3),
    dict(pooling="evidence", length_scale=True),
    dict(pooling="evidence", gene_order=2),
    dict(pooling="evidence", repeat_word=8),
    dict(pooling="evidence", gene_order=2, kmer=3, repeat_word=8),
    dict(pooling="evidence", homology=1000, strand="none"),
    dict(pooling="evidence", composition=3),
    dict(pooling="evidence", gene_order=2, repeat_word=8, homology=1000, composition=2),
    dict(direction="bidirectional"),
    dict(direction="bidirectional", pooling="max", strand="equivariant"),
    dict(direction="bidirectional", pooling="centre", strand="equivariant"),
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_padding_and_company_change_nothing(kind):
    model = classifier(**kind)
    lengths = [1, 5, 33, 64]
    rows = [sequence(length, seed=length) for length in lengths]
    ids = torch.full((4, 80), nucleotide.PAD, dtype=torch.uint8)
    for row, own in zip(ids, rows):
        row[: own.shape[1]] = own[0]
    mask = torch.arange(80) < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        together = model(ids, mask)
        alone = torch.cat([model(row) for row in rows])
    assert torch.allclose(together, alone, atol=1e-5)
    assert not torch.allclose(model(ids), together, atol=1e-3)  # without the mask the padding is read


@pytest.mark.parametrize("kind", [k for k in KINDS if k.get("direction") != "bidirectional"], ids=str)
@pytest.mark.parametrize("cuts", [(20, 50), (1, 2), (64, 89)])
def test_pieces_equal_the_whole(kind, cuts):
    model = classifier(**kind)
    ids = sequence(100)
    mask = torch.arange(100)[None] < 90
    with torch.no_grad():
        whole = model.finish(model.feed(ids, mask))
        state, at = None, 0
        for end in (*cuts, 100):
            state = model.feed(ids[:, at:end], mask[:, at:end], state, more=end < 100)
            at = end
        assert torch.allclose(model.finish(state), whole, atol=1e-5)


def test_pieces_of_a_bidirectional_model_are_averaged_by_length():
    model = classifier(direction="bidirectional", strand="none")
    a, b = sequence(40), sequence(10, seed=2)
    with torch.no_grad():
        state = model.feed(b, state=model.feed(a, more=True))
        expected = 0.8 * model(a) + 0.2 * model(b)
        assert torch.allclose(model.finish(state), expected, atol=1e-5)


def test_kmers_are_those_that_end_at_each_position():
    embedding = KmerEmbedding(3, 2)
    with torch.no_grad():
        embedding.table.weight[:-1, 0] = torch.arange(64.0)
    ids = torch.from_numpy(nucleotide.encode("ACGTNACG"))[None]
    codes = embedding(ids)[0, :, 0].tolist()
    acg, cgt = 0 * 16 + 1 * 4 + 2, 1 * 16 + 2 * 4 + 3
    assert codes == [0, 0, acg, cgt, 0, 0, 0, acg] and embedding(ids)[0, 4].abs().sum() == 0
    assert embedding(ids[:, 2:], ids[:, :2])[0, 0, 0] == acg


def test_the_period_tells_positions_apart_and_comes_round():
    model = classifier(period=3, strand="none", n_layer=1)
    with torch.no_grad():
        model.clock.weight.normal_()
        features = [model.features(torch.full((1, 1), nucleotide.A), before=StreamState(None, None, position=at)).value for at in range(6)]
    assert torch.equal(features[0], features[3]) and torch.equal(features[2], features[5])
    assert not torch.allclose(features[0], features[1]) and not torch.allclose(features[1], features[2])


def test_a_sequence_of_padding_alone_answers_with_the_bias():
    model = classifier()
    ids = sequence(8)
    with torch.no_grad():
        outputs = model(ids, torch.zeros(1, 8, dtype=torch.bool))
    assert torch.allclose(outputs[0], model.head.linear.bias)


@pytest.mark.parametrize("pooling", ["mean", "max", "last", "centre", "evidence"])
def test_a_sequence_without_a_base_answers_as_padding_alone(pooling):
    """Of all poolings but the mean it ended in an IndexError of torch."""
    direction = "bidirectional" if pooling == "centre" else "causal"
    model = SequenceClassifier(ClassifierConfig(d_model=8, n_layer=1, d_state=2, direction=direction, pooling=pooling, kmer=3), 3).eval()
    ids = torch.randint(7, 11, (2, 9))
    with torch.no_grad():
        assert torch.equal(model(ids[:, :0]), model(ids, torch.zeros(2, 9, dtype=torch.bool)))
        if direction == "causal":
            state = model.feed(ids, state=model.feed(ids[:, :0], more=True))
            assert torch.equal(model.finish(state), model.finish(model.feed(ids)))


@pytest.mark.parametrize("strand,is_invariant", [("none", False), ("augment", False), ("average", True), ("equivariant", True)])
def test_strands(strand, is_invariant):
    model = classifier(strand=strand)
    ids = sequence(50, rows=2)
    mask = torch.arange(50) < torch.tensor([[50], [31]])
    other = model.reverse_complement(ids, mask)
    assert torch.equal(other[0], nucleotide.reverse_complement(ids[0]))
    assert torch.equal(other[1, :31], nucleotide.reverse_complement(ids[1, :31]))
    with torch.no_grad():
        same = torch.allclose(model(ids, mask), model(other, mask), atol=1e-5)
        assert same == is_invariant
        model.train()
        same = torch.allclose(model(ids, mask), model(other, mask), atol=1e-5)
        assert same == (strand == "equivariant")  # `average` trains on one strand at a time


@pytest.mark.parametrize("pooling", ["mean", "last", "evidence"])
def test_prefixes_equal_separate_sequences(pooling):
    model = classifier(pooling=pooling, strand="none", length_scale=pooling != "last")
    ids = sequence(100, rows=2)
    mask = torch.arange(100) < torch.tensor([[100], [60]])
    ends = torch.tensor([16, 32, 64, 100])
    with torch.no_grad():
        outputs = model.head.prefixes(model.read(ids, mask), ends, mask)
        for j, end in enumerate(ends.tolist()):
            assert torch.allclose(outputs[:, j], model(ids[:, :end], mask[:, :end]), atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "evidence"])
def test_segments_equal_separate_pooling(pooling):
    head = classifier(length_scale=True, pooling=pooling).head
    features = torch.randn(2, 100, 16 if pooling == "mean" else 19)
    mask = torch.arange(100) < torch.tensor([[100], [40]])
    with torch.no_grad():
        levels = head.segments(features, 32, mask)
        assert [outputs.shape[1] for outputs, _ in levels] == [4, 2, 1]
        assert levels[0][1].tolist() == [[True] * 4, [True, True, False, False]]
        for (outputs, used), size in zip(levels, (32, 64, 128)):
            for j in range(outputs.shape[1]):
                part = slice(j * size, (j + 1) * size)
                expected = head(head.pool(features[:, part], mask[:, part]))
                assert torch.allclose(outputs[used[:, j], j], expected[used[:, j]], atol=1e-5)
    with pytest.raises(ValueError, match="mean"):
        classifier(pooling="last").head.segments(features, 32)


def test_evidence_is_the_mean_log_probability_each_class_gave_to_the_bases():
    model = classifier(pooling="evidence", length_scale=True, strand="none")
    ids = torch.cat([sequence(20), torch.tensor([[nucleotide.N]], dtype=torch.uint8), sequence(11, seed=3)], 1)
    with torch.no_grad():
        features = model.features(ids).value
        head = model.head
        before = torch.cat([torch.zeros(1, 1, 16), features[:, :-1]], 1)
        p = (before @ head.next_base.weight.T + head.next_base.bias).view(32, 3, 4).softmax(-1)
        given = [sum(p[i, c, int(t) - nucleotide.A].log() for i, t in enumerate(ids[0]) if t != nucleotide.N) / 32 for c in range(3)]
        given = torch.stack(given)
        expected = head.linear(features.mean(1)) + head.gain.exp() * (given - given.mean())
        expected = expected * torch.exp(head.length_scale[0] + head.length_scale[1] * torch.tensor(32 / 1024).log())
        assert torch.allclose(model(ids), expected, atol=1e-4)
        # what a base is, is not known where it is predicted
        other = ids.clone()
        other[0, 30] = nucleotide.A if ids[0, 30] != nucleotide.A else nucleotide.C
        read = [model.read(x)[0, :, 16:] for x in (ids, other)]
        assert torch.equal(read[0][:30], read[1][:30]) and not torch.allclose(read[0][30], read[1][30])


def test_gene_models_are_what_the_predictions_of_the_bases_begin_with():
    model = classifier(pooling="evidence", strand="none", gene_order=2)
    ids = torch.cat([sequence(20), torch.tensor([[nucleotide.N]], dtype=torch.uint8), sequence(11, seed=3)], 1)
    digits = nucleotide.DIGITS[ids[0].numpy()]
    with torch.no_grad():
        features = model.features(ids)
        read, nats = model.read(ids)[0, :, 16:], []
        for c in range(3):
            tables = [getattr(model.genes, name)[c].double().numpy() for name in ("emissions", "transitions", "start")]
            q, prior = tables[2], []
            for t, v in enumerate(digits):
                known = 0  # without a gap, among the two before
                while known < 2 and t - known > 0 and digits[t - known - 1] < 4:
                    known += 1
                code = sum(int(digits[t - 1 - j]) * 4**j for j in range(known))
                E = tables[0][(4**known - 1) // 3 + code]  # contexts of no base, of one, of two
                prior.append(np.log(q @ E))
                q = (q * E[:, v] / (q @ E)[v] if v < 4 else q) @ tables[1]
            prior = torch.from_numpy(np.array(prior))
            torch.testing.assert_close(features.prior[0, :, c].double(), prior, rtol=1e-4, atol=1e-5)
            nats.append([float(prior[t, v]) if v < 4 else 0.0 for t, v in enumerate(digits)])
            before = torch.cat([torch.zeros(1, 16), features.value[0, :-1]]).double()
            part = slice(4 * c, 4 * c + 4)
            logits = before @ model.head.next_base.weight[part].T.double() + model.head.next_base.bias[part].double()
            logits = logits + model.head.prior_scale[c].double() * prior
            for t, v in enumerate(digits):
                expected = float(logits[t].log_softmax(0)[v]) if v < 4 else 0.0
                assert float(read[t, c]) == pytest.approx(expected, abs=1e-4)
        nats = torch.tensor(nats).T
        base = torch.from_numpy(np.where(digits < 4, digits.astype(np.int64), -1))[None]
        lead = model.genes(base)[0].lead[0]
        torch.testing.assert_close(lead, nats - nats.mean(-1, keepdim=True), rtol=1e-4, atol=1e-5)
        # the classes' evidence speaks for each other too
        evidence = read.mean(0) - read.mean()
        expected = model.head.linear(features.value.mean(1))[0] + model.head.gain.exp() * (evidence + model.head.mix @ evidence)
        assert torch.allclose(model(ids)[0], expected, atol=1e-4)


def test_repeats_count_outside_training_alone():
    model = classifier(pooling="evidence", strand="none", repeat_word=8)
    ids = torch.cat([sequence(20), torch.tensor([[nucleotide.N]], dtype=torch.uint8), sequence(15, seed=3)], 1)
    text = nucleotide.decode(ids[0].numpy())
    found = np.zeros((36, 3))
    for end in range(8, 37):
        word = text[end - 8 : end]
        if "N" not in word:
            other = word[::-1].translate(str.maketrans("ACGT", "TGCA"))
            code = min(int("".join(str("ACGT".index(c)) for c in w), 4) for w in (word, other))
            found[end - 1] = (np.array([code % 7, code % 3, code % 5]) > 0) * (code % 2 == 0)
    assert (found > 0).any(0).all()
    with torch.no_grad():
        read = model.read(ids)[0]
        assert torch.allclose(read[:, 19:].double(), torch.from_numpy(found), atol=1e-5)
        with_them, scale = model(ids)[0].double(), model.head.repeat_scale.clone()
        model.head.repeat_scale.zero_()
        mean = torch.from_numpy(found.mean(0))
        expected = model(ids)[0].double() + 5.0 * (36 / 1024) ** 0.5 * (mean - mean.mean())
        assert torch.allclose(with_them, expected, atol=1e-4)
        model.head.repeat_scale.copy_(scale)
        assert model.train().read(ids)[0, :, 19:].abs().max() == 0


def test_a_fresh_head_predicts_what_the_gene_models_do():
    torch.manual_seed(0)
    model = SequenceClassifier(ClassifierConfig(**SMALL, pooling="evidence", gene_order=2, strand="none"), 3).eval()
    with torch.no_grad():
        model.genes.emissions.copy_(torch.randn_like(model.genes.emissions).softmax(-1))
        ids = sequence(50)
        given = model.features(ids).prior[0].gather(-1, (ids[0].long() - nucleotide.A)[:, None, None].expand(50, 3, 1))[..., 0]
        assert torch.allclose(model.read(ids)[0, :, 16:], given, atol=1e-5)
    ids = sequence(50, rows=2)
    model.train()
    torch.nn.functional.cross_entropy(model(ids), torch.tensor([0, 2])).backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {"gene_input.weight", "head.next_base.weight", "head.prior_scale", "head.mix"} <= moved


def test_ends_double_up_to_the_whole():
    assert evenly_spread_ends(1024, 256) == [256, 512, 1024]
    assert evenly_spread_ends(1000, 256) == [256, 512, 1000]
    assert evenly_spread_ends(100, 256) == [100]


def test_length_scale_changes_confidence_not_decisions():
    head = ClassificationHead(4, 3, length_scale=True)
    with torch.no_grad():
        head.length_scale.copy_(torch.tensor([0.0, 0.5]))
        head.linear.weight.normal_()
        features = torch.randn(1, 1024, 4)
        short, long = head(head.pool(features)), head(head.pool(torch.cat([features] * 4, 1)))
    assert torch.allclose(long, 2 * short, atol=1e-5)  # (4096 / 1024) ** 0.5
    with pytest.raises(ValueError, match="mean"):
        ClassificationHead(4, 3, "last", length_scale=True)


@pytest.mark.parametrize("bad,word", [
    (dict(pooling="last", direction="bidirectional"), "causal"),
    (dict(pooling="centre"), "bidirectional"),
    (dict(pooling="max", length_scale=True), "mean"),
    (dict(pooling="evidence", direction="bidirectional"), "causal"),
    (dict(pooling="evidence", gene_order=7), "gene_order"),
    (dict(gene_order=5), "evidence"),
    (dict(repeat_word=24), "evidence"),
    (dict(pooling="evidence", repeat_word=32), "repeat_word"),
    (dict(vocab_size=0), "vocab_size"),
    (dict(kmer=1), "kmer"),
    (dict(period=1), "period"),
])
def test_impossible_configurations(bad, word):
    with pytest.raises(ValueError, match=word):
        ClassifierConfig(**bad)


@pytest.mark.parametrize("strand", ["augment", "equivariant"])
def test_a_language_models_backbone_is_loaded(tmp_path, strand):
    direction = "bidirectional" if strand == "equivariant" else "causal"
    complement = torch.from_numpy(nucleotide.COMPLEMENT.astype("int64"))
    language = build_model(ModelConfig(**SMALL, strand=strand, direction=direction), complement)
    save_file({k: v for k, v in language.state_dict().items() if "lm_head" not in k and "mamba_rev.in" not in k
               and "mamba_rev.out" not in k}, tmp_path / "model.safetensors")
    model = classifier(direction=direction)
    head = model.head.linear.weight.clone()
    load_pretrained(model, tmp_path / "model.safetensors")
    theirs = language.model if strand == "equivariant" else language
    for (name, a), (_, b) in zip(theirs.backbone.named_parameters(), model.backbone.named_parameters()):
        assert torch.equal(a, b), name
    assert torch.equal(theirs.embedding.weight, model.embedding.weight)
    assert torch.equal(head, model.head.linear.weight)


def test_a_classifiers_kmers_are_loaded_too(tmp_path):
    from safetensors.torch import save_model

    theirs, ours, plain = classifier(kmer=3), classifier(kmer=3, n_outputs=5), classifier(n_outputs=5)
    with torch.no_grad():
        theirs.kmer_embedding.table.weight.normal_()
    save_model(theirs, tmp_path / "model.safetensors")
    load_pretrained(ours, tmp_path / "model.safetensors")
    assert torch.equal(theirs.kmer_embedding.table.weight, ours.kmer_embedding.table.weight)
    load_pretrained(plain, tmp_path / "model.safetensors")
    assert torch.equal(theirs.embedding.weight, plain.embedding.weight)


def test_what_does_not_fit_is_one_clear_line(tmp_path):
    path = tmp_path / "model.safetensors"
    language = build_model(ModelConfig(**SMALL))
    save_file({k: v for k, v in language.state_dict().items() if "lm_head" not in k}, path)
    with pytest.raises(UserError, match="d_model"):
        load_pretrained(classifier(d_model=32), path)
    with pytest.raises(UserError, match="n_layer"):
        load_pretrained(classifier(n_layer=1), path)
    with pytest.raises(UserError, match="lacks .*n_layer"):
        load_pretrained(classifier(n_layer=3), path)
    with pytest.raises(UserError, match="direction"):
        load_pretrained(classifier(direction="bidirectional"), path)
    (tmp_path / "manifest.json").write_text('{"vocab": ["a", "b"]}')
    with pytest.raises(UserError, match="vocabularies"):
        load_pretrained(classifier(), path, list(nucleotide.VOCAB))
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="damaged"):
        load_pretrained(classifier(), tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match="no such checkpoint"):
        load_pretrained(classifier(), tmp_path / "none")


def test_a_frozen_backbone_trains_its_head_alone():
    model = classifier()
    model.freeze_backbone()
    model(sequence(20)).sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {"head.linear.weight", "head.linear.bias"}


@pytest.mark.parametrize("length, places", [(1, (0, 0)), (6, (2, 3)), (7, (3, 3))])
def test_the_centre_is_the_middle_of_the_real_positions(length, places):
    head = ClassificationHead(3, 2, "centre")
    features = torch.arange(30.0).reshape(1, 10, 3)
    pooled = head.pool(features, torch.arange(10)[None] < length)
    assert torch.equal(pooled.value[0], features[0, list(places)].mean(0).double())
    if length == 6:
        assert torch.equal(pooled.value, head.pool(features[:, :6]).value)
    with pytest.raises(ValueError, match="whole sequence"):
        head.pool(features, None, pooled)


@pytest.mark.parametrize("pooling", ["mean", "max", "last", "evidence"])
def test_an_empty_piece_changes_nothing_and_a_piece_after_the_last_is_refused(pooling):
    """An empty piece ended in a traceback; after a piece without more=True the next was read as a sequence of its own."""
    torch.manual_seed(0)
    config = ClassifierConfig(d_model=8, n_layer=1, d_state=2, strand="none", pooling=pooling, kmer=3)
    model = SequenceClassifier(config, 3).eval()
    ids = torch.randint(7, 11, (2, 30))
    with torch.no_grad():
        state = model.feed(ids[:, :13], more=True)
        state = model.feed(ids[:, 13:13], state=state, more=True)
        state = model.feed(ids[:, 13:], state=state)
        torch.testing.assert_close(model.finish(model.feed(ids[:, :0], state=state)), model(ids), atol=1e-6, rtol=1e-5)
        with pytest.raises(ValueError, match="was fed as the last; feed it with more=True"):
            model.feed(ids, state=state)
