"""The page as its user sees it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest

import client.browser.server
from aggregation.entropy import SystemEntropy
from aggregation.pki.identity import IdentityKey
from client.inference.session import ClassificationSession
from edgeadapt.formats import dsse
from edgeadapt.formats.bundle import MODEL, TOKENIZER, WEB_MODEL, WEIGHTS
from edgeadapt.formats.manifest import AdapterManifest
from export.bundle.write import AdapterSource, add_adapter, write_bundle
from export.onnx.exported import ExportedBase
from tests.support.bundles import flip, resign
from tests.support.models import Source
from tests.support.nodetab import NodeTab

pytestmark = pytest.mark.slow

ROWS = "[...document.querySelectorAll('#answers tr')].map((row) => [row.cells[0].textContent, row.dataset.probability])"
SELECTED = "[...document.querySelectorAll('#adapters [aria-selected=true]')].map((item) => item.dataset.name)"
CAPTION = "document.getElementById('answer-caption').textContent"
IN_USE = "document.getElementById('in-use').textContent"
VISIBLE = "getComputedStyle(document.getElementById('answers')).visibility"


@pytest.fixture
def both(bundle: Path, exported: ExportedBase, source: Source, household: IdentityKey) -> Path:
    """A bundle with the global adapter and a personal one."""
    add_adapter(bundle, exported.adapter_inputs, source("anna", seed=1, parent="a" * 64), key=household)
    return bundle


def ask(page: Any, phrase: str) -> None:
    page.evaluate(f"document.getElementById('phrase').value = {phrase!r}")
    page.evaluate("document.getElementById('classify-form').requestSubmit()")
    page.until(f"document.getElementById('answer-caption').textContent.includes({phrase!r})")


def choose(page: Any, name: str) -> None:
    page.evaluate(f"document.querySelector('#adapters [data-name={name}]').click()")


def weigh(page: Any, name: str, weight: str) -> None:
    field = f"document.querySelector('#weights [data-name={name}]')"
    page.evaluate(f"{field}.value = {weight!r}; {field}.dispatchEvent(new Event('change', {{ bubbles: true }}))")


def shown(page: Any) -> list[tuple[str, float]]:
    return [(label, float(probability)) for label, probability in page.evaluate(ROWS)]


def native(bundle: Path, name: str, phrase: str) -> list[tuple[str, float]]:
    session = ClassificationSession.open(bundle)
    return [(p.label, pytest.approx(p.probability, abs=1e-4)) for p in session.rank([phrase], name, 5)[0]]


def test_a_phrase_is_classified_again_after_a_switch_to_another_adapter(
    page: Any, serve: Callable[[Path], str], both: Path
) -> None:
    """The old answer is hidden at once, and of several switches only the answer of the last is shown."""
    page.goto(serve(both))
    assert page.state() == "good"
    assert page.evaluate(SELECTED) == ["anna"], "the personal adapter is the default, as natively"
    ask(page, "lock the door")
    assert shown(page) == native(both, "anna", "lock the door")
    assert page.evaluate(VISIBLE) == "visible"
    click = "document.querySelector('#adapters [data-name=global]').click()"
    assert page.evaluate(f"{click}; {VISIBLE}") == "hidden"
    page.until(f"{CAPTION}.includes('with global') && {VISIBLE} === 'visible'")
    assert shown(page) == native(both, "global", "lock the door")
    names = ["anna", "global", "anna"]
    page.evaluate(f"""(() => {{
      window.shown = [];
      const note = () => document.getElementById('answer').dataset.stale || shown.push({CAPTION});
      new MutationObserver(note).observe(document.getElementById('answer'), {{ attributes: true }});
      for (const name of {names}) document.querySelector(`#adapters [data-name=${{name}}]`).click();
    }})()""")
    page.until(f"{VISIBLE} === 'visible'")
    (caption,) = page.evaluate("shown")
    assert "with anna." in caption
    page.evaluate("document.getElementById('phrase').value = ''")
    choose(page, "global")
    page.until(f"{IN_USE}.includes('global') && {VISIBLE} === 'visible'")
    assert shown(page) == [], "there is no phrase to ask the other adapter for"
    assert page.errors() == []


def test_a_tampered_adapter_is_refused_next_to_the_list_and_the_one_in_use_stays(
    page: Any, serve: Callable[[Path], str], both: Path
) -> None:
    page.goto(serve(both))
    ask(page, "lock the door")
    path = both / "adapters" / "global.onnx_adapter"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    choose(page, "global")
    page.until("document.getElementById('adapter-error').textContent !== ''")
    assert "global.onnx_adapter" in page.alert("adapter-error")
    assert "In use: anna" in page.alert("adapter-error")
    assert page.evaluate(SELECTED) == ["anna"]
    page.until(f"{VISIBLE} === 'visible'")
    assert shown(page) == native(both, "anna", "lock the door"), "the answer of the adapter in use is shown again"
    choose(page, "anna")
    page.until("document.getElementById('adapter-error').textContent === ''")


def test_the_list_says_what_a_global_adapter_may_reveal_of_a_device_and_why_a_damaged_one_cannot_be_chosen(
    page: Any, serve: Callable[[Path], str], both: Path, vendor: IdentityKey
) -> None:
    note, url = "document.querySelector('#adapters [data-name={}]').textContent", serve(both)
    page.goto(url)
    assert "global, without differential privacy, version" in page.evaluate(note.format("global"))
    assert "personal, version" in page.evaluate(note.format("anna"))
    resign(both, vendor, privacy={"epsilon": 6.071, "delta": 1e-6})
    (both / "adapters" / "anna.json").write_bytes(b"{}")
    page.goto(url)
    assert "global, epsilon 6.07 for delta 0.000001, version" in page.evaluate(note.format("global"))
    item = "document.querySelector('#adapters [data-name=anna]')"
    assert page.evaluate(f"{item}.getAttribute('aria-disabled')") == "true"
    assert "not a signed document" in page.evaluate(f"{item}.textContent")
    choose(page, "anna")
    assert page.evaluate(SELECTED) == ["global"]


def test_a_composition_answers_as_natively_and_the_answer_names_it(
    page: Any,
    serve: Callable[[Path], str],
    both: Path,
    exported: ExportedBase,
    source: Source,
    household: IdentityKey,
) -> None:
    other = replace(source("other"), labels=("W", "X", "Y", "Z"))
    add_adapter(both, exported.adapter_inputs, other, key=household)
    page.goto(serve(both))
    ask(page, "lock the door")
    page.evaluate("document.getElementById('composing').click()")
    choose(page, "global")
    page.until(f"{CAPTION}.includes('with anna+global.')")
    assert page.evaluate(SELECTED) == ["anna", "global"]
    assert shown(page) == native(both, "anna+global", "lock the door")
    weigh(page, "global", "0.25")
    page.until(f"{CAPTION}.includes('with anna+global:0.25.')")
    assert shown(page) == native(both, "anna+global:0.25", "lock the door")
    weigh(page, "anna", "17")
    page.until("document.getElementById('adapter-error').textContent !== ''")
    assert "In use: anna+global:0.25" in page.alert("adapter-error")
    assert shown(page) == native(both, "anna+global:0.25", "lock the door")
    page.evaluate("document.querySelector('#weights [value=anna]').click()")
    page.until(f"{CAPTION}.includes('with global:0.25.')")
    assert page.evaluate("document.activeElement.id") == "adapters"
    page.evaluate("document.getElementById('composing').click()")
    choose(page, "anna")
    page.until(f"{CAPTION}.includes('with anna.')")
    page.evaluate("document.getElementById('composing').click()")
    choose(page, "other")
    page.until("document.getElementById('adapter-error').textContent !== ''")
    assert "different labels" in page.alert("adapter-error")
    assert page.evaluate(IN_USE).startswith("In use: anna,")
    assert page.errors() == []


@pytest.fixture
def crowd(both: Path, household: IdentityKey) -> Path:
    """A bundle with 200 more adapters, each signed under its own name."""
    folder = both / "adapters"
    manifest = AdapterManifest.unverified((folder / "anna.json").read_bytes())
    for number in range(200):
        name = f"home-{number:03d}"
        (folder / f"{name}.json").write_bytes(replace(manifest, name=name, version=number).sign(household))
        (folder / f"{name}.onnx_adapter").hardlink_to(folder / "anna.onnx_adapter")
    return both


def test_of_200_adapters_one_is_found_and_used_by_keyboard_in_a_list_of_constant_height(
    page: Any, serve: Callable[[Path], str], crowd: Path
) -> None:
    page.call("Emulation.setDeviceMetricsOverride", width=1280, height=800, deviceScaleFactor=1, mobile=False)
    page.goto(serve(crowd))
    height = "document.getElementById('adapters').offsetHeight"
    count = "document.getElementById('adapter-count').textContent"
    active = "document.getElementById(document.activeElement.getAttribute('aria-activedescendant'))?.dataset.name"
    assert page.evaluate("document.documentElement.scrollHeight") < 1000
    before = page.evaluate(height)
    page.evaluate("document.getElementById('adapter-search').focus()")
    page.press(*"home 11")  # words in any order, of the name and of what is written below it
    assert page.evaluate(count) == "11 of 202 adapters", "home-011, and 110 to 119"
    assert page.evaluate(height) == before
    page.press("ArrowDown", "ArrowDown", "ArrowUp")
    assert page.evaluate(active) == "home-110"
    page.press("Enter")
    page.until(f"{IN_USE}.includes('home-110')")
    assert page.evaluate(SELECTED) == ["home-110"]
    page.press("Escape")
    assert page.evaluate(count) == "202 adapters"
    page.press(*"nobody", "ArrowDown", "Enter")
    assert (page.evaluate(count), page.evaluate(height)) == ("0 of 202 adapters", before)
    page.press("Escape")
    page.evaluate("document.getElementById('adapters').focus()")
    page.press(*["ArrowDown"] * 30)
    assert page.evaluate(active) == "home-027"
    frame = "document.getElementById('adapters').getBoundingClientRect()"
    item = "document.querySelector('#adapters .active').getBoundingClientRect()"
    assert page.evaluate(f"{item}.top >= {frame}.top && {item}.bottom <= {frame}.bottom"), "the list follows"
    page.press(" ")
    page.until(f"{IN_USE}.includes('home-027')")
    assert page.errors() == []


def test_an_error_is_shown_below_the_phrase_until_the_next_answer(
    page: Any, serve: Callable[[Path], str], both: Path
) -> None:
    page.goto(serve(both))
    for phrase in ("🎵", "a" * 70000):
        page.evaluate(f"document.getElementById('phrase').value = {phrase!r}")
        page.evaluate("document.getElementById('phrase-error').textContent = ''")
        page.evaluate("document.getElementById('classify-form').requestSubmit()")
        page.until("document.getElementById('phrase-error').textContent !== ''")
        assert shown(page) == []
        assert page.evaluate("document.activeElement.id") == "phrase"
        assert page.evaluate("document.activeElement.getAttribute('aria-invalid')") == "true"
    place = "document.getElementById('phrase-error').getBoundingClientRect().top"
    assert page.evaluate(f"{place} - document.getElementById('phrase').getBoundingClientRect().bottom") < 80
    ask(page, "🎵 the door")
    assert page.alert("phrase-error") == ""
    assert "33 % of its tokens unknown" in page.evaluate(CAPTION)
    phrase = "turn on the kitchen lights " * 200  # 5,400 characters, above the model's limit
    ask(page, phrase)
    assert shown(page) == native(both, "anna", phrase)
    assert f" {ClassificationSession.open(both).unread(phrase, 'anna')} tokens of" in page.evaluate(CAPTION)


def test_nothing_leaves_the_origin(page: Any, serve: Callable[[Path], str], both: Path) -> None:
    """The page can neither reach another origin nor evaluate text; it is isolated, so that it gets threads."""
    url, other = serve(both), serve(both)
    page.goto(url)
    ask(page, "lock the door")
    requests = page.requests()
    assert {f"{url}bundle/base/web.onnx", f"{url}worker.js", f"{url}trust.pem"} <= set(requests), "workers are watched"
    assert [request for request in requests if not request.startswith(url)] == []
    refused = "then(() => 'reached', (error) => error.name)"
    assert page.evaluate(f"fetch('{other}trust.pem', {{ mode: 'no-cors' }}).{refused}") == "TypeError"
    assert page.evaluate("fetch('/trust.pem').then(() => 'reached')") == "reached"
    page.evaluate("window.ran = false; const s = document.createElement('script');"
                  " s.textContent = 'window.ran = true'; document.head.append(s)")  # fmt: skip
    assert page.evaluate("window.ran") is False
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
    page.evaluate("document.getElementById('open-folder').click(); document.getElementById('in-use').textContent = ''")
    page.until(f"{IN_USE}.includes('anna') || document.getElementById('bundle-error').textContent !== ''")
    assert page.alert("bundle-error") == ""
    (tmp_path / "other" / "trust.pem").write_bytes((tmp_path / "trust.pem").read_bytes())
    ask(page, "lock the door")
    assert shown(page) == native(picked, "anna", "lock the door")


def test_every_control_has_a_label_and_can_be_used_by_keyboard_and_nothing_moves_when_an_answer_appears(
    page: Any, serve: Callable[[Path], str], both: Path
) -> None:
    page.goto(serve(both))
    unlabeled = """[...document.querySelectorAll('input, textarea, button')]
      .filter((e) => !(e.labels?.length || e.textContent.trim() || e.getAttribute('aria-label'))).map((e) => e.id)"""
    assert page.evaluate(unlabeled) == []
    assert page.evaluate("document.querySelectorAll('[tabindex=\"-1\"]').length") == 0
    tops = "[...document.querySelectorAll('section, input, button')].map((each) => each.getBoundingClientRect().top)"
    before = page.evaluate(tops)
    page.evaluate("document.getElementById('phrase').value = 'unlock'; document.getElementById('phrase').focus()")
    page.press("Enter")
    page.until(f"{CAPTION}.includes('unlock')")
    assert page.evaluate(tops) == before
    page.evaluate("document.getElementById('phrase').value = 'play music'")
    page.press("Enter", control=True)
    page.until(f"{CAPTION}.includes('play music')")


LONG = ("HassTurnOnLightsInAreaXAndInAllOfTheOtherAreas", "L" * 256, "set-the-timer-for-ten-minutes-or-so", "set_timer")


def test_labels_wrap_between_words_and_nothing_is_cut_off_on_a_phone(
    page: Any,
    serve: Callable[[Path], str],
    bundle: Path,
    exported: ExportedBase,
    source: Source,
    vendor: IdentityKey,
) -> None:
    write_bundle(bundle, exported, [replace(source(), labels=LONG)], key=vendor)
    page.call("Emulation.setDeviceMetricsOverride", width=320, height=740, deviceScaleFactor=2, mobile=True)
    page.goto(serve(bundle))
    ask(page, "lock the door")
    assert {label for label, _ in shown(page)} == {label.replace("_", " ") for label in LONG}
    words = """[...document.querySelectorAll('#answers th')].flatMap((cell) => [...cell.childNodes])
      .filter((node) => node.nodeType === Node.TEXT_NODE).map((node) => {
        const range = document.createRange();
        range.selectNode(node);
        return [node.textContent, new Set([...range.getClientRects()].map(({ top }) => top)).size];
      })"""
    lines = dict(page.evaluate(words))
    assert lines.pop("L" * 256) > 5
    assert lines.keys() >= {"Hass", "Lights", "Areas", "timer-", "minutes-", "set timer"}
    assert set(lines.values()) == {1}, "no other word is cut"
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    over = page.evaluate("""(() => {
      for (const each of document.querySelectorAll('[hidden]')) each.hidden = false;
      for (const each of document.querySelectorAll('details')) each.open = true;
      const right = (each) => each.getBoundingClientRect().right;
      return [...document.querySelectorAll('input[type="file"]')].map((field) => {
        const section = field.closest('section');
        return [field.id, right(field) - right(section) + parseFloat(getComputedStyle(section).paddingRight)];
      });
    })()""")
    assert len(over) == 9
    assert {name: pixels for name, pixels in over if pixels > 0} == {}
    assert page.evaluate("document.documentElement.scrollWidth") <= 320


CONTRAST = """(() => {
  const channels = (text) => text.match(/[\\d.]+/g).slice(0, 3).map((each) => each / 255);
  const luminance = (text) => channels(text)
    .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
    .reduce((sum, value, i) => sum + value * [0.2126, 0.7152, 0.0722][i], 0);
  const paint = document.body.appendChild(document.createElement('i'));
  const resolved = (name) => (paint.style.color = `var(--${name})`, luminance(getComputedStyle(paint).color));
  return (text, ground) => {
    const [light, dark] = [resolved(text), resolved(ground)].sort((a, b) => b - a);
    return (light + 0.05) / (dark + 0.05);
  };
})()"""


def test_texts_and_fields_stand_out_as_wcag_demands(page: Any, serve: Callable[[Path], str], bundle: Path) -> None:
    page.goto(serve(bundle))
    texts = [(text, ground) for text in ("ink", "soft", "accent", "good", "bad") for ground in ("paper", "surface")]
    for scheme in ("light", "dark"):
        page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        for least, pairs in (
            (4.5, [*texts, ("on-accent", "accent")]),  # WCAG 2.2, 1.4.3
            (3, [("edge", "paper"), ("edge", "surface")]),  # 1.4.11
        ):
            for text, ground in pairs:
                assert page.evaluate(f"{CONTRAST}({text!r}, {ground!r})") >= least, (scheme, text, ground)


def begun(stream: BinaryIO, out: BinaryIO) -> None:
    """Send the beginning of a file."""
    out.write(stream.read(99))
    raise ConnectionError


def test_what_cannot_be_opened_has_its_reason_and_the_bundle_that_was_open_goes_on(
    page: Any, serve: Callable[[Path], str], both: Path, vendor: IdentityKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bundle of another signer, a server that breaks off, and a browser that is offline."""
    page.goto(serve(both))
    expected, pinned = native(both, "anna", "lock the door"), both.parent / "trust.pem"
    sound, stranger = pinned.read_bytes(), IdentityKey.generate(SystemEntropy()).public

    def refused() -> str:
        page.evaluate("document.getElementById('bundle-error').textContent = ''")
        page.evaluate("document.getElementById('open-served').click()")
        page.until("document.getElementById('bundle-error').textContent !== ''")
        assert page.state() == "good"
        ask(page, "lock the door")
        assert shown(page) == expected
        return str(page.alert("bundle-error"))

    pinned.write_bytes(stranger.to_pem())
    message = refused()
    assert vendor.public.key_id in message
    assert f"only '{stranger.key_id}' is pinned" in message
    pinned.write_bytes(sound)
    (both / "base" / "web.onnx").touch()  # so that the browser asks for its content again
    with monkeypatch.context() as patch:
        patch.setattr(client.browser.server.shutil, "copyfileobj", begun)
        assert "broke off" in refused()
    page.go_offline()
    assert "is offline" in refused()


