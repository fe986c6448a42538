"""Tasks to fine-tune and reinforce on: one file a domain, one Environment a family, every answer checked exactly.

To add a family of reasoning-gym: one Family in FAMILIES of a domain's file (levels, question, steps). To add anything else: a class with sample,
worked and right, and step where tools answer. `python -m data.tasks` prints a table of all of them.
"""
from collections import Counter
from random import Random

from data.tasks import arithmetic, instructions, logic, numbers, strings, tools
from data.tasks.base import GYM, Environment, Family, Parsed, Task, parse_completion, split_of

__all__ = ["DOMAINS", "EASY", "ENVIRONMENTS", "SPLITS", "Environment", "Family", "Parsed", "Task", "constant_baseline", "draw", "parse_completion",
           "split_of"]

FAMILIES = [family for module in (arithmetic, numbers, strings, logic, tools, instructions) for family in module.FAMILIES]


class Environments(dict):
    """Families by name; a missing one is explained."""
    def __missing__(self, name):
        if name in {family.name for family in FAMILIES}:
            raise KeyError(f"{name} is drawn by reasoning-gym, which is not installed: pip install reasoning-gym, or take one of {', '.join(self)}.")
        raise KeyError(f"no family {name!r}: take one of {', '.join(self)}.")


ENVIRONMENTS = Environments((f.name, f) for f in FAMILIES if GYM or not isinstance(f, Family) or f.own)
DOMAINS: dict[str, list[str]] = {d: [f.name for f in ENVIRONMENTS.values() if f.domain == d] for d in dict.fromkeys(f.domain for f in FAMILIES)}

SPLITS = ("train", "validation", "held_out")
# ours: the families that stage 05 reads as text and stage 06 learns: at level 0 copies of digits and of few words, and small tables. Found on
# validation questions; the others ask a model of 3M parameters for more facts (sums, products) or for the letters inside a token.
EASY = tuple(name for name in ("count_bits", "calendar_arithmetic", "shop", "follow") if name in ENVIRONMENTS)


def draw(family: str, level: int, n: int, seed: int, split: str = "train", at_most: bool = False) -> list[Task]:
    """n tasks with different prompts from one side of the split, the same for the same arguments. ValueError when no more are found, or with
    at_most those that are."""
    if split not in SPLITS: raise ValueError(f'split is one of {", ".join(SPLITS)}, not {split!r}.')
    environment, rng, tasks, misses = ENVIRONMENTS[family], Random(f"{family} {level} {seed}"), {}, 0
    while len(tasks) < n:
        task = environment.sample(level, rng)
        new = task.prompt not in tasks and split_of(task) == split
        if new: tasks[task.prompt] = task
        misses = 0 if new else misses + 1
        # ours: when one draw in a hundred would still be new, 2,000 misses in a row have a chance of 2e-9
        if misses > 2000 and at_most: break
        if misses > 2000:
            raise ValueError(f"{family} level {level} has about {len(tasks)} prompts in {split!r}, not {n}: ask for fewer, or another level.")
    return list(tasks.values())


def constant_baseline(tasks: list[Task]) -> tuple[str, float]:
    """The best single answer to all of these tasks and its accuracy; where any of several answers is right, the best of the worked ones."""
    worked = Counter(t.answer or ENVIRONMENTS[t.family].worked(t, "medium", Random(0))[-1]["content"] for t in tasks)
    def accuracy(answer): return sum(ENVIRONMENTS[t.family].score(t, f"</think>{answer}") for t in tasks) / len(tasks)
    if all(t.answer for t in tasks): return (best := worked.most_common(1)[0][0]), accuracy(best)
    return max(((answer, accuracy(answer)) for answer, _ in worked.most_common(50)), key=lambda pair: pair[1])      # ours: fifty are tried
