"""The page of made-up results: what it says, and that nothing in a document becomes markup."""

import base64
import html
import re

import pytest
from test_figures import made_up

from ia2mini.report.figures import draw_figures
from ia2mini.report.markup import escaped
from ia2mini.report.page import write_page


def checked(page: str) -> tuple[set[str], list[str]]:
    """Tags and sources of a page whose every element is closed."""
    tags = set(re.findall(r"<([a-z]\w*)", page))
    assert all(
        len(re.findall(rf"<{tag}\b", page)) == page.count(f"</{tag}>")
        for tag in tags - {"meta", "img"}
    )
    return tags, re.findall(r'(?:src|href)="([^"]*)', page)


def test_page_tells_the_outcome_the_adapter_and_the_command(tmp_path):
    page = write_page(made_up(), tmp_path, "ia2mini run mood --template 'a<b'")
    text = html.unescape(re.sub("<[^>]*>", "\n", page))
    assert "IA2→SFT against SFT: accuracy +21.0 points" in page
    assert f"from_pretrained(model, {str(tmp_path / 'adapters/mood-n4-ia2-sft-set1')!r})" in text
    wanted = [
        "91.0 ± 11.3",
        "ia2mini run mood --template 'a<b'",
        "AutoModelForCausalLM.from_pretrained('org/base')",
    ]
    wanted += [
        "Text:bad\nLabel:0",
        "IA2→SFT, set 0: 1 row that it got wrong",
        "0.88",
        "torch 2",
        "rate by lowest dev",
    ]
    assert not [part for part in wanted if part not in text]
    assert (
        '<html lang="en">' in page
        and '<meta name="viewport"' in page
        and "color-scheme: light dark" in page
    )


def test_the_first_screen_is_a_title_the_verdict_a_table_and_a_figure(tmp_path):
    """All else is folded."""
    draw_figures(made_up(), tmp_path)
    page = write_page(made_up(), tmp_path, "ia2mini run mood")
    first, _, rest = page.partition("<details>")
    assert "<h1>Methods compared on mood</h1>" in first
    outcome, chance = "<p>IA2→SFT against SFT: accuracy +21.0 points", "<p>The difference in"
    order = [first.index(part) for part in ("<h1>", outcome, chance, "<table", "<figure>")]
    assert order == sorted(order) and first.count("<p>") == 2
    said = re.findall("<p>(.*?)</p>", first)
    assert "2 pairs of task and set: too few for a p-value or an interval." in said[0]
    assert all(sentence.endswith(".") for sentence in said)
    assert first.count("<table") == first.count("<figure>") == 1
    assert rest.count("<figure>") == 4 and rest.count("<table") == 3
    outside = re.sub(r"<details>.*</details>", "", page.partition("<main>")[2], flags=re.S)
    assert not re.search("<(h2|pre|ul|p)>", outside)


def test_a_table_scrolls_by_itself(tmp_path):
    """Also for the keyboard and a screen reader."""
    page = write_page(made_up(), tmp_path, "")
    (style,) = re.findall("<style>(.*?)</style>", page, re.S)
    assert ".box { overflow-x: auto;" in style
    box = '<div class="box" role="region" tabindex="0" aria-label="'
    assert page.count(box) == page.count("<table") > 2


def test_a_figure_is_described_to_who_cannot_see_it(tmp_path):
    draw_figures(made_up(), tmp_path)
    told = re.findall('<img alt="([^"]*)"', write_page(made_up(), tmp_path, ""))
    assert len(told) == len(set(told)) == 5
    assert "Means over evaluations." in told[0] and ".png" not in "".join(told)


def test_page_holds_its_figures_and_needs_no_other_file(tmp_path):
    names = draw_figures(made_up(), tmp_path)
    tags, sources = checked(write_page(made_up(), tmp_path, ""))
    images = [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in sources]
    assert images == [(tmp_path / name).read_bytes() for name in names] and not tags & {
        "script",
        "link",
    }


def test_page_shows_svg_where_only_that_was_drawn(tmp_path):
    (tmp_path / "methods-eval.svg").write_text("<svg/>")
    _, (source,) = checked(write_page(made_up(choices=("dev", "eval")), tmp_path, ""))
    assert source.startswith("data:image/svg+xml;base64,")


@pytest.mark.parametrize(
    "options", [{"text": True}, {"sizes": (2, 8)}, {"methods": ("base", "icl")}]
)
def test_page_of_other_documents(tmp_path, options):
    page = write_page(made_up(**options), tmp_path, "")
    assert "img" not in checked(page)[0] and "Figures" not in page
    assert ("PeftModel" in page) == ("methods" not in options)
    assert ("adapters/mood-n8-ia2-sft-set1" in page) == ("sizes" in options)  # the largest N


def test_nothing_in_a_document_becomes_markup(tmp_path):
    evil, document = "<script>alert(1)</script>\x1b[31m\u202e\ud800\"'&", made_up()
    known = [cell | {"eval": evil + cell["eval"]} for cell in document["cells"]]
    document["cells"] = [cell | dict.fromkeys(("task", "model"), evil) for cell in known]
    document["cells"] += [
        cell | {"method": evil} for cell in document["cells"] if cell["method"] == "base"
    ]
    row = dict.fromkeys(("prompt", "answer", "said"), evil) | {"confidence": None, "right": True}
    document["samples"][0] |= dict.fromkeys(("task", "prompt", "method"), evil) | {"rows": [row]}
    document |= {"config": {"model": evil, "adapter": "lora", evil: evil}, "versions": {evil: evil}}
    document["adapters"] = [f"adapters/{evil}-n4-ia2-sft-set0"]
    (tmp_path / "methods.svg").touch()
    page = write_page(document, tmp_path, evil)
    assert (
        page.encode()
        and "PeftModel" in page
        and "img" in checked(page)[0]
        and "script" not in checked(page)[0]
    )
    assert "\x1b" not in page and "\u202e" not in page and page.count(escaped(evil)) > 20
    assert r"&lt;/script&gt;\x1b[31m\u202e\ud800&quot;&#x27;&amp;" in page
