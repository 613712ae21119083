"""The looks of the report: one column on a phone, two on a desk, light or dark as the reader has it, plain in print."""

CSS = """
:root {
  color-scheme: light dark;
  --font: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  --ink: #1b1f24; --muted: #59636e; --line: #d4d9df; --page: #f6f7f8; --paper: #ffffff;
  --tile: #c5dcea; --dropped: #b3400d;
  --base: #6a737d; --local: #a65a00; --global: #0069a8; --personal: #00735a;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --ink: #e6e9ec; --muted: #a0aab4; --line: #363d45; --page: #101317; --paper: #181c21;
    --tile: #28485c; --dropped: #ff9060;
    --base: #a8b1ba; --local: #f2a541; --global: #62b8f0; --personal: #35c9a3;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 var(--font); }
main { max-width: 1060px; margin: 0 auto; padding: 28px 20px 48px; }
h1 { font-size: clamp(1.35rem, 1rem + 1.8vw, 2rem); line-height: 1.25; margin: .2em 0 .9em; text-wrap: balance; }
h2 { font-size: 1.15rem; margin: 0 0 .3em; }
p { margin: .3em 0 .9em; }
.run, .note, figcaption { color: var(--muted); }
.run { margin: 0; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px;
  padding: 18px 20px; margin: 0 0 18px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .45em .5em; text-align: right; vertical-align: top; border-top: 1px solid var(--line); }
thead th { border-top: 0; color: var(--muted); font-weight: 500; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
th[scope=row] { font-weight: 600; }
th[scope=row] small { display: block; max-width: 52em; color: var(--muted); font-weight: 400;
  font-size: .85em; line-height: 1.4; }
.arms thead th { white-space: nowrap; }
.arms td { font-size: 1.1em; }
.arms .best td { font-weight: 700; color: var(--personal); }
.scroll { overflow-x: auto; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(155px, 1fr)); gap: 14px 20px; margin: 0; }
.facts div { border-left: 3px solid var(--line); padding-left: 12px; }
dt { color: var(--muted); font-size: .9em; }
dd { margin: 0; overflow-wrap: anywhere; }
.facts dd { font-size: 1.3em; font-weight: 600; line-height: 1.3; }
.facts small { display: block; color: var(--muted); font-size: .66em; font-weight: 400; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(400px, 100%), 1fr)); gap: 18px;
  align-items: start; margin-bottom: 18px; }
.figures > div { display: grid; gap: 18px; }
.figures section { margin: 0; }
figure { margin: 0; }
figcaption { font-size: .9em; margin-bottom: 10px; }
svg { display: block; width: 100%; max-width: 560px; height: auto; margin: 0 auto; overflow: visible; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
.dropped { color: var(--dropped); }
.rounds :is(th, td), .each :is(th, td) { white-space: nowrap; }
.rounds :is(th, td):last-child { text-align: left; padding-left: 1.2em; }
.rounds td.words { min-width: 15em; white-space: normal; overflow-wrap: anywhere; }
code, pre { font: .88em/1.5 var(--mono); }
pre { background: var(--page); border: 1px solid var(--line); border-radius: 6px; padding: 10px 12px;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.check dl { display: grid; grid-template-columns: max-content 1fr; gap: .35em 1.2em; margin: 0; }
summary { cursor: pointer; font-weight: 600; }
@media (max-width: 520px) {
  main { padding: 18px 12px 32px; }
  section { padding: 14px 14px; }
  th, td { padding: .4em .28em; font-size: .93em; }
  .arms tr { display: grid; grid-template-columns: repeat(4, 1fr); }
  .arms th:first-child { grid-column: 1 / -1; }
  .arms thead th:first-child { display: none; }
  .arms tbody td { border-top: 0; padding-top: 0; text-align: left; }
  .arms thead th { text-align: left; white-space: normal; }
  .check dl { grid-template-columns: 1fr; gap: 0; }
  .check dd { margin-bottom: .6em; }
}
@media print {
  body { background: none; font-size: 11pt; }
  main { max-width: none; padding: 0; }
  section { border: 0; padding: 0; }
  section, figure, tr { break-inside: avoid; }
  .rounds, .each { break-inside: auto; }
  .figures { grid-template-columns: 1fr 1fr; }
}
"""