def test_without_a_bundle_that_can_be_opened_the_page_gives_the_reason_and_offers_another(
    page: Any, serve: Callable[[Path], str], both: Path
) -> None:
    sound = (both / "base" / "tokenizer.json").read_bytes()
    (both / "base" / "tokenizer.json").write_bytes(b"{}")
    page.goto(serve(both))
    assert page.state() == "bad"
    assert "base/tokenizer.json does not match the digest" in page.status()
    assert page.evaluate("document.getElementById('status').getAttribute('role')") == "alert"
    assert page.evaluate("document.getElementById('another').open") is True
    (both / "base" / "tokenizer.json").write_bytes(sound)
    page.evaluate("document.getElementById('open-served').click()")
    page.until("document.getElementById('status').dataset.state === 'good'")
    ask(page, "lock the door")


# Damaged files: one line, and the adapter in use goes on; js/vectors.test.mjs has the other refusals


BASE_FILES = ["manifest.json", MODEL, WEIGHTS, WEB_MODEL, TOKENIZER]
ADAPTER_FILES = ["anna.json", "anna.onnx_adapter"]
PHRASE = "turn on the lights"
START = """(async () => {
  globalThis.engine = await opened();
  await engine.use('global');
  globalThis.before = JSON.stringify((await engine.rank(%r, 4)).labels);
})()"""


