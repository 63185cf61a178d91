// A sketch of the front: an answer for each of a few preferences, scored under each objective alone.

import { chat } from "./api.js";
import { node } from "./answer.js";
import { element, words } from "./preference.js";

const STEPS = 5;
// Answers at once: browsers open six connections to a server, and the page wants one itself.
const TOGETHER = 3;
const VIEW = { width: 520, height: 330, left: 58, right: 18, top: 18, bottom: 46 };

/** Runs and draws a sweep. `request(weights)` is what an answer asks for; its last terms are one for each objective. */
export class Sweep {
  constructor(root, selected) {
    Object.assign(this, { root, selected, points: [] });
  }

  async run(preference, request, signal) {
    this.objectives = preference.objectives;
    const guided = preference.spread(STEPS).map((weights) => ({ weights, name: words(this.objectives, weights) }));
    this.points = [{ weights: null, name: "unguided" }, ...guided].map((point) => ({ ...point, text: "", tokens: 0, sums: this.objectives.map(() => 0) }));
    this.#draw();
    const waiting = [...this.points];
    const worker = async () => {
      for (let point = waiting.shift(); point && !signal.aborted; point = waiting.shift()) {
        await this.#answer(point, request(point.weights), signal);
      }
    };
    await Promise.all(Array.from({ length: TOGETHER }, worker));
  }

  async #answer(point, body, signal) {
    for await (const chunk of chat({ ...body, logprobs: true }, signal)) {
      for (const { delta, logprobs } of chunk.choices) {
        point.text += delta.content ?? "";
        for (const { uniarm } of logprobs?.content ?? []) {
          point.tokens += 1;
          const probes = uniarm.reward_logprobs.slice(-this.objectives.length);
          probes.forEach((logprob, index) => (point.sums[index] += logprob - uniarm.base_logprob));
        }
      }
      this.#draw();
    }
    point.isDone = true;
    this.#draw();
  }

  /** Mean over the answer's tokens. */
  #scores = (point) => point.sums.map((sum) => sum / Math.max(point.tokens, 1));

  #draw() {
    const begun = this.points.filter((point) => point.tokens > 0);
    const [first, second] = this.objectives;
    const chart = element("svg", { viewBox: `0 0 ${VIEW.width} ${VIEW.height}`, class: "chart", role: "img" });
    chart.setAttribute("aria-label", `Answers by ${first} and ${second}; the table below has the numbers`);
    if (begun.length > 0) this.#drawPoints(chart, begun);
    chart.append(caption(first, { x: (VIEW.left + VIEW.width) / 2, y: VIEW.height - 8, "text-anchor": "middle" }));
    chart.append(caption(second, { x: 16, y: VIEW.height / 2, "text-anchor": "middle", transform: `rotate(-90 16 ${VIEW.height / 2})` }));
    this.root.replaceChildren(chart, this.#table());
  }

  #drawPoints(chart, begun) {
    const scores = begun.map(this.#scores);
    const [x, y] = [0, 1].map((axis) => scale(scores.map((score) => score[axis]), axis));
    for (const axis of [x, y]) for (const tick of axis.ticks) chart.append(...axis.mark(tick));
    const best = scores.filter(([a, b]) => !scores.some(([c, d]) => c >= a && d >= b && (c > a || d > b)));
    best.sort((a, b) => a[0] - b[0]);
    chart.append(element("polyline", { class: "front", points: best.map(([a, b]) => `${x.at(a)},${y.at(b)}`).join(" ") }));
    begun.forEach((point, index) => {
      const [a, b] = scores[index];
      const kind = point.weights ? "guided" : "unguided";
      const dot = element("circle", { cx: x.at(a), cy: y.at(b), r: point.weights ? 7 : 6, class: `dot ${kind}${point.isDone ? "" : " moving"}` });
      dot.append(element("title", {}));
      dot.firstChild.textContent = `${point.name}: ${point.text}`;
      const share = point.weights ? `${Math.round(100 * point.weights[0])}` : "unguided";
      chart.append(dot, caption(share, { x: x.at(a) + 11, y: y.at(b) + 4, class: "share" }));
    });
  }

  #table() {
    const head = node("tr", "", ...["preference", ...this.objectives, "tokens", "answer"].map((name) => node("th", "", name)));
    const rows = this.points.map((point) => {
      const numbers = point.tokens ? this.#scores(point).map((score) => score.toFixed(2)) : this.objectives.map(() => "–");
      const show = Object.assign(node("button", "quiet", point.text ? `${point.text.slice(0, 60)}…` : "waiting…"), { type: "button" });
      show.disabled = !point.text;
      show.addEventListener("click", () => this.selected(point));
      return node("tr", "", ...[point.name, ...numbers, point.tokens].map((cell) => node("td", "", `${cell}`)), node("td", "", show));
    });
    return node("div", "table", node("table", "", node("thead", "", head), node("tbody", "", ...rows)));
  }
}

function caption(text, attributes) {
  const made = element("text", attributes);
  made.textContent = text;
  return made;
}

/** From values to the view, with a few round ticks. `axis` 0 goes right, 1 up. */
function scale(values, axis) {
  let [low, high] = [Math.min(...values), Math.max(...values)];
  const room = Math.max((high - low) * 0.15, 0.02);
  [low, high] = [low - room, high + room];
  const [from, to] = axis === 0 ? [VIEW.left, VIEW.width - VIEW.right] : [VIEW.height - VIEW.bottom, VIEW.top];
  const at = (value) => from + ((value - low) / (high - low)) * (to - from);
  const rough = (high - low) / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough);
  const ticks = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high; tick += step) ticks.push(tick);
  const mark = (tick) => {
    const [p, text] = [at(tick), (Math.abs(tick) < 1e-9 ? 0 : tick).toFixed(step < 0.1 ? 2 : 1)];
    return axis === 0
      ? [element("line", { x1: p, x2: p, y1: VIEW.top, y2: VIEW.height - VIEW.bottom, class: "grid" }), caption(text, { x: p, y: VIEW.height - VIEW.bottom + 16, "text-anchor": "middle", class: "tick" })]
      : [element("line", { x1: VIEW.left, x2: VIEW.width - VIEW.right, y1: p, y2: p, class: "grid" }), caption(text, { x: VIEW.left - 6, y: p + 4, "text-anchor": "end", class: "tick" })];
  };
  return { at, ticks, mark };
}
