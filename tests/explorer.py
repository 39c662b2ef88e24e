"""The page of wf_vit.page in a browser, for the tests that visit it."""

import contextlib
import json
import re

import numpy as np

# Half of the last digit shown, and the coding's error at 255 levels.
TOLERANCE = 5e-5 + 0.004


class Explorer:
    """The page as a visitor meets it, in Selenium's browser."""

    def __init__(self, driver, path, grid):
        self.driver, self.grid = driver, grid
        self.url = path.as_uri()

    def open(self, link=""):
        # The same address with another hash would not load anew.
        self.driver.get("about:blank")
        for kind in ("browser", "performance"):
            self.driver.get_log(kind)
        self.driver.get(self.url + link)
        self.until(lambda: "layer" in self.read(".patch"))

    def until(self, condition):
        from selenium.webdriver.support.ui import WebDriverWait  # Not always there.

        WebDriverWait(self.driver, 20, 0.02).until(lambda _: condition())

    def find(self, selector):
        return self.driver.find_elements("css selector", selector)

    def read(self, selector, panel=0):
        return self.find(selector)[panel].text

    def choose(self, selector, value, event="change", panel=0):
        self.driver.execute_script(
            "const [element, value, event] = arguments; element.value = value;"
            "element.dispatchEvent(new Event(event, {bubbles: true}));",
            self.find(selector)[panel],
            str(value),
            event,
        )

    def hover(self, patch, *, click=False):
        from selenium.webdriver import ActionChains

        canvas = self.find(".grid")[0]
        row, column = divmod(patch, self.grid[1])
        x = ((column + 0.5) / self.grid[1] - 0.5) * canvas.size["width"]
        y = ((row + 0.5) / self.grid[0] - 0.5) * canvas.size["height"]
        actions = ActionChains(self.driver)
        actions.move_to_element_with_offset(canvas, int(x), int(y))
        (actions.click() if click else actions).perform()

    def press(self, *keys):
        for key in keys:
            self.find(".grid")[0].send_keys(key)

    def table(self, panel=0):
        """Returns what the patch listens to, and who listens to it, by patch."""
        columns = ({}, {})
        for row in self.find("table")[panel].find_elements("css selector", "tbody tr"):
            cells = [cell.text for cell in row.find_elements("css selector", "td")]
            for side, column in enumerate(columns):
                y, x = map(int, re.findall(r"\d+", cells[2 * side]))
                column[y * self.grid[1] + x] = percent(cells[2 * side + 1])
        return columns

    @contextlib.contextmanager
    def window(self, width, height, scheme, *, mobile):
        """A window of some size, of a person who prefers a colour scheme."""
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {
                "width": width,
                "height": height,
                "deviceScaleFactor": 1,
                "mobile": mobile,
            },
        )
        wanted = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": wanted})
        try:
            yield
        finally:
            self.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
            self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})

    def arrow(self):
        """Returns how far the patch's field tends to the side, and up or down."""
        words = re.findall(r"([\d.]+) (?:left|up|ri|do)", self.read(".measured"))
        return [float(word) for word in words]

    def complaints(self):
        """Returns console errors and requests other than the page itself."""
        errors = [
            entry
            for entry in self.driver.get_log("browser")
            if entry["level"] in ("SEVERE", "WARNING")
        ]
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                url = message["params"]["request"]["url"]
                if not url.startswith((self.url, "data:", "about:")):
                    errors.append(url)
        return errors


def percent(words):
    return float(re.search(r"([\d.]+) %", words).group(1)) / 100


def assert_shows(explorer, patch, impact, panel=0):
    """Checks one panel's table against rows and columns of the true shares."""
    row, column = divmod(patch, explorer.grid[1])
    explorer.until(
        lambda: explorer.read(".patch", panel).startswith(f"Patch ({row}, {column})")
    )
    shares = impact / impact.sum(-1, keepdims=True)
    listens, heard = explorer.table(panel)
    for shown, true in ((listens, shares[patch]), (heard, shares[:, patch])):
        assert len(shown) == 5
        assert min(shown.values()) >= np.sort(true)[-6] - 0.01
        for other, value in shown.items():
            assert abs(value - true[other]) < TOLERANCE
