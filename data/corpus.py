"""Text to learn from, with no download: a table of sources, a generator of stories and facts, and a split by content.

A source is a function of a seed that yields documents (strings); add one to SOURCES and every stage can use it by name (`--data NAME`).
Besides the table, `--data` takes local files (path/*.txt, *.jsonl, *.parquet; the last two with a field "text") and sets on the Hugging Face
hub, streamed in their own order: `hf:NAME@200MB` reads documents until the next one would make more than 200 MB of text (KB, MB, GB), and
downloads little more; `hf:NAME@CONFIG@200MB` those of one configuration; without an amount the whole set is read.

Run:      python -m data.corpus               # 2 s: a few documents of each built-in source
Contents: 1 Python's own text   2 questions with worked steps   3 stories   4 facts   5 files and the hub   6 sources   7 split and build
Licences: the standard library and its topics are PSF-2.0 and are read from the installation of whoever runs this; tasks are drawn by
          reasoning-gym (Apache-2.0); stories and facts are written by the functions below. None of the text is shipped here.
"""
import glob
import hashlib
import json
import math
import os
import platform
import random
import re
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

# %% 1 · Python's own text
# Every installation carries 10 MB of code with English docstrings, and the language reference as prose. A document of code is one top-level
# function or class (or what stands above the first), so that a document begins where a person would begin to read.

def pieces(text: str, size: int = 2000) -> Iterator[str]:
    """Cut a long text at blank lines into pieces of at least `size` characters; text without blank lines is cut at a line end after 4·size."""
    lines, length = [], 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        length += len(line)
        if length > size and not line.strip() or length > 4 * size:
            yield "".join(lines)
            lines, length = [], 0
    if lines: yield "".join(lines)


def stdlib_code(seed: int) -> Iterator[str]:
    """Functions and classes of the standard library, files in an order drawn from the seed. The text differs from one Python version to the next."""
    root = Path(sysconfig.get_paths()["stdlib"])
    # left out: tests, an editor, tables of bytes, and packages that are not Python's own
    skip = {"test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "site-packages", "__pycache__"}
    files = [f for f in sorted(root.rglob("*.py")) if not skip & set(f.relative_to(root).parts)]
    random.Random(seed).shuffle(files)
    for file in files:
        try: text = file.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError): continue
        # cut after a blank line, so that decorators stay with what they decorate
        for piece in re.split(r"\n{2,}(?=@|(?:def|class|async def)\b)", text):
            if 80 <= len(piece) <= 4000: yield piece.strip() + "\n"      # ours: short enough to be seen whole by a small model


def pydoc_topics(seed: int) -> Iterator[str]:
    """The language reference as it comes with `help()`."""
    from pydoc_data.topics import topics
    for name in sorted(topics):
        yield from pieces(topics[name])


# %% 2 · Questions with worked steps
# The easy families of data/tasks at level 0, as plain text. A small model can only learn to compute what it is shown step by step, and what is
# fine-tuned and scored later on is learnt faster by a base that has read it: Ultra's blend too holds synthetic questions and answers  [Ultra].
# NOTE: questions of the training split only. What is held out there, or set aside to choose settings on, is in no text.

def worked_tasks(seed: int, families: tuple[str, ...] = ()) -> Iterator[str]:
    """Question, steps, answer, families in turn, without end; what a tool said stands behind its call.

    Q: 27 + 48 = ?\\nA: 20 + 40 = 60, 7 + 8 = 15, 60 + 15 = 75. The answer is 75.
    Q: price of one red kite?\\nA: need red kite price, lookup(red kite price) 45, red kite price = 45. The answer is 45.
    """
    from data import tasks  # here, because some families borrow this module's words

    rng = random.Random(seed)
    while True:
        for environment in (tasks.ENVIRONMENTS[name] for name in families or tasks.EASY):
            task = environment.sample(0, rng)
            while tasks.split_of(task) != "train": task = environment.sample(0, rng)
            *turns, last = environment.worked(task, "regular", rng)
            steps = [step for message, response in zip(turns[::2], turns[1::2]) for call in message["tool_calls"]
                     for step in (message["reasoning"], f"{call['name']}({', '.join(call['arguments'].values())}) {response['content']}")]
            yield f"Q: {task.prompt}\nA: {', '.join(filter(None, [*steps, last['reasoning']]))}. The answer is {last['content']}.\n"


