"use strict";
// The page draws what the server, or the file it is in, has recorded; it computes nothing but views.

const $ = (id) => document.getElementById(id);
const OFFLINE = $("saved").textContent !== "";
let SAVED = {}; // the answers in this file, by what is asked for
const BASE = location.pathname;
const answers = new Map();
const at = { branch: 0, token: 0, layer: 0, head: 0, key: 0, step: null, pair: 0, target: null };
let state = null;
let pending = 0; // requests without an answer yet
let turn = 0; // grows with every selection: answers for an older one are dropped

// --- asking -------------------------------------------------------------------------------------------

async function ask(name, query) {
  const key = name + "?" + new URLSearchParams(query);
  if (OFFLINE) {
    if (!(key in SAVED)) throw new Error("not in this file; run explore.py to see it");
    return SAVED[key];
  }
  if (!answers.has(key)) answers.set(key, request("view/" + key));
  try {
    return await answers.get(key);
  } catch (error) {
    answers.delete(key);
    throw error;
  }
}

async function request(path, body) {
  const options = body && { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  let response, answer;
  document.body.classList.toggle("waiting", ++pending > 0);
  try {
    response = await fetch(BASE + path, options);
    answer = await response.json();
  } catch {
    throw new Error("no answer: explore.py is not running any more");
  } finally {
    document.body.classList.toggle("waiting", --pending > 0);
  }
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

let forgetting = false;

async function act(name, body) {
  forgetting = name === "forget";
  // What was asked of a branch is answered before it goes, and nothing more is asked of it.
  while (forgetting && pending) await new Promise((resolve) => setTimeout(resolve, 20));
  say("computing…", true);
  const timer = setInterval(async () => {
    const { progress } = await request("progress");
    if (progress) say("computing: " + progress, true);
  }, 500);
  document.body.setAttribute("aria-busy", "true");
  try {
    const branch = show(await request("act/" + name, body));
    say("");
    return branch;
  } catch (error) {
    say(error.message);
    throw error;
  } finally {
    clearInterval(timer);
    forgetting = false;
    document.body.removeAttribute("aria-busy");
  }
}

function say(text, busy = false) {
  $("message").textContent = text;
  $("message").classList.toggle("busy", busy);
}

function show(answer) {
  state = answer;
  answers.clear();
  if (at.branch >= state.branches.length) at.branch = 0;
  $("branch").replaceChildren(...state.branches.map((one, n) => el("option", { value: n }, n + ": " + one.name)));
  return answer.branch;
}

// --- small parts --------------------------------------------------------------------------------------

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// What cannot be seen in a text is written out; the rest stays text, whatever it holds.
function visible(text) {
  if (/^ +$/.test(text)) return "␣".repeat(text.length);
  return text.replace(/[\u0000-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g, (c) =>
    c === "\n" ? "↵" : c === "\t" ? "⇥" : "\\u" + c.codePointAt(0).toString(16).padStart(4, "0")) || "∅";
}

const digits = (x) => (x === null || x === undefined ? "–" : Number.isInteger(x) && Math.abs(x) < 1e6 ? String(x) : Number(x).toPrecision(3));
const percent = (p) => (p >= 0.0005 ? (100 * p).toFixed(1) + "%" : p > 0 ? p.toExponential(0) : "0");
const current = () => state.branches[at.branch];
const served = () => Math.floor((at.head * current().K) / current().H);

function bytes(text) {
  const raw = atob(text);
  return Uint8Array.from(raw, (c) => c.charCodeAt(0));
}

function halves(value) {
  // float16 as it is written: sign, 5 bits of exponent, 10 of fraction.
  const raw = new Uint16Array(bytes(value.data).buffer);
  return Float32Array.from(raw, (h) => {
    const exponent = (h >> 10) & 31, fraction = h & 1023;
    const size = exponent === 0 ? fraction * 2 ** -24 : exponent === 31 ? (fraction ? NaN : Infinity) : (1 + fraction / 1024) * 2 ** (exponent - 15);
    return (h & 32768 ? -size : size) * value.factor;
  });
}

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim().split(/\s+/).map(Number);
}

let palette = null;
function colours() {
  if (palette) return palette;
  const probe = el("i");
  probe.style.color = "var(--ground)";
  document.body.append(probe);
  const ground = getComputedStyle(probe).color.match(/\d+/g).slice(0, 3).map(Number);
  probe.remove();
  palette = { ground, low: colour("--low"), high: colour("--high") };
  return palette;
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { palette = null; select({}); });

function mix(share) {
  const { ground, low, high } = colours();
  const to = share < 0 ? low : high, part = Math.min(Math.abs(share), 1);
  return ground.map((g, n) => Math.round(g + (to[n] - g) * part));
}

// One pixel for each number, drawn larger by CSS. `shares` are from -1 to 1.
function paint(canvas, shares, rows, columns, width, height) {
  canvas.width = columns;
  canvas.height = rows;
  canvas.style.width = width + "px";
  canvas.style.height = height + "px";
  const context = canvas.getContext("2d"), image = context.createImageData(columns, rows);
  for (let n = 0; n < rows * columns; n++) {
    const rgb = mix(n < shares.length ? shares[n] : 0);
    image.data.set([...rgb, 255], 4 * n);
  }
  context.putImageData(image, 0, 0);
}

function hover(node, words) {
  node.onpointermove = (event) => {
    const box = node.getBoundingClientRect();
    const text = words((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
    $("tip").hidden = !text;
    $("tip").textContent = text || "";
    $("tip").style.left = Math.min(event.clientX + 12, innerWidth - 220) + "px";
    $("tip").style.top = event.clientY + 14 + "px";
  };
  node.onpointerleave = () => { $("tip").hidden = true; };
}

// --- choosing -----------------------------------------------------------------------------------------

function select(changes) {
  Object.assign(at, changes);
  const one = current(), last = one.tokens.length - 1;
  at.token = Math.max(0, Math.min(at.token, last));
  at.layer = Math.max(0, Math.min(at.layer, one.L - 1));
  at.head = Math.max(0, Math.min(at.head, one.H - 1));
  at.key = Math.max(0, Math.min(at.key, at.token));
  remember();
  for (const name of ["branch", "token", "layer", "head", "key"]) $(name).value = at[name];
  $("token").max = last; $("layer").max = one.L - 1; $("head").max = one.H - 1; $("key").max = at.token;
  $("piece").textContent = visible(one.tokens[at.token].text || one.tokens[at.token].piece);
  $("served").textContent = `heads ${Math.floor(served() * one.H / one.K)} to ${Math.floor((served() + 1) * one.H / one.K) - 1} share KV head ${served()}`;
  $("save").href = `${BASE}saved?layer=${at.layer}&head=${at.head}`;
  turn += 1;
  draw();
}

// The address keeps what is chosen. Where it was changed from outside, that is read first (hashchange).
let written = location.hash;

function remember() {
  if (location.hash !== written) return;
  const chosen = Object.entries(at).filter(([, value]) => value !== null);
  try {
    history.replaceState(null, "", "#" + chosen.map(([name, value]) => name + "=" + value).join("&"));
  } catch {
    // A frame in a notebook has no address of its own.
  }
  written = location.hash;
}

function fromHash() {
  written = location.hash;
  for (const part of location.hash.slice(1).split("&")) {
    const [name, value] = part.split("=");
    if (name in at && /^\d{1,9}$/.test(value)) at[name] = Number(value);
  }
  if (at.branch >= state.branches.length) at.branch = 0;
}

const sections = {};
const inSight = new Set();
const dirty = new Set();

function draw() {
  for (const name of Object.keys(sections)) dirty.add(name);
  drawVisible();
}

async function drawVisible() {
  for (const name of [...inSight]) {
    if (forgetting || !dirty.delete(name)) continue;
    const mine = turn;
    try {
      await sections[name](() => mine === turn);
    } catch (error) {
      if (mine === turn) $(name).querySelector(".failed")?.remove(), $(name).append(el("p", { class: "failed note" }, error.message));
      continue;
    }
    $(name).querySelector(".failed")?.remove();
    // What is drawn now, for whoever waits for it.
    if (mine === turn) $(name).dataset.drawn = `${at.token} ${at.layer} ${at.head}`;
  }
}

const place = (...names) => {
  const query = { branch: at.branch };
  for (const name of names) query[name] = at[name];
  return query;
};

// --- the text -----------------------------------------------------------------------------------------

sections.text = async () => {
  const { tokens } = current();
  const buttons = tokens.map((token, n) => {
    const share = Math.min((token.surprise || 0) / 8, 1) * 0.75;
    const text = token.joined ? visible(token.text) : "·";
    const button = el("button", {
      type: "button", role: "option", "data-token": n, "aria-selected": n === at.token,
      class: (n === at.token ? "chosen" : "") + (token.joined === 0 ? " rest" : ""),
      title: `${n}: id ${token.id}` + (token.surprise === null ? "" : `, surprise ${digits(token.surprise)}`),
      onclick: () => select({ token: n }),
    }, text);
    button.style.background = `rgb(${mix(share).join(" ")})`;
    return button;
  });
  $("tokens").replaceChildren(...buttons);
  const token = tokens[at.token];
  let first = at.token;
  while (tokens[first].joined === 0 && first > 0) first -= 1;
  const facts = [
    ["id", token.id], ["piece", visible(token.piece)], ["bytes", token.bytes || "none"],
    ["characters", tokens[first].joined > 1 ? `${visible(tokens[first].text)} of ${tokens[first].joined} tokens` : visible(token.text)],
    ["surprise", token.surprise === null ? "the first token has none" : digits(token.surprise) + " nats"],
  ];
  $("about").replaceChildren(
    el("dl", {}, ...facts.flatMap(([name, value]) => [el("dt", {}, name), el("dd", { class: "mono", "data-fact": name }, String(value))])),
    el("div", {}, el("p", { class: "small" }, "What the model expects after it" + (OFFLINE ? "" : "; choose one to fork the text there")),
      el("table", {}, el("tbody", {}, ...token.next.map(([id, text, p]) => el("tr", {},
        el("td", { class: "mono" }, OFFLINE ? visible(text) : el("button", { type: "button", "data-fork": id, onclick: () => force(id) }, visible(text))),
        el("td", { class: "figure", "data-next": id }, percent(p)),
        el("td", {}, bar(p))))))));
};

function bar(share, width = 8) {
  const node = el("span", { class: "bar" });
  node.style.width = Math.max(share * width, 0) + "rem";
  return node;
}

// --- the code -----------------------------------------------------------------------------------------

let code = null;
const askCode = () => ask("code", { branch: at.branch, token: passStart(), layer: at.layer });

sections.code = async (fresh) => {
  const answer = await askCode();
  if (!fresh()) return;
  code = answer;
  $("steps").max = code.steps.length - 1;
  go(at.step ?? code.entered[at.layer] + 1);
};

function go(step) {
  at.step = Math.max(0, Math.min(step, code.steps.length - 1));
  remember();
  $("steps").value = at.step;
  $("count").textContent = `${at.step + 1} of ${code.steps.length}`;
  const now = code.steps[at.step], call = code.calls[now.call];
  const path = [];
  for (let one = call; one; one = one.caller === null ? null : code.calls[code.steps[one.caller].call]) path.unshift(one);
  $("where").replaceChildren(...path.flatMap((one, n) => [n ? " › " : "", el("button", { type: "button", onclick: () => go(n + 1 < path.length ? path[n + 1].caller : at.step) }, one.name)]),
    ` in ${call.file}`);
  // The latest step of this call at each line: of the loop's rounds the one that is reached.
  const latest = new Map();
  code.steps.forEach((step, n) => {
    if (step.call === now.call && (n <= at.step || !latest.has(step.line))) latest.set(step.line, n);
  });
  const rows = call.lines.map((text, n) => {
    const number = call.first + n, index = latest.get(number), ran = index !== undefined;
    const values = ran ? code.steps[index].values : [];
    return el("tr", {
      class: [ran && "ran", number === now.line && "now", ran && index > at.step && "later"].filter(Boolean).join(" "),
      "data-line": number, onclick: ran && !String(getSelection()) ? () => go(index) : null,
    }, el("td", { class: "n" }, String(number)), el("td", { class: "s" }, text), el("td", { class: "v" }, ...values.map(shownValue)));
  });
  $("source").replaceChildren(el("table", {}, el("tbody", {}, ...rows)));
  // Within its box alone: scrollIntoView would move the whole page away from what one looks at.
  const box = $("source"), seen = box.getBoundingClientRect(), row = box.querySelector(".now")?.getBoundingClientRect() ?? seen;
  if (row.top < seen.top || row.height > seen.height) box.scrollTop += row.top - seen.top;
  else if (row.bottom > seen.bottom) box.scrollTop += row.bottom - seen.bottom;
}

function shownValue(value) {
  const canvas = el("canvas", { role: "img", "aria-label": value.name }), stats = el("span", { class: "stats" });
  picture(canvas, value, stats);
  return el("span", { class: "value", "data-value": value.key }, el("b", {}, value.name),
    el("span", { class: "shape" }, value.axes.join(" ") + "  " + value.shape.join(" ")), canvas, stats);
}

const passStart = () => current().passes.find(([from, to]) => from <= at.token && at.token < to)[0];

// Values belong to a pass; only of a large one the chosen token's part is sent alone.
async function askValue(value) {
  const large = value.shape.reduce((product, n) => product * n, 1) > state.largest;
  const answer = await ask("value", { branch: at.branch, token: large ? at.token : passStart(), layer: at.layer, key: value.key });
  return answer.same ? SAVED[answer.same] : answer;
}

async function picture(canvas, value, stats) {
  const mine = turn;
  let answer;
  try {
    answer = await askValue(value);
  } catch {
    canvas.remove();
    return;
  }
  if (mine !== turn) return;
  if (stats) stats.textContent = `mean ${digits(answer.mean)}  rms ${digits(answer.rms)}  ${digits(answer.min)} to ${digits(answer.max)}`;
  const { numbers, rows, columns, axes } = slice(answer);
  const wide = rows === 1 ? Math.min(columns, 192) : columns, high = rows === 1 ? Math.ceil(columns / wide) : rows;
  const largest = numbers.reduce((most, x) => Math.max(most, Number.isFinite(x) ? Math.abs(x) : 0), 0) || 1;
  const scale = Math.max(Math.min(192 / wide, rows === 1 ? 8 : 4), 1);
  // By the root: a few large numbers would leave the others blank.
  const shade = (x) => (Number.isFinite(x) ? Math.sign(x) * Math.sqrt(Math.abs(x) / largest) : 0);
  paint(canvas, numbers.map(shade), high, wide, wide * scale, rows === 1 ? Math.max(high * 6, 12) : Math.min(high * scale, 64));
  hover(canvas, (x, y) => {
    const row = Math.min(Math.floor(y * high), high - 1), column = Math.min(Math.floor(x * wide), wide - 1), n = row * wide + column;
    if (n >= numbers.length) return "";
    const index = rows === 1 ? [n] : [row, column];
    return `${value.name}[${index.map((i, k) => axes[k] + " " + i).join(", ")}] = ${digits(numbers[n])}`;
  });
}

// The part of a value that belongs to the chosen token and head.
function slice(value) {
  const fixed = { B: 0, 1: 0, T: at.token - passStart(), H: at.head, K: served() };
  const numbers = halves(value), kept = [], names = [];
  let offset = 0, stride = numbers.length;
  value.shape.forEach((length, axis) => {
    stride /= length || 1;
    const name = value.axes[axis];
    if (name in fixed || length === 1) offset += (length === 1 ? 0 : Math.min(fixed[name], length - 1)) * stride;
    else kept.push([length, stride]), names.push(name);
  });
  if (!kept.length) kept.push([1, 1]), names.push("");
  const [rows, columns] = kept.length === 1 ? [[1, 0], kept[0]] : kept.slice(-2);
  const found = [];
  for (let r = 0; r < rows[0]; r++) for (let c = 0; c < columns[0]; c++) found.push(numbers[offset + r * rows[1] + c * columns[1]]);
  return { numbers: found, rows: rows[0], columns: columns[0], axes: kept.length === 1 ? names : names.slice(-2) };
}

function nextStep(wanted) {
  const now = code.steps[at.step];
  for (let n = at.step + 1; n < code.steps.length; n++) if (wanted(code.steps[n], n, now)) return n;
  return at.step;
}
function within(step, call) { // whether a step belongs to that call or to one that it made
  for (let one = code.calls[step.call]; one; one = one.caller === null ? null : code.calls[code.steps[one.caller].call]) if (one.index === call) return true;
  return false;
}
const moves = {
  back: () => go(at.step - 1),
  forward: () => go(at.step + 1),
  into: () => {
    const layer = code.enters.indexOf(at.step);
    if (layer >= 0 && layer !== at.layer) select({ layer, step: code.entered[layer] + 1 });
    else go(at.step + 1);
  },
  over: () => go(nextStep((step, n, now) => step.call === now.call || !within(step, now.call))),
  out: () => go(nextStep((step, n, now) => !within(step, now.call))),
};
for (const name of Object.keys(moves)) $(name).addEventListener("click", () => code && moves[name]());
$("steps").addEventListener("input", () => code && go(Number($("steps").value)));
$("source").addEventListener("keydown", (event) => {
  const name = { ArrowLeft: "back", ArrowRight: "forward", ArrowDown: "into", ArrowUp: "out", n: "over" }[event.key];
  if (!name || !code) return;
  event.preventDefault();
  moves[name]();
});

// --- attention ----------------------------------------------------------------------------------------

let sorted = ["induction", -1];
const CELL = 30, GAP = 8, LEFT = 34, TOP = 34;

sections.attention = async (fresh) => {
  const one = current(), all = await ask("heads", { branch: at.branch });
  if (!fresh()) return;
  grid(one, all);
  table(one, all);
  $("map-title").textContent = `Layer ${at.layer}, head ${at.head} (KV head ${served()})`;
  const [whole, row] = await Promise.all([ask("map", place("layer", "head")), askRow()]);
  if (!fresh()) return;
  map(one, whole);
  lookingAt(one, row);
  stages(await askCode(), fresh);
};

function column(one, head) { return LEFT + head * CELL + Math.floor((head * one.K) / one.H) * GAP; }

function grid(one, all) {
  const canvas = $("grid"), ratio = devicePixelRatio || 1;
  const width = column(one, one.H - 1) + CELL, height = TOP + one.L * CELL;
  canvas.width = width * ratio; canvas.height = height * ratio;
  canvas.style.width = width + "px"; canvas.style.height = height + "px";
  const context = canvas.getContext("2d"), style = getComputedStyle(document.body);
  context.scale(ratio, ratio);
  context.imageSmoothingEnabled = false;
  context.font = "11px " + style.fontFamily;
  context.fillStyle = style.getPropertyValue("--soft");
  context.textAlign = "center";
  for (let k = 0; k < one.K; k++) {
    const first = Math.ceil((k * one.H) / one.K), last = Math.ceil(((k + 1) * one.H) / one.K) - 1;
    context.fillText("KV " + k, (column(one, first) + column(one, last) + CELL) / 2, 11);
    context.fillRect(column(one, first), 14, column(one, last) + CELL - 2 - column(one, first), 2);
  }
  for (let head = 0; head < one.H; head++) context.fillText(head, column(one, head) + CELL / 2, 29);
  context.textAlign = "right";
  const piece = document.createElement("canvas");
  for (let layer = 0; layer < one.L; layer++) {
    context.fillStyle = style.getPropertyValue("--soft");
    context.fillText(layer, LEFT - 6, TOP + layer * CELL + CELL / 2 + 4);
    const maps = all.maps[layer];
    if (!maps) continue;
    const data = bytes(maps.data), size = maps.rows * all.columns;
    for (let head = 0; head < one.H; head++) {
      paint(piece, Array.from(data.subarray(head * size, (head + 1) * size), (x) => Math.sqrt(x / 255)), maps.rows, all.columns, 0, 0);
      context.drawImage(piece, column(one, head), TOP + layer * CELL, CELL - 2, CELL - 2);
    }
  }
  context.strokeStyle = style.getPropertyValue("--mark");
  context.lineWidth = 3;
  context.strokeRect(column(one, at.head) - 1, TOP + at.layer * CELL - 1, CELL, CELL);
  const find = (x, y) => {
    const layer = Math.floor((y * height - TOP) / CELL);
    const head = [...Array(one.H).keys()].find((h) => x * width >= column(one, h) && x * width < column(one, h) + CELL);
    return layer >= 0 && layer < one.L && head !== undefined ? { layer, head } : null;
  };
  hover(canvas, (x, y) => { const spot = find(x, y); return spot && `layer ${spot.layer}, head ${spot.head}`; });
  canvas.onclick = (event) => {
    const box = canvas.getBoundingClientRect(), spot = find((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
    if (spot) select(spot);
  };
}
$("grid").addEventListener("keydown", (event) => {
  const move = { ArrowLeft: { head: at.head - 1 }, ArrowRight: { head: at.head + 1 }, ArrowUp: { layer: at.layer - 1 }, ArrowDown: { layer: at.layer + 1 } }[event.key];
  if (move) event.preventDefault(), select(move);
});

// A file has exact weights of one layer; of the others the map's, which has steps of 1/255.
async function askRow() {
  const query = place("layer", "head", "token");
  if (!OFFLINE || "row?" + new URLSearchParams(query) in SAVED) return ask("row", query);
  const whole = await ask("map", place("layer", "head"));
  return whole && Array.from(bytes(whole.data).subarray(at.token * whole.tokens, at.token * whole.tokens + at.token + 1), (x) => x / 255);
}

function map(one, whole) {
  const canvas = $("map");
  if (!whole) {
    canvas.hidden = true;
    $("map-title").textContent += `: ${one.kernels[at.layer]} shows no pattern; a kernel that calls eager, not sdpa, does`;
    return;
  }
  canvas.hidden = false;
  const T = whole.tokens, data = bytes(whole.data), cell = Math.max(Math.min(360 / T, 18), 0.35) * 2 ** Number($("zoom").value);
  paint(canvas, Array.from(data, (x) => Math.sqrt(x / 255)), T, T, T * cell, T * cell);
  canvas.dataset.data = T;
  const cellAt = (x, y) => [Math.min(Math.floor(y * T), T - 1), Math.min(Math.floor(x * T), T - 1)];
  hover(canvas, (x, y) => {
    const [q, k] = cellAt(x, y);
    return k > q ? `query ${q} cannot see key ${k}` : `${q} ${visible(one.tokens[q].text)} → ${k} ${visible(one.tokens[k].text)}: ${percent(data[q * T + k] / 255)}`;
  });
  canvas.onclick = (event) => {
    const box = canvas.getBoundingClientRect(), [q, k] = cellAt((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
    select({ token: q, key: k });
  };
}
$("zoom").addEventListener("input", () => { dirty.add("attention"); drawVisible(); });

function lookingAt(one, row) {
  if (!row) return $("row").replaceChildren("–");
  const order = row.map((p, n) => [p, n]).sort((a, b) => b[0] - a[0]).slice(0, 24).sort((a, b) => a[1] - b[1]);
  $("row").replaceChildren(el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Weights" }, el("table", {}, el("tbody", {},
    ...order.map(([p, n]) => el("tr", {}, el("td", { class: "figure" }, String(n)), el("td", { class: "mono" }, visible(one.tokens[n].text || "·")),
      el("td", { class: "figure", "data-weight": n, "data-exact": p }, percent(p)), el("td", {}, bar(p, 10))))))),
    order.length < row.length ? el("p", { class: "small" }, `the ${order.length} largest of ${row.length}`) : "");
}

function stages(answer, fresh) {
  if (!fresh()) return;
  const rows = [];
  for (const step of answer.steps) for (const value of step.values) {
    if (value.axes.join("") !== "BHTS" || value.name === "return") continue;
    const canvas = el("canvas", { role: "img", "aria-label": value.name });
    rows.push(el("p", {}, el("b", {}, value.name), ` in ${answer.calls[step.call].name}`, canvas));
    picture(canvas, value);
  }
  $("stages").replaceChildren(...rows, rows.length ? "" : "this kernel shows none");
}

function table(one, all) {
  const names = ["entropy", "distance", "sink", "previous", "induction"];
  const rows = [];
  for (let layer = 0; layer < one.L; layer++) for (let head = 0; head < one.H; head++) {
    if (!all.scores.entropy[layer]) continue;
    rows.push({ layer, head, kv: Math.floor((head * one.K) / one.H), ...Object.fromEntries(names.map((name) => [name, all.scores[name][layer][head]])) });
  }
  const [by, direction] = sorted;
  rows.sort((a, b) => direction * (a[by] - b[by]));
  const heading = (name) => el("th", { class: "figure", scope: "col", "aria-sort": name === by ? (direction > 0 ? "ascending" : "descending") : "none" },
    el("button", { type: "button", onclick: () => { sorted = [name, name === by ? -direction : -1]; table(one, all); } }, name + (name === by ? (direction > 0 ? " ↑" : " ↓") : "")));
  const all_names = ["layer", "head", "kv", ...names];
  $("heads").replaceChildren(el("table", { class: "nameless" }, el("thead", {}, el("tr", {}, ...all_names.map(heading), el("th"))),
    el("tbody", {}, ...rows.slice(0, 12).map((row) => el("tr", {}, ...all_names.map((name) => el("td", { class: "figure", "data-score": name }, digits(row[name]))),
      el("td", {}, el("button", { type: "button", onclick: () => select({ layer: row.layer, head: row.head }) }, "show")))))));
}

// --- positions ----------------------------------------------------------------------------------------

sections.positions = async (fresh) => {
  const one = current(), rope = await ask("rope", place("layer", "head", "token", "key"));
  if (!fresh()) return;
  at.pair = Math.min(at.pair, rope.frequencies.length - 1);
  const pair = at.pair, [q, k] = [rope.query[pair], rope.key[pair]], size = Math.max(Math.hypot(...q), Math.hypot(...k)) || 1;
  const arrow = ([x, y], kind) => svg("line", { x1: 110, y1: 110, x2: 110 + (x / size) * 95, y2: 110 - (y / size) * 95, class: kind });
  const turns = (2 * Math.PI) / rope.frequencies[pair];
  $("pair-title").textContent = `Pair ${pair}: dimensions ${pair} and ${pair + rope.frequencies.length}; one turn takes ${digits(turns)} tokens`;
  $("circle").replaceChildren(svg("svg", { viewBox: "0 0 220 220", width: 220, role: "img" }, svg("circle", { cx: 110, cy: 110, r: 95, class: "axis" }), arrow(q, "high"), arrow(k, "low")),
    el("p", { class: "small" }, `query ${at.token} (orange) and key ${at.key} (blue), after they were turned by ${digits(at.token * rope.frequencies[pair])} and ${digits(at.key * rope.frequencies[pair])} radians`));
  const canvas = $("pairs"), largest = Math.max(...rope.adds.map(Math.abs)) || 1;
  paint(canvas, rope.adds.map((x) => x / largest), 1, rope.adds.length, Math.min(rope.adds.length * 12, 420), 28);
  hover(canvas, (x) => { const n = Math.min(Math.floor(x * rope.adds.length), rope.adds.length - 1); return `pair ${n}: ${digits(rope.adds[n])}`; });
  canvas.onclick = (event) => { const box = canvas.getBoundingClientRect(); select({ pair: Math.floor(((event.clientX - box.left) / box.width) * rope.adds.length) }); };
  const points = rope.by_distance, low = Math.min(...points), high = Math.max(...points), span = high - low || 1;
  const x = (n) => 30 + (n / Math.max(points.length - 1, 1)) * 380, y = (value) => 120 - ((value - low) / span) * 105;
  const distance = at.token - at.key;
  $("distance").replaceChildren(svg("svg", { viewBox: "0 0 430 140", width: 430, role: "img" },
    svg("path", { class: "axis", d: `M30 ${y(0)}H410` }),
    svg("path", { class: "curve", d: "M" + points.map((value, n) => `${x(n).toFixed(1)} ${y(value).toFixed(1)}`).join("L") }),
    svg("circle", { class: "at", cx: x(distance), cy: y(points[distance]), r: 4 }),
    svg("text", { x: 30, y: 137, class: "right" }, "0"), svg("text", { x: 410, y: 137, class: "left" }, `${points.length - 1} tokens apart`)),
    el("p", { class: "small" }, el("span", { "data-fact": "score" }, digits(rope.score)), ` at their distance of ${distance}, before the mask and the softmax`));
};
$("pairs").addEventListener("keydown", (event) => {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (by) event.preventDefault(), select({ pair: Math.max(at.pair + by, 0) });
});

// --- the residual stream ------------------------------------------------------------------------------

sections.stream = async (fresh) => {
  const one = current();
  const target = at.target ?? one.tokens[at.token].next[0][0];
  const [lens, parts, neurons] = await Promise.all([ask("lens", place("token")), ask("attribution", { ...place("token"), target }), ask("neurons", place("layer", "token"))]);
  if (!fresh()) return;
  $("lens").replaceChildren(el("table", {}, el("thead", {}, el("tr", {}, ...["after", "norm", "top words"].map((name) => el("th", { scope: "col" }, name)))),
    el("tbody", {}, ...lens.map((row) => el("tr", {}, el("th", { scope: "row" }, row.stage), el("td", { class: "figure", "data-norm": row.stage }, digits(row.norm)),
      el("td", { class: "words mono" }, ...row.words.map(([id, text, p]) => {
        const word = el("span", { "data-word": id }, visible(text), el("i", {}, percent(p)));
        word.style.background = `rgb(${mix(p * 0.6).join(" ")})`;
        return word;
      })))))));
  const name = visible(one.tokens[at.token].next.find(([id]) => id === target)?.[1] ?? String(target));
  $("attribution-title").textContent = `What each head and MLP adds to the logit of ${name}`;
  const values = parts.heads.flatMap((heads, layer) => [...heads, parts.mlps[layer]]), columns = one.H + 1;
  const largest = Math.max(...values.map(Math.abs)) || 1;
  paint($("attribution"), values.map((value) => value / largest), one.L, columns, columns * 16, one.L * 12);
  hover($("attribution"), (x, y) => {
    const head = Math.min(Math.floor(x * columns), columns - 1), layer = Math.min(Math.floor(y * one.L), one.L - 1);
    return `layer ${layer}, ${head < one.H ? "head " + head : "MLP"}: ${digits(values[layer * columns + head])}`;
  });
  const sum = (list) => list.reduce((total, x) => total + x, 0);
  $("attribution-sum").textContent = `rows are layers, columns heads, the last one the MLP. Logit ${digits(parts.logit)} = embedding ${digits(parts.embedding)} + heads ${digits(sum(parts.heads.flat()))} + MLPs ${digits(sum(parts.mlps))} + rounding ${parts.rest.toExponential(1)}`;
  $("neurons").replaceChildren(el("table", {}, el("thead", {}, el("tr", {}, ...["neuron", "value", "words it pushes"].map((one) => el("th", { scope: "col" }, one)))),
    el("tbody", {}, ...neurons.map((row) => el("tr", {}, el("td", { class: "figure" }, String(row.neuron)), el("td", { class: "figure" }, digits(row.value)), el("td", { class: "words mono" }, ...row.words.map((word) => el("span", {}, visible(word)))))))));
};

// --- decoding -----------------------------------------------------------------------------------------

const settings = () => Object.fromEntries(new FormData($("settings")));

sections.decoding = async (fresh) => {
  const [choice, slots] = await Promise.all([ask("choice", { ...place("token"), ...settings() }), ask("cache", place("token"))]);
  if (!fresh()) return;
  const names = ["logit", "penalised", "scaled", "top_k", "top_p", "p", "arrival"];
  const titles = { logit: "logit", penalised: "after penalty", scaled: "÷ temperature", top_k: "top-k", top_p: "top-p", p: "probability", arrival: "arrives at" };
  $("choice").replaceChildren(el("table", {}, el("caption", {}, choice.greedy ? "greedy: the largest logit wins" : `${choice.kept} ${choice.kept === 1 ? "candidate is" : "candidates are"} left; the first to arrive is chosen, after a random time with mean 1/p`),
    el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "after this token"), ...names.map((name) => el("th", { class: "figure", scope: "col" }, titles[name])), el("th"))),
    el("tbody", {}, ...choice.candidates.map((row) => el("tr", {}, el("th", { scope: "row", class: "mono" }, visible(row.text)),
      ...names.map((name) => el("td", { class: "figure" + (name === "arrival" && row.id === choice.drawn ? " chosen" : ""), "data-choice": name }, name === "p" ? percent(row.p) : row[name] === null ? "out" : digits(row[name]))),
      el("td", {}, row.id === choice.drawn ? el("strong", { "data-drawn": row.id }, "chosen ") : "", OFFLINE ? "" : el("button", { type: "button", onclick: () => force(row.id) }, "fork")))))));
  const shares = Array.from({ length: slots.slots }, (_, n) => (n >= slots.written[0] && n < slots.written[1] ? 1 : n < slots.read ? -0.6 : -0.08));
  const width = Math.min(slots.slots * 6, $("decoding").clientWidth - 4);
  paint($("cache"), shares, 1, slots.slots, width, 22);
  hover($("cache"), (x) => { const n = Math.floor(x * slots.slots); return n < slots.read ? `slot ${n + 1}: ${visible(current().tokens[n]?.text || "·")}` : `slot ${n + 1}: free`; });
  const kb = (n) => (n >= 1e6 ? (n / 1e6).toFixed(1) + " MB" : Math.round(n / 1e3) + " kB");
  $("cache-text").textContent = `This pass wrote ${slots.written[1] - slots.written[0]} slots (orange, ${kb(slots.bytes_written)}) and read ${slots.read} (blue and orange, ${kb(slots.bytes_read)}); ${slots.slots - slots.read} are free. A token takes ${kb(slots.bytes_per_slot)} in all layers.`;
};
$("settings").addEventListener("input", () => { dirty.add("decoding"); drawVisible(); });
$("settings").addEventListener("submit", (event) => event.preventDefault());

$("beside").addEventListener("submit", async (event) => {
  event.preventDefault();
  const answer = await ask("batch", { branch: at.branch, text: $("beside").text.value }).catch((error) => say(error.message));
  if (!answer) return;
  say("");
  const columns = answer.rows[0].positions.length;
  const cells = (name, values, kinds) => el("tr", {}, el("th", { scope: "row" }, name), ...values.map((value, n) => el("td", { class: "figure " + kinds(n) }, String(value))));
  $("rows").replaceChildren(el("table", { class: "slots" }, ...answer.rows.map((row, number) => {
    const padding = columns - row.tokens.length, word = (n) => visible(row.tokens[n] || "·");
    const pad = (n) => (n < padding ? "pad" : "");
    const held = (n) => (n === 0 ? (row.written[0] ? "padding" : "") : row.written[n] ? word(n - 1) : "");
    return el("tbody", { "data-row": number },
      cells(`row ${number} reads`, row.positions.map((_, n) => (n < padding ? "pad" : word(n - padding))), pad),
      cells("position", row.positions, pad),
      cells("its slot", row.positions.map((position) => position + 1), pad),
      cells("slots 0 to " + columns, row.written.map((_, n) => held(n)), (n) => (n > 0 && row.visible[n - 1] ? "read" : "pad")));
  })));
  $("batch-text").textContent = answer.rows.map((row, number) => `Row ${number} goes on with ‘${visible(row.next[1])}’ (${percent(row.next[2])}).`).join(" ")
    + ` Coloured slots are what the last query of a row may look at; padding is written to slot 0, which nothing reads. Row 0's logits are at most ${digits(answer.apart)} from those without the other text.`;
});

async function step(count) {
  for (let n = 0; n < count; n++) {
    const last = current().tokens.length - 1;
    if (current().tokens.length && settings()) await act("step", { branch: at.branch, token: last, ...settings() });
    select({ token: current().tokens.length - 1 });
  }
}
$("step").addEventListener("click", () => step(1).catch(() => {}));
$("ten").addEventListener("click", () => step(10).catch(() => {}));

// --- forks --------------------------------------------------------------------------------------------

async function force(id) {
  const branch = await act("fork", { branch: at.branch, kind: "token", token: at.token, id });
  select({ branch, token: at.token + 1 });
}

$("fork").addEventListener("change", () => {
  const kind = $("fork").kind.value;
  $("kernel-choice").hidden = !kind.startsWith("kernel");
  $("patch-choice").hidden = kind !== "patch";
});
$("fork").addEventListener("submit", async (event) => {
  event.preventDefault();
  const { kind, kernel, text, part, from } = Object.fromEntries(new FormData($("fork"))), one = current();
  const group = [...Array(one.H).keys()].filter((head) => Math.floor((head * one.K) / one.H) === served());
  const body = { branch: at.branch, kind, layer: at.layer, token: at.token, kernel, text, part };
  if (from) body.from = Number(from);
  if (kind === "heads" || kind === "kernel-head" || (kind === "patch" && part === "head")) body.heads = [at.head];
  if (kind === "group") body.heads = group;
  body.kind = { group: "heads", "kernel-head": "kernel" }[kind] || kind;
  const branch = await act("fork", body).catch(() => null);
  if (branch !== null) select({ branch });
});

sections.forks = async (fresh) => {
  $("branches").replaceChildren(...state.branches.map((one, n) => el("details", { open: n === at.branch && n > 0, "data-branch": n }, el("summary", {}, `${n}: ${one.name}`),
    el("pre", { "data-python": n }, one.python), el("div", { class: "buttons" },
      el("button", { type: "button", onclick: () => select({ branch: n }) }, "show"),
      el("button", { type: "button", onclick: async () => { await navigator.clipboard.writeText(one.python); say("copied", true); } }, "Copy as Python"),
      n && !OFFLINE ? el("button", { type: "button", onclick: async () => { const branch = await act("forget", { branch: n }).catch(() => null); if (branch !== null) select({ branch }); } }, "forget") : ""))));
  const one = current();
  if (one.parent === null) return $("compare").replaceChildren();
  const answer = await ask("compare", { branch: at.branch, parent: one.parent });
  if (!fresh()) return;
  const other = state.branches[one.parent];
  const text = (branch) => el("p", { class: "mono" }, ...branch.tokens.map((token, n) => el("span", { class: n >= answer.common ? "diff" : "" }, visible(token.text || ""))));
  const strip = (values, label) => {
    const canvas = el("canvas", { role: "img", "aria-label": label }), largest = Math.max(...values, 1e-12);
    paint(canvas, values.map((value) => value / largest), 1, Math.max(values.length, 1), Math.min(values.length * 12, 600), 20);
    hover(canvas, (x) => { const n = Math.min(Math.floor(x * values.length), values.length - 1); return `${n}: ${digits(values[n])}`; });
    return el("figure", {}, el("figcaption", {}, label), canvas);
  };
  $("compare").replaceChildren(el("h3", {}, `${at.branch}: ${one.name}, beside ${one.parent}: ${other.name}`), el("div", { class: "two" }, text(other), text(one)),
    el("table", {}, el("caption", {}, "The next token at each end"), el("thead", {}, el("tr", {}, el("th"), el("th", { class: "figure", scope: "col" }, other.name), el("th", { class: "figure", scope: "col" }, one.name))),
      el("tbody", {}, ...answer.next.map(([id, word, p, q]) => el("tr", {}, el("th", { scope: "row", class: "mono" }, visible(word)), el("td", { class: "figure", "data-before": id }, percent(p)), el("td", { class: "figure", "data-after": id }, percent(q)))))),
    strip(answer.kl, `KL of the next token at tokens ${answer.start} to ${answer.common - 1}, in nats; the last ${digits(answer.kl.at(-1))}`),
    strip(answer.stream, "How far the streams are apart after the embedding and each layer, relative to the first"));
};

// --- beginning ----------------------------------------------------------------------------------------

$("branch").addEventListener("change", () => select({ branch: Number($("branch").value) }));
for (const name of ["token", "layer", "head", "key"]) $(name).addEventListener("change", () => select({ [name]: Number($(name).value) || 0 }));
$("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  await act("text", { text: $("prompt").value }).then(() => select({ branch: 0, token: Infinity, key: 0, step: null }), () => {});
});
addEventListener("hashchange", () => { fromHash(); select({}); });

async function unpacked(text) {
  const stream = new Blob([bytes(text)]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

(async () => {
  try {
    if (OFFLINE) SAVED = await unpacked($("saved").textContent);
    show(await ask("state", {}));
  } catch (error) {
    return say(error.message);
  }
  const one = state.branches[0];
  at.token = one.tokens.length - 1;
  at.layer = Math.floor(one.L / 2);
  fromHash();
  $("model").textContent = `${one.model}: ${one.parameters.toLocaleString("en")} parameters, ${one.L} layers, ${one.H} query heads over ${one.K} KV heads of ${one.D}, attention by ${[...new Set(one.kernels)].join(" and ")}`;
  $("ask").hidden = OFFLINE;
  for (const id of ["step", "ten", "fork", "batch"]) $(id).classList.toggle("offline", OFFLINE);
  $("prompt").value = one.tokens.slice(0, one.passes[0][1]).map((token) => token.text).join("");
  $("fork").kernel.replaceChildren(...state.kernel_names.map((name) => el("option", {}, name)));
  const observer = new IntersectionObserver((entries) => {
    for (const entry of entries) entry.isIntersecting ? inSight.add(entry.target.id) : inSight.delete(entry.target.id);
    drawVisible();
  }, { rootMargin: "300px" });
  for (const name of Object.keys(sections)) observer.observe($(name));
  select({});
})();
