"""Take the README's pictures anew after a `dvc repro`: `python docs/pictures.py`, from the checkout's root.

Needs Chromium. Opens `reports/index.html`, and MLflow's dashboard on the database of this checkout.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, "tests")
from browser import Browser, chromium
from tracking_server import free_port, mlflow_server

from pipeline.tracking.comparison import views

DOCS = Path("docs")


def main() -> None:
    with chromium() as browser, tempfile.TemporaryDirectory() as scratch:
        report(browser)
        store = os.environ.get("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
        with mlflow_server(store, free_port(), Path(scratch, "artifacts")) as address:
            dashboard(browser, address)
    subprocess.run(["git", "status", "--short", "docs"], check=False)


def report(browser: Browser) -> None:
    page = Path("reports/index.html").absolute().as_uri()
    for name, width, height, dark in (("report", 1280, 1010, False), ("report-dark", 1280, 1010, True)):
        browser.size(width, height, dark=dark)
        browser.open(page)
        browser.wait_for("MetaFormer, reproduced")
        browser.picture(DOCS / f"{name}.png")
    browser.size(390, 844, scale=2)
    browser.open(page)
    browser.wait_for("MetaFormer, reproduced")
    browser.picture(DOCS / "report-phone.png")


def dashboard(browser: Browser, address: str) -> None:
    browser.size(1500, 640)
    browser.open(address)
    browser.wait_for("Experiments")
    time.sleep(2)
    # MLflow opens with its assistant beside everything.
    browser.evaluate(
        "document.querySelectorAll('button')"
        ".forEach(button => /close/i.test(button.getAttribute('aria-label') || '') && button.click())"
    )
    name, path = next(iter(views().items()))
    browser.open(f"{address}/#{path}")
    browser.wait_for(name, "verdict", "PoolFormer-S12")
    time.sleep(3)
    browser.picture(DOCS / "dashboard.png")


if __name__ == "__main__":
    main()
