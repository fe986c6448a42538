"""A conversation in a terminal: lines in, pieces of text out as they come, commands behind a slash. It knows no model: answers come from a callable.

What a terminal may do to it: bytes that are no UTF-8 are read as "�", and said so; Ctrl-C while an answer is written stops the answer, elsewhere it
does nothing; end of input (Ctrl-D) leaves. What a model may do to a terminal: control characters of an answer are shown as pictures ("␛"), so that
no text can move the cursor or ask the terminal for anything.
"""
from __future__ import annotations

import contextlib
import importlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

HELP = """/think on | off | medium     think before answering, or not, or briefly
/effort regular | medium     how long to think, the same as /think on and /think medium
/budget N | off              close a trace of thoughts after N tokens, at its next line end
/reset                       forget the conversation
/quit                        leave, as end of input does; Ctrl-C stops an answer
"""
MODES = {"/think": {"on": "regular", "off": "off", "medium": "medium"}, "/effort": {"regular": "regular", "medium": "medium"}}
ENDS = {"length": "the answer has reached --max-tokens", "cache": "the cache is full: /reset begins a new conversation",
        "cancelled": "stopped; question and answer are forgotten"}
PICTURES = {i: 0x2400 + i for i in range(32) if chr(i) not in "\n\t"} | {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


class Reply(NamedTuple):
    """What an answer came to. message: the turn to keep in the conversation; accepted: share of drafts kept, None without any; reason: of its end."""
    message: dict
    tokens: int
    seconds: float
    accepted: float | None
    reason: str

    def line(self) -> str:
        """"[40 tokens, 200 tokens/s, 61% of drafts kept]" """
        parts = [f"{self.tokens} tokens", f"{self.tokens / max(self.seconds, 1e-9):,.0f} tokens/s"]
        if self.accepted is not None: parts.append(f"{self.accepted:.0%} of drafts kept")
        if self.reason in ENDS: parts.append(ENDS[self.reason])
        return f"[{', '.join(parts)}]"


# (messages, mode, budget or None, show a piece, has Ctrl-C been pressed?) -> Reply; ValueError for what a person can mend
Ask = Callable[[list[dict], str, int | None, Callable[[str], None], Callable[[], bool]], Reply]


def clean(text: str) -> str:
    """Control characters but line ends and tabs as pictures:  "a\\x1b[2Jb" -> "a␛[2Jb" """
    return text.translate(PICTURES)


def held_back(text: str, stops: tuple[str, ...]) -> int:
    """Characters at the end of a stream that may become a string that stops it.    "so ab", stop "abc" -> 2"""
    return max((n for stop in stops for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])), default=0)


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def prepare() -> None:
    """UTF-8 both ways, whatever the locale says; a byte that is none becomes "�". At a keyboard, line editing and history where Python has them."""
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"): stream.reconfigure(encoding="utf-8", errors="replace")
    with contextlib.suppress(ImportError):
        if sys.stdin.isatty(): importlib.import_module("readline")


@contextlib.contextmanager
def ctrl_c() -> Iterator[Callable[[], bool]]:
    """While open Ctrl-C raises nothing; the callable says whether it was pressed. An engine must not be left in the middle of a step."""
    pressed = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: pressed.set())
    try: yield pressed.is_set
    finally: signal.signal(signal.SIGINT, before)


def command(line: str, mode: str, budget: int | None) -> tuple[str, int | None, str]:
    """(mode, budget, what to say) after a line that begins with a slash and is neither /reset nor /quit."""
    name, *words = line.split()
    word = words[0] if len(words) == 1 else ""
    if name in MODES and word in MODES[name]: return MODES[name][word], budget, f"mode {MODES[name][word]}"
    if name in MODES: return mode, budget, f"{name} takes one of {', '.join(MODES[name])}."
    if name == "/budget" and word == "off": return mode, None, "no budget"
    if name == "/budget" and word.isascii() and word.isdigit(): return mode, int(word), f"thoughts are closed after {int(word)} tokens"
    if name == "/budget": return mode, budget, "/budget takes a number of tokens, or off."
    return mode, budget, HELP.rstrip() if name == "/help" else f"{name} is no command; /help lists them."


def chat(ask: Ask, mode: str = "regular", budget: int | None = None, read: Callable[[str], str] = input, say: Callable[[str], None] = write) -> None:
    """Reads lines until /quit or end of input. read(prompt) returns a line, or raises EOFError or KeyboardInterrupt, as input does."""
    talk: list[dict] = []
    say("/help lists the commands.\n")
    while True:
        try: line = read("\n> ").strip()
        except EOFError: return say("\n")
        except KeyboardInterrupt: say("\n(/quit leaves)\n"); continue
        if line == "/quit": return
        with ctrl_c() as stopped:
            if "\N{REPLACEMENT CHARACTER}" in line: say("(bytes that are no UTF-8 were read as \N{REPLACEMENT CHARACTER})\n")
            if line == "/reset": talk = []; say("a new conversation\n")
            elif line.startswith("/"):
                mode, budget, said = command(line, mode, budget)
                say(f"{said}\n")
            elif line:
                asked = [*talk, dict(role="user", content=line)]
                try: reply = ask(asked, mode, budget, lambda piece: say(clean(piece)), stopped)
                except ValueError as error: say(f"{error} /reset begins a new conversation.\n"); continue
                if reply.reason != "cancelled": talk = [*asked, reply.message]
                say(f"\n{reply.line()}\n")


def read_prompts(prompt: str, file: Path | None) -> list[str]:
    """The prompt, or the lines of a file that are not blank. ValueError when there is none, or the file is no text."""
    if prompt and file: raise ValueError("give a prompt or --file, not both.")
    if file is None: prompts = [prompt]
    else:
        try: prompts = Path(file).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error: raise ValueError(f"{file} is not UTF-8 text (byte {error.start}): save it as such.") from None
        except OSError as error: raise ValueError(f"{file} cannot be read ({error.strerror}): give a file with one prompt a line.") from None
    prompts = [text for text in prompts if text.strip()]
    if not prompts and file: raise ValueError(f"{file} holds no prompt: write one on a line.")
    if not prompts: raise ValueError("the prompt is empty: give a text, or --file with one prompt a line.")
    return prompts
