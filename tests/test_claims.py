"""Claims: verdicts are computed from rows, by bounds that no measurement moves, and every claim can be measured by a command that exists."""
import importlib
import json
import math
import statistics
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "experiments"))
claims = importlib.import_module("claims")
ROWS = claims.read_rows(ROOT / "experiments" / "results.jsonl")
EVERY = [*claims.CLAIMS, *claims.CONTROLS]


def claim(start):
    found = [x for x in EVERY if x.text.startswith(start)]
    assert len(found) == 1, start
    return found[0]


def boosting(before, after):
    both = {f"{when} {way}": values for when, values in (("before", before), ("after", after)) for way in ("greedy", "sampled")}
    return dict(stage="repeats", what="boosting", seeds=list(range(len(before))), tokens_a_pass=both)


def test_the_interval_decides_and_not_the_mean():
    """A mean beyond the bound is no evidence when the interval holds the bound: a rule that looked at means would say `holds` to the second."""
    judge = claims.judge
    assert judge("", 0.1, 0.5, above=0.0).verdict == judge("", -0.5, -0.1, below=0.0).verdict == "holds"
    assert judge("", -0.1, 0.5, above=0.0).verdict == judge("", -0.5, 0.1, below=0.0).verdict == "too small to tell"
    assert judge("", -0.5, -0.1, above=0.0).verdict == judge("", 0.1, 0.5, below=0.0).verdict == "does not hold"
    assert judge("", None, None, above=0.0).verdict == "too small to tell"
    # the nearest end is 3 and 1 half widths of 0.1 away from the bound
    assert judge("", 0.3, 0.5, above=0.0).margin == pytest.approx(3) and judge("", -0.3, -0.1, above=0.0).margin == pytest.approx(1)
    assert judge("", 0.3, 0.5, below=0.7).margin == pytest.approx(2)
    with pytest.raises(AssertionError, match="one bound"): judge("", 0.0, 1.0)


def test_intervals_are_those_of_the_books():
    """Student: 2.776 standard errors of five values. Wilson and Newcombe: the worked example of Newcombe 1998, 56 of 70 against 48 of 80."""
    values = [1.0, 2.0, 4.0, 4.0, 9.0]
    mean, low, high = claims.t_interval(values)
    error = statistics.stdev(values) / 5 ** 0.5
    assert mean == 4 and (high - mean) / error == pytest.approx(2.776) and mean - low == pytest.approx(high - mean)
    assert claims.t_interval([3.0]) == (3.0, None, None)
    difference = claims.apart(claims.wilson(56, 70), claims.wilson(48, 80))
    assert difference == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)


def test_a_verdict_follows_the_rows():
    """The same claim, with rows that say yes, no, and nothing; and no row at all."""
    text = claim("boosting the MTP head")
    assert text.verdict([]) == ("no row yet", "no row", 0.0)
    assert text.verdict([boosting([4.0, 4.1, 4.0], [4.4, 4.5, 4.4])]).verdict == "holds"
    assert text.verdict([boosting([4.0, 4.1, 4.0], [3.6, 3.7, 3.6])]).verdict == "does not hold"
    assert text.verdict([boosting([4.0, 4.1, 4.0], [4.4, 3.9, 4.1])]).verdict == "too small to tell"
    one = text.verdict([boosting([4.0], [4.4])])
    assert one.verdict == "too small to tell" and one.ours == "+10.0 % (one seed): 4.00 to 4.40"
    # the newest row counts
    assert text.verdict([boosting([4.0, 4.1, 4.0], [4.4, 4.5, 4.4]), boosting([4.0, 4.1, 4.0], [3.6, 3.7, 3.6])]).verdict == "does not hold"


