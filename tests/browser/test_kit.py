"""The package @edgeadapt/device, built from the page's modules, in Node: small, typed, with native numbers."""

import base64
import functools
import json
import os
import re
import shutil
import subprocess
import threading
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregation.entropy import SystemEntropy
from aggregation.pki.identity import IdentityKey
from client.browser.server import LIBRARIES, Site
from client.inference.generate import Conversation, Generator
from client.inference.session import ClassificationSession
from client.learning import Correction, Learner
from edgeadapt.formats import container
from edgeadapt.formats.manifest import AdapterManifest
from export.bundle.write import AdapterSource, write_bundle
from export.onnx.exported import ExportedBase
from tests.browser import test_generation
from tests.browser.test_learning import other, public
from tests.support.models import LABELS, PHRASES
from tests.support.programs import need
from tests.vectors.make_bundle import FOLDER

globals().update({name: getattr(test_generation, name) for name in ("chatty", "writer", "sources")})  # its fixtures
ROOT = Path(__file__).resolve().parents[2]
KIT = ROOT / "client" / "browser" / "kit"
TOOLS = KIT / "node_modules"
PAGE = ROOT / "docs" / "how-to" / "use-a-bundle.md"
ANSWERS = json.loads((FOLDER / "expected.json").read_text(encoding="utf-8"))["answers"]
EXAMPLE = ROOT / "docs" / "example-app"
READY = "document.querySelector('button')?.disabled === false"
SCRIPTS = Path(__file__).parent / "js"
LIMIT = 200_000  # bytes that an app loads before it enrols as a device, besides ONNX Runtime
OPENED = """
import { readFileSync } from "node:fs";
import { Device, verify } from "@edgeadapt/device";
import { FileStore, folder } from "@edgeadapt/device/node";
const bundle = process.argv[1];
const given = { keys: readFileSync(`${bundle}/../trust.pem`, "utf8"), store: new FileStore("seen.json") };
const opened = async () => Device.open({ source: await folder(bundle), ...given });
const told = (value) => console.log(JSON.stringify(value));
"""
CLASSIFIED = """
const device = await opened();
const found = {};
for (const { name } of (await device.about()).adapters) {
  await device.use(name);
  found[name] = [];
  for (const text of JSON.parse(process.argv[2])) found[name].push((await device.classify(text, 100)).labels);
}
await device.close();
told(found);
"""
REFUSED = """
const used = opened().then((device) => device.use("int4"));
await used.then(() => told(null), ({ name, about }) => told([name, about]));
"""
TAUGHT = """
const device = await opened();
const [corrections, texts] = JSON.parse(process.argv[2]);
await device.use("global");
const before = (await device.classify(texts[0], 1)).labels[0].label;
const { adapter, version, lessons } = await device.teach("global", corrections);
await device.use(adapter);
const after = [];
for (const text of texts) after.push((await device.classify(text, 100)).labels);
const { blob } = await device.exported(adapter);
const undone = await device.undo();
const stopped = await device.teach("global", corrections, { signal: AbortSignal.abort() }).catch(({ about }) => about);
const found = { before, adapter, version, lessons, after, undone: undone.adapter, stopped };
told({ ...found, blob: Buffer.from(blob).toString("base64") });
"""
UPDATED = """
import { cpSync } from "node:fs";
const device = await opened();
await device.use("global");
const versions = async () => (await device.about()).adapters.map(({ manifest }) => manifest.version);
const before = [await versions(), (await device.classify("kitchen lights", 1)).labels[0].probability];
cpSync(process.argv[2], bundle, { recursive: true });
const { replaced } = await device.update(await folder(bundle));
const after = [await versions(), (await device.classify("kitchen lights", 1)).labels[0].probability];
const altered = Object.assign(await folder(bundle), { read: async () => new Uint8Array(3) });
const forged = await device.update(altered).catch(({ name }) => name);
const still = (await device.classify("kitchen lights", 1)).adapter;
cpSync(process.argv[3], bundle, { recursive: true });
const other = (await device.update(await folder(bundle))).replaced;
const unused = await device.classify("kitchen lights", 1).catch(({ about }) => about);
told({ before, after, replaced, forged, still, other, unused });
"""
CHATTED = """
const device = await opened();
await device.use("global");
const [first, second] = [await device.chat("hi", { maxTokens: 4 }), await device.chat("yo", { maxTokens: 4 })];
const stopping = new AbortController();
const stopped = await device.chat("so", { maxTokens: 4, signal: stopping.signal, onPiece: () => stopping.abort() });
await device.reset();
const again = await device.chat("hi", { maxTokens: 4 });
told({ texts: [first.text, second.text, again.text], stopped: [stopped.finish, stopped.tokens] });
"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def app(node: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of an app that has installed the package."""
    need((TOOLS / ".package-lock.json").is_file(), "the tools of the package are not installed: make kit")
    app = tmp_path_factory.mktemp("app")
    (app / "node_modules" / "@edgeadapt").mkdir(parents=True)
    (app / "node_modules" / "onnxruntime-web").symlink_to((LIBRARIES / "onnxruntime-web").resolve())
    (app / "package.json").write_text('{"type": "module"}')
    run(node, KIT / "build.mjs", app / "node_modules" / "@edgeadapt" / "device")
    return app


