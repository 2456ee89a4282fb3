"""hidden_markov: the reference against sums over all paths, and every back end against the reference."""

import itertools
import math

import pytest
import torch

from seqlab.ops.hidden_markov import BACKENDS, hidden_markov, reference


def example(rows=3, length=40, models=2, contexts=21, states=7, seed=0, device="cpu"):
    """Tables with zeros among the transitions, bases that are not known, rows that start anywhere."""
    g = torch.Generator().manual_seed(seed)
    base = torch.randint(-1, 4, (rows, length), generator=g, dtype=torch.int32)
    context = torch.randint(0, contexts, (rows, length), generator=g, dtype=torch.int32)
    emissions = torch.randn(models, contexts, states, 4, generator=g).softmax(-1)
    transitions = torch.randn(models, states, states, generator=g).exp()
    transitions[torch.rand(models, states, states, generator=g) < 0.3] = 0
    transitions += torch.eye(states) * 0.1
    transitions /= transitions.sum(-1, keepdim=True)
    start = torch.randn(rows, models, states, generator=g).softmax(-1)
    return [x.to(device) for x in (base, context, emissions, transitions, start)]


def exact(base, context, *tables):
    return reference.run(base, context, *(x.double() for x in tables))


def test_the_reference_is_the_sum_over_all_paths():
    base, context, E, A, start = example(rows=2, length=5, states=3)
    log_p, after = hidden_markov(base, context, E, A, start, backend="reference")
    for row, m in itertools.product(range(2), range(2)):
        likelihood = 1.0  # of everything up to here
        for end in range(1, 6):
            ends = torch.zeros(3, dtype=torch.float64)  # by the state after `end` positions
            for path in itertools.product(range(3), repeat=end + 1):
                p = float(start[row, m, path[0]])
                for t in range(end):
                    v = int(base[row, t])
                    p *= float(E[m, context[row, t], path[t], v]) if v >= 0 else 1.0
                    p *= float(A[m, path[t], path[t + 1]])
                ends[path[end]] += p
            v = int(base[row, end - 1])
            if v >= 0:
                assert float(log_p[row, end - 1, m, v]) == pytest.approx(math.log(float(ends.sum()) / likelihood), abs=1e-5)
            assert torch.allclose(after[row, end - 1, m].double(), ends / ends.sum(), atol=1e-6)
            likelihood = float(ends.sum())
    assert torch.allclose(log_p.exp().sum(-1), torch.ones(2, 5, 2), atol=1e-6)


@pytest.mark.parametrize("shape", [{}, dict(rows=1, length=1), dict(rows=37, length=300, models=9), dict(states=13), dict(states=1)], ids=str)
def test_the_cpu_equals_the_reference(shape):
    arguments = example(**shape)
    for found, expected in zip(hidden_markov(*arguments, backend="cpu"), exact(*arguments)):
        torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-6)


def test_a_long_sequence_stays_exact_and_normalised():
    arguments = example(rows=1, length=20_000)
    log_p, after = hidden_markov(*arguments)
    torch.testing.assert_close(after.sum(-1), torch.ones(1, 20_000, 2), rtol=1e-5, atol=0)
    torch.testing.assert_close(log_p.double(), exact(*arguments)[0], rtol=2e-5, atol=1e-5)


def test_rows_do_not_depend_on_their_company_and_pieces_continue():
    base, context, E, A, start = example(rows=5, length=64)
    log_p, after = hidden_markov(base, context, E, A, start)
    alone = hidden_markov(base[3:4], context[3:4], E, A, start[3:4])
    assert torch.equal(alone[0], log_p[3:4]) and torch.equal(alone[1], after[3:4])
    head = hidden_markov(base[:, :23], context[:, :23], E, A, start)
    tail = hidden_markov(base[:, 23:], context[:, 23:], E, A, head[1][:, -1])
    assert torch.equal(torch.cat([head[0], tail[0]], 1), log_p) and torch.equal(torch.cat([head[1], tail[1]], 1), after)
    empty = hidden_markov(base[:, :0], context[:, :0], E, A, start)
    assert empty[0].shape == (5, 0, 2, 4) and empty[1].shape == (5, 0, 2, 7)


def test_wrong_arguments_are_named():
    base, context, E, A, start = example()
    for arguments, words in (
        ((base.long(), context, E, A, start), "base must be"),
        ((base, context[:, 1:], E, A, start), "context is"),
        ((base, context, E[..., :3], A, start), "emissions must be"),
        ((base, context, E, A[:1], start), "transitions is"),
        ((base, context, E, A, start.double()), "start is"),
    ):
        with pytest.raises(ValueError, match=words):
            hidden_markov(*arguments)
    with pytest.raises(ValueError, match="not a back end"):
        hidden_markov(base, context, E, A, start, backend="gpu")
    assert set(BACKENDS) == {"cuda", "cpu", "reference"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
@pytest.mark.parametrize("shape", [{}, dict(rows=1, length=1), dict(rows=37, length=300, models=9), dict(rows=2, length=5000), dict(states=13), dict(states=1)], ids=str)
def test_the_gpu_equals_the_reference(shape):
    arguments = example(**shape)
    found = hidden_markov(*(x.cuda() for x in arguments), backend="cuda")
    for mine, expected in zip(found, exact(*arguments)):
        torch.testing.assert_close(mine.cpu().double(), expected, rtol=2e-5, atol=1e-5)
    again = hidden_markov(*(x.cuda() for x in arguments), backend="cuda")
    assert all(torch.equal(a, b) for a, b in zip(found, again))
