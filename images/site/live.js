// Keeps the figures alive. Without it the page is complete, only still.
"use strict";

const PERIOD = 500;
// No new tick for so long: the machine naps, or is away.
const ASLEEP_AFTER = 1800;

const show = (id, text) => {
  const element = document.getElementById(id);
  if (element.textContent !== String(text)) element.textContent = text;
};

const memory = bytes => {
  const mib = Math.floor(bytes / 1048576);
  return mib < 10000 ? `${mib} MiB` : `${(mib / 1024).toFixed(1)} GiB`;
};

let last = null;
let moved = performance.now();

function wake(status) {
  document.documentElement.classList.remove("asleep");
  const state = document.getElementById("state");
  state.hidden = true;
  if (last && last.nonce !== status.nonce) {
    // Another memory behind the same address: what is on the page is another machine's.
    location.reload();
  }
  last = status;
  moved = performance.now();
}

function sleep() {
  document.documentElement.classList.add("asleep");
  const state = document.getElementById("state");
  state.hidden = false;
  if (!state.textContent) state.textContent = "The kitten naps: its machine does not answer.";
}

async function look() {
  try {
    const response = await fetch("api/status", { cache: "no-store", signal: AbortSignal.timeout(1500) });
    const status = await response.json();
    if (!last || status.ticks !== last.ticks || status.nonce !== last.nonce) wake(status);
    show("ticks", status.ticks);
    show("visits", status.visits);
    show("hostname", status.hostname);
    show("cpus", status.cpus);
    show("memory", memory(status.memory_bytes));
    show("generation", status.generation);
    show("entries", status.guestbook_entries);
    document.getElementById("cpus-plural").hidden = status.cpus === 1;
  } catch {
    // Seen below, by the ticks that do not come.
  }
  if (performance.now() - moved > ASLEEP_AFTER) sleep();
  setTimeout(look, PERIOD);
}

// Entries are written in UTC; whoever reads them has a time zone.
for (const time of document.querySelectorAll("time")) {
  time.textContent = new Date(time.dateTime).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
}

look();
