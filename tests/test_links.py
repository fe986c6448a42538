"""What the pages name exists: files, headings, commands with their flags, and names in the modules."""
import ast
import dataclasses
import importlib
import importlib.util
import json
import re
import shlex
import sys
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("tyro")      # some scripts need it at import
ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("docs", "notebooks", "assignments")
PAGES = [ROOT / "README.md", ROOT / "experiments" / "README.md",
         *(p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*")) if p.suffix in (".md", ".ipynb"))]
STAGES = {"nvfp4": "01_nvfp4", "mamba": "02_mamba", "moe": "03_latentmoe", "nemotron": "04_model", "pretrain": "05_pretrain", "sft": "06_sft",
          "rl": "07_rlvr_mopd", "infer": "08_infer"}      # the names under which the stages import one another
EXTENSIONS = (".py", ".md", ".jsonl", ".png", ".toml", ".txt", ".ipynb", ".cff")


def read(page: Path) -> str:
    """A page's text; of a notebook the text cells."""
    if page.suffix == ".md": return page.read_text()
    return "\n\n".join("".join(cell["source"]) for cell in json.loads(page.read_text())["cells"] if cell["cell_type"] == "markdown")


def slug(heading: str) -> str:
    """GitHub's anchor of a heading.    "3 · Serve it, `talk`"  ->  "3--serve-it-talk" """
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def prose(text: str) -> str:
    """A page without its code blocks."""
    return re.sub(r"(?m)^ {4}.*$", "", re.sub(r"(?s)^```.*?^```", "", text, flags=re.M))


def anchors(text: str) -> set[str]: return {slug(line) for line in re.findall(r"(?m)^#{1,6} +(.+)$", prose(text))}


def broken_links(page: Path, text: str) -> list[str]:
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(text))):
        if re.match(r"[a-z]+:", target): continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if path and not file.exists(): found.append(f"{target}: no such file")
        elif anchor and file.suffix == ".md" and anchor not in anchors(text if file == page else file.read_text()):
            found.append(f"{target}: no such heading")
    return found


@cache
def module(path: Path):
    """A script, imported once; those of a folder may import their neighbours."""
    for folder in (ROOT, path.parent):
        if str(folder) not in sys.path: sys.path.insert(0, str(folder))
    if path.parent == ROOT: return importlib.import_module(path.stem)
    spec = importlib.util.spec_from_file_location(f"linked_{path.stem}", path)
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made
    spec.loader.exec_module(made)
    return made


def flags_of(settings: type, prefix: str = "") -> set[str]:
    """Names of all flags that tyro makes of a dataclass, nested ones with a dot; a truth value has --no-NAME as well."""
    found, hints = set(), {f.name: f for f in dataclasses.fields(settings)}
    for name, field in hints.items():
        inner = field.default if dataclasses.is_dataclass(field.default) else None
        if inner is None and field.default_factory is not dataclasses.MISSING:
            made = field.default_factory()
            inner = made if dataclasses.is_dataclass(made) else None
        if inner is not None: found |= flags_of(type(inner), f"{prefix}{name}.")
        found |= {f"{prefix}{name}", f"{prefix}no_{name}"} if isinstance(field.default, bool) else {f"{prefix}{name}"}
    return found


@cache
def known_flags(path: Path, command: str = "") -> frozenset[str]:
    """Flags of a script, from the dataclass that it gives to run_command or tyro.cli; of 08_infer.py those of one of its commands, by name."""
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    if path.name == "08_infer.py":
        listed = next(n for n in calls if ast.unparse(n.func) == "dict" and "tour" in {k.arg for k in n.keywords})
        classes = {k.arg: ast.unparse(k.value.func).split(".")[-1] for k in listed.keywords}
        places = module(path), importlib.import_module("experiments.serving")
        if command not in classes: return frozenset()
        found = flags_of(next(getattr(place, classes[command]) for place in places if hasattr(place, classes[command])))
        return frozenset(found | {name.split(".", 1)[1] for name in found if "." in name})      # nested flags go without their prefix here
    given = {arg.id for n in calls if ast.unparse(n.func).split(".")[-1] in ("run_command", "cli") for arg in n.args if isinstance(arg, ast.Name)}
    classes = [x for x in (getattr(module(path), name, None) for name in given) if dataclasses.is_dataclass(x)]
    return frozenset().union(*map(flags_of, classes))


def broken_commands(page: Path, text: str) -> list[str]:
    """Commands `python X.py --flag`, `torchrun .. X.py`, `python -m package.module` and `make target` of a page that cannot be run.
    A script lies where the page says, from the page's folder or from the repository's."""
    found, text = [], re.sub(r"\s*\\\n\s*", " ", text)      # a backslash at a line's end goes on
    for command in re.findall(r"(?:^ {4}|`|^)((?:python3? |torchrun |make )[^`\n]*)", text, re.M):
        words = shlex.split(re.sub(r"\s#.*$", "", command), posix=True)
        script = next((word for word in words if word.endswith(".py")), "")
        path = next((folder / script for folder in (ROOT, page.parent) if (folder / script).is_file()), None)
        if words[0] == "make":
            known = set(re.findall(r"(?m)^([\w-]+):", (ROOT / "Makefile").read_text()))
            found += [f"make {word}: no such target" for word in words[1:] if re.fullmatch(r"[a-z][\w-]*", word) and word not in known]
        elif "-m" in words[:2] and words[2] not in ("pytest", "pip", "venv"):
            package = ROOT.joinpath(*words[2].split("."))
            if not (package.is_dir() or package.with_suffix(".py").exists()): found.append(f"{command}: no such module")
        elif script and path is None: found.append(f"{command}: no such file")
        elif script:
            given = words[words.index(script) + 1:]
            flags = [word[2:].split("=")[0].replace("-", "_") for word in given if word.startswith("--")]
            known = known_flags(path, given[0] if given and not given[0].startswith("-") else "tour") if flags else frozenset()
            found += [f"{script} --{flag}: no such flag" for flag in flags if flag not in known | {"help"}]
    return found


