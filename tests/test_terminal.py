"""data/terminal.py, driven by a fake terminal, and in a process of its own where bytes matter."""
import os
import signal
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from data import terminal

ROOT = Path(__file__).parent.parent


def drive(lines, answer=lambda *asked: terminal.Reply(dict(role="assistant", content="yes"), 2, 0.1, 0.5, "stop_id"), **kwargs):
    """(what was asked, everything that was shown) when a person types `lines`; an exception among them is raised, then input ends."""
    asked, shown, rest = [], [], iter(lines)

    def read(prompt):
        shown.append(prompt)
        line = next(rest, EOFError())
        if isinstance(line, BaseException): raise line
        return line

    def ask(messages, mode, budget, show, stopped):
        asked.append((list(messages), mode, budget))
        return answer(messages, mode, budget, show, stopped)

    terminal.chat(ask, read=read, say=shown.append, **kwargs)
    return asked, "".join(shown)


def user(text): return dict(role="user", content=text)


YES = dict(role="assistant", content="yes")


def test_a_conversation_grows_until_reset():
    """The second question carries the first and its answer; after /reset it stands alone."""
    asked, shown = drive(["a", "  b ", "/reset", "", "c"])
    assert [messages for messages, *_ in asked] == [[user("a")], [user("a"), YES, user("b")], [user("c")]]
    assert shown.count("[2 tokens, 20 tokens/s, 50% of drafts kept]") == 3


@pytest.mark.parametrize("lines, mode, budget", [
    ([], "regular", None), (["/think off"], "off", None), (["/think medium"], "medium", None), (["/think off", "/think on"], "regular", None),
    (["/effort medium"], "medium", None), (["/think off", "/effort regular"], "regular", None), (["/budget 40"], "regular", 40),
    (["/budget 0"], "regular", 0), (["/budget 40", "/budget off"], "regular", None), (["/budget 7", "/reset"], "regular", 7)])
def test_commands_reach_the_next_question(lines, mode, budget):
    asked, shown = drive([*lines, "x"])
    assert asked == [([user("x")], mode, budget)] and "no command" not in shown


@pytest.mark.parametrize("line, words", [
    ("/think perhaps", "/think takes one of on, off, medium."), ("/think", "/think takes one of"),
    ("/effort off", "/effort takes one of regular, medium."),
    ("/budget -3", "/budget takes a number"), ("/budget ²", "/budget takes a number"), ("/budget 3 4", "/budget takes a number"),
    ("/budget", "/budget takes a number"), ("/exit", "/exit is no command; /help lists them."), ("/help", "/budget N | off")])
def test_a_wrong_command_is_one_sentence_and_changes_nothing(line, words):
    asked, shown = drive(["/think medium", "/budget 9", line, "x"])
    assert words in shown and asked == [([user("x")], "medium", 9)]


def test_quit_and_end_of_input_leave_and_a_ctrl_c_at_the_prompt_does_not():
    assert drive(["/quit", "never"])[0] == [] and drive([])[0] == []
    asked, shown = drive([KeyboardInterrupt(), "x"])
    assert len(asked) == 1 and "/quit leaves" in shown


def test_ctrl_c_stops_the_answer_and_forgets_the_question():
    """A real SIGINT while the answer is written: no exception, `stopped` turns true, the old handler is back afterwards."""
    def answer(messages, mode, budget, show, stopped):
        show("first")
        assert not stopped()
        if messages[-1]["content"] == "long": os.kill(os.getpid(), signal.SIGINT)
        show(" second")
        return terminal.Reply(YES, 1, 1.0, None, "cancelled" if stopped() else "stop_id")

    before = signal.getsignal(signal.SIGINT)
    asked, shown = drive(["a", "long", "b"], answer)
    assert signal.getsignal(signal.SIGINT) is before
    assert [messages for messages, *_ in asked] == [[user("a")], [user("a"), YES, user("long")], [user("a"), YES, user("b")]]
    assert shown.count("first second") == 3 and shown.count(terminal.ENDS["cancelled"]) == 1


