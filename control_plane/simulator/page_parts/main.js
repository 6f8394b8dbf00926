// Puts it together: what is drawn at first, and what again when something is chosen.

function controls() {
  const form = byId("controls");
  form.addEventListener("submit", (event) => event.preventDefault());
  const toggle = (arm) => (event) => {
    if (event.target.checked) chosen.hidden.delete(arm);
    else chosen.hidden.add(arm);
    draw();
  };
  form.append(
    select("Rate", data.rates.map((rate, number_) => [number_, rateText(rate)]), "rate"),
    data.arms.length > 1
      ? h("fieldset", {}, h("legend", { class: "small" }, "Arms"), data.arms.map((_, arm) => h("label", {}, h("input", { type: "checkbox", checked: true, onchange: toggle(arm) }), armName(arm))))
      : "",
  );
}

// They stay in sight while one scrolls, unless they take too much of it.
function fitControls() {
  const form = byId("controls");
  form.classList.toggle("tall", form.offsetHeight > innerHeight / 8);
}

function hints() {
  const seeds = Math.max(1, ...data.cdfs.filter((one) => one.rate === chosen.rate).map((one) => one.seeds));
  const rate = rateText(data.rates[chosen.rate]);
  const lowest = (data.timelines.find((one) => one.rate === chosen.rate) || {}).seed;
  const of = lowest == null ? "" : `, seed ${lowest}`;
  byId("latency-hint").textContent = `Of completed requests at ${rate}: the share of them (upwards) that took no longer than a time (to the right, logarithmic). `
    + (seeds > 1 ? `Each line is the mean over ${seedsText(seeds)} of each quantile; the shade reaches from the least to the most of them. ` : "") + "Marks at 50 % and 90 %.";
  byId("timeline-hint").textContent = `At ${rate}${of}, from the first arrival: the time before the judged window and after it is here, too. ${data.thinned.timeline.join(" ")}`;
  byId("placement-hint").textContent = `At ${rate}${of}: judged requests by the instance that answered them, all arms on one scale. The dashed line is the mean. The figures of the table are means over ${seedsText(seeds)}, of all instances. ${data.thinned.placement.join(" ")}`;
}

function draw() {
  if (!data.rates.length) return;
  const focused = document.activeElement && document.activeElement.name;
  clearPlots();
  verdict();
  summaryTable();
  hints();
  byRate("left");
  byRate("right");
  Object.keys(TIMES).forEach(cdf);
  queue();
  heat();
  placement();
  // what was chosen with the keyboard keeps it, though it was made anew
  const again = focused && document.querySelector(`select[name="${focused}"]`);
  if (again && again !== document.activeElement) again.focus();
}

function begin() {
  head();
  if (!data.rates.length) {
    document.querySelector("main").replaceChildren(h("p", { class: "note" }, "No run is in this comparison."));
    return;
  }
  controls();
  fitControls();
  everything();
  draw();
  let width = document.body.clientWidth;
  new ResizeObserver(() => {
    if (document.body.clientWidth === width) return;
    width = document.body.clientWidth;
    requestAnimationFrame(() => { fitControls(); draw(); });
  }).observe(document.body);
  for (const query of ["(prefers-color-scheme: dark)", "print", "(resolution: 1dppx)"]) matchMedia(query).addEventListener("change", draw);
}

begin();