# %% 3 · Stories
# A plot is a text: one line a sentence, " | " between the ways to say it, {slots} for what is drawn once for a story and then kept. So what was
# lost is what is found, and what is given away is missing from the count: form, reference and simple causes are what a small model can learn.
# A line "choose a / b: ..." draws the values of its slots together, so that a remedy fits its trouble.

GIRLS = ["Mia", "Lily", "Anna", "Zoe", "Nora", "Ella", "Ruby", "Ivy"]
BOYS = ["Ben", "Tom", "Max", "Sam", "Leo", "Jack", "Omar", "Finn"]
COLOURS = ["red", "blue", "green", "yellow", "white", "orange"]
THINGS = ["ball", "kite", "hat", "book", "boat", "drum", "doll", "cup", "key", "bell", "bag", "scarf"]
PLACES = ["in the park", "at the beach", "in the garden", "in the forest", "by the river", "at the farm", "on the hill", "by the lake"]
HIDDEN = ["behind a tree", "in an old box", "under a bench", "behind a door", "in the tall grass", "next to a big stone"]
FRUIT = ["apples", "pears", "plums", "cookies", "nuts", "oranges", "cakes"]
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
# kind, young, legs, sound, what it eats, where it lives
ANIMALS = [
    ("dog", "puppy", 4, "barks", "meat", "in a house"), ("cat", "kitten", 4, "meows", "fish", "in a house"),
    ("cow", "calf", 4, "moos", "grass", "on a farm"), ("duck", "duckling", 2, "quacks", "plants", "on a pond"),
    ("horse", "foal", 4, "neighs", "hay", "in a stable"), ("pig", "piglet", 4, "grunts", "corn", "on a farm"),
    ("sheep", "lamb", 4, "bleats", "grass", "on a farm"), ("frog", "tadpole", 4, "croaks", "flies", "by a pond"),
    ("hen", "chick", 2, "clucks", "seeds", "on a farm"), ("bear", "cub", 4, "growls", "honey", "in a forest"),
    ("owl", "owlet", 2, "hoots", "mice", "in a tree"), ("goat", "kid", 4, "bleats", "leaves", "on a hill"),
    ("lion", "cub", 4, "roars", "meat", "on the plain"), ("bird", "chick", 2, "sings", "seeds", "in a nest"),
    ("mouse", "pup", 4, "squeaks", "cheese", "in a hole")]

OPENINGS = ("Once upon a time there was a {child} called {name}. | There once was a {child} named {name}. | "
            "{name} and {friend} were good friends. | {name} lived in a small house with {his} family.")
