"""The gradient of token embeddings: that of torch, and on a GPU the same bits twice."""

import pytest
import torch
import torch.nn.functional as F

from seqlab import embedding
from seqlab.embedding import TokenEmbedding


@pytest.mark.parametrize("rows", [1, 5, 10, 1000])
def test_the_gradient_is_that_of_torch(monkeypatch, rows):
    monkeypatch.setattr(embedding, "ROWS", rows)
    torch.manual_seed(0)
    weight = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, 6, (2, 5))  # one symbol never occurs
    cotangent = torch.randn(2, 5, 3, dtype=torch.float64)
    y = embedding._Lookup.apply(weight, ids)
    torch.testing.assert_close(y, F.embedding(ids, weight))
    (ours,) = torch.autograd.grad(y, weight, cotangent)
    (theirs,) = torch.autograd.grad(F.embedding(ids, weight), weight, cotangent)
    torch.testing.assert_close(ours, theirs)
    assert (ours[6] == 0).all()


def test_ids_of_any_integer_type_and_no_ids():
    table = TokenEmbedding(4, 2)
    assert torch.equal(table(torch.tensor([1, 3], dtype=torch.uint8)), table.weight[[1, 3]])
    assert table(torch.empty(0, 3, dtype=torch.uint8)).shape == (0, 3, 2)


def test_derivatives_of_other_kinds_go_through_torch(monkeypatch):
    """On a GPU torch.func.grad of a whole model stopped here, and forward-mode derivatives did."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))  # as far as the table can see
    table, ids, cotangent = TokenEmbedding(5, 3), torch.tensor([[1, 4, 1]]), torch.randn(1, 3, 3)

    def loss(weight):
        return (torch.func.functional_call(table, {"weight": weight}, (ids,)) * cotangent).sum()

    assert type(table(ids).grad_fn).__name__ == "_LookupBackward"
    expected = torch.autograd.grad((table(ids) * cotangent).sum(), table.weight)[0]
    weight, tangent = table.weight.detach(), torch.randn(5, 3)
    torch.testing.assert_close(torch.func.grad(loss)(weight), expected)
    torch.testing.assert_close(torch.func.jvp(loss, (weight,), (tangent,))[1], (expected * tangent).sum())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_the_same_bits_twice_on_a_gpu():
    table = TokenEmbedding(16, 64).cuda()
    ids = torch.randint(0, 16, (2, 200_000), device="cuda")
    cotangent = torch.randn(2, 200_000, 64, device="cuda")
    first, second = (torch.autograd.grad(table(ids), table.weight, cotangent)[0] for _ in range(2))
    assert torch.equal(first, second)
    exact = torch.autograd.grad(F.embedding(ids.cpu(), table.weight.cpu()).double(), table.weight, cotangent.cpu().double())[0]
    torch.testing.assert_close(first.cpu(), exact.float().cpu(), rtol=1e-4, atol=1e-3)
