// The page: what each control does, and what is shown of the session that the server keeps.

import { finished, get, post, postNothing } from "./api.js";
import { Region } from "./region.js";

const SMALL = 384; // pictures with a side below this are shown with hard pixels
const KEPT = "fastvq-session";
const $ = (id) => document.getElementById(id);

let session = null;
let limits = { max_upload: 32 << 20 };
let busy = false;

const region = new Region($("region"), (pixels, box) => {
  $("region-facts").textContent = pixels ? `${pixels} pixels, in the box ${box.join(", ")}` : "Drag over the picture.";
  if (box) ["x0", "y0", "x1", "y1"].forEach((id, i) => { $(id).value = box[i]; });
  refreshButtons();
});

function say(error) {
  $("error").textContent = error ? error.message || String(error) : "";
  $("error").hidden = !error;
}

function refreshButtons() {
  const any = region.mask?.some(Boolean);
  for (const id of ["do-resample", "do-paint", "do-transplant", "open-index", "open-source", "undo"]) $(id).disabled = busy;
  if (busy || !session) return;
  $("do-resample").disabled = !any || !session.prior;
  $("do-paint").disabled = !any || $("code").value === "" || session.depth > 1;
  $("do-transplant").disabled = !any || !session.source;
  $("undo").disabled = session.edits === 0;
  for (const button of $("drafts").children) button.disabled = false;
}

// Runs one request after another: starts a job, follows it, and shows the session that it results in.
async function work(what, start) {
  if (busy) return;
  busy = true;
  say(null);
  refreshButtons();
  $("status-text").textContent = what;
  $("progress").removeAttribute("value");
  $("status").hidden = false;
  try {
    const first = await start();
    const result = first.job === undefined ? first : await finished(first, ({ state, progress, ahead, job }) => {
      $("cancel").onclick = () => postNothing(`/api/jobs/${job}/cancel`).catch(say);
      $("status-text").textContent = state === "waiting" && ahead ? `${what}: ${ahead} before it` : what;
      if (progress > 0) $("progress").value = progress;
    });
    if (result) show(result);
  } catch (error) {
    say(error);
  } finally {
    busy = false;
    $("status").hidden = true;
    refreshButtons();
  }
}

function view(name) {
  return `/api/sessions/${session.id}/views/${name}?v=${session.version}`;
}

function setImage(id, name) {
  const image = $(id);
  image.src = view(name);
  image.classList.toggle("small", Math.max(session.width, session.height) < SMALL);
}

function fill(select, values, chosen) {
  const wanted = values.map(({ value, text }) => `${value} ${text}`).join();
  if (select.dataset.filled !== wanted) {
    select.replaceChildren(...values.map(({ value, text }) => new Option(text, value)));
    select.dataset.filled = wanted;
    if (chosen !== undefined) select.value = chosen;
  }
}

function show(next) {
  const opened = session?.id !== next.id;
  session = next;
  sessionStorage.setItem(KEPT, session.id);
  $("main").hidden = false;
  region.resize(session.width, session.height);
  if (opened) region.clear();
  const shapes = session.levels.map(({ ids }) => `${ids[0].length} x ${ids.length}`);
  $("facts").textContent = `${session.name}: ${session.width} x ${session.height} pixels, ${shapes.join(" and ")} ids`;
  for (const name of ["picture", "reconstruction", "before", "after", "difference"]) setImage(name, name);
  const levels = session.levels.map(({ codes }, i) => ({ value: i, text: `level ${i} (${codes} codes)` }));
  fill($("ids-level"), levels, session.levels.length - 1);
  fill($("paint-level"), levels, session.levels.length - 1);
  $("ids-level").hidden = $("paint-level-row").hidden = levels.length === 1;
  const classes = [...Array(session.classes || 0).keys()].map((i) => ({ value: i, text: String(i) }));
  fill($("label"), classes, session.label ?? 0);
  if (opened && session.label !== null && session.classes) $("label").value = session.label;
  $("label-row").hidden = !session.classes;
  $("no-prior").hidden = session.prior;
  $("no-prior").textContent = session.why_no_prior;
  $("index").max = $("source-index").max = Math.max(0, session.held_out - 1);
  $("result").hidden = session.edits === 0;
  $("source").hidden = !session.source;
  if (session.source) setImage("source", "source");
  $("save").href = `/api/sessions/${session.id}/picture.png`;
  $("save-ids").href = `/api/sessions/${session.id}/ids.json`;
  $("seed-used").textContent = session.seed === null ? "" : `The drafts were drawn with seed ${session.seed}.`;
  showDrafts();
  showIds();
  if (opened) showSwatches();
  refreshButtons();
}

function showDrafts() {
  $("drafts-section").hidden = session.drafts < 2;
  $("drafts").replaceChildren(...[...Array(session.drafts).keys()].map((i) => {
    const button = document.createElement("button");
    const image = document.createElement("img");
    button.type = "button";
    button.setAttribute("aria-pressed", String(i === session.chosen));
    image.src = view(`draft-${i}`);
    image.alt = `draft ${i + 1}`;
    image.classList.toggle("small", Math.max(session.width, session.height) < SMALL);
    button.append(image);
    button.onclick = () => work("Taking the draft", () => post(`/api/sessions/${session.id}/choose`, { draft: i }));
    return button;
  }));
}

function showIds() {
  $("ids").src = view(`ids-${$("ids-level").value || 0}`);
  $("ids").style.aspectRatio = `${session.width} / ${session.height}`;
}

function showSwatches() {
  if ($("paint").hidden) return;
  const address = `/api/sessions/${session.id}/views/swatches-${$("paint-level").value || 0}`;
  if (!$("swatches").src.endsWith(address)) $("swatches").src = address;
  markSwatch();
}

