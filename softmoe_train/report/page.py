"""This file owns the HTML file: what a page is made of, and that it asks nobody for anything and runs nothing."""

import base64
import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from softmoe_train.report.draw import Look, Svg

HERE = Path(__file__).parent
TEMPLATE = "report.html.j2"


class Cell(NamedTuple):
    """Of a table: what it says, a smaller line below, and how it looks."""

    text: str
    below: str = ""
    strong: bool = False
    kind: Literal["", "text", "bad"] = ""


class TableRow(NamedTuple):
    """A line of a table, with the look of its curves."""

    name: str
    below: str
    look: Look | None
    cells: list[Cell]


class Table(NamedTuple):
    """The header has a name for each column, the first of which holds the names of the rows."""

    caption: str
    header: list[str]
    rows: list[TableRow]

    def is_text(self, column: int) -> bool:
        """Whether a column of cells holds sentences."""
        return any(row.cells[column].kind == "text" for row in self.rows)


class Figure(NamedTuple):
    """A picture with its title and the words for those who do not see it; `source` is a data: address."""

    title: str
    below: str
    alt: str
    source: str
    width: int  # pixels
    height: int
    kind: Literal["plot", "map", "picture"]


class Group(NamedTuple):
    """Figures beside each other."""

    title: str
    figures: list[Figure]
    wide: bool = False


@dataclass
class Section:
    """A part of the page with a heading."""

    title: str
    notes: list[str] = field(default_factory=list)
    legend: list[tuple[str, Look]] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        """Its name in links."""
        return re.sub(r"[^a-z]+", "-", self.title.lower()).strip("-")


@dataclass
class Page:
    """All of it."""

    title: str
    sentence: str
    sections: list[Section]


def html_of(page: Page) -> str:
    """The page as one document that stands alone: no script, no font, no picture from elsewhere, and all text escaped."""
    import jinja2  # 30 ms, which no other verb is to pay

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = (HERE / "report.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return environment.get_template(TEMPLATE).render(
        page=page,
        style=environment.filters["safe"](style),  # ours
        style_hash=f"sha256-{digest}",
    )


def svg_figure(title: str, below: str, alt: str, svg: Svg, kind: Literal["plot", "map"] = "plot") -> Figure:
    """A plot as an image: nothing in it can run or fetch there, whatever it holds."""
    source = f"data:image/svg+xml;base64,{base64.b64encode(svg.text.encode()).decode()}"
    return Figure(title, below, alt, source, svg.width, svg.height, kind)


def png_figure(title: str, below: str, alt: str, png: bytes, size: tuple[int, int]) -> Figure:
    """A picture as an image of `size` pixels."""
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return Figure(title, below, alt, source, *size, "picture")
