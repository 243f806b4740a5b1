"""The report and the demo page in a headless browser without network."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from whisper_aut.cli import main
from whisper_aut.inference.demo import build_page, launch_page
from whisper_aut.loading import open_demo_models

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
WIDTH, HEIGHT = 1200, 3000
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")


def browse(address: str, tmp_path: Path, *options: str) -> str:
    """Open a page in a browser that can reach nothing but this machine; return what it printed."""
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        f"--window-size={WIDTH},{HEIGHT}",
        *options,
        address,
    ]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.fixture(scope="module")
def report(pipeline_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    assert (
        main(["report", str(pipeline_run / "runs" / "aut_tiny" / "latest"), "--out", str(out)]) == 0
    )
    return out / "report.html"


def test_the_report_fills_the_window_and_not_more(report: Path, tmp_path: Path):
    browse(report.as_uri(), tmp_path, f"--screenshot={tmp_path / 'report.png'}")
    picture = imread(tmp_path / "report.png")[..., :3]
    assert picture.shape == (HEIGHT, WIDTH, 3)
    drawn = np.abs(picture - picture[-1, -1]).max(2) > 0.1
    assert 0.01 < drawn.mean() < 0.6
    assert drawn[:, : WIDTH // 2].any()
    assert not drawn[:, -4:].any(), "something runs out of the window"
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 100, "no figure was drawn"


def test_the_report_prints_without_javascript(report: Path, tmp_path: Path):
    barred = "<head><meta http-equiv='Content-Security-Policy' content=\"script-src 'none'\">"
    (tmp_path / "barred.html").write_text(report.read_text().replace("<head>", barred, 1))
    browse(
        (tmp_path / "barred.html").as_uri(), tmp_path, f"--print-to-pdf={tmp_path / 'report.pdf'}"
    )
    pdf = (tmp_path / "report.pdf").read_bytes()
    assert pdf.startswith(b"%PDF")
    assert pdf.count(b"/Subtype /Image") >= 2, "the figures are missing"


@pytest.mark.slow
def test_the_demo_draws_itself_without_the_outside_world(
    pipeline_run: Path, free_port: int, tmp_path: Path
):
    pytest.importorskip("gradio")
    listener = open_demo_models(str(pipeline_run / "runs" / "aut_tiny" / "latest"), "", "none")
    listener.index(str(pipeline_run / "clips"))
    page = build_page(listener, "a test")
    address = launch_page(page, port=free_port)
    try:
        drawn = browse(address, tmp_path, "--virtual-time-budget=30000", "--dump-dom")
    finally:
        page.close()
    # Scripts hold every label even where nothing is drawn.
    drawn = re.sub(r"<(script|style|title)\b.*?</\1>", "", drawn, flags=re.DOTALL)
    for text in (
        "a test",
        "Clip, up to 30 s",
        "Domain of the prompt",
        "The decoder writes",
        "Nearest clips",
        "before",
        "after",
    ):
        assert text in drawn, text
