"""The page as its user sees it."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aggregation.pki.identity import IdentityKey
from client.inference.session import ClassificationSession
from export.bundle.write import AdapterSource, add_adapter
from export.onnx.exported import ExportedBase

pytestmark = pytest.mark.slow

ROWS = "[...document.querySelectorAll('#answers tr')].map((row) => [row.cells[0].textContent, row.dataset.probability])"
CHECKED = "document.querySelector('#adapters input:checked')?.value"


@pytest.fixture
def both(bundle: Path, exported: ExportedBase, source: Callable[..., AdapterSource], household: IdentityKey) -> Path:
    """A bundle with the global adapter and a personal one."""
    add_adapter(bundle, exported.adapter_inputs, source("anna", seed=1, parent="a" * 64), key=household)
    return bundle


def ask(page: Any, phrase: str) -> None:
    page.evaluate(f"document.getElementById('phrase').value = {phrase!r}")
    page.evaluate("document.getElementById('classify-form').requestSubmit()")
    page.until(f"document.getElementById('answer-caption').textContent.includes({phrase!r})")


def choose(page: Any, name: str) -> None:
    page.evaluate(f"document.querySelector('#adapters input[value={name}]').click()")


def shown(page: Any) -> list[tuple[str, float]]:
    return [(label, float(probability)) for label, probability in page.evaluate(ROWS)]


def native(bundle: Path, name: str, phrase: str) -> list[tuple[str, float]]:
    session = ClassificationSession.open(bundle)
    return [(p.label, pytest.approx(p.probability, abs=1e-4)) for p in session.rank([phrase], name, 5)[0]]


def test_a_phrase_is_classified_again_after_a_switch_to_another_adapter(
    page: Any, serve: Callable[[Path], str], both: Path
) -> None:
    page.goto(serve(both))
    assert page.state() == "good"
    assert page.evaluate(CHECKED) == "anna", "the personal adapter is the default, as natively"
    ask(page, "lock the door")
    assert shown(page) == native(both, "anna", "lock the door")
    choose(page, "global")
    page.until("document.getElementById('answer-caption').textContent.includes('with global')")
    assert shown(page) == native(both, "global", "lock the door")
    assert page.errors() == []


def test_a_tampered_adapter_is_refused_and_the_one_in_use_stays_chosen(
    page: Any, serve: Callable[[Path], str], both: Path
) -> None:
    page.goto(serve(both))
    path = both / "adapters" / "global.onnx_adapter"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    choose(page, "global")
    page.until("document.getElementById('status').dataset.state === 'bad'")
    assert "global.onnx_adapter" in page.status()
    assert page.evaluate(CHECKED) == "anna"
    ask(page, "lock the door")
    assert shown(page) == native(both, "anna", "lock the door")
    assert (page.state(), page.status()) == ("good", "Adapter anna is in use."), "the error is no longer shown"


def test_an_adapter_with_a_damaged_manifest_is_shown_with_the_reason_and_cannot_be_chosen(
    page: Any, serve: Callable[[Path], str], both: Path
) -> None:
    (both / "adapters" / "anna.json").write_bytes(b"{}")
    page.goto(serve(both))
    assert page.evaluate("document.querySelector('#adapters input[value=anna]').disabled") is True
    assert "not a signed document" in page.evaluate("document.querySelector('.refused').textContent")
    assert page.evaluate(CHECKED) == "global"


@pytest.mark.parametrize(
    "text",
    ["", " \u3000", "\ud800", "a\0b", "a" * 70000],
    ids=["empty", "white space", "not Unicode", "NUL", "too long"],
)
def test_a_text_that_no_model_can_read_is_refused(
    page: Any, serve: Callable[[Path], str], bundle: Path, text: str
) -> None:
    page.goto(serve(bundle))
    written = text.encode("utf-16-be", "surrogatepass").hex()
    units = f"String.fromCharCode(...{[int(written[i : i + 4], 16) for i in range(0, min(len(written), 400), 4)]})"
    value = f"'a'.repeat({len(text)})" if len(text) > 1000 else units
    page.evaluate(f"Object.defineProperty(document.getElementById('phrase'), 'value', {{ value: {value} }})")
    page.evaluate("document.getElementById('classify-form').requestSubmit()")
    page.until("document.getElementById('status').dataset.state === 'bad'")
    assert page.status()
    assert shown(page) == []


def test_a_text_above_the_models_limit_is_truncated_as_natively(
    page: Any, serve: Callable[[Path], str], both: Path
) -> None:
    page.goto(serve(both))
    phrase = "turn on the kitchen lights " * 20
    ask(page, phrase)
    assert shown(page) == native(both, "anna", phrase)


def test_text_of_other_scripts_and_unusual_spaces_is_read_as_natively(
    page: Any, serve: Callable[[Path], str], both: Path
) -> None:
    page.goto(serve(both))
    for phrase in ("Türe öffnen", "灯 on", "play\tmusic!?", "ünlöck\u0301 the DOOR", "a-b c’d"):
        ask(page, phrase)
        assert shown(page) == native(both, "anna", phrase), phrase


def test_nothing_leaves_the_origin(page: Any, serve: Callable[[Path], str], both: Path) -> None:
    url = serve(both)
    page.goto(url)
    ask(page, "lock the door")
    requests = page.requests()
    assert {f"{url}bundle/base/web.onnx", f"{url}worker.js", f"{url}trust.pem"} <= set(requests), "workers are watched"
    assert [request for request in requests if not request.startswith(url)] == []


def test_the_page_can_neither_reach_another_origin_nor_evaluate_text(
    page: Any, serve: Callable[[Path], str], both: Path
) -> None:
    page.goto(serve(both))
    other = serve(both)
    refused = "then(() => 'reached', (error) => error.name)"
    assert page.evaluate(f"fetch('{other}trust.pem', {{ mode: 'no-cors' }}).{refused}") == "TypeError"
    assert page.evaluate("fetch('/trust.pem').then(() => 'reached')") == "reached"
    page.evaluate("window.ran = false; const s = document.createElement('script');"
                  " s.textContent = 'window.ran = true'; document.head.append(s)")  # fmt: skip
    assert page.evaluate("window.ran") is False


def test_the_page_is_isolated_so_that_it_gets_threads(page: Any, serve: Callable[[Path], str], bundle: Path) -> None:
    page.goto(serve(bundle))
    assert page.evaluate("crossOriginIsolated") is True


def test_a_picked_folder_is_opened_with_picked_keys(
    page: Any, serve: Callable[[Path], str], both: Path, tmp_path: Path
) -> None:
    page.goto(serve(both))
    (tmp_path / "other").mkdir()
    picked = tmp_path / "other" / "bundle"
    both.rename(picked)  # so that nothing can come from the server
    page.pick("#folder", picked)
    page.pick("#pem", tmp_path / "trust.pem")
    page.evaluate("document.getElementById('status').dataset.state = 'waiting'")
    page.evaluate("document.getElementById('open-folder').click()")
    page.until("['good', 'bad'].includes(document.getElementById('status').dataset.state)")
    assert page.state() == "good", page.status()
    (tmp_path / "other" / "trust.pem").write_bytes((tmp_path / "trust.pem").read_bytes())
    ask(page, "lock the door")
    assert shown(page) == native(picked, "anna", "lock the door")


def test_switching_to_an_adapter_used_before_takes_under_a_millisecond(
    page: Any, serve: Callable[[Path], str], both: Path
) -> None:
    page.goto(serve(both))
    times = page.evaluate("""(async () => {
      const { Client } = await import('/client.js');
      const client = new Client();
      await client.open();
      const times = [];
      for (let i = 0; i < 101; i++) times.push((await client.use(i % 2 ? 'anna' : 'global')).milliseconds);
      return times.slice(2).sort((a, b) => a - b);
    })()""")
    assert times[len(times) // 2] < 1


def test_every_control_has_a_label_and_can_be_used_by_keyboard(
    page: Any, serve: Callable[[Path], str], both: Path
) -> None:
    page.goto(serve(both))
    unlabeled = """[...document.querySelectorAll('input, textarea, button')]
      .filter((e) => !(e.labels?.length || e.textContent.trim() || e.getAttribute('aria-label'))).map((e) => e.id)"""
    assert page.evaluate(unlabeled) == []
    assert page.evaluate("document.querySelectorAll('[tabindex=\"-1\"]').length") == 0
    page.evaluate("document.getElementById('phrase').value = 'unlock'; document.getElementById('phrase').focus()")
    for kind in ("keyDown", "keyUp"):
        page.call("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r")
    page.until("document.getElementById('answer-caption').textContent.includes('unlock')")


def test_nothing_is_cut_off_on_a_phone(page: Any, serve: Callable[[Path], str], both: Path) -> None:
    page.call("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True)
    page.goto(serve(both))
    ask(page, "lock the door")
    time.sleep(0.1)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
