"""Arithmetic: sums, products, decimals, fractions, counting legs, equations. Steps go place by place, as in the text of pretraining.

What medium effort leaves out: chain_sum, products, decimal_chain_sum: the places inside a sum or product; fraction_simplification: the search for
the common divisor; leg_counting: one line an animal; simple_equations: the operation behind each new side.
What grows with the level: digits and terms; decimal places; the divisor and both numbers; kinds of animals and their counts; coefficients and terms.
"""
import math
from decimal import Decimal
from random import Random

from data.tasks.base import Family


def places(n: int) -> list[int]:
    """405 -> [400, 5]; 0 -> [0]"""
    return [int(digit) * 10**k for k, digit in reversed(list(enumerate(reversed(str(n))))) if digit != "0"] or [0]


def sum_steps(a: int, sign: str, b: int) -> list[str]:
    """27 + 48 -> 20 + 40 = 60, 7 + 8 = 15, 60 + 15 = 75;   75 - 48 -> 75 - 40 = 35, 35 - 8 = 27"""
    if sign == "+" and 10 <= a < 100 and 10 <= b < 100:
        tens, ones = a // 10 * 10 + b // 10 * 10, a % 10 + b % 10
        return [f"{a // 10 * 10} + {b // 10 * 10} = {tens}", f"{a % 10} + {b % 10} = {ones}", f"{tens} + {ones} = {a + b}"]
    steps = []
    for part in places(b):
        after = a + part if sign == "+" else a - part
        steps.append(f"{a} {sign} {part} = {after}")
        a = after
    return steps


def product_steps(a: int, b: int) -> list[str]:
    """57 * 6 -> 50 * 6 = 300, 7 * 6 = 42, 300 + 42 = 342;   57 * 36 -> the same for 57 * 30 and 57 * 6, then their sum"""
    steps, total = [], None
    for of_b in places(b):
        subtotal = None
        for of_a in places(a):
            steps.append(f"{of_a} * {of_b} = {of_a * of_b}")
            if subtotal is not None: steps.append(f"{subtotal} + {of_a * of_b} = {subtotal + of_a * of_b}")
            subtotal = (subtotal or 0) + of_a * of_b
        if total is not None: steps.append(f"{total} + {subtotal} = {total + subtotal}")
        total = (total or 0) + subtotal
    return steps


def _sum(terms: list[int], signs: list[str], regular: bool) -> list[str]:
    total, steps = terms[0], []
    for sign, term in zip(signs, terms[1:]):
        after = total + term if sign == "+" else total - term
        steps += sum_steps(total, sign, term) if regular else [f"{total} {sign} {term} = {after}"]
        total = after
    return steps


def chain_sum(meta: dict, regular: bool, rng: Random) -> str:
    terms = meta["expression"].split()
    return ", ".join(_sum([int(t) for t in terms[::2]], terms[1::2], regular))


def products(meta: dict, regular: bool, rng: Random) -> str:
    total, *factors = (int(x) for x in meta["expression"].split(" * "))
    steps = []
    for factor in factors:
        partial = [f"{total} * {part} = {total * part}" for part in places(factor)]
        if len(partial) > 1: partial.append(" + ".join(str(total * part) for part in places(factor)) + f" = {total * factor}")
        steps += product_steps(total, factor) if regular else partial
        total *= factor
    return ", ".join(steps)


def decimal_chain_sum(meta: dict, regular: bool, rng: Random) -> str:
    """4.82 + 1.7 -> as whole numbers 482 + 170, their sum 652, 6.52; medium: 4.82 + 1.7 = 6.52"""
    terms = meta["expression"].split()
    digits = max(len(t.split(".")[1]) for t in terms[::2])
    whole = [int(Decimal(t).scaleb(digits)) for t in terms[::2]]
    total = sum(-n if sign == "-" else n for sign, n in zip(["+", *terms[1::2]], whole))
    if not regular: return f"{meta['expression']} = {Decimal(total).scaleb(-digits)}"
    return f"{' '.join(str(whole[i // 2]) if i % 2 == 0 else t for i, t in enumerate(terms))}: " + ", ".join(
        [*_sum(whole, terms[1::2], True), f"{total} / {10**digits} = {Decimal(total).scaleb(-digits)}"])


def fraction_simplification(meta: dict, regular: bool, rng: Random) -> str:
    a, b = meta["numerator"], meta["denominator"]
    common, steps = math.gcd(a, b), []
    if not regular: return f"gcd = {common}: {a // common}/{b // common}"
    big, small = b, a
    while small:
        steps.append(f"{big} mod {small} = {big % small}")
        big, small = small, big % small
    return ", ".join([*steps, f"gcd = {common}", f"{a} / {common} = {a // common}", f"{b} / {common} = {b // common}"])


