"""Text and tables, plain or in colour, with what others have written in them."""

from collections.abc import Callable, Sequence
from io import StringIO

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from .numbers import Example


WIDTH = 119
MAX_CHARACTERS = 105  # of a prompt or completion: three lines


def plain(renderable: RenderableType) -> str:
    """What `rich` prints, without colours and `WIDTH` wide, wherever it is printed."""
    file = StringIO()
    Console(file=file, width=WIDTH, color_system=None, force_terminal=False, force_jupyter=False).print(renderable)
    return "\n".join(line.rstrip() for line in file.getvalue().rstrip().splitlines())


def sentence(text: str) -> Text:
    """A line that is not broken."""
    return Text(text, no_wrap=True, overflow="ignore")


def number_format(numbers: Sequence[float]) -> Callable[[float], str]:
    """Three decimals, or three digits where numbers of this size need it."""
    form = "z.3f" if 0.1 <= max(map(abs, numbers)) < 1e5 else "z.3g"
    return lambda x: format(x, form)


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table with names or numbers in its first column, and numbers in the others."""
    grid = _grid(title, *header)
    for column in grid.columns[1:]:
        column.justify = "right"
    for row in rows:
        grid.add_row(*(Text(shorten(cell, 40)) for cell in row))
    return grid


def examples_table(title: str, examples: Sequence[Example], number: Callable[[float], str]) -> Table:
    """A table of completions: the end of each prompt, and the beginning of the completion."""
    grid = _grid(title, "reward", "value", "prompt", "completion", expand=True)
    for column, ratio in zip(grid.columns, (None, None, None, 1, 1), strict=True):
        column.ratio = ratio
        column.justify, column.no_wrap = ("left", False) if ratio else ("right", True)
    for example in examples:
        numbers = (number(example[name]) for name in ("advantage", "reward", "value"))
        prompt = shorten(example["prompt"][::-1])[::-1]
        grid.add_row(*map(Text, (*numbers, prompt, shorten(example["completion"]))))
    return grid


def shorten(text: str, length: int = MAX_CHARACTERS) -> str:
    """The beginning of a text on one line, without control characters, which would speak to the terminal."""
    text = "".join(c if c.isprintable() else "�" for c in " ".join(text.split()))
    return text if len(text) <= length else text[: length - 1] + "…"


def _grid(*header: str, expand: bool = False) -> Table:
    return Table(*header, box=None, padding=(0, 2, 0, 0), header_style="bold", expand=expand)
