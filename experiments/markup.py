"""HTML, written such that text cannot become markup: elements, tables, pictures as data URIs, and the page around them.

A string is text and is escaped, unless it is `Html`, which only this module makes.
"""

import base64
import html
import io
import pathlib
import string
from collections.abc import Sequence

from PIL import Image, UnidentifiedImageError

# A larger picture, in bytes, is a photograph: as WebP it takes a tenth of what it takes as PNG, and looks the same.
_LARGE, _QUALITY = 300_000, 88

_PAGE = string.Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title>
<style>
$style
</style>
</head>
<body>
$body
</body>
</html>
""")

_STYLE = """
:root { --ink: #222; --muted: #666; --faint: #ddd; --blue: #0072b2; --wash: #f6f6f4 }
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100% }
body { margin: 0 auto; padding: 2.5rem 1.5rem 5rem; max-width: 73rem; color: var(--ink); background: #fff;
  font: 1rem/1.55 Charter, "Bitstream Charter", "Iowan Old Style", Georgia, "Liberation Serif", serif }
h1, h2, h3 { line-height: 1.2; font-weight: 600; text-wrap: balance; overflow-wrap: anywhere }
h1 { font-size: 2rem; margin: 0 0 .5rem }
h2 { font-size: 1.5rem; margin: 3.5rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--faint) }
h3 { font-size: 1.125rem; margin: 2rem 0 .5rem }
p, ul, nav, pre { max-width: 46rem; margin: .5rem 0 }
p, li { overflow-wrap: anywhere }
a { color: var(--blue); text-decoration-thickness: 1px; text-underline-offset: .15em }
nav ol { columns: 14rem; padding-left: 1.4rem; margin: 1.5rem 0 0 }
nav li { break-inside: avoid }
pre, code { font: .8125rem/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace }
pre { max-width: none; padding: .6rem .8rem; background: var(--wash); white-space: pre-wrap; overflow-wrap: anywhere }
.scroll { overflow-x: auto; margin: .75rem 0 }
table { border-collapse: collapse; font-size: .9375rem; font-variant-numeric: lining-nums tabular-nums }
th, td { padding: .25rem .9rem .25rem 0; text-align: right; vertical-align: baseline;
  border-bottom: 1px solid var(--faint) }
th { font-weight: 600 }
th:first-child, td:first-child { text-align: left }
td { white-space: nowrap }
table.words td { white-space: normal }
tbody th { min-width: 6.5rem }
table.words th, table.words td { text-align: left; max-width: 24rem; overflow-wrap: break-word }
thead th { border-bottom-color: var(--ink); vertical-align: bottom }
tr.total > * { border-top: 1px solid var(--ink); font-weight: 600 }
.best { color: var(--blue); font-weight: 600 }
.worst { color: #b34700; font-weight: 600 }
.own { color: var(--muted) }
.note, figcaption { color: var(--muted); font-size: .875rem; line-height: 1.45 }
figure { margin: 1rem 0; min-width: 0 }
figure img { display: block; width: 100%; max-width: 60rem; height: auto }
figcaption { max-width: 46rem; margin-top: .35rem; overflow-wrap: anywhere }
.pair { display: grid; gap: 0 2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)) }
.classes { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; max-width: none }
.swatch { display: inline-block; width: .9em; height: .9em; margin-right: .4em; vertical-align: -.08em;
  border: 1px solid var(--muted) }
@media (max-width: 40rem) {
  body { padding: 1.25rem 1rem 3rem }
  h1 { font-size: 1.6rem }
  h2 { font-size: 1.3rem; margin-top: 2.5rem }
  table { font-size: .8125rem }
  th, td { padding-right: .6rem }
  /* The letters in a chart would be too small to read: it is moved sideways instead. */
  .chart img { width: 38rem; max-width: none }
  .chart figcaption::before { content: "\\2194\\2002" }
}
@media print {
  body { max-width: none; padding: 0 }
  figure, tr, .classes { break-inside: avoid }
  h2, h3 { break-after: avoid }
}
"""


class Html(str):
    """Markup; whatever else is a string is text."""

    __slots__ = ()


def element(name: str, *children: str, **attributes: str | int) -> Html:
    """An element; `class_` and the like lose their underscore at the end.

    Args:
      name: of the element.
      children: markup as it is, text escaped.
      attributes: their values, escaped.
    """
    pairs = "".join(f' {key.rstrip("_")}="{html.escape(str(value))}"' for key, value in attributes.items())
    start = f"<{name}{pairs}>"
    return Html(start if name == "img" else f"{start}{join(*children)}</{name}>")


def join(*children: str) -> Html:
    """Markup as it is and text escaped, one after the other."""
    return Html("".join(child if isinstance(child, Html) else html.escape(child) for child in children))


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], total: bool = False, words: bool = False, marks: str = ""
) -> Html:
    """A table that moves sideways where the page is too narrow for it.

    Args:
      header: above the columns.
      rows: the cells; the first of each names the row.
      total: the last row is a total.
      words: the cells are words and not numbers.
      marks: a class for the table, too.
    """
    head = element("thead", element("tr", *(element("th", cell, scope="col") for cell in header)))
    body = []
    for index, (first, *others) in enumerate(rows, 1):
        cells = [element("th", first, scope="row"), *(element("td", cell) for cell in others)]
        body.append(element("tr", *cells, **({"class_": "total"} if total and index == len(rows) else {})))
    kind = " ".join(filter(None, ["words" if words else "", marks]))
    whole = element("table", head, element("tbody", *body), **({"class_": kind} if kind else {}))
    return element("div", whole, class_="scroll", tabindex=0)


def picture(path: pathlib.Path, caption: str, chart: bool = False) -> Html:
    """A figure with the picture inside the page.

    Args:
      path: a PNG file.
      caption: below it, and for those who cannot see it: a text.
      chart: it has letters that must be read, so that it may not become narrow.

    Raises:
      ValueError: it is no picture, or damaged; it is named.
      OSError: it cannot be read.
    """
    data, kind = path.read_bytes(), "png"
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            image.load()
            if len(data) > _LARGE:
                smaller = io.BytesIO()
                image.convert("RGB").save(smaller, "webp", quality=_QUALITY)
                data, kind = smaller.getvalue(), "webp"
            width, height = image.size
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path}: not a PNG picture, or damaged ({error}): remove it, or draw it again") from error
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    shown = element("img", src=source, alt=caption, width=width, height=height)
    moving = element("div", shown, class_="scroll", tabindex=0)
    return element("figure", moving, element("figcaption", caption), **({"class_": "chart"} if chart else {}))


def page(title: str, *body: str) -> str:
    """A whole document, which needs no other file and runs no script."""
    return _PAGE.substitute(title=html.escape(title), style=_STYLE.strip(), body="\n".join(map(str, map(join, body))))
