"""Tools: a calculator and a price list, really executed. The calculator reads numbers, + - * // %, brackets and nothing else; no text is ever run.

What medium effort leaves out: what was just read and what is asked next; only the last value is named before the answer.
What grows with the level: the number of calls, from one to three, and what is made of the values.
"""
import re
from random import Random

from data.corpus import COLOURS, THINGS, plural
from data.tasks.base import Environment, Task, is_regular

# ours: room for any sum of these tasks, and nothing that could take long
MAX_CHARACTERS, MAX_DEPTH, MAX_VALUE, MAX_CALLS = 100, 8, 10**12, 4


class ToolError(ValueError):
    """What a tool answers in words instead of a result."""


def _apply(sign: str, a: int, b: int) -> int:
    if sign in ("//", "%") and b == 0: raise ToolError("division by zero")
    value = {"+": lambda: a + b, "-": lambda: a - b, "*": lambda: a * b, "//": lambda: a // b, "%": lambda: a % b}[sign]()
    if abs(value) > MAX_VALUE: raise ToolError(f"numbers may not pass {MAX_VALUE}")
    return value


def calculate(expression: str, steps: list[str] | None = None) -> int:
    """Value of a whole-number expression, by recursive descent; ToolError says what is wrong. `steps` collects each operation: 2 * (3 + 4) ->
    3 + 4 = 7, 2 * 7 = 14."""
    if len(expression) > MAX_CHARACTERS: raise ToolError(f"an expression has at most {MAX_CHARACTERS} characters")
    tokens = re.findall(r"[0-9]+|//|\S", expression)[::-1]      # the next one is last; any other sign is a token that no rule reads

    def chain(signs: tuple[str, ...], operand, depth: int) -> int:
        value = operand(depth)
        while tokens and tokens[-1] in signs:
            sign, left, right = tokens.pop(), value, operand(depth)
            value = _apply(sign, left, right)
            if steps is not None: steps.append(f"{left} {sign} {right} = {value}")
        return value

    def total(depth: int) -> int: return chain(("+", "-"), product, depth)
    def product(depth: int) -> int: return chain(("*", "//", "%"), factor, depth)

    def factor(depth: int) -> int:
        if depth > MAX_DEPTH: raise ToolError(f"at most {MAX_DEPTH} brackets or signs inside one another")
        token = tokens.pop() if tokens else "the end"
        if token == "-": return -factor(depth + 1)
        if token == "(":
            value = total(depth + 1)
            if not tokens or tokens.pop() != ")": raise ToolError("a bracket is not closed")
            return value
        if re.fullmatch("[0-9]+", token): return _apply("+", int(token), 0)
        raise ToolError(f"expected a number, found {token}")

    value = total(0)
    if tokens: raise ToolError(f"expected + - * // % or the end, found {tokens[-1]}")
    return value


def _tool(name: str, description: str, parameter: str, example: str) -> dict:
    return dict(name=name, description=description, parameters={parameter: dict(type="string", description=example)}, required=[parameter])


TOOLS = (_tool("calculate", "whole-number arithmetic", "expression", "such as 3 * 12 + 5"),
         _tool("lookup", "price or stock", "key", "such as red kite price"))

# ours: (question, keys to look up, expression; {0} is the first value looked up). One call at level 0, two at 1, three at 2 and 3.
LEVELS = [
    [("price of one {a}?", ["{a} price"], ""), ("stock of {a}?", ["{a} stock"], ""), ("{x} * {y} + {z} = ?", [], "{x} * {y} + {z}"),
     ("{x} * {y} - {z} = ?", [], "{x} * {y} - {z}")],
    [("price of {n} {aa}?", ["{a} price"], "{n} * {0}"), ("{aa} left after {n} are sold?", ["{a} stock"], "{0} - {n}"),
     ("change from {z} for one {a}?", ["{a} price"], "{z} - {0}")],
    [("price of {n} {aa} and {m} {bb}?", ["{a} price", "{b} price"], "{n} * {0} + {m} * {1}"),
     ("value of all {aa}, less {z}?", ["{a} stock", "{a} price"], "{0} * {1} - {z}")],
    [("change from {x}{y} for {n} {aa} and {m} {bb}?", ["{a} price", "{b} price"], "{x}{y} - ({n} * {0} + {m} * {1})"),
     ("{n} {aa} cost how much more than {m} {bb}?", ["{a} price", "{b} price"], "{n} * {0} - {m} * {1}")],
]


class Shop(Environment):
    """Questions that need the tools: prices and stock are drawn for each task, so that no answer can be learnt by heart."""
    name, domain, levels, max_turns = "shop", "tools", len(LEVELS), 6      # ours: the longest solution takes four turns

    def sample(self, level: int, rng: Random) -> Task:
        self.check_level(level)
        question, keys, expression = rng.choice(LEVELS[level])
        items = [f"{rng.choice(COLOURS)} {thing}" for thing in rng.sample(THINGS, 3)]
        n, m, x, y, z = rng.randint(2, 9), rng.randint(2, 9), rng.randint(11, 99), rng.randint(11, 99), rng.randint(100, 199)
        slots = dict(a=items[0], b=items[1], aa=plural(items[0], n), bb=plural(items[1], m), n=n, m=m, x=x, y=y, z=z)
        table = {key: value for item in items for key, value in ((f"{item} price", rng.randint(3, 99)), (f"{item} stock", rng.randint(20, 99)))}
        keys = [key.format(**slots) for key in keys]
        # format() fills the values later: {0} stays as it is now
        expression = expression.format(*(f"{{{i}}}" for i in range(len(keys))), **slots)
        values = [table[key] for key in keys]
        answer = calculate(expression.format(*values)) if expression else values[0]
        return Task(self.name, self.domain, level, question.format(**slots), str(answer), dict(table=table, keys=keys, expression=expression), TOOLS)

    def worked(self, task: Task, effort: str, rng: Random) -> list[dict]:
        """One call a turn; each response is what step() gave."""
        regular, said = is_regular(effort), [dict(role="user", content=task.prompt)]
        keys, expression, values = task.meta["keys"], task.meta["expression"], []

        def turn(thought: str, name: str, **arguments: str) -> str:
            read = f"{values[-1]}, " if values and regular else ""
            call = dict(name=name, arguments=arguments)
            said.append(dict(role="assistant", content="", reasoning=(read + thought) if regular else "", tool_calls=[call]))
            said.append(self.step(task, said))
            return said[-1]["content"]

        for key in keys: values.append(turn(f"need {key}", "lookup", key=key))
        thought, filled = f"{keys[-1]} = {values[-1]}" if keys else "", expression.format(*values)
        if expression: thought = f"{filled} = {turn('calculate', 'calculate', expression=filled)}"
        return [*said[1:], dict(role="assistant", content=task.answer, reasoning=thought if regular else task.answer)]

    def step(self, task: Task, messages: list[dict]) -> dict | None:
        """Run the calls of the last message, one line of response a call. None after an answer without calls, or when no turn is left."""
        last, turns = messages[-1], sum(message.get("role") == "assistant" for message in messages)
        calls = last.get("tool_calls") or []
        malformed = not isinstance(calls, list) or not calls and "tool_call>" in str(last.get("content"))
        if turns >= self.max_turns or not calls and not malformed: return None
        if malformed: return dict(role="tool", content="error: malformed call, the tags stand on lines of their own")
        lines = [self._run(task, call) for call in calls[:MAX_CALLS]]
        if len(calls) > MAX_CALLS: lines.append(f"error: at most {MAX_CALLS} calls at once")
        return dict(role="tool", content="\n".join(lines))

    def _run(self, task: Task, call: dict) -> str:
        name, arguments = (call.get("name"), call.get("arguments")) if isinstance(call, dict) else (None, None)
        tool = next((tool for tool in TOOLS if tool["name"] == name), None)
        if tool is None: return f"error: no such tool, there are {' and '.join(tool['name'] for tool in TOOLS)}"
        parameter, = tool["required"]
        if not isinstance(arguments, dict) or list(arguments) != [parameter] or not isinstance(arguments[parameter], str):
            return f"error: {name} takes the text {parameter} and nothing else"
        text = arguments[parameter].strip()
        try: return str(calculate(text) if name == "calculate" else task.meta["table"][text])
        except ToolError as error: return f"error: {error}"
        except KeyError: return f"error: no such key, there are {', '.join(task.meta['table'])}"


FAMILIES = [Shop()]
