"""The two slow rungs of stage 02 against sums of Python numbers, one head and one entry of the state at a time."""
import importlib
import math

import pytest
import torch

mamba = importlib.import_module("02_mamba")


def scan_of_numbers(x, dt, A, B, C, D, S, doc):
    """y and the last state as nested lists: each head alone, each entry [p][n] of its state alone, each token in its turn."""
    (b, t, h, p), (g, n) = x.shape, B.shape[2:]
    y, state = torch.zeros(b, t, h, p, dtype=torch.float64), S.clone()
    x, dt, A, B, C, D, S, doc = (z.tolist() for z in (x, dt, A, B, C, D, S, doc))
    for row in range(b):
        for head in range(h):
            group = head // (h // g)                          # heads 0 and 1 of four share the first of two groups
            for i in range(p):
                s, before = list(S[row][head][i]), None
                for now in range(t):
                    if doc[row][now] < 0: continue            # no token: no output, nothing forgotten
                    if before is not None and doc[row][now] != before: s = [0.0] * n
                    before, step = doc[row][now], dt[row][now][head]
                    for j in range(n): s[j] = math.exp(step * A[head]) * s[j] + step * x[row][now][head][i] * B[row][now][group][j]
                    y[row, now, head, i] = sum(s[j] * C[row][now][group][j] for j in range(n)) + D[head] * x[row][now][head][i]
                state[row, head, i] = torch.tensor(s, dtype=torch.float64)
    return y, state


def check(rung, documents):
    draw = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)
    b, t, h, p, g, n = 2, 9, 4, 2, 2, 3
    x, B, C, D, S = make(b, t, h, p), make(b, t, g, n), make(b, t, g, n), make(h), make(b, h, p, n)
    dt, A = 0.5 * torch.rand(b, t, h, generator=draw, dtype=torch.float64), -torch.tensor([0.05, 0.5, 2.0, 8.0], dtype=torch.float64)
    doc = torch.tensor([[-1, 5, 5, -1, 5, 2, 2, -1, 5], [0, 0, 0, 1, 1, -1, 1, 1, -1]]) if documents else torch.zeros(b, t, dtype=torch.long)
    want_y, want_state = scan_of_numbers(x, dt, A, B, C, D, S, doc)
    y, state = rung(x, dt, A, B, C, D, state_bhpn=S, doc_bt=doc if documents else None)
    assert (y - want_y).abs().max() < 1e-12 * want_y.abs().max() and (state - want_state).abs().max() < 1e-12 * want_state.abs().max()


documents = pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents and padding"])


@documents
def test_the_recurrence_is_a_sum_of_numbers(documents):
    """Heads in the wrong group, a decay that also fades the new input, a state that outlives its document, a skip left out."""
    check(mamba.ssd_recurrence, documents)


@documents
def test_the_quadratic_form_is_a_sum_of_numbers(documents):
    """The same, and an incoming state that reaches the second document, or a final state of the wrong token."""
    check(mamba.ssd_quadratic, documents)
