// The header, the verdict and the tables.

function head() {
  const workload = data.workload;
  const trace = workload.name || data.trace;
  byId("head").append(
    h("h1", {}, `${trace} on ${data.fleet}`),
    h("p", {}, `${data.arms.length} arms at ${data.rates.length} offered rates, compared over the same requests. `,
      data.simulated
        ? [h("span", { class: "badge simulated" }, "simulated"), " The control plane's own code ran in virtual time over models of engines; no engine was measured."]
        : null),
    h("div", { class: "setup" }, h("dl", {}, facts(trace).filter(([, value]) => value).map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]))),
  );
}

function facts(trace) {
  const { workload } = data;
  const requests = workload.requests ? `${workload.requests.toLocaleString("en")} requests` : null;
  const blocks = workload.block_tokens ? `prefixes in blocks of ${workload.block_tokens} tokens` : null;
  const own = workload.own_targets ? `${workload.own_targets.toLocaleString("en")} requests of the trace brought targets of their own and are judged by those` : null;
  const least = Math.min(...data.summary.map((line) => line.seeds));
  const most = Math.max(...data.summary.map((line) => line.seeds));
  return [
    ["Workload", [trace, workload.source, requests, blocks].filter(Boolean).join("; ")],
    ["Fleet", data.fleet],
    ["Capacity", data.capacity_rps ? `${number(data.capacity_rps)} req/s on this workload` : null],
    ["Targets", data.classes.length ? h("ul", {}, data.classes.map((one) => h("li", {}, targets(one))), own ? h("li", {}, own) : null) : data.slo],
    ["Arms", h("ul", {}, data.arms.map((_, arm) => h("li", {}, armName(arm), arm === 0 && data.arms.length > 1 ? " (the others are compared with this one)" : "")))],
    ["Seeds", data.summary.length ? (least === most ? String(least) : `${least} to ${most}`) : null],
    ["To repeat", data.command ? h("code", {}, data.command) : null],
  ];
}

function targets(one) {
  const limits = [["TTFT", one.ttft_ms], ["TPOT", one.tpot_ms], ["end to end", one.e2e_ms]].filter(([, limit]) => limit != null);
  const total = data.classes.reduce((sum, other) => sum + other.share, 0);
  const asked = limits.map(([name, limit]) => `${name} ≤ ${milliseconds(limit)}`).join(", ") || "none";
  return `${one.name}: ${asked} (${percent(one.share / total)} of those without a class, priority ${one.priority})`;
}

// ---- the verdict

function judged(metric, against) {
  if (!against || against.low == null || against.high == null) return "none";
  if (against.low > 0) return metric.better > 0 ? "better" : "worse";
  if (against.high < 0) return metric.better > 0 ? "worse" : "better";
  return "none";
}

const JUDGED = { better: "better", worse: "worse", none: "no difference shown" };

function verdict() {
  const metric = metricOf("goodput_rps");
  const rate = data.rates[chosen.rate];
  byId("result-title").textContent = rate ? `Result at ${rateText(rate)}` : "Result";
  const first = at(data.summary, 0);
  const others = data.arms.map((_, arm) => at(data.summary, arm)).filter((line) => line && line.arm > 0);
  const said = [];
  if (first && first.goodput_rps) {
    said.push(h("p", {}, "Goodput of ", armName(0), `: ${figure(metric, first.goodput_rps.mean, true)} of ${tick(rate.rps)} offered.`, others.length ? " Against it:" : ""));
    said.push(h("ul", {}, others.map((line) => h("li", {}, armName(line.arm), " ", difference(metric, line, first)))));
  } else said.push(h("p", {}, "No run at this rate."));
  byId("verdict").replaceChildren(...said, ...warnings());
}

function difference(metric, line, first) {
  const against = line.against_first && line.against_first[metric.key];
  if (!against || against.difference == null) return "";
  const relative = first[metric.key].mean && !metric.share ? ` (${signed(metricOf("slo_attainment"), against.difference / first[metric.key].mean)} %)` : "";
  const verdictOf = judged(metric, against);
  const unit = metric.share ? " points" : metric.unit === "Jain" ? "" : ` ${metric.unit}`;
  return [`${signed(metric, against.difference)}${unit}${relative} `, h("span", { class: `badge ${verdictOf}` }, JUDGED[verdictOf])];
}

function warnings() {
  const found = data.outcomes.filter((one) => one.rate === chosen.rate && one.failed + one.rejected > 0);
  const lost = found.map((one) => h("li", {}, armName(one.arm), `: ${percent(one.rejected / one.requests)} rejected, ${percent(one.failed / one.requests)} failed`));
  const few = data.summary.some((line) => line.rate === chosen.rate && line.seeds < 2);
  return [
    lost.length ? h("div", { class: "note" }, "Not every request was served, and latencies are those of completed ones:", h("ul", {}, lost)) : null,
    few ? h("p", { class: "note" }, "One seed: no interval can be given, and a difference may be chance.") : null,
  ].filter(Boolean);
}

