// What all of the page uses: the data, what is chosen, how figures are written, how an arm looks.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

// Elements only through here: what comes from the document becomes text, never markup.
function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat(2).filter((child) => child != null && child !== false));
  return element;
}

function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const METRICS = [
  { key: "goodput_rps", label: "Goodput", unit: "req/s", says: "requests that met all targets of their class", better: 1, offered: true },
  { key: "slo_attainment", label: "Attainment", unit: "%", says: "share of all requests that met their targets", better: 1, share: true },
  { key: "throughput_rps", label: "Throughput", unit: "req/s", says: "requests completed", better: 1, offered: true },
  { key: "output_tokens_per_s", label: "Output", unit: "tokens/s", says: "of completed requests", better: 1 },
  { key: "ttft_p50_ms", label: "TTFT p50", unit: "ms", says: "time to the first token", better: -1, time: true },
  { key: "ttft_p99_ms", label: "TTFT p99", unit: "ms", says: "time to the first token", better: -1, time: true },
  { key: "tpot_p50_ms", label: "TPOT p50", unit: "ms", says: "time per token after the first", better: -1, time: true },
  { key: "tpot_p99_ms", label: "TPOT p99", unit: "ms", says: "time per token after the first", better: -1, time: true },
  { key: "e2e_p99_ms", label: "End to end p99", unit: "ms", says: "arrival to last token", better: -1, time: true },
  { key: "prefix_hit_rate", label: "Prefix hits", unit: "%", says: "share of prompt tokens found in a cache", better: 1, share: true },
  { key: "fairness_jain", label: "Fairness", unit: "Jain", says: "over tenants, of their attainment; 1 is even", better: 1 },
  { key: "cost_usd", label: "Cost", unit: "USD", says: "list price of the fleet for the window", better: -1 },
];
const metricOf = (key) => METRICS.find((metric) => metric.key === key);

// Okabe and Ito's colours, tuned to light and dark paper. Nobody has to tell them apart: dash and mark differ as well.
const COLOURS = 8;
const DASHES = [[], [9, 4], [2, 3], [10, 3, 2, 3], [5, 3]];
const MARKS = [
  "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z", "M-3.6-3.6h7.2v7.2h-7.2z", "M0-4.6L4.4 3.4h-8.8z", "M0-5L5 0L0 5L-5 0z", "M0 4.6L4.4-3.4h-8.8z",
  "M-4-2.6L-2.6-4L0-1.4L2.6-4L4-2.6L1.4 0L4 2.6L2.6 4L0 1.4L-2.6 4L-4 2.6L-1.4 0z",
];
const dashOf = (arm) => DASHES[arm % DASHES.length];
const markOf = (arm) => MARKS[arm % MARKS.length];
const colourName = (arm) => `--arm-${arm % COLOURS}`;
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colourOf = (arm) => css(colourName(arm));
const isDark = () => matchMedia("(prefers-color-scheme: dark)").matches && !matchMedia("print").matches;

function swatch(arm) {
  const line = svg("path", { d: "M-17 0H17", fill: "none", stroke: "currentColor", "stroke-width": 2, "stroke-dasharray": dashOf(arm).join(" ") || "none" });
  const image = svg("svg", { class: "swatch", viewBox: "-17 -7 34 14", "aria-hidden": "true" }, line, svg("path", { d: markOf(arm), fill: "currentColor" }));
  image.style.color = `var(${colourName(arm)})`;
  return image;
}
const armName = (arm) => h("span", { class: "arm" }, swatch(arm), data.arms[arm]);

// ---- what is chosen

function rateToBeginWith() {
  const distance = (rate) => Math.abs(rate.rps - (data.capacity_rps || Infinity));
  let best = 0;
  data.rates.forEach((rate, number) => { if (distance(rate) <= distance(data.rates[best])) best = number; });
  return best;
}

const chosen = {
  rate: rateToBeginWith(), hidden: new Set(), arm: 0, left: "goodput_rps", right: "slo_attainment",
  line: "all_waiting", heat: "load", bars: "prompt", order: "fleet",
};
const shownArms = () => data.arms.map((_, arm) => arm).filter((arm) => !chosen.hidden.has(arm));
const at = (list, arm, rate = chosen.rate) => list.find((one) => one.arm === arm && one.rate === rate);

function select(label, options, name) {
  const items = options.map(([value, text]) => h("option", { value, selected: String(value) === String(chosen[name]) }, text));
  const change = (event) => {
    chosen[name] = typeof chosen[name] === "number" ? Number(event.target.value) : event.target.value;
    draw();
  };
  return h("label", {}, h("span", { class: "small" }, label), h("select", { name, onchange: change }, items));
}

// ---- how figures are written

function number(value, digits = 3) {
  if (value == null) return "–";
  const size = Math.abs(value);
  if (size >= 1e6) return `${number(value / 1e6, digits)} M`;
  if (size >= 10 ** (digits - 1)) return Math.round(value).toLocaleString("en");
  if (size === 0) return "0";
  const places = Math.min(6, Math.max(0, digits - 1 - Math.floor(Math.log10(size))));
  return value.toLocaleString("en", { maximumFractionDigits: places, minimumFractionDigits: Math.min(places, 2) });
}
const tick = (value) => number(value).replace(/\.0+(?!\d)|(\.\d*?[1-9])0+(?!\d)/, "$1");
function figure(metric, value, unit = false, digits = 3) {
  if (value == null) return "–";
  if (metric.share) return `${(100 * value).toFixed(1)}${unit ? " %" : ""}`;
  if (metric.key === "fairness_jain") return value.toFixed(3);
  return number(value, digits) + (unit ? ` ${metric.unit}` : "");
}
// A difference is known less well than what it is between.
function signed(metric, value) {
  const text = figure(metric, Math.abs(value), false, 2);
  return (/[1-9]/.test(text) ? (value > 0 ? "+" : "−") : "±") + text;
}
const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)} %`;
const milliseconds = (value) => (value >= 120000 ? `${tick(value / 60000)} min` : value >= 1000 ? `${tick(value / 1000)} s` : `${tick(value)} ms`);
const seconds = (value) => (value >= 36000 ? `${tick(value / 3600)} h` : value >= 1200 ? `${tick(value / 60)} min` : `${tick(value)} s`);
const rateName = (rate) => (rate.label.endsWith("rps") ? `${rate.label.slice(0, -3)} req/s` : `${rate.label} × capacity`);
const rateText = (rate) => (rate.label.endsWith("rps") ? rateName(rate) : `${rateName(rate)} (${tick(rate.rps)} req/s)`);
const seedsText = (count) => `${count} ${count === 1 ? "seed" : "seeds"}`;
