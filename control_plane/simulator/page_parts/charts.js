// Plots of all arms: figures against the rate, and distributions.

const plots = [];
const FONT = "12px system-ui, sans-serif";

function axis(options) {
  const grid = { stroke: css("--grid"), width: 1 };
  return { stroke: css("--muted"), font: FONT, labelFont: FONT, labelSize: 18, grid, ticks: { ...grid, size: 5 }, ...options };
}

// One plot in a figure. `readout(index)` gives the heading and the [arm, text] rows that are shown there; arrow keys step through them too.
function plot(target, height, options, values, label, readout) {
  const width = Math.max(200, target.clientWidth);
  const base = { width, height, legend: { show: false }, cursor: { drag: { x: false, y: false }, points: { show: false }, y: false } };
  const made = new uPlot({ ...base, ...options, cursor: { ...base.cursor, ...options.cursor } }, values, target);
  plots.push(made);
  const tip = h("div", { class: "tip", role: "status" });
  made.over.append(tip);
  made.hooks.setCursor = [() => showTip(made, tip, readout)];
  made.root.tabIndex = 0;
  made.root.setAttribute("role", "img");
  made.root.setAttribute("aria-label", `${label}. Arrow keys step through its points.`);
  made.root.addEventListener("keydown", (event) => step(made, event));
  made.root.addEventListener("blur", () => made.setCursor({ left: -10, top: -10 }));
  return made;
}

function showTip(made, tip, readout) {
  const { idx, left, top } = made.cursor;
  const told = idx == null || left < 0 ? null : readout(idx, made);
  tip.style.display = told ? "block" : "none";
  if (!told) return;
  tip.replaceChildren(h("b", {}, told.head), h("table", {}, told.rows.map(([arm, text]) => h("tr", {}, h("td", {}, arm == null ? "" : armName(arm)), h("td", {}, text)))));
  const { clientWidth: width, clientHeight: height } = made.over;
  const beside = left > width / 2 ? left - tip.offsetWidth - 12 : left + 12;
  tip.style.left = `${Math.max(-50, Math.min(beside, width - tip.offsetWidth))}px`;
  tip.style.top = `${Math.max(0, Math.min(top + 12, height - tip.offsetHeight))}px`;
}

function step(made, event) {
  const way = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1 }[event.key];
  if (!way) return;
  event.preventDefault();
  const last = made.data[0].length - 1;
  const index = made.cursor.idx == null || made.cursor.left < 0 ? 0 : Math.max(0, Math.min(last, made.cursor.idx + way));
  const place = made.valToPos(made.data[0][index], "x");
  const sideways = made.scales.x.ori === 1;
  made.setCursor({ left: sideways ? made.over.clientWidth / 2 : place, top: sideways ? place : made.over.clientHeight / 3 });
}

function clearPlots() {
  for (const made of plots) made.destroy();
  plots.length = 0;
}

function lineOf(arm, more = {}) {
  return { stroke: colourOf(arm), width: 2, dash: dashOf(arm), points: { show: false }, ...more };
}

function stamp(ctx, arm, x, y) {
  const ratio = devicePixelRatio;
  ctx.save();
  ctx.translate(x, y);
  ctx.scale(ratio, ratio);
  ctx.fillStyle = colourOf(arm);
  ctx.strokeStyle = css("--surface");
  const path = new Path2D(markOf(arm));
  ctx.stroke(path);
  ctx.fill(path);
  ctx.restore();
}

function guide(made, from, to, text, [x, y], align = "left") {
  const { ctx } = made;
  ctx.save();
  ctx.strokeStyle = ctx.fillStyle = css("--muted");
  ctx.lineWidth = devicePixelRatio;
  ctx.setLineDash([3 * devicePixelRatio, 3 * devicePixelRatio]);
  ctx.beginPath();
  ctx.rect(made.bbox.left, made.bbox.top, made.bbox.width, made.bbox.height);
  ctx.clip();
  ctx.beginPath();
  ctx.moveTo(...from);
  ctx.lineTo(...to);
  ctx.stroke();
  ctx.font = `${11 * devicePixelRatio}px system-ui, sans-serif`;
  ctx.textAlign = align;
  ctx.textBaseline = "alphabetic";
  ctx.fillText(text, x, y);
  ctx.restore();
}

// Places of a logarithmic scale's lines: 1, 2, 5 of each power of ten, or fewer where those would crowd.
function logSplits(low, high) {
  const decades = Math.log10(high / low);
  const steps = decades <= 1.7 ? [1, 2, 5] : decades <= 3 ? [1, 3] : [1];
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) {
    for (const one of steps) if (one * 10 ** power >= low && one * 10 ** power <= high) found.push(one * 10 ** power);
  }
  return found;
}

// ---- against the rate

