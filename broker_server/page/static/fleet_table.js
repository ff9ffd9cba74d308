// The fleet's table: however many devices there are, only the rows in sight are elements, and they are used again as one scrolls.

import { live, now_s, watch } from './live.js';
import { bar, el, number, percent, rate, span, stateOf } from './text.js';

const SPARE = 4;
const COLUMNS = [
  ['device', 'Device', (who) => who],
  ['state', 'State', (who, row) => stateOf(row)[0]],
  ['density', 'Density', (who, row) => row.density],
  ['link', 'Link', (who, row) => row.uplink_bps ?? -1],
  ['phase', 'Phase', (who, row) => row.phase ?? ''],
  ['temperature', 'Temp.', (who, row) => row.temperature_c ?? -300],
  ['power', 'Power', (who, row) => row.watts ?? -1],
  ['updated', 'Updated', (who, row) => row.updated_s ?? 0],
];

/** The table and its tools; `end()` lets go of what it listens to. */
export function fleetTable() {
  const space = el('div', { class: 'space', role: 'rowgroup' });
  const heads = COLUMNS.map(([name, title]) => el('div', { role: 'columnheader', 'data-name': name },
    el('button', { type: 'button', onclick: () => sortBy(name) }, title)));
  const head = el('div', { class: 'head', role: 'rowgroup' }, el('div', { class: 'row', role: 'row', 'aria-rowindex': '1' }, ...heads));
  const body = el('div', { class: 'fleet', role: 'table', tabindex: '0', 'aria-label': 'Devices', 'aria-colcount': COLUMNS.length }, head, space);
  const filter = el('input', { type: 'search', id: 'filter', placeholder: 'name or state', autocomplete: 'off', oninput: () => order() });
  const shown = el('span', { class: 'muted', role: 'status' });
  const place = el('section', { 'aria-labelledby': 'devices' }, el('h2', { id: 'devices' }, 'Devices'),
    el('div', { class: 'tools' }, el('label', { for: 'filter' }, 'Find'), filter, shown), body);

  let sort = 'device';
  let up = true;
  let names = [];
  let rowHeight = 40;
  let waiting = false;
  const pool = [];

  function sortBy(name) {
    up = name === sort ? !up : true;
    sort = name;
    order();
  }

  /** Which devices there are, in which order. */
  function order() {
    const wanted = filter.value.trim().toLowerCase();
    const key = COLUMNS.find(([name]) => name === sort)[2];
    const keyed = [];
    for (const [who, row] of live.devices) {
      if (!wanted || who.includes(wanted) || stateOf(row)[0].includes(wanted)) keyed.push([key(who, row), who]);
    }
    const sign = up ? 1 : -1;
    keyed.sort(([a, x], [b, y]) => (a < b ? -sign : a > b ? sign : x < y ? -1 : 1));
    names = keyed.map(([, who]) => who);
    for (const each of heads) each.setAttribute('aria-sort', each.dataset.name === sort ? (up ? 'ascending' : 'descending') : 'none');
    const said = wanted ? `${names.length} of ${live.devices.size} devices` : `${names.length} devices`;
    if (shown.textContent !== said) shown.textContent = said;
    body.setAttribute('aria-rowcount', names.length + 1);
    space.style.height = `${names.length * rowHeight}px`;
    draw();
  }

  /** Give every row in sight its device. */
  function draw() {
    const first = Math.max(0, Math.floor(body.scrollTop / rowHeight) - SPARE);
    const many = Math.min(names.length - first, Math.ceil(body.clientHeight / rowHeight) + 2 * SPARE);
    while (pool.length < many) pool.push(space.appendChild(makeRow()));
    for (let at = 0; at < many; at += 1) {
      const row = pool[(first + at) % pool.length];
      row.show(first + at, names[first + at]);
    }
    const last = first + many;
    for (const row of pool) if (row.at < first || row.at >= last) row.hide();
  }

  const soon = () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; draw(); });
  };

  function makeRow() {
    const link = el('a');
    const meter = bar();
    const share = el('span');
    const cells = COLUMNS.map(([name]) => el('div', { role: 'cell', class: name === 'density' ? 'density' : name === 'device' ? 'name' : null }));
    cells[0].append(link);
    cells[2].append(meter, share);
    const row = el('div', { class: 'row', role: 'row' }, ...cells);
    const said = Array(COLUMNS.length).fill(null);
    const say = (at, text, node = cells[at]) => { if (said[at] !== text) { said[at] = text; node.textContent = text; } };
    row.hide = () => {
      if (row.contains(document.activeElement)) body.focus({ preventScroll: true });
      row.hidden = true;
      row.style.display = 'none';
      row.at = -1;
    };
    row.show = (at, who) => {
      const device = live.devices.get(who);
      if (row.at !== at) {
        if (row.contains(document.activeElement)) body.focus({ preventScroll: true });
        row.at = at;
        row.hidden = false;
        row.style.display = '';
        row.style.transform = `translateY(${at * rowHeight}px)`;
        row.setAttribute('aria-rowindex', at + 2);
      }
      if (said[0] !== who) link.href = `#/device/${who}`;
      say(0, who, link);
      const [state, look] = stateOf(device);
      if (said[1] !== state) cells[1].className = look;
      say(1, state);
      meter.set(who, device.density, device.first_density);
      say(2, percent(device.density), share);
      say(3, rate(device.uplink_bps));
      say(4, device.phase ?? '');
      say(5, device.temperature_c === undefined || device.temperature_c === null ? '–' : `${number(device.temperature_c, 0)} °C`);
      say(6, device.watts === undefined || device.watts === null ? '–' : `${number(device.watts, 1)} W${device.throttled ? ' !' : ''}`);
      say(7, device.updated_s ? `${span(now_s() - device.updated_s)} ago` : 'none');
    };
    return row;
  }

  body.addEventListener('scroll', soon, { passive: true });
  const resized = new ResizeObserver(() => {
    rowHeight = parseFloat(getComputedStyle(document.documentElement).getPropertyValue('--row'));
    for (const row of pool) row.at = -1;
    order();
  });
  resized.observe(body);
  const unwatch = watch((news) => { if (news.whole || sort !== 'device' || filter.value || live.devices.size !== names.length) order(); else soon(); });
  const ticking = setInterval(soon, 1000);
  place.end = () => { resized.disconnect(); unwatch(); clearInterval(ticking); };
  return place;
}
