"""The notebooks run: every cell and every answer, in a kernel of its own, with tiny parameters."""
import importlib

import nbformat
import pytest

build = importlib.import_module("notebooks.build")


def test_an_error_in_an_answer_stops_the_build():
    """The answers are code too: they run after the last cell, in the notebook's own kernel, and are not written into it."""
    book = nbformat.v4.new_notebook(cells=[
        nbformat.v4.new_code_cell("steps = 600     # how many (tiny: 3)", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_markdown_cell("<details><summary>Answer</summary>\n\n```python\nassert steps == 3, f'steps is {steps}'\n```\n\n</details>")])
    with pytest.raises(Exception, match="steps is 600"): build.execute(book.copy())
    book.cells = book.cells[:2]
    assert build.make_tiny(book) == 1 and book.cells[0].source == "steps = 3"
    build.execute(book)
    assert len(book.cells) == 2


@pytest.mark.parametrize("path", build.sources(), ids=lambda p: p.stem)
def test_a_notebook_runs_with_tiny_parameters(path):
    """From notebooks/, in a kernel of its own, answers included; make notebooks and CI run the full parameters."""
    book = build.read_source(path)
    assert build.make_tiny(book) >= 1
    build.execute(book)
    assert any("image/png" in output.get("data", {}) for cell in book.cells for output in cell.get("outputs", ()))
