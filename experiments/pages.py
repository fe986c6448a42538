"""Two pages made from the sources: docs/differs.md from the `ours:` tags, docs/open-questions.md from the list below.

Run:   python experiments/pages.py            # writes both
       python experiments/pages.py --check    # exit code 1 when one is not what this would write
"""
from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

# %% 1 · What differs: the tags  (`ours: why`, or the short forms `, ours` and `, ours; Ultra 512` behind a field)

TAG = re.compile(r"(?:NOTE: )?\bours:|(?:^|, |\(|NOTE: )ours(?=[;,)]|$)")


class Tag(NamedTuple):
    section: str      # title of the section that it stands in, "" above the first
    place: str        # the field, constant or function that it speaks of, as Markdown; "" for a remark on the section
    text: str


def readable(text: str, at: int, longest: int = 420) -> str:
    """The sentence around the tag that begins at `at`, the one before it where the tag begins a sentence, and what follows; without the tag.

    "Rows. Slices of rows. ours: 65,536 values fit the cache."  ->  "Slices of rows. 65,536 values fit the cache."
    """
    ends = [m.end() for m in re.finditer(r"[.!?]\s+", text[:at])]
    if ends and ends[-1] == at: ends.pop()
    text = text[ends[-1] if ends else 0:]
    text = re.sub(r"(?<=[.!?] )ours[:;,] *(\w)", lambda m: m[1].upper(), text)
    text = re.sub(r"^(NOTE: )?ours[:;,] *|^NOTE: |(?<=\()ours: ", "", text)
    text = re.sub(r" ?\(ours\)|,? ?\bours$", "", re.sub(r",? ours[:;,] *", "; ", text)).strip()
    if len(text) > longest: text = text[:max(text.rfind(". ", 0, longest), text.rfind("; ", 0, longest)) + 1]
    return text.replace("<", "&lt;")


def paragraphs(lines: list[str]) -> Iterator[tuple[int, str]]:
    """(number of the first line, text) of every run of comment lines; a section's head or an indented formula ends one."""
    held, first = [], 0
    for number, line in enumerate([*lines, ""], 1):
        stripped = line.strip()
        if stripped.startswith("#") and not stripped.startswith(("# %%", "#     ")):
            if not held: first = number
            held.append(stripped.lstrip("#").strip())
        elif held:
            yield first, " ".join(filter(None, held))
            held = []


def heads(lines: list[str]) -> list[tuple[int, str]]:
    """(line, title) of the sections, without the sources that stand behind a title."""
    found = ((number, re.match(r"# %% (.+)", line)) for number, line in enumerate(lines, 1))
    return [(number, re.split(r"\s{2,}\[", match[1])[0].strip()) for number, match in found if match]


def of_statement(line: str) -> str:
    """`name = value` of a field or constant before a trailing comment; "" for other code, which its function speaks for."""
    try: node = ast.parse(line.strip()).body[0]
    except (SyntaxError, IndexError): return ""
    if isinstance(node, ast.AnnAssign): return f"`{ast.unparse(node.target)} = {ast.unparse(node.value)}`" if node.value else ""
    return f"`{ast.unparse(node)}`" if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).isupper() else ""


def tags_of(source: str) -> list[Tag]:
    """Every tag of a file, in order; strings that are no docstrings hold none."""
    lines, tree = source.splitlines(), ast.parse(source)
    titles, found = heads(lines), []
    scopes = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    name = lambda n: f"`{n.name}`" if isinstance(n, ast.ClassDef) else f"`{n.name}()`"

    def place_of(number: int) -> str:
        around = [n for n in scopes if n.lineno <= number <= n.end_lineno]
        return name(max(around, key=lambda n: n.lineno)) if around else ""

    def add(number: int, place: str, text: str) -> None:
        for match in TAG.finditer(text):
            section, said = next((title for at, title in reversed(titles) if at <= number), ""), readable(text, match.start())
            found.append((number, Tag(section, place, said if place else said[:1].upper() + said[1:])))
            break                                # one entry a comment or docstring, which holds all of it
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        code = token.line[:token.start[1]]
        if token.type == tokenize.COMMENT and code.strip():
            brief = f"`{code.strip()}`" if len(token.string) < 12 else ""      # a value alone says nothing without its code
            add(token.start[0], of_statement(code) or brief or place_of(token.start[0]), token.string.lstrip("# "))
    for number, text in paragraphs(lines): add(number, place_of(number), text)
    for n in scopes:
        text = ast.get_docstring(n)
        if text and "ours" in text: add(n.body[0].lineno, name(n), " ".join(text.split()))
    return [tag for _, tag in sorted(found, key=lambda item: item[0])]


