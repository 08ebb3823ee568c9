// What the controls of "Ask the model" do. The model itself runs in worker.js.
// No module: from file:// a browser refuses those, and then nothing could say why the model can't be loaded.
(() => {
const here = document.currentScript.src;
const root = document.querySelector("#ask");
const get = (name) => root.querySelector(`[data-part="${name}"]`);
const shown = (x, digits = 2) => (x > 0 ? "+" : x < 0 ? "−" : "") + Math.abs(x).toFixed(digits);
const percent = (x) => `${(100 * x).toFixed(x > 0.01 && x < 0.99 ? 0 : 1)} %`;
const later = (work, ms) => { let timer; return () => { clearTimeout(timer); timer = setTimeout(work, ms); }; };

// --- the worker --------------------------------------------------------------------------------------
let worker, settings, count = 0;
const open = new Map();
function ask(kind, about = {}, said = () => {}) {
  worker ??= start();
  return new Promise((good, bad) => {
    open.set(++count, { good, bad, said });
    worker.postMessage({ id: count, kind, about });
  });
}
function start() {
  const made = new Worker(new URL("worker.js", here), { type: "module" });
  const failed = (words) => { for (const { bad } of open.values()) bad(new Error(words)); open.clear(); };
  made.onerror = (event) => failed(event.message || "The worker could not be started.");
  made.onmessage = ({ data: { id, value, error, part } }) => {
    const waiting = open.get(id);
    if (part !== undefined) return waiting.said(part);
    open.delete(id);
    error === undefined ? waiting.good(value) : waiting.bad(new Error(error));
  };
  return made;
}
root.ask = ask; // for tests, and for whoever opens the console

// --- loading -----------------------------------------------------------------------------------------
const state = { off: new Set(), plain: null, last: null, at: null };
const say = (words, wrong = false) => { get("status").textContent = words; get("status").classList.toggle("error", wrong); };

if (location.protocol === "file:") {
  get("load").disabled = true;
  say("This page needs a server, because a browser reads no model from a file. Run `glassbox serve` on the site's folder "
    + "(or `python -m http.server --bind 127.0.0.1` inside it) and open the address that it prints. All other pages work from here.", true);
}

get("load").addEventListener("click", async () => {
  get("load").disabled = true;
  get("progress").hidden = false;
  const clock = performance.now();
  say("Reading the model …");
  try {
    const found = await ask("load", {}, (part) => {
      get("progress").value = part;
      if (part === 1) say("Preparing the model …");
    });
    settings = found.settings;
    prepare();
    get("progress").hidden = true;
    get("load").hidden = true;
    root.dataset.state = "ready";
    for (const part of root.querySelectorAll("fieldset[disabled]")) part.disabled = false;
    const seconds = (performance.now() - clock) / 1000;
    root.dataset.seconds = seconds.toFixed(1);
    say(`The model was loaded in ${seconds.toFixed(1)} seconds (${found.threads} thread${found.threads > 1 ? "s" : ""}). Nothing that you type leaves this computer.`);
    await decide();
  } catch (error) {
    get("progress").hidden = true;
    get("load").disabled = false;
    say(`The model could not be loaded: ${error.message}`, true);
  }
});

// --- the application ---------------------------------------------------------------------------------
const field = (name) => root.querySelector(`[name="${name}"]`);

function prepare() {
  const options = (list) => list.map((x) => Object.assign(document.createElement("option"), { value: x, textContent: x }));
  field("layout").replaceChildren(...options(Object.keys(settings.templates)));
  field("layout").value = settings.layout;
  for (const name of ["occupation", "history", "purpose", "district"]) field(name).replaceChildren(...options(settings.words[name]));
  root.querySelector("#ask-names").replaceChildren(...Object.keys(settings.names).map((x) => Object.assign(document.createElement("option"), { value: x })));
  for (const [name, [low, high]] of Object.entries(settings.ranges)) Object.assign(field(name), { min: low, max: high });
  fill(settings.people[0]);
  drawGrid();
}
function fill(person) { for (const [name, value] of Object.entries(person)) field(name).value = value; }

/** The application, or null after saying which field is wrong. */
function application() {
  const person = {};
  for (const name of settings.fields) {
    const input = field(name), value = input.value.trim(), range = settings.ranges[name];
    const fine = range ? /^\d+$/.test(value) && value >= range[0] && value <= range[1] : /^[\p{L}\p{M}' ’.-]{1,40}$/u.test(value);
    input.setAttribute("aria-invalid", String(!fine));
    if (!fine) {
      const allowed = range ? `a whole number from ${range[0]} to ${range[1]}` : "1 to 40 letters";
      get("wrong").textContent = `${input.labels[0].firstChild.textContent.trim()} is “${value}”. Allowed: ${allowed}. The decision below is of the last complete application.`;
      return null;
    }
    person[name] = range ? Number(value) : value;
  }
  const outside = settings.fields.filter((name) => {
    const range = settings.trained[name], words = name === "name" ? Object.keys(settings.names) : settings.words[name];
    return range ? person[name] < range[0] || person[name] > range[1] : !words.includes(person[name]);
  });
  get("wrong").textContent = outside.length ? `The model never saw such a value in training: ${outside.join(", ").replace("_", " ")}.` : "";
  return person;
}

/** The application in words, and where each field stands in them. */
function written(person) {
  let text = "";
  const spans = {};
  for (const [i, piece] of settings.templates[field("layout").value].split(/\{(\w+)\}/).entries()) {
    if (i % 2) spans[piece] = [text.length, text.length + String(person[piece]).length];
    text += i % 2 ? person[piece] : piece;
  }
  return { text, spans };
}

function merit(person) {
  let points = 0;
  for (const { field: name, points: worth, equals, at_least, at_most } of settings.merit.points) {
    const x = person[name];
    if (equals !== null ? x === equals : (at_least === null || x >= at_least) && (at_most === null || x <= at_most)) points += worth;
  }
  return points >= settings.merit.threshold;
}

const pairs = () => [...state.off].map((key) => key.split(".").map(Number));
const chosen = (name) => root.querySelector(`[name="${name}"]:checked`).value;
const asked = (text, off = pairs()) => ({
  text, off, officer: Number(chosen("who") === "officer"), edit: chosen("edit"), fill: field("fill").value,
});

async function decide() {
  const person = application();
  if (!person) return;
  const { text, spans } = written(person);
  root.setAttribute("aria-busy", "true");
  try {
    const found = await ask("decide", asked(text));
    state.last = { ...found, text, spans, person };
    showDecision();
    showHeads();
    showLayers();
  } catch (error) {
    say(`The model stopped: ${error.message}`, true);
  }
  root.removeAttribute("aria-busy");
}
const soon = later(decide, 250);

function showDecision() {
  const { difference, share, person, ms } = state.last;
  const p = 1 / (1 + Math.exp(-difference)), decides = share >= settings.least_share;
  get("verdict").textContent = !decides ? "The model does not decide" : difference > 0 ? "Approved" : "Rejected";
  get("verdict").dataset.difference = difference;
  get("marker").style.left = `${100 * p}%`;
  const before = state.plain?.key === key() ? ` Without the switches below: ${shown(state.plain.difference)}.` : "";
  get("numbers").textContent = (decides
    ? `${shown(difference)} logits for “approved” over “rejected”: ${percent(p)} of the two answers' probability.`
    : `The two answers have ${percent(share)} of the probability together, so their difference says nothing (at least ${percent(settings.least_share)} is needed).`) + before;
  get("merit").textContent = `The merit rule, which the clerk should have followed: ${merit(person) ? "approved" : "rejected"}. Computed in ${(ms / 1000).toFixed(1)} s.`;
  if (!state.off.size && chosen("edit") === "off") state.plain = { key: key(), difference };
}
const key = () => JSON.stringify([state.last.text, chosen("who")]);

get("application").addEventListener("input", soon);
for (const input of root.querySelectorAll('[name="who"], [name="edit"], [name="fill"]')) input.addEventListener("change", soon);
get("draw").addEventListener("click", () => {
  state.person = ((state.person ?? 0) + 1) % settings.people.length;
  fill(settings.people[state.person]);
  decide();
});
get("names").addEventListener("click", async () => {
  const person = application();
  if (!person) return;
  const other = settings.names[person.name];
  if (!other) return (get("named").textContent = `${person.name} is in none of the lists of names, so the name of the other gender is not known.`);
  const [own, swapped, same] = await Promise.all([person.name, ...other].map((name) =>
    ask("decide", asked(written({ ...person, name }).text)).then((r) => r.difference)));
  get("named").textContent = `${other[0]} (the other gender's name) instead of ${person.name}: ${shown(swapped - own)} logits. `
    + `Control, ${other[1]} (another name of the same group): ${shown(same - own)} logits.`
    + (Math.abs(swapped - own) > Math.abs(same - own) ? "" : " The control moved the decision as much: for this application the name's gender is not shown to matter.");
});

// --- heads -------------------------------------------------------------------------------------------
function drawGrid() {
  const { layers, heads } = settings.shape, grid = get("grid");
  grid.style.setProperty("--heads", heads);
  grid.replaceChildren();
  for (let layer = 0; layer < layers; layer++) {
    grid.append(Object.assign(document.createElement("span"), { textContent: layer, ariaHidden: "true" }));
    for (let head = 0; head < heads; head++) {
      const button = Object.assign(document.createElement("button"), { type: "button", tabIndex: layer || head ? -1 : 0 });
      button.dataset.at = `${layer}.${head}`;
      button.setAttribute("aria-pressed", "false");
      button.addEventListener("click", () => toggle(`${layer}.${head}`));
      button.addEventListener("focus", () => { state.at = [layer, head]; showTokens(); });
      button.addEventListener("mouseenter", () => showTokens([layer, head]));
      grid.append(button);
    }
  }
  // one stop of the tab key; arrows move inside
  grid.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!step) return;
    event.preventDefault();
    const [layer, head] = event.target.dataset.at.split(".").map(Number), next = [(layer + step[0] + layers) % layers, (head + step[1] + heads) % heads];
    const [from, to] = [[layer, head], next].map((x) => grid.querySelector(`[data-at="${x.join(".")}"]`));
    from.tabIndex = -1;
    to.tabIndex = 0;
    to.focus();
  });
}
function toggle(at) {
  state.off.has(at) ? state.off.delete(at) : state.off.add(at);
  get("measured").textContent = "";
  mark();
  decide();
}
function mark() {
  for (const button of get("grid").querySelectorAll("button")) button.setAttribute("aria-pressed", String(state.off.has(button.dataset.at)));
  const list = [...state.off];
  get("off").textContent = list.length ? `Switched off: ${list.join(", ")}.` : "All heads are on.";
  get("control").disabled = list.length !== 1;
}
get("on").addEventListener("click", () => { state.off.clear(); get("measured").textContent = ""; mark(); decide(); });

