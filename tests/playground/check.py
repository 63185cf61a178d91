"""The playground in headless Chromium: type, slide, stream, stop, error states, keyboard, contrast, a sweep.

Usage: python check.py URL BROWSER [SCREENSHOT]        needs playwright; BROWSER: path of a Chromium
UNIARM_API_KEY in the environment is a key that the router knows.
"""

import os
import re
import sys
import textwrap
import time
import traceback

from playwright.sync_api import Error, expect, sync_playwright

BUNDLE_BYTES_MAX = 200_000
DEADLINE_MS = 60_000
TOKENS = 16
# WCAG AA for text of ordinary size.
CONTRAST_MIN = 4.5

KEY = os.environ["UNIARM_API_KEY"]
SIGNED = {"authorization": f"Bearer {KEY}"}

CONTRAST = """() => {
  const parse = (color) => { const [r, g, b, a = 1] = color.match(/[\\d.]+/g).map(Number); return [r, g, b, a]; };
  const over = ([r, g, b, a], below) => [r, g, b].map((c, i) => c * a + below[i] * (1 - a));
  const ground = (node) => {
    if (!node) return [255, 255, 255];
    const own = parse(getComputedStyle(node).backgroundColor);
    return own[3] === 1 ? own.slice(0, 3) : over(own, ground(node.parentElement));
  };
  const light = (rgb) => {
    const [r, g, b] = rgb.map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    const text = [...node.childNodes].filter((child) => child.nodeType === 3).map((child) => child.data.trim()).join("");
    if (!text || !node.checkVisibility() || node.closest("svg, option, :disabled")) continue;
    const below = ground(node);
    const [a, b] = [light(over(parse(getComputedStyle(node).color), below)), light(below)];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    found.push([ratio, `${node.tagName} ${text.slice(0, 30)}`]);
  }
  return found;
}"""


def ask(page, prompt="Tell me about the sea.", tokens=TOKENS):
    """Fills the form and presses the button; the answers may still run."""
    page.locator("#prompt").fill(prompt)
    slide(page, "#tokens", tokens)
    slide(page, "#temperature", 0.5)
    page.get_by_role("button", name="Generate").click()


def slide(page, selector, value):
    page.locator(selector).evaluate(
        "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')); }", str(value)
    )


def finished(page, count=2):
    cards = page.locator(".card[data-state=done]")
    expect(cards).to_have_count(count, timeout=DEADLINE_MS)
    return cards


def under_way(page):
    members = page.request.get("/status", headers=SIGNED).json()["members"]
    return sum(member["under_way"] for member in members)


def settings(page):
    """What the form should have asked the API for, both answers."""
    base = page.locator("#model").input_value()
    common = {
        "model": base,
        "messages": [{"role": "user", "content": page.locator("#prompt").input_value()}],
        "temperature": float(page.locator("#temperature").input_value()),
        "seed": int(page.locator("#seed").input_value()),
        "max_tokens": int(page.locator("#tokens").input_value()),
    }
    strength = float(page.locator("#strength").input_value())
    shares = re.findall(r"(\d+) % (\w+)", page.locator("#preference-text").inner_text())
    guidance = [
        {"reward": name, "preference": {name: 1}, "strength": strength * int(share) / 100} for share, name in shares
    ]
    return common, common | {"guidance": guidance}


# === what is tried: each function's name is the situation ===


def a_stranger_is_asked_for_a_key(page):
    page.goto("/")
    expect(page.locator("#key-form")).to_be_visible()
    expect(page.locator("#banner")).to_be_hidden()
    low = [(ratio, what) for ratio, what in page.evaluate(CONTRAST) if ratio < CONTRAST_MIN]
    assert not low, low
    show_key(page, "no key of anybody's")
    expect(page.locator("#banner")).to_contain_text("not known")
    expect(page.locator("#model option")).to_have_count(0)
    show_key(page, KEY)
    expect(page.locator("#model option")).not_to_have_count(0, timeout=DEADLINE_MS)
    expect(page.locator("#key-form")).to_be_hidden()
    expect(page.locator("#banner")).to_be_hidden()


def show_key(page, key):
    page.get_by_label("This router wants an API key").fill(key)
    page.get_by_role("button", name="Use it").click()


def the_page_needs_nothing_from_elsewhere_and_is_small(page):
    seen = []
    page.on("response", lambda response: seen.append(response))
    page.goto("/")
    expect(page.locator("#model option")).not_to_have_count(0)
    origin = page.url.rstrip("/")
    outside = [response.url for response in seen if not response.url.startswith((origin, "data:"))]
    assert not outside, outside
    bundle = [response for response in seen if "/playground/" in response.url or response.url == page.url]
    size = sum(len(response.body()) for response in bundle)
    assert len(bundle) == 7 and 0 < size < BUNDLE_BYTES_MAX, (len(bundle), size)
    assert "default-src 'none'" in bundle[0].headers["content-security-policy"]