PLOTS = ["""
{name} had {a_thing}. | {name} loved {his} {thing}. | {friend} gave {name} {a_thing}.
It was {his} favourite thing. | {He} took it everywhere. | {He} played with it every day.
One day, {name} could not find the {thing}. | One morning, the {thing} was gone. | But one day {he} lost the {thing} {place}.
{name} was sad and began to cry. | {He} felt very sad. | {name} did not know what to do.
"Have you seen my {thing}?" {he} asked {friend}. | "Can you help me find my {thing}?" asked {name}.
{friend} looked {hidden}, but it was not there. | They looked {hidden} first, but they found nothing.
Then they looked {found}. | At last {friend} looked {found}. | After a long time, they went to look {found}.
There was the {thing}! "You found it!" said {name}. | The {colour} {thing} was there. "Thank you, {friend}!" said {name}.
{name} was happy again. | {name} gave {friend} a big hug. | From then on, {name} took good care of the {thing}.
""", """
{name} went for a walk {place} with {friend}. | {name} and {friend} sat down {place}.
{name} had {n} {fruit}, but {friend} had none. | {name} had {n} {fruit} in {his} bag. {friend} had nothing to eat.
"I am hungry," said {friend}. | {friend} looked at the {fruit} and was very hungry.
It is nice to share. | {name} wanted to be kind. | At first {name} did not want to share. Then {he} saw that {friend} was sad.
"Here, take {k} of my {fruit}," said {name}. | So {name} gave {k} of the {fruit} to {friend}.
Now {name} had {rest} and {friend} had {k}. | Now {friend} had {k}, and {name} still had {rest}.
"Thank you, {name}! You are a good friend," said {friend}. | {friend} smiled and said, "You are very kind."
They ate together and were happy. | They sat in the sun and ate and laughed. | Food tastes better when you share it.
""", """
choose trouble / why / remedy / after: cold / it had rained all night / put a warm scarf around it / warm
choose trouble / why / remedy / after: hungry / it had not eaten all day / gave it some bread and milk / full
choose trouble / why / remedy / after: stuck / its foot was caught in a net / cut the net and set it free / free
choose trouble / why / remedy / after: lost / it had gone too far from home / walked with it all the way home / home again
{name} was walking {place}. | One day, {name} went for a walk {place}.
{He} heard a small sound {found}. | There was something {found}.
It was a little {animal}! | {name} looked and saw a little {animal}.
The {animal} was {trouble} because {why}.
"Do not be afraid," said {name}. "I will help you." | "Poor little {animal}," said {name}. | {name} wanted to help.
So {name} {remedy}. | {He} {remedy}.
Soon the {animal} was {after}. | Now the {animal} was {after}, and it was not sad any more.
The next day the {animal} came back to see {name}. | The {animal} never forgot {name}. | From that day, {name} and the {animal} were friends.
They played together {place}. | {name} was glad that {he} had helped.
""", """
choose fear / act / done: the dark / turned off the light / the dark was quiet and soft
choose fear / act / done: the water / put one foot into the water / the water was warm and nice
choose fear / act / done: the big dog / held out {his} hand / the dog was friendly and licked {his} hand
choose fear / act / done: the thunder / counted to {n} after the flash / the storm was far away
{name} was afraid of {fear}. | There was one thing that {name} did not like. {He} was afraid of {fear}.
{friend} was not afraid. | {friend} was not afraid at all.
"I will stay with you," said {friend}. | "Let us try it together," said {friend}. | "You can hold my hand," said {friend}.
{name} took a deep breath. | {name} closed {his} eyes and counted to three.
Then {he} {act}. | Slowly, {he} {act}.
It was not so bad: {done}. | {name} was surprised, because {done}.
"I did it!" said {name}. | "I am not afraid any more!" said {name}.
{name} was proud, and {friend} was proud too. | After that day, {name} was not afraid of {fear}.
""", """
choose weather / effect / instead: it began to rain / the ground was wet / made a boat out of paper
choose weather / effect / instead: it began to snow / everything was white / built a big snowman
choose weather / effect / instead: a strong wind came / the leaves flew up into the sky / let a {colour} kite fly
choose weather / effect / instead: it was very hot / nobody wanted to run / ate ice cream under a tree
{name} and {friend} wanted to play with {a_thing} {place}. | {name} had a plan. {He} wanted to play with {friend} {place}.
But {weather}, and {effect}. | Then {weather}. Soon {effect}.
"Now we cannot play," said {friend}. | {friend} was sad. | "Oh no," said {name}.
"I have an idea," said {name}. | "Do not be sad," said {name}. "We can do something else."
So they {instead}. | They went and {instead}.
They laughed and forgot their old plan. | It was even more fun than their plan.
It was a good day after all. | In the evening they went home, tired and happy. | "This was the best day," said {friend}.
""", """
choose plant: a flower
choose plant: a bean
choose plant: a tree
choose plant: a pumpkin
{name} found a small seed {place}. | {friend} gave {name} a small seed.
{He} put it into the ground and gave it water. | "If you give it water, it will grow," said {friend}. So {name} put it into the ground.
On the first day, nothing happened. | The next day {name} looked, but there was nothing to see.
{name} gave it water every day. | {name} did not give up. Every morning {he} gave it water.
After {n} days, there was a little green leaf. | Then, after {n} days, something green came out of the ground.
The sun was warm, so the plant grew and grew. | It grew because it had water and sun.
In the end it was {plant}! | At last {name} saw what it was: {plant}!
"Good things take time," said {friend}. | {name} showed it to {friend} and was very proud.
""", """
{name} and {friend} went for a walk {place}. | One day, {name} took {friend} for a walk {place}.
{name} liked to count. | They counted all the animals they could see.
First they saw {some}. | {name} saw {some} {found}.
Then they saw {others}. | Then {friend} saw {others} {hidden}.
"How many animals did we see?" asked {friend}. | "How many is that?" asked {friend}.
"{Count} and {more} is {sum}," said {name}. "We saw {sum} animals."
"You count well," said {friend}. | {friend} counted again, and it was right.
Then it was late, and they walked home. | They waved to the animals and went home.
""", """
choose skill: ride a bike
choose skill: swim
choose skill: climb a tall tree
choose skill: play the drum
choose skill: fly a kite
{name} wanted to learn how to {skill}. | {name} saw {friend} {place}. {friend} knew how to {skill}. | {friend} could {skill}, but {name} could not.
"It is easy," said {friend}. "I will show you." | "Can you teach me?" asked {name}.
{name} tried, but it did not work. | The first time, it went wrong.
"I cannot do it," said {name}. | {name} was angry and wanted to stop.
"Try again," said {friend}. "You will get better." | "Nobody can do it the first time," said {friend}.
So {name} tried again and again. | {name} tried {n} more times.
And then it worked! {name} could {skill}! | At last, {name} could {skill}.
"Thank you for your help," said {name}. | {friend} clapped and said, "Well done!"
If you do not give up, you can learn. | {name} smiled all the way home.
"""]


