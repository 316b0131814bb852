"""A picture of the server's page, at work.

    python -m fullpipe_lab.studies.shoot_page http://127.0.0.1:8000/ docs/server-page.png

Types a question, waits until the answer has begun and tokens are shown, and saves what headless Chromium shows.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time

from selenium import webdriver
from selenium.webdriver.support.wait import WebDriverWait

QUESTION = "Write a Python function that merges two sorted lists, with a docstring and three examples."


def main(url: str, out: str, question: str = QUESTION) -> None:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or "chromium"
    with tempfile.TemporaryDirectory() as profile:
        for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--window-size=1360,860",
                     "--force-device-scale-factor=1.5", f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
        try:
            driver.get(url)
            wait = WebDriverWait(driver, 120, poll_frequency=0.1)
            wait.until(lambda d: d.execute_script("return document.getElementById('state').textContent") == "ready")
            driver.find_element("id", "input").send_keys(question)
            driver.find_element("id", "send").click()
            wait.until(lambda d: d.execute_script("return document.querySelectorAll('.token').length") >= 40)
            time.sleep(0.5)  # so that the picture shows rates
            driver.save_screenshot(out)
        finally:
            driver.quit()


if __name__ == "__main__":
    main(*sys.argv[1:])
