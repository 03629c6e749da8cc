"""The page in a browser, against a double of the server."""

from __future__ import annotations

import base64
import io
import re
import runpy
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ddit_rt.serve.playground import FOLDER

sync_api = pytest.importorskip("playwright.sync_api")
for needed in ("fastapi", "uvicorn", "multipart"):
    pytest.importorskip(needed)
from serve_double import FAR, HTML, STEPS, Double, picture, served  # noqa: E402

Page, Route, expect = sync_api.Page, sync_api.Route, sync_api.expect
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")

WAIT = 20_000
"""Milliseconds a locator is waited for: a browser beside other tests takes seconds at times."""


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Double, str]]:
    double = Double()
    with served(double) as address:
        yield double, address


@pytest.fixture
def double(server: tuple[Double, str]) -> Double:
    server[0].forget()
    return server[0]


@pytest.fixture(scope="module")
def tab(server: tuple[Double, str]) -> Iterator[tuple[Page, list[str]]]:
    """A tab of a browser, and what must not happen there: requests to other hosts, breaches of the policy, throws.

    One tab for all tests: opening another costs a second.
    """
    faults: list[str] = []

    def only_here(route: Route) -> None:
        if route.request.url.startswith(server[1]):
            route.continue_()
        else:
            faults.append(f"asks {route.request.url}")
            route.abort()

    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(WAIT)
        expect.set_options(timeout=WAIT)
        page.context.route("**/*", only_here)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda said: faults.append(said.text) if "Content Security" in said.text else None)
        yield page, faults
        browser.close()


@pytest.fixture
def page(tab: tuple[Page, list[str]], double: Double, server: tuple[Double, str]) -> Iterator[Page]:
    """The page, opened anew."""
    page, faults = tab
    faults.clear()
    page.goto(server[1])
    expect(page.get_by_label("Model")).to_have_value("painter")
    yield page
    page.evaluate("sessionStorage.clear()")
    page.unroute_all()
    assert not faults


def ask(page: Page, prompt: str, **fields: str) -> None:
    page.get_by_label("Prompt", exact=True).fill(prompt)
    for name, value in fields.items():
        page.locator(f"#{name}").fill(value)
    page.get_by_role("button", name="Generate").click()


def numbers(page: Page) -> dict[str, str]:
    rows = page.locator(".numbers > div")
    return dict(zip(rows.locator("dt").all_inner_texts(), rows.locator("dd").all_inner_texts()))


def test_previews_come_first_then_the_picture_and_what_was_done(page: Page, double: Double) -> None:
    double.go_on.clear()
    ask(page, "a red cube", seed="11", speedup="2.5", negative="blue", guidance="")
    expect(page.get_by_alt_text("Preview: a red cube")).to_be_visible()
    expect(page.locator(".progress")).to_have_text(re.compile(r"Preview 1, step 2 of 10"))
    double.go_on.set()
    expect(page.get_by_alt_text("a red cube", exact=True)).to_be_visible()
    sent = double.fields_of("/v1/images/generations")
    assert sent == [
        {
            "model": "painter",
            "prompt": "a red cube",
            "size": "64x64",
            "steps": 10,
            "seed": 11,
            "negative_prompt": "blue",
            "speedup": 2.5,
            "n": 1,
            "stream": True,
            "partial_images": 3,
            "output_format": "png",
        }
    ]
    strip = page.get_by_role("img", name="Patch sizes of 10 steps in order: 3 p (full), 1 skipped, 1 2p, 1 skipped,")
    kinds = strip.locator("span").evaluate_all("cells => cells.map(cell => cell.className)")
    assert kinds == [f"size-{multiple}" for multiple in STEPS]
    legend = page.get_by_role("list", name="Steps by patch size")
    assert legend.locator("li").all_inner_texts() == ["p (full): 4", "2p: 2", "4p: 1", "skipped: 3"]
    found = numbers(page)
    assert found.pop("whole request")
    assert found == {
        "queued": "0.01 s",
        "encoding": "0.02 s",
        "denoising": "0.70 s",
        "decoding": "0.03 s",
        "FLOP speed-up": "2.19x",
        "seed": "11",
        "request": "req-7",
    }
    assert not double.cut.is_set()


def test_the_saved_file_is_the_picture_that_was_sent(page: Page) -> None:
    ask(page, "a red cube", seed="3", speedup="1")
    with page.expect_download() as saving:
        page.get_by_role("link", name="Save").click()
    assert saving.value.suggested_filename == "ddit-3.png"
    assert Path(saving.value.path()).read_bytes() == base64.b64decode(picture(64, 64, by=0))


def test_without_a_seed_every_request_gets_one_of_its_own(page: Page, double: Double) -> None:
    for _ in range(2):
        ask(page, "a red cube")
        expect(page.get_by_role("link", name="Save")).to_be_visible()
    first, second = (sent["seed"] for sent in double.fields_of("/v1/images/generations"))
    assert first != second and 0 <= first < 2**32


