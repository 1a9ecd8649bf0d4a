"""The parts of a self-contained HTML page: frame, folding sections, tables, figures."""

import html
from base64 import b64encode
from collections.abc import Sequence

STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: auto; padding: 1rem; overflow-wrap: anywhere }
h1 { font-size: 1.35rem; line-height: 1.3; margin: .5rem 0 } h2 { font-size: 1rem; margin-bottom: 0 }
header p { font-size: 1.05rem; max-width: 45rem }
small, figcaption, table { font-size: .875rem } code, pre { font-size: .8125rem }
.first { display: flex; flex-wrap: wrap; gap: 0 2rem; align-items: start }
.first > * { min-width: 0; max-width: 100% }
details { border-top: 1px solid #8886; padding: .4rem 0 } details details { margin-left: 1rem }
summary { font-weight: 600; cursor: pointer }
pre { white-space: pre-wrap; padding: .7rem; border: 1px solid #8886 }
.box { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal; white-space: nowrap }
caption { text-align: left; white-space: normal; font-weight: 600; min-width: 13rem; max-width: calc(100vw - 2rem) }
th, td { text-align: right; padding: .2rem .6rem; border-bottom: 1px solid #8884; vertical-align: top }
thead th { white-space: normal; vertical-align: bottom }
th:first-child, .text *, .evaluations :nth-child(2) { text-align: left } tbody th { font-weight: normal }
.means th:first-child { position: sticky; left: 0; background: Canvas }
.text tbody * { white-space: pre-wrap; min-width: 3.5rem } .text tbody th { min-width: 13rem; overflow-wrap: anywhere }
figure { margin: 1rem 0 } .card { background: white; border-radius: .4rem; border: 1px solid #8884; padding: .5rem }
.card { width: fit-content; max-width: 100%; box-sizing: border-box }
img { display: block; max-width: 100%; height: auto }
@media (max-width: 30rem) {
  table { font-size: .8rem } th, td { padding: .2rem .3rem } .text tbody th { min-width: 9rem }
  .card { padding: .2rem }
}
"""


def html_page(title: str, about: str, body: list[str]) -> str:
    """A page from its title, the HTML below the title, and the rest of its body."""
    screen = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    meta = f'<meta charset="utf-8">{screen}'
    head = f"<head>{meta}<title>{escaped(title)}</title><style>{STYLE}</style></head>"
    top = f"<body><header><h1>{escaped(title)}</h1>{about}</header><main>"
    start = f'<!doctype html><html lang="en">{head}{top}'
    return "\n".join([start, *body, "</main></body></html>\n"])


def escaped(value) -> str:
    r"""Text for HTML: markup is escaped, control and other invisible characters are spelled out (\x1b).

    Fractions have two digits; None is a dash.
    """
    if isinstance(value, float):
        value = f"{value:.2f}"
    letters = []
    for letter in "–" if value is None else str(value):
        visible = letter.isprintable() or letter == "\n"
        letters.append(letter if visible else ascii(letter)[1:-1])
    return html.escape("".join(letters))


def lines(texts: list[str]) -> str:
    return "".join(f"<p>{escaped(text)}</p>" for text in texts)


def first_screen(parts: list[str]) -> str:
    """The first screen of a page; its parts stand side by side if there is room."""
    return f'<div class="first">{"".join(parts)}</div>'


def details(heading: str, body: list[str]) -> str:
    """A section that unfolds on a click; nothing if it is empty."""
    if not any(body):
        return ""
    return f"<details><summary>{escaped(heading)}</summary>{''.join(body)}</details>"


def table(caption: str, heads: list[str], rows: list[list], kind: str) -> str:
    """A table that scrolls in its own box; the first entry of a row is its heading.

    `kind`: `means` and `evaluations` of numbers, `text` of long texts.
    """
    top = "".join(f'<th scope="col">{escaped(head)}</th>' for head in heads)
    body = []
    for first, *rest in rows:
        entries = "".join(f"<td>{escaped(text)}</td>" for text in rest)
        body.append(f'<tr><th scope="row">{escaped(first)}</th>{entries}</tr>')
    label = escaped(caption)
    box = f'<div class="box" role="region" tabindex="0" aria-label="{label}">'
    start = f'{box}<table class="{kind}"><caption>{label}</caption>'
    return f"{start}<thead><tr>{top}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"


def table_of(caption: str, records: Sequence[dict], columns: dict[str, str]) -> str:
    """A table of long texts, a row for each record; `columns`: heading -> field."""
    rows = [[record[field] for field in columns.values()] for record in records]
    return table(caption, list(columns), rows, "text")


def figure(image: bytes, kind: str, description: str, caption: str) -> str:
    """An image inside the page on a white card, also where the page is dark. `kind`: "png" or "svg+xml"."""
    width = ""
    if kind == "png":
        pixels = int.from_bytes(image[16:20], "big")
        width = f'width="{pixels // 2}" '  # sharp on fine screens
    source = f'src="data:image/{kind};base64,{b64encode(image).decode()}"'
    picture = f'<div class="card"><img alt="{escaped(description)}" {width}{source}></div>'
    return f"<figure>{picture}<figcaption>{escaped(caption)}</figcaption></figure>"
