// The dashboard's page. Each event holds all there is to show, so nothing is remembered here but what was chosen.
import { KINDS, line, map } from "./charts.js";

const $ = id => document.getElementById(id);
const make = (name, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children.filter(child => child !== null && child !== undefined));
  return element;
};
const setText = (element, text) => { if (element.textContent !== text) element.textContent = text; };
const api = async (path, body) => {
  const options = body === undefined ? {} : { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  const response = await fetch(`api/${path}`, { cache: "no-store", ...options });
  const answer = await response.json();
  if (!response.ok) throw new Error([answer.error, answer.hint && `Try: ${answer.hint}`].filter(Boolean).join(". "));
  return answer;
};

const KIND_WORDS = { live: "memory and disks", crash: "disks, as a power cut leaves them", quiesced: "disks, after the guest held still", clean: "disks of a machine that was off" };
const WINDOW = 90_000;

let state = null, heard = performance.now(), view = "machines";
let chosen = null, snapshot = null, tree = { version: null, lines: [] }, box = null, cells = null;

// --- words ---

const size = bytes => {
  for (const [unit, shift] of [["T", 40], ["G", 30], ["M", 20], ["K", 10]]) {
    const whole = bytes / 2 ** shift;
    if (whole >= 1) return `${whole % 1 && whole < 100 ? whole.toFixed(1) : Math.round(whole)} ${unit}iB`;
  }
  return `${bytes} B`;
};
// As the command line takes it.
const plain = bytes => bytes % 2 ** 30 === 0 ? `${bytes / 2 ** 30}G` : `${Math.round(bytes / 2 ** 20)}M`;
const milliseconds = us => us < 10_000 ? `${(us / 1000).toFixed(2)} ms` : us < 1_000_000 ? `${(us / 1000).toFixed(0)} ms` : `${(us / 1e6).toFixed(1)} s`;
const span = seconds => seconds < 60 ? `${seconds} s` : seconds < 3600 ? `${Math.floor(seconds / 60)} min` : `${Math.floor(seconds / 3600)} h`;
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
const lives = machine => machine && ["running", "paused"].includes(machine.state);
const shell = words => words.map(word => /^[\w@:.,/=?-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`).join(" ");

// --- lists whose elements stay the same, so that the focus does ---

function keyed(list, items, key, create, update) {
  const there = new Map([...list.children].map(child => [child.dataset.key, child]));
  items.forEach((item, n) => {
    const name = String(key(item));
    let child = there.get(name);
    if (!child) {
      child = create(item);
      child.dataset.key = name;
    }
    there.delete(name);
    if (list.children[n] !== child) list.insertBefore(child, list.children[n] ?? null);
    update(child, item);
  });
  there.forEach(child => child.remove());
}

// --- what can be done ---

// verbs: [label, words, careful?]. The words are what is shown and what is run.
function verbs(host, list) {
  keyed(host, list.filter(Boolean), ([label, words]) => `${label} ${words.join(" ")}`, ([label, words, careful]) => {
    const button = make("button", { type: "button", className: `verb${careful ? " careful" : ""}` }, make("b", { textContent: label }), command(words));
    button.addEventListener("click", () => run(button, words, careful));
    return button;
  }, () => {});
}

// The command line, broken between its words only.
function command(words) {
  const word = text => make("span", { textContent: shell([text]), className: text.length < 30 ? "word" : "" });
  return make("code", {}, "catnap", ...words.flatMap(text => [" ", word(text)]));
}

async function run(button, words, careful) {
  if (careful && !window.confirm(`catnap ${shell(words)}\n\n${careful}`)) return;
  button.disabled = true;
  try {
    await api("run", { words });
  } catch (error) {
    setText($("last"), `catnap ${shell(words)}: ${error.message}`);
  }
  setTimeout(() => { button.disabled = false; }, 800);
}

// A name that no machine has.
const free = base => {
  const taken = state.machines.map(machine => machine.name);
  for (let n = 2; ; n++) if (!taken.includes(`${base}-${n}`)) return `${base}-${n}`;
};
// A name that no snapshot has.
const unused = base => {
  const taken = tree.lines.flatMap(({ snapshot: it }) => it?.names ?? []);
  for (let n = 1; ; n++) if (!taken.includes(`${base}-${n}`)) return `${base}-${n}`;
};
// A name of which no machine has a number.
const litter = () => {
  for (let n = 1; ; n++) {
    const name = n === 1 ? "kit" : `kit${n}`;
    if (!state.machines.some(machine => machine.name.startsWith(`${name}-`))) return name;
  }
};
const port = () => state.free_port ? ["-p", `${state.free_port}:80`] : [];
const flavour = ["--cpus", "1", "--memory", "256M", "--max-cpus", "4", "--max-memory", "1G", "--ephemeral", "64M:/mnt"];

function snapshotVerbs(machine) {
  if (!machine) return [];
  const create = kind => ["snapshot", "create", unused(`${machine.name}@${kind}`)];
  if (!lives(machine)) return [["Take a snapshot of the machine that is off", create("clean")]];
  return [["Take a live snapshot", create("live")], ["Take a crash snapshot", [...create("crash"), "--mode", "crash"]],
    machine.state === "running" && ["Take a quiesced snapshot", [...create("quiesced"), "--mode", "quiesced"]]];
}

// --- the views ---

const SHOW = { machines: showMachines, snapshots: showSnapshots, time: showTime, memory: showMemory, load: showLoad, rows: showRows };

function showMachines(machine) {
  keyed($("cards"), state.machines, item => item.name, item => {
    const part = name => make("span", { className: name });
    const button = make("button", { type: "button", className: "machine" },
      make("span", { className: "top" }, part("name"), part("state"), part("ticks")), make("div", { className: "size" }), make("div", { className: "more" }));
    button.addEventListener("click", () => choose(item.name));
    return make("li", {}, button);
  }, (child, item) => {
    const at = name => child.querySelector(`.${name}`);
    child.firstChild.setAttribute("aria-pressed", item.name === machine?.name);
    setText(at("name"), item.name);
    setText(at("state"), item.state);
    at("state").className = `state ${item.state}`;
    const ticks = item.kitten ? `${item.kitten.ticks} half-seconds` : "";
    if (at("ticks").textContent !== ticks) at("ticks").replaceChildren(...(item.kitten ? [String(item.kitten.ticks), make("small", { textContent: " half-seconds" })] : []));
    setText(at("size"), item.cpus ? `${plural(item.cpus, "vCPU")} · ${size(item.memory_bytes)} of memory` : "");
    const shape = item.monitor?.shape;
    at("more").hidden = state.machines.length > 2 && item.name !== machine?.name && !item.problem && !item.detail;
    setText(at("more"), [
      item.problem ?? item.detail,
      shape && `up to ${plural(shape.max_cpus, "vCPU")} and ${size(shape.max_memory)}`,
      item.uptime_seconds !== undefined && `runs for ${span(item.uptime_seconds)}`,
      item.kitten?.generation > 0 && `woken ${item.kitten.generation}×`,
      ...(item.monitor?.drives ?? []).map(drive => `transient disk ${size(drive.size)} ${drive.at ? `at ${drive.at} ` : ""}(${drive.state})`),
      item.image && `from ${item.image}`,
      item.monitor?.taking && `taking ${item.monitor.taking.name}`,
    ].filter(Boolean).join(" · "));
  });
  showKitten(machine);
  const name = machine?.name;
  const anna = state.machines.some(item => item.name === "anna") ? free("kitten") : "anna";
  const note = "echo kept >/root/note.txt; echo lent >/mnt/notes.txt; sync";
  const on = machine?.state === "running", notes = (machine?.monitor?.drives ?? []).some(drive => drive.at === "/mnt");
  verbs($("machine-verbs"), [
    on && ["Pause", ["pause", name]],
    machine?.state === "paused" && ["Resume", ["resume", name]],
    on && notes && ["Write a note on each disk", ["exec", name, "--", "sh", "-c", note]],
    on && notes && ["Read both notes", ["exec", name, "--", "sh", "-c", "cat /root/note.txt /mnt/notes.txt"]],
    lives(machine) && ["Shut down", ["stop", name]],
    lives(machine) && ["Pull the plug", ["stop", name, "--time", "0", "--force"], "What the guest has not written to its disk is lost."],
    machine && !lives(machine) && machine.state !== "busy" && ["Boot again", ["start", name]],
    machine && !lives(machine) && ["Remove", ["rm", name], "The machine and its disk are removed. Its snapshots stay."],
    ["A new machine", ["run", "kitten", "--name", anna, ...flavour, ...port()]],
  ]);
}

// Where a machine's page is: each has a key of its own, which is asked for once.
const pages = new Map();
function pageOf(machine) {
  const { name } = machine;
  if (!pages.has(name)) {
    pages.set(name, null);
    api(`page/${name}`).then(answer => { pages.set(name, answer.root); draw(); }).catch(() => setTimeout(() => pages.delete(name), 1000));
  }
  return pages.get(name);
}

function showKitten(machine) {
  const host = $("kitten");
  setText($("kitten-title"), machine ? `The kitten page of ${machine.name}` : "The kitten page");
  // It has to answer first; then it tells by itself when it naps.
  const root = machine && pageOf(machine), page = machine && `${root} ${machine.pid}`;
  const frame = lives(machine) && machine.port && root && (machine.kitten || host.dataset.shown === page) ? root : null;
  const why = !machine ? (state.machines.length ? "Choose a machine." : "There is no machine yet. Make one with the button, or with the command line that it shows.")
    : !lives(machine) ? `${machine.name} does not run: ${machine.state}${machine.detail ? ` (${machine.detail})` : ""}.`
    : !machine.port ? `No port of this host leads to ${machine.name}’s page: start it with -p 8080:80.`
    : `The page of ${machine.name} does not answer yet.`;
  // Each process of a machine has a page of its own.
  const wanted = frame ? page : why;
  if (host.dataset.shown === wanted) return;
  host.dataset.shown = wanted;
  if (!frame) return host.replaceChildren(make("p", { textContent: why }));
  const iframe = make("iframe", { src: frame, title: `The kitten page of ${machine.name}` });
  iframe.setAttribute("sandbox", "allow-scripts allow-forms");
  host.replaceChildren(iframe);
}

function showSnapshots(machine) {
  $("kinds").childElementCount || $("kinds").append(...Object.entries(KIND_WORDS).map(([kind, words]) => make("li", {}, make("span", { className: `kind ${kind}`, textContent: kind }), ` ${words}`)));
  verbs($("take-verbs"), snapshotVerbs(machine));
  // Whoever has chosen none sees the latest.
  if (!tree.lines.some(({ snapshot: it }) => it?.digest === snapshot)) {
    const shots = tree.lines.flatMap(({ snapshot: it }) => it ?? []), taken = shots.filter(it => !it.image);
    snapshot = (taken.length ? taken : shots).reduce((late, it) => it.created >= late.created ? it : late, { created: 0 }).digest ?? null;
    if (snapshot) drawTree();
  }
  const line = tree.lines.find(({ snapshot: it }) => it?.digest === snapshot)?.snapshot;
  if (!line) {
    $("box").hidden = true;
    return verbs($("box-verbs"), []);
  }
  if (box?.digest !== snapshot) {
    const wanted = snapshot;
    box = { digest: wanted };
    api(`snapshot/${wanted}`).then(answer => { if (snapshot === wanted) { box = { digest: wanted, answer }; drawBox(line); } }).catch(error => setText($("box"), error.message));
  }
  $("box").hidden = false;
  const name = line.names[0] ?? line.digest, base = name.split("@")[0].replace(/^sha256:.*/, "anna");
  const machineOf = box?.answer?.manifest.machine;
  if (line.damaged) return verbs($("box-verbs"), [["Check it", ["snapshot", "verify", name]]]);
  const bigger = machineOf && ["--cpus", String(Math.min(machineOf.max_cpus, machineOf.cpus * 2)), "--memory", plain(Math.min(machineOf.max_memory, machineOf.memory * 2))];
  verbs($("box-verbs"), line.image ? [
    ["Boot a machine from it", ["run", name, "--name", state.machines.some(item => item.name === "anna") ? free("kitten") : "anna", ...flavour, ...port()]],
  ] : [
    [line.kind === "live" ? "Wake it" : "Boot it", ["restore", name, "--name", free(base), ...port()]],
    line.kind === "live" && bigger && ["Wake it bigger", ["restore", name, "--name", free(base), ...bigger, ...port()]],
    line.kind === "live" && ["Boot from its disks alone", ["restore", name, "--name", free(base), "--cold", ...port()]],
    line.kind === "live" && ["Wake it in another colour", ["restore", name, "--name", free(base), "--set", "colour=grey", ...port()]],
    ["Three clones", ["clone", name, litter(), "--count", "3", ...port()]],
    ["Look for secrets in it", ["snapshot", "inspect", name, "--secrets"]],
    line.names[0] && ["Make a copy without secrets", ["snapshot", "scrub", name, unused(`${name}-scrubbed`)]],
    ["Check every byte", ["snapshot", "verify", name]],
  ]);
}

function drawTree() {
  const root = make("ul"), lists = [root];
  for (const { depth, snapshot: shot, missing, machine } of tree.lines) {
    const item = make("li");
    if (shot) {
      const kind = shot.damaged ? "damaged" : shot.kind;
      const button = make("button", { type: "button" }, make("b", { textContent: shot.names.join(", ") || shot.digest.slice(0, 19) }),
        make("span", { className: `kind ${kind}`, textContent: shot.image ? `${kind} image` : kind }), make("span", { className: "soft", textContent: [size(shot.own_bytes ?? 0), shot.note].filter(Boolean).join(" · ") }));
      button.setAttribute("aria-pressed", shot.digest === snapshot);
      button.addEventListener("click", () => { snapshot = shot.digest; drawTree(); draw(); });
      button.dataset.digest = shot.digest;
      item.append(button);
    } else if (machine) {
      item.append(make("div", { className: "leaf" }, make("b", { textContent: machine.name }), make("span", { className: `state ${machine.state}`, textContent: machine.state })));
    } else {
      item.append(make("div", { className: "leaf soft", textContent: `${String(missing).slice(0, 19)} (not here)` }));
    }
    lists[depth].append(item);
    const list = make("ul");
    item.append(list);
    lists.length = depth + 1;
    lists.push(list);
  }
  root.querySelectorAll("ul:empty").forEach(list => list.remove());
  const focus = document.activeElement?.dataset?.digest;
  $("tree").replaceChildren(...root.children);
  if (focus) $("tree").querySelector(`[data-digest="${CSS.escape(focus)}"]`)?.focus();
}

function drawBox(line) {
  const { manifest } = box.answer, has = role => manifest.files.some(file => file.role === role);
  const weight = role => size(manifest.files.filter(file => file.role === role).reduce((sum, file) => sum + file.size, 0));
  const machine = manifest.machine, state_ = has("state");
  const memory = manifest.memory && `${size(manifest.memory.bytes)} written${manifest.memory.parent ? ", the rest is in an earlier one" : ", the rest is zeros"}`;
  const part = (name, full, inside, outside, wide) => make("div", { className: `part${full ? " full" : ""}${wide ? " wide" : ""}` },
    make("p", {}, make("b", { textContent: name }), " ", make("em", { textContent: full ? "in the box" : "not in the box" })), make("span", { textContent: full ? inside : outside }));
  $("box").replaceChildren(
    make("h3", { textContent: `What is in the box of ${line.names[0] ?? line.digest.slice(0, 19)}` }),
    make("p", {}, make("span", { className: `kind ${line.kind}`, textContent: line.kind }), ` · ${KIND_WORDS[line.kind]} · taken ${new Date(line.created * 1000).toLocaleString()}`),
    make("div", { className: "box" },
      part("vCPUs", state_, machine ? `${machine.cpus}, with all registers` : "", machine ? `${machine.cpus} ran; it boots instead` : "none yet"),
      part("Memory", has("memory"), `${machine ? size(machine.memory) : ""}: ${memory}`, machine ? `${size(machine.memory)} were left behind` : "none yet"),
      part("Devices", state_, weight("state"), "they begin anew"),
      part("Disks", manifest.disks.length > 0, manifest.disks.map(disk => `${disk.device}, ${size(disk.virtual_size)}`).join("; ") + `: ${weight("disk")} here`, "none"),
      part("Ephemeral disks", false, "", manifest.ephemeral?.length ? `${manifest.ephemeral.map(disk => `${size(disk.size)} at ${disk.at || disk.device}`).join("; ")}: what was on them is not kept` : "there were none; they are never kept", true)),
    make("p", { className: "soft" }, make("code", { textContent: line.digest })));
}

const moments = machine => machine?.snapshots ?? [];

function showTime(machine) {
  const now = state.now_us / 1000, from = now - WINDOW;
  const points = (machine?.samples ?? []).map(([at, ticks]) => [at, ticks]);
  const bands = moments(machine).map(({ moments: { paused_us, published_us } }) => [paused_us / 1000, published_us / 1000, "writing"]);
  const taking = machine?.monitor?.taking;
  if (taking?.progress && taking.progress.phase !== "doorbell") bands.push([taking.begun_us / 1000, now, "writing"]);
  const marks = moments(machine).map(taken => [taken.moments.paused_us / 1000, `${taken.kind}: stood still for ${milliseconds(taken.pause_us)}`]);
  const last = moments(machine).at(-1);
  const counted = points.filter(([, ticks]) => ticks !== null);
  const [first, end] = [counted[0], counted.at(-1)];
  line($("time-chart"), { from, to: now, points, bands, marks, unit: "half-seconds that the guest counted", floor: null,
    label: machine ? `The counter of ${machine.name} against the host’s time: ${end ? end[1] : "nothing"} now.${last ? ` The last snapshot, ${last.name}, held it still for ${milliseconds(last.pause_us)}.` : ""}` : "No machine is chosen." });
  const during = last && counted.filter(([at]) => at >= last.moments.paused_us / 1000 && at <= last.moments.published_us / 1000);
  figures($("time-figures"), [
    end && ["half-seconds counted by the guest", String(end[1])],
    first && end !== first && ["of the host’s half-seconds, counted", `${(Math.min(1, (end[1] - first[1]) / ((end[0] - first[0]) / 500)) * 100).toFixed(1)} %`],
    last && ["stood still for the last snapshot", milliseconds(last.pause_us)],
    last && ["then written behind its back for", milliseconds(last.moments.published_us - last.moments.paused_us - last.pause_us)],
    last && ["of memory written", size(last.bytes_written)],
    during?.length > 1 && ["counted meanwhile", String(during.at(-1)[1] - during[0][1])],
    taking && ["being taken", taking.progress?.total ? `${Math.round(taking.progress.done / taking.progress.total * 100)} %` : taking.name],
  ]);
  verbs($("time-verbs"), [...snapshotVerbs(machine), machine?.state === "running" && ["Pause", ["pause", machine.name]], machine?.state === "paused" && ["Resume", ["resume", machine.name]]]);
}

function figures(host, list) {
  keyed(host, list.filter(Boolean), ([name]) => name, ([name]) => make("div", {}, make("dt", { textContent: name }), make("dd")), (child, [, value]) => setText(child.querySelector("dd"), value));
}

function showMemory(machine) {
  if (!lives(machine)) {
    setText($("memory-lead"), "A machine that does not run has no memory to look at.");
    cells = null;
  }
  $("map").parentElement.hidden = !lives(machine) || !cells;
  const there = state.machines.filter(item => item.share);
  const most = Math.max(1, ...there.map(item => item.share.resident));
  keyed($("shares"), there, item => item.name, () => make("div", { className: "share" }, make("p"), make("div", { className: "bar" }, make("span"), make("span"))), (child, item) => {
    const { shared, private: own } = item.share, [a, b] = child.querySelectorAll("span");
    setText(child.firstChild, `${item.name}: ${size(own)} of its own, ${size(shared)} shared with others`);
    a.style.cssText = `width:${own / most * 100}%;background:var(--changed)`;
    b.style.cssText = `width:${shared / most * 100}%;background:var(--shared)`;
  });
  if (!there.length) $("shares").replaceChildren(make("p", { className: "soft", textContent: "No machine runs." }));
  const live = lives(machine) && machine.state === "running";
  verbs($("memory-verbs"), [live && ["Have the guest work", ["load", machine.name, "--seconds", "10", "--path", "/"]], ...snapshotVerbs(machine).slice(0, 1)]);
}

async function mapMemory() {
  const machine = current();
  if (view === "memory" && lives(machine) && !document.hidden) {
    try {
      const memory = await api(`memory/${machine.name}`);
      const before = cells?.name === machine.name ? cells.cells : null;
      cells = { name: machine.name, cells: memory.cells };
      $("map").parentElement.hidden = false;
      const totals = map($("map"), memory, before), bytes = kind => size(totals[kind] * memory.page);
      setText($("memory-lead"), `Each square is ${size(memory.cell_pages * memory.page)} of ${machine.name}’s memory. ${memory.since_snapshot ? "A frame means: changed just now." : "There is no live snapshot yet: all that was touched would have to be written."}`);
      $("map").setAttribute("aria-label", `Memory of ${machine.name}: ${KINDS.map(([kind, word]) => `${word} ${bytes(kind)}`).join(", ")}`);
      keyed($("map-legend"), KINDS, ([kind]) => kind, ([kind, word, means]) => {
        const swatch = make("span", { className: "swatch" });
        swatch.style.background = `var(--${kind})`;
        return make("li", {}, swatch, make("b"), ` ${word}`, make("small", { textContent: means }));
      }, (child, [kind]) => setText(child.querySelector("b"), bytes(kind)));
    } catch (error) {
      setText($("memory-lead"), `The memory of ${machine.name} cannot be seen: ${error.message}`);
      cells = null;
    }
  }
  setTimeout(mapMemory, 1000);
}

// Answers per second, over a second and a half, so that two looks' jitter does not show.
function rates(samples) {
  return samples.map(([at, , answered], n) => {
    const then = samples[Math.max(0, n - 3)];
    const fits = answered !== null && then[2] !== null && at > then[0] && answered >= then[2] && at - then[0] < 10000;
    return [at, fits ? (answered - then[2]) / (at - then[0]) * 1000 : null];
  });
}

function showLoad(machine) {
  const now = state.now_us / 1000, samples = machine?.samples ?? [], points = rates(samples);
  const steps = samples.map(([at, , , cpus]) => [at, cpus]);
  const marks = samples.flatMap(([at, , , cpus, memory], n) => {
    const before = samples[n - 1];
    if (!before || before[3] === null || cpus === null || (before[3] === cpus && before[4] === memory)) return [];
    return [[at, `now ${plural(cpus, "vCPU")}, ${size(memory)}`]];
  });
  const latest = points.findLast(([, value]) => value !== null), best = Math.max(0, ...points.map(([, value]) => value ?? 0));
  line($("load-chart"), { from: now - WINDOW, to: now, points, steps, marks, unit: "answers per second",
    label: machine ? `Answers per second of ${machine.name}: ${latest ? Math.round(latest[1]) : 0} now, ${Math.round(best)} at best.` : "No machine is chosen." });
  figures($("load-figures"), [
    latest && ["answers per second", latest[1].toFixed(1)], ["at best in two minutes", best.toFixed(1)],
    machine?.cpus && ["vCPUs", String(machine.cpus)], machine?.memory_bytes && ["of memory", size(machine.memory_bytes)],
    machine?.kitten && ["half-seconds counted, unbroken", String(machine.kitten.ticks)], machine?.kitten && ["visits", String(machine.kitten.visits)],
  ]);
  const shape = machine?.monitor?.shape, on = machine?.state === "running";
  const resize = (cpus, memory) => ["resize", machine.name, "--cpus", String(cpus), "--memory", plain(memory)];
  const more = shape && [Math.min(shape.max_cpus, machine.cpus * 2), Math.min(shape.max_memory, machine.memory_bytes * 2)];
  const less = shape && [Math.max(1, Math.floor(machine.cpus / 2)), Math.max(shape.boot_memory, machine.memory_bytes / 2)];
  const differs = to => to && (to[0] !== machine.cpus || to[1] !== machine.memory_bytes);
  verbs($("load-verbs"), [
    on && machine.port && ["Put it under load", ["load", machine.name, "--seconds", "30", "--connections", "8"]],
    on && differs(more) && ["Bigger", resize(...more)],
    on && differs(less) && ["Smaller", resize(...less)],
  ]);
}

function showRows() {
  const body = $("rows-table").tBodies[0];
  $("rows-table").hidden = state.rows.length === 0;
  $("rows-none").hidden = state.rows.length > 0;
  keyed(body, state.rows, row => row.kind, row => make("tr", {}, make("th", { scope: "row" }, make("span", { className: `kind ${row.kind}`, textContent: row.kind })), make("td"), make("td"), make("td")), (child, row) => {
    [row.acknowledged, row.found, row.torn].forEach((value, n) => setText(child.cells[n + 1], String(value)));
    child.cells[2].className = row.found < row.acknowledged ? "bad" : "";
    child.cells[3].className = row.torn > 0 ? "bad" : "";
  });
  const there = state.machines.filter(machine => machine.kitten && machine.kitten.guestbook_entries !== null);
  keyed($("books"), there, machine => machine.name, () => make("p"), (child, machine) => setText(child, `${machine.name} has ${plural(machine.kitten.guestbook_entries, "row")} in its guest book.`));
  if (!there.length) $("books").replaceChildren(make("p", { className: "soft", textContent: "No guest book answers." }));
}

// --- around them ---

const current = () => state?.machines.find(machine => machine.name === chosen);

function choose(name) {
  chosen = name;
  cells = null;
  draw();
}

function draw() {
  if (!state) return;
  if (!current()) chosen = (state.machines.find(machine => machine.state === "running") ?? state.machines[0])?.name ?? null;
  keyed($("choice"), view === "machines" || view === "rows" ? [] : state.machines, machine => machine.name, machine => {
    const button = make("button", { type: "button" });
    button.addEventListener("click", () => choose(machine.name));
    return button;
  }, (child, machine) => {
    setText(child, `${machine.name} · ${machine.state}`);
    child.setAttribute("aria-pressed", machine.name === chosen);
  });
  if (tree.version !== state.tree && !tree.asked) {
    const version = state.tree;
    tree.asked = true;
    api("tree").then(lines => { tree = { version, lines }; drawTree(); draw(); }).catch(() => { tree.asked = false; });
  }
  SHOW[view](current());
  showJobs();
  trouble();
}

function showJobs() {
  const told = job => job.code === null ? ["going", "runs"] : job.code === 0 ? ["ok", "done"] : ["not", `exit code ${job.code}`];
  const last = state.jobs[0];
  if (last) {
    const [kind, word] = told(last), text = `catnap ${shell(last.words)} ${word}`;
    if ($("last").dataset.text !== text) {
      $("last").dataset.text = text;
      $("last").replaceChildren(make("code", { textContent: `catnap ${shell(last.words)} ` }), make("span", { className: kind, textContent: word }));
    }
  }
  keyed($("jobs"), state.jobs, job => job.id, job => {
    const stop = make("button", { type: "button", textContent: "interrupt" });
    stop.addEventListener("click", () => api("interrupt", { id: job.id }).catch(() => {}));
    return make("li", {}, make("code", { textContent: `catnap ${shell(job.words)} ` }), make("span"), " ", stop, make("pre"));
  }, (child, job) => {
    const [kind, word] = told(job), [name, stop] = [child.querySelector("span"), child.querySelector("button")];
    name.className = kind;
    setText(name, job.ended_us ? `${word}, ${milliseconds(job.ended_us - job.begun_us)}` : word);
    stop.hidden = job.code !== null;
    setText(child.querySelector("pre"), job.output);
  });
}

function trouble() {
  const silent = performance.now() - heard;
  const words = silent > 4000 ? `The dashboard has said nothing for ${Math.round(silent / 1000)} seconds. What is shown may be old.` : state?.problem
    ?? (state?.more_machines ? `${state.more_machines} more machines are not shown.` : "");
  $("problem").hidden = !words;
  setText($("problem"), words);
}

function go() {
  const wanted = location.hash.slice(1);
  view = SHOW[wanted] ? wanted : "machines";
  for (const name of Object.keys(SHOW)) $(name).hidden = name !== view;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${view}`) link.setAttribute("aria-current", "page"); else link.removeAttribute("aria-current");
  }
  // The browser has gone to the section of that name; its heading is up here.
  window.scrollTo(0, 0);
  document.title = `${$(view).querySelector("h2").textContent} · Catnap`;
  draw();
}

const events = new EventSource("api/events");
events.onmessage = event => {
  state = JSON.parse(event.data);
  heard = performance.now();
  if (!document.hidden) draw();
};
document.addEventListener("visibilitychange", draw);
window.addEventListener("hashchange", go);
window.addEventListener("resize", draw);
setInterval(trouble, 1000);
go();
mapMemory();