// ---- the table of the chosen rate

function summaryTable() {
  const arms = shownArms();
  const heads = arms.map((arm) => h("th", { scope: "col" }, armName(arm)));
  const rows = METRICS.filter((metric) => arms.some((arm) => (at(data.summary, arm) || {})[metric.key])).map((metric) => summaryRow(metric, arms));
  const first = rows.findIndex((row) => row.dataset.metric === "slo_attainment");
  rows.splice(first + 1, 0, ...classRows(arms));
  const sure = Math.round(100 * data.confidence);
  byId("summary").replaceChildren(
    h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Figures of each arm at the chosen rate" },
      h("table", { class: "figures wide" }, h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Mean over seeds"), heads)), h("tbody", {}, rows))),
    h("p", { class: "small" }, `In brackets the ${sure} % confidence interval over seeds. The third line is the difference to the first arm on the same seeds and its interval; `,
      `it is called better or worse where that interval leaves out 0. Of a hundred differences that are none, ${100 - sure} will look like one.`),
  );
}

function summaryRow(metric, arms) {
  return h("tr", { "data-metric": metric.key },
    h("th", { scope: "row" }, metric.label, h("span", { class: "unit" }, metric.unit, h("span", { class: "says" }, `, ${metric.says}`))),
    arms.map((arm) => h("td", {}, summaryCell(metric, at(data.summary, arm)))));
}

function summaryCell(metric, line) {
  const value = line && line[metric.key];
  if (!value) return "–";
  const against = line.against_first && line.against_first[metric.key];
  const verdictOf = judged(metric, against);
  return [
    h("span", { class: "value" }, figure(metric, value.mean)),
    h("span", { class: "interval" }, interval(metric, value)),
    against && against.difference != null
      ? h("span", { class: "against" }, `${signed(metric, against.difference)} `, h("span", { class: "small" }, interval(metric, against, 2)), " ",
        verdictOf === "none" ? null : h("span", { class: `badge ${verdictOf}` }, JUDGED[verdictOf]))
      : null,
  ];
}

function interval(metric, value, digits = 3) {
  if (value.low == null || value.high == null) return "";
  const end = (edge) => (edge < 0 ? "−" : "") + figure(metric, Math.abs(edge), false, digits);
  return `[${end(value.low)}, ${end(value.high)}]`;
}

function classRows(arms) {
  const names = new Set(data.outcomes.filter((one) => one.rate === chosen.rate).flatMap((one) => Object.keys(one.attainment_by_class)));
  if (names.size < 2) return [];
  const metric = metricOf("slo_attainment");
  return [...names].map((name) => h("tr", {},
    h("th", { scope: "row" }, `Attainment, ${name}`, h("span", { class: "unit" }, "%, least and most of a seed")),
    arms.map((arm) => {
      const found = (at(data.outcomes, arm) || { attainment_by_class: {} }).attainment_by_class[name];
      return h("td", {}, found ? [h("span", { class: "value" }, figure(metric, found[0])), h("span", { class: "interval" }, `${figure(metric, found[1])} to ${figure(metric, found[2])}`)] : "–");
    })));
}

// ---- everything, for reading and copying

function everything() {
  const inside = (name, build) => {
    const details = h("details", { ontoggle: () => { if (details.open && details.children.length === 1) details.append(build()); } }, h("summary", {}, name));
    return details;
  };
  byId("all").append(
    inside("Every arm at every rate", () => dense(
      ["Rate", "Arm", ...METRICS.map((metric) => `${metric.label}, ${metric.unit}`)],
      data.summary.map((line) => [rateName(data.rates[line.rate]), data.arms[line.arm], ...METRICS.map((metric) => (line[metric.key] ? `${figure(metric, line[metric.key].mean)} ${interval(metric, line[metric.key])}` : "–"))]),
    )),
    inside("Every run", () => dense(
      ["Rate", "Arm", "Seed", "Offered, req/s", "Requests", "Completed", "Failed", "Rejected", "Goodput, req/s", "Attainment, %", "Took, s", "Digest of its events"],
      data.runs.map((run) => [rateName(data.rates[run.rate]), data.arms[run.arm], run.seed, number(run.rate_rps), run.requests, run.completed, run.failed, run.rejected,
        number(run.goodput_rps), figure(metricOf("slo_attainment"), run.slo_attainment), number(run.wall_s), run.event_digest]),
    )),
    ...data.thinned.runs.map((rule) => h("p", { class: "small" }, rule)),
  );
}

function dense(heads, rows) {
  return h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": heads.join(", ") },
    h("table", { class: "figures dense" }, h("thead", {}, h("tr", {}, heads.map((text) => h("th", { scope: "col" }, text)))),
      h("tbody", {}, rows.map((row) => h("tr", {}, row.map((cell) => h("td", {}, String(cell))))))));
}