function byRate(side) {
  const metric = metricOf(chosen[side]);
  const target = byId(`by-rate-${side}`);
  const arms = shownArms();
  const place = h("div", { class: "plot" });
  target.replaceChildren(h("figcaption", {}, select(side === "left" ? "First plot" : "Second plot", METRICS.map((one) => [one.key, `${one.label}${one.unit === "Jain" ? "" : `, ${one.unit}`}`]), side), h("span", { class: "small line" }, metric.says)), place);
  const lines = arms.map((arm) => data.rates.map((_, rate) => (at(data.summary, arm, rate) || {})[metric.key] || {}));
  const xs = data.rates.map((rate) => rate.rps);
  const pad = 0.07 * (xs[xs.length - 1] - xs[0]) || 0.1 * xs[0] || 1;
  const [low, high] = rangeOf(metric, lines.flat());
  plot(place, plotHeight(), {
    scales: { x: { time: false, range: [xs[0] - pad, xs[xs.length - 1] + pad] }, y: { range: [low, high], distr: metric.time ? 3 : 1 } },
    axes: [
      axis({ size: 48, label: "offered, req/s", splits: () => xs, values: (made, ticks) => rateTicks(made, ticks), filter: (_, ticks) => ticks }),
      axis({ size: 58, ...(metric.time ? { splits: () => logSplits(low, high), values: (_, ticks) => ticks.map(milliseconds), filter: (_, ticks) => ticks } : { values: (_, ticks) => ticks.map((one) => (metric.share ? `${tick(100 * one)} %` : tick(one))) }) }),
    ],
    series: [{}, ...arms.map((arm) => lineOf(arm, { paths: () => null }))],
    hooks: { draw: [(made) => { rateGuides(made, metric, xs, pad); arms.forEach((arm, number_) => whiskers(made, arm, number_ - (arms.length - 1) / 2, lines[number_])); }] },
  }, [xs, ...lines.map((line) => line.map((one) => one.mean ?? null))], `${metric.label} against the offered rate`, (index) => ({
    head: rateText(data.rates[index]),
    rows: arms.map((arm, number_) => [arm, `${figure(metric, lines[number_][index].mean, true)} ${interval(metric, lines[number_][index])}`]),
  }));
}

function rangeOf(metric, values) {
  const edges = values.flatMap((one) => [one.mean, one.low, one.high]).filter((edge) => edge != null && (!metric.time || edge > 0));
  if (!edges.length) return metric.time ? [1, 10] : [0, 1];
  const low = Math.min(...edges);
  const high = Math.max(...edges);
  if (metric.time) { // an interval may reach down to nothing, where a logarithm has no room: never more than a power of ten below the means
    const means = values.map((one) => one.mean).filter((mean) => mean > 0);
    return [Math.max(low, Math.min(...means) / 10) / 1.15, high * 1.15];
  }
  const pad = 0.06 * (high - low) || 0.05 * Math.abs(high) || 1;
  if (metric.share || metric.key === "fairness_jain") return [Math.max(0, low - pad), Math.min(1.005, high + pad)];
  return [Math.min(0, low), high + pad];
}

function rateTicks(made, ticks) {
  let last = -Infinity;
  return ticks.map((rps, number_) => {
    const x = made.valToPos(rps, "x");
    if (x - last < 46) return "";
    last = x;
    const { label } = data.rates[number_];
    return label.endsWith("rps") ? tick(rps) : `${tick(rps)}\n${label} ×`;
  });
}

function rateGuides(made, metric, xs, pad) {
  const x = (value) => made.valToPos(value, "x", true);
  const y = (value) => made.valToPos(value, "y", true);
  const { bbox } = made;
  const [first, last] = [xs[0] - pad, xs[xs.length - 1] + pad];
  const leaves = x(Math.min(last, made.scales.y.max)); // all that is offered, as far as the plot goes
  const beside = leaves < bbox.left + 0.8 * bbox.width ? 6 : -12;
  if (metric.offered) guide(made, [x(first), y(first)], [x(last), y(last)], "offered", [leaves + beside * devicePixelRatio, y(Math.min(last, made.scales.y.max)) + (beside > 0 ? 12 : 16) * devicePixelRatio], beside > 0 ? "left" : "right");
  const capacity = data.capacity_rps;
  if (capacity && capacity > first && capacity < last) guide(made, [x(capacity), bbox.top], [x(capacity), bbox.top + bbox.height], "capacity", [x(capacity) - 4 * devicePixelRatio, bbox.top + bbox.height - 6 * devicePixelRatio], "right");
}

