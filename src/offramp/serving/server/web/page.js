"use strict";
const $ = (id) => document.getElementById(id);
// Written out: where the address bar holds a key, relative addresses would too, and fetch refuses it.
const base = location.origin + location.pathname.replace(/[^/]*$/, "");
const COLORS = ["from shallow to deep"];  // filled in by the server, from offramp.depth_color
let layers = 1, image = null, name = null, busy = false, longest = null, told = false;
let card = null, turns = [], asked = [], heard = {}, replays = 0;
const seconds = (value) => value < 10 ? value.toFixed(2) + " s" : value.toFixed(1) + " s";

async function about() {
  const answer = await fetch(base + "v1/models");
  if (!answer.ok) throw new Error((await answer.json()).error.message);
  const model = (await answer.json()).data[0], more = model.offramp;
  name = model.id; layers = more.layers; card = more;
  $("model").textContent = more.exits.length
    ? `${name}: ${layers} layers, exits at depth ${more.exits.join(", ")}`
    : `${name}: ${layers} layers, no exits`;
  if (more.knows) $("model").textContent += `. It knows ${more.knows}.`;
  if (!document.activeElement.matches(".token")) $("legend").textContent = `Number and colour: ${$("mode").value === "lossless" ? `the depth at which a word was drafted; all ${layers} layers then checked it` : `how many of the ${layers} layers ran for a word`}. Tap one, or go from one to the next with Tab and the arrow keys, to read it here.`;
  if (!more.exits.length) { $("early").hidden = true; $("mode").disabled = true; }
  if (!$("prompt").value) $("prompt").value = usual(more);
  longest = more.guarantee ? more.guarantee.max_tokens : null;
  if (!told) standing(more.guarantee, more.not_guaranteed);
  warn(more.guarantee, more.watch, more.likeness);
}

// What the exits were calibrated with: a prompt that stays the same, or else one with a gap.
function usual(more) {
  const frames = more.guarantee ? more.guarantee.prompts : [];
  const whole = frames.find((frame) => frame.length === 1) || frames[0];
  if (whole && whole.join("")) return whole.join("…");
  return more.chat_template ? "Describe this image." : "Caption:";
}

function note(id, text, bad) {
  $(id).textContent = text; $(id).hidden = !text;
  $(id).classList.toggle("bad", Boolean(bad));
}

// Before anything is asked: what is promised of answers to come.
function standing(promise, against) {
  note("promise", promise ? `Guarantee ${promise.where}: ${promise.told.join("; ")}.` : against ? `Nothing is promised here: ${against}.` : "");
}

// Of the answer beside it, as the server decided it.
function verdict(place, of) {
  const said = place.querySelector(".verdict");
  told = true; note("promise", "");
  said.textContent = of.why ? `${of.says} ${of.why[0].toUpperCase()}${of.why.slice(1)}.` : of.says; said.hidden = false;
  said.classList.toggle("bad", !of.promised && !of.exact);
}

// Of what was asked so far, not of one answer.
function warn(promise, watch, likeness) {
  const percent = (x) => +(100 * x).toPrecision(3) + "%", said = [];
  const amount = promise && promise.risk === "disagreement" ? percent : (x) => +((promise && promise.scale || 1) * x).toPrecision(3);
  if (watch && watch.broken) {
    said.push(watch.of === (promise && promise.risk)
      ? `The guarantee does not hold on what is asked now: a loss of at least ${amount(watch.lower)}, where ${amount(promise.target)} was promised.`
      : "Answers to what is asked now differ from the full model's more than the calibrated ones did.");
    said.push(watch.action === "warn" ? "Answers still exit early." : `They are ${watch.action === "full" ? "the full model's" : "lossless"} until the watch is reset.`);
  } else if (watch && watch.images) said.push(`Watched on ${watch.images} images here.`);
  if (watch && watch.blind) said.push(`The watch is blind: ${percent(watch.coverage)} of what it drew was compared.`);
  if (likeness && likeness.alarm) said.push(`What is asked here is unlike what was calibrated: ${likeness.unlike} of ${likeness.compared} requests.`);
  note("watch", said.join(" "), (watch && watch.broken) || (likeness && likeness.alarm));
}

