// The first view: the run that is served, and its fleet.

import { fleetTable } from './fleet_table.js';
import { live, watch } from './live.js';
import { plot } from './plots.js';
import { bytes, clock, count, dash, el, joules, number, percent, span, table } from './text.js';

const EVENTS = 100;

/** Fill `main`; returns what ends it. */
export function fleetView(main) {
  const values = {};
  const tile = (name, title) => el('div', {}, el('dt', {}, title), el('dd', {}, values[name] = el('span', {}, dash), values[`${name}-more`] = el('small')));
  const tiles = el('dl', { class: 'tiles' }, tile('online', 'Devices online'), tile('version', 'Version'), tile('score', 'Accuracy'),
    tile('density', 'Mean density'), tile('up', 'Sent by devices'), tile('down', 'Received'), tile('joules', 'Energy, by heartbeats'), tile('elapsed', 'Running for'));
  const accuracy = plot('Accuracy over time', { top: 1 });
  const density = plot('Mean density over time', { top: 1, y: percent });
  const levels = el('div');
  const events = el('ol', { class: 'events', role: 'log', 'aria-live': 'polite', 'aria-relevant': 'additions', 'aria-label': 'Events', tabindex: '0', reversed: true });
  const devices = fleetTable();
  main.append(el('h1', {}, 'Fleet'), tiles, devices,
    el('div', { class: 'plots' }, accuracy, density),
    el('section', { 'aria-labelledby': 'levels' }, el('h2', { id: 'levels' }, 'What each level contributes'), levels),
    el('section', { 'aria-labelledby': 'events' }, el('h2', { id: 'events' }, 'Events'), events));

  const put = (node, text) => { if (node.textContent !== text) node.textContent = text; };
  const say = (name, text, more = '') => { put(values[name], text); put(values[`${name}-more`], more); };
  const showRun = () => {
    const { run } = live;
    say('online', `${run.online ?? dash} of ${run.known ?? dash}`, run.resting ? `${run.resting} resting at a limit` : '');
    say('version', count(run.version));
    say('score', number(run.score));
    say('density', percent(run.mean_density));
    say('up', bytes(run.sent_bytes));
    say('down', bytes(run.received_bytes));
    const unmetered = run.metered < run.known;
    if (run.joules === null || run.joules === undefined) say('joules', 'unmeasured');
    else say('joules', joules(run.joules), unmetered ? `${run.metered} of ${run.known} devices measure it` : '');
    say('elapsed', span(run.elapsed_s), run.planned_s ? `of ${span(run.planned_s)}` : '');
  };
  const showLines = () => {
    const { history } = live;
    if (!history) return;
    accuracy.show(history.elapsed_s, scoreLines(history));
    density.show(history.elapsed_s, [{ label: 'mean density', values: history.mean_density, strong: true }]);
  };
  const showLevels = () => levels.replaceChildren(levelTable(live.run.contributions ?? [], live.run.densities));
  const showEvents = (news) => {
    events.prepend(...news.slice(-EVENTS).reverse().map(eventLine));
    while (events.children.length > EVENTS) events.lastChild.remove();
  };

  showRun();
  showLines();
  showLevels();
  showEvents(live.events);
  const unwatch = watch((news) => {
    showRun();
    if (news.history || news.run.version !== undefined) showLines();
    if (news.run.contributions || news.run.densities) showLevels();
    if (news.whole) events.replaceChildren();
    events.setAttribute('aria-busy', String(Boolean(news.whole))); // what is old is not announced
    showEvents(news.events);
  });
  return () => { unwatch(); devices.end(); accuracy.end(); density.end(); };
}

/** Lines of a plot of accuracies. */
export function scoreLines(history) {
  const levels = Object.entries(history.levels).sort(([a], [b]) => a - b);
  return [...levels.map(([level, values]) => ({ label: `level ${percent(Number(level))}`, values })),
    { label: 'global model', values: history.score, strong: true }];
}

/** What each level does; counts: devices by density now, where there are any. */
export function levelTable(contributions, counts) {
  if (!contributions.length) return el('p', { class: 'muted' }, 'no update has come yet');
  const all = contributions.reduce((sum, level) => sum + level.updates, 0);
  const columns = [['Level', false], ...(counts ? [['Devices now', true]] : []), ['Updates', true], ['Share', true], ['Examples', true], ['Accuracy of its prefix', true], ['Above the level below', true]];
  const rows = contributions.map((level) => [percent(level.density), ...(counts ? [count(counts[String(level.density)] ?? 0)] : []), count(level.updates),
    all ? percent(level.updates / all) : dash, count(level.examples), number(level.score), level.gain === null ? dash : `${level.gain >= 0 ? '+' : ''}${number(level.gain)}`]);
  return table('What each level contributes', columns, rows);
}

/** An event's line. */
export const eventLine = (event) => el('li', {}, el('time', { datetime: new Date(1000 * event.at_s).toISOString() }, clock(event.at_s)), event.text);
