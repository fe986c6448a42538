"""data/tasks: reasoning-gym's scorer and solvers that read nothing but the prompt agree with every answer; nothing but the exact answer scores."""
import ast
import hashlib
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from datetime import date, timedelta
from fractions import Fraction
from functools import cache
from pathlib import Path
from random import Random
from statistics import mean

import pytest

from data.tasks import DOMAINS, ENVIRONMENTS, Family, Task, constant_baseline, draw, parse_completion, split_of
from data.tasks.tools import TOOLS, ToolError, calculate

ROOT = Path(__file__).parent.parent
GYM = [name for name, env in ENVIRONMENTS.items() if isinstance(env, Family)]
EXACT = [name for name in ENVIRONMENTS if name not in ("countdown", "follow")]
every = pytest.mark.parametrize("name", list(ENVIRONMENTS))
gym = pytest.mark.parametrize("name", GYM)


@cache
def drawn(name, level, n=40): return draw(name, level, n, seed=1)
def tasks(name, n=40): return [task for level in range(ENVIRONMENTS[name].levels) for task in drawn(name, level, n)]
def ints(text): return [int(n) for n in re.findall(r"(?<![\w.])-?\d+", text)]
def thoughts(messages): return " | ".join(m.get("reasoning") or "" for m in messages if m["role"] == "assistant")
def worked(task, effort="regular", seed=0): return ENVIRONMENTS[task.family].worked(task, effort, Random(seed))