@pytest.mark.parametrize("way", ["button", "key"])
def test_stop_cuts_the_request_off(page: Page, double: Double, way: str) -> None:
    ask(page, "endless")
    expect(page.get_by_alt_text("Preview: endless")).to_be_visible()
    if way == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    assert double.cut.wait(WAIT / 1000)
    expect(page.get_by_role("status")).to_have_text("Stopped.")
    expect(page.get_by_role("alert")).to_be_hidden()
    expect(page.get_by_role("button", name="Generate")).to_be_enabled()


def test_plain_and_accelerated_side_by_side_with_their_difference(page: Page, double: Double) -> None:
    page.get_by_role("switch", name="Compare with plain").check()
    ask(page, "a red cube", speedup="3")
    # every value differs by FAR: 20 log10(255 / FAR) dB
    expect(page.locator("#psnr")).to_have_text("PSNR 42.1 dB to plain")
    expect(page.locator("#times")).to_have_text("Denoising 0.70 s instead of 1.00 s: 1.43 times as fast")
    assert page.get_by_role("article", name="Accelerated, 3x").get_by_alt_text("a red cube").is_visible()
    assert page.get_by_role("article", name="Plain").get_by_alt_text("a red cube").is_visible()
    quick, plain = double.fields_of("/v1/images/generations")
    assert (quick.pop("speedup"), plain.pop("speedup")) == (3, 1)
    assert quick == plain
    for gain in (5, 20):
        page.get_by_label("Amplified, times").select_option(str(gain))
        shown = page.locator("#difference-canvas").evaluate("canvas => canvas.toDataURL()")
        drawn = Image.open(io.BytesIO(base64.b64decode(shown.partition(",")[2]))).convert("RGB")
        assert drawn.size == (64, 64) and drawn.getextrema() == ((gain * FAR,) * 2,) * 3


def test_equal_pictures_are_called_equal(page: Page) -> None:
    page.get_by_role("switch", name="Compare with plain").check()
    ask(page, "a red cube", speedup="1")
    expect(page.locator("#psnr")).to_have_text("The pictures are equal")


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("refuse", f"Too many: {HTML} (rate_limit_error, queue_full, HTTP 429; try again in 3 s; request req-7)"),
        ("break", f"Broke: {HTML} (server_error, broken)"),
    ],
    ids=["before", "in mid-stream"],
)
def test_errors_are_shown_in_the_servers_words(page: Page, prompt: str, text: str) -> None:
    ask(page, prompt)
    expect(page.get_by_role("alert")).to_have_text(text)
    expect(page.get_by_role("button", name="Generate")).to_be_enabled()
    ask(page, "a red cube")
    expect(page.get_by_role("link", name="Save")).to_be_visible()
    expect(page.get_by_role("alert")).to_be_hidden()


def test_a_server_that_has_gone_is_an_error_in_words(page: Page) -> None:
    page.route("**/v1/images/generations", lambda route: route.abort("connectionrefused"))
    ask(page, "a red cube")
    expect(page.get_by_role("alert")).to_contain_text("The server cannot be reached")


def test_markup_in_prompts_models_and_errors_is_text(page: Page) -> None:
    page.get_by_label("Model").select_option(HTML)
    page.get_by_label("Example prompts").select_option(HTML)
    ask(page, HTML)
    expect(page.get_by_alt_text(HTML, exact=True)).to_be_visible()
    expect(page.locator("figcaption", has_text=HTML)).to_be_visible()
    ask(page, f"refuse {HTML}")
    expect(page.get_by_role("alert")).to_contain_text(HTML)
    assert page.evaluate("window.executed") is None
    assert page.locator("#results script, img[src=x]").count() == 0


def test_the_key_goes_with_every_request_and_stays_in_the_tab(page: Page, double: Double) -> None:
    page.get_by_label("API key").fill("wrong")
    page.get_by_label("API key").blur()
    expect(page.get_by_role("alert")).to_contain_text("Incorrect API key provided (authentication_error, HTTP 401")
    expect(page.get_by_role("button", name="Generate")).to_be_disabled()
    page.get_by_label("API key").fill("secret")
    page.get_by_label("API key").blur()
    expect(page.get_by_label("Model")).to_have_value("painter")
    ask(page, "a red cube")
    expect(page.get_by_role("link", name="Save")).to_be_visible()
    assert [asked[3] for asked in double.asked][-2:] == ["Bearer secret"] * 2
    assert page.evaluate("[localStorage.length, document.cookie, sessionStorage.length]") == [0, "", 1]
    page.reload()
    expect(page.get_by_label("API key")).to_have_value("secret")


