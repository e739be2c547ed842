// The page's plots, sorting and comparison. Text enters the page by textContent only.
const data = JSON.parse(document.getElementById("data").textContent);
const runs = data.runs;
const COLOURS = 8; // as many runs can be told apart, so no more can be selected
const SHOWN_ROWS = 100;
const byId = (id) => document.getElementById(id);
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const make = (tag, text, className) => {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  return element;
};
const label = (run) => (run.place === "workspace" ? "workspace" : `${run.name} (${run.id})`);
const fixed = (value, digits) =>
  value === null ? "–" : value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits }).replace("-", "−");

function draw(id, spec) {
  const muted = colour("--muted"), line = colour("--line");
  const axis = { labelColor: muted, titleColor: muted, tickColor: line, domainColor: line, gridColor: line, titleFontWeight: "normal", labelFontSize: 11, titleFontSize: 12 };
  const config = { background: null, font: "system-ui, sans-serif", view: { stroke: null }, axis, legend: { labelColor: muted, titleColor: muted, labelLimit: 260 } };
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  return vegaEmbed(byId(id), { width: "container", height: 250, autosize: { type: "fit", contains: "padding" }, config, ...spec },
    { actions: false, renderer: "svg", tooltip: { theme: dark ? "dark" : "light" } });
}

const severalLetters = (rows) => new Set(rows.map((row) => row.letter)).size > 1; // with one, all ppl can be compared

function points(figure) {
  return [...runs].reverse().map((run) => ({ ...run.figures, run: run.axis, name: label(run), when: run.when, kind: { here: "commit", elsewhere: "other branch" }[run.place] || run.place, value: run.figures[figure], segment: run.segment[figure === "test_ppl" ? "ppl" : "bits"], letter: run.letter }))
    .filter((row) => row.value !== null);
}

function history(id, figure, title, digits, scale) {
  const values = points(figure);
  const kinds = ["commit", "experiment", "other branch", "workspace"].filter((kind) => values.some((row) => row.kind === kind));
  const colours = { commit: colour("--accent"), experiment: colour("--experiment"), "other branch": colour("--elsewhere"), workspace: colour("--fg") };
  const shapes = { commit: "circle", experiment: "triangle-up", "other branch": "diamond", workspace: "square" };
  const x = { field: "run", type: "ordinal", scale: { domain: values.map((row) => row.run) }, axis: { title: null, labelAngle: -40, labelOverlap: true, labelLimit: 150, ticks: false, grid: false } };
  const y = { field: "value", type: "quantitative", scale: { nice: false, padding: 12, ...scale }, axis: { title: null, tickCount: 5 } };
  return draw(id, {
    data: { values },
    layer: [
      { transform: [{ filter: "datum.kind === 'commit'" }], mark: { type: "line", color: colours.commit, strokeWidth: 1.5, opacity: 0.6 }, encoding: { x, y, detail: { field: "segment" } } },
      ...(figure === "test_ppl" ? [{ transform: [{ filter: "isValid(datum.test_ppl_low)" }], mark: { type: "rule", strokeWidth: 2, opacity: 0.4, color: colours.commit }, encoding: { x, y: { ...y, field: "test_ppl_low" }, y2: { field: "test_ppl_high" } } }] : []),
      {
        mark: { type: "point", filled: true, size: values.length > 60 ? 30 : 70, opacity: 1 },
        encoding: {
          x, y,
          color: { field: "kind", scale: { domain: kinds, range: kinds.map((kind) => colours[kind]) }, legend: kinds.length > 1 ? { title: null, orient: "top" } : null },
          shape: { field: "kind", scale: { domain: kinds, range: kinds.map((kind) => shapes[kind]) } },
          tooltip: [{ field: "name", title: "run" }, { field: "when" }, { field: "value", title, format: `,.${digits}f` }, ...(severalLetters(values) ? [{ field: "letter" }] : [])],
        },
      },
    ],
  });
}

function showCost() {
  const axis = byId("cost-axis");
  const values = points("test_bits_per_byte").filter((row) => row[axis.value]);
  byId("cost").closest(".card").hidden = ["tokens", "train_seconds"].every((key) => runs.every((run) => !run.figures[key]));
  if (!values.length) return byId("cost").replaceChildren();
  const x = { field: axis.value, type: "quantitative", scale: { type: "log", nice: false, padding: 12 }, axis: { title: axis.selectedOptions[0].textContent, format: "~s", tickCount: 5 } };
  return draw("cost", {
    data: { values },
    mark: { type: "point", filled: true, size: 60, opacity: 1 },
    encoding: {
      x, y: { field: "value", type: "quantitative", scale: { zero: false, padding: 12 }, axis: { title: "test bits per byte", tickCount: 5 } },
      color: { field: "letter", type: "nominal", legend: severalLetters(values) ? { title: "ppl compares by letter", titleLimit: 300, orient: "top" } : null },
      tooltip: [{ field: "name", title: "run" }, { field: "value", title: "bits per byte", format: ".3f" }, { field: axis.value, format: ".3~s" }],
    },
  });
}

