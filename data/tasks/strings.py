"""Strings: spelling backward, Caesar cipher, counting a letter, sorting words.

What medium effort leaves out: spell_backward: the word spelled forward; caesar_cipher: the letter that each letter came from; letter_counting: words
without the letter, and the running total; word_sorting: what is left after each pick.
What grows with the level: the word; the rotation, at last also the number of words; how many words are searched; how many words are sorted.
"""
from random import Random

from data.corpus import ANIMALS, COLOURS, FRUIT, GIRLS, THINGS
from data.tasks.base import Family


def spell_backward(meta: dict, regular: bool, rng: Random) -> str:
    word = meta["word"]
    return f"{' '.join(word)}, {' '.join(word[::-1])} = {word[::-1]}" if regular else " ".join(word[::-1])


def caesar_cipher(meta: dict, regular: bool, rng: Random) -> str:
    """KHOOR back 3 -> K-H H-E O-L O-L R-O;   medium: H E L L O. A slash stands between words."""
    return " ".join("/" if b == " " else f"{a}-{b}" if regular else b for a, b in zip(meta["cipher_text"], meta["clear_text"]))


def letter_counting(meta: dict, regular: bool, rng: Random) -> str:
    """o in "so too me" -> so 1 1, too 2 3, me 0 3;   medium: so 1, too 2"""
    total, steps = 0, []
    for word in (word.lower() for word in meta["span"]):
        n = word.count(meta["target_letter"])
        total += n
        if regular or n: steps.append(f"{word} {n} {total}" if regular else f"{word} {n}")
    return ", ".join(steps)


def word_sorting(meta: dict, regular: bool, rng: Random) -> str:
    """c, a, b -> c a b: a; c b: b; c;   medium: a b c. Capital letters come before small ones."""
    left, steps = list(meta["transformed_words"]), []
    for word in meta["sorted_words"]:
        steps.append(f"{' '.join(left)}: {word}" if len(left) > 1 else word)
        left.remove(word)
    return "; ".join(steps) if regular else " ".join(meta["sorted_words"])


def own_words(settings: dict, rng: Random) -> tuple[dict, str]:
    """Words of the stories' generator. There are few, so two of them make a longer one."""
    words = [w.lower() for w in [*THINGS, *COLOURS, *FRUIT, *GIRLS, *(kind for kind, *_ in ANIMALS), *(young for _, young, *_ in ANIMALS)]]
    words = sorted({*words, *(a + b for a in words for b in words)})
    word = rng.choice([w for w in words if settings["min_word_len"] <= len(w) <= settings["max_word_len"]])
    return dict(word=word), word[::-1]


def _rotations(least: int, words: int, delimiter: str, most: int) -> dict:
    return dict(min_words=least, max_words=words, delimiter=delimiter, min_rotation=1, max_rotation=most)


# ours: the levels of each family. The cipher's text is cut at spaces into words, at commas into phrases.
FAMILIES = [
    Family("spell_backward", "strings", tuple(dict(min_word_len=a, max_word_len=a + 1) for a in (3, 5, 7, 9)),
           lambda m: f"spell backward: {m['word']}", spell_backward, own=own_words),
    Family("caesar_cipher", "strings", (_rotations(1, 1, " ", 2), _rotations(1, 1, " ", 6), _rotations(1, 1, " ", 25), _rotations(2, 3, ",", 25)),
           lambda m: f"shift back {m['rotation']}: {m['cipher_text']}", caesar_cipher),
    Family("letter_counting", "strings", tuple(dict(min_words=a, max_words=b) for a, b in ((6, 7), (8, 10), (11, 12), (13, 15))),
           lambda m: f"how many {m['target_letter']} in: {' '.join(m['span']).lower()}?", letter_counting),
    Family("word_sorting", "strings", tuple(dict(min_words=n, max_words=n, max_word_length=n + 2) for n in (3, 4, 5, 6)),
           lambda m: f"sort{' backward' if m['direction'] == 'descending' else ''}: {', '.join(m['transformed_words'])}", word_sorting),
]