class Device:
    """A tab with the adapter ``global`` in use, and the bundle it came from."""

    def __init__(self, tab: NodeTab, bundle: Path) -> None:
        self.tab, self.bundle = tab, bundle
        tab.open(bundle)
        tab.evaluate(START % PHRASE)

    def refuses(self, call: str, kind: str, about: str | None) -> str:
        """The message of the error with which ``call`` fails; the tab answers as before."""
        error: dict[str, str] = self.tab.error(call)
        assert error["name"] == kind, error
        assert about in (None, error["about"]), error
        assert "\n" not in error["message"]
        assert len(error["message"]) < 400
        assert self.tab.evaluate(f"engine.rank({PHRASE!r}, 4).then((r) => JSON.stringify(r.labels) === before)")
        return error["message"]

    def refuses_adapter(self, kind: str, about: str | None, name: str = "anna") -> str:
        return self.refuses(f"engine.use({name!r})", kind, about)

    def refuses_base(self, kind: str, about: str | None) -> str:
        return self.refuses("opened()", kind, about)


@pytest.fixture
def device(tab: NodeTab, bundle: Path, exported: ExportedBase, source: Source, household: IdentityKey) -> Device:
    """With a private adapter in its bundle, which it has not used yet."""
    add_adapter(bundle, exported.adapter_inputs, source("anna", seed=1, parent="a" * 64), key=household)
    return Device(tab, bundle)


