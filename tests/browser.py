"""A real browser for tests, without a window, and what it read off a page."""

from __future__ import annotations

import html.parser
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
Browse = Callable[..., "subprocess.CompletedProcess[str]"]


class Page(html.parser.HTMLParser):
    """Attributes of the elements that have data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.data: list[dict[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        data = {name.removeprefix("data-"): value or "" for name, value in attrs if name.startswith("data-")}
        if data:
            self.data.append(data)

    def of(self, kind: str) -> list[dict[str, str]]:
        return [data for data in self.data if kind in data]


def browser(folder: Path) -> Browse:
    """Runs one on a file, with flags such as --dump-dom; its profiles lie in `folder`."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    assert found, f"none of {', '.join(BROWSERS)} is here: install chromium"
    count: Iterator[int] = iter(range(99))

    def run(path: Path, *flags: str) -> subprocess.CompletedProcess[str]:
        profile = folder / f"profile{next(count)}"
        command = [
            str(found),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--disable-dev-shm-usage",
            "--enable-logging=stderr",
            f"--user-data-dir={profile}",
            *flags,
            path.as_uri(),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        shutil.rmtree(profile, ignore_errors=True)
        return done

    return run