const weights = ([layer, head]) => {
  const { attention, ids } = state.last, n = ids.length, i = layer * settings.shape.heads + head;
  return attention.slice(i * n, (i + 1) * n);
};
/** How much a head looks from the decision at a field's tokens. */
function toField(at, name) {
  const { starts, spans } = state.last, [from, to] = spans[name] ?? [0, 0];
  return weights(at).slice(1).reduce((sum, w, i) => sum + (starts[i] < to && starts[i + 1] > from ? w : 0), 0);
}
function showHeads() {
  const name = field("look").value, buttons = get("grid").querySelectorAll("button");
  const places = [...buttons].map((button) => button.dataset.at.split(".").map(Number));
  state.at ??= places.reduce((a, b) => (toField(b, name) > toField(a, name) ? b : a)); // the head that looks there most
  for (const [i, button] of buttons.entries()) {
    const at = places[i], w = toField(at, name);
    button.tabIndex = String(at) === String(state.at) ? 0 : -1;
    button.style.setProperty("--shade", w.toFixed(3));
    button.setAttribute("aria-label", `Layer ${at[0]}, head ${at[1]}: ${percent(w)} of its attention goes to ${field("look").selectedOptions[0].text}`);
  }
  mark();
  showTokens();
}
function showTokens(at = state.at) {
  if (!state.last) return;
  const { text, starts } = state.last, w = weights(at);
  get("head").textContent = `Layer ${at[0]}, head ${at[1]}, looking back from the end of the text. ${percent(w[0])} of its attention goes to the sign that begins every text.`;
  get("tokens").replaceChildren(...w.slice(1).map((x, i) => {
    const span = document.createElement("span");
    span.textContent = text.slice(starts[i], starts[i + 1]);
    span.title = percent(x);
    span.style.setProperty("--shade", x.toFixed(3));
    return span;
  }));
}
field("look").addEventListener("change", () => state.last && showHeads());

