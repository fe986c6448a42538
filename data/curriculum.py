"""Which questions reinforcement learning is shown, and when: by how often they are answered right already.

Sources:  [Ultra] Nemotron 3 Ultra report, arXiv 2606.15007, RLVR · [Llama-Nemotron] arXiv 2505.00949, section 5.1
Contents: 1 quotas   2 pools   3 plan
"""
from __future__ import annotations

import math
from collections.abc import Callable
from random import Random

from tqdm import tqdm

from data.tasks import Task

# %% 1 · Quotas  [Ultra, RLVR; Llama-Nemotron, 5.1]
# A prompt that always or never succeeds has no advantage. So pass rates are measured first, solved prompts leave, and each batch draws most from
# prompts around a pass rate that falls during training: easy ones first, hard ones last. Domains keep fixed shares.

def largest_remainders(shares: list[float], total: int) -> list[int]:
    """Whole numbers in proportion to shares, of sum total.   shares 2 1 1, total 5 -> 3 1 1"""
    exact = [total * s / sum(shares) for s in shares]
    whole = [math.floor(x) for x in exact]
    for i in sorted(range(len(exact)), key=lambda i: (whole[i] - exact[i], i))[:total - sum(whole)]: whole[i] += 1
    return whole


def gaussian_quotas(pass_rates: list[float], mean: float, sigma: float, total: int) -> list[int]:
    """How many prompts to take from each bin, in proportion to exp(-(p - mean)² / 2 sigma²).   bins .1 .5 .9, mean .5, sigma .2, 10 -> 1 8 1"""
    nearest = min(abs(p - mean) for p in pass_rates)      # taken off, so that bins far from the mean are not all 0
    return largest_remainders([math.exp((nearest ** 2 - (p - mean) ** 2) / (2 * sigma ** 2)) for p in pass_rates], total)


def gaussian_curriculum(pools: dict[str, dict[float, list]], shares: dict[str, float], progress: float, total: int, start: float = 0.7,
                        end: float = 0.3, sigma: float = 0.15) -> list:
    """`total` prompts for the batch at `progress` in [0, 1]. pools: domain -> pass rate of a bin -> prompts, used from the front and removed.

    ours: start, end and sigma (the report gives words only). A bin with too few prompts is refilled from the domain's fullest bin. ValueError when a
    domain has too few prompts altogether.
    """
    picked = []
    for domain, count in zip(shares, largest_remainders(list(shares.values()), total)):
        bins = pools[domain]
        rates, left = sorted(bins), sum(map(len, bins.values()))
        if left < count: raise ValueError(f"{domain} has {left} prompts left and the batch asks for {count}: profile more of them.")
        for rate, want in zip(rates, gaussian_quotas(rates, start + (end - start) * progress, sigma, count)):
            for _ in range(want): picked.append((bins[rate] or max(bins.values(), key=len)).pop(0))
    return picked


# %% 2 · Pools

class NothingToLearn(ValueError):
    """No prompt, or no turn, is answered right sometimes and sometimes not."""


Found = list[tuple[Task, float]]                # prompts and their pass rates
Pools = dict[str, dict[float, list[Task]]]      # domain -> pass rate -> prompts


def by_level(found: Found) -> dict[tuple[str, str, int], Found]:
    """By domain, family and level."""
    groups: dict[tuple[str, str, int], Found] = {}
    for task, rate in found: groups.setdefault((task.domain, task.family, task.level), []).append((task, rate))
    return groups


def pass_rates(ask: Callable[[list[Task]], list[float]], asked: list[Task], answers: int, rows: int) -> Found:
    """How often each prompt is answered right, measured in pieces of about `rows` answers. ask: prompts -> scores, `answers` of each in a row."""
    found, some = [], rows // answers + 1
    for start in tqdm(range(0, len(asked), some), desc="pass rates", unit="batch"):
        scores = ask(piece := asked[start:start + some])
        found += [(task, sum(scores[i * answers:(i + 1) * answers]) / answers) for i, task in enumerate(piece)]
    return found


def mean_rate(found: Found) -> float: return sum(rate for _, rate in found) / len(found)


def levels_to_learn(found: Found, band: tuple[float, float]) -> list[tuple[str, str, int]]:
    """(domain, family, level): of each family the highest level whose mean pass rate lies in `band`, with some prompt that is solved now and then,
    and the easier ones, ours: with the hardest alone, what was known before was forgotten."""
    groups = by_level(found)
    fits = [key for key, mine in groups.items() if band[0] <= mean_rate(mine) <= band[1] and any(0 < rate < 1 for _, rate in mine)]
    return [key for key in groups if any(key[:2] == other[:2] and key[2] <= other[2] for other in fits)]


def make_pools(found: Found, band: tuple[float, float]) -> tuple[Pools, list[list]]:
    """(pools, a table row for each family and level: name, domain, prompts, mean pass rate, shares never and always solved, prompts used).

    Prompts that are always or never solved leave. Used are levels_to_learn; a domain without any takes all that are left. NothingToLearn if none are.
    """
    groups, fits, pools, table = by_level(found), levels_to_learn(found, band), {}, []
    for (domain, family, level), mine in groups.items():
        used = (domain, family, level) in fits or domain not in {d for d, *_ in fits}
        left = [(task, rate) for task, rate in mine if 0 < rate < 1] if used else []
        for task, rate in left: pools.setdefault(domain, {}).setdefault(rate, []).append(task)
        never, always = (sum(rate == end for _, rate in mine) / len(mine) for end in (0, 1))
        shares = [f"{x:.0%}" for x in (mean_rate(mine), never, always)]
        table.append([f"{family}, level {level}", domain, len(mine), *shares, len(left) if used else "-"])
    if not pools: raise NothingToLearn("no prompt is solved sometimes: begin with a better checkpoint, or profile more prompts.")
    return pools, table


# %% 3 · Plan

def make_plan(pools: Pools, steps: int, prompts: int, curriculum: tuple[float, float, float], medium: float, seed: int
              ) -> list[list[tuple[Task, str]]]:
    """(question, mode) of every step, domains in equal shares; a domain that runs out begins its prompts anew, in another order."""
    rng, left, plan = Random(seed), {domain: {} for domain in pools}, []
    for step in range(steps):
        turned = list(pools)[step % len(pools):] + list(pools)[:step % len(pools)]      # what cannot be shared equally goes round
        shares = dict.fromkeys(turned, 1.0)
        for domain, count in zip(shares, largest_remainders(list(shares.values()), prompts)):
            while sum(map(len, left[domain].values())) < count:
                for rate, some in pools[domain].items(): left[domain].setdefault(rate, []).extend(rng.sample(some, len(some)))
        picked = gaussian_curriculum(left, shares, step / max(steps - 1, 1), prompts, *curriculum)
        plan.append([(task, "medium" if rng.random() < medium else "regular") for task in picked])
    return plan
