"""A self-contained HTML page from Python values: escaping, a few elements, the style and the script.

Text becomes HTML only through ``escaped`` or ``element``; what is ``Html`` already is left as it is.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class Html(str):
    """Text that is finished HTML."""


def escaped(content: object) -> Html:
    """Return ``content`` as HTML: unchanged if it is that already, escaped otherwise."""
    return content if isinstance(content, Html) else Html(html.escape(str(content)))


def joined(*parts: object) -> Html:
    """Return the parts one after the other, each escaped unless it is HTML."""
    return Html("".join(escaped(part) for part in parts))


def element(name: str, *content: object, **attributes: object) -> Html:
    """Return ``<name ...>content</name>``; ``class_`` stands for class, None leaves an attribute out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{written}>{joined(*content)}</{name}>")


def section(identifier: str, title: str, *content: object, lead: object = "") -> Html:
    """Return a section with its heading and a sentence under it."""
    head = element("p", lead, class_="lead") if lead else ""
    return element("section", element("h2", title), head, *content, id=identifier)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, text_columns: int = 1) -> Html:
    """Return a table; the first ``text_columns`` columns are text, the others numbers and set to the right."""

    def cells(row: Sequence[object], name: str) -> Html:
        return joined(
            *(element(name, cell, class_=None if i < text_columns else "number") for i, cell in enumerate(row))
        )

    head = element("thead", element("tr", cells(columns, "th"))) if any(columns) else Html()
    body = element("tbody", *(element("tr", cells(row, "td")) for row in rows))
    kind = "facts" if text_columns == len(columns) else None
    return element("div", element("table", head, body, class_=kind), class_="scroll")


def bar(share: float) -> Html:
    """Return a horizontal bar that fills ``share`` of its cell."""
    width = f"width:{100 * min(1.0, max(0.0, share)):.2f}%"
    return element("span", element("span", style=width), class_="bar")


