// The samples of a task: filtered, searched and opened. All tables of the page are there without this script.
"use strict";
const D = JSON.parse(document.getElementById("data").textContent);
const labels = D.models.map(m => m.label);
const colour = label => `var(--c${labels.indexOf(label) % 6})`;
function make(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key === "text") node.textContent = value;
    else if (key === "style") node.style.cssText = value;
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  for (const child of children.flat()) if (child !== null && child !== undefined) node.append(child);
  return node;
}
const by = id => document.getElementById(id);
const nameOf = metric => (D.metrics[metric] || {label: metric}).label;

const state = {task: null, model: null, filter: "all", search: "", place: 0, found: []};
const filters = [["all", "all"], ["wrong", "wrong or low (below 50)"], ["right", "right (100)"], ["changed", "changed between models"], ["unfinished", "ran into the limit"], ["empty", "empty answer"]];
for (const task of Object.keys(D.samples)) by("task").append(make("option", {value: task, text: task}));
for (const [value, text] of filters) if (value !== "changed" || labels.length > 1) by("filter").append(make("option", {value, text}));
function answerOf(document_) { return document_.answers.find(a => a.model === state.model) || null; }
function passes(d) {
  const a = answerOf(d);
  if (!a) return false;
  if (state.filter === "wrong" && !(a.value < .5)) return false;
  if (state.filter === "right" && a.value !== 1) return false;
  if (state.filter === "changed") {
    const values = d.answers.map(x => x.value);
    if (values.length < 2 || Math.max(...values) - Math.min(...values) < .1) return false;
  }
  if (state.filter === "unfinished" && !a.finish.includes("length")) return false;
  if (state.filter === "empty" && !a.texts.some(t => !t.trim())) return false;
  if (!state.search) return true;
  const needle = state.search.toLowerCase();
  return [d.prompt || a.prompt || "", ...d.references, ...d.answers.flatMap(x => x.texts)].some(t => t.toLowerCase().includes(needle));
}
function mark(value, unit, label) {
  if (value === null || value === undefined) return make("span", {class: "mark mid", text: "–"});
  const text = unit === "percent" ? (100 * value).toFixed(0) : value.toFixed(0);
  return make("span", {class: "mark " + (unit !== "percent" ? "mid" : value >= .999 ? "good" : value < .5 ? "bad" : "mid"), title: label, text});
}
function refill() {
  const group = D.samples[state.task];
  const present = labels.filter(l => group && group.documents.some(d => d.answers.some(a => a.model === l)));
  if (!present.includes(state.model)) state.model = present[0] || null;
  by("model").replaceChildren(...present.map(l => make("option", {value: l, text: l, selected: l === state.model})));
  by("model").value = state.model || "";
}
function show() {
  const group = D.samples[state.task];
  state.found = group ? group.documents.filter(passes) : [];
  state.place = Math.max(0, Math.min(state.place, state.found.length - 1));
  const left = group && group.documents.length < group.total ? ` (the page holds ${group.documents.length} of ${group.total}; samples.jsonl has all)` : "";
  by("count").textContent = group ? `${state.found.length} of ${group.documents.length} documents${left}` : "No samples.";
  const rows = state.found.slice(0, 400).map((d, i) => {
    const a = answerOf(d);
    return make("li", {}, make("button", {"aria-current": i === state.place ? "true" : "false", onclick: () => { state.place = i; show(); }},
      make("span", {class: "top"}, make("span", {text: `document ${d.id}`}), make("span", {class: "marks"}, d.answers.map(x => mark(x.value, group.unit, x.model)))),
      make("span", {class: "line", text: (a.texts[0] || "(empty)").replace(/\s+/g, " ").slice(0, 90)})));
  });
  if (state.found.length > 400) rows.push(make("li", {class: "empty", text: `${state.found.length - 400} more: narrow the filter, or use Next`}));
  by("list").replaceChildren(...rows);
  const current = by("list").querySelector("[aria-current=true]");
  if (current) by("list").scrollTop = Math.max(0, current.offsetTop - by("list").offsetTop - 80);
  if (state.ready) remember();
  by("sample").replaceChildren(...(state.found.length ? sample(state.found[state.place], group) : [make("p", {class: "empty", text: "Nothing matches."})]));
}
function block(title, text) { return [make("h3", {text: title}), make("pre", {text: text})]; }
function sample(d, group) {
  const go = step => () => { state.place += step; show(); };
  const parts = [make("div", {class: "pager"}, make("button", {onclick: go(-1), disabled: state.place === 0, text: "← Previous"}),
    make("b", {text: `document ${d.id}`}), make("button", {onclick: go(1), disabled: state.place >= state.found.length - 1, text: "Next →"}))];
  if (d.prompt !== undefined) parts.push(...block("Prompt", d.prompt));
  parts.push(...block(d.references.length > 1 ? `References (${d.references.length})` : "Reference", d.references.join("\n———\n")));
  parts.push(make("h3", {text: "Answers"}));
  for (const a of d.answers) {
    const box = make("div", {class: "answer", style: `border-left-color:${colour(a.model)}`});
    const facts = [];
    if (a.finish.includes("length")) facts.push("ran into its token limit");
    if (a.cut) facts.push(`prompt cut by ${a.cut} tokens`);
    box.append(make("header", {}, make("b", {text: a.model}), mark(a.value, group.unit, group.metric), make("span", {class: "soft", text: [nameOf(group.metric), ...facts].join(" · ")})));
    if (a.prompt !== undefined) box.append(make("details", {}, make("summary", {text: "prompt of this model"}), make("pre", {text: a.prompt})));
    a.texts.forEach((text, i) => {
      box.append(make("pre", {text: text || "(empty)"}));
      const detail = a.details[i] || {};
      const short = Object.entries(detail).filter(([key]) => key !== "program");
      if (short.length) box.append(make("p", {class: "soft", style: "font-size:13px;overflow-wrap:anywhere", text: short.map(([key, value]) => `${key.replace(/_/g, " ")}: ${value}`).join(" · ")}));
      if (detail.program) box.append(make("details", {class: "more"}, make("summary", {text: "program that was run"}), make("pre", {text: detail.program})));
    });
    parts.push(box);
  }
  return parts;
}
function remember() {
  const parts = new URLSearchParams({task: state.task || "", model: state.model || "", filter: state.filter});
  if (state.search) parts.set("find", state.search);
  if (state.found.length) parts.set("document", state.found[state.place].id);
  try { history.replaceState(null, "", "#" + parts); } catch (error) { /* a sandboxed viewer may forbid it */ }
}
by("task").addEventListener("change", e => { state.task = e.target.value; state.place = 0; refill(); show(); });
by("model").addEventListener("change", e => { state.model = e.target.value; state.place = 0; show(); });
by("filter").addEventListener("change", e => { state.filter = e.target.value; state.place = 0; show(); });
by("search").addEventListener("input", e => { state.search = e.target.value; state.place = 0; show(); });
const asked = new URLSearchParams(location.hash.slice(1));
state.task = asked.get("task") in D.samples ? asked.get("task") : Object.keys(D.samples)[0] || null;
state.model = asked.get("model");
if (filters.some(([value]) => value === asked.get("filter"))) state.filter = asked.get("filter");
state.search = asked.get("find") || "";
by("task").value = state.task; by("filter").value = state.filter; by("search").value = state.search;
refill();
if (state.task) state.place = Math.max(0, D.samples[state.task].documents.filter(passes).findIndex(d => String(d.id) === asked.get("document")));
show();
state.ready = true;
by("samples").hidden = false;