def test_a_picture_to_start_from_is_sent_as_an_edit(page: Page, double: Double) -> None:
    given, mask = base64.b64decode(picture(32, 32)), base64.b64decode(picture(32, 32, by=1))
    page.get_by_label("Picture").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": given})
    page.get_by_label("Mask").set_input_files({"name": "m.png", "mimeType": "image/png", "buffer": mask})
    ask(page, "a red cube", strength="0.4", seed="5")
    expect(page.get_by_role("link", name="Save")).to_be_visible()
    (sent,) = double.fields_of("/v1/images/edits")
    assert (sent["image"], sent["mask"]) == (("a.png", given), ("m.png", mask))
    assert (sent["strength"], sent["seed"], sent["stream"], sent["partial_images"]) == ("0.4", "5", "true", "3")
    page.get_by_role("button", name="Remove").click()
    ask(page, "a red cube")
    expect(page.get_by_role("link", name="Save")).to_be_visible()
    assert "strength" not in double.fields_of("/v1/images/generations")[0]


def test_what_a_model_does_not_take_is_not_asked_for(page: Page, double: Double) -> None:
    page.get_by_label("Negative prompt").fill("blue")
    page.get_by_label("Model").select_option(HTML)
    for label in ("Negative prompt", "Picture", "Mask", "Seconds"):
        expect(page.get_by_label(label)).to_be_hidden()
    ask(page, "a red cube")
    expect(page.get_by_role("link", name="Save")).to_be_visible()
    (sent,) = double.fields_of("/v1/images/generations")
    assert sent["model"] == HTML and "negative_prompt" not in sent


def test_a_video_is_made_followed_shown_and_deleted(page: Page, double: Double) -> None:
    page.get_by_label("Model").select_option("filmer")
    expect(page.get_by_role("switch")).to_be_hidden()
    ask(page, "a red cube", seconds="2", seed="4")
    expect(page.locator(".progress")).to_have_text("In progress, 40 %")
    expect(page.locator("video[aria-label='a red cube']")).to_be_visible()
    (sent,) = double.fields_of("/v1/videos")
    assert (sent["seconds"], sent["seed"], sent["speedup"]) == ("2", 4, 2)
    expect(page.get_by_role("img", name="Patch sizes of 10 steps")).to_be_visible()
    page.get_by_role("button", name="Delete from the server").click()
    expect(page.get_by_role("status")).to_have_text("Accelerated, 2x: Deleted")
    expect(page.locator("video")).to_have_count(0)
    assert not double.videos


def test_a_video_that_is_stopped_is_deleted_and_one_that_fails_says_why(page: Page, double: Double) -> None:
    page.get_by_label("Model").select_option("filmer")
    ask(page, "endless")
    expect(page.locator(".progress")).to_have_text("Queued")
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("status")).to_have_text("Stopped.")
    assert not double.videos
    ask(page, "fail")
    expect(page.get_by_role("alert")).to_have_text("No room for 96x64 (out_of_memory)")


def test_every_control_has_a_name_and_the_prompt_sends_by_keyboard(page: Page) -> None:
    nameless = page.evaluate(
        "[...document.querySelectorAll('input, select, textarea')].filter(e => !e.labels.length).map(e => e.id)"
    )
    assert nameless == []
    page.get_by_label("Prompt", exact=True).fill("a red cube")
    page.get_by_label("Prompt", exact=True).press("Control+Enter")
    expect(page.get_by_role("link", name="Save")).to_be_visible()


def test_events_are_read_however_they_are_cut(page: Page) -> None:
    read = """async () => {
        const { events } = await import(new URL("playground/api.js", document.baseURI));
        const text = ': hello\\n\\nevent: a\\r\\ndata: {"n":\\r\\ndata: 1}\\r\\n\\r\\ndata:{"n":"ü"}\\n\\n';
        const bytes = new TextEncoder().encode(text);
        const found = [];
        for (let size = 1; size <= bytes.length; size += 1) {
            const body = new ReadableStream({ start(stream) {
                for (let i = 0; i < bytes.length; i += size) stream.enqueue(bytes.slice(i, i + size));
                stream.close();
            } });
            const list = [];
            for await (const event of events(new Response(body))) list.push(event.n);
            found.push(JSON.stringify(list));
        }
        return [...new Set(found)];
    }"""
    assert page.evaluate(read) == ['[1,"ü"]']


def test_every_file_of_the_page_is_packaged(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[2]
    declared: dict[str, Any] = {}
    monkeypatch.setattr("setuptools.setup", lambda **given: declared.update(given))
    monkeypatch.chdir(root)
    runpy.run_path("setup.py")
    patterns = declared["package_data"]["ddit_rt"]
    files = [path.relative_to(root / "ddit_rt").as_posix() for path in FOLDER.iterdir() if path.is_file()]
    files = [path for path in files if not path.endswith(".py")]
    assert len(files) > 3
    assert [path for path in files if not any(fnmatch(path, pattern) for pattern in patterns)] == []
