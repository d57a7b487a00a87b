"""Checks the accessibility of the built documentation: `python -m tests.axe SITE axe.min.js [PAGE ...]`.

axe-core runs on every page in Chromium, in light mode at 1280 pixels and in dark mode at 390 pixels.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

SECONDS = 1800
SCRIPT = """<!doctype html><title>axe</title><body><script type="module">
const wait = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const source = await (await fetch("/axe.min.js")).text();
for (const page of PAGES) for (const [mode, width] of [["light", 1280], ["dark", 390]]) {
  localStorage.setItem("mode", mode);
  localStorage.setItem("theme", mode);
  const frame = document.createElement("iframe");
  frame.width = width;
  frame.height = 900;
  frame.src = "/" + page;
  const loaded = new Promise((resolve) => (frame.onload = resolve));
  document.body.append(frame);
  await loaded;
  await wait(100);
  frame.contentWindow.eval(source);
  const result = await frame.contentWindow.axe.run({ resultTypes: ["violations"] });
  const lines = [];
  for (const { id, impact, help, nodes } of result.violations) for (const node of nodes)
    lines.push([impact, id, page, mode, width, help, node.target.join(" "), node.html.slice(0, 160)]);
  frame.remove();
  await fetch("/results", { method: "POST", body: JSON.stringify(lines) });
}
await fetch("/done", { method: "POST", body: "[]" });
</script>"""


class Handler(SimpleHTTPRequestHandler):
    """Serves the site, axe-core and the script, and takes the results."""

    def __init__(
        self, *args: Any, axe: Path, script: str, results: list[Any], done: Event, **rest: Any
    ) -> None:
        self.texts = {"/axe": script.encode(), "/axe.min.js": axe.read_bytes()}
        self.results, self.done = results, done
        super().__init__(*args, **rest)

    def do_GET(self) -> None:
        if self.path in self.texts:
            self.send_response(200)
            self.send_header("Content-Type", "text/javascript" if self.path.endswith("js") else "text/html")
            self.end_headers()
            self.wfile.write(self.texts[self.path])
        else:
            super().do_GET()

    def do_POST(self) -> None:
        self.results += json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()
        if self.path == "/done":
            self.done.set()

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""


def violations(site: Path, axe: Path, pages: list[str]) -> list[Any]:
    """Return the findings on pages: impact, rule, page, mode, width, help, selector and HTML of each element.

    Raises:
        TimeoutError: Chromium has not sent them in time.
    """
    results: list[Any] = []
    done, script = Event(), SCRIPT.replace("PAGES", json.dumps(pages))
    handler = partial(Handler, axe=axe, script=script, results=results, done=done, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, tempfile.TemporaryDirectory() as profile:
        Thread(target=server.serve_forever, daemon=True).start()
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        url = f"http://127.0.0.1:{server.server_port}/axe"
        browser = subprocess.Popen(
            ["chromium", *options, "--window-size=1400,1000", "--remote-debugging-port=0", url],
            stderr=subprocess.DEVNULL,
        )
        try:
            if not done.wait(SECONDS):
                raise TimeoutError(f"axe-core has not checked all pages in {SECONDS} s; findings: {results}")
        finally:
            browser.terminate()
            browser.wait(30)
            server.shutdown()
    return results


def main(site: Path, axe: Path, pages: list[str]) -> int:
    """Print the findings; return 1 if one is serious or critical."""
    files = (path.relative_to(site) for path in sorted(site.rglob("*.html")))
    pages = pages or [path.as_posix() for path in files if "_static" not in path.parts]
    results = violations(site, axe, pages)
    for result in results:
        print(*result, sep="\t")
    serious = sum(result[0] in ("serious", "critical") for result in results)
    print(f"{len(pages)} pages, {len(results)} findings, {serious} of them serious or critical")
    return int(bool(serious))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]), sys.argv[3:]))