def with_article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def plural(animal: str, count: int) -> str:
    return animal if count == 1 or animal == "sheep" else "mice" if animal == "mouse" else animal + "s"


def story(rng: random.Random) -> str:
    """One story of eight to ten sentences; the same generator state gives the same story."""
    girl, n = rng.random() < 0.5, rng.randint(3, 9)
    name, friend = rng.choice(GIRLS if girl else BOYS), rng.choice(GIRLS + BOYS)
    while friend == name: friend = rng.choice(GIRLS + BOYS)
    he, colour, thing, (hidden, found) = "she" if girl else "he", rng.choice(COLOURS), rng.choice(THINGS), rng.sample(HIDDEN, 2)
    k, count, more, (animal, other) = rng.randint(1, n - 1), rng.randint(1, 6), rng.randint(1, 6), rng.sample([x[0] for x in ANIMALS], 2)
    slots = dict(
        child="girl" if girl else "boy", name=name, friend=friend, he=he, He=he.capitalize(), his="her" if girl else "his", thing=thing,
        colour=colour, a_thing=with_article(f"{colour} {thing}"), place=rng.choice(PLACES), hidden=hidden, found=found, fruit=rng.choice(FRUIT),
        n=NUMBERS[n], k=NUMBERS[k], rest=NUMBERS[n - k], Count=NUMBERS[count].capitalize(), more=NUMBERS[more], sum=NUMBERS[count + more],
        animal=animal, some=f"{NUMBERS[count]} {plural(animal, count)}", others=f"{NUMBERS[more]} {plural(other, more)}")
    lines = rng.choice(PLOTS).strip().splitlines()
    if choices := [line.removeprefix("choose ") for line in lines if line.startswith("choose ")]:
        names, values = rng.choice(choices).split(": ")
        slots |= dict(zip(names.split(" / "), values.format(**slots).split(" / ")))
    ways = [OPENINGS, *(line for line in lines if not line.startswith("choose "))]
    return " ".join(rng.choice(way.split(" | ")).format(**slots) for way in ways) + "\n"


# %% 4 · Facts
# Short true paragraphs about one subject: capitals, animals, the calendar, numbers, opposites. Few facts, said again and again, so that they
# can be learnt.

