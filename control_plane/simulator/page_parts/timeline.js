// The fleet over virtual time: lines of all arms, and a heat map of one arm's instances.

const LINES = {
  queued: ["waiting in the control plane's queue", (of) => of.queued],
  waiting_total: ["waiting in engines", (of) => of.waiting_total],
  all_waiting: ["waiting anywhere", (of) => of.queued.map((count, moment) => count + of.waiting_total[moment])],
  running_total: ["running in engines", (of) => of.running_total],
};

// requests come whole
const WHOLE = [0, 1, 2, 3, 4, 5, 6, 7].flatMap((power) => [1, 2, 5].map((one) => one * 10 ** power));

function timeAxis(label) {
  return axis({ size: 28, label, values: (_, ticks) => ticks.map(seconds), space: 60 });
}

// Both plots reach over the time of all arms, so that one stands over the other.
function timeRange() {
  const times = data.timelines.filter((one) => one.rate === chosen.rate).flatMap((one) => one.at_s);
  return [Math.min(...times), Math.max(Math.max(...times), Math.min(...times) + 1)];
}

function queue() {
  const target = byId("queue");
  const found = shownArms().map((arm) => ({ arm, of: at(data.timelines, arm) })).filter((one) => one.of);
  const place = h("div", { class: "plot" });
  const [says, valuesOf] = LINES[chosen.line];
  target.replaceChildren(h("figcaption", {}, select("Requests", Object.entries(LINES).map(([key, [text]]) => [key, text]), "line")), place);
  if (!found.length) return place.append(h("p", { class: "small" }, "No timeline of this rate was kept."));
  const joined = uPlot.join(found.map((one) => [one.of.at_s, valuesOf(one.of)]));
  return plot(place, plotHeight(), {
    scales: { x: { time: false, range: timeRange() }, y: { range: (_, low, high) => [0, Math.max(1, high * 1.08)] } },
    axes: [timeAxis(), axis({ size: 58, incrs: WHOLE, values: (_, ticks) => ticks.map(tick) })],
    series: [{}, ...found.map((one) => lineOf(one.arm, { spanGaps: true }))],
    cursor: { sync: { key: "time" } },
    hooks: { draw: [(made) => judgedWindow(made, found[0].of.window_s), (made) => found.forEach((one, number_) => stampSome(made, one.arm, number_, found.length))] },
  }, joined, `Requests ${says} over time`, (index) => ({
    head: `at ${seconds(joined[0][index])}`,
    rows: found.map((one, number_) => [one.arm, joined[number_ + 1][index] == null ? "–" : tick(joined[number_ + 1][index])]),
  }));
}

// The same for all arms of a comparison.
function judgedWindow(made, [begin, end]) {
  const { bbox } = made;
  const room = 4 * devicePixelRatio;
  [[begin, "judged from here", 1], [end, "to here", -1]].forEach(([time, text, side]) => {
    const x = made.valToPos(time, "x", true);
    if (x < bbox.left || x > bbox.left + bbox.width) return;
    guide(made, [x, bbox.top], [x, bbox.top + bbox.height], text, [x + side * room, bbox.top + 12 * devicePixelRatio], side > 0 ? "left" : "right");
  });
}

// A mark now and then, not at the same places for all arms.
function stampSome(made, arm, turn, arms) {
  const [times, values] = [made.data[0], made.data[turn + 1]];
  const every = Math.max(1, Math.floor(times.length / 8));
  for (let moment = Math.floor((every * (turn + 0.5)) / arms); moment < times.length; moment += every) {
    if (values[moment] != null) stamp(made.ctx, arm, made.valToPos(times[moment], "x", true), made.valToPos(values[moment], "y", true));
  }
}

// ---- instances

const HEATS = {
  load: ["running and waiting requests", (of, row) => of.running[row].map((count, moment) => count + of.waiting[row][moment])],
  running: ["running requests", (of, row) => of.running[row]],
  waiting: ["waiting requests", (of, row) => of.waiting[row]],
  kv: ["KV cache in use, %", (of, row) => of.kv_percent[row]],
};
// ColorBrewer's YlGnBu: lightness falls all the way, the same to those who see red and green alike, and on grey paper
const RAMP = [[237, 248, 177], [199, 233, 180], [127, 205, 187], [65, 182, 196], [29, 145, 192], [34, 94, 168], [37, 52, 148], [8, 29, 88]];

