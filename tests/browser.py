"""A page as a reader sees it, in headless Chromium; tests that need it are skipped where there is none."""

import json
import re
import shutil
import tempfile
import time
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

NAMES = (("chromium", "chromium-browser", "google-chrome"), ("chromedriver",))
SOFTWARE = ("use-angle=swiftshader", "use-gl=angle", "enable-unsafe-swiftshader")  # WebGL without a GPU


def started(*options):
    """A browser with these options of its command line; quit it."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    from selenium.common.exceptions import WebDriverException

    given = webdriver.ChromeOptions()
    binary, driver = (next(filter(None, map(shutil.which, names)), None) for names in NAMES)
    if binary is None or driver is None:
        pytest.skip("no Chromium with its driver on the path")
    given.binary_location = binary
    for option in (
        *("headless", "no-sandbox", "disable-quic", "no-first-run", "disable-background-networking"),
        *("disable-component-update", "disable-sync", f"user-data-dir={tempfile.mkdtemp()}", *options),
    ):
        given.add_argument(f"--{option}")
    given.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    try:
        return webdriver.Chrome(options=given, service=webdriver.ChromeService(executable_path=driver))
    except WebDriverException as error:
        pytest.skip(f"no Chromium that starts: {str(error).splitlines()[0]}")


class Page:
    """A page in a browser of some width, as a reader sees it."""

    def __init__(self, browser, path, width=1280):
        self.browser = browser
        metrics = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.get_log("performance"), browser.get_log("browser")
        browser.get(path.as_uri())
        self.until("location.protocol == 'file:' && document.readyState == 'complete'")  # a busy browser is early

    def js(self, code):
        return self.browser.execute_script(f"return {code}")

    def until(self, code, seconds=120):
        end = time.monotonic() + seconds
        while not (value := self.js(code)):
            assert time.monotonic() < end, f"{code}: not within {seconds} s; {self.text('why')}"
            time.sleep(0.05)
        return value

    def ready(self):
        self.until("document.body.dataset.ready")
        return self

    def text(self, name):
        return self.js(f"document.getElementById('{name}')?.textContent")

    def press(self, key):
        self.browser.switch_to.active_element.send_keys(key)

    def click(self, selector):
        self.browser.find_element("css selector", selector).click()

    def picture(self):
        """The planes with what is drawn upon them, grey levels (height, width)."""
        data = self.browser.find_element("id", "stage").screenshot_as_png
        return np.asarray(Image.open(BytesIO(data)).convert("L"), dtype=float)

    def place(self):
        """Of the cross-hair, RAS mm, as the page says it."""
        said = dict(re.findall(r"([\d.]+) mm ([RLAPSI])", self.text("where"))[k][::-1] for k in range(3))
        return np.array([float(said.get(a, 0)) - float(said.get(b, 0)) for a, b in ("RL", "AP", "SI")])

    def asked_for(self):
        """The addresses that were asked for, those of the browser itself left out."""
        events = (json.loads(entry["message"])["message"] for entry in self.browser.get_log("performance"))
        sent = (e["params"] for e in events if e["method"] in ("Network.requestWillBeSent", "Network.webSocketCreated"))
        urls = {one["request"]["url"] if "request" in one else one["url"] for one in sent}
        return {url for url in urls if not url.startswith(("data:", "blob:", "chrome", "devtools"))}