const selected = []; // row numbers, in the order in which they were selected
const shade = (run) => colour(`--run${run.colour}`);

function showSelected() {
  const chosen = selected.map((i) => runs[i]);
  byId("none").hidden = chosen.length > 0;
  byId("selected").hidden = chosen.length === 0;
  for (const box of boxes) {
    const i = Number(box.value), row = box.closest("tr");
    box.checked = selected.includes(i);
    box.disabled = !box.checked && selected.length >= COLOURS;
    row.classList.toggle("selected", box.checked);
    if (box.checked) row.style.setProperty("--mark", `var(--run${runs[i].colour})`);
  }
  if (!chosen.length) return;
  showWarning(chosen);
  showFigures(chosen);
  showCurves(chosen);
  showSamples(chosen);
}

function showWarning(chosen) {
  const others = chosen.slice(1), warning = byId("warning");
  const advice = chosen.every((run) => run.bits_letter === chosen[0].bits_letter && run.letter !== "?") ? "compare bits per byte." : "neither do all of their bits per byte.";
  warning.textContent = `The ppl of runs with different letters doesn't compare; ${advice}`;
  warning.hidden = others.every((run) => run.letter === chosen[0].letter && run.letter !== "?");
}

function header(chosen, corner) {
  const row = make("tr");
  row.append(make("th", corner));
  for (const run of chosen) {
    const cell = make("th", undefined, "name"), swatch = make("span", undefined, "swatch");
    swatch.style.background = `var(--run${run.colour})`;
    cell.append(swatch, label(run));
    row.append(cell);
  }
  const head = make("thead");
  head.append(row);
  return head;
}

function showFigures(chosen) {
  const body = make("tbody");
  const add = (name, cells) => {
    const row = make("tr");
    row.append(make("th", name), ...cells);
    body.append(row);
  };
  const ofSet = (set) => [[`${set} ppl`, `${set}_ppl`, 2], ["95 %, from", `${set}_ppl_low`, 2], ["to", `${set}_ppl_high`, 2], [`${set} bits per byte`, `${set}_bits_per_byte`, 3]];
  const figures = [...data.sets.flatMap(ofSet), ["Parameters", "parameters", 0], ["Training tokens", "tokens", 0], ["Training seconds", "train_seconds", 0], ["Test text found in train, %", "leakage", 2]];
  for (const [name, key, digits] of figures) {
    const values = chosen.map((run) => run.figures[key] ?? null).map((value) => (key === "leakage" && value !== null ? 100 * value : value));
    if (values.some((value) => value !== null)) add(name, values.map((value) => make("td", fixed(value, digits))));
  }
  if (severalLetters(chosen)) add("Letter", chosen.map((run) => make("td", run.letter)));
  for (const key of [...new Set(chosen.flatMap((run) => Object.keys(run.params)))].sort()) {
    const values = chosen.map((run) => run.params[key] ?? "–");
    if (new Set(values).size > 1) add(key, values.map((value) => make("td", value, "name")));
  }
  byId("compare").replaceChildren(header(chosen, ""), body);
}

