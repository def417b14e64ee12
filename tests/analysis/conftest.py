"""Fixtures that provide small image folders and a browser."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CLASSES = ("bark", "moss/dry", "sand")
PER_CLASS = 5


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Run every test in this folder with a single torch thread."""


@pytest.fixture(scope="session")
def tree(tmp_path_factory) -> Path:
    """Write three class folders with 5, 5 and 6 random colour images (40x36 pixels)."""
    root = tmp_path_factory.mktemp("kinds")
    random = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for index in range(PER_CLASS + (label == 2)):
            pixels = random.integers(0, 120, (36, 40, 3)).astype(np.uint8)
            pixels[..., label] += 100
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def browser():
    """Launch Chromium in headless mode, or skip the test if Chromium is not installed."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip("this machine has no Chromium (Debian: apt-get install chromium)")
    # Chromium can't use its sandbox as root.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with playwright.sync_playwright() as player:
        browser = player.chromium.launch(executable_path=program, args=arguments)
        yield browser
        browser.close()
