"""The HTML page: complete, escaped, self-contained."""

import re
from html.parser import HTMLParser

import pytest

from rankwise.core.plots import by_kind
from rankwise.core.report import Report

KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")
NAMES = [f"model.layers.{i}.{kind}" for i in range(3) for kind in KINDS]


@pytest.fixture
def compressed() -> Report:
    rows = [
        {
            "name": name,
            "kind": "low_rank" if i else "dense",
            "rank": 4 + i if i else None,
            "params_before": 1024,
            "params_after": 600 + i,
            "predicted_error": 0.1,
            "measured_error": 0.1,
        }
        for i, name in enumerate(NAMES)
    ]
    totals = {
        "keep": {"params": 0.8, "bytes": 0.8, "macs": 0.75},
        "perplexity": {
            "<topics>": {"dense": 9.5, "compressed": 10.3},
            "python": {"dense": 5.0, "compressed": 6.5},
        },
        "peak_memory_bytes": 1_234_567_890,
    }
    return Report(
        "A <b>bold</b> model & co", rows, totals=totals, curves={n: [4.0, 2.0, 1.0, 0.0] for n in NAMES}
    )


def test_page_is_escaped_and_complete(compressed, tmp_path):
    path = tmp_path / "report.html"
    page = compressed.to_html(path)
    assert path.read_text(encoding="utf-8") == page
    assert "A &lt;b&gt;bold&lt;/b&gt; model &amp; co" in page
    assert "&lt;topics&gt;" in page
    assert "<b>bold" not in page
    assert "1.235 GB" in page
    assert all(name in page for name in NAMES)
    assert page.count("<svg") == 2


def test_page_needs_no_other_file_and_runs_nothing(compressed):
    found = []

    class Check(HTMLParser):
        def handle_starttag(self, tag, attrs):
            found.append(tag)
            for key, value in attrs:
                assert not key.startswith("on")
                if key in {"src", "href", "xlink:href"}:
                    assert value.startswith("#")

    Check().feed(compressed.to_html())
    assert not {"script", "link", "iframe", "object", "img"} & set(found)
    assert not re.search(r"url\((?!#)", compressed.to_html())


def test_names_cannot_break_out_of_a_plot():
    bad = "</text><script>alert(1)</script>$x$"
    rows = [
        {"name": f"{bad}.{i}.{k}", "shape": [2, 2], "params": 4, "alpha": None if i else 2.0}
        for i in (0, 1)
        for k in "ab"
    ]
    page = Report("x", rows, curves={row["name"]: [1.0] for row in rows}).to_html()
    assert "<script" not in page


def test_same_report_gives_the_same_page(compressed):
    assert compressed.to_html() == compressed.to_html()


def test_reports_without_layers_or_totals():
    page = Report("texts", [{"name": "topics", "perplexity": 9.5}], rows_name="texts").to_html()
    assert "9.5" in page
    assert "<svg" not in page
    assert "<h1>empty</h1>" in Report("empty").to_html()


def test_kinds_of_other_families():
    names = [
        "encoder.layer.0.attention.output.dense",
        "encoder.layer.0.output.dense",
        "encoder.layer.1.output.dense",
    ]
    assert by_kind(names) == {"attention.output.dense": names[:1], "output.dense": names[1:]}
    assert by_kind(["0", "2"]) == {"layers": ["0", "2"]}
    assert by_kind([""]) == {"layers": [""]}
