"""A picture of the playground as a browser shows it: python benchmarks/playground_shot.py URL-OF-A-SERVER PNG."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def take(address: str, path: Path, given: argparse.Namespace) -> None:
    """Fills in the form, waits for the pictures, and saves the whole page.

    Raises:
        SystemExit: No browser is installed, or the page shows an error instead of a picture.
    """
    browser_path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser_path is None:
        raise SystemExit(f"None of {', '.join(BROWSERS)} is installed.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page(
            viewport={"width": given.width, "height": 800},
            device_scale_factor=given.scale,
            color_scheme="dark" if given.dark else "light",
        )
        page.goto(address)
        page.locator("#model option").first.wait_for(state="attached")
        if given.model:
            page.get_by_label("Model").select_option(given.model)
        if given.prompt:
            page.get_by_label("Prompt", exact=True).fill(given.prompt)
        if given.speedup:
            page.locator("#speedup").fill(str(given.speedup))
        page.get_by_label("Seed", exact=True).fill(str(given.seed))
        page.get_by_role("switch").set_checked(given.compare)
        page.get_by_role("button", name="Generate").click()
        done = page.locator("#psnr" if given.compare else ".numbers")
        failed = page.get_by_role("alert")
        done.or_(failed).first.wait_for(timeout=given.timeout * 1000)
        if failed.is_visible():
            raise SystemExit(failed.inner_text())
        page.screenshot(path=path, full_page=True)
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address", help="of the server, http://localhost:8000")
    parser.add_argument("path", type=Path, help="PNG to write")
    parser.add_argument("--model", help="one of the server's; its first without")
    parser.add_argument("--prompt", help="the model's first example without")
    parser.add_argument("--speedup", type=float, help="1 to 6; the model's without")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compare", action="store_true", help="with plain, side by side")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--width", type=int, default=1280, help="of the window, in CSS pixels")
    parser.add_argument("--scale", type=float, default=1.0, help="device pixels per CSS pixel")
    parser.add_argument("--timeout", type=float, default=300, help="seconds to wait for the pictures")
    given = parser.parse_args()
    take(given.address, given.path, given)


if __name__ == "__main__":
    main()