def answers_stream_side_by_side_and_are_those_of_the_api(page):
    slide(page, "#preference-slider", 20)
    expect(page.locator("#preference-text")).to_have_text(re.compile(r"80 % \w+ · 20 % \w+"))
    ask(page)
    expect(page.locator(".card[data-state=running]")).not_to_have_count(0)
    cards = finished(page)
    for index, body in enumerate(settings(page)):
        answer = page.request.post("/v1/chat/completions", data=body, headers=SIGNED).json()
        wanted = answer["choices"][0]["message"]["content"]
        assert cards.nth(index).locator(".text").text_content() == wanted, f"{body}: {wanted!r}"
    plain, guided = (cards.nth(index).locator(".token:not([data-shift='0'])").count() for index in (0, 1))
    assert plain == 0 and guided > 2, f"tinted: {plain} tokens of the unguided answer, {guided} of the guided one"
    expect(page.locator("#announcer")).to_contain_text("Guided: done")


def a_token_says_what_the_reward_changed_to_pointer_and_keyboard(page):
    tokens = page.locator(".card").nth(1).locator(".token")
    tokens.nth(2).hover()
    inspector = page.locator("#inspector")
    expect(inspector).to_contain_text("base model")
    expect(inspector).to_contain_text("reward adds")
    expect(inspector.locator(".runners li")).to_have_count(5)
    tokens.nth(2).focus()
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(3)).to_be_focused()
    page.keyboard.press("Home")
    expect(tokens.nth(0)).to_be_focused()
    page.keyboard.press("Escape")
    expect(inspector).to_be_hidden()


def stop_ends_the_answers_here_and_in_the_cluster(page):
    slide(page, "#tokens", 256)
    page.locator("#prompt").fill("Count from one to a thousand, in words.")
    page.keyboard.press("Control+Enter")
    expect(page.locator(".card").nth(1).locator(".token")).not_to_have_count(0, timeout=DEADLINE_MS)
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".card[data-state=stopped]").last).to_contain_text("stopped after")
    deadline = time.monotonic() + 5
    while under_way(page):
        assert time.monotonic() < deadline, "requests go on in the cluster"
        time.sleep(0.02)
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()


def what_goes_wrong_is_said(page):
    full = {"error": {"message": "the queue is full", "type": "rate_limit_error", "param": None, "code": "base_queue_full"}}
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=429, json=full, headers={"retry-after-ms": "1500"}))
    ask(page)
    alert = page.locator(".card").first.get_by_role("alert")
    expect(alert).to_contain_text("the queue is full Try again in 2 s.")
    expect(alert).to_contain_text("base_queue_full")
    page.unroute("**/v1/chat/completions")
    page.route("**/v1/chat/completions", lambda route: route.abort())
    ask(page)
    expect(page.locator(".card").first.get_by_role("alert")).to_contain_text("cannot be reached")
    page.unroute("**/v1/chat/completions")
    broken = 'data: {"choices": []}\n\n'
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=200, body=broken, content_type="text/event-stream"))
    ask(page)
    expect(page.locator(".card").first.get_by_role("alert")).to_contain_text("before the answer was whole")
    page.unroute("**/v1/chat/completions")
    ask(page)
    finished(page)


def three_objectives_have_a_triangle(page):
    page.locator("#objectives .chip").nth(2).click()
    knob = page.get_by_role("slider", name="Between")
    expect(page.locator("#preference-text")).to_contain_text("33 %")
    knob.focus()
    for _ in range(20):
        page.keyboard.press("ArrowUp")
    only = page.locator("#objectives .chip").nth(2).inner_text()
    expect(knob).to_have_attribute("aria-valuetext", f"100 % {only}")
    box = page.locator(".triangle").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.62)
    expect(page.locator("#preference-text")).to_have_text(re.compile(r"3\d % .* 3\d % .* 3\d % "))
    page.get_by_text("Several preferences").click()
    ask(page)
    finished(page, 3)
    page.locator("#objectives .chip").nth(2).click()
    page.get_by_text("Unguided and guided").click()


