"""A real browser, headless: what a page looks like, what its DOM becomes, and what it complains about."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import tempfile

import pytest

PROGRAM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr"]
needs_browser = pytest.mark.skipif(PROGRAM is None, reason="no Chromium here: apt-get install chromium runs this test")


def browse(page, *flags, size=(1320, 1500)):
    """Opens a page and returns what the browser printed and the messages of the page's console."""
    with tempfile.TemporaryDirectory() as profile:
        window = f"--window-size={size[0]},{size[1]}"
        command = [PROGRAM, *FLAGS, f"--user-data-dir={profile}", window, *flags, page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


def screenshot(page, into, *flags, **options):
    """Writes a screenshot; returns the messages of the console."""
    return browse(page, f"--screenshot={into}", *flags, **options)[1]


def ask(page, script, into, drop=()):
    """Runs a script in a copy of the page, whose policy would forbid it, and returns the value that it leaves.

    Args:
        page: the page.
        script: the body of a function that returns something that JSON can hold.
        into: where the copy goes.
        drop: patterns of what else the copy leaves out.
    """
    text = page.read_text(encoding="utf-8")
    for pattern in (r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>", *drop):
        text, count = re.subn(pattern, "", text, flags=re.DOTALL)
        assert count == 1, pattern
    element = "Object.assign(document.createElement('pre'), {id: 'told'})"
    run = f"const told = {element}; told.textContent = JSON.stringify((() => {{{script}}})());"
    run += "document.body.append(told);"
    head, end, tail = text.rpartition("</body>")
    into.write_text(f"{head}<script>{run}</script>{end}{tail}", encoding="utf-8")
    out, console = browse(into, "--dump-dom")
    assert console == []
    return json.loads(html.unescape(re.search(r'<pre id="told">(.*?)</pre>', out, re.DOTALL)[1]))