def test_what_is_counted_must_match_the_published_digits():
    """A scale rule half a point off, or a head of another size, must not pass as reproduced."""
    sizes = claim("parameters of Ultra")
    row = dict(stage="04_model", preset="ultra", total=549_308_993_536, active=54_985_101_312, mtp=11_215_610_368)
    assert sizes.verdict([row]).verdict == "holds" and sizes.verdict([row | dict(mtp=11_225_610_368)]).verdict == "does not hold"
    rule = claim("Four-Over-Six scales")
    change = lambda x: [dict(stage="01_nvfp4", mse_change=dict(four_over_six=x, mse=-0.27))]
    assert rule.verdict(change(-0.1645)).verdict == "holds" and rule.verdict(change(-0.158)).verdict == "does not hold"


def test_one_seed_of_post_training_decides_nothing():
    """Its interval is over questions of one model: another seed may lie elsewhere, as the two seeds of RLVR do."""
    def rows(*by_seed):
        row = dict(stage="posttrain", what="comparison", full=True, kind="difference", name="MOPD round 2 - RLVR", domain="all", n=80, mean=5.0,
                   low=4.0, high=6.0, by_seed=list(by_seed))
        return [row, dict(stage="posttrain", what="settings", full=True, settings=dict(model="course"))]
    two = claim("two rounds of distillation raise")
    assert two.verdict(rows(5.0)).verdict == "too small to tell" and two.verdict(rows(4.5, 5.5)).verdict == "holds"


def test_the_worst_ingredient_and_the_worst_domain_speak_for_all():
    gap = lambda name, *gaps: dict(stage="nvfp4_gap", what="gap", kind="difference", name=name, gaps=list(gaps), seeds=list(range(len(gaps))),
                                   mean=statistics.mean(gaps))
    each = claim("each ingredient")
    good, bad, open_ = (0.01, 0.011, 0.012), (-0.01, -0.011, -0.012), (0.01, -0.01, 0.0)
    assert each.verdict([gap("no-rht", *good), gap("weight-rows", *good)]).verdict == "holds"
    assert each.verdict([gap("no-rht", *good), gap("weight-rows", *open_)]).verdict == "too small to tell"
    assert each.verdict([gap("no-rht", *good), gap("weight-rows", *bad)]).verdict == "does not hold"


def test_the_first_page_shows_one_claim_a_stage_by_its_margin_alone():
    """Neither a failed claim is left out for one that holds, nor a decided one for one without rows."""
    def made(stage, text, verdict, margin): return claims.Claim(stage, text, "", "", "", "", "CPU", lambda rows: claims.Found("", verdict, margin))
    some = [made(2, "a", "holds", 1.0), made(2, "b", "does not hold", 3.0), made(1, "c", "no row", 0.0), made(1, "d", "holds", 0.5),
            made(3, "e", "too small to tell", 0.0), made(3, "f", "no row", 0.0), made(2, "g", "holds", 3.0)]
    assert [x.text for x in claims.strongest([], some)] == ["d", "b", "e"]
    assert [x.stage for x in claims.strongest(ROWS)] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_every_claim_is_whole():
    """At least 16 with rows, each with a figure, a source and a known machine; and no text of a verdict stands in the list itself."""
    found = [x.verdict(ROWS) for x in claims.CLAIMS]
    assert sum(x.verdict != claims.NO_ROW for x in found) >= 16 and len({x.text for x in EVERY}) == len(EVERY)
    assert all(x.text and x.published and x.source and x.measured and x.on in ("CPU", "one H200") for x in EVERY)
    assert all(0 <= x.margin and (x.margin == 0 or x.verdict in (claims.HOLDS, claims.FAILS)) for x in found)
    assert not any(math.isnan(x.margin) or "nan" in x.ours for x in found)


def test_a_cell_breaks_no_table():
    """A bar or a line break inside a cell would shift every column behind it."""
    for line in claims.table_all(ROWS).splitlines()[2:]: assert line.count(" | ") == 8 and line.startswith("| ") and line.endswith(" |"), line
    assert len(claims.table_all(ROWS).splitlines()) == len(claims.CLAIMS) + 2
    assert json.dumps(claims.tally(ROWS))
