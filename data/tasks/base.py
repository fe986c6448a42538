"""What a task is, how a completion is read, which side of the split a question falls on, and families that reasoning-gym draws.

reasoning-gym (Apache-2.0) draws the numbers and knows the answer; question and worked steps are written here, in a terse form, because a small model
can only learn to compute what it is shown step by step. Without reasoning-gym, families that have a generator of their own remain.
"""
from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import NamedTuple

HELD_OUT, VALIDATION = 0.2, 0.1      # ours: one prompt in five is held out, one in ten is there to choose settings on
GYM = importlib.util.find_spec("reasoning_gym") is not None


class Task(NamedTuple):
    """One question. `answer` is the right final answer as text, or "" where score() checks constraints instead."""
    family: str
    domain: str
    level: int               # 0 = easiest
    prompt: str
    answer: str
    meta: dict               # JSON-serialisable: what score, step and worked need
    tools: tuple = ()        # dict(name=, description=, parameters={name: dict(type=, description=)}, required=[...])
    system: str = ""


class Parsed(NamedTuple):
    """A completion taken apart. After an error, `content` is the whole text and nothing in it counts."""
    reasoning: str
    content: str
    tool_calls: list[dict]   # [{"name": str, "arguments": {name: text}}]
    error: str | None


# what a decoder prints for special tokens that have no place inside an assistant's turn
UNWANTED = re.compile(r"<\|im_(?:start|end)\|>|</?tool_response>|</?s>|<unk>|<SPECIAL_\d+>")


def _call(text: str) -> dict | None:
    """"\\n<function=f>\\n<parameter=p>\\nv\\n</parameter>\\n</function>\\n" -> {"name": "f", "arguments": {"p": "v"}}; None when it is malformed."""
    match = re.fullmatch(r"\n<function=([A-Za-z_]\w*)>\n(.*)</function>\n", text, re.S | re.A)
    if not match: return None
    name, rest, arguments = match[1], match[2], {}
    while rest:
        match = re.match(r"<parameter=([A-Za-z_]\w*)>\n(.*?)\n</parameter>\n", rest, re.S | re.A)
        if not match or match[1] in arguments: return None
        arguments[match[1]], rest = match[2], rest[match.end():]
    return dict(name=name, arguments=arguments)


def parse_completion(text: str, thinking: bool = True) -> Parsed:
    """A raw assistant turn, as generated behind "<think>\\n" (thinking) or "<think></think>" (not). Never raises; the first rule that fits holds:

    | the text, after one <|im_end|> at its end is taken off    | result                                          |
    |-----------------------------------------------------------|-------------------------------------------------|
    | holds <think>                                             | error "thinking opened again"                   |
    | thinking: no </think>                                     | error "no end of thinking"                      |
    | thinking: more than one </think>                          | error "two ends of thinking"                    |
    | not thinking: any </think>                                | error "end of thinking without thinking"        |
    | holds another special token, such as <|im_start|>         | error "unwanted token"                          |
    | a tool call's tag before </think>                         | error "tool call while thinking"                |
    | tags that do not pair, or a call not in the wire format   | error "malformed tool call"                     |
    | nothing but white space behind </think>                   | error "empty answer"                            |
    | anything else                                             | reasoning and content without outer white space |

    Content is what stands outside the calls. Empty reasoning is no error. Arguments stay text: the tool reads them.
    """
    def failed(error): return Parsed("", text, [], error)
    body = text.removesuffix("<|im_end|>")
    if "<think>" in body: return failed("thinking opened again")
    reasoning, *rest = body.split("</think>") if thinking else ("", body)
    if not rest: return failed("no end of thinking")
    if len(rest) > 1: return failed("two ends of thinking")
    content = rest[0]
    if "</think>" in content: return failed("end of thinking without thinking")
    if UNWANTED.search(body): return failed("unwanted token")
    if re.search(r"</?tool_call>", reasoning): return failed("tool call while thinking")
    pieces = re.split(r"<tool_call>(.*?)</tool_call>", content, flags=re.S)      # text, call, text, call, ..., text
    plain, calls = "".join(pieces[::2]).strip(), [_call(piece) for piece in pieces[1::2]]
    if None in calls or re.search(r"</?tool_call>|</?function\b|</?parameter\b", plain): return failed("malformed tool call")
    if not plain and not calls: return failed("empty answer")
    return Parsed(reasoning.strip(), plain, calls, None)