DIFFERS = """# What differs from NVIDIA's

Every number and rule of the code has a source, or a tag that says it is ours. This page lists the tags, file by file and section by section, as
they stand in the comments: sizes that a laptop can train, rules where the reports are silent, and choices that speed the code up without changing
its results. Made by `python experiments/pages.py`; the tests fail when it is older than the code. Where sources contradict one another, see
[open questions](open-questions.md). Not listed: the sizes of the measurements in `experiments/`.
"""


def files() -> list[Path]:
    return [*sorted(ROOT.glob("0[1-8]_*.py")), *sorted(ROOT.glob("kernels/*.py")), *sorted(ROOT.glob("data/**/*.py"))]


def differs() -> str:
    out = [DIFFERS]
    for path in files():
        tags, relative = tags_of(path.read_text()), path.relative_to(ROOT).as_posix()
        if not tags: continue
        title = (ast.get_docstring(ast.parse(path.read_text())) or relative).split("\n")[0].split(",")[0].split(":")[0].rstrip(".")
        out.append(f"## {title if title[0].isdigit() else relative}\n\n[`{relative}`](../{relative})\n")
        section = None
        for tag in tags:
            if tag.section != section and tag.section: out.append(f"**{tag.section}**\n")
            section = tag.section
            out.append(f"- {tag.place}{': ' if tag.place and tag.text else ''}{tag.text}" + ("\n" if tag is tags[-1] else ""))
            following = tags[tags.index(tag) + 1:][:1]
            if following and following[0].section != section: out[-1] += "\n"
    return "\n".join(out).rstrip() + "\n"


# %% 2 · Open questions

class Question(NamedTuple):
    """where: (file, a name or words that must stand in it)."""
    title: str
    sources: str
    choice: str
    why: str
    where: tuple[tuple[str, str], ...]


