// Where each arm sent what: one row of bars for each, on one scale.

const BARS = {
  prompt: { label: "prompt tokens", counts: "prompt_tokens", stacks: (of) => [["computed", of.prompt_tokens.map((count, place) => count - of.cached_tokens[place])], ["found in the cache", of.cached_tokens]] },
  requests: { label: "requests, by class", counts: "requests", stacks: (of) => classStacks(of.by_class) },
  output: { label: "output tokens", counts: "output_tokens", stacks: (of) => [["output tokens", of.output_tokens]] },
};
const SHADES = 4;

// More classes than shades: the smallest ones together.
function classStacks(byClass) {
  const sum = (values) => values.reduce((total, value) => total + value, 0);
  const all = Object.entries(byClass).sort((one, other) => sum(other[1]) - sum(one[1]));
  if (all.length <= SHADES) return all;
  const rest = all.slice(SHADES - 1).map(([, values]) => values);
  return [...all.slice(0, SHADES - 1), [`${rest.length} others`, rest[0].map((_, place) => sum(rest.map((values) => values[place])))]];
}

function placement() {
  const found = shownArms().map((arm) => ({ arm, of: at(data.placements, arm) })).filter((one) => one.of);
  const drawn = found.map((one) => ({ ...one, stacks: BARS[chosen.bars].stacks(one.of) }));
  const totals = drawn.map((one) => one.of.instances.map((_, place) => one.stacks.reduce((sum, [, values]) => sum + values[place], 0)));
  const most = Math.max(1, ...totals.flat());
  const multiples = h("div", { class: "multiples" });
  const stacks = drawn.length ? drawn[0].stacks : [];
  byId("bars").replaceChildren(
    h("figcaption", {}, select("Bars", Object.entries(BARS).map(([key, { label }]) => [key, label]), "bars"),
      select("in the order of", [["fleet", "the fleet"], ["most", "size"]], "order"),
      stacks.length > 1 ? stacks.map(([name], shade) => h("span", { class: "small" }, h("span", { class: `key s${shade}` }), name)) : null),
    multiples, imbalanceTable(found));
  if (!found.length) multiples.append(h("p", { class: "small" }, "No placement of this rate was kept."));
  drawn.forEach((one, number_) => {
    const figureOf = h("figure", {}, h("h3", {}, armName(one.arm)));
    multiples.append(figureOf);
    figureOf.append(bars(one, totals[number_], most, Math.max(220, figureOf.clientWidth)));
  });
}

function bars({ arm, of, stacks }, totals, most, width) {
  const [height, left, base] = [150, 48, 128];
  const order = of.instances.map((_, place) => place);
  if (chosen.order === "most") order.sort((one, other) => totals[other] - totals[one]);
  const room = (width - left) / order.length;
  const y = (value) => base - (value / most) * (base - 8);
  const mean = of.means[BARS[chosen.bars].counts]; // of all instances, also those without a bar
  const image = svg("svg", { class: "bars", viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": `${BARS[chosen.bars].label} by instance under ${data.arms[arm]}: ${number(Math.max(...totals))} on the busiest, ${number(mean)} in the mean` });
  const text = (x, line, anchor, said) => image.append(svg("text", { x, y: line, "text-anchor": anchor }, said));
  order.forEach((place, number_) => {
    const group = svg("g", {}, svg("title", {}, `${of.instances[place]}: ${stacks.map(([name, values]) => `${values[place].toLocaleString("en")} ${name}`).join(", ")}`));
    let below = 0;
    stacks.forEach(([, values], shade) => {
      const top = y(below + values[place]);
      group.append(svg("rect", { class: `s${shade}`, x: left + number_ * room + Math.min(2, room / 8), width: room * (room > 16 ? 0.82 : 0.9), y: top, height: Math.max(0, y(below) - top) }));
      below += values[place];
    });
    image.append(group);
  });
  image.append(svg("path", { class: "base", d: `M${left} ${base}H${width}` }), svg("path", { class: "mean", d: `M${left} ${y(mean)}H${width}` }));
  text(left - 6, y(mean) + 4, "end", number(mean));
  if (Math.abs(y(most) - y(mean)) > 14) text(left - 6, y(most) + 4, "end", number(most));
  text(left - 6, base, "end", "0");
  const every = Math.ceil(44 / room);
  order.forEach((place, number_) => { if (number_ % every === 0) text(left + (number_ + 0.5) * room, height - 6, "middle", of.instances[place].slice(-8)); });
  return image;
}

function imbalanceTable(found) {
  const heads = ["Arm", "Busiest ÷ mean, requests", "Busiest ÷ mean, prompt tokens computed", "Evenness of that (Jain)", "Prompt tokens from the cache", "Instances without any"];
  const rows = found.map(({ arm, of: { imbalance } }) => h("tr", {}, h("th", { scope: "row" }, armName(arm)),
    [imbalance.requests.toFixed(2), imbalance.computed.toFixed(2), imbalance.jain.toFixed(3), percent(imbalance.cached_share), number(imbalance.idle)].map((text) => h("td", {}, text))));
  return h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Imbalance of each arm" },
    h("table", { class: "figures" }, h("thead", {}, h("tr", {}, heads.map((text) => h("th", { scope: "col" }, text)))), h("tbody", {}, rows)));
}
