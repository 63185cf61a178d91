"""First tokens on the page and over gRPC. Usage: python first_token.py HTTP GRPC BROWSER ROUNDS"""

import asyncio
import os
import statistics
import sys
import time

from playwright.async_api import async_playwright

import uniarm

TOKENS = 8
KEY = os.environ["UNIARM_API_KEY"]

# From the press of the button to the first token that is in the page, of the answer that has it first.
ON_PAGE = """(prompt) => new Promise((resolve) => {
  document.getElementById("prompt").value = prompt;
  const answers = document.getElementById("answers");
  answers.replaceChildren();
  const began = performance.now();
  const seen = new MutationObserver(() => {
    if (!answers.querySelector(".token")) return;
    seen.disconnect();
    resolve(performance.now() - began);
  });
  seen.observe(answers, { childList: true, subtree: true });
  document.getElementById("controls").requestSubmit();
})"""


async def over_grpc(client, requests):
    """Seconds to the first token of any of them; all run to their end."""
    began, firsts = time.perf_counter(), []

    async def one(request):
        async for event in client.stream(request):
            if isinstance(event, uniarm.Tokens) and event.text:
                firsts.append(time.perf_counter() - began)

    await asyncio.gather(*map(one, requests))
    return min(firsts)


def requests(prompt, objectives):
    common = dict(prompt=prompt, temperature=0.5, seed=7, max_tokens=TOKENS, logprobs=5)
    terms = [uniarm.Guidance(reward=name, preference={name: 1.0}, strength=0.5) for name in objectives]
    return [uniarm.Request(**common), uniarm.Request(**common, guidance=terms)]


async def main():
    http, grpc, browser_path, rounds = sys.argv[1:]
    times = {"page": [], "gRPC": []}
    async with async_playwright() as playwright, uniarm.AsyncClient(grpc) as client:
        browser = await playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = await browser.new_page(base_url=http)
        await page.goto("/")
        await page.locator("#key").fill(KEY)
        await page.locator("#key").press("Enter")
        await page.locator("#model option").first.wait_for(state="attached")
        slide = "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')); }"
        await page.locator("#tokens").evaluate(slide, str(TOKENS))
        await page.locator("#temperature").evaluate(slide, "0.5")
        for turn in range(int(rounds) + 1):
            # Prompts of one length, none of which is in a cache.
            for way in times:
                prompt = f"Tell me about the number {1000 + turn} and {way}."
                if way == "page":
                    seconds = await page.evaluate(ON_PAGE, prompt) / 1e3
                    await page.locator(".card[data-state=done]").nth(1).wait_for()
                else:
                    seconds = await over_grpc(client, requests(prompt, ["positive", "concise"]))
                if turn > 0:  # the first of each pays for connections
                    times[way].append(1e3 * seconds)
        await browser.close()
    for way, own in times.items():
        quartiles = statistics.quantiles(own, n=4)
        print(f"{way}: first token after {statistics.median(own):.1f} ms (quartiles {quartiles[0]:.1f} and {quartiles[2]:.1f}, {len(own)} rounds)")
    print(f"the page has it {statistics.median(times['page']) - statistics.median(times['gRPC']):.1f} ms later")


asyncio.run(main())
