"""Pages made from the sources: every tag is on them, readable, and they are not older than the code."""
import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "experiments"))
pages = importlib.import_module("pages")

SOURCE = '''"""A file. ours: not a tag of any section."""
# %% 1 · Sizes  [Config]
# Widths of the layers.
width: int = 8       # of a layer, ours: Ultra 64
LIMIT = 3            # ours; Ultra 5
shown("ours: no tag in a string")


# %% 2 · Work
# A sentence before. Work is slow.
# ours: so it is done
# once.
#     y = x
def work(x):
    """Does it. ours: by hand. And then some."""
    y = x      # beside ours
    return y   # NOTE: ours, the plain way <fast>


class Box:
    """What holds the rest (ours)."""
'''


def test_tags_are_found_with_their_section_place_and_sentence():
    """A tag in a string, or the word in a sentence, is none; a paragraph ends at a formula; marks and the tag itself are not shown."""
    assert pages.tags_of(SOURCE) == [
        ("1 · Sizes", "`width = 8`", "of a layer; Ultra 64"), ("1 · Sizes", "`LIMIT = 3`", "Ultra 5"),
        ("2 · Work", "", "Work is slow. So it is done once."), ("2 · Work", "`work()`", "Does it. By hand. And then some."),
        ("2 · Work", "`work()`", "the plain way &lt;fast>"), ("2 · Work", "`Box`", "What holds the rest.")]


def test_no_tag_of_a_stage_is_missed():
    """Counted another way: comments and docstrings with `ours:` as plain text. A parser that loses one kind of comment shows here."""
    for path in pages.files():
        tagged = re.compile(r"(#|^ *\"\"\"|^ {4,}\w).*\bours:|^ +ours: ")
        lines = [line for line in path.read_text().splitlines() if tagged.search(line) and "print_table" not in line]
        assert len(pages.tags_of(path.read_text())) >= len(lines), path.name


def test_an_entry_is_readable_text():
    """Neither the tag nor comment marks remain, and nothing is empty."""
    body = pages.differs().split("\n## ", 1)[1]
    entries = [line for line in body.splitlines() if line.startswith("- ")]
    assert len(entries) > 90
    assert not [line for line in entries if re.search(r"\bours[:;]|NOTE:|# |<|^- *$|: *$", line)]


@pytest.mark.parametrize("name", pages.PAGES)
def test_a_page_is_not_older_than_its_sources(name):
    """Run `python experiments/pages.py` when a tag or an entry was changed."""
    assert (ROOT / name).read_text() == pages.PAGES[name]()


def test_a_stale_page_and_a_place_that_is_gone_are_refused(tmp_path, monkeypatch):
    """--check must fail for an edited page, and an entry must not outlive the code that it names."""
    monkeypatch.setattr(pages, "PAGES", {"docs/a.md": lambda: "new\n"})
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    with pytest.raises(SystemExit, match="older than its sources"): pages.main(pages.Config(check=True))
    pages.main(pages.Config())
    pages.main(pages.Config(check=True))
    (tmp_path / "docs" / "a.md").write_text("old\n")
    with pytest.raises(SystemExit, match="older than its sources"): pages.main(pages.Config(check=True))
    monkeypatch.setattr(pages, "ROOT", ROOT)
    monkeypatch.setattr(pages, "SILENT", [pages.Question("A", "b", "c", "d", (("04_model.py", "def no_such_function"),))])
    with pytest.raises(ValueError, match="no_such_function"): pages.open_questions()


def test_the_figure_of_the_pipeline_is_made_of_the_newest_rows():
    """Its lines follow the rows, and the committed file holds those of today's: run `python experiments/plot_pipeline.py`."""
    from PIL import Image
    plot = importlib.import_module("plot_pipeline")
    rows = plot.claims.read_rows(ROOT / "experiments" / "results.jsonl")
    page = ROOT / "docs" / "pipeline.png"
    with Image.open(page) as image: assert image.text["Description"] == plot.described(rows)
    assert 10_000 < page.stat().st_size < 100_000
    changed = plot.boxes([*rows, {**plot.newest(rows, "05_pretrain"), "loss": 9.87}])
    assert changed["Base"][2] == "loss 9.87" and changed["SFT"] == plot.boxes(rows)["SFT"]
    with pytest.raises(ValueError, match="no row of 08_infer"): plot.boxes([row for row in rows if row["stage"] != "08_infer"])