def test_a_flipped_bit_in_any_file_of_the_base_is_refused(device: Device) -> None:
    damaged(device.bundle / "base", BASE_FILES, "manifest.json", device.refuses_base)


def test_a_flipped_bit_in_either_file_of_an_adapter_is_refused(device: Device) -> None:
    damaged(device.bundle / "adapters", ADAPTER_FILES, "anna.json", device.refuses_adapter)


def damaged(folder: Path, names: list[str], manifest: str, refused: Callable[[str, str | None], str]) -> None:
    """A file with another bit, of another length, and one that is missing."""
    for name in names:
        path, stated = folder / name, "envelope" if name == manifest else name
        sound = path.read_bytes()
        for where in (0, 0.5, 1):
            flip(path, where)
            assert f"{folder.name}/{name}" in refused("TrustError", None if name == manifest else name)
            path.write_bytes(sound)
        for changed in (sound[:-1], sound + b"\0", b""):
            path.write_bytes(changed)
            refused("TrustError", stated)
        path.unlink()
        refused("DataError", name)
        path.write_bytes(sound)


def test_an_oversized_document_is_not_read_to_its_end(device: Device) -> None:
    (device.bundle / "adapters" / "anna.json").write_bytes(bytes(dsse.MAX_ENVELOPE + 1))
    assert "larger than its limit" in device.refuses_adapter("TrustError", "anna.json")


