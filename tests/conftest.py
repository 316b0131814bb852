"""Its place lets tests `import tiny`: pytest puts the folder of a conftest on the path."""

import shutil
import signal
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

from fullpipe.hub import cache

# A shell's background job is started with Ctrl-C ignored, and so would be every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples on every run; look further with --hypothesis-profile=explore.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("explore", max_examples=2000, deadline=None)
settings.load_profile("fixed")



@pytest.fixture(scope="session", autouse=True)
def a_home_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is learned of drafts and costs here is nobody's business later; models that were fetched are used."""
    own, models = tmp_path_factory.mktemp("home"), cache.home() / "models"
    if models.exists():
        (own / "models").symlink_to(models)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cache.HOME_VARIABLE, str(own))
        yield


_CHROMIUM = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
             "--window-size=1400,1100")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """A model that answers in this process takes all cores, also for a module's fixtures; a test begins with one."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A real headless Chromium, whose console messages can be read, where one is installed."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="the package selenium is not installed")
    program, driver_program = shutil.which("chromium"), shutil.which("chromedriver")
    if not (program and driver_program):
        pytest.skip("chromium and chromedriver are not installed (apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    for flag in (*_CHROMIUM, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.binary_location = program
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver_program))
    yield driver
    driver.quit()
