// The one connection to the gateway: what it tells is kept here, and whoever shows something is told that it has changed.

export const live = { run: {}, devices: new Map(), events: [], connected: false, refused: '', ahead_s: 0, history: null };
const watchers = new Set();
const LONGEST_WAIT_MS = 15000;
const SILENT_MS = 40000; // the gateway says something every 15 s
const EVENTS = 200;

/** Call back with {run, devices, events} whenever something is new; returns what ends it. */
export function watch(callback) {
  watchers.add(callback);
  return () => watchers.delete(callback);
}

const tell = (news) => { for (const callback of [...watchers]) callback(news); };
export const now_s = () => Date.now() / 1000 - live.ahead_s;

// ---- the token: of this tab only -----------------------------------------------------------------------------------------------

export const token = () => sessionStorage.getItem('token') ?? '';
export function setToken(text) {
  if (text) sessionStorage.setItem('token', text);
  else sessionStorage.removeItem('token');
  wake?.();
}
const authorization = () => (token() ? { Authorization: `Bearer ${token()}` } : {});

/** JSON of a path; an Error with the gateway's words where it refuses. */
export async function ask(path, body) {
  const posted = body === undefined ? {} : { method: 'POST', body: JSON.stringify(body) };
  const headers = { ...authorization(), ...(body === undefined ? {} : { 'Content-Type': 'application/json' }) };
  const answer = await fetch(path, { ...posted, headers, cache: 'no-store' });
  const said = await answer.json();
  if (!answer.ok) throw new Error(said.error);
  return said;
}

// ---- the stream ----------------------------------------------------------------------------------------------------------------

let wake = null;

export async function listen() {
  for (let wait = 1000; ;) {
    try {
      const answer = await fetch('api/events', { headers: authorization(), cache: 'no-store' });
      if (!answer.ok) throw new Error((await answer.json()).error);
      live.refused = '';
      wait = 1000;
      await read(answer.body.pipeThrough(new TextDecoderStream()).getReader());
    } catch (error) {
      live.refused = error.message;
    }
    live.connected = false;
    tell({ run: {}, devices: {}, events: [] });
    await new Promise((done) => { wake = done; setTimeout(done, wait); });
    wait = Math.min(2 * wait, LONGEST_WAIT_MS);
  }
}

async function read(reader) {
  for (let text = ''; ;) {
    const dead = setTimeout(() => reader.cancel(), SILENT_MS); // a link that broke without a word
    const { value, done } = await reader.read();
    clearTimeout(dead);
    if (done) return;
    const parts = (text + value).split('\n\n');
    text = parts.pop();
    for (const part of parts) take(part);
  }
}

function take(part) {
  const found = /^event: (\w+)\ndata: (.*)$/s.exec(part);
  if (!found) return;
  const news = JSON.parse(found[2]);
  live.connected = true;
  live.ahead_s = Date.now() / 1000 - news.now_s;
  if (found[1] === 'whole') {
    live.devices = new Map(Object.entries(news.devices));
    live.run = news.run;
    live.events = news.events;
    remember();
  } else {
    for (const [who, row] of Object.entries(news.devices)) live.devices.set(who, { ...live.devices.get(who), ...row });
    const version = live.run.version;
    live.run = { ...live.run, ...news.run };
    const seen = live.events.at(-1)?.id ?? 0;
    news.events = news.events.filter((event) => event.id > seen);
    live.events = [...live.events, ...news.events].slice(-EVENTS);
    if (live.run.version !== version) grow();
  }
  tell({ ...news, whole: found[1] === 'whole' });
}

// ---- the run so far, which the stream goes on with --------------------------------------------------------------------------------

async function remember() {
  try {
    const series = await ask(`api/curve/${live.run.run}`);
    live.history = { elapsed_s: series.elapsed_s, version: series.version, score: series.score, mean_density: series.mean_density, levels: series.levels };
    tell({ run: {}, devices: {}, events: [], history: true });
  } catch { /* said when the stream says it */ }
}

function grow() {
  const { history, run } = live;
  if (!history || run.version <= (history.version.at(-1) ?? 0)) return;
  history.elapsed_s.push(run.elapsed_s);
  history.version.push(run.version);
  history.score.push(run.score);
  history.mean_density.push(run.mean_density);
  for (const level of Object.keys(run.scores)) history.levels[level] ??= Array(history.version.length - 1).fill(null);
  for (const [level, values] of Object.entries(history.levels)) values.push(run.scores[level] ?? null);
}
