"""Drawing a token and accepting drafts, worked by hand: the two functions that decide what a drafted text says."""
import importlib

import torch

infer = importlib.import_module("08_infer")


def double(*values): return torch.tensor(values, dtype=torch.float64)


def test_acceptance_by_hand():
    """Two words, two drafts: kept while u q < p, strictly; nothing counts behind the first rejection; the rest is p less q and nothing below 0;
    behind all drafts the token is drawn from p itself; where p equals q a rejection has no chance, and p serves."""
    p = double([[.5, .5], [.2, .8], [.3, .7]]).expand(5, 3, 2)
    q = double([[.9, .1], [.6, .4]]).expand(5, 2, 2)
    drafts = torch.tensor([[0, 0], [0, 0], [0, 1], [0, 0], [1, 0]])
    u = double([.56, 0.], [.55, .34], [.55, .999], [.55, .33], [.999, .9])
    kept, left = infer.accept(p, q, drafts, u)
    # .56 · .9 > .5 at once;  .55 · .9 < .5, then .34 · .6 > .2;  u q < p where p is larger whatever u;  .33 · .6 < .2;  .999 · .1 < .5, .9 · .6 > .2
    assert kept.tolist() == [0, 1, 2, 2, 1]
    torch.testing.assert_close(left, double([0, .4], [0, .4], [.3, .7], [.3, .7], [0, .4]))
    same = double([[.25, .75]]).expand(1, 1, 2)
    kept, left = infer.accept(torch.cat([same, same], 1), same, torch.tensor([[0]]), double([1.0]))
    assert kept.tolist() == [0] and left.tolist() == [[.25, .75]]
    kept, left = infer.accept(p, q, drafts, u, forced=0.56)            # for benchmarks: by u alone, and the token behind comes from p
    assert kept.tolist() == [0, 2, 1, 2, 0]
    torch.testing.assert_close(left, double([.5, .5], [.3, .7], [.2, .8], [.3, .7], [.5, .5]))


def test_a_draw_inverts_the_distribution_in_its_order():
    """Sums other than 1 are stretched, words of chance 0 never come, u of almost 1 stays inside, and another order draws other words."""
    p = double([0, .2, 0, .2, 0]).expand(5, 5)
    u = double(0, .499, .5, .999, 1 - 2**-53)
    assert infer.draw(p, None, u).tolist() == [1, 1, 3, 3, 3]
    p, order = double([.1, .6, 0, .05, .05]).expand(5, 5), torch.tensor([4, 3, 2, 1, 0]).expand(5, 5)     # sums .05 .1 .1 .7 .8
    assert infer.draw(p, order, double(0, .1, .5, .9, 1 - 2**-53)).tolist() == [4, 3, 1, 0, 0]