def test_what_cannot_be_answered_is_said_and_forgotten():
    def answer(messages, *rest):
        if "big" in messages[-1]["content"]: raise ValueError("too long.")
        return terminal.Reply(YES, 1, 1.0, None, "stop_id")

    asked, shown = drive(["big", "a"], answer)
    assert shown.count("too long. /reset begins a new conversation.") == 1 and asked[1][0] == [user("a")]


def test_an_answer_cannot_move_the_cursor():
    """Escape sequences, backspaces, carriage returns and C1 controls become visible; line ends, tabs and other letters stay."""
    def answer(messages, mode, budget, show, stopped):
        show("a\x1b[2J\x07\b\r\x7f\x9bb\n\tü→")
        return terminal.Reply(YES, 1, 1.0, None, "stop_id")

    _, shown = drive(["x"], answer)
    assert "a␛[2J␇␈␍␡�b\n\tü→" in shown and not {"\x1b", "\x07", "\b", "\r", "\x7f", "\x9b"} & set(shown)


def test_all_that_unicode_calls_control_is_shown_and_nothing_else():
    """Every character of category Cc but line end and tab becomes one that is not; a range that ends early would let the last ones through."""
    letters = [chr(i) for i in range(0x3000)]
    changed = [a for a in letters if terminal.clean(a) != a]
    assert changed == [a for a in letters if unicodedata.category(a) == "Cc" and a not in "\n\t"] and len(changed) == 63
    assert all(len(terminal.clean(a)) == 1 and unicodedata.category(terminal.clean(a)) == "So" for a in changed)
    assert terminal.clean("\0\x1f") == "\N{SYMBOL FOR NULL}\N{SYMBOL FOR UNIT SEPARATOR}"


def test_the_line_behind_an_answer():
    reply = terminal.Reply(YES, 30, 0.5, None, "length")
    assert reply.line() == "[30 tokens, 60 tokens/s, the answer has reached --max-tokens]"
    assert reply._replace(accepted=0.256, reason="stop").line() == "[30 tokens, 60 tokens/s, 26% of drafts kept]"
    assert "/reset" in reply._replace(reason="cache").line()
    assert reply._replace(tokens=0, seconds=0.0, reason="stop").line() == "[0 tokens, 0 tokens/s]"


def test_bytes_that_are_no_utf8_are_read_as_a_replacement_and_said():
    """In the C locale, where Python would read ASCII: é arrives whole, 0xff as �, half a character at the end too; é goes out as UTF-8."""
    code = ("from data import terminal; terminal.prepare(); message = dict(role='assistant', content='')\n"
            "def ask(talk, mode, budget, show, stopped):\n"
            "    show(ascii(talk[-1]['content']) + chr(233)); return terminal.Reply(message, 1, 1.0, None, 'stop_id')\n"
            "terminal.chat(ask)")
    env = dict(os.environ, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    done = subprocess.run([sys.executable, "-c", code], input=b"caf\xc3\xa9\n\xffx\nab\xc3", capture_output=True, cwd=ROOT, env=env)
    assert done.returncode == 0 and done.stderr == b""
    shown = done.stdout.decode()
    assert r"'caf\xe9'é" in shown and r"'\ufffdx'é" in shown and r"'ab\ufffd'é" in shown and shown.count("no UTF-8") == 2


def test_prompts_come_from_a_flag_or_a_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\n  \ntwo é\n", encoding="utf-8")
    assert terminal.read_prompts("", file) == ["one", "two é"] and terminal.read_prompts("x", None) == ["x"]
    for prompt, path, words in (("x", file, "not both"), ("  ", None, "the prompt is empty"), ("", None, "the prompt is empty"),
                                ("", tmp_path / "no", "cannot be read"), ("", tmp_path, "cannot be read")):
        with pytest.raises(ValueError, match=words): terminal.read_prompts(prompt, path)
    file.write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match=r"not UTF-8 text \(byte 2\)"): terminal.read_prompts("", file)
    file.write_text("\n\n")
    with pytest.raises(ValueError, match="holds no prompt"): terminal.read_prompts("", file)