def run(*command: str | Path, cwd: Path | None = None, environment: dict[str, str] | None = None) -> str:
    variables = os.environ | (environment or {})
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=variables, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def told(node: str, app: Path, script: str, bundle: Path, *given: Any) -> Any:
    arguments = ["--no-warnings", "--input-type=module", "--eval", OPENED + script, "--", str(bundle)]
    more = [each if isinstance(each, Path) else json.dumps(each) for each in given]
    return json.loads(run(node, *arguments, *more, cwd=app).splitlines()[-1])


@pytest.fixture
def vectors(tmp_path: Path, app: Path) -> Path:
    (app / "seen.json").unlink(missing_ok=True)
    shutil.copytree(FOLDER, tmp_path / "vectors")
    return tmp_path / "vectors" / "bundle"


def shares(logits: list[float], bundle: Path, name: str) -> dict[str, float]:
    """The probabilities of labels, by the temperature of an adapter."""
    manifest = AdapterManifest.unverified((bundle / "adapters" / f"{name}.json").read_bytes())
    values = np.exp(np.array(logits) / manifest.temperature)
    return dict(zip(manifest.labels, values / values.sum(), strict=True))


def loaded(package: Path, name: str) -> set[str]:
    """The files that a module loads before any call."""
    text = (package / name).read_text()
    names = {part.partition('"')[0] for part in text.split('from"./')[1:]}
    return {name}.union(*(loaded(package, each) for each in names))


def test_the_package_is_small_and_what_its_tools_ask_for(node: str, app: Path) -> None:
    package = app / "node_modules" / "@edgeadapt" / "device"
    first = loaded(package, "index.js")
    assert len(first) > 1
    assert sum((package / name).stat().st_size for name in first) <= LIMIT
    assert len(list(package.glob("LICENSE*"))) == 3
    assert "All good!" in run(node, TOOLS / "publint" / "src" / "cli.js", "--strict", package)
    shutil.copyfile(SCRIPTS / "use.ts", app / "use.ts")
    options = (
        "--noEmit",
        "--strict",
        "--module",
        "nodenext",
        "--target",
        "es2022",
        "--lib",
        "es2022,dom",
        "--types",
        "",
    )
    run(node, TOOLS / "typescript" / "bin" / "tsc", *options, "use.ts", cwd=app)


def test_the_package_accepts_and_refuses_the_vectors_of_bundles(node: str, app: Path) -> None:
    package = (app / "node_modules" / "@edgeadapt" / "device" / "index.js").as_uri()
    run(node, "--test", SCRIPTS / "vectors.test.mjs", environment={"EDGEADAPT_KIT": package})


def test_the_program_for_node_in_the_how_to_gives_the_answer_of_the_vectors(node: str, app: Path) -> None:
    (program,) = re.findall(r"^```js\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    shutil.copytree(FOLDER, app / "bundle")
    printed = run(node, "--input-type=module", "--eval", program, cwd=app)
    found = {label: float(share) for label, share in (line.rsplit(" ", 1) for line in printed.splitlines())}
    answer = ANSWERS[0]
    assert f'"{answer["text"]}"' in program
    assert found == pytest.approx(shares(answer["logits"]["int4"], app / "bundle" / "bundle", "int4"), abs=1e-5)
    assert '"version":7' in (app / "bundle" / "seen.json").read_text()


def test_the_package_gives_the_answers_of_the_vectors(node: str, app: Path, vectors: Path) -> None:
    found = told(node, app, CLASSIFIED, vectors, [answer["text"] for answer in ANSWERS])
    assert set(found) == set(ANSWERS[0]["logits"])
    for name, rows in found.items():
        for answer, row in zip(ANSWERS, rows, strict=True):
            expected = shares(answer["logits"][name], vectors, name)
            assert {one["label"]: one["probability"] for one in row} == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("written", "about"),
    [
        ('{"%s": {"version": 8, "content": "x"}}', ["TrustError", "adapter-manifest.version"]),
        ('{"%s": {"version": 7, "content": "x"}}', ["TrustError", "adapter-manifest.source"]),
        ('{"%s": 7}', ["TrustError", "seen"]),
        ('{"%s"', ["TrustError", "seen"]),
        ("", ["TrustError", "seen"]),
    ],
)
def test_a_store_in_a_file_remembers_versions_and_is_refused_when_damaged(
    node: str, app: Path, vectors: Path, written: str, about: list[str]
) -> None:
    assert told(node, app, REFUSED, vectors) is None
    (place,) = json.loads((app / "seen.json").read_text())
    (app / "seen.json").write_text(written % place if "%s" in written else written)
    assert told(node, app, REFUSED, vectors) == about


