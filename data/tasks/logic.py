"""Logic: a search for an expression, a rule applied to a list, a path through a graph, days of the week.

What medium effort leaves out: countdown: the tries that fail; number_filtering: the comparisons; path_star: the edge behind each step back;
calendar_arithmetic: taking whole weeks away, and the days between.
What grows with the level: how many numbers and the target; the list and its numbers; arms of the star and their length; the number of days.
"""
import re
from datetime import date
from random import Random

from data.tasks.base import Family
from data.tasks.tools import ToolError, calculate

TRIES = 3      # ours: at most so many failed tries are shown
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


def _expression(numbers: list[int], rng: Random) -> str:
    """2, 3, 4 -> (2 + 3) * 4 and the like: the numbers in order, each operation on all that came before."""
    text, last = str(numbers[0]), "*"
    for n in numbers[1:]:
        sign = rng.choice("+-*")
        text, last = f"({text}) * {n}" if sign == "*" != last else f"{text} {sign} {n}", sign
    return text


def own_countdown(settings: dict, rng: Random) -> tuple[dict, str]:
    target = 0
    while not settings["min_target"] <= target <= settings["max_target"]:
        numbers = [rng.randint(settings["min_value"], settings["max_value"]) for _ in range(settings["max_numbers"])]
        expression = _expression(numbers, rng)
        target = calculate(expression)
    rng.shuffle(numbers)
    return dict(numbers=numbers, target=target), expression


def countdown_accepts(meta: dict, content: str) -> bool:
    """Any expression in + - * and brackets with each number once, written as in the question, that makes the target."""
    if not re.fullmatch(r"[0-9+*() -]+", content) or sorted(re.findall("[0-9]+", content)) != sorted(map(str, meta["numbers"])): return False
    try: return calculate(content) == meta["target"]
    except ToolError: return False


def countdown(meta: dict, regular: bool, rng: Random) -> str:
    steps, solution = [], []
    for _ in range(TRIES * regular):
        attempt = _expression(rng.sample(meta["numbers"], len(meta["numbers"])), rng)
        if (value := calculate(attempt)) != meta["target"]: steps.append(f"{attempt} = {value} no")
    calculate(meta["example"], solution)
    return ", ".join([*dict.fromkeys(steps), *solution]) + " yes" * regular


def number_filtering(meta: dict, regular: bool, rng: Random) -> str:
    """remove larger than 12: 11, 15 -> 11 > 12 no keep, 15 > 12 yes drop"""
    sign, verdict = ">" if meta["operation"].endswith("larger") else "<", ("drop", "keep")
    if not regular: return " ".join(meta["result"]) or "none"
    steps = []
    for x in meta["original_numbers"]:
        holds = int(x) > int(meta["filter_value"]) if sign == ">" else int(x) < int(meta["filter_value"])
        steps.append(f"{x} {sign} {meta['filter_value']} {'yes' if holds else 'no'} {verdict[holds == meta['operation'].startswith('keep')]}")
    return ", ".join(steps)


def path_star(meta: dict, regular: bool, rng: Random) -> str:
    """Back from the goal, where there is no choice: 9 from 5, 5 from 3;   medium: 9 5 3"""
    back = meta["goal_path"][::-1]
    return ", ".join(f"{b} from {a}" for b, a in zip(back, back[1:])) if regular else " ".join(map(str, back))


def _edges(meta: dict) -> str:
    """reasoning-gym writes "|1 2|1 3/1 2 = " at the end of its question; the edges are nowhere else."""
    task = meta["question"].rstrip().split("\n")[-1].split("/")[0]
    return f"path {meta['center']} to {meta['goal']}: " + ", ".join(edge.replace(" ", "-") for edge in task.split("|")[1:])


def calendar_arithmetic(meta: dict, regular: bool, rng: Random) -> str:
    """Friday + 17 days -> 17 - 14 = 3, 0 Friday, 1 Saturday, 2 Sunday, 3 Monday;   medium: 17 mod 7 = 3"""
    left, day, way, steps = abs(meta["offset_days"]), date.fromisoformat(meta["start_date"]).weekday(), 1 if meta["offset_days"] > 0 else -1, []
    if not regular: return f"{left} mod 7 = {left % 7}"
    for weeks in (100, 10, 1):
        taken = left // (7 * weeks) * 7 * weeks
        if taken: steps.append(f"{left} - {taken} = {left - taken}")
        left -= taken
    return ", ".join([*steps, *(f"{k} {DAYS[(day + way * k) % 7]}" for k in range(left + 1))])


def _weekday(meta: dict) -> str:
    return f"{DAYS[date.fromisoformat(meta['start_date']).weekday()]} {'+' if meta['offset_days'] > 0 else '-'} {abs(meta['offset_days'])} days?"


def _numbers(count: int, value: int, target: int) -> dict:
    return dict(min_numbers=count, max_numbers=count, min_value=1, max_value=value, min_target=1, max_target=target, operators=("+", "-", "*"))


# ours: the levels of each family
FAMILIES = [
    # reasoning-gym's own generator takes 1 to 3 ms a question, so ours draws; its scorer agrees (tests)
    Family("countdown", "logic", (_numbers(2, 20, 100), _numbers(3, 10, 50), _numbers(3, 25, 100), _numbers(4, 10, 100)),
           lambda m: f"make {m['target']} from {', '.join(map(str, m['numbers']))}", countdown,
           own=own_countdown, accepts=countdown_accepts, gym=False),
    Family("number_filtering", "logic",
           tuple(dict(min_decimals=0, max_decimals=0, min_value=0.0, max_value=v, min_numbers=a, max_numbers=b) for v, a, b in
                 ((20.0, 3, 3), (99.0, 4, 5), (99.0, 6, 7), (999.0, 8, 9))),
           lambda m: f"{m['operation'].replace('_', ' ')} than {m['filter_value']}: {', '.join(m['original_numbers'])}", number_filtering,
           read=lambda answer: ", ".join(re.findall("[0-9]+", answer)) or "none"),
    Family("path_star", "logic", tuple(dict(degree=d, min_path_length=n, max_path_length=n, node_range=nodes)
                                       for d, n, nodes in ((2, 2, 20), (2, 3, 50), (3, 3, 100), (3, 4, 100))), _edges, path_star),
    Family("calendar_arithmetic", "logic", tuple(dict(tasks=("weekday_offset",), offset_upper_bound=n) for n in (14, 40, 120, 999)),
           _weekday, calendar_arithmetic),
]
