"""A picture of the server's page, at work.

    python -m fullpipe_lab.studies.shoot_page http://127.0.0.1:8000/ docs/server-page.png

Types a question, waits until the answer has begun and tokens are shown, and saves what headless Chromium shows.
`shoot_hosts_page` takes one of several hosts.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from selenium import webdriver
from selenium.webdriver.support.wait import WebDriverWait

QUESTION = "Write a Python function that merges two sorted lists, with a docstring and three examples."
_WAIT_S = 120


def main(url: str, out: str, question: str = QUESTION) -> None:
    with page(url) as driver:
        ask(driver, question)
        shoot(driver, out)


@contextmanager
def page(url: str, height: int = 860) -> Iterator[Any]:
    """The page in a browser, as soon as the server is ready."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or "chromium"
    with tempfile.TemporaryDirectory() as profile:
        for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--window-size=1360,{height}",
                     "--force-device-scale-factor=1.5", f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
        try:
            driver.get(url)
            until(driver, "return document.getElementById('state').textContent === 'ready'")
            yield driver
        finally:
            driver.quit()


def until(driver: Any, script: str, *values: str) -> None:
    """Wait until what a script returns is true."""
    WebDriverWait(driver, _WAIT_S, poll_frequency=0.1).until(lambda d: d.execute_script(script, *values))


def ask(driver: Any, question: str, tokens: int = 40) -> None:
    """Type a question, and wait until there are so many tokens."""
    driver.find_element("id", "input").send_keys(question)
    driver.find_element("id", "send").click()
    until(driver, f"return document.querySelectorAll('.token').length >= {tokens}")


def shoot(driver: Any, out: str) -> None:
    time.sleep(0.5)  # so that the picture shows rates
    driver.save_screenshot(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