function whiskers(made, arm, beside, line) {
  const { ctx, bbox } = made;
  const ratio = devicePixelRatio;
  const points = line.map((one, rate) => ({ ...one, x: made.valToPos(data.rates[rate].rps, "x", true) + beside * Math.min(7, 36 / data.arms.length) * ratio })).filter((one) => one.mean != null);
  const y = (value) => Math.max(bbox.top, Math.min(bbox.top + bbox.height, value <= made.scales.y.min ? Infinity : made.valToPos(value, "y", true)));
  ctx.save();
  ctx.strokeStyle = colourOf(arm);
  ctx.lineWidth = 2 * ratio;
  ctx.setLineDash(dashOf(arm).map((length) => length * ratio));
  ctx.beginPath();
  points.forEach((one, number_) => ctx[number_ ? "lineTo" : "moveTo"](one.x, y(one.mean)));
  ctx.stroke();
  ctx.setLineDash([]);
  ctx.lineWidth = 1.5 * ratio;
  for (const one of points.filter((point) => point.low != null && point.high != null && point.high > point.low)) {
    ctx.beginPath();
    ctx.moveTo(one.x, y(one.low));
    ctx.lineTo(one.x, y(one.high));
    for (const edge of [one.low, one.high]) {
      ctx.moveTo(one.x - 4 * ratio, y(edge));
      ctx.lineTo(one.x + 4 * ratio, y(edge));
    }
    ctx.stroke();
  }
  ctx.restore();
  for (const one of points) stamp(ctx, arm, one.x, y(one.mean));
}

// ---- distributions: share of requests upwards, time to the right

const TIMES = { ttft: "Time to the first token", tpot: "Time per token after the first", e2e: "End to end" };

function cdf(name) {
  const target = byId(`cdf-${name}`);
  const place = h("div", { class: "plot" });
  target.replaceChildren(h("figcaption", {}, TIMES[name]), place);
  const found = shownArms().map((arm) => ({ arm, of: (at(data.cdfs, arm) || {})[name] })).filter((one) => one.of && one.of.mean.length);
  if (!found.length) return place.append(h("p", { class: "small" }, "No request completed here."));
  const times = found.flatMap((one) => [one.of.mean[1], one.of.mean[99], (one.of.low || one.of.mean)[1], (one.of.high || one.of.mean)[99]]).filter((time) => time > 0);
  const [low, high] = [Math.min(...times) / 1.15, Math.max(...times) * 1.3];
  const percents = Array.from({ length: 101 }, (_, share) => share);
  return plot(place, plotHeight(), {
    scales: { x: { time: false, ori: 1, dir: 1, range: [0, 100] }, y: { ori: 0, distr: 3, range: [low, high] } },
    axes: [
      axis({ scale: "x", side: 3, size: 50, values: (_, ticks) => ticks.map((share) => `${share} %`) }),
      axis({ scale: "y", side: 2, size: 34, splits: () => logSplits(low, high), values: (made, ticks) => spaced(made, ticks), filter: (_, ticks) => ticks }),
    ],
    series: [{}, ...found.map((one) => lineOf(one.arm))],
    hooks: { drawAxes: [(made) => { targetLines(made, name); found.forEach((one) => spread(made, one)); }], draw: [(made) => found.forEach((one) => stampQuantiles(made, one))] },
  }, [percents, ...found.map((one) => one.of.mean.map((time) => (time > 0 ? time : null)))], `Distribution of ${TIMES[name].toLowerCase()}`, (index) => ({
    head: `${index} % of completed requests within`,
    rows: found.map((one) => [one.arm, milliseconds(one.of.mean[index])]),
  }));
}

function spaced(made, ticks) {
  let last = -Infinity;
  return ticks.map((time) => {
    const x = made.valToPos(time, "y");
    if (x - last < 52) return "";
    last = x;
    return milliseconds(time);
  });
}

const xOf = (made, time) => made.valToPos(Math.max(time, made.scales.y.min), "y", true);
const yOf = (made, share) => made.valToPos(share, "x", true);

function targetLines(made, name) {
  const { bbox } = made;
  data.classes.forEach((one, number_) => {
    const limit = one[`${name}_ms`];
    if (limit == null || limit < made.scales.y.min || limit > made.scales.y.max) return;
    const x = xOf(made, limit);
    const text = `target, ${one.name}`;
    const crowded = x + (8 + 6 * text.length) * devicePixelRatio > bbox.left + bbox.width; // to the right below the curves there is room, unless that is where the plot ends
    guide(made, [x, bbox.top], [x, bbox.top + bbox.height], text, [x + (crowded ? -4 : 4) * devicePixelRatio, bbox.top + bbox.height - (6 + 14 * number_) * devicePixelRatio], crowded ? "right" : "left");
  });
}

// From the least to the most of the seeds.
function spread(made, { arm, of }) {
  if (!of.low) return;
  const { ctx, bbox } = made;
  ctx.save();
  ctx.beginPath();
  ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
  ctx.clip();
  ctx.globalAlpha = 0.18;
  ctx.fillStyle = colourOf(arm);
  ctx.beginPath();
  of.low.forEach((time, share) => ctx.lineTo(xOf(made, time), yOf(made, share)));
  for (let share = of.high.length - 1; share >= 0; share -= 1) ctx.lineTo(xOf(made, of.high[share]), yOf(made, share));
  ctx.fill();
  ctx.restore();
}

function stampQuantiles(made, { arm, of }) {
  for (const share of [50, 90]) stamp(made.ctx, arm, xOf(made, of.mean[share]), yOf(made, share));
}

const plotHeight = () => (innerWidth < 500 ? 230 : 290);