def test_a_name_that_leaves_the_folder_is_refused(device: Device) -> None:
    for name in ("../global", "/etc/passwd", "a/b", "%2e%2e"):
        device.refuses_adapter("ConfigError", "name", name)


def test_an_older_version_or_another_content_is_refused_even_after_the_page_was_closed(
    page: Any,
    serve: Callable[[Path], str],
    bundle: Path,
    exported: ExportedBase,
    source: Source,
    vendor: IdentityKey,
) -> None:
    """Versions are noted for each set of pinned keys."""
    url = serve(bundle)

    def opened(adapter: AdapterSource) -> str:
        write_bundle(bundle, exported, [adapter], key=vendor)
        page.goto(url)
        return str(page.alert("adapter-error"))

    assert opened(source(version=5)) == ""
    assert "is version 4, but version 5 was accepted here before" in opened(source(version=4))
    for other in (source(seed=5, version=5), replace(source(version=5), temperature=2.0)):
        assert "has another content than the version 5 that was accepted here before" in opened(other)
    assert opened(source(version=5)) == ""
    (bundle.parent / "trust.pem").write_bytes(vendor.public.to_pem())
    assert opened(source(version=4)) == ""


def test_the_page_can_be_installed(page: Any, serve: Callable[[Path], str], bundle: Path) -> None:
    def errors() -> set[str]:
        found = page.call("Page.getInstallabilityErrors")["installabilityErrors"]
        return {error["errorId"] for error in found} - {"in-incognito"}  # as every context of the tests is

    assert errors()
    url = serve(bundle)
    page.goto(url)
    assert errors() == set()
    found = page.call("Page.getAppManifest")
    assert (found["errors"], found["url"]) == ([], f"{url}manifest.webmanifest")
    manifest = json.loads(found["data"])
    assert manifest["display"] == "standalone"
    for icon in manifest["icons"]:
        load = f"Object.assign(new Image(), {{ src: {icon['src']!r} }}).decode().then(() => 'loaded')"
        assert page.evaluate(load) == "loaded"