def chart(identifier: str, figure: Mapping[str, Any], description: str) -> Html:
    """Return the place of a chart, of its layout's height, and its figure (Plotly's JSON: "data" and "layout")."""
    data = json.dumps(figure, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c").replace("&", "\\u0026")
    place = element(
        "div",
        id=identifier,
        class_="chart",
        role="img",
        aria_label=description,
        style=f"height:{figure['layout']['height']}px",
    )
    return joined(place, element("script", Html(data), type="application/json", data_chart=identifier))


def document(title: str, body: Html, *, plotly: str) -> str:
    """Return the whole page.

    Args:
        title: Title of the page.
        body: Its sections.
        plotly: Source of plotly.js; it is part of the page, nothing is loaded.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        f'<script id="plotly">{plotly}</script>\n<script>{_SCRIPT}</script>\n</body>\n</html>\n'
    )


_STYLE = """
:root { --page:#f7f7f5; --card:#ffffff; --ink:#1c2430; --soft:#667085; --line:#e3e4e0; --grid:#eceded; --accent:#2f62d0;
  --good:#16794c; --good-back:#e5f4ec; --warn:#9a5b00; --warn-back:#fdf1dd; --track:#eef0f3; --code:#f1f2f4;
  --k0:#2f62d0; --k1:#12938a; --k2:#e08a1e; --k3:#b0489a; --k4:#7a6bd8;
  --k5:#c2412d; --k6:#6d8b1c; --k7:#8a5f3c; }
@media (prefers-color-scheme: dark) { :root { --page:#13161b; --card:#1a1e25; --ink:#e7eaf0; --soft:#98a2b3;
  --line:#2c323c; --grid:#272d37; --accent:#7ba3ff; --good:#6fd3a0; --good-back:#173226; --warn:#f3bd6a;
  --warn-back:#3a2c12;
  --track:#262c36; --code:#222832; --k0:#6d97f5; --k1:#3dbdb2; --k2:#f0a84a; --k3:#d77fc4; --k4:#a294f0;
  --k5:#f0806c; --k6:#a9c452; --k7:#c79a72; } }
* { box-sizing:border-box; }
html { -webkit-text-size-adjust:100%; }
body { margin:0; background:var(--page); color:var(--ink);
  font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif; }
main { max-width:1080px; margin:0 auto; padding:40px 24px 64px; }
header h1 { font-size:30px; line-height:1.2; margin:0 0 6px; letter-spacing:-.02em; overflow-wrap:anywhere; }
header p { margin:0; color:var(--soft); overflow-wrap:anywhere; }
section { background:var(--card); border:1px solid var(--line); border-radius:14px; padding:24px 28px;
  margin-top:24px; }
h2 { font-size:20px; margin:0 0 4px; letter-spacing:-.01em; }
h3 { font-size:15px; margin:24px 0 8px; }
p { margin:8px 0; }
.lead { color:var(--soft); margin:0 0 18px; max-width:78ch; }
.cards { display:grid; grid-template-columns:repeat(auto-fit,minmax(215px,1fr)); gap:14px; background:none; border:0;
  padding:0; }
.card { background:var(--card); border:1px solid var(--line); border-radius:14px; padding:16px 20px; }
.card .name { color:var(--soft); font-size:14px; }
.card .value { font-size:30px; line-height:1.25; font-weight:650; letter-spacing:-.02em;
  font-variant-numeric:tabular-nums; white-space:nowrap; }
.card .detail { font-size:14px; color:var(--soft); font-variant-numeric:tabular-nums; }
.badge { display:inline-block; border-radius:99px; padding:1px 10px; font-size:13px; font-weight:600;
  background:var(--track); color:var(--soft); }
.badge.good { background:var(--good-back); color:var(--good); }
.badge.warning { background:var(--warn-back); color:var(--warn); }
.finding { border-left:3px solid var(--line); padding:2px 0 2px 16px; margin:16px 0 0; }
.finding.warning { border-color:var(--warn); }
.finding p { margin:4px 0 8px; max-width:82ch; }
pre, code { font:13.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace; }
pre { background:var(--code); border-radius:8px; padding:10px 14px; margin:6px 0;
  white-space:pre-wrap; overflow-wrap:anywhere; }
details { margin-top:14px; } summary { cursor:pointer; color:var(--accent); }
.scroll { overflow-x:auto; }
table { border-collapse:collapse; width:100%; font-size:14.5px; font-variant-numeric:tabular-nums; }
th { text-align:left; font-weight:600; color:var(--soft); font-size:13px; white-space:nowrap; }
th, td { padding:6px 12px 6px 0; border-bottom:1px solid var(--line); vertical-align:middle; }
td.number, th.number { text-align:right; padding:6px 0 6px 12px; white-space:nowrap; }
tbody tr:last-child td { border-bottom:0; } .facts td:first-child { width:230px; color:var(--soft); }
.digest { overflow-wrap:anywhere; font-size:13px; }
.bar { display:inline-block; width:130px; height:9px; border-radius:5px; background:var(--track); overflow:hidden; }
.bar span { display:block; height:100%; border-radius:5px; background:var(--accent); }
.chart { width:100%; }
.legend { display:flex; flex-wrap:wrap; gap:6px 20px; font-size:14px; color:var(--soft); margin:0 0 14px; }
.swatch { display:inline-block; width:12px; height:12px; border-radius:3px; margin-right:7px; vertical-align:-1px; }
.block { display:grid; grid-template-columns:170px 1fr 64px; gap:4px 18px; align-items:center; padding:10px 0;
  border-top:1px solid var(--line); }
.block .about { font-size:13px; color:var(--soft); line-height:1.4; }
.block .about b { color:var(--ink); font-size:15px; }
.block .share { text-align:right; font-weight:650; font-size:17px; font-variant-numeric:tabular-nums; }
.lane { display:grid; grid-template-columns:42px 1fr 84px; gap:10px; align-items:center; font-size:13px;
  color:var(--soft); font-variant-numeric:tabular-nums; line-height:20px; }
.lane .count { text-align:right; white-space:nowrap; } .lane .count b { color:var(--ink); }
.lane .room { height:13px; } .lane .before { height:13px; border-radius:4px; background:var(--track); overflow:hidden; }
.lane .after { height:13px; border-radius:4px; }
.dead .before { background:repeating-linear-gradient(135deg,var(--track) 0 5px,transparent 5px 9px); }
.cell { display:block; margin:0 auto; } .cell text { font-size:13px; font-weight:600; } .cell .tag { fill:var(--card); }
.cell .node { fill:var(--track); stroke:var(--line); } .cell .name { fill:var(--ink); font-weight:500; }
.chain { display:flex; flex-wrap:wrap; gap:8px; } .link { border:1px solid var(--line); border-radius:8px;
  padding:4px 12px; font-size:13px; line-height:1.4; } .link span { display:block; color:var(--soft); }
footer { color:var(--soft); font-size:13.5px; margin-top:28px; }
@media (max-width:640px) { main { padding:24px 14px 40px; } section { padding:18px 16px; border-radius:12px; }
  .cards { grid-template-columns:1fr 1fr; gap:10px; padding:0; }
  .card { padding:12px 14px; } .card .value { font-size:22px; } header h1 { font-size:24px; }
  .block { grid-template-columns:1fr 56px; } .block .lanes { grid-column:1 / -1; grid-row:2; } .bar { width:64px; } }
"""

_SCRIPT = """
(function () {
  function colour(name) { return getComputedStyle(document.documentElement).getPropertyValue(name).trim(); }
  function resolved(value) {  // "var(--name)" anywhere in a figure is a colour of the style sheet
    if (typeof value === "string") {
      return value.replace(/var\\((--[a-z0-9]+)\\)/g, function (_, name) { return colour(name); });
    }
    if (Array.isArray(value)) { return value.map(resolved); }
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(function (pair) { return [pair[0], resolved(pair[1])]; }));
    }
    return value;
  }
  function draw() {
    document.querySelectorAll("script[data-chart]").forEach(function (source) {
      var figure = resolved(JSON.parse(source.textContent));
      var narrow = window.innerWidth < 640;
      if (narrow) { figure.layout.margin.l = Math.min(figure.layout.margin.l, 104); figure.layout.margin.r = 8; }
      Plotly.react(source.dataset.chart, figure.data, figure.layout,
        { responsive: true, displayModeBar: false });
    });
  }
  draw();
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
})();
"""