OPEN = """# Open questions

Where public sources contradict one another, or say nothing, and what this repository does about it. Each entry says what the sources have, what we
chose, why, and where it stands in the code. Made by `python experiments/pages.py`, which fails when a place named here is gone. Our other choices
are on the page [what differs from NVIDIA's](differs.md).
"""
CONTRADICT = [
    Question("How the importance weight of a token is bounded",
             "The reports on Super, Nano and Ultra speak of masked importance sampling (IcePop): a token whose weight leaves an interval is not "
             "learnt. The released Ultra configuration clamps it to [0.2, 5] instead (TIS). The documentation of distillation recommends the "
             "mask.",
             "Clamping by default, the mask as an option (`--weights icepop`); distillation uses the mask.",
             "The released configuration is what ran; for distillation the report's text and its documentation agree.",
             (("07_rlvr_mopd.py", "def importance_weights"), ("07_rlvr_mopd.py", 'weights: Weighting = "tis"'))),
    Question("The weight of the multi-token-prediction loss",
             "The Ultra report says 0.1 over two depths. NVIDIA's recipe code has 0.3 for the family, overridden to 0.1 for Ultra; fine-tuning "
             "takes 0.1 for each depth, not shared between them; RL configurations have 0.3 with five repeated layers.",
             "0.1 over both depths in pretraining, 0.1 for each in fine-tuning, none during RL, where the head is boosted at the end.",
             "It is what the Ultra report and the override agree on.",
             (("04_model.py", "mtp_weight: float = 0.1"), ("06_sft.py", "mtp_weight: float = 0.1"))),
    Question("Which load-balancing loss",
             "The Super report calls it the standard one and cites GShard, which counts over the batch. The released training configuration "
             "names the variant that counts within each sequence.",
             "Within each sequence, weight 1e-4.",
             "The configuration is more precise than the sentence.",
             (("03_latentmoe.py", "def sequence_aux_loss"),)),
    Question("MaxVio, with or without the minus one",
             "The paper that introduced it has largest load over mean load, minus 1. The Ultra report prints a bound of 23.27 = 512 / 22, which "
             "is the quotient itself.",
             "Without the minus one.",
             "Our numbers then stand beside Ultra's. Read 1.0 as perfectly even.",
             (("03_latentmoe.py", "def max_violation"),)),
    Question("A full sweep of block scales gains 'an additional 27.1 %'",
             "The report first says that Four-Over-Six lowers the squared error by 16.4 % against max scales, then that a sweep lowers it by an "
             "additional 27.1 %.",
             "We read both as against max scales.",
             "Independent Gaussians give 16.5 % and 27.0 % against max. Against Four-Over-Six the sweep would gain 12.7 %.",
             (("01_nvfp4.py", "an additional 27.1%"),)),
    Question("Keys and values of the prediction head while drafting",
             "vLLM keeps a cache for the head and rewrites the entries of kept tokens from the trunk's exact states. Megatron's inference code "
             "runs the head without any cache, so that its attention sees one position.",
             "A cache, rewritten from exact states.",
             "Training shows the head a whole context, so serving must as well.",
             (("08_infer.py", "The head's cache [vLLM]"),)),
    Question("What hidden-state mixing may draw from",
             "The Ultra report says that a depth is fed states made by the depths before it. Megatron's code draws from the trunk's state as "
             "well.",
             "The trunk's state too, by default; the report's wording with `--mopd.mixing heads`.",
             "It is what NVIDIA's code does, and what a draft behind a verified token sees.",
             (("07_rlvr_mopd.py", 'mixing: Mixing = "trunk"'), ("07_rlvr_mopd.py", "def mix_hidden"))),
    Question("The format of the Mamba state when serving",
             "Documentation and RL configurations keep it in fp32. The report and the cookbook serve it in fp16 with stochastic rounding.",
             "fp32 by default; fp16 and int8, to nearest or stochastic, by a flag.",
             "fp32 is the oracle that the others are measured against; on a CPU it is also the fastest.",
             (("08_infer.py", 'state_format: str = "fp32"'), ("02_mamba.py", "def quantize_state"))),
    Question("How much fp16 and int8 states lose",
             "The digest of the report prints medians over tasks (fp16 to nearest: 2.32 points), its later full text means (1.07). They differ "
             "by a factor of two and more.",
             "We quote the medians.",
             "They came with the format table that is released; the direction is the same in both.",
             (("experiments/claims.py", "accuracy −2.32 % nearest"),)),
    Question("Stages of fine-tuning",
             "One text of the Ultra report describes one stage of fine-tuning, a later one two, the second with longer packs and a loss averaged "
             "by conversation.",
             "Two stages.",
             "The later text is the more detailed; a single stage is the special case of no second step.",
             (("06_sft.py", "steps: tuple[int, int]"),)),
    Question("The second row of Ultra's branches out of 4 bits",
             "One version has 0.33, 0.34 and 0.30 % after 60B tokens, the other 0.33, 0.34 and 0.03 % after 74B; the last is probably a slip of "
             "the pen.",
             "We compare with the first row only: 0.27, 0.28 and 0.25 % after 5B tokens.",
             "Both versions agree on it.",
             (("experiments/claims.py", "0.27, 0.28, 0.25 %"),)),
    Question("The unit of the RL batch",
             "'Batch 8,192 with 16 rollouts' may count prompts or answers.",
             "512 prompts with 16 answers each.",
             "The released configuration settles it.",
             (("07_rlvr_mopd.py", "prompts: int = 8"),)),
    Question("The weights of the length reward",
             "Its coefficients for thoughts and answers differ from stage to stage of the configurations, from the guide, and from Nano's 0.5 "
             "and 0.5.",
             "The group-relative length reward is left out; medium effort has its own bonus.",
             "It belongs to judged answers, and every task here has an exact verifier.",
             (("07_rlvr_mopd.py", "judges and reward models"), ("07_rlvr_mopd.py", "effort: tuple[float, int]")))]
