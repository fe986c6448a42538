"""Single turns of worked conversations, and whether another turn does what the worked one does: what PivotRL trains on.

Sources: [PivotRL] as the Nemotron 3 Ultra report (arXiv 2606.15007) uses it for its teachers of tool use
"""
from __future__ import annotations

import json
from typing import NamedTuple

from torch import Tensor

from data.tasks import ENVIRONMENTS, Task, parse_completion


class Pivot(NamedTuple):
    """One assistant turn of a worked conversation: what came before it, and what the expert did there."""
    task: Task
    mode: str
    history: list[dict]
    action: dict


def cut_turns(task: Task, messages: list[dict], mode: str) -> list[Pivot]:
    """Every assistant turn of a whole conversation."""
    return [Pivot(task, mode, messages[:i], message) for i, message in enumerate(messages) if message["role"] == "assistant"]


def same_calls(calls: list[dict], others: list[dict]) -> bool:
    """The same tools with the same argument values, whatever the order of calls and arguments and the white space in them."""
    text = lambda value: " ".join((value if isinstance(value, str) else json.dumps(value)).split())
    keys = lambda some: sorted((c["name"], sorted((name, text(value)) for name, value in c["arguments"].items())) for c in some)
    return keys(calls) == keys(others)


def verify_turn(pivot: Pivot, text: str) -> float:
    """1.0 where a finished turn does what the expert's does: his calls, or behind the last response a right answer; else 0.0."""
    thinking = pivot.mode != "off"      # a turn that does not parse has no calls and no score
    if calls := pivot.action.get("tool_calls"): return float(same_calls(parse_completion(text, thinking).tool_calls, calls))
    return ENVIRONMENTS[pivot.task.family].score(pivot.task, text, thinking)


def pivot_turns(rewards_hk: Tensor, below: float) -> Tensor:
    """Which turns are worth training, bool [h]: those whose k rollouts do not all earn the same, and earn less than `below` in the mean.

    0 0 0 0 no (never right)   1 1 1 1 no (always)   1 0 0 1 yes for below 0.8   1 1 1 0 (mean 0.75) yes for 0.8, no for 0.7
    """
    return (rewards_hk.var(1, unbiased=False) > 0) & (rewards_hk.mean(1) < below)
