// The page: reads the form, runs answers side by side, shows the pools.

import { Answer, hide, node } from "./answer.js";
import { served, status, useKey } from "./api.js";
import { Preference, words } from "./preference.js";
import { Sweep } from "./sweep.js";

const POOL_EVERY_MS = 2000;
const OBJECTIVES_MAX = 3;
/** Prompted reward models of one objective each, as one entry of the picker. */
const MIXED = "";
const THEMES = ["as the system", "light", "dark"];

const $ = (id) => document.getElementById(id);
const form = $("controls");
const preference = new Preference($("preference"), () => ($("preference-text").textContent = words(preference.objectives, preference.weights)));
const sweep = new Sweep($("sweep-body"), showSwept);

let rewards = [];
let running = null;

// === what is served ===

async function load() {
  try {
    const { bases, rewards: all } = await served();
    if (bases.length === 0) throw new Error("No base worker is registered yet.");
    rewards = choices(all);
    fill($("model"), bases.map((model) => [model.id, model.id]));
    fill($("reward"), rewards.map(({ id, label }) => [id, label]));
    chooseReward();
    complain(null);
    $("key-form").hidden = true;
  } catch (error) {
    if (error.code === "unauthenticated") return askForKey(error);
    complain(error instanceof TypeError ? "The router cannot be reached." : error.message);
    setTimeout(load, POOL_EVERY_MS);
  }
}

/** The router wants to know who asks. */
function askForKey(error) {
  complain(sessionStorage.length > 0 ? error.message : null);
  $("key-form").hidden = false;
  $("key").focus();
}

/** Rewards to pick from: models of several objectives, and the prompted ones as a mix. */
function choices(all) {
  const names = (model) => model.uniarm.objectives.map((objective) => objective.name);
  const single = all.filter((model) => model.uniarm.single_objective);
  const own = all.filter((model) => !model.uniarm.single_objective);
  const listed = own.map((model) => ({ id: model.id, label: `${model.id} (${model.uniarm.method})`, objectives: names(model) }));
  if (single.length > 0) listed.push({ id: MIXED, label: "prompted models, mixed", objectives: single.flatMap(names), models: single });
  return listed;
}

function fill(select, options) {
  const chosen = select.value;
  select.replaceChildren(...options.map(([value, text]) => Object.assign(node("option", "", text), { value })));
  if (options.some(([value]) => value === chosen)) select.value = chosen;
}

const reward = () => rewards.find(({ id }) => id === $("reward").value);

function chooseReward() {
  const objectives = reward()?.objectives ?? [];
  const chips = objectives.map((name, index) => {
    const box = Object.assign(document.createElement("input"), { type: "checkbox", value: name, checked: index < 2 });
    return node("label", "chip", box, node("span", "", name));
  });
  $("objectives").replaceChildren(...chips);
  $("objectives").hidden = objectives.length < 3;
  chooseObjectives();
}

function chooseObjectives() {
  const boxes = [...$("objectives").querySelectorAll("input")];
  const chosen = boxes.filter((box) => box.checked);
  for (const box of boxes) box.disabled = box.checked ? chosen.length === 1 : chosen.length === OBJECTIVES_MAX;
  preference.show(chosen.map((box) => box.value));
  const axes = preference.objectives.length >= 2;
  $("sweep").hidden = !axes;
  // A reward model without objectives has none to prefer.
  $("preferred").hidden = preference.objectives.length === 0;
}

// === requests ===

function common() {
  return {
    model: $("model").value,
    messages: [{ role: "user", content: $("prompt").value }],
    temperature: Number($("temperature").value),
    seed: Number($("seed").value),
    max_tokens: Number($("tokens").value),
  };
}

/** Guidance toward one point of the simplex. Prompted models are a term each. */
function guidance(weights, strength = Number($("strength").value)) {
  const { id, models } = reward();
  if (!models) return [{ reward: id, preference: preference.objectives.length ? preference.asObject(weights) : null, strength }];
  return terms(weights.map((weight) => weight * strength)).filter((term) => term.strength > 0);
}

/** A term for each objective alone. */
function terms(strengths) {
  const { id, models } = reward();
  const serving = (name) => models?.find((model) => model.uniarm.objectives.some((objective) => objective.name === name)).id ?? id;
  return preference.objectives.map((name, index) => ({ reward: serving(name), preference: { [name]: 1 }, strength: strengths[index] }));
}