// The chosen code's place among the swatches.
function markSwatch() {
  const { codes, columns } = session.levels[$("paint-level").value || 0];
  const code = $("code").value === "" ? -1 : Number($("code").value);
  const mark = $("swatch-mark");
  mark.hidden = !(code >= 0 && code < codes);
  const rows = Math.ceil(codes / columns);
  mark.style.left = `${(100 * (code % columns)) / columns}%`;
  mark.style.top = `${(100 * Math.floor(code / columns)) / rows}%`;
  mark.style.width = `${100 / columns}%`;
  mark.style.height = `${100 / rows}%`;
  $("code").max = codes - 1;
  refreshButtons();
}

// The position [column, row] under the pointer in a picture of columns x rows.
function under(event, columns, rows) {
  const place = event.target.getBoundingClientRect();
  const limit = (share, size) => Math.min(size - 1, Math.max(0, Math.floor(share * size)));
  return [limit((event.clientX - place.left) / place.width, columns),
    limit((event.clientY - place.top) / place.height, rows)];
}

function idUnder(event) {
  const { ids } = session.levels[$("ids-level").value || 0];
  const [column, row] = under(event, ids[0].length, ids.length);
  return ids[row][column];
}

function openPicture(file) {
  const options = new URLSearchParams({ run: $("run").value, size: $("side").value });
  if (file) options.set("name", file.name);
  else options.set("index", $("index").value || 0);
  return work("Opening the picture", () => (file ? post(`/api/open?${options}`, file) : postNothing(`/api/open?${options}`)));
}

function openSource(file) {
  const options = new URLSearchParams(file ? { name: file.name } : { index: $("source-index").value || 0 });
  const path = `/api/sessions/${session.id}/source?${options}`;
  return work("Opening the picture", () => (file ? post(path, file) : postNothing(path)));
}

function chosenFile(input, open) {
  const [file] = input.files;
  input.value = "";
  if (!file) return;
  if (file.size > limits.max_upload) say(new Error(`the picture must have at most ${limits.max_upload >> 20} MiB`));
  else open(file);
}

function edit(what, options) {
  const body = { runs: region.runs(), soft: Number($("soft").value) || 0, ...options };
  return work(what, () => post(`/api/sessions/${session.id}/edit`, body));
}

function selectTab(chosen) {
  for (const tab of document.querySelectorAll("[role=tab]")) {
    tab.setAttribute("aria-selected", String(tab === chosen));
    $(tab.getAttribute("aria-controls")).hidden = tab !== chosen;
  }
  if (session) showSwatches();
}

$("open").onsubmit = (event) => { event.preventDefault(); openPicture(null); };
$("upload").onchange = () => chosenFile($("upload"), openPicture);
$("source-upload").onchange = () => chosenFile($("source-upload"), openSource);
$("open-source").onclick = () => openSource(null);
$("clear").onclick = () => region.clear();
$("set-box").onclick = () => region.setBox(...["x0", "y0", "x1", "y1"].map((id) => Number($(id).value)));
for (const tool of document.querySelectorAll("[name=tool]")) tool.onchange = () => { region.tool = tool.value; };
$("brush").oninput = () => {
  region.radius = Number($("brush").value);
  $("brush-value").textContent = `${$("brush").value} px`;
};
$("temperature").oninput = () => { $("temperature-value").textContent = Number($("temperature").value).toFixed(2); };
for (const tab of document.querySelectorAll("[role=tab]")) tab.onclick = () => selectTab(tab);
$("ids-level").onchange = showIds;
$("ids").onmousemove = (event) => { $("id-under").textContent = `id ${idUnder(event)}`; };
$("ids").onmouseleave = () => { $("id-under").textContent = ""; };
$("ids").onclick = (event) => {
  $("code").value = [idUnder(event)].flat()[0];
  $("paint-level").value = $("ids-level").value || 0;
  selectTab($("tab-paint"));
};
$("paint-level").onchange = showSwatches;
$("code").oninput = markSwatch;
$("swatches").onclick = (event) => {
  const { codes, columns } = session.levels[$("paint-level").value || 0];
  const [column, row] = under(event, columns, Math.ceil(codes / columns));
  if (row * columns + column < codes) $("code").value = row * columns + column;
  markSwatch();
};
$("do-resample").onclick = () => edit("Drawing the region again", {
  way: "resample",
  label: session.classes ? Number($("label").value) : null,
  temperature: Number($("temperature").value),
  drafts: Number($("draft-count").value),
  candidates: Number($("candidates").value),
  seed: $("seed").value === "" ? null : Number($("seed").value),
});
$("do-paint").onclick = () => edit("Painting the region", {
  way: "paint",
  codes: session.levels.map((_, i) => (i === Number($("paint-level").value || 0) ? Number($("code").value) : null)),
});
$("do-transplant").onclick = () => edit("Transplanting the region", { way: "transplant" });
$("undo").onclick = () => work("Going back", () => postNothing(`/api/sessions/${session.id}/undo`));

async function begin() {
  $("brush").oninput();
  $("temperature").oninput();
  limits = await get("/api/runs");
  fill($("run"), limits.runs.map((name) => ({ value: name, text: name })));
  if (limits.size) $("side").placeholder = limits.size;
  $("side").max = limits.max_side;
  const kept = sessionStorage.getItem(KEPT);
  if (!kept) return;
  try {
    show(await get(`/api/sessions/${kept}`));
  } catch {
    sessionStorage.removeItem(KEPT); // closed meanwhile
  }
}

begin().catch(say);
