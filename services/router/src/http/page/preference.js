// The preference: a slider between two objectives, a triangle over three.

const SVG = "http://www.w3.org/2000/svg";
// Corners in a view of 240 × 214; the third objective is on top.
const CORNERS = [[20, 184], [220, 184], [120, 22]];
const KEY_STEP = 0.05;

/** A control over up to three objectives. `changed` hears the weights, which sum to one. */
export class Preference {
  constructor(root, changed) {
    Object.assign(this, { root, changed, objectives: [], weights: [] });
  }

  /** Begins in the middle of these objectives. */
  show(objectives) {
    this.objectives = objectives;
    this.weights = objectives.map(() => 1 / objectives.length);
    this.root.replaceChildren();
    if (objectives.length === 2) this.#showSlider();
    if (objectives.length === 3) this.#showTriangle();
    this.changed();
  }

  /** As a request has it. */
  asObject(weights = this.weights) {
    return Object.fromEntries(this.objectives.map((name, index) => [name, round(weights[index])]));
  }

  /** A few points of the simplex: corners and what lies between. */
  spread(steps) {
    if (this.objectives.length < 2) return [[1]];
    if (this.objectives.length === 2) {
      return Array.from({ length: steps }, (_, index) => [1 - index / (steps - 1), index / (steps - 1)]);
    }
    const corners = [[1, 0, 0], [0, 1, 0], [0, 0, 1]];
    if (steps <= 3) return corners;
    return [...corners, [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5], [1 / 3, 1 / 3, 1 / 3]];
  }

  #set(weights) {
    const sum = weights.reduce((a, b) => a + Math.max(b, 0), 0) || 1;
    this.weights = weights.map((weight) => Math.max(weight, 0) / sum);
    this.changed();
  }

  #showSlider() {
    const [left, right] = this.objectives;
    const slider = Object.assign(document.createElement("input"), { type: "range", min: 0, max: 100, step: 1, value: 50 });
    slider.id = "preference-slider";
    slider.setAttribute("aria-label", `From ${left} to ${right}`);
    const say = () => slider.setAttribute("aria-valuetext", words(this.objectives, this.weights));
    slider.addEventListener("input", () => {
      this.#set([1 - slider.value / 100, slider.value / 100]);
      say();
    });
    const ends = document.createElement("div");
    ends.className = "ends";
    ends.append(...[left, right].map((name) => Object.assign(document.createElement("span"), { textContent: name })));
    this.root.append(slider, ends);
    say();
  }

  #showTriangle() {
    const svg = element("svg", { viewBox: "0 0 240 214", class: "triangle" });
    svg.append(element("path", { d: `M${CORNERS.map((corner) => corner.join(" ")).join("L")}Z`, class: "plane" }));
    CORNERS.forEach(([x, y], index) => {
      const label = element("text", { x, y: index === 2 ? y - 8 : y + 20, "text-anchor": ["start", "end", "middle"][index] });
      label.textContent = this.objectives[index];
      svg.append(label);
    });
    const knob = element("circle", { r: 9, class: "knob", tabindex: 0, role: "slider", "aria-label": `Between ${this.objectives.join(", ")}` });
    svg.append(knob);
    const place = () => {
      const [x, y] = [0, 1].map((axis) => this.weights.reduce((sum, weight, index) => sum + weight * CORNERS[index][axis], 0));
      const shown = { cx: x, cy: y, "aria-valuenow": Math.round(100 * this.weights[2]), "aria-valuemin": 0, "aria-valuemax": 100 };
      set(knob, { ...shown, "aria-valuetext": words(this.objectives, this.weights) });
    };
    const move = (weights) => {
      this.#set(weights);
      place();
    };
    drag(svg, (x, y) => move(barycentric(x, y)));
    knob.addEventListener("keydown", (event) => {
      const steps = { ArrowLeft: [1, -1, 0], ArrowRight: [-1, 1, 0], ArrowUp: [-0.5, -0.5, 1], ArrowDown: [0.5, 0.5, -1] };
      const step = steps[event.key];
      if (!step) return;
      event.preventDefault();
      move(this.weights.map((weight, index) => weight + KEY_STEP * step[index]));
    });
    this.root.append(svg);
    place();
  }
}

/** "70 % positive · 30 % concise" */
export function words(objectives, weights) {
  const shown = objectives.map((name, index) => [Math.round(100 * weights[index]), name]).filter(([share]) => share > 0);
  return shown.map(([share, name]) => (objectives.length === 1 ? name : `${share} % ${name}`)).join(" · ");
}

export function element(name, attributes) {
  return set(document.createElementNS(SVG, name), attributes);
}

function set(node, attributes) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

const round = (weight) => Math.round(1000 * weight) / 1000;

/** Weights of a point of the view; outside of the triangle the nearest edge is meant. */
function barycentric(x, y) {
  const [[ax, ay], [bx], [, cy]] = CORNERS;
  const top = (ay - y) / (ay - cy);
  const right = (x - ax) / (bx - ax) - top / 2;
  return [1 - top - right, right, top].map((weight) => Math.min(Math.max(weight, 0), 1));
}

function drag(svg, moved) {
  const at = (event) => {
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    moved(point.x, point.y);
  };
  svg.addEventListener("pointerdown", (event) => {
    svg.setPointerCapture(event.pointerId);
    at(event);
  });
  svg.addEventListener("pointermove", (event) => svg.hasPointerCapture(event.pointerId) && at(event));
}