def a_sweep_draws_a_front(page):
    slide(page, "#tokens", TOKENS)
    page.get_by_role("button", name="Sweep the preferences").click()
    expect(page.locator("#announcer")).to_have_text("The sweep is done.", timeout=DEADLINE_MS)
    expect(page.locator(".chart .dot")).to_have_count(6)
    rows = page.locator("#sweep tbody tr")
    expect(rows).to_have_count(6)
    first, second = (page.locator(".ends span").nth(index).inner_text() for index in (0, 1))
    common, _ = settings(page)
    strength = float(page.locator("#strength").input_value())
    terms = [(first, strength), (first, 0), (second, 0)]
    guidance = [{"reward": name, "preference": {name: 1}, "strength": weight} for name, weight in terms]
    body = common | {"guidance": guidance, "logprobs": True}
    [choice] = page.request.post("/v1/chat/completions", data=body, headers=SIGNED).json()["choices"]
    details = [entry["uniarm"] for entry in choice["logprobs"]["content"]]
    for column, term in ((1, 1), (2, 2)):
        wanted = sum(detail["reward_logprobs"][term] - detail["base_logprob"] for detail in details) / len(details)
        shown = float(rows.nth(1).locator("td").nth(column).inner_text())
        assert abs(shown - wanted) < 0.006, f"{terms[term][0]}: {shown} is drawn, {wanted} is right"
    rows.nth(1).get_by_role("button").click()
    expect(page.locator(".card")).to_have_count(1)


def everything_has_a_name_and_enough_contrast(page):
    ask(page)
    finished(page)
    nameless = page.evaluate("""() => [...document.querySelectorAll("button, input, select, textarea")].filter((node) => !(node.labels?.length || node.ariaLabel || node.textContent.trim())).map((node) => node.outerHTML)""")
    assert not nameless, nameless
    page.locator(".card").nth(1).locator(".token").first.hover()
    for theme in ("light", "dark"):
        page.evaluate("(theme) => { document.documentElement.dataset.theme = theme; }", theme)
        measured = page.evaluate(CONTRAST)
        poor = [what for ratio, what in measured if ratio < CONTRAST_MIN]
        assert len(measured) > 40 and not poor, f"{theme}: {poor}"
    assert page.locator("h1").count() == 1 and page.locator("html").get_attribute("lang") == "en"


def a_phone_shows_all_of_it(page):
    page.set_viewport_size({"width": 360, "height": 740})
    wide = page.evaluate("() => document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide <= 0, f"{wide} pixels do not fit"
    page.set_viewport_size({"width": 1280, "height": 860})


def the_router_may_go_and_come_back(page):
    page.route("**/v1/models", lambda route: route.abort())
    page.reload()
    expect(page.locator("#banner")).to_contain_text("cannot be reached")
    page.unroute("**/v1/models")
    expect(page.locator("#model option")).not_to_have_count(0, timeout=DEADLINE_MS)
    expect(page.locator("#banner")).to_be_hidden()


SITUATIONS = (
    a_stranger_is_asked_for_a_key,
    the_page_needs_nothing_from_elsewhere_and_is_small,
    answers_stream_side_by_side_and_are_those_of_the_api,
    a_token_says_what_the_reward_changed_to_pointer_and_keyboard,
    stop_ends_the_answers_here_and_in_the_cluster,
    what_goes_wrong_is_said,
    three_objectives_have_a_triangle,
    a_sweep_draws_a_front,
    everything_has_a_name_and_enough_contrast,
    a_phone_shows_all_of_it,
    the_router_may_go_and_come_back,
)


def screenshot(page, path):
    """A picture for the README."""
    page.set_viewport_size({"width": 1280, "height": 860})
    page.goto("/")
    show_key(page, KEY)
    page.evaluate("() => { document.documentElement.dataset.theme = 'light'; }")
    expect(page.locator("#model option")).not_to_have_count(0)
    slide(page, "#preference-slider", 30)
    slide(page, "#tokens", 56)
    page.get_by_role("button", name="Generate").click()
    finished(page)
    page.get_by_role("button", name="Sweep the preferences").click()
    expect(page.locator("#announcer")).to_have_text("The sweep is done.", timeout=DEADLINE_MS)
    page.locator(".card").nth(1).locator(".token").nth(5).hover()
    page.screenshot(path=path)


def main():
    url, browser_path, *picture = sys.argv[1:]
    failed = 0
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_context(base_url=url, viewport={"width": 1280, "height": 860}).new_page()
        page.set_default_timeout(DEADLINE_MS)
        wrong = []
        page.on("pageerror", lambda error: wrong.append(f"{error}"))
        if picture:
            screenshot(page, picture[0])
            return 0
        for situation in SITUATIONS:
            name = situation.__name__.replace("_", " ")
            try:
                situation(page)
                assert not wrong, wrong
            except (AssertionError, Error):
                failed += 1
                print(f"FAILED  playground: {name}")
                print(textwrap.indent(traceback.format_exc(limit=-3), " " * 8), end="")
                wrong.clear()
            else:
                print(f"ok      playground: {name}")
        browser.close()
    print(f"playground: {len(SITUATIONS) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