def test_the_package_refuses_another_vendors_keys(node: str, app: Path, vectors: Path) -> None:
    (vectors.parent / "trust.pem").write_bytes(IdentityKey.generate(SystemEntropy()).public.to_pem())
    assert told(node, app, REFUSED, vectors) == ["TrustError", "keyid"]


def test_a_lesson_of_the_package_gives_the_native_adapter_and_can_be_undone_and_stopped(
    node: str, app: Path, phone: Path
) -> None:
    label = other(phone)
    found = told(node, app, TAUGHT, phone, [[{"text": PHRASES[0], "label": label}], PHRASES])
    assert (found["adapter"], found["version"], found["lessons"], found["undone"]) == ("personal", 4, 1, None)
    assert found["stopped"] == "stop"
    with Learner.open(phone) as learner:
        learner.teach([Correction(PHRASES[0], label)])
    expected = container.unpack((phone / "adapters" / "personal.onnx_adapter").read_bytes())
    tensors = container.unpack(base64.b64decode(found["blob"]))
    assert set(tensors) == set(expected)
    for name, value in tensors.items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-5, err_msg=name)
    rows = ClassificationSession.open(phone).rank(PHRASES, "personal", len(LABELS))
    assert (found["before"] != label, found["after"][0][0]["label"]) == (True, label)
    for row, answers in zip(rows, found["after"], strict=True):
        expected_shares = {one.label: one.probability for one in row}
        assert {one["label"]: one["probability"] for one in answers} == pytest.approx(expected_shares, abs=1e-5)


def test_an_update_takes_over_newer_adapters_and_a_forged_one_changes_nothing(
    node: str,
    app: Path,
    phone: Path,
    tmp_path: Path,
    trainable: ExportedBase,
    first: AdapterSource,
    vendor: IdentityKey,
) -> None:
    tensors = {name: -value for name, value in first.tensors.items()}
    newer = replace(first, tensors=tensors, version=4, sha256="d" * 64)
    write_bundle(tmp_path / "newer", trainable, [newer], key=vendor, form="fp32")
    shutil.copytree(tmp_path / "newer", tmp_path / "replaced")
    public(tmp_path / "replaced", vendor, trainable)
    found = told(node, app, UPDATED, phone, tmp_path / "newer", tmp_path / "replaced")
    assert [versions for versions, _ in (found["before"], found["after"])] == [[3], [4]]
    assert found["before"][1] != found["after"][1]
    assert (found["replaced"], found["forged"], found["still"]) == (False, "TrustError", "global")
    assert (found["other"], found["unused"]) == (True, "adapter"), "its base has public phrases"


def test_a_conversation_of_the_package_is_the_native_one_and_can_be_stopped(
    node: str, app: Path, tmp_path: Path, writer: ExportedBase, sources: list[AdapterSource], vendor: IdentityKey
) -> None:
    write_bundle(tmp_path / "chat", writer, sources, key=vendor)
    (tmp_path / "trust.pem").write_bytes(vendor.public.to_pem())
    native = Conversation(Generator.open(tmp_path / "chat"), test_generation.SHORT, adapter="global")
    expected = ["".join(native.ask(text)) for text in ("hi", "yo")]
    found = told(node, app, CHATTED, tmp_path / "chat")
    assert found["texts"] == [*expected, expected[0]]
    assert found["stopped"] == ["interrupted", 1]


@pytest.mark.slow
def test_the_example_app_is_built_answers_learns_and_undoes(node: str, app: Path, phone: Path, page: Any) -> None:
    """Its web part, in Chromium; nothing here builds or runs its native part."""
    example = app / "example"
    shutil.copytree(EXAMPLE, example, ignore=shutil.ignore_patterns("node_modules", "www"))
    build = json.loads((example / "package.json").read_text())["scripts"]["build"]
    (example / "node_modules").symlink_to(app / "node_modules")
    Site.of(phone).export(example / "site")
    run("sh", "-c", build, cwd=example, environment={"PATH": f"{TOOLS / '.bin'}:{os.environ['PATH']}"})
    handler = functools.partial(Quiet, directory=example / "www")
    serving = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def pressed(button: str) -> list[str]:
        page.evaluate(f"document.querySelector('{button}').click()")
        page.until(READY)
        return [page.evaluate(f"document.getElementById('{name}').textContent") for name in ("status", "answer")]

    try:
        page.call("Page.navigate", url=f"http://127.0.0.1:{serving.server_port}/")
        page.until(READY)
        page.evaluate(f"document.getElementById('phrase').value = {PHRASES[0]!r}")
        first, label = pressed("#ask button"), other(phone)
        assert first[0] == "global, version 3"
        assert first[1].split()[0] not in ("", label)
        page.evaluate(f"document.getElementById('label').value = {label!r}")
        taught = pressed("#correct button")
        assert (taught[0], taught[1].split()[0]) == ("personal, version 4", label)
        undone = pressed("#undo")
        assert [text.split("(")[0] for text in undone] == [text.split("(")[0] for text in first]
        assert page.errors() == []
    finally:
        serving.shutdown()
        serving.server_close()
