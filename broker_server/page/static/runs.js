// The list of runs, one run's page, and runs side by side.

import { energyTable } from './device.js';
import { eventLine, levelTable, scoreLines } from './fleet.js';
import { ask } from './live.js';
import { plot } from './plots.js';
import { bytes, count, dash, date, el, facts, joules, number, percent, span, table } from './text.js';

const MOST = 6;

/** Every run; the ones that are chosen can be compared. */
export function runsView(main) {
  const place = el('div');
  const go = el('button', { class: 'do main', type: 'submit', disabled: true }, 'Compare');
  const form = el('form', { onsubmit: (event) => { event.preventDefault(); location.hash = `#/compare/${chosen().join(',')}`; } },
    place, el('div', { class: 'tools' }, go, el('span', { class: 'muted' }, `choose 2 to ${MOST}`)));
  const chosen = () => [...form.querySelectorAll('input:checked')].map((box) => box.value);
  form.addEventListener('change', () => { go.disabled = chosen().length < 2 || chosen().length > MOST; });
  main.append(el('h1', {}, 'Runs'), form);
  ask('api/runs').then(({ runs, served }) => {
    const rows = runs.map((run) => [el('a', { href: `#/run/${run.run}` }, run.run), run.task, run.method, run.started_s ? date(run.started_s) : dash, count(run.version),
      count(run.devices), count(run.updates), number(run.score), run.run === served ? 'served now' : run.finished || 'unfinished',
      el('input', { type: 'checkbox', value: run.run, 'aria-label': `Compare ${run.run}` })]);
    const columns = [['Run', false], ['Task', false], ['Method', false], ['Started', false], ['Version', true], ['Devices', true], ['Updates', true], ['Accuracy', true], ['State', false], ['Compare', false]];
    place.replaceChildren(table('Runs', columns, rows));
  }).catch((error) => place.replaceChildren(el('p', { class: 'bad', role: 'alert' }, error.message)));
  return () => {};
}

/** One run. */
export function runView(main, name) {
  const accuracy = plot('Accuracy over time', { top: 1 });
  const density = plot('Mean density over time', { top: 1, y: percent });
  const traffic = plot('Bytes over time', { y: bytes, tick: bytes });
  const energy = plot('Energy over time', { y: joules, tick: joules });
  const place = el('div');
  const rest = el('div');
  main.append(el('h1', {}, `Run ${name}`), place, el('div', { class: 'plots' }, accuracy, density, traffic, energy), rest);
  ask(`api/run/${name}`).then((run) => {
    const last = (values) => values.at(-1) ?? null;
    place.replaceChildren(facts([['Task', run.task], ['Method', run.method], ['Version', count(run.newest_version)], ['Led for', span(last(run.elapsed_s))],
      ['Accuracy', number(last(run.score))], ['Mean density', percent(last(run.mean_density))], ['Sent by devices', bytes(last(run.sent_bytes))],
      ['Received by devices', bytes(last(run.received_bytes))], ['Energy', run.energy.joules === null ? 'unmeasured' : `${joules(run.energy.joules)} (${run.energy.certainty})`]]));
    accuracy.show(run.elapsed_s, scoreLines(run));
    density.show(run.elapsed_s, [{ label: 'mean density', values: run.mean_density, strong: true }]);
    traffic.show(run.elapsed_s, [{ label: 'sent', values: run.sent_bytes, strong: true }, { label: 'received', values: run.received_bytes }]);
    energy.show(run.joules ? run.elapsed_s : [], run.joules ? [{ label: 'joules', values: run.joules, strong: true }] : []);
    rest.replaceChildren(el('h2', {}, 'What each level contributes'), levelTable(run.contributions), el('h2', {}, 'Energy'), energyTable(run.energy),
      el('h2', {}, 'Events'), el('ol', { class: 'events', tabindex: '0', 'aria-label': 'Events' }, ...run.events.map(eventLine)));
  }).catch((error) => place.replaceChildren(el('p', { class: 'bad', role: 'alert' }, error.message)));
  return () => { for (const each of [accuracy, density, traffic, energy]) each.end(); };
}

const AXES = {
  time: ['seconds', (run) => run.elapsed_s, String],
  bytes: ['bytes sent and received', (run) => run.sent_bytes.map((sent, at) => sent + run.received_bytes[at]), bytes],
  joules: ['joules', (run) => run.joules, joules],
};

/** Runs side by side: accuracy and density against time, bytes or joules. */
export function compareView(main, names) {
  const chosen = el('select', { id: 'against', onchange: () => show() }, ...Object.keys(AXES).map((axis) => el('option', { value: axis }, axis)));
  const place = el('div');
  const note = el('p', { role: 'status' });
  const summary = el('div');
  main.append(el('h1', {}, 'Runs side by side'), el('div', { class: 'tools' }, el('label', { for: 'against' }, 'Against'), chosen), note, place, summary);
  let runs = [];
  let figures = [];
  const show = () => {
    const [title, of] = AXES[chosen.value];
    const known = runs.filter((run) => of(run)?.some((x) => x !== null));
    const without = runs.filter((run) => !known.includes(run)).map((run) => run.run);
    note.textContent = without.length ? `Unmeasured, and so not shown: ${without.join(', ')}` : '';
    for (const figure of figures) figure.end();
    figures = [plot(`Accuracy against ${chosen.value}`, { x: title, top: 1 }), plot(`Mean density against ${chosen.value}`, { x: title, top: 1, y: percent })];
    place.replaceChildren(el('div', { class: 'plots' }, ...figures));
    ['score', 'mean_density'].forEach((key, at) => {
      if (!known.length) { figures[at].show([], []); return; }
      const [x, ...lines] = uPlot.join(known.map((run) => ascending(of(run), run[key])));
      figures[at].show(x, lines.map((values, line) => ({ label: known[line].run, values: values.map((value) => value ?? null), strong: true })));
    });
  };
  Promise.all(names.slice(0, MOST).map((name) => ask(`api/run/${name}`))).then((found) => {
    runs = found;
    show();
    const best = (run) => Math.max(...run.score.filter((score) => score !== null), -Infinity);
    const target = Math.min(...runs.map(best));
    const reach = (run, values) => { const at = run.score.findIndex((score) => score !== null && score >= target); return at < 0 || !values ? null : values[at]; };
    const rows = runs.map((run) => [el('a', { href: `#/run/${run.run}` }, run.run), run.method, number(run.score.at(-1)), number(Number.isFinite(best(run)) ? best(run) : null), span(reach(run, run.elapsed_s)),
      bytes(reach(run, AXES.bytes[1](run))), run.joules ? joules(reach(run, run.joules)) : 'unmeasured', percent(run.mean_density.at(-1))]);
    const to = Number.isFinite(target) ? number(target) : 'the same accuracy';
    summary.replaceChildren(el('h2', {}, `To ${to}, which all have reached`), table('Runs side by side',
      [['Run', false], ['Method', false], ['Last accuracy', true], ['Best', true], ['Time', true], ['Bytes', true], ['Energy', true], ['Mean density', true]], rows));
  }).catch((error) => place.replaceChildren(el('p', { class: 'bad', role: 'alert' }, error.message)));
  return () => { for (const figure of figures) figure.end(); };
}

/** As uPlot joins them: x strictly ascending, the last value of each. */
function ascending(x, y) {
  const points = new Map();
  x.forEach((each, at) => { if (each !== null) points.set(each, y[at]); });
  const sorted = [...points].sort(([a], [b]) => a - b);
  return [sorted.map(([each]) => each), sorted.map(([, value]) => value)];
}