# country, capital, continent, language
COUNTRIES = [
    ("France", "Paris", "Europe", "French"), ("Italy", "Rome", "Europe", "Italian"), ("Spain", "Madrid", "Europe", "Spanish"),
    ("Germany", "Berlin", "Europe", "German"), ("Greece", "Athens", "Europe", "Greek"), ("Poland", "Warsaw", "Europe", "Polish"),
    ("Portugal", "Lisbon", "Europe", "Portuguese"), ("Sweden", "Stockholm", "Europe", "Swedish"), ("Japan", "Tokyo", "Asia", "Japanese"),
    ("China", "Beijing", "Asia", "Chinese"), ("Thailand", "Bangkok", "Asia", "Thai"), ("Vietnam", "Hanoi", "Asia", "Vietnamese"),
    ("Egypt", "Cairo", "Africa", "Arabic"), ("Morocco", "Rabat", "Africa", "Arabic"), ("Ghana", "Accra", "Africa", "English"),
    ("Cuba", "Havana", "North America", "Spanish"), ("Mexico", "Mexico City", "North America", "Spanish"),
    ("Brazil", "Brasilia", "South America", "Portuguese"), ("Chile", "Santiago", "South America", "Spanish"),
    ("Peru", "Lima", "South America", "Spanish"), ("Colombia", "Bogota", "South America", "Spanish")]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December"]
OPPOSITES = [("hot", "cold"), ("big", "small"), ("fast", "slow"), ("day", "night"), ("up", "down"), ("old", "new"), ("wet", "dry"),
             ("full", "empty"), ("loud", "quiet"), ("happy", "sad"), ("open", "closed"), ("early", "late"), ("light", "dark"), ("hard", "soft")]


def about_a_country(rng: random.Random) -> list[str]:
    country, capital, continent, language = rng.choice(COUNTRIES)
    return [f"{country} is a country in {continent}.", f"The capital of {country} is {capital}.", f"Many people in {country} speak {language}.",
            f"{capital} is a city in {country}."]


def about_an_animal(rng: random.Random) -> list[str]:
    kind, young, legs, sound, food, home = rng.choice(ANIMALS)
    one, n = with_article(kind).capitalize(), rng.randint(2, 5)
    return [f"{one} is an animal with {NUMBERS[legs]} legs.", f"{one} {sound}.", f"{one} eats {food} and lives {home}.",
            f"A young {kind} is called {with_article(young)}.", f"{NUMBERS[n].capitalize()} {plural(kind, n)} have {n * legs} legs."]


def about_the_calendar(rng: random.Random) -> list[str]:
    names, part, whole = rng.choice([(DAYS, "day", "week"), (MONTHS, "month", "year")])
    i = rng.randrange(len(names))
    return [f"{names[i]} is {part} {i + 1} of the {whole}.", f"The {part} after {names[i]} is {names[(i + 1) % len(names)]}.",
            f"The {part} before {names[i]} is {names[i - 1]}.", f"A {whole} has {NUMBERS[len(names)]} {part}s."]


def about_a_number(rng: random.Random) -> list[str]:
    n = rng.randint(1, 99)
    return [f"The number after {n} is {n + 1}.", f"The number before {n} is {n - 1}.", f"The number {n} is {'odd' if n % 2 else 'even'}.",
            f"Two times {n} is {2 * n}."]


def about_opposites(rng: random.Random) -> list[str]:
    return [f"The opposite of {x} is {y}." for pair in rng.sample(OPPOSITES, 2) for x, y in (pair, pair[::-1])]


def fact(rng: random.Random) -> str:
    """Three or four sentences about one subject, in an order drawn at random."""
    sentences = rng.choice([about_a_country, about_an_animal, about_the_calendar, about_a_number, about_opposites])(rng)
    return " ".join(rng.sample(sentences, rng.randint(3, 4))) + "\n"


def stories_and_facts(seed: int) -> Iterator[str]:
    """Four stories to one fact, without end."""
    rng = random.Random(seed)
    while True: yield fact(rng) if rng.random() < 0.2 else story(rng)


# %% 5 · Files and the hub
def read_file(path: Path) -> Iterator[str]:
    """Documents of one file: .jsonl and .parquet hold one in each row (field "text"); a .txt has no marks, so it is cut at blank lines.

    ValueError for a file that cannot be read, with its name.
    """
    try:
        if path.suffix == ".txt":
            yield from pieces(path.read_text(encoding="utf-8"))
        elif path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as file:
                for i, line in enumerate(file, 1):
                    try: yield json.loads(line)["text"]
                    except (ValueError, KeyError, TypeError): raise ValueError(f'{path} line {i} is not a JSON object with a field "text"') from None
        else:
            import pyarrow.parquet  # comes with `datasets`
            table = pyarrow.parquet.ParquetFile(path)
            if "text" not in table.schema_arrow.names: raise ValueError(f'{path} has no column "text", only {", ".join(table.schema_arrow.names)}')
            for batch in table.iter_batches(columns=["text"]): yield from batch.column(0).to_pylist()
    except UnicodeDecodeError: raise ValueError(f"{path} is not UTF-8 text: convert it, or leave it out of --data") from None
    except OSError as error: raise ValueError(f"cannot read {path}: {error.strerror or error}") from None