def split_of(task: Task) -> str:
    """"train", "validation" or "held_out", by content alone: the same question falls on the same side at every level and seed."""
    share = int.from_bytes(hashlib.sha256(f"{task.family}\n{task.prompt}".encode()).digest()[:8], "big") / 2**64
    return "held_out" if share < HELD_OUT else "validation" if share < HELD_OUT + VALIDATION else "train"


class Environment:
    """One family: draws tasks, shows a worked solution, scores, and answers tool calls."""
    name: str
    domain: str
    levels: int
    max_turns: int = 1       # assistant turns allowed in one conversation

    def sample(self, level: int, rng: Random) -> Task: raise TypeError(f"{type(self).__name__} needs its own sample(level, rng)")
    def worked(self, task: Task, effort: str, rng: Random) -> list[dict]: raise TypeError(f"{type(self).__name__} needs its own worked()")
    def right(self, task: Task, content: str) -> bool: return content == task.answer

    def score(self, task: Task, completion: str, thinking: bool = True) -> float:
        """1.0 when the last turn's content is the answer and nothing else, 0.0 otherwise; never raises.   "...</think>12" is right, "...</think>12."
        is not. NOTE: `thinking` must be what the prompt said; guessing it from the text would reward an answer that never ended its thinking."""
        parsed = parse_completion(completion, thinking)
        return float(parsed.error is None and not parsed.tool_calls and self.right(task, parsed.content))

    def step(self, task: Task, messages: list[dict]) -> dict | None:
        """The tool's response to the last message, or None: the conversation is over."""
        return None

    def check_level(self, level: int) -> None:
        if not 0 <= level < self.levels: raise ValueError(f"{self.name} has levels 0 to {self.levels - 1}, not {level}.")


@cache
def _dataset(name: str, settings: tuple):
    import reasoning_gym
    return reasoning_gym.create_dataset(name, seed=0, **dict(settings))


@dataclass(frozen=True)
class Family(Environment):
    """A family of reasoning-gym in terse words. `ask` gets reasoning-gym's metadata and its "question"; `steps` gets the metadata, whether all steps
    are shown (regular effort) or fewer (medium), and a random source; `read` turns the gym's answer into ours where the form differs."""
    name: str
    domain: str
    settings: tuple[dict, ...]      # by level: reasoning-gym's keyword arguments
    ask: Callable[[dict], str]
    steps: Callable[[dict, bool, Random], str]
    read: Callable[[str], str] = str
    own: Callable[[dict, Random], tuple[dict, str]] | None = None      # (settings, rng) -> metadata, answer: used without reasoning-gym
    accepts: Callable[[dict, str], bool] | None = None                 # (metadata, content): for questions with more than one right answer
    skip: Callable[[dict], bool] = lambda meta: False                  # metadata of a draw that is not worth asking
    gym: bool = True                                                   # False: `own` always draws

    @property
    def levels(self) -> int: return len(self.settings)

    def dataset(self, level: int):
        """reasoning-gym's set at this level. Item i depends on i alone, so an index drawn at random is a fresh draw, at 0.01 to 0.3 ms."""
        return _dataset(self.name, tuple(self.settings[level].items()))

    def _draw(self, level: int, rng: Random) -> tuple[str, str, dict]:
        if not (self.gym and GYM):
            meta, answer = self.own(self.settings[level], rng)
            return "", answer, meta
        item = self.dataset(level)[rng.randrange(2**40)]
        return item["question"], item["answer"], {k: v for k, v in item["metadata"].items() if k not in ("source_dataset", "difficulty")}

    def sample(self, level: int, rng: Random) -> Task:
        self.check_level(level)
        question, answer, meta = self._draw(level, rng)
        while self.skip(meta): question, answer, meta = self._draw(level, rng)
        prompt = self.ask({**meta, "question": question})
        if self.accepts: return Task(self.name, self.domain, level, prompt, "", {**meta, "example": self.read(answer)})
        return Task(self.name, self.domain, level, prompt, self.read(answer), meta)

    def worked(self, task: Task, effort: str, rng: Random) -> list[dict]:
        return [dict(role="assistant", content=task.answer or task.meta["example"], reasoning=self.steps(task.meta, is_regular(effort), rng))]

    def right(self, task: Task, content: str) -> bool:
        return self.accepts(task.meta, content) if self.accepts else content == task.answer


def is_regular(effort: str) -> bool:
    if effort not in ("regular", "medium"): raise ValueError(f'effort is "regular" or "medium", not {effort!r}.')
    return effort == "regular"
