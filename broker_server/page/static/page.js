// Which view is shown, the line at the top, and the frame time at the bottom.

import { controlView } from './control.js';
import { deviceView } from './device.js';
import { fleetView } from './fleet.js';
import { listen, live, setToken, watch } from './live.js';
import { compareView, runView, runsView } from './runs.js';
import { number } from './text.js';

const VIEWS = [
  [/^\/?$/, 'Fleet', '#/', fleetView],
  [/^\/device\/([a-z0-9-]+)$/, 'Device', '#/', deviceView],
  [/^\/runs$/, 'Runs', '#/runs', runsView],
  [/^\/run\/([a-z0-9-]+)$/, 'Run', '#/runs', runView],
  [/^\/compare\/([a-z0-9,-]+)$/, 'Compare', '#/runs', (main, names) => compareView(main, names.split(','))],
  [/^\/settings$/, 'Control', '#/settings', controlView],
];
const main = document.getElementById('main');
let end = () => {};

function show(first) {
  const path = location.hash.slice(1);
  const found = VIEWS.map(([pattern, ...view]) => [pattern.exec(path), ...view]).find(([match]) => match) ?? [[], ...VIEWS[0].slice(1)];
  const [match, title, place, view] = found;
  end();
  main.replaceChildren();
  end = view(main, match[1]);
  document.title = `${match[1] ?? title} · Regrow`;
  for (const link of document.querySelectorAll('nav a')) {
    if (link.getAttribute('href') === place) link.setAttribute('aria-current', 'page');
    else link.removeAttribute('aria-current');
  }
  if (!first) { main.focus(); scrollTo(0, 0); }
}

/** A token in the address goes into this tab's memory and out of the address. */
function takeToken() {
  const found = /^#token=([\w-]+)$/.exec(location.hash);
  if (found) {
    setToken(found[1]);
    history.replaceState(null, '', location.pathname + '#/settings');
  }
}

function head() {
  const { run } = live;
  document.getElementById('run-name').textContent = run.run ? `${run.task} · ${run.run}` : '';
  const state = document.getElementById('state');
  const words = !live.connected ? `not connected${live.refused ? `: ${live.refused}` : ''}` : run.finished ? `finished: ${run.finished}`
    : run.paused ? 'paused' : !run.connected ? 'the gateway has lost its broker' : run.phase;
  if (state.textContent !== words) state.textContent = words;
  state.className = live.connected && run.connected ? (run.paused ? 'warn' : '') : 'bad';
}

/** How long frames take: a second's worth of them every five seconds, so that a phone can rest in between. */
function frames() {
  const place = document.getElementById('frames');
  const measure = () => {
    const taken = [];
    let before = null;
    const began = performance.now();
    const step = (now) => {
      if (before !== null) taken.push(now - before);
      before = now;
      if (now - began < 1000) requestAnimationFrame(step);
      else tell(taken);
    };
    requestAnimationFrame(step);
  };
  const tell = (taken) => {
    taken.sort((a, b) => a - b);
    const [middle, late] = [0.5, 0.95].map((part) => taken[Math.floor(part * (taken.length - 1))]);
    place.textContent = `frame ${number(middle, 1)} ms, 95 %: ${number(late, 1)} ms, ${live.devices.size} devices`;
    setTimeout(measure, 4000);
  };
  measure();
}

addEventListener('hashchange', () => { takeToken(); show(false); });
document.getElementById('skip').addEventListener('click', (event) => { event.preventDefault(); main.focus(); });
takeToken();
show(true);
watch(head);
head();
listen();
frames();