function show(url) {
  if (url !== image) afresh();
  image = url;
  $("image").src = url; $("image").hidden = false; $("hint").hidden = true;
  $("go").disabled = busy;
}

// An address that this page may not load is still one that the server may.
function unseen() {
  $("image").hidden = true; $("hint").hidden = false;
  $("hint").textContent = "Not shown here: the server will fetch it";
}

function read(file) {
  if (!file || !file.type.startsWith("image/")) { $("state").textContent = "That is no image."; return; }
  const reader = new FileReader();
  reader.onload = () => { $("url").value = ""; show(reader.result); };
  reader.readAsDataURL(file);
}

const parts = (color) => [1, 3, 5].map((at) => parseInt(color.slice(at, at + 2), 16));

// As offramp.depth_color has it.
function colour(depth) {
  const at = (depth - 1) / Math.max(1, layers - 1) * (COLORS.length - 1), low = Math.min(Math.floor(at), COLORS.length - 2);
  const from = parts(COLORS[low]), to = parts(COLORS[low + 1]);
  return from.map((part, i) => Math.round(part + (to[i] - part) * (at - low)));
}

function ink(rgb) {
  const [r, g, b] = rgb.map((part) => part / 255).map((p) => p <= 0.04045 ? p / 12.92 : ((p + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff";
}

function write(place, text, depths, mode) {
  if (!text) return null;
  const words = place.querySelector(".text"), token = document.createElement("span");
  const depth = depths.length ? Math.max(...depths) : layers, space = text.length - text.trimStart().length;
  words.append(text.slice(0, space));
  token.className = "token"; token.textContent = text.slice(space); token.dataset.depth = depth;
  token.title = depth === layers ? `full depth, ${layers} layers`
    : mode === "lossless" ? `drafted at depth ${depth}, checked by all ${layers} layers` : `depth ${depth} of ${layers}`;
  token.tabIndex = words.querySelector(".token") ? -1 : 0;  // one stop; arrow keys go on from there
  token.addEventListener("focus", () => { $("legend").textContent = `“${token.textContent}”: ${token.title}`; });
  token.addEventListener("click", () => token.focus());
  const ground = colour(depth);
  token.style.background = `rgb(${ground})`; token.style.color = ink(ground);
  words.append(token);
  return token;
}

// All pieces of an answer at once.
function rewrite(place, pieces, depths) {
  place.querySelector(".text").replaceChildren();
  for (const {text, from, to} of pieces) write(place, text, depths.slice(from, to), "early_exit");
  if (!place.querySelector(".token")) silent(place);
}

function silent(place) {
  const said = document.createElement("em");
  said.className = "soft"; said.textContent = "No words: the model ended its answer at once.";
  place.querySelector(".text").replaceChildren(said);
}

function move(event) {
  const step = {ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity}[event.key];
  const tokens = [...event.currentTarget.querySelectorAll(".token")], here = tokens.indexOf(event.target);
  if (!step || here < 0) return;
  event.preventDefault();
  const next = tokens[Math.max(0, Math.min(tokens.length - 1, here + step))];
  for (const token of tokens) token.tabIndex = token === next ? 0 : -1;
  next.focus();
}

// The turns so far, then the prompt; the image stands in the first.
function conversation() {
  const shown = {type: "image_url", image_url: {url: image}};
  return [...turns, {prompt: $("prompt").value}].flatMap(({prompt, answer}, n) => [
    {role: "user", content: [...(n ? [] : [shown]), {type: "text", text: prompt}]},
    ...(answer === undefined ? [] : [{role: "assistant", content: answer}]),
  ]);
}

async function request(mode, more) {
  const body = {
    model: name, temperature: 0, stream: true, stream_options: {include_usage: true}, offramp: {mode, ...more},
    ...(longest && {max_completion_tokens: longest}), messages: asked,
  };
  const answer = await fetch(base + "v1/chat/completions", {
    method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(body),
  });
  if (!answer.ok) throw new Error((await answer.json()).error.message);
  return answer;
}

// One answer: its pieces, and the server's seconds and scores of its tokens. Words go into `place`, if one is given.
async function ask(mode, place, more) {
  const begun = performance.now(), answer = await request(mode, more), pieces = [], depths = [];
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", first = 0, usage = null, tokens = null;
  for (;;) {
    const {done, value} = await reader.read();
    if (done) break;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: {")) continue;
      const chunk = JSON.parse(event.slice(6));
      if (chunk.error) throw new Error(chunk.error.message);
      usage = chunk.usage || usage;
      for (const choice of chunk.choices) {
        if (choice.finish_reason) { tokens = choice.offramp; continue; }
        const text = choice.delta.content, own = (choice.offramp || {depths: []}).depths, from = depths.length;
        depths.push(...own);
        if (!text) continue;
        if (!first) first = performance.now();
        pieces.push({text, from, to: depths.length, token: place && write(place, text, own, mode)});
      }
    }
  }
  if (place && !pieces.length) silent(place);
  if (place) verdict(place, usage.offramp.verdict);
  return {...tokens, first: ((first || performance.now()) - begun) / 1000, usage, pieces, depths, text: pieces.map((piece) => piece.text).join("")};
}

const total = (turn) => turn.seconds.at(-1);
const middle = (turns) => [...turns].sort((a, b) => total(a) - total(b))[turns.length >> 1];

// A side's turn of median duration.
function sum(place, turns) {
  const put = (what, value) => { place.querySelector("." + what).textContent = value; };
  const turn = middle(turns), {usage} = turn;
  put("first", seconds(turn.seconds[0]));
  put("total", seconds(total(turn)));
  put("speed", (usage.completion_tokens / total(turn)).toFixed(1));
  put("depth", `${+usage.offramp.mean_depth.toFixed(1)} of ${layers}`);
  put("of", usage.offramp.mode === "lossless" ? "drafted at, mean" : "mean depth");
  return turn;
}

// Both sides again, each word when the server wrote it in the turn that was timed.
function replay() {
  const own = ++replays, slower = +$("pace").value, start = performance.now();
  const sides = Object.entries(heard).map(([id, {pieces, timed}]) => ({
    end: total(timed), shown: $(id).querySelector(".total"),
    words: pieces.map(({token, to}) => ({token, at: timed.seconds[Math.min(to, timed.seconds.length) - 1]})),
  }));
  const frame = () => {
    if (own !== replays) return;
    const now = (performance.now() - start) / 1000 / slower;
    for (const {end, shown, words} of sides) {
      for (const {token, at} of words) token.classList.toggle("unsaid", at > now);
      shown.textContent = seconds(Math.min(now, end));
    }
    if (sides.some(({end}) => end > now)) requestAnimationFrame(frame);
  };
  frame();
}

// All words are there; a replay that runs ends.
function whole() {
  replays++;
  for (const token of document.querySelectorAll(".unsaid")) token.classList.remove("unsaid");
}

async function both() {
  busy = true; $("go").disabled = true; whole();
  for (const id of ["play", "tune", "further"]) $(id).hidden = true;
  const mode = $("mode").value, sections = $("early").hidden ? ["full"] : ["early", "full"];
  asked = conversation(); heard = {};
  $("early").querySelector("h2").textContent = mode === "lossless" ? "Lossless drafts" : "Early exit";
  for (const id of sections) {
    $(id).querySelector(".text").replaceChildren(); $(id).querySelector(".verdict").hidden = true;
    for (const b of $(id).querySelectorAll("b")) b.textContent = "–";
  }
  try {
    const modeOf = (id) => id === "full" ? "full" : mode, taken = {};
    $("state").textContent = sections.length > 1 ? "Both answer …" : "The model answers …";
    const shown = await Promise.all(sections.map((id) => ask(modeOf(id), $(id))));
    const read = Math.min(...shown.map((turn) => turn.first));
    // The image and the prompt are kept now: a side that is timed reads neither.
    const timed = Object.fromEntries(sections.map((id) => [id, []])), start = performance.now();
    do {  // short answers are timed several times, in turn
      for (const id of sections) {
        $("state").textContent = id === "full" ? "The full model is timed …" : "Exits are timed …";
        timed[id].push(await ask(modeOf(id)));
        taken[id] = sum($(id), timed[id]);
      }
    } while (timed.full.length < 5 && performance.now() - start < 3000);
    sections.forEach((id, n) => { heard[id] = {...shown[n], timed: taken[id]}; });
    const said = heard.early || heard.full, same = said.text === heard.full.text;
    if (taken.early) await survey();
    $("state").textContent = taken.early
      ? `${same ? "The same answer" : "Another answer"}, at ${(total(taken.full) / total(taken.early)).toFixed(2)} times the speed of the full model. `
        + `${timed.full.length > 1 ? `Medians of ${timed.full.length} turns each. ` : ""}`
        + `The first word took ${seconds(read)} with reading the image and the prompt, counted for neither.`
      : "Done.";
    $("play").hidden = false; $("further").hidden = !card.chat_template;
    $("further").onclick = () => further(said.text);
    if (!matchMedia("(prefers-reduced-motion: reduce)").matches) replay();
    await about();
  } catch (error) {
    $("state").textContent = error.message;
  } finally { busy = false; $("go").disabled = !image; }
}

// -- several turns ----------------------------------------------------------------------------

function further(answer) {
  turns.push({prompt: $("prompt").value, answer});
  $("turns").replaceChildren(...turns.map(({prompt, answer}) => {
    const line = document.createElement("li"), own = document.createElement("strong");
    own.textContent = prompt; line.append(own, " ", answer || "(no words)");
    return line;
  }));
  for (const id of ["turns", "over"]) $(id).hidden = false;
  $("further").hidden = true; $("prompt").value = ""; $("prompt").focus();
}

function afresh() {
  turns = [];
  for (const id of ["turns", "over", "further"]) $(id).hidden = true;
}

// -- the slider: what other thresholds, or another trust, would do -----------------------------

const GRID = [0, .1, .2, .3, .4, .5, .6, .7, .8, .85, .9, .95, .98, .99, .995, .999, 1];
let levels = [], passes = [], written = new Map(), wanted = 0;

// One pass of the full model for each exit, which reads every token and says none.
async function survey() {
  $("state").textContent = "Other settings are looked up …";
  const path = card.guarantee ? card.guarantee.path : [], own = calibrated();
  levels = [...new Set([...GRID, ...path.map((point) => point.level), ...(own === null ? [] : [own])])].sort((a, b) => a - b);
  passes = []; written = new Map();
  if (card.trust !== null) {
    const one = await ask("early_exit", null, {trust: 2});
    let most = -1;  // an offer is taken at levels that no earlier one reached
    passes = [one, ...one.offers.filter((offer) => offer.trust > most && (most = offer.trust, true))];
    for (const {trust} of passes.slice(1)) written.set(trust, await ask("early_exit", null, {trust}));
    written.set(null, one);
  } else {
    for (const depth of card.exits) passes.push({depth, ...await ask("early_exit", null, {thresholds: {[depth]: 1}})});
  }
  $("tuned").firstElementChild.textContent = card.trust !== null ? "Trust" : "Threshold";
  $("level").max = levels.length - 1; $("tune").hidden = false;
  const place = levels.indexOf(own), at = place / (levels.length - 1);
  $("mark").textContent = own === null ? "" : `▲ calibrated: ${own}`;
  $("mark").style.left = `${100 * at}%`; $("mark").style.transform = at > .5 ? "translateX(calc(.5em - 100%))" : "translateX(-.4em)";
  if (at > .5) $("mark").textContent = `calibrated: ${own} ▲`;
  $("level").value = own === null ? levels.length - 1 : place;
  await turn(true);
}

// The level that the exits share; null: none.
function calibrated() {
  const own = card.trust !== null ? [card.trust] : Object.values(card.thresholds);
  return own.length && own.every((level) => level === own[0]) ? own[0] : null;
}

// The depth of each token of the full model's answer at a threshold.
function foretold(level) {
  return passes[0].depths.map((_, n) => {
    const leaves = passes.find(({depth, scores}) => scores[n] !== null && scores[n] >= (n ? level : Math.max(level, card.first[depth] || 0)));
    return leaves ? leaves.depth : layers;
  });
}

// Show a level; let go: whether the server writes what is not known yet.
async function turn(go) {
  const level = levels[$("level").value], now = ++wanted, place = $("tune"), trust = card.trust !== null;
  const offer = trust ? passes.slice(1).find((one) => one.trust >= level) : null, ahead = trust ? null : foretold(level);
  const key = trust ? (offer ? offer.trust : null) : ahead.join();
  $("chosen").textContent = level; $("level").setAttribute("aria-valuetext", level);
  risk(level);
  if (!written.has(key)) {
    rewrite(place, passes[0].pieces, ahead);
    $("how").textContent = "Foretold along the full model's answer, from one pass of it. Let go, and the server writes the answer.";
    if (!go) return;
    try {
      written.set(key, await ask("early_exit", null, {thresholds: Object.fromEntries(card.exits.map((depth) => [depth, level]))}));
    } catch (error) { $("how").textContent = error.message; return; }
    if (now !== wanted) return;
  }
  const one = written.get(key);
  rewrite(place, one.pieces, one.depths);
  $("how").textContent = `As the server wrote it: ${one.text === heard.full.text ? "the full model's words" : "other words than the full model's"}, `
    + `at a mean depth of ${+one.usage.offramp.mean_depth.toFixed(1)} of ${layers}.`;
}

// What was measured at a level when the exits were calibrated.
function risk(level) {
  const promise = card.guarantee, found = promise && promise.path.find((point) => point.level === level);
  const amount = (x) => promise.risk === "disagreement" ? +(100 * x).toPrecision(2) + "%" : +(promise.scale * x).toPrecision(2);
  $("risk").textContent = found
    ? `Risk here: ${amount(found.risk)} measured, at most ${amount(found.bound)} at ${+(100 * promise.confidence).toPrecision(3)}% confidence (${promise.words}).`
    : promise ? "Risk here: not measured; the promise is for the calibrated place." : "Risk here: unknown, as these exits are not calibrated.";
}

const drop = $("drop");
for (const kind of ["dragenter", "dragover"]) drop.addEventListener(kind, (e) => { e.preventDefault(); drop.classList.add("over"); });
for (const kind of ["dragleave", "drop"]) drop.addEventListener(kind, (e) => { e.preventDefault(); drop.classList.remove("over"); });
drop.addEventListener("drop", (e) => read(e.dataTransfer.files[0]));
document.addEventListener("paste", (e) => { if (e.clipboardData.files.length) read(e.clipboardData.files[0]); });
$("file").addEventListener("change", () => read($("file").files[0]));
async function example() {
  const blob = await (await fetch(base + "example")).blob();
  $("url").value = "";
  show(await new Promise((done) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.readAsDataURL(blob);
  }));
}
for (const words of document.querySelectorAll(".text")) words.addEventListener("keydown", move);
$("scale").style.background = `linear-gradient(90deg, ${COLORS})`;
$("example").addEventListener("click", example);
$("url").addEventListener("change", () => { if ($("url").value && $("url").checkValidity()) show($("url").value); });
$("image").addEventListener("error", unseen);
$("replay").addEventListener("click", replay);
$("over").addEventListener("click", afresh);
$("level").addEventListener("input", () => turn(false));
$("level").addEventListener("change", () => turn(true));
$("form").addEventListener("submit", (e) => { e.preventDefault(); if (image && !busy) both(); });
about().catch((error) => { $("state").textContent = error.message; })
  .then(() => { if (location.hash === "#example") example().then(both); });
