"""The parts of a self-contained HTML page: frame, folding sections, tables, figures."""

import html
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path

STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")


def html_page(title: str, about: str, body: list[str]) -> str:
    """A page from its title, the HTML below the title, and the rest of its body."""
    screen = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    meta = f'<meta charset="utf-8">{screen}'
    head = f"<head>{meta}<title>{escaped(title)}</title><style>\n{STYLE}</style></head>"
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