get("control").addEventListener("click", async () => {
  const [at] = pairs(), { text } = state.last, button = get("control");
  button.disabled = true;
  const run = (off) => ask("decide", asked(text, off)).then((r) => r.difference);
  const none = await run([]), own = (await run([at])) - none, others = [];
  for (let head = 0; head < settings.shape.heads; head++) {
    if (head === at[1]) continue;
    get("measured").textContent = `Measuring the other heads of layer ${at[0]}: ${others.length + 1} of ${settings.shape.heads - 1} …`;
    others.push((await run([[at[0], head]])) - none);
  }
  const larger = others.filter((x) => Math.abs(x) >= Math.abs(own)).length;
  get("measured").textContent = `Without head ${at.join(".")}: ${shown(own)} logits. Control, each other head of layer ${at[0]} alone: ${others.map((x) => shown(x)).join(", ")}. `
    + (larger ? `${larger} of ${others.length} move this decision as much: nothing sets this head apart.` : "None moves this decision as much.")
    + " One application, and a head that you chose by looking.";
  mark();
});

// --- layers ------------------------------------------------------------------------------------------
function showLayers() {
  const { lens } = state.last, most = Math.max(...lens.map(Math.abs), 0.1);
  const width = get("layers").clientWidth || 600, height = 150, step = (width - 40) / lens.length; // letters keep their size
  const bars = lens.map((x, i) => {
    const tall = (Math.abs(x) / most) * 60;
    return `<rect class="bar${x < 0 ? " minus" : ""}" x="${(38 + i * step).toFixed(1)}" width="${(step - 2).toFixed(1)}" y="${(x > 0 ? 70 - tall : 70).toFixed(1)}" height="${tall.toFixed(1)}"/>`;
  });
  const labels = lens.map((_, i) => (i % 5 ? "" : `<text x="${(38 + i * step + step / 2).toFixed(1)}" y="146" text-anchor="middle">${i || "words"}</text>`));
  get("layers").innerHTML = `<svg viewBox="0 0 ${width} ${height}" role="img" aria-label="Approved over rejected after each layer, in logits. `
    + `After the last: ${shown(lens.at(-1))}. Largest: ${shown(lens.reduce((a, b) => (Math.abs(b) > Math.abs(a) ? b : a)))}.">`
    + `<line x1="36" x2="${width}" y1="70" y2="70"/><text x="0" y="14">${shown(most, 1)}</text><text x="0" y="74">0</text><text x="0" y="132">${shown(-most, 1)}</text>${bars.join("")}${labels.join("")}</svg>`;
}

