"""The page in a real browser: a chat, who guessed, stopping, the race; wide and on a phone, with the keyboard alone."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

from localspec.pair import Pair
from localspec.sampling import SamplingParams
from localspec.server.batch import BatchSettings
from localspec.server.settings import ServerSettings
from tests.server.running import Served, serving, wait_until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt install chromium)"),
]

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SIZES = {"desktop": {"width": 1280, "height": 800}, "phone": {"width": 390, "height": 844}}
_PATIENCE_MS = 30_000.0


@pytest.fixture(scope="module")
def keyed(served_pair: Pair) -> Iterator[Served]:
    """A server that asks for a key."""
    settings = ServerSettings(names=("tiny",), api_keys=("secret",), defaults=SamplingParams(temperature=0.7))
    with serving(served_pair, BatchSettings(parallel=2), settings) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium without a window."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(params=sorted(SIZES))
def page(browser: Browser, served: Served, request: pytest.FixtureRequest) -> Iterator[Page]:
    """The page, which must log no error and fetch nothing from elsewhere."""
    page = browser.new_page(viewport=SIZES[request.param])  # type: ignore[arg-type] # a mapping by its own type
    page.set_default_timeout(_PATIENCE_MS)
    expect.set_options(timeout=_PATIENCE_MS)
    troubles: list[str] = []
    page.on("console", lambda said: troubles.append(said.text) if _is_trouble(said) else None)
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("request", lambda asked: None if asked.url.startswith(served.address) else troubles.append(asked.url))
    page.goto(served.address)
    expect(page.locator("#model")).to_contain_text("localspec tiny target with localspec tiny draft")
    yield page
    page.close()
    assert not troubles


def _is_trouble(said: ConsoleMessage) -> bool:
    """Refusals are logged by the browser itself, and are shown by the page."""
    return said.type in ("error", "warning") and not said.text.startswith("Failed to load resource")


def configure(page: Page, **values: str) -> None:
    """Fill in the settings."""
    page.get_by_role("button", name="Settings").click()
    for name, value in values.items():
        page.locator(f"#{name.replace('_', '-')}").fill(value)
    page.get_by_role("button", name="Done").click()


def say(page: Page, text: str) -> None:
    """Type a message and send it."""
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def test_a_chat_shows_who_guessed_and_what_it_brought(page: Page) -> None:
    configure(page, temperature="0", max_tokens="60", seed="7", speculation="draft_model:num=4")
    say(page, "How do I reverse a list in Python?")
    note = page.locator(".assistant .quiet")
    expect(note).to_contain_text("accepted length")
    assert page.locator(".assistant .text .guess").count() > 3
    assert page.locator(".assistant .text span:not(.guess)").count() > 3
    expect(page.locator("#legend")).to_contain_text("guessed by draft_model")
    for number in ("rate", "length"):
        assert float(page.locator(f"#{number}").inner_text()) > 1.0
    assert f"{page.locator('#rate').inner_text()} tokens/s" in note.inner_text()
    assert re.fullmatch(r"\d+\.\d\d\u00d7", page.locator("#gain").inner_text())
    assert page.locator("#tree rect").count() >= 2
    assert "the model added" in (page.locator("#tree").get_attribute("aria-label") or "")
    said = page.locator(".assistant .text").inner_text()
    say(page, "And a tuple?")
    expect(note).to_have_count(2)
    expect(note.last).to_contain_text("prompt tokens from the cache")
    assert page.locator(".assistant .text").first.inner_text() == said
    page.get_by_role("button", name="New").click()
    expect(page.locator("#tree rect")).to_have_count(0)
    expect(page.locator("#rate")).to_have_text("\u2013")


def test_an_answer_is_stopped_with_the_keyboard_and_frees_its_place(page: Page, served: Served) -> None:
    configure(page, max_tokens="1500", temperature="1.5", seed="1")
    page.locator("#message").focus()
    page.keyboard.type("Tell me everything.")
    page.keyboard.press("Enter")
    expect(page.locator(".assistant .text span").first).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator(".assistant .quiet")).to_have_text("stopped")
    wait_until(lambda: served.num_busy == 0)
    expect(page.locator("#message")).to_be_focused()


def test_the_race_finds_the_texts_identical(page: Page) -> None:
    configure(page, temperature="0.8", max_tokens="40", seed="11")
    page.get_by_role("tab", name="Chat").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#race")).to_be_visible()
    page.get_by_role("button", name="Race").click()
    expect(page.locator("#verdict")).to_have_class("same")
    assert re.match(r"Identical: all \d+ tokens\. \d+\.\d\d\u00d7 the speed", page.locator("#verdict").inner_text())
    assert page.locator("#plain-text").inner_text() == page.locator("#spec-text").inner_text() != ""
    assert page.locator("#plain-text .guess").count() == 0


def test_the_page_fits_its_window(page: Page) -> None:
    for view in ("Race", "Chat"):
        page.get_by_role("tab", name=view).click()
        assert page.evaluate("() => document.documentElement.scrollWidth <= window.innerWidth")
    for name in ("Send", "Settings"):
        box = page.get_by_role("button", name=name).bounding_box()
        size = page.viewport_size
        assert box is not None and size is not None
        assert box["x"] >= 0 and box["x"] + box["width"] <= size["width"]
        assert box["y"] + box["height"] <= size["height"]
        assert box["height"] >= 32


def test_what_is_refused_is_shown_and_the_words_are_given_back(page: Page) -> None:
    configure(page, speculation="clairvoyance")
    say(page, "Hello")
    expect(page.get_by_role("alert")).to_contain_text("unknown drafter 'clairvoyance'")
    expect(page.locator("#message")).to_have_value("Hello")


def test_a_key_is_asked_for(browser: Browser, keyed: Served) -> None:
    page = browser.new_page()
    page.set_default_timeout(_PATIENCE_MS)
    page.goto(keyed.address)
    expect(page.get_by_role("alert")).to_contain_text("no valid API key")
    page.locator("#key").fill("secret")
    page.get_by_role("button", name="Done").click()
    expect(page.locator("#model")).to_contain_text("localspec tiny target")
    expect(page.get_by_role("alert")).to_be_hidden()
    page.close()


def test_the_page_needs_nothing_from_elsewhere(root: Path) -> None:
    for file in (root / "localspec" / "server" / "page").iterdir():
        outside = set(re.findall(r"https?://[^\s\"')]+", file.read_text(encoding="utf-8")))
        assert outside <= {"http://www.w3.org/2000/svg"}, file.name
