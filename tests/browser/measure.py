"""Measures a bundle in a fresh headless Chromium and prints a table, or JSON: starting, answering, switching.

    python -m tests.browser.measure runs/demo/bundle
    python -m tests.browser.measure --json chat

Needs trust.pem next to the bundle, as ``edgeadapt device web`` does. The native session answers the same phrase
or prompt in the same run. Prints medians of ``--repeat`` answers by the wall clock, and the CPU time of all processes
of the browser, on which other work on the machine has less influence.
"""

import json
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import click

from aggregation.errors import ConfigError
from client.browser.server import Site, http_server
from client.inference.library import Library
from tests.support.cdp import Chromium, Page, installed

PHRASE = "turn on the lights in the kitchen"
PROMPT = "The weather in the mountains can change quickly, so"
START = """(async () => {
  const { Client } = await import('/client.js');
  window.client = new Client();
  const start = performance.now();
  const bundle = await client.open();
  const opened = performance.now() - start;
  const first = window.adapter = bundle.adapters[0]?.name ?? '';
  const verified = (await client.use(first)).milliseconds;
  const names = bundle.adapters.map(({ name }) => name);
  return { opened, verified, runsOn: bundle.runsOn, names: names.length ? names : [''] };
})()"""
SWITCH = """(async () => {
  const [names, times] = [%r, []];
  for (let i = 0; i < 103; i++) times.push((await client.use(names[i %% names.length])).milliseconds);
  return times;
})()"""


@click.command()
@click.option("--repeat", default=21, type=click.IntRange(1, 1000), show_default=True)
@click.option("--tokens", default=48, type=click.IntRange(2, 1000), show_default=True, help="Of a generated text.")
@click.option("--teach", "taught", nargs=2, metavar="LABEL PHRASE", help="Also teach this, or ANSWER PROMPT.")
@click.option("--json", "as_json", is_flag=True)
@click.argument("bundle", type=click.Path(path_type=Path))
def measure(repeat: int, tokens: int, taught: tuple[str, str] | None, as_json: bool, bundle: Path) -> None:
    """Print how fast BUNDLE is in the browser."""
    if (program := installed()) is None:
        raise ConfigError("no chromium on the path: apt install chromium")
    with http_server(Site.of(bundle), "127.0.0.1", 0) as serving, tempfile.TemporaryDirectory() as profile:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        browser = Chromium(program, Path(profile))
        try:
            page = Page(browser)
            found = _measured(browser, page, f"http://127.0.0.1:{serving.server_port}/", bundle, repeat, tokens)
            if taught:
                found |= _lesson(browser, page, *taught)
        finally:
            browser.close()
            serving.shutdown()
    click.echo(json.dumps(found) if as_json else "\n".join(f"{name:42} {value}" for name, value in found.items()))


def _measured(chromium: Chromium, page: Page, url: str, bundle: Path, repeat: int, tokens: int) -> dict[str, Any]:
    starts, spent = [], []
    for _ in range(2):  # the second time the browser has the files in its cache, and asks whether they changed
        start, used = time.perf_counter(), chromium.cpu_seconds()
        page.goto(url)
        starts.append(1000 * (time.perf_counter() - start))
        spent.append(1000 * (chromium.cpu_seconds() - used))
    opened = page.evaluate(START)
    library = Library.open(bundle, None)
    found: dict[str, Any] = {
        "task": library.manifest.task,
        "profile": library.manifest.profile,
        "runs on": opened["runsOn"],
        "first start, ms": f"{starts[0]:.0f} ({spent[0]:.0f} of CPU)",
        "second start, ms": f"{starts[1]:.0f} ({spent[1]:.0f} of CPU)",
        "first use of an adapter, ms": round(opened["verified"], 1),
        "switch, ms": _middle(page.evaluate(SWITCH % opened["names"][:2])[2:], 3),
    }
    classifies = library.manifest.task == "text-classification"
    if classifies:
        return found | _phrases(chromium, page, bundle, opened["names"][0], repeat)
    return found | _text(chromium, page, tokens, repeat)


def _middle(times: list[float], digits: int = 1) -> str:
    return f"{statistics.median(times):.{digits}f} ({min(times):.{digits}f} at best)"


def _phrases(chromium: Chromium, page: Page, bundle: Path, name: str, repeat: int) -> dict[str, Any]:
    from client.inference.session import ClassificationSession

    session = ClassificationSession.open(bundle, threads=1)

    def native() -> float:
        start = time.perf_counter()
        session.classify([PHRASE], name)
        return 1000 * (time.perf_counter() - start)

    def browser() -> float:
        return float(page.evaluate(f"client.classify({PHRASE!r}, 1).then((found) => found.milliseconds)"))

    for answer in (native, browser) * 3:  # the first ones are slower
        answer()
    start = chromium.cpu_seconds()
    asked = [browser() for _ in range(repeat)]
    between, own = chromium.cpu_seconds(), time.process_time()
    answered = [native() for _ in range(repeat)]
    return {
        "one phrase, ms": _middle(asked),
        "one phrase, ms of CPU": round(1000 * (between - start) / repeat, 1),
        "one phrase, native, ms": _middle(answered),
        "one phrase, native, ms of CPU": round(1000 * (time.process_time() - own) / repeat, 1),
    }


def _lesson(chromium: Chromium, page: Page, label: str, phrase: str) -> dict[str, Any]:
    given = json.dumps([{"label": label, "text": phrase}])
    used, start = chromium.cpu_seconds(), time.perf_counter()
    learned = page.evaluate(f"client.teach(adapter, {given})")
    seconds = time.perf_counter() - start
    found = {
        "a lesson, steps": learned["steps"],
        "a lesson, s": f"{seconds:.1f} ({chromium.cpu_seconds() - used:.1f} of CPU)",
        "then the page's peak memory, MiB": chromium.peak_mebibytes(),
    }
    if "tested" not in learned:
        return found
    return found | {"tested phrases with another answer": f"{len(learned['changed'])} of {learned['tested']}"}


def _text(chromium: Chromium, page: Page, tokens: int, repeat: int) -> dict[str, Any]:
    def run(number: int) -> dict[str, Any]:
        # Each prompt begins otherwise, so that none of it is in the KV cache.
        options = json.dumps({"prompt": f"{number}. {PROMPT}", "maxTokens": tokens, "seed": 0})
        return dict(page.evaluate(f"client.generate({options}, () => undefined)"))

    start = chromium.cpu_seconds()
    runs = [run(number) for number in range(min(repeat, 5))]
    spent = chromium.cpu_seconds() - start
    rates = [1000 * (run["tokens"] - 1) / (run["milliseconds"] - run["first"]) for run in runs if run["tokens"] > 1]
    return {
        "first token, ms": _middle([run["first"] for run in runs], 0),
        "tokens a second of CPU, prompt included": round(sum(run["tokens"] for run in runs) / spent, 1),
        "then tokens/s": f"{statistics.median(rates):.1f} ({max(rates):.1f} at best)",
    }


if __name__ == "__main__":
    measure()