def leg_counting(meta: dict, regular: bool, rng: Random) -> str:
    from reasoning_gym.arithmetic.leg_counting import ANIMALS
    herd = [(n, name, ANIMALS[name]) for name, n in meta["animals"].items()]
    total, steps = herd[0][0] * herd[0][2], []
    if not regular: return " + ".join(f"{n} * {legs}" for n, _, legs in herd) + f" = {sum(n * legs for n, _, legs in herd)}"
    for i, (n, name, legs) in enumerate(herd):
        steps.append(f"{n} {name}: {n} * {legs} = {n * legs}")
        if i: steps += sum_steps(total, "+", n * legs)
        if i: total += n * legs
    return ", ".join([*steps, f"legs = {total}"])


def simple_equations(meta: dict, regular: bool, rng: Random) -> str:
    """56 - 98*e = -1218 -> -98*e: -1218 - 56 = -1274, e: -1274 / -98 = 13;   medium: -98*e = -1274"""
    left, right = meta["equation"].replace("- ", "-").replace("+ ", "").split(" = ")
    x, right = meta["variable"], int(right)
    terms = left.split()
    factor = next(t for t in terms if t.endswith(x)).removesuffix(x).rstrip("*")
    factor, constant = int(factor + "1" if factor in ("", "-") else factor), sum(int(t) for t in terms if not t.endswith(x))
    moved, term = right - constant, x if factor == 1 else f"-{x}" if factor == -1 else f"{factor}*{x}"
    if not regular: return f"{term} = {moved}" if constant else f"{right} / {factor} = {moved // factor}"
    steps = [f"{term}: {right} {'-' if constant > 0 else '+'} {abs(constant)} = {moved}"] if constant else []
    return ", ".join(steps + [f"{x}: {moved} / {factor} = {moved // factor}"] * (factor != 1) + [f"{x} = {moved // factor}"])


def own_chain(settings: dict, rng: Random, signs: str = "+-") -> tuple[dict, str]:
    digits, terms = rng.randint(settings["min_digits"], settings["max_digits"]), rng.randint(settings["min_terms"], settings["max_terms"])
    numbers = [rng.randint(0 if digits == 1 else 10**(digits - 1), 10**digits - 1) for _ in range(terms)]
    chosen = [rng.choice(signs) for _ in numbers[1:]]
    total = math.prod(numbers) if signs == "*" else numbers[0] + sum(n if s == "+" else -n for s, n in zip(chosen, numbers[1:]))
    return dict(expression=" ".join([str(numbers[0]), *(f"{s} {n}" for s, n in zip(chosen, numbers[1:]))])), str(total)


def _terms(least: int, most: int, least_digits: int, most_digits: int, **more) -> dict:
    return dict(min_terms=least, max_terms=most, min_digits=least_digits, max_digits=most_digits, **more)


def _equation(terms: int, top: int, multiply: float, factor: bool = True) -> dict:
    weights = (0.5 - multiply / 2, 0.5 - multiply / 2, multiply)
    return dict(min_terms=terms, max_terms=terms, max_value=top, operators=("+", "-", "*") if factor else ("+", "-"),
                operators_weights=weights if factor else (0.5, 0.5))


def _herd(least: int, most: int, each: int) -> dict: return dict(min_animals=least, max_animals=most, max_instances=each)


# ours: the levels of each family; the first is near the pretraining text, and each later one has larger numbers or more steps
FAMILIES = [
    Family("chain_sum", "arithmetic", (_terms(2, 2, 1, 2), _terms(3, 3, 1, 2), _terms(4, 4, 2, 2), _terms(4, 4, 3, 3)),
           lambda m: f"{m['expression']} = ?", chain_sum, own=own_chain),
    Family("products", "arithmetic", (_terms(2, 3, 1, 1), _terms(2, 2, 2, 2), _terms(4, 5, 1, 1)),
           lambda m: f"{m['expression']} = ?", products, own=lambda settings, rng: own_chain(settings, rng, "*"),
           skip=lambda m: "0" in m["expression"].split()),      # or "0" would be right for a third of the long ones
    Family("decimal_chain_sum", "arithmetic",
           (_terms(2, 2, 1, 1, max_decimal_places=1), _terms(2, 2, 1, 1, max_decimal_places=2),
            _terms(2, 2, 2, 2, max_decimal_places=3), _terms(3, 3, 2, 2, max_decimal_places=2)),
           lambda m: f"{m['expression']} = ?", decimal_chain_sum),
    Family("fraction_simplification", "arithmetic", tuple(dict(styles=("plain",), min_value=1, max_value=v, min_factor=2, max_factor=f)
                                                          for v, f in ((9, 9), (30, 9), (50, 20), (99, 30))),
           lambda m: f"simplify {m['numerator']}/{m['denominator']}", fraction_simplification),
    Family("leg_counting", "arithmetic", (_herd(1, 2, 4), _herd(2, 2, 9), _herd(3, 3, 9), _herd(4, 4, 15)),
           lambda m: f"how many legs: {', '.join(f'{n} {name}' for name, n in m['animals'].items())}?", leg_counting),
    Family("simple_equations", "arithmetic", (_equation(2, 20, 0, factor=False), _equation(2, 9, 0), _equation(2, 20, 0.2), _equation(3, 30, 0.3)),
           lambda m: f"solve for {m['variable']}: {m['equation']}", simple_equations,
           skip=lambda m: m["variable"] not in m["equation"]),      # the gym also draws "0 = 0"
]