def hub_name(name: str) -> tuple[str, str | None, float]:
    """(repository, configuration or None, most bytes of text).   org/set@en@1.5GB -> org/set, en, 1.5e9     org/set -> org/set, None, inf"""
    (repository, *rest), limit = name.split("@"), math.inf
    if rest and (amount := re.fullmatch(r"(\d+(?:\.\d+)?)(KB|MB|GB)", rest[-1])):
        limit = float(amount[1]) * {"KB": 1e3, "MB": 1e6, "GB": 1e9}[amount[2]]
        rest.pop()
    if not repository or len(rest) > 1 or not all(rest) or not limit:
        raise ValueError(f"--data hf:{name}: write hf:NAME, hf:NAME@200MB, hf:NAME@CONFIG or hf:NAME@CONFIG@200MB; amounts end in KB, MB or GB.")
    return repository, rest[0] if rest else None, limit


def read_hub(name: str) -> Iterator[str]:
    """Documents of a hub's set (hub_name), one at a time as they come over the network. A limit cuts no document: the first that goes over it ends
    the stream, so that the same name gives the same text."""
    import datasets
    (repository, config, limit), taken = hub_name(name), 0
    try:
        for row in datasets.load_dataset(repository, config, split="train", streaming=True):
            if "text" not in row: raise ValueError(f'hf:{name} has no field "text", only {", ".join(sorted(row))}: save it as .jsonl with one.')
            taken += len((row["text"] or "").encode("utf-8", "replace"))
            if taken > limit: return
            yield row["text"]
    except (OSError, datasets.exceptions.DatasetsError) as error:      # connection errors are OSErrors
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ValueError(f"cannot fetch hf:{name} ({reason}): connect to the network and check the name, or pass local files with --data "
                         "path/*.jsonl") from error


# %% 6 · Sources
@dataclass(frozen=True)
class Source:
    documents: Callable[[int], Iterator[str]]    # seed -> documents, the same for the same seed
    megabytes: float                             # how much of it is taken
    phase1: float                                # share of the training windows in the first phase (diversity)
    phase2: float                                # and in the second (quality)
    what: str


# ours: Ultra blends 19 categories; its second phase prefers quality. Here the second phase prefers what a model of 3M parameters can master.
SOURCES: dict[str, Source] = {
    "stdlib":  Source(stdlib_code, 4.0, 0.25, 0.15, "functions and classes of the Python standard library"),
    "pydoc":   Source(pydoc_topics, 1.0, 0.05, 0.05, "the Python language reference"),
    "tasks":   Source(worked_tasks, 2.5, 0.35, 0.45, "questions of data/tasks with worked steps"),
    "stories": Source(stories_and_facts, 2.5, 0.35, 0.35, "stories and facts from the generator in data/corpus.py"),
}
FILE_MEGABYTES = 1000.0      # ours: at most this much of the files is taken


