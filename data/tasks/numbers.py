"""Numbers: divisors, multiples, bits, bases, primes.

What medium effort leaves out: gcd: the divisions (remainders only); lcm: the multiples that fail; count_bits: the halving; base_conversion: the
digits, one by one; prime_factorization: the trials (what is left after each prime only).
What grows with the level: the numbers, for lcm also how many; for base_conversion also the bases.
"""
import math
from random import Random

from data.tasks.base import Family


def gcd(meta: dict, regular: bool, rng: Random) -> str:
    first, *others = meta["numbers"]
    steps = []
    for other in others:
        a, b = max(first, other), min(first, other)
        steps.append(str(a))
        while b:
            if regular: steps[-1] = f"{a} mod {b} = {a % b}"
            steps.append(str(b))
            a, b = b, a % b
        if regular: steps.pop()
        first = a
    return (", " if regular else " ").join(steps) + f", gcd = {first}"


def lcm(meta: dict, regular: bool, rng: Random) -> str:
    """12, 18 -> 18, 36: first multiple of 12 = 36;   medium: 18 * 2 = 36. A third number goes on from there."""
    first, *others = meta["numbers"]
    steps = []
    for other in others:
        a, b = max(first, other), min(first, other)
        first = math.lcm(a, b)
        multiples = ", ".join(str(n) for n in range(a, first + 1, a))
        steps.append(f"{multiples}: first multiple of {b} = {first}" if regular else f"{a} * {first // a} = {first}")
    return ", ".join(steps)


def count_bits(meta: dict, regular: bool, rng: Random) -> str:
    """5 -> 5 odd 1, 2 even 1, 1 odd 2, ones = 2;   medium: 101, ones = 2"""
    n, ones, steps = meta["number"], 0, []
    if not regular: return f"{n:b}, ones = {n.bit_count()}"
    while n:
        ones += n % 2
        steps.append(f"{n} {'odd' if n % 2 else 'even'} {ones}")
        n //= 2
    return ", ".join([*steps, f"ones = {ones}"])


def base_conversion(meta: dict, regular: bool, rng: Random) -> str:
    """First to a decimal number, digit by digit from the left; then remainders, the last digit first."""
    value, steps, source, target = 0, [], meta["source_base"], meta["target_base"]
    if not regular: return f"{meta['decimal_value']}, base {target}"
    for i, digit in enumerate(meta["source_repr"]):
        after = value * source + int(digit, 36)
        if i: steps.append(f"{value} * {source} + {int(digit, 36)} = {after}")
        value = after
    steps.append(f"value {value}")
    while value >= target:
        steps.append(f"{value} mod {target} = {value % target}")
        value //= target
    return ", ".join([*steps, f"{value}", f"read back {meta['target_repr']}"])


def prime_factorization(meta: dict, regular: bool, rng: Random) -> str:
    """90 -> 90 / 2 = 45, no 2, 45 / 3 = 15, 15 / 3 = 5, 5 prime;   a prime is tried only while its square is not above what is left."""
    n, steps, left = meta["number"], [], []
    for p in range(2, n + 1):
        if p * p > n: break
        if any(p % q == 0 for q in range(2, p)): continue
        while p * p <= n and n % p == 0:
            steps.append(f"{n} / {p} = {n // p}")
            n //= p
            left.append(str(n))
        if p * p <= n: steps.append(f"no {p}")
    return ", ".join([*steps, f"{n} prime"]) if regular else " ".join([*left, "prime"])


def own_gcd(settings: dict, rng: Random) -> tuple[dict, str]:
    """As reasoning-gym does, up to three draws look for a common divisor."""
    for _ in range(3):
        numbers = [rng.randint(settings["min_value"], settings["max_value"]) for _ in range(settings["max_numbers"])]
        if math.gcd(*numbers) > 1: break
    return dict(numbers=numbers), str(math.gcd(*numbers))


def own_bits(settings: dict, rng: Random) -> tuple[dict, str]:
    n = rng.randint(settings["min_n"], settings["max_n"])
    return dict(number=n), str(f"{n:b}".count("1"))


def _listed(m: dict) -> str: return ", ".join(map(str, m["numbers"][:-1])) + f" and {m['numbers'][-1]}"


def _range(numbers: int, least: int, most: int) -> dict: return dict(min_numbers=numbers, max_numbers=numbers, min_value=least, max_value=most)


# ours: the levels of each family
FAMILIES = [
    Family("gcd", "numbers", (_range(2, 1, 50), _range(2, 10, 150), _range(2, 100, 999), _range(2, 1000, 9999)),
           lambda m: f"gcd of {_listed(m)}?", gcd, own=own_gcd),
    Family("lcm", "numbers", (_range(2, 1, 25), _range(3, 1, 10), _range(3, 2, 15), _range(3, 5, 20)), lambda m: f"lcm of {_listed(m)}?", lcm),
    Family("count_bits", "numbers", tuple(dict(min_n=a, max_n=b) for a, b in ((1, 255), (256, 1023), (1024, 4095), (4096, 65535))),
           lambda m: f"how many 1 bits in {m['number']}?", count_bits, own=own_bits),
    Family("base_conversion", "numbers", tuple(dict(max_base=b, min_value=least, max_value=most)
                                               for b, least, most in ((4, 4, 63), (8, 40, 250), (12, 100, 700), (16, 500, 2000))),
           lambda m: f"{m['source_repr']} from base {m['source_base']} to base {m['target_base']}?", base_conversion),
    Family("prime_factorization", "numbers", tuple(dict(min_value=a, max_value=b) for a, b in ((2, 300), (301, 1000), (1001, 3000), (3001, 8000))),
           lambda m: f"prime factors of {m['number']}?", prime_factorization, read=lambda answer: answer.replace("×", "*")),
]