/** Answers to run: a title, a subtitle, and a body each. */
function planned() {
  const strength = Number($("strength").value);
  const guided = (weights) => ({ title: "Guided", subtitle: [words(preference.objectives, weights), `strength ${strength}`].filter(Boolean).join(" · "), body: { ...common(), guidance: guidance(weights) } });
  const unguided = { title: "Unguided", subtitle: "the base model alone", body: common() };
  if (!reward()) return [unguided];
  const isFront = form.elements.compare.value === "front";
  return isFront ? preference.spread(3).map(guided) : [unguided, guided(preference.weights)];
}

async function generate() {
  const plan = planned();
  const answers = plan.map(({ title, subtitle }) => new Answer(title, subtitle));
  $("answers").replaceChildren(...answers.map((answer) => answer.card));
  await whileRunning(async (signal) => {
    await Promise.all(answers.map((answer, index) => answer.run(plan[index].body, signal)));
  });
  announce(answers.map((answer, index) => `${plan[index].title}: ${answer.card.dataset.state}, ${answer.entries.length} tokens.`).join(" "));
}

async function sweepNow() {
  // Terms of strength 0 change no token; they tell what each objective alone thinks of it.
  const probes = terms(preference.objectives.map(() => 0));
  const request = (weights) => ({ ...common(), max_tokens: Math.min(Number($("tokens").value), 64), guidance: [...(weights ? guidance(weights) : []), ...probes] });
  await whileRunning(async (signal) => {
    try {
      await sweep.run(preference, request, signal);
      announce("The sweep is done.");
    } catch (error) {
      if (signal.aborted) return;
      running.abort();
      complain(error instanceof TypeError ? "The router cannot be reached." : error.message);
    }
  });
}

function showSwept(point) {
  const answer = new Answer(point.weights ? "Guided" : "Unguided", point.name);
  answer.text.textContent = point.text;
  answer.foot.textContent = `${point.tokens} tokens, from the sweep`;
  answer.card.dataset.state = "done";
  $("answers").replaceChildren(answer.card);
  $("answers").focus();
}

/** One thing at a time: what ran before is stopped. */
async function whileRunning(work) {
  running?.abort();
  const own = new AbortController();
  running = own;
  complain(null);
  hide();
  $("stop").disabled = false;
  document.body.dataset.running = "";
  await work(own.signal);
  if (running !== own) return;
  running = null;
  $("stop").disabled = true;
  delete document.body.dataset.running;
}

// === what is said ===

const announce = (text) => ($("announcer").textContent = text);

function complain(text) {
  $("banner").hidden = !text;
  $("banner").textContent = text ?? "";
}

async function showPool() {
  if (!document.hidden) {
    try {
      const { members } = await status();
      $("pool").replaceChildren(...members.filter((member) => member.role !== "router").map(memberChip));
    } catch (error) {
      const chip = node("li", "", "the router does not answer");
      chip.dataset.unwell = "";
      $("pool").replaceChildren(...(error.code === "unauthenticated" ? [] : [chip]));
    }
  }
  setTimeout(showPool, POOL_EVERY_MS);
}

function memberChip(member) {
  const load = node("span", "", `${member.under_way}/${member.capacity}`);
  const chip = node("li", "", node("b", "", member.role), ` ${member.serves.join(", ")} `, load);
  if (member.left_alone) chip.dataset.unwell = "";
  if (member.under_way > 0) chip.dataset.busy = "";
  return chip;
}

function showTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $("theme").setAttribute("aria-label", `Colours: ${theme}`);
  localStorage.setItem("theme", theme);
}

// === wiring ===

for (const name of ["strength", "temperature", "tokens"]) {
  const show = () => ($(`${name}-text`).textContent = $(name).value);
  $(name).addEventListener("input", show);
  show();
}
form.addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey($("key").value.trim());
  load();
});
$("stop").addEventListener("click", () => running?.abort());
$("sweep-go").addEventListener("click", () => form.reportValidity() && sweepNow());
$("reward").addEventListener("change", chooseReward);
$("objectives").addEventListener("change", chooseObjectives);
$("draw").addEventListener("click", () => ($("seed").value = Math.floor(Math.random() * 1e6)));
$("theme").addEventListener("click", () => showTheme(THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length]));
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  if (event.key === "Escape") {
    running?.abort();
    hide();
  }
});
addEventListener("scroll", hide, { passive: true });
showTheme(localStorage.getItem("theme") ?? THEMES[0]);
load();
showPool();
