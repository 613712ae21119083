/* Draws what /events sends. Nothing else is fetched, and every text is set as text. */

const STEPS = ["checkin", "offer", "roster", "plan", "survivors", "unmask"];
const SVG = "http://www.w3.org/2000/svg";
const SHOWN = 30; // rounds in the table
const [WIDTH, HEIGHT, LEFT, EDGE] = [600, 180, 52, 14]; // of a chart, as its viewBox
const HEADS = {
  rounds: ["Round", "Ended (UTC)", "Version", "Survivors", "Dropouts", "Accuracy", "Loss", "Epsilon", "Seconds", "Upload, kB", ""],
  services: ["Service", "State", "Address", "Restarts"],
  versions: ["Version of edgeadapt, as stated", "Devices"],
  channels: ["Channel", "Release", "Adapters", "For", "Since", "Made by", "Gates", "Evaluation"],
};
const byId = (id) => document.getElementById(id);
const dash = (value, digits) => (value === null || value === undefined ? "–" : value.toFixed(digits));
const total = (counts) => Object.values(counts).reduce((sum, each) => sum + each, 0);

function filled(made, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const element = (name, attributes = {}, ...children) => filled(document.createElement(name), attributes, children);
const drawn = (name, attributes, ...children) => filled(document.createElementNS(SVG, name), attributes, children);
const text = (x, y, anchor, content) => drawn("text", { x, y, "text-anchor": anchor }, content);

/** Fill a table of `HEADS` with rows of texts, numbers and nodes. */
function fill(table, rows) {
  const row = (cell, cells) => element("tr", {}, ...cells.map((each) => element(cell, {}, each instanceof Node ? each : String(each))));
  const body = element("tbody", {}, ...rows.map((cells) => row("td", cells)));
  byId(table).replaceChildren(element("thead", {}, row("th", HEADS[table])), body);
}

/** Fill a list with terms, each with its text and attributes of it. */
function list(id, pairs) {
  const pair = ([term, text, attributes = {}]) => element("div", {}, element("dt", {}, term), element("dd", attributes, String(text)));
  byId(id).replaceChildren(...pairs.map(pair));
}

function show(section, visible) {
  byId(section).hidden = !visible;
}

function tiles(view) {
  const { gateway, lease } = view;
  const step = view.running && view.run.step;
  const found = {
    Rounds: `${view.rounds_done} of ${view.rounds_wanted}`,
    "Under way": step ? `${step.name}: ${step.answered} answered${step.needed ? `, ${step.needed} needed` : ""}` : view.running ? "between rounds" : "no run",
    Version: view.version ?? "none",
    Accuracy: dash(view.metrics.accuracy, 3),
    Epsilon: view.epsilon === null ? "no bound" : `${dash(view.epsilon, 2)}${view.epsilon_limit ? ` of ${view.epsilon_limit}` : ""}`,
    Dropouts: `${total(view.dropouts_by_step)} of ${view.device_rounds}`,
    "At the gateway": gateway ? `${gateway.devices} devices` : "–",
    ...(view.drift && { Answers: view.drift.changed === null ? "not comparable" : view.drift.changed ? "have changed" : "no change is shown" }),
    ...(lease && { Leader: `${lease.in_force ? lease.leader : "nobody"}${lease.own ? " (here)" : ""}, epoch ${lease.epoch}` }),
  };
  list("tiles", Object.entries(found));
}

/** Answer what an operator asks first. Each answer has a question, a text, and whether it is bad news. */
function answers(view) {
  const { rounds, run, health } = view;
  const last = rounds.filter((each) => each.version !== null).at(-1);
  const failed = rounds.slice(rounds.indexOf(last) + 1).filter((each) => each.reason);
  const found = [["Is it learning?", learning(view, last, failed), !health.healthy]];
  if (!health.healthy) found.push(["What to do?", remedy(health), true]);
  const refused = run.refusals.slice(0, 3).map(refusal);
  if (refused.length && (run.waits_for || failed.length)) found.push(["What was refused?", refused.join("; "), !health.healthy]);
  for (const [name, one] of Object.entries(view.channels).filter(([, one]) => one && (one.evaluation || one.previous !== null))) {
    const text = one.evaluation ? one.evaluation.text : "nobody asked the devices: edgeadapt coordinator evaluate DIR";
    found.push([`Is release ${one.release} of ${name} better?`, text, one.evaluation?.worse]);
  }
  if (view.device_rounds) {
    const [up, down] = [view.bytes_up, view.bytes_down].map((bytes) => Math.round(bytes / view.device_rounds / 1000));
    const seconds = rounds.map((each) => each.seconds).sort((one, other) => one - other)[rounds.length >> 1];
    found.push(["What does it cost a device?", `${up} kB up and ${down} kB down a round, which takes ${dash(seconds, 0)} s (median)`, false]);
  }
  list("answers", found.map(([asked, text, bad]) => [asked, text, bad ? { class: "bad" } : {}]));
}

/** Who refused what, and why: a device says why at a step; other kinds are the field that was wrong. */
function refusal({ count, kind, version, at, cause }) {
  const what = STEPS.includes(kind) ? `devices refused ${count} × at ${kind}${cause && `, the last one: “${cause}”`}` : `${count} × ${kind}`;
  return `${what}${version && ` (edgeadapt ${version})`}, last ${minute(at)}`;
}

function remedy({ remedy: todo, problems, failed }) {
  const listed = problems.slice(1).map(({ about, text }) => `${about}: ${text}`).join("; ");
  return [todo, listed, failed && "why the last run failed: edgeadapt coordinator status DIR"].filter(Boolean).join(". ");
}

const VERDICTS = { moving: "Yes", done: "It has ended", idle: "Yes, and it waits as it should", waiting: "Not yet", new: "Not yet", stopped: "Not now" };
const QUIET = ["waiting", "stuck", "hung"]; // where it counts since when nothing has moved

function learning({ rounds, health }, last, failed) {
  const when = (each) => `round ${each.round}${each.ended ? `, ${minute(each.ended)} UTC` : ""}`;
  const values = rounds.map((each) => (each.version === null ? null : each.metrics.accuracy)).filter(Number.isFinite);
  const mean = (some) => (some.reduce((sum, each) => sum + each, 0) / some.length).toFixed(3);
  const count = Math.min(5, values.length >> 1);
  const trend = count ? `; accuracy ${mean(values.slice(-2 * count, -count))}, then ${mean(values.slice(-count))} (means of ${count} rounds)` : "";
  const newest = last ? `The newest version is ${last.version} (${when(last)})${trend}.` : "There is no version of a round yet.";
  const aborted = failed.length ? ` ${failed.length} rounds since then gave none, the last because of ${failed.at(-1).reason}.` : "";
  const since = QUIET.includes(health.condition) && health.since ? `; nothing has moved since ${minute(health.since)} UTC` : "";
  return `${VERDICTS[health.condition] ?? "No"}: ${health.text}${since}. ${newest}${aborted}`;
}

/** A line through the rounds that have a value; axis labels are the least and largest of them. */
function line(id, rounds, value) {
  const points = rounds.map((each) => [each.round, value(each)]).filter(([, y]) => Number.isFinite(y));
  if (!points.length) return byId(id).replaceChildren();
  const [first, last] = [points[0][0], points.at(-1)[0]];
  const low = Math.min(...points.map(([, y]) => y));
  const high = Math.max(...points.map(([, y]) => y), low + 1e-9);
  const x = (round) => LEFT + ((WIDTH - LEFT - EDGE) * (round - first)) / Math.max(1, last - first);
  const y = (number) => HEIGHT - 24 - ((HEIGHT - 24 - EDGE) * (number - low)) / (high - low);
  const path = points.map(([round, number]) => `${x(round).toFixed(1)},${y(number).toFixed(1)}`).join(" ");
  const marks = high - low > 1e-6 ? [low, (low + high) / 2, high] : [low];
  const when = (round) => `round ${round}${ended(rounds, round)}`;
  byId(id).replaceChildren(
    ...marks.flatMap((mark) => [axis(y(mark)), text(LEFT - 6, y(mark) + 4, "end", mark.toFixed(3))]),
    text(LEFT, HEIGHT - 8, "start", when(first)),
    ...(last > first ? [text(WIDTH - EDGE, HEIGHT - 8, "end", when(last))] : []),
    drawn("polyline", { points: path, class: "line" }),
    ...points.map(([round, number]) =>
      drawn("ellipse", { cx: x(round), cy: y(number), rx: 3, ry: 3, class: "point" }, drawn("title", {}, `round ${round}: ${number.toFixed(3)}`)),
    ),
  );
}

const axis = (y) => drawn("line", { x1: LEFT, x2: WIDTH - EDGE, y1: y, y2: y, class: "axis" });
const ended = (rounds, round) => {
  const time = rounds.find((each) => each.round === round)?.ended;
  return time ? ` · ${minute(time).slice(5)}` : "";
};

function bars(id, rounds) {
  const most = Math.max(1, ...rounds.map((each) => total(each.dropouts)));
  const slot = (WIDTH - LEFT - EDGE) / Math.max(1, rounds.length);
  const scale = (HEIGHT - 24 - EDGE) / most;
  const parts = rounds.flatMap((each, index) => {
    let top = HEIGHT - 24;
    return STEPS.filter((step) => each.dropouts[step]).map((step) => {
      const tall = each.dropouts[step] * scale;
      top -= tall;
      const place = { x: LEFT + index * slot + slot * 0.1, y: top, width: slot * 0.8, height: tall };
      return drawn("rect", { ...place, class: `step-${step}` }, drawn("title", {}, `round ${each.round}: ${each.dropouts[step]} at ${step}`));
    });
  });
  const marks = parts.length ? [text(LEFT - 6, EDGE + 4, "end", String(most)), text(LEFT - 6, HEIGHT - 20, "end", "0")] : [];
  const [first, last] = [rounds[0], rounds.at(-1)].map((each) => each && `round ${each.round}`);
  if (first) marks.push(text(LEFT, HEIGHT - 8, "start", first));
  if (last !== first) marks.push(text(WIDTH - EDGE, HEIGHT - 8, "end", last));
  byId(id).replaceChildren(axis(HEIGHT - 24), ...marks, ...parts);
  const seen = STEPS.filter((step) => rounds.some((each) => each.dropouts[step]));
  byId("legend").replaceChildren(...(seen.length ? seen.map((step) => element("span", { class: `key step-${step}` }, step)) : [": none"]));
}

function rows(rounds) {
  return rounds.slice(-SHOWN).reverse().map((each) => {
    const { accuracy, loss } = each.metrics;
    const note = each.reason ? `aborted: ${each.reason}` : each.spoiled ? "counts as zero" : "";
    const numbers = [dash(accuracy, 3), dash(loss, 3), dash(each.epsilon, 2), dash(each.seconds, 1), Math.round(each.bytes_up / 1000)];
    return [each.round, each.ended ? minute(each.ended) : "–", each.version ?? "–", each.survivors, total(each.dropouts), ...numbers, note];
  });
}

const minute = (time) => time.slice(0, 16).replace("T", " ");

function audience({ share, languages, previous }) {
  if (share === 100 && !languages.length) return "all devices";
  const who = languages.length ? `devices with language ${languages.join(", ")}` : "devices";
  return `${share} % of ${who}; release ${previous} for the others`;
}

function origin({ kind, source, again, by }) {
  const how = kind === "promote" ? `promoted from ${source}` : kind === "rollback" ? `rolled back to ${again}` : "published";
  return by ? `${by}: ${how}` : how;
}

function evaluation({ evaluation: found, prepared, unprepared, previous }) {
  const made = element("div", {});
  if (found) {
    made.append(element("p", { class: found.worse ? "bad" : "" }, `round ${found.round}: ${found.text}`));
  } else made.append("none");
  if (previous !== null) made.append(element("p", { class: prepared ? "" : "bad" }, prepared ? `rollback to release ${prepared.again} prepared` : unprepared));
  return made;
}

/** What the gates measured, to be opened; a refusal since then is shown at once. */
function gates({ gates, refusal, kind, protected: guarded }) {
  const items = (list) => element("ul", {}, ...list.map((each) => element("li", {}, `${each.passed ? "passed" : "REFUSED"} ${each.gate}: ${each.text}`)));
  const found = element("div", {});
  if (gates.length) found.append(element("details", {}, element("summary", {}, `${gates.filter((each) => each.passed).length} of ${gates.length} passed`), items(gates)));
  else found.append(guarded && kind === "publish" ? "none: published before it was protected" : "none asked");
  if (refusal) {
    const text = `${minute(refusal.since)}: release ${refusal.release} of ${refusal.source} refused${refusal.by ? `, tried by ${refusal.by}` : ""}`;
    found.append(element("p", { class: "refusal" }, text), items(refusal.gates));
  }
  return found;
}

let shownChannels = "";

function channels({ channels: found, problem }) {
  show("channels-section", Object.keys(found).length || problem);
  byId("channels-problem").hidden = !problem;
  byId("channels-problem").textContent = problem ?? "";
  if (JSON.stringify(found) === shownChannels) return; // what somebody opened stays open
  shownChannels = JSON.stringify(found);
  const row = ([name, one]) => {
    if (!one) return [name, "none", ...HEADS.channels.slice(2).map(() => "–")];
    const adapters = Object.entries(one.adapters).map(([adapter, version]) => `${adapter} ${version}`).join(", ");
    return [one.protected ? `${name} (protected)` : name, one.release, adapters, audience(one), minute(one.since), origin(one), gates(one), evaluation(one)];
  };
  fill("channels", Object.entries(found).map(row));
}

function draw(view) {
  byId("problem").hidden = !view.error;
  byId("problem").textContent = view.error ?? "";
  if (view.error) return;
  const ending = Object.values(view.expiries).flatMap(({ warning }) => warning ?? []);
  byId("expiries").hidden = !ending.length;
  byId("expiries").textContent = ending.join("; ");
  tiles(view);
  answers(view);
  show("charts", view.rounds.length);
  show("rounds-section", view.rounds.length);
  line("accuracy", view.rounds, (each) => each.metrics.accuracy);
  bars("dropouts", view.rounds);
  fill("rounds", rows(view.rounds));
  fill("services", view.services.map((each) => [each.name, each.state, each.address || "–", each.restarts]));
  show("services-section", view.services.length);
  const { gateway } = view;
  fill("versions", Object.entries(gateway?.versions ?? {}));
  show("versions-section", gateway);
  const outcomes = Object.entries(gateway?.check_ins ?? {}).map(([name, count]) => `${count} ${name}`);
  byId("checkins").textContent = outcomes.length ? `Check-ins since the start: ${outcomes.join(", ")}` : "";
  channels(view);
}

const events = new EventSource("/events");
events.addEventListener("open", () => (byId("live").textContent = "live"));
events.addEventListener("message", ({ data }) => {
  draw(JSON.parse(data));
  document.documentElement.dataset.ready = "yes";
});
events.addEventListener("error", () => {
  // The browser connects again by itself, but not after a refusal: then the session is over.
  if (events.readyState === EventSource.CLOSED) location.assign("/login");
  else byId("live").textContent = "no connection; what you see is the last state";
});