def names_in(path: Path) -> set[str]:
    """What a module defines at its top level, and of its classes what they define, as Class.name."""
    found = set()
    for n in ast.parse(path.read_text()).body:
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)): found.add(n.name)
        if isinstance(n, ast.ClassDef):
            found |= {f"{n.name}.{x.name}" for x in n.body if isinstance(x, ast.FunctionDef)}
            found |= {f"{n.name}.{x.target.id}" for x in n.body if isinstance(x, ast.AnnAssign)}
        if isinstance(n, (ast.Assign, ast.AnnAssign)):
            found |= {x.id for x in ast.walk(n) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)}
        if isinstance(n, (ast.Import, ast.ImportFrom)): found |= {a.asname or a.name for a in n.names}
    return found


def broken_names(page: Path, text: str) -> list[str]:
    """`file.py` that is nowhere, and `module.name` of a stage, data/ or experiments/ that the module does not define."""
    found = []
    for said in re.findall(r"`([^`\n]+)`", prose(text)):
        name = said.split("(")[0]
        if re.fullmatch(r"[\w./-]+", name) and name.endswith(EXTENSIONS) and not name.startswith(("out/", "my")):
            if not any((folder / name).exists() for folder in (page.parent, ROOT, ROOT / "experiments")): found.append(f"`{said}`: no such file")
        elif match := re.fullmatch(r"((?:data\.(?:tasks\.)?)?\w+)\.([A-Za-z_]\w*(?:\.\w+)?)", name):
            path = ROOT / f"{STAGES.get(match[1], match[1].replace('.', '/'))}.py"
            if path.exists() and match[2] not in names_in(path): found.append(f"`{said}`: {path.name} defines no {match[2]}")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_everything_a_page_names_exists(page):
    """A reader who follows the page must not stop at a link, a command or a name."""
    text = read(page)
    assert not (wrong := broken_links(page, text) + broken_commands(page, text) + broken_names(page, text)), "\n".join(wrong)


def test_the_pages_have_what_is_checked():
    """A pattern that finds nothing would pass everything."""
    text = "\n".join(map(read, PAGES))
    assert len(re.findall(r"\]\([^)\s]+\)", prose(text))) > 40 and len(re.findall(r"(?m)^ {4}(?:python|torchrun) .*--", text)) > 10


PAGE = """# One page

## Serve it, `talk`

Good: [file](../README.md), [here](#serve-it-talk), [there](../README.md#install), [web](https://example.org/x#y), `nvfp4.quantize`, `04_model.py`,
`experiments/table.py`, `data.tasks`, `torch.nn`, `nemotron.ModelConfig.pattern`, `out/made.py`

    python 05_pretrain.py --steps 3 --no-async-save --lr=1e-3    # a comment with --no-such
    python 07_rlvr_mopd.py --mopd.rounds 2
    python 08_infer.py generate --prompt "What is 17 * 23?" --temperature 0
    torchrun --nproc-per-node 4 05_pretrain.py --ep 2
    python -m data.tasks
    make test TORCH="torch==2.13.0 --index-url https://example.org"
"""


@pytest.mark.parametrize("good, bad, word", [
    ("(../README.md)", "(../READYOU.md)", "no such file"), ("(#serve-it-talk)", "(#serve-it)", "no such heading"),
    ("README.md#install", "README.md#instal", "no such heading"), ("`nvfp4.quantize`", "`nvfp4.quantise`", "defines no quantise"),
    ("`nemotron.ModelConfig.pattern`", "`nemotron.ModelConfig.letters`", "defines no ModelConfig.letters"),
    ("`experiments/table.py`", "`experiments/tables.py`", "no such file"), ("05_pretrain.py --steps", "05_pretrian.py --steps", "no such file"),
    ("--steps 3", "--step 3", "--step: no such flag"), ("--no-async-save", "--no-lr", "--no_lr: no such flag"),
    ("--lr=1e-3", "--rate=1e-3", "--rate"), ("--mopd.rounds", "--rounds", "--rounds: no such flag"),
    ("--temperature", "--heat", "--heat: no such flag"), ("--ep 2", "--experts 2", "--experts"),
    ("08_infer.py generate", "08_infer.py quantize", "--prompt: no such flag"),
    ("python -m data.tasks", "python -m data.task", "no such module"), ("make test", "make tests", "no such target")])
def test_a_planted_mistake_is_found(good, bad, word):
    """Each kind once: a checker that does not see it would let the same slip pass in a real page."""
    page = ROOT / "docs" / "planted.md"
    check = lambda text: broken_links(page, text) + broken_commands(page, text) + broken_names(page, text)
    assert check(PAGE) == [] and PAGE.count(good) == 1
    wrong = check(PAGE.replace(good, bad))
    assert wrong and word in wrong[0] and len(wrong) <= bad.count("quantize") + 1, wrong