// --- tone --------------------------------------------------------------------------------------------
const dialled = () => Number(field("dial").value);
const turned = () => {
  const words = dialled() ? `${shown(dialled())} of a full turn` : "0, the model as it is";
  get("turn").textContent = words;
  field("dial").setAttribute("aria-valuetext", words);
};
field("dial").addEventListener("input", () => { turned(); if (root.dataset.state === "ready") answerSoon(); });
field("direction").addEventListener("change", () => root.dataset.state === "ready" && answer());
get("tell").addEventListener("click", () => answer());
field("question").addEventListener("keydown", (event) => { if (event.key === "Enter") { event.preventDefault(); answer(); } });
const answerSoon = later(() => answer(), 400);

async function answer() {
  const question = field("question").value.trim();
  if (!question || question.length > 300) return (get("asked").textContent = `The question has ${question.length} letters. Allowed: 1 to 300.`);
  get("asked").textContent = "";
  const vector = field("direction").value, dial = dialled(), item = document.createElement("li");
  const label = `${dial ? `${shown(dial)}, ${vector === "tone" ? "tone vector" : "random direction"}` : "unsteered"}, “${question}”: `;
  item.append(Object.assign(document.createElement("b"), { textContent: label }), document.createElement("span"));
  get("answers").prepend(item);
  while (get("answers").children.length > 6) get("answers").lastChild.remove();
  try {
    const found = await ask("answer", { question, vector, strength: dial }, (part) => (item.lastChild.textContent = `${part} …`));
    item.lastChild.textContent = `${found.text} (${(found.ms / 1000).toFixed(1)} s)`;
    item.dataset.done = found.text;
  } catch (error) {
    item.lastChild.textContent = `The model stopped: ${error.message}`;
  }
}
turned();
})();