def value(text):
    """A second evaluator, over Python's own syntax tree and exact fractions."""
    def walk(node):
        match node:
            case ast.BinOp(left=a, op=op, right=b):
                a, b = walk(a), walk(b)
                return {ast.Add: a + b, ast.Sub: a - b, ast.Mult: a * b, ast.Div: b and a / b, ast.Mod: b and a % b,
                        ast.FloorDiv: b and a // b}[type(op)]
            case ast.UnaryOp(op=ast.USub(), operand=a): return -walk(a)
            case ast.Constant(): return Fraction(str(node.value))
        raise ValueError(f"no arithmetic: {text}")
    return walk(ast.parse(text.strip(), mode="eval").body)


# %% answers

def factors(n): return next(([p, *factors(n // p)] for p in range(2, n) if n % p == 0), [n])


def in_base(n, base): return (in_base(n // base, base) if n >= base else "") + "0123456789abcdef"[n % base]


def solve_equation(prompt):
    """The left side at 0 and at 1 gives both coefficients of a line."""
    x, left, right = re.fullmatch(r"solve for (.): (.*) = (.*)", prompt).groups()
    at = [value(re.sub(rf"\b{x}\b", n, left)) for n in ("0", "1")]
    return str((int(right) - at[0]) / (at[1] - at[0]))


def solve_legs(prompt):
    from reasoning_gym.arithmetic.leg_counting import ANIMALS
    return str(sum(int(n) * ANIMALS[name] for n, name in re.findall(r"(\d+) ([a-z ]+)", prompt)))


def solve_filter(prompt):
    verb, side, limit, numbers = re.fullmatch(r"(keep|remove) (larger|smaller) than (\d+): (.*)", prompt).groups()
    larger, smaller = (lambda n: n > int(limit)), (lambda n: n < int(limit))
    kept = [str(n) for n in ints(numbers) if (larger if side == "larger" else smaller)(n) == (verb == "keep")]
    return ", ".join(kept) or "none"


def solve_path(prompt):
    start, goal = ints(prompt.split(":")[0])
    edges = [tuple(map(int, edge.split("-"))) for edge in prompt.split(": ")[1].split(", ")]
    paths = [[start]]
    while not any(p[-1] == goal for p in paths): paths = [p + [b] for p in paths for a, b in edges if a == p[-1]]
    return " ".join(map(str, next(p for p in paths if p[-1] == goal)))


def solve_days(prompt):
    name, sign, n = re.fullmatch(r"(\w+) ([+-]) (\d+) days\?", prompt).groups()
    monday = date(2024, 1, 1)
    start = next(monday + timedelta(days=k) for k in range(7) if (monday + timedelta(days=k)).strftime("%A") == name)
    return (start + timedelta(days=int(sign + n))).strftime("%A")


def solve_cipher(prompt):
    alphabet, turn = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", ints(prompt)[0]
    return prompt.split(": ")[1].translate(str.maketrans(alphabet, alphabet[-turn:] + alphabet[:-turn]))


def solve_decimals(prompt):
    exact, digits = value(prompt[:-4]), max(len(n) for n in re.findall(r"\.(\d+)", prompt))
    return f"{'-' if exact < 0 else ''}{abs(exact) * 10**digits // 10**digits}.{int(abs(exact) * 10**digits) % 10**digits:0{digits}}"


SOLVERS = {
    "chain_sum": lambda p: str(value(p[:-4])), "products": lambda p: str(value(p[:-4])), "decimal_chain_sum": solve_decimals,
    "fraction_simplification": lambda p: "{0.numerator}/{0.denominator}".format(Fraction(p.split()[1])), "leg_counting": solve_legs,
    "simple_equations": solve_equation, "gcd": lambda p: str(math.gcd(*ints(p))), "lcm": lambda p: str(math.lcm(*ints(p))),
    "count_bits": lambda p: str(sum(int(re.findall(r"\d{2,}|\d", p)[-1]) >> k & 1 for k in range(20))),
    "base_conversion": lambda p: in_base(int(p.split()[0], int(p.split()[3])), int(p.split()[-1][:-1])),
    "prime_factorization": lambda p: " * ".join(map(str, factors(ints(p)[0]))), "spell_backward": lambda p: "".join(reversed(p.split(": ")[1])),
    "caesar_cipher": solve_cipher, "letter_counting": lambda p: str(p.split(": ", 1)[1].count(p.split()[2])),
    "word_sorting": lambda p: ", ".join(sorted(p.split(": ")[1].split(", "), reverse="backward" in p)),
    "number_filtering": solve_filter, "path_star": solve_path, "calendar_arithmetic": solve_days,
}


@pytest.mark.parametrize("name", list(SOLVERS))
def test_the_prompt_alone_decides_the_answer(name):
    """A second solver sees only the prompt: catches a question that says another number, base or direction than the gym's."""
    for task in tasks(name): assert SOLVERS[name](task.prompt) == task.answer, task


@gym
def test_reasoning_gyms_own_scorer_accepts_every_answer(name):
    """An oracle that we did not write: score_answer == 1.0, for the item whose metadata the task carries."""
    reasoning_gym = pytest.importorskip("reasoning_gym")
    to_gym = {"prime_factorization": lambda a: a.replace("*", "×"), "number_filtering": lambda a: str([] if a == "none" else a.split(", "))}
    for task in tasks(name, 20):
        answer = worked(task)[-1]["content"]
        if name == "countdown":
            dataset, item = reasoning_gym.create_dataset("countdown", seed=0), dict(answer=None, metadata=task.meta)
            assert dataset.score_answer(answer + " + 1", item) < 1
        else:
            dataset = ENVIRONMENTS[name].dataset(task.level)
            item = dataset[task.meta["source_index"]]
            assert all(item["metadata"][key] == found for key, found in task.meta.items())
        assert dataset.score_answer(to_gym.get(name, str)(answer), item) == 1.0, task


@every
def test_worked_solutions_score_and_end_in_the_answer(name):
    """Both efforts, every level; a conversation never takes more turns than it may."""
    env = ENVIRONMENTS[name]
    for task in tasks(name):
        for effort in ("regular", "medium"):
            messages = worked(task, effort)
            assert env.score(task, f"{messages[-1]['reasoning']}</think>{messages[-1]['content']}") == 1.0, (task, messages)
            assert env.score(task, messages[-1]["content"], thinking=False) == 1.0
            assert sum(m["role"] == "assistant" for m in messages) <= env.max_turns
            assert "tool_calls" not in messages[-1] and all(m["tool_calls"] for m in messages[:-1] if m["role"] == "assistant")
    with pytest.raises(ValueError, match="effort"): worked(task, "low")


# %% steps

def equations(text):
    """(left, right) of every "a = b" whose left side is arithmetic: 3 cat: 3 * 4 = 12, 5 mod 3 = 2, 1 + 1 = 2 no"""
    for piece in re.split(r"[,:;|] ?", text):
        if match := re.fullmatch(r"([-+*/(). \d]+|-?\d+ mod \d+) = (-?[\d.]+)(?: yes| no)?", piece.strip()):
            if re.search(r"\d [-+*/m]", match[1]): yield match[1].replace("mod", "%"), match[2]


STEPS = {"chain_sum": 1, "products": 1, "decimal_chain_sum": 2, "fraction_simplification": 3, "leg_counting": 1, "gcd": 1, "base_conversion": 0,
         "simple_equations": 0, "countdown": 1, "prime_factorization": 0, "calendar_arithmetic": 0, "shop": 0}


@pytest.mark.parametrize("name", list(STEPS))
def test_every_arithmetic_step_is_right(name):
    """Each "a = b" in a trace is computed again: catches a step whose result is copied and not the one it shows."""
    seen = Counter()
    for task in tasks(name):
        for effort in ("regular", "medium"):
            found = list(equations(thoughts(worked(task, effort, seed=task.level))))
            for left, right in found: assert value(left) == Fraction(right), (task, left, right)
            if effort == "regular": assert len(found) >= STEPS[name], task
            seen[effort] += len(found)
    assert seen["regular"] > 100


@pytest.mark.parametrize("name", ["chain_sum", "products", "decimal_chain_sum", "leg_counting", "simple_equations", "gcd", "lcm", "count_bits",
                                  "base_conversion", "spell_backward", "calendar_arithmetic", "shop"])
def test_the_steps_lead_to_the_answer(name):
    """The regular trace ends in the answer, and so does its last equation where it ends in sums: catches right steps that do not join."""
    for task in tasks(name):
        trace = thoughts(worked(task))
        assert re.search(rf"(?<![\w.-]){re.escape(task.answer)}$", trace), (task, trace)
        found = list(equations(trace))
        if name in ("chain_sum", "products", "decimal_chain_sum", "leg_counting", "simple_equations"):
            assert Fraction(found[-1][1]) == Fraction(task.answer), (task, trace)


def test_every_other_step_is_right():
    """Traces that are no equations: letters, counts, edges, comparisons, primes, bits, each read back and checked against the prompt."""
    for task in tasks("spell_backward"): assert thoughts(worked(task)).split(" = ")[0].split(", ")[0].replace(" ", "") == task.prompt.split(": ")[1]
    for task in tasks("caesar_cipher"):
        pairs, turn = [pair.split("-") for pair in thoughts(worked(task)).replace(" /", "").split()], ints(task.prompt)[0]
        assert pairs and all((ord(a) - ord(b)) % 26 == turn % 26 for a, b in pairs)
        assert "".join(a for a, _ in pairs) == task.prompt.split(": ")[1].replace(" ", "")
    for task in tasks("letter_counting"):
        letter, rows = task.prompt.split()[2], [row.split() for row in thoughts(worked(task)).split(", ")]
        assert [int(total) for *_, total in rows] == [sum(w.count(letter) for w, *_ in rows[:i + 1]) for i in range(len(rows))]
        assert " ".join(row[0] for row in rows) == task.prompt.split(": ", 1)[1][:-1]
    for task in tasks("word_sorting"):
        rows, left = thoughts(worked(task)).split("; "), sorted(task.prompt.split(": ")[1].split(", "))
        for row in rows[:-1]:
            words, pick = row.split(": ")
            assert sorted(words.split()) == left and pick == (left[-1] if "backward" in task.prompt else left[0])
            left.remove(pick)
        assert rows[-1:] == left
    for task in tasks("path_star"):
        steps = [step.split(" from ") for step in thoughts(worked(task)).split(", ")]
        assert all(re.search(rf"\b{a}-{b}\b", task.prompt) for b, a in steps) and steps[0][0] == str(ints(task.prompt.split(":")[0])[1])
    for task in tasks("number_filtering"):
        for step in thoughts(worked(task)).split(", "):
            x, sign, limit, verdict, verb = step.split()
            assert (int(x) > int(limit) if sign == ">" else int(x) < int(limit)) == (verdict == "yes")
            assert (verb == "keep") == (x in task.answer.split(", "))
    for task in tasks("prime_factorization"):
        n = ints(task.prompt)[0]
        for step in thoughts(worked(task)).split(", "):
            if step.startswith("no "): assert n % int(step[3:])
            elif step.endswith(" prime"): assert factors(n) == [n] == [int(step[:-6])]
            else: n //= int(step.split()[2])
    for task in tasks("count_bits"):
        rows = [row.split() for row in thoughts(worked(task)).split(", ")][:-1]
        assert [int(row[0]) for row in rows] == [ints(task.prompt)[-1] >> k for k in range(len(rows))] and rows[-1][0] == "1"
        assert all((row[1] == "odd") == (int(row[0]) % 2 == 1) for row in rows) and rows[-1][2] == task.answer
    for task in tasks("lcm"):
        for step in re.findall(r"([\d, ]+): first multiple of (\d+) = (\d+)", thoughts(worked(task))):
            multiples = ints(step[0])
            assert [n % int(step[1]) == 0 for n in multiples] == [False] * (len(multiples) - 1) + [True] and multiples[-1] == int(step[2])
            assert multiples == [multiples[0] * k for k in range(1, len(multiples) + 1)]


@every
def test_medium_effort_is_clearly_shorter(name):
    """Mean characters of reasoning over all levels, medium at most 0.6 of regular."""
    regular, medium = (mean(len(thoughts(worked(t, effort))) for t in tasks(name)) for effort in ("regular", "medium"))
    assert 0 < medium <= 0.6 * regular, (medium, regular)


@every
def test_difficulty_grows_with_the_level(name):
    """Question and steps become longer; the first levels of the cipher turn farther instead. A level that is not there is an error."""
    def size(t): return ints(t.prompt)[0] if name == "caesar_cipher" else len(t.prompt) + len(thoughts(worked(t)))
    # 1,000 of each: the middle levels of base_conversion are 6 characters apart, with a standard deviation of 38
    levels = range(ENVIRONMENTS[name].levels - (name == "caesar_cipher"))
    sizes = [mean(map(size, draw(name, level, 1000, seed=1, at_most=True))) for level in levels]
    assert len(sizes) >= 3 and all(a < b for a, b in zip(sizes, sizes[1:])), sizes
    if name == "caesar_cipher": assert mean(len(t.prompt) for t in drawn(name, 3, 100)) > 1.3 * mean(len(t.prompt) for t in drawn(name, 2, 100))
    for level in (-1, ENVIRONMENTS[name].levels):
        with pytest.raises(ValueError, match="levels"): ENVIRONMENTS[name].sample(level, Random(0))


@every
def test_no_single_answer_is_good(name):
    """The best constant answer is right for less than half of any level."""
    for level in range(ENVIRONMENTS[name].levels): assert constant_baseline(drawn(name, level, 100))[1] < 0.5, level


# %% counts and split

@cache
def prompts(name):
    """Different prompts, hardest level first, until there are 5,200 or 10,000 draws of a level are spent: prompt -> answers."""
    env, found = ENVIRONMENTS[name], {}
    for level in reversed(range(env.levels)):
        rng = Random(level)
        for _ in range(10_000):
            if len(found) >= 5200: return found
            task = env.sample(level, rng)
            found.setdefault(task.prompt, set()).add(task.answer)
    return found


@every
def test_five_thousand_different_prompts(name):
    """Over all levels together; and one prompt has one answer (the shop draws its prices anew each time)."""
    assert len(prompts(name)) >= 5000
    if name != "shop": assert all(len(answers) == 1 for answers in prompts(name).values())


@pytest.mark.parametrize("domain", list(DOMAINS))
def test_a_thousand_held_out_prompts_in_each_domain(domain):
    """Counted among at least 5,000 of each family, where they are a fifth."""
    held = sum(split_of(Task(name, domain, 0, prompt, "", {})) == "held_out" for name in DOMAINS[domain] for prompt in prompts(name))
    total = sum(len(prompts(name)) for name in DOMAINS[domain])
    assert held >= 1000 and abs(held / total - 0.2) < 5 * math.sqrt(0.16 / total)      # five standard errors: one false alarm in two million


def test_at_least_ten_families_of_the_gym_in_four_domains():
    """The names and domains that the issue asks for; each instance knows its own name."""
    assert len(GYM) >= 12 and len({ENVIRONMENTS[name].domain for name in GYM}) == 4
    assert set(DOMAINS) == {"arithmetic", "numbers", "strings", "logic", "tools", "instructions"}
    assert all(ENVIRONMENTS[name].name == name and ENVIRONMENTS[name].domain == domain for domain, names in DOMAINS.items() for name in names)


@every
def test_the_split_goes_by_the_prompt_and_never_by_the_seed(name):
    """Both sides drawn at every level with other seeds share no prompt; the hash is computed here a second time."""
    sides = {side: {t.prompt for level in range(ENVIRONMENTS[name].levels) for t in draw(name, level, 15, seed, side)}
             for seed, side in ((0, "train"), (1, "held_out"), (2, "validation")) if (name, side) != ("follow", "validation")}
    assert not sides["train"] & sides["held_out"] and min(map(len, sides.values())) >= 15
    for side, texts in sides.items():
        for text in texts:
            share = int(hashlib.sha256(f"{name}\n{text}".encode()).hexdigest()[:16], 16) / 16**16
            assert side == ("held_out" if share < 0.2 else "validation" if share < 0.3 else "train")


def test_drawing_is_distinct_and_says_when_there_are_not_enough():
    """No prompt twice, other seeds give others, meta survives JSON, and a level with too few prompts is an error."""
    for name in ENVIRONMENTS:
        a, b = draw(name, 1, 20, seed=3), draw(name, 1, 20, seed=4)
        assert len({t.prompt for t in a}) == 20 and a != b and a == draw(name, 1, 20, seed=3)
        assert all(json.loads(json.dumps(t.meta)) == t.meta and t.family == name and t.level == 1 for t in a)
    with pytest.raises(ValueError, match="count_bits level 0 has about"): draw("count_bits", 0, 256, seed=0)
    with pytest.raises(ValueError, match="split"): draw("gcd", 0, 1, 0, "test")
    some = draw("count_bits", 0, 256, seed=0, at_most=True)      # 255 numbers, seven in ten of them
    assert 150 < len({t.prompt for t in some}) == len(some) < 205 and draw("gcd", 1, 9, seed=0, at_most=True) == draw("gcd", 1, 9, seed=0)


def test_a_draw_is_the_same_in_another_process():
    """Catches a seed that goes through hash(), which changes from run to run."""
    code = "from data.tasks import *; print([t.prompt for name in ENVIRONMENTS for t in draw(name, 1, 3, 7)])"
    env = {**os.environ, "PYTHONHASHSEED": "1"}
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == str([t.prompt for name in ENVIRONMENTS for t in draw(name, 1, 3, 7)])


def test_without_reasoning_gym_the_families_of_our_own_remain():
    """The import succeeds, at least four families draw, score and work, and asking for another says what to install."""
    code = """
import sys; sys.modules["reasoning_gym"] = None
from random import Random
from data.tasks import DOMAINS, ENVIRONMENTS, draw
for name, env in ENVIRONMENTS.items():
    for level in range(env.levels):
        for task in draw(name, level, 10, 0):
            m = env.worked(task, "regular", Random(0))[-1]
            assert env.score(task, m["reasoning"] + "</think>" + m["content"]) == 1.0
    print(name)
assert all(DOMAINS[domain] for domain in ("arithmetic", "numbers", "strings", "logic"))
try: ENVIRONMENTS["lcm"]
except KeyError as error: assert "pip install reasoning-gym" in str(error)
else: raise SystemExit("lcm is there")
"""
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert set(out.stdout.split()) == {"chain_sum", "products", "gcd", "count_bits", "spell_backward", "countdown", "shop", "follow"}
    with pytest.raises(KeyError, match="no family 'gdc'"): ENVIRONMENTS["gdc"]


def test_the_generators_of_our_own_agree_with_the_prompt():
    """What draws without the gym is held to the solvers that read the prompt."""
    for name in ("chain_sum", "products", "gcd", "count_bits", "spell_backward"):
        env = ENVIRONMENTS[name]
        for level in range(env.levels):
            for seed in range(50):
                meta, answer = env.own(env.settings[level], Random(seed))
                assert SOLVERS[name](env.ask(meta)) == answer, meta


def test_the_constant_baseline_by_hand():
    """Two of three answers are 7; for questions checked by constraints a worked answer is tried on all: here three words, zzz first."""
    three = [Task("gcd", "numbers", 0, str(i), answer, {}) for i, answer in enumerate(("7", "5", "7"))]
    assert constant_baseline(three) == ("7", 2 / 3)
    rules = [[["words", 3]], [["words", 3]], [["words", 4]], [["words", 3], ["begin", "zzz"]]]
    assert constant_baseline([Task("follow", "instructions", 0, f"write: {i}", "", dict(rules=r)) for i, r in enumerate(rules)])[1] == 0.75


# %% completions

CALL = "<tool_call>\n<function=lookup>\n<parameter=key>\nred kite price\n</parameter>\n</function>\n</tool_call>"


@pytest.mark.parametrize("text, thinking, error", [
    ("so 12", True, "no end of thinking"), ("", True, "no end of thinking"), ("a</think>b</think>12", True, "two ends of thinking"),
    ("</think></think>12", True, "two ends of thinking"), ("<think>a</think>12", True, "thinking opened again"),
    ("a</think><think>12", True, "thinking opened again"), ("<think>12", False, "thinking opened again"), ("a</think> \n ", True, "empty answer"),
    ("", False, "empty answer"), ("a</think>12", False, "end of thinking without thinking"), ("a<|im_start|></think>12", True, "unwanted token"),
    ("a</think>12<|im_end|>\n", True, "unwanted token"), ("a</think>12<|im_end|><|im_end|>", True, "unwanted token"),
    ("a</think>12</s>", True, "unwanted token"), ("<tool_response>\n12\n</tool_response>", False, "unwanted token"),
    (f"{CALL}</think>12", True, "tool call while thinking"), (f"a</think>{CALL}</tool_call>", True, "malformed tool call"),
    ("<tool_call>" + CALL, False, "malformed tool call"), (CALL.replace("\n", ""), False, "malformed tool call"),
    (CALL.replace("</parameter>", ""), False, "malformed tool call"), (CALL.replace("lookup", "look up"), False, "malformed tool call"),
    (CALL.replace("<function=lookup>\n", ""), False, "malformed tool call"), ("<function=lookup>", False, "malformed tool call"),
    (CALL.replace("</function>", "<parameter=key>\nx\n</parameter>\n</function>"), False, "malformed tool call"),
    ("a</think>12", True, None), ("</think>12", True, None), ("12", False, None), ("a</think>12<|im_end|>", True, None), (CALL, False, None)])
def test_what_parse_completion_refuses(text, thinking, error):
    """The table of its docstring, row by row; nothing in a refused completion counts."""
    parsed = parse_completion(text, thinking)
    assert parsed.error == error and (not error or (parsed.content, parsed.tool_calls) == (text, []))


def test_what_parse_completion_reads():
    """Outer white space goes, inner stays; calls come out in order with the text around them; values keep their lines."""
    assert parse_completion(" a\nb \n</think>\n 1 2\n<|im_end|>") == ("a\nb", "1 2", [], None)
    two = parse_completion("x</think>first " + CALL + CALL.replace("red kite price", "a\nb") + " last")
    assert two == ("x", "first  last", [dict(name="lookup", arguments=dict(key=key)) for key in ("red kite price", "a\nb")], None)
    assert parse_completion("<tool_call>\n<function=f>\n</function>\n</tool_call>", False).tool_calls == [dict(name="f", arguments={})]


@pytest.mark.parametrize("name", [*EXACT, "countdown"])
def test_nothing_but_the_answer_scores(name):
    """Partial answers, many answers, the answer in the trace, none at all, words or signs around it, malformed thinking."""
    env = ENVIRONMENTS[name]
    for task, other in zip(tasks(name, 5), reversed(tasks(name, 5))):
        a, b = worked(task)[-1]["content"], worked(other)[-1]["content"]
        for good in (f"x</think>{a}", f"</think>{a}", f"x\n</think>\n{a} \n", f"x</think>{a}<|im_end|>"): assert env.score(task, good) == 1.0
        bad = ["", a, f"{a}</think>", f"{a}</think> \n", f"{a}</think>wrong", f"x</think>{a}</think>{a}", f"x</think>{a}</think>", f"x< /think>{a}",
               f"</think></think>{a}", f"<think>x</think>{a}", f"x</think><think>{a}", f"x</think>{a}{CALL}", f"x</think>{a}<|im_end|>{a}"]
        contents = [f"{a} {a}", f"{a} {b}", f"{b} {a}", f"{a}\n{b}", f"{a}\n{a}", f"{a}, {b}", f"{a} or {b}", f"The answer is {a}", f"{a}.", f"= {a}",
                    CALL, f'"{a}"', f"`{a}`", f"\\boxed{{{a}}}", f"<answer>{a}</answer>", a[:-1], a[1:], a + a[-1], f"{a} because", f"\u200b{a}"]
        if a.upper() != a.lower(): contents += [a.swapcase()]
        if " " in a and name != "countdown": contents += [a.replace(" ", ""), a.replace(" ", "  ")]
        if re.fullmatch(r"\d+", a):
            contents += [f"+{a}", f"{a}.0", f"0{a}", f"{a}e0", f"-{a}", f"{a}_", f"({a})", f"0x{int(a):x}", f"{int(a):,}.00"]
            contents += ["".join(chr(ord(c) + 0xFEE0) for c in a)]      # the same digits in full width
        for completion in [*bad, *(f"x</think>{content}" for content in contents)]:
            assert env.score(task, completion) == 0.0, (task.prompt, a, completion)
        assert env.score(task, f"x</think>{a}", thinking=False) == 0.0 == env.score(task, a, thinking=True)


@pytest.mark.parametrize("answer, right", [
    ("3 * 7 - 1", True), ("7*3-1", True), ("(7 * 3) - 1", True), ("20", False), ("3 * 7 - 1 = 20", False), ("3 * 7", False), ("7 + 7 + 7 - 1", False),
    ("3 * 7 - 01", False), ("3 * 7 - 1 * 1", False), ("3 ** 7 - 1", False), ("3 * 7 // 1", False), ("3 * 7 - 1 3", False), ("3 x 7 - 1", False),
    ("3 * (7 - 1)", False), ("(" * 300 + "3 * 7 - 1" + ")" * 300, False), ("３ * 7 - 1", False), ("+3 * 7 - 1", False)])
def test_countdown_takes_any_right_expression_and_nothing_else(answer, right):
    """Each number once and as it was given; made from 3, 7, 1."""
    task = Task("countdown", "logic", 1, "make 20 from 3, 7, 1", "", dict(numbers=[3, 7, 1], target=20, example="3 * 7 - 1"))
    assert ENVIRONMENTS["countdown"].score(task, f"x</think>{answer}") == right


def test_no_text_makes_the_scorer_raise():
    """2,000 strings of random bytes and of shuffled tags, on every family, in both modes."""
    rng, pieces = Random(0), ["<think>", "</think>", "<tool_call>", "</tool_call>", "<function=lookup>", "</function>", "<parameter=key>",
                              "</parameter>", "\n", "{", "}", "[" * 400, "(" * 200, "9" * 5000, '"a"', ":", "1", "-", " ", "- ", "NaN", "word",
                              "\ud800", "\x00", "<|im_end|>", "１"]
    texts = [bytes(rng.randrange(256) for _ in range(rng.randrange(60))).decode(rng.choice(["utf-8", "latin-1"]), "replace") for _ in range(1000)]
    texts += ["".join(rng.choices(pieces, k=rng.randrange(1, 12))) for _ in range(1000)]
    for name, env in ENVIRONMENTS.items():
        task = drawn(name, 2)[0]
        for text in texts:
            assert {env.score(task, text), env.score(task, "</think>" + text), env.score(task, text, thinking=False)} <= {0.0, 1.0}
        if name in EXACT: assert not any(env.score(task, "</think>" + text) for text in texts if text.strip() != task.answer)


# %% tools

def test_the_calculator_agrees_with_another_evaluator():
    """300 random expressions, with brackets, signs and all five operations."""
    def expression(depth):
        if not depth or rng.random() < 0.2: return str(rng.randint(0, 40))
        left, right = expression(depth - 1), expression(depth - 1)
        return rng.choice(["{} {} {}", "({} {} {})", "-({}{}{})"]).format(left, rng.choice(["+", "-", "*", "//", "%"]), right)
    rng, compared = Random(0), 0
    for _ in range(600):
        text, steps = expression(3), []
        try: found = calculate(text, steps)
        except ToolError: continue
        assert found == value(text), text
        assert all(value(step.split(" = ")[0]) == int(step.split(" = ")[1]) for step in steps)
        compared += 1
    assert compared > 300


ATTACKS = ["__import__('os').system('true')", "().__class__", "9**9**9", "9 ** 9", "1 if 1 else 2", "lambda: 1", "[1]", "1; 2", "1 = 1", "a + 1",
           "1.5 + 1", "1e9", "0x10", "１ + １", "²", "٣ + 1", "(" * 10000 + "1" + ")" * 10000, "(" * 20 + "1" + ")" * 20,
           "-" * 50 + "1", "1" + " + 1" * 30, "1 // 0", "1 % 0", "9" * 50,
           "999999 * 999999 * 999999", "", " ", "(1", "1)", "1 +", "* 1", "1 2", "1 / 2", "price", "{0}", "%s", "1\x00", "\ud800", "+1"]


@pytest.mark.parametrize("text", ATTACKS, ids=range(len(ATTACKS)))
def test_the_calculator_refuses_in_words(text):
    """Names, attributes, powers, other digits, depth, size, unfinished text: an error response, never an exception, and nothing is run."""
    task, env = drawn("shop", 1)[0], ENVIRONMENTS["shop"]
    response = env.step(task, [dict(role="assistant", content="", tool_calls=[dict(name="calculate", arguments=dict(expression=text))])])
    assert response["role"] == "tool" and response["content"].startswith("error: ") and len(response["content"]) < 120


@pytest.mark.parametrize("message, said", [
    (dict(tool_calls=[dict(name="lookup", arguments=dict(key="gold"))]), "error: no such key, there are red kite price, red kite stock"),
    (dict(tool_calls=[dict(name="eval", arguments=dict(expression="1"))]), "error: no such tool, there are calculate and lookup"),
    (dict(tool_calls=[dict(name="lookup", arguments=dict(expression="1"))]), "error: lookup takes the text key and nothing else"),
    (dict(tool_calls=[dict(name="lookup", arguments=dict(key="red kite price", more="1"))]), "error: lookup takes the text key and nothing else"),
    (dict(tool_calls=[dict(name="calculate", arguments=dict(expression=12))]), "error: calculate takes the text expression and nothing else"),
    (dict(tool_calls=[dict(name="calculate", arguments=None)]), "error: calculate takes the text expression and nothing else"),
    (dict(tool_calls=[dict(name=["lookup"])]), "error: no such tool, there are calculate and lookup"),
    (dict(tool_calls=["lookup"]), "error: no such tool, there are calculate and lookup"),
    (dict(tool_calls="lookup"), "error: malformed call"), (dict(content="<tool_call>\nlookup"), "error: malformed call"),
    (dict(tool_calls=[dict(name="lookup", arguments=dict(key="red kite stock"))] * 6), "7\n7\n7\n7\nerror: at most 4 calls at once"),
    (dict(tool_calls=[dict(name="lookup", arguments=dict(key=" red kite price\n"))]), "12"),
    (dict(tool_calls=[dict(name="calculate", arguments=dict(expression="2 * (12 + 7)"))]), "38")])
def test_a_call_is_run_or_answered_with_an_error(message, said):
    """Unknown tools and keys, wrong arguments, malformed calls and too many of them; each response is one tool message."""
    task = Task("shop", "tools", 0, "", "12", dict(table={"red kite price": 12, "red kite stock": 7}, keys=[], expression=""), TOOLS)
    response = ENVIRONMENTS["shop"].step(task, [dict(role="user", content=""), dict(role="assistant", **{"content": "", **message})])
    assert response["role"] == "tool" and response["content"].startswith(said)


def test_a_shop_conversation_is_replayed_and_ends():
    """step() gives the worked responses again, in text that parse_completion reads; it ends at an answer and when the turns are used up."""
    env = ENVIRONMENTS["shop"]
    for task in tasks("shop"):
        messages = [dict(role="user", content=task.prompt), *worked(task)]
        for i, message in enumerate(messages):
            if message["role"] != "assistant": continue
            assert env.step(task, messages[:i + 1]) == (messages[i + 1] if i + 1 < len(messages) else None)
            assert not any("error" in m["content"] for m in messages if m["role"] == "tool")
            for call in message.get("tool_calls", ()):
                (name, text), = call["arguments"].items()
                wire = f"<tool_call>\n<function={call['name']}>\n<parameter={name}>\n{text}\n</parameter>\n</function>\n</tool_call>"
                assert parse_completion(f"{message['reasoning']}</think>{wire}").tool_calls == [call]
        assert len(messages) == 1 + 2 * (1, 2, 3, 3)[task.level] + 1
        assert task.answer == str(value(task.meta["expression"].format(*(task.meta["table"][k] for k in task.meta["keys"])))
                                  if task.meta["expression"] else task.meta["table"][task.meta["keys"][0]])
    ask = dict(role="assistant", content="", tool_calls=[dict(name="calculate", arguments=dict(expression="1"))])
    answered = [env.step(task, [ask, dict(role="tool", content="1")] * k + [ask]) is not None for k in range(env.max_turns + 1)]
    assert answered == [True] * (env.max_turns - 1) + [False] * 2
    assert ENVIRONMENTS["gcd"].step(drawn("gcd", 0)[0], [ask]) is None


# %% instructions

@pytest.mark.parametrize("rules, good, bad", [
    ([["words", 3]], ["a big cat", "A big cat.", "cat cat cat"],
     ["a cat", "a big big cat", "a big 3", "a big -", "a, b, c d", "a\nbig cat", "1 2 3", "a big cat!!"]),
    ([["begin", "red"], ["end", "cat"]], ["red cat", "Red is my cat.", "red\tcat"],
     ["red", "a red cat", "red cat is", "redcat", "red-cat", "reds cat"]),
    ([["use", "dog"], ["words", 2]], ["my dog", "dog dog"], ["my dogs", "my cat", "my big dog", "dog"]),
    ([["avoid", "dog"], ["words", 2]], ["my cat", "my dogs"], ["my dog", "Dog runs", "my DOG.", "my big cat"]),
    ([["letter", "e"], ["words", 2]], ["my cat"], ["the cat", "THE cat", "my big cat"]),
    ([["case", "lower"], ["words", 2]], ["my cat"], ["My cat", "MY CAT", "my"]),
    ([["case", "upper"], ["end", "cat"]], ["MY CAT", "CAT"], ["my CAT", "MY cat", "CAT MY"]),
    ([["once", None], ["words", 3]], ["my big cat"], ["my cat my", "My cat my", "my cat"]),
    ([["lines", 2]], ["- a cat\n- a dog", "- a\n- a"],
     ["- a cat", "- a\n- b\n- c", "a\nb", "- a\nb", "-a\n-b", "- a\n\n- b", "- a\n- ", "- a\n- b\nso there"]),
    ([["lines", 2], ["begin", "red"], ["letter", "e"]], [], ["- red cat\n- dog"]),
    ([["lines", 2], ["begin", "my"], ["end", "cat"], ["letter", "e"]], ["- my dog\n- a cat"],
     ["- my dog\n- a the cat", "- a dog\n- my cat", "- my cat\n- a dog"])])
def test_each_rule_is_needed(rules, good, bad):
    """What keeps only some of the rules scores 0; nothing but words counts as words."""
    task, score = Task("follow", "instructions", 0, "", "", dict(rules=rules)), ENVIRONMENTS["follow"].score
    for text in good: assert score(task, f"x</think>{text}") == 1.0, text
    for text in ["", *bad]: assert score(task, f"x</think>{text}") == 0.0, text


@pytest.mark.parametrize("text, right", [
    ('{"age": 7, "name": "Mia"}', True), ('{"name":"","age":7}', True), ('{\n "name": "Mia",\n "age": 7}', True),
    ('{"name": "Mia", "age": 8}', False), ('{"name": "Mia"}', False), ('{"name": "Mia", "age": 7, "more": 1}', False),
    ('{"name": "Mia", "age": "7"}', False), ('{"name": "Mia", "age": 7.0}', False), ('{"name": "Mia", "age": true}', False),
    ('{"name": 7, "age": 7}', False), ('{"name": null, "age": 7}', False), ("{'name': 'Mia', 'age': 7}", False),
    ('{"name": "Mia", "age": 8, "age": 7}', False), ('[{"name": "Mia", "age": 7}]', False), ('{"name": "Mia", "age": 7} {}', False),
    ('```{"name": "Mia", "age": 7}```', False), ('Here: {"name": "Mia", "age": 7}', False), ('{"name": "Mia", "age": NaN}', False),
    ("[" * 900, False)])
def test_json_has_the_keys_the_types_and_the_value(text, right):
    """No more and no fewer keys, none twice, no other type that Python calls equal, no text around."""
    score = ENVIRONMENTS["follow"].score
    task = Task("follow", "instructions", 3, "", "", dict(keys=dict(name="string", age="integer"), given=dict(age=7)))
    assert score(task, f"x</think>{text}") == right
    flag = Task("follow", "instructions", 1, "", "", dict(keys=dict(open="boolean", tags="list", size="integer"), given={}))
    assert score(flag, '</think>{"open": false, "tags": [], "size": 1}') == 1.0
    for other in ('{"open": 0, "tags": [], "size": 1}', '{"open": false, "tags": {}, "size": 1}', '{"open": false, "tags": [], "size": true}'):
        assert score(flag, f"</think>{other}") == 0.0, other


def test_the_prompt_says_every_rule():
    """A rule that is checked but not said could not be obeyed: each value of a rule stands in the prompt."""
    for task in tasks("follow", 100):
        for kind, wanted in task.meta.get("rules", ()): assert str({"once": "twice"}.get(kind, wanted)) in task.prompt.split(": ", 1)[1]
        for key, kind in task.meta.get("keys", {}).items(): assert f"{key} ({kind})" in task.prompt
        for key, wanted in task.meta.get("given", {}).items(): assert f"{key} is {wanted}" in task.prompt
