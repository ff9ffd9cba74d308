// A device's own page.

import { eventLine } from './fleet.js';
import { ask, live, now_s, token, watch } from './live.js';
import { plot } from './plots.js';
import { bar, bytes, dash, el, facts, joules, number, percent, rate, span, stateOf, table } from './text.js';

/** Fill `main` with the device `who`; returns what ends it. */
export function deviceView(main, who) {
  const meter = bar(true);
  const now = el('div');
  const said = el('p', { role: 'status' });
  const spent = el('div');
  const events = el('ol', { class: 'events', 'aria-label': `Events of ${who}`, tabindex: '0' });
  const density = plot('Density', { clock: true, x: 'time', top: 1, y: percent });
  const uplink = plot('Uplink', { clock: true, x: 'time', y: rate, tick: rate });
  const watts = plot('Power', { clock: true, x: 'time', y: (value) => (value === null ? dash : `${number(value, 2)} W`) });
  const warm = plot('Temperature', { clock: true, x: 'time', y: (value) => (value === null ? dash : `${number(value, 1)} °C`) });
  const staleness = plot('Staleness of its updates', { clock: true, x: 'time', y: (value) => number(value, 0) });
  const loss = plot('Loss on its own data', { clock: true, x: 'time' });
  const orders = el('div', { class: 'tools' });
  main.append(el('h1', {}, `Device ${who}`), meter, now, orders, said, el('div', { class: 'plots' }, density, uplink, watts, warm, staleness, loss),
    el('section', { 'aria-labelledby': 'spent' }, el('h2', { id: 'spent' }, 'Energy of this run'), spent),
    el('section', { 'aria-labelledby': 'its-events' }, el('h2', { id: 'its-events' }, 'Events'), events));

  const show = () => {
    const row = live.devices.get(who);
    if (!row) {
      now.replaceChildren(el('p', {}, live.connected ? 'There is no device of this name in the run that is served.' : 'Not connected to the gateway.'));
      return;
    }
    meter.set(who, row.density, row.first_density);
    now.replaceChildren(nowOf(row));
  };
  const load = async () => {
    try {
      const history = await ask(`api/device/${who}`);
      for (const [figure, name, title] of [[density, 'density', 'density'], [uplink, 'uplink_bps', 'uplink'], [staleness, 'staleness', 'versions'], [loss, 'loss', 'loss']]) {
        figure.show(history[name].map(([at]) => at), history[name].length ? [{ label: title, values: history[name].map(([, value]) => value), strong: true }] : []);
      }
      const at = history.power.map(([time]) => time);
      watts.show(at, at.length ? [{ label: 'watts', values: history.power.map(([, value]) => value), strong: true }] : []);
      warm.show(at, at.length ? [{ label: '°C', values: history.power.map(([, , value]) => value), strong: true }] : []);
      spent.replaceChildren(energyTable(history.energy));
    } catch (error) { said.textContent = error.message; }
  };
  const tellEvents = () => events.replaceChildren(...live.events.filter((event) => event.device === who).reverse().map(eventLine));
  offer(orders, who, said);
  show();
  load();
  tellEvents();
  const again = setInterval(load, 30000);
  const unwatch = watch((news) => {
    if (news.whole || news.devices[who] || !live.connected) show();
    if (news.events.length) tellEvents();
  });
  return () => { clearInterval(again); unwatch(); for (const each of [density, uplink, watts, warm, staleness, loss]) each.end(); };
}

const unmeasured = (why) => (!why ? 'unmeasured' : why.startsWith('unmeasured') ? why : `unmeasured: ${why}`);

function nowOf(row) {
  const [state, look] = stateOf(row);
  const interval = row.low_bps === undefined || row.low_bps === null ? '' : ` (95 %: ${rate(row.low_bps)} to ${rate(row.high_bps)})`;
  const power = row.watts === undefined || row.watts === null ? unmeasured(row.meter) : `${number(row.watts, 2)} W (${row.meter})`;
  return facts([
    ['State', el('span', { class: look }, state)], ['Why', row.declined || row.failed || row.limit],
    ['Phase', row.phase], ['Density', row.density === null ? 'none: it never joined' : `${percent(row.density)} of the model; began with ${percent(row.first_density)}, bound by ${row.bound_by}`],
    ['Its memory holds', row.memory_density !== null && row.memory_density < 1 ? percent(row.memory_density) : null],
    ['Uplink', `${rate(row.uplink_bps)}${interval}`], ['Round trip', row.rtt_s ? `${number(1000 * row.rtt_s, 0)} ms` : null],
    ['Power', power], ['Temperature', row.temperature_c === undefined || row.temperature_c === null ? dash : `${number(row.temperature_c, 1)} °C${row.throttled ? ', throttled' : ''}`],
    ['Energy since the gateway began', joules(row.joules)],
    ['Updates', `${row.updates}${row.updated_s ? `, the last one ${span(now_s() - row.updated_s)} ago` : ''}`],
    ['Staleness of the last one', row.staleness === undefined ? null : `${row.staleness} versions`],
    ['Sent, received', `${bytes(row.sent_bytes)}, ${bytes(row.received_bytes)}`],
    ['A training step', row.step_s ? `${number(1000 * row.step_s, 1)} ms` : null],
    ['Heard of', row.heard_s ? `${span(now_s() - row.heard_s)} ago` : 'not since the gateway began'],
  ]);
}

/** Joules by phase. */
export function energyTable(energy) {
  if (energy.joules === null) return el('p', { class: 'muted' }, 'unmeasured: no journal of this run has joules');
  const rows = Object.entries(energy.phases).map(([phase, value]) => [phase, joules(value)]);
  const unknown = energy.unmeasured_s ? [['unmeasured', span(energy.unmeasured_s)]] : [];
  return table(`Energy by phase (${energy.certainty})`, [['Phase', false], ['Energy', true]], [...rows, ['all', joules(energy.joules)], ...unknown]);
}

async function offer(place, who, said) {
  if (!token()) return;
  try {
    if (!(await ask('api/settings')).fleet) return;
  } catch { return; }
  const order = (what, title) => el('button', { class: 'do', type: 'button', onclick: async () => {
    try { said.textContent = (await ask('api/device', { device: who, do: what })).done; } catch (error) { said.textContent = error.message; }
  } }, title);
  place.append(order('pause', 'Pause'), order('drain', 'Drain'), order('resume', 'Resume'));
}