SILENT = [
    Question("The advantage of the only right answer of a group",
             "The released code subtracts the mean of the others and divides by their deviation. For the only right one of 16 that deviation is "
             "0, so it is not scaled: +1.0, where each of two right ones gets +3.6. The report is silent.",
             "The released rule, edge included.",
             "Changing it would change the method; the docstring prints the numbers.",
             (("07_rlvr_mopd.py", "def leave_one_out_advantage"),)),
    Question("The Gaussian curriculum's means and width",
             "Described in words: pass rates drift from easy to hard. No number is published; a figure of Nano suggests batch means from about "
             "0.7 to 0.4.",
             "Mean pass rate from 0.7 to 0.3, width 0.15.",
             "It brackets that figure.",
             (("07_rlvr_mopd.py", "curriculum: tuple[float, float, float]"), ("data/curriculum.py", "def gaussian_quotas"))),
    Question("Clip and mask of distillation",
             "The objective is printed with a clip and a mask, without their bounds, and without its denominator.",
             "Clip 0.2, mask outside [0.5, 2.0], mean over all learnt tokens.",
             "The clip is GRPO's lower side, the mask that of Nemotron-Cascade 2, NVIDIA's only published numbers for this method.",
             (("07_rlvr_mopd.py", "def mopd_loss"), ("07_rlvr_mopd.py", "icepop: tuple[float, float]"))),
    Question("The weights of the domains in distillation",
             "Each domain has a weight; none is printed.",
             "Equal shares of every batch.",
             "Nothing speaks for another choice.",
             (("07_rlvr_mopd.py", "equal shares of the domains"),)),
    Question("The optimizer of MTP boosting",
             "Steps, batch and temperature are published; rate, warmup and decay are not.",
             "Rate 1e-3, a tenth of warmup, decay over the second half.",
             "The tokens a pass rise with them, as the claims show.",
             (("07_rlvr_mopd.py", "boost_lr: float = 1e-3"),)),
    Question("Which turns PivotRL keeps",
             "Turns with some variance and a mean reward below a bound, which is not known.",
             "Below 0.9.",
             "It drops what is nearly solved, and keeps the rest.",
             (("07_rlvr_mopd.py", "pivot_below: float = 0.9"),)),
    Question("When a merged checkpoint's update counts",
             "The weights of a merge imitate a decay; whether an update happens at the beginning of its interval or behind it is not said. It "
             "decides the weights at the edges.",
             "Behind it (`right`); `left` is there too.",
             "The oldest checkpoint then has a share. Measured, they differ by less than the spread over seeds.",
             (("05_pretrain.py", "def merge_weights"),)),
    Question("What an alarm for a diverging run looks like",
             "The report tells of two divergences and of rolling back, not of how they were noticed.",
             "Loss or gradient norm above the median of recent steps by some spreads, several steps in a row.",
             "A median is not moved by the spike itself.",
             (("05_pretrain.py", "class SpikeDetector"),)),
    Question("Layout, days and number of GPUs of the main run",
             "Only the long-context phase's layout is published.",
             "None is assumed: a planner counts memory, traffic and days of any layout.",
             "What cannot be compared should not look as if it were.",
             (("experiments/plan.py", "It gives no number of GPUs"),)),
    Question("How much each ingredient of 4-bit training is worth",
             "The ablations are a plot without numbers.",
             "We compare signs only, with an interval.",
             "At small sizes most effects lie within the spread over seeds.",
             (("experiments/nvfp4_gap.py", "raises the loss (12B)"),))]


def open_questions() -> str:
    """ValueError when a place that a question names is gone."""
    out = [OPEN]
    for title, questions in (("Sources that contradict one another", CONTRADICT), ("Where the sources are silent", SILENT)):
        out.append(f"## {title}\n")
        for q in questions:
            for file, words in q.where:
                if words not in (ROOT / file).read_text():
                    raise ValueError(f"{q.title!r}: {words!r} is no longer in {file}; mend the entry in pages.py.")
            places = ", ".join(f"`{words.removeprefix('def ').removeprefix('class ')}` in [`{file}`](../{file})" for file, words in q.where)
            out.append(f"### {q.title}\n\n- **Sources:** {q.sources}\n- **Here:** {q.choice}\n- **Why:** {q.why}\n- **Where:** {places}\n")
    return "\n".join(out).rstrip() + "\n"


PAGES = {"docs/differs.md": differs, "docs/open-questions.md": open_questions}


@dataclass(frozen=True)
class Config:
    """Writes docs/differs.md and docs/open-questions.md."""
    check: bool = False         # write nothing, and end with exit code 1 when a page is stale


def main(config: Config) -> None:
    for name, made in PAGES.items():
        page = ROOT / name
        if not config.check: page.write_text(made())
        elif not page.exists() or page.read_text() != made(): sys.exit(f"{name} is older than its sources: run `python experiments/pages.py`.")


if __name__ == "__main__":
    import tyro
    main(tyro.cli(Config, description=__doc__))
