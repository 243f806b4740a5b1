"""Sections → one HTML page that holds everything itself: pictures and sounds are inside, nothing is fetched, no script runs.

In: `report.page.Run`s. Out: HTML text. Next: people's browsers and printers. Contrast and text sizes follow WCAG 2.2 AA.
"""

from base64 import b64encode
from collections.abc import Sequence
from html import escape

from whisper_aut.report.page import Block, Listened, Picture, Run, Section
from whisper_aut.report.tables import Sheet

STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem; color: #1d2329; background: #fff;
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.8rem; margin: 0 0 .5rem; }
h2 { font-size: 1.4rem; margin: 2.5rem 0 .5rem; padding-top: 1rem; border-top: 2px solid #0072b2; }
h3 { font-size: 1.1rem; margin: 1.8rem 0 .4rem; }
nav { margin: .5rem 0 1rem; }
nav a { margin-right: 1rem; }
a { color: #005a8c; }
.table { overflow-x: auto; margin: .6rem 0 .2rem; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: .3rem; }
th, td { padding: .28rem .42rem; border-bottom: 1px solid #dde3e8; text-align: right; white-space: nowrap; }
th { border-bottom: 2px solid #9aa5b1; }
th.text, td.text { text-align: left; white-space: normal; }
tbody tr:nth-child(even) { background: #f5f7f9; }
.note { color: #4a5560; font-size: .88rem; margin: .2rem 0 1rem; max-width: 52rem; }
figure { margin: 1rem 0; }
figure img { max-width: 100%; height: auto; }
figcaption { color: #4a5560; font-size: .88rem; }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1rem; }
.clip { border: 1px solid #dde3e8; border-radius: .4rem; padding: .7rem; font-size: .9rem; break-inside: avoid; }
.clip h4 { margin: 0 0 .4rem; font-size: .9rem; overflow-wrap: anywhere; }
.clip img { width: 100%; height: 5rem; }
.clip audio { width: 100%; margin: .3rem 0; }
.clip dl { margin: 0; display: grid; grid-template-columns: max-content 1fr; gap: .1rem .6rem; }
.clip dt { color: #4a5560; } .clip dd { margin: 0; overflow-wrap: anywhere; }
@media print { body { max-width: none; padding: 0; font-size: 11pt; } audio, nav { display: none; } h2 { break-before: page; }
               h2:first-of-type { break-before: auto; } .table { overflow: visible; } th, td { white-space: normal; } }
"""


def html_page(runs: Sequence[Run], title: str = "whisper_aut report") -> str:
    """Render runs as one page."""
    body = "".join(_run(run, number) for number, run in enumerate(runs))
    links = [(f"r{i}", run.title) for i, run in enumerate(runs)]
    if len(runs) == 1:
        links = [(f"r0s{j}", section.title) for j, section in enumerate(runs[0].sections)]
    nav = "".join(f'<a href="#{place}">{escape(text)}</a>' for place, text in links)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
        f'initial-scale=1"><title>{escape(title)}</title><style>{STYLE}</style></head>\n'
        f"<body><h1>{escape(title)}</h1><nav>{nav}</nav>\n{body}</body></html>\n"
    )


def _run(run: Run, number: int) -> str:
    sections = "".join(
        _section(section, f"r{number}s{place}") for place, section in enumerate(run.sections)
    )
    return f'<h2 id="r{number}">{escape(run.title)}</h2>\n{sections}'


def _section(section: Section, place: str) -> str:
    parts, clips = [], []
    for block in section.blocks:
        if isinstance(block, Listened):
            clips.append(_listened(block))
        else:
            parts.append(_block(block))
    gathered = f'<div class="clips">{"".join(clips)}</div>\n' if clips else ""
    return f'<section id="{place}"><h3>{escape(section.title)}</h3>\n{"".join(parts)}{gathered}</section>\n'


def _block(block: Block) -> str:
    if isinstance(block, Sheet):
        return _table(block)
    if isinstance(block, Picture):
        picture = _embedded("image/png", block.path.read_bytes())
        return f'<figure><img src="{picture}" alt="{escape(block.caption)}"><figcaption>{escape(block.caption)}</figcaption></figure>\n'
    assert isinstance(block, str)
    return f'<p class="note">{escape(block)}</p>\n'


def _table(sheet: Sheet) -> str:
    def cells(row: Sequence[str], tag: str) -> str:
        kinds = (
            'class="text"' if number < sheet.text_columns else "" for number in range(len(row))
        )
        return "".join(
            f"<{tag} {kind}>{escape(cell)}</{tag}>" for cell, kind in zip(row, kinds, strict=True)
        )

    rows = "".join(f"<tr>{cells(row, 'td')}</tr>\n" for row in sheet.rows)
    note = f'<p class="note">{escape(sheet.caption)}</p>' if sheet.caption else ""
    return (
        f'<div class="table"><table><caption>{escape(sheet.title)}</caption><thead><tr>{cells(sheet.head, "th")}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>{note}\n"
    )


def _listened(clip: Listened) -> str:
    seen = f"log-mel of {escape(clip.title)}, time to the right, mel bins upwards"
    picture = (
        f'<img src="{_embedded("image/png", clip.spectrogram)}" alt="{seen}">'
        if clip.spectrogram
        else ""
    )
    player = (
        f'<audio controls preload="none" src="{_embedded("audio/ogg", clip.ogg)}"></audio>'
        if clip.ogg
        else ""
    )
    texts = f"<dl><dt>should be</dt><dd>{escape(clip.reference)}</dd><dt>written</dt><dd>{escape(clip.generated)}</dd></dl>"
    return f'<div class="clip"><h4>{escape(clip.title)}</h4>{picture}{player}{texts}</div>'


def _embedded(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{b64encode(data).decode()}"