function showCurves(chosen) {
  // Loss a token means different things under different tokenizers: then bits per byte, of validation only.
  const bits = chosen.some((run) => run.tokenizer === null || run.tokenizer !== chosen[0].tokenizer) && chosen.every((run) => run.figures.bits_factor !== null);
  byId("curves-title").textContent = bits ? "Validation loss in bits per byte (the tokenizers differ)" : "Loss over training (thin: training, thick with points: validation)";
  const values = [];
  chosen.forEach((run, i) => {
    const curves = JSON.parse(data.curves[run.curves]);
    for (const split of bits ? ["valid"] : ["train", "valid"])
      for (const [tokens, loss] of curves[split === "train" ? 0 : 1]) values.push({ run: i, split, tokens, loss: bits ? loss * run.figures.bits_factor : loss, name: label(run) });
  });
  byId("legend").replaceChildren(...chosen.map((run) => {
    const item = make("span"), swatch = make("span", undefined, "swatch");
    swatch.style.background = `var(--run${run.colour})`;
    item.append(swatch, label(run));
    return item;
  }));
  const encoding = {
    x: { field: "tokens", type: "quantitative", axis: { title: "tokens seen", format: "~s", tickCount: 6, grid: false } },
    y: { field: "loss", type: "quantitative", scale: { zero: false }, axis: { title: bits ? "bits per byte" : "loss (nats a token)", tickCount: 6 } },
    color: { field: "run", type: "nominal", scale: { domain: chosen.map((_, i) => i), range: chosen.map(shade) }, legend: null },
  };
  const tooltip = [{ field: "name", title: "run" }, { field: "split" }, { field: "tokens", format: "," }, { field: "loss", format: ".3f" }];
  const train = { transform: [{ filter: "datum.split === 'train'" }], mark: { type: "line", strokeWidth: 1, opacity: 0.55 }, encoding };
  return draw("curves", {
    height: 320,
    data: { values },
    layer: [
      ...(bits ? [] : [train]),
      { transform: [{ filter: "datum.split === 'valid'" }], mark: { type: "line", strokeWidth: 2.5 }, encoding },
      { transform: [{ filter: "datum.split === 'valid'" }], mark: { type: "point", filled: true, size: 45, opacity: 1 }, encoding: { ...encoding, tooltip } },
    ],
  });
}

function showSamples(chosen) {
  const samples = chosen.map((run) => new Map(JSON.parse(data.samples[run.samples])));
  const body = make("tbody");
  for (const prompt of new Set(samples.flatMap((texts) => [...texts.keys()]))) {
    const row = make("tr");
    for (const texts of samples) {
      const cell = make("td", undefined, "sample"), text = texts.get(prompt) ?? "–";
      if (text.startsWith(prompt)) cell.append(make("span", prompt, "prompt"), text.slice(prompt.length));
      else cell.append(make("div", prompt, "prompt"), text);
      row.append(cell);
    }
    body.append(row);
  }
  const head = header(chosen, "");
  head.querySelector("th").remove();
  byId("samples").replaceChildren(head, body);
}

function toggle(i) {
  const at = selected.indexOf(i);
  if (at >= 0) selected.splice(at, 1);
  else {
    const used = selected.map((j) => runs[j].colour);
    runs[i].colour = [...Array(COLOURS).keys()].find((c) => !used.includes(c));
    selected.push(i);
  }
  showSelected();
}

// Only as many rows as one looks at are in the page, so that a sort of thousands takes no time.
const body = document.querySelector("#runs tbody");
const boxes = [...body.querySelectorAll("input")];
const seeds = Map.groupBy([...body.rows].filter((row) => row.dataset.seedOf), (row) => row.dataset.seedOf);
let order = [...body.rows].filter((row) => !row.dataset.seedOf), limit = SHOWN_ROWS;

function showRows() {
  const opened = (row) => row.querySelector(".seeds[aria-expanded=true]");
  body.replaceChildren(...order.slice(0, limit).flatMap((row) => [row, ...(opened(row) ? seeds.get(row.dataset.revision) : [])]));
  byId("all").hidden = order.length <= limit;
}

function sortBy(heading) {
  const ascending = heading.getAttribute("aria-sort") !== "ascending";
  for (const other of heading.parentElement.children) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  const keys = new Map(order.map((row) => [row, row.children[heading.cellIndex].dataset.sort]));
  const missing = (text) => text === "" || text === "nan";
  order.sort((a, b) => {
    const [x, y] = [keys.get(a), keys.get(b)];
    if (missing(x) || missing(y)) return missing(x) - missing(y); // what is missing comes last either way
    const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
    return ascending ? order : -order;
  });
  showRows();
}

document.querySelectorAll("#runs th button").forEach((button) => button.addEventListener("click", () => sortBy(button.closest("th"))));
body.querySelectorAll(".seeds").forEach((button) => button.addEventListener("click", () => {
  button.setAttribute("aria-expanded", button.getAttribute("aria-expanded") !== "true");
  showRows();
}));
byId("all").addEventListener("click", () => {
  limit = Infinity;
  showRows();
});
byId("cost-axis").addEventListener("change", showCost);
boxes.forEach((box) => box.addEventListener("change", () => toggle(Number(box.value))));

function drawAll() {
  return Promise.all([
    history("ppl", "test_ppl", "test ppl", 2, { type: "log" }),
    history("bits", "test_bits_per_byte", "test bits per byte", 3, { zero: false }),
    showCost(),
    showSelected(),
  ]);
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);

for (const rows of seeds.values()) for (const row of rows) row.hidden = false;
showRows();
for (const i of data.selected) toggle(i);
drawAll();
