"""The page's modules under Node, for what needs no browser (``tests/browser/js/tab.mjs``)."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from client.browser.server import LIBRARIES, VENDOR, WEB

TAB = Path(__file__).resolve().parents[1] / "browser" / "js" / "tab.mjs"
FOR_NODE = {"onnxruntime-web/dist/ort.wasm.min.mjs": "onnxruntime-web/dist/ort.node.min.mjs"}  # the same WebAssembly
OPEN = """
  const engine = await opened();
  const adapter = await engine.verified("global");
  const [{ GraphTrainer }, { tune }] = await Promise.all([load("learning/trainer"), load("learning/descent")]);
  const written = (values) => btoa(Array.from(new Uint8Array(values.buffer), (b) => String.fromCharCode(b)).join(""));
  const all = (map) => Object.fromEntries([...map].map(([name, values]) => [name, written(values)]));
  const examples = (found) => found.map(([text, target, share]) => ({ ids: trainer.tokens(text), target, share }));
"""  # in a tab of either kind


class NodeTab:
    """Evaluates expressions as ``cdp.Page`` does: ``load`` gives a module of the page, ``opened`` an engine."""

    def __init__(self, node: str, site: Path) -> None:
        shutil.copytree(WEB, site, ignore=shutil.ignore_patterns("node_modules"))
        for name, source in VENDOR.items():
            (site / name).parent.mkdir(parents=True, exist_ok=True)
            (site / name).symlink_to((LIBRARIES / FOR_NODE.get(source, source)).resolve())
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([node, "--no-warnings", str(TAB), str(site)], **pipes)
        self._bundle: Path | None = None

    def open(self, bundle: Path) -> None:
        """Begin again, with a bundle and nothing stored."""
        self._bundle = bundle

    def evaluate(self, expression: str) -> Any:
        answer = self._ask(expression)
        if "error" in answer:
            raise RuntimeError(answer["error"]["stack"])
        return answer.get("value")

    def error(self, expression: str) -> dict[str, str]:
        """The ``name``, ``message`` and ``about`` of the error of a promise that must fail."""
        answer = self._ask(expression)
        assert "error" in answer, f"{expression} did not fail"
        return {"about": "", **answer["error"]}

    def _ask(self, expression: str) -> dict[str, Any]:
        assert self.process.stdin
        assert self.process.stdout
        request = {"expression": expression} | ({"fresh": str(self._bundle)} if self._bundle else {})
        self._bundle = None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return dict(json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