// On light paper much is dark, on dark paper much is light; nothing is the paper.
function heatColour(share) {
  const place = (isDark() ? 1 - share : share) * (RAMP.length - 1);
  const below = Math.min(RAMP.length - 2, Math.floor(place));
  const mixed = RAMP[below].map((part, number_) => Math.round(part + (RAMP[below + 1][number_] - part) * (place - below)));
  return `rgb(${mixed.join(",")})`;
}

function heat() {
  const target = byId("heat");
  const of = at(data.timelines, chosen.arm);
  const [says, valuesOf] = HEATS[chosen.heat];
  const place = h("div", { class: "plot" });
  const pick = [select("Instances under", data.arms.map((name, arm) => [arm, name]), "arm"), select("colour", Object.entries(HEATS).map(([key, [text]]) => [key, text]), "heat")];
  if (!of) return target.replaceChildren(h("figcaption", {}, pick), h("p", { class: "small" }, "No timeline of this arm and rate was kept."));
  const rows = of.instances.map((_, row) => valuesOf(of, row));
  // one scale for all arms of this rate, so that they can be compared
  const most = Math.max(1, ...data.timelines.filter((one) => one.rate === chosen.rate).flatMap((one) => one.instances.map((_, row) => Math.max(...valuesOf(one, row)))));
  target.replaceChildren(h("figcaption", {}, pick, ramp(most)), place);
  const height = Math.max(170, Math.min(620, 20 * rows.length + 60));
  return plot(place, height, {
    scales: { x: { time: false, range: timeRange() }, y: { range: [0, rows.length], dir: -1 } },
    axes: [timeAxis("virtual time"), axis({ size: 58, grid: { show: false }, ticks: { show: false }, splits: () => rows.map((_, row) => row + 0.5), values: (made, ticks) => rowNames(made, ticks, of.instances), filter: (_, ticks) => ticks })],
    series: [{}, { paths: () => null, points: { show: false } }],
    cursor: { sync: { key: "time" }, y: true },
    hooks: { draw: [(made) => drawHeat(made, of.at_s, rows, most)] },
  }, [of.at_s, of.at_s.map(() => null)], `${says} of each instance over time under ${data.arms[chosen.arm]}`, (index, made) => {
    const row = Math.max(0, Math.min(rows.length - 1, Math.floor(made.posToVal(made.cursor.top, "y"))));
    return { head: `${of.instances[row]} at ${seconds(of.at_s[index])}`, rows: [[null, `${of.running[row][index]} running, ${of.waiting[row][index]} waiting, KV ${of.kv_percent[row][index]} %`]] };
  });
}

function ramp(most) {
  const bar = h("span", { class: "ramp", role: "presentation" });
  bar.style.background = `linear-gradient(to right, ${Array.from({ length: 11 }, (_, tenth) => heatColour(tenth / 10)).join(",")})`;
  return h("span", { class: "small" }, "few", bar, `${number(most)} at most, over all arms; none is blank`);
}

function rowNames(made, ticks, names) {
  const room = (made.height - 60) / Math.max(1, names.length);
  const every = Math.ceil(15 / Math.max(1, room));
  return ticks.map((_, row) => (row % every ? "" : names[row].length > 8 ? `…${names[row].slice(-7)}` : names[row]));
}

function drawHeat(made, times, rows, most) {
  const { ctx } = made;
  const last = times.length - 1;
  const edges = times.map((time) => Math.round(made.valToPos(time, "x", true)));
  edges.push(last ? 2 * edges[last] - edges[last - 1] : made.bbox.left + made.bbox.width); // the last sample stands for as long as the one before
  ctx.save();
  ctx.beginPath();
  ctx.rect(made.bbox.left, made.bbox.top, made.bbox.width, made.bbox.height);
  ctx.clip();
  rows.forEach((values, row) => {
    const top = Math.round(made.valToPos(row, "y", true));
    const gap = rows.length <= 24 ? devicePixelRatio : 0;
    const height = Math.round(made.valToPos(row + 1, "y", true)) - top - gap;
    for (let moment = 0; moment <= last; moment += 1) {
      if (!values[moment]) continue;
      ctx.fillStyle = heatColour(values[moment] / most);
      ctx.fillRect(edges[moment], top, Math.max(1, edges[moment + 1] - edges[moment]), height);
    }
  });
  ctx.restore();
}
