"""Instructions: answers that a program can check: length, first and last word, forbidden word or letter, case, list, JSON with given keys and types.

A word is letters with at most one of . , ! ? behind it; anything else fails every prompt but JSON. Words are compared in lower case.
What medium effort leaves out: the rules said again before the draft.
"""
import json
import re
from random import Random

from data.corpus import ANIMALS, BOYS, COLOURS, FRUIT, GIRLS, THINGS
from data.tasks.base import Environment, Task, is_regular

WORDS = [*THINGS, *COLOURS, *FRUIT, *(kind for kind, *_ in ANIMALS), "the", "my", "big", "small", "has", "runs", "jumps", "is", "on", "by", "two"]
KEYS = ["name", "age", "size", "kind", "price", "count", "open", "tags", "city", "year", "new", "items"]
TYPES = {"string": str, "integer": int, "boolean": bool, "list": list}

# rule -> (how it is said, whether the words w and the text t obey it with value v)
RULES = {
    "words": ("exactly {} words", lambda w, t, v: len(w) == v),
    "lines": ("a list of {} lines, each begins with -", lambda w, t, v: len(t.split("\n")) == v),
    "begin": ("begin with {}", lambda w, t, v: w[0] == v),
    "end": ("end with {}", lambda w, t, v: w[-1] == v),
    "use": ("use the word {}", lambda w, t, v: v in w),
    "avoid": ("without the word {}", lambda w, t, v: v not in w),
    "letter": ("no letter {}", lambda w, t, v: v not in t.lower()),
    "case": ("all {} case", lambda w, t, v: t == (t.lower() if v == "lower" else t.upper())),
    "once": ("no word twice", lambda w, t, v: len(set(w)) == len(w)),
}
MORE = ["begin", "end", "use", "avoid", "letter", "case", "once"]
# ours: (form, rules beside the length, or keys) by level
LEVELS = [[("one", 0)], [("words", 1), ("words", 1), ("json", 1)],
          [("words", 2), ("lines", 1), ("json", 2)], [("words", 3), ("lines", 2), ("json", 3)]]


def _read(content: str, lines: bool) -> list[str] | None:
    """The words in lower case; None when something is no word, or when a line of a list lacks its "- "."""
    if lines and not all(line.startswith("- ") for line in content.split("\n")): return None
    if lines: content = "\n".join(line[2:] or "-" for line in content.split("\n"))
    if "\n" in content and not lines: return None
    words = [re.fullmatch(r"([A-Za-z]+)[.,!?]?", word) for line in content.split("\n") for word in line.split() or ["-"]]
    return [word[1].lower() for word in words] if all(words) else None


def _once(pairs: list[tuple]) -> dict:
    if len(dict(pairs)) < len(pairs): raise ValueError("a key is there twice")
    return dict(pairs)


def _no_constant(name: str): raise ValueError(f"{name} is not JSON")


class Follow(Environment):
    """Rules are joined by level: one that no fixed answer obeys, then a length and one, two, three more; JSON with one, two, three keys, at the last
    level with a value given."""
    name, domain, levels = "follow", "instructions", len(LEVELS)

    def sample(self, level: int, rng: Random) -> Task:
        self.check_level(level)
        form, n = rng.choice(LEVELS[level])
        if form == "json":
            keys = {key: rng.choice(list(TYPES)) for key in rng.sample(KEYS, n)}
            given = {}
            if level == 3:
                key = rng.choice(list(keys))
                keys[key], given = "integer", {key: rng.randint(2, 99)}
            prompt = "JSON with " + ", ".join(f"{key} ({kind})" for key, kind in keys.items()) + "".join(f", {k} is {v}" for k, v in given.items())
            return Task(self.name, self.domain, level, prompt, "", dict(keys=keys, given=given))
        kinds = [rng.choice(["words", "begin", "end", "use"])] if form == "one" else [form, *rng.sample(MORE, n)]
        letter = rng.choice("aeiosrnt")
        words = rng.sample([word for word in WORDS if letter not in word or "letter" not in kinds], 4)
        value = dict(words=rng.randint(3, 8), lines=rng.randint(2, 4), begin=words[0], end=words[1], use=words[2], avoid=words[3], letter=letter,
                     case=rng.choice(["lower", "upper"]), once=None)
        rules = [[kind, value[kind]] for kind in kinds]
        return Task(self.name, self.domain, level, "write: " + ", ".join(RULES[k][0].format(v) for k, v in rules), "", dict(rules=rules))

    def right(self, task: Task, content: str) -> bool:
        if len(content) > 1000: return False      # ours: no prompt needs more
        if "keys" in task.meta:
            try: found = json.loads(content, object_pairs_hook=_once, parse_constant=_no_constant)
            except (ValueError, RecursionError): return False
            keys, given = task.meta["keys"], task.meta["given"]
            # type() and not isinstance(): true is an int to Python
            return (type(found) is dict and found.keys() == keys.keys() and all(type(found[key]) is TYPES[kind] for key, kind in keys.items())
                    and all(found[key] == value for key, value in given.items()))
        words = _read(content, any(kind == "lines" for kind, _ in task.meta["rules"]))
        return bool(words) and all(RULES[kind][1](words, content, value) for kind, value in task.meta["rules"])

    def worked(self, task: Task, effort: str, rng: Random) -> list[dict]:
        content, draft = self._json(task.meta, rng) if "keys" in task.meta else self._words(dict(task.meta["rules"]), rng)
        said = task.prompt.split(": ", 1)[-1].removeprefix("JSON with ")
        return [dict(role="assistant", content=content, reasoning=f"{said}: {draft}" if is_regular(effort) else draft)]

    def _json(self, meta: dict, rng: Random) -> tuple[str, str]:
        made = dict(string=lambda: rng.choice(GIRLS + BOYS), integer=lambda: rng.randint(2, 99), boolean=lambda: rng.random() < 0.5,
                    list=lambda: [rng.randint(1, 9), rng.randint(1, 9)])
        found = {key: meta["given"].get(key, made[kind]()) for key, kind in meta["keys"].items()}
        return json.dumps(found), ", ".join(json.dumps(value) for value in found.values())

    def _words(self, rules: dict, rng: Random) -> tuple[str, str]:
        """Nonsense that obeys: drawn words between the ones that are asked for. The draft counts words, or lines."""
        n = rules.get("words", 2 * rules.get("lines", 2))
        free = [w for w in WORDS if rules.get("letter", "-") not in w and w not in (rules.get(k) for k in ("begin", "end", "use", "avoid"))]
        first, last, inside = ([rules[k]] if k in rules else [] for k in ("begin", "end", "use"))
        middle = inside + rng.sample(free, n - len(first + last + inside))
        rng.shuffle(middle)
        words = [w.upper() if rules.get("case") == "upper" else w for w in first + middle + last]
        if "lines" not in rules: return " ".join(words), " ".join(f"{i} {w}" if "words" in rules else w for i, w in enumerate(words, 1))
        pairs = [f"{a} {b}" for a, b in zip(words[::2], words[1::2])]
        return "\n".join(f"- {pair}" for pair in pairs), " ".join(f"{i} {pair}" for i, pair in enumerate(pairs, 1))


FAMILIES = [Follow()]