def resolve(data: tuple[str, ...]) -> dict[str, tuple[Callable[[int], Iterator[str]], float, list[str]]]:
    """--data -> {source name: (documents, megabytes, what identifies it)}. Nothing given means every built-in source; all files become one."""
    found, files = {}, []
    for item in data or tuple(SOURCES):
        if item in SOURCES:
            found[item] = (SOURCES[item].documents, SOURCES[item].megabytes, [item])
        elif item.startswith("hf:"):
            hub_name(item[3:])      # a word that cannot be read is refused now, not after other text has been made
            found[re.sub(r"\W+", "-", item)] = ((lambda seed, name=item[3:]: read_hub(name)), math.inf, [item])
        elif Path(item).suffix in (".txt", ".jsonl", ".parquet"):
            matches = sorted(Path(match) for match in glob.glob(item, recursive=True)) or [Path(item)]
            if not matches[0].exists(): raise ValueError(f"--data {item}: no such file")
            files += matches
        else:
            raise ValueError(f"--data {item}: give one of {', '.join(SOURCES)}, files that end in .txt, .jsonl or .parquet, or hf:NAME@200MB")
    if files:
        identity = [f"{f.resolve()} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files]
        found["files"] = ((lambda seed: (document for file in files for document in read_file(file))), FILE_MEGABYTES, identity)
    return found


# %% 7 · Split and build
# The split looks at the content alone: a text that occurs twice, in one source or in two, falls on the same side whatever the seed. (Splitting by
# seed leaks: a generator of one-digit sums repeats itself.)

HELD_OUT = 0.02      # ours: one document in fifty is held out


def is_held_out(document: str, share: float = HELD_OUT) -> bool:
    return int.from_bytes(hashlib.sha256(document.encode("utf-8", "surrogatepass")).digest()[:8], "big") < share * 2**64


def build(data: tuple[str, ...] = (), folder: Path = Path("out/data"), seed: int = 0) -> Path:
    """Write the documents of every source to folder/corpus-KEY/NAME.{train,held_out}.jsonl and return that folder; a second call finds it there.

    KEY is a hash of what the text depends on: sources, seed, this file and data/tasks, the Python version. corpus.json records counts and a sha256
    of each part.
    """
    sources = resolve(tuple(data))
    code = b"".join(path.read_bytes() for path in [Path(__file__), *sorted(Path(__file__).parent.glob("tasks/*.py"))])
    depends = dict(sources={name: identity for name, (_, _, identity) in sources.items()}, seed=seed, python=platform.python_version(),
                   code=hashlib.sha256(code).hexdigest(), tasks=_version("reasoning-gym"))
    home = Path(folder) / f"corpus-{hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:12]}"
    if (home / "corpus.json").exists(): return home

    home.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="corpus-", suffix=".part", dir=home.parent))      # a folder that is cut short never carries the final name
    try:
        written = {name: _write_source(work, name, documents(seed), megabytes) for name, (documents, megabytes, _) in sources.items()}
        record = dict(depends, sources=written)
        if not any(parts["train"]["bytes"] for parts in record["sources"].values()):
            raise ValueError(f"the corpus is empty: {', '.join(data or SOURCES)} holds no text to train on")
        (work / "corpus.json").write_text(json.dumps(record, indent=1))
        if home.exists(): shutil.rmtree(home)
        os.replace(work, home)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return home


def _write_source(work: Path, name: str, documents: Iterator[str], megabytes: float) -> dict:
    parts = {part: dict(documents=0, bytes=0, sha256=hashlib.sha256()) for part in ("train", "held_out")}
    files = {part: (work / f"{name}.{part}.jsonl").open("w", encoding="utf-8") for part in parts}
    for document in documents:
        if not document or not document.strip(): continue
        part, data = "held_out" if is_held_out(document) else "train", document.encode("utf-8", "replace")
        files[part].write(json.dumps({"text": data.decode("utf-8")}) + "\n")
        parts[part]["documents"] += 1
        parts[part]["bytes"] += len(data)
        parts[part]["sha256"].update(data + b"\0")
        if sum(p["bytes"] for p in parts.values()) >= megabytes * 1e6: break
    for file in files.values(): file.close()
    return {part: dict(p, sha256=p["sha256"].hexdigest()) for part, p in parts.items()}


def _version(package: str) -> str:
    import importlib.metadata
    try: return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError: return "not installed"


def documents(home: Path, name: str, part: str = "train") -> Iterator[str]:
    """The documents of one part of a built corpus."""
    with (Path(home) / f"{name}.{part}.jsonl").open(encoding="utf-8") as file:
        for line in file: yield json.loads(line)["text"]


if __name__ == "__main__":
    for name, source in SOURCES.items():
        print(f"== {name}: {source.what}")
        for _, document in zip(range(int(sys.argv[1]) if sys.argv[1:] else 2), source.documents(0)): print(document[:600])
