// Lines over time with uPlot; the same numbers as text for who does not see them.

import { el, number, table } from './text.js';

const COLOURS = { light: ['#0072b2', '#b34f00', '#007a5a', '#a8447f', '#7a6200', '#56569c', '#1a1c20', '#b3261e'],
  dark: ['#5cb8f0', '#ffa25c', '#4fd6a8', '#f09ccb', '#e0c64a', '#a9a9f0', '#e8eaed', '#ff9d94'] };
const DASHES = [[], [8, 4], [2, 3], [10, 3, 2, 3]];
const HEIGHT = 220;
const ROWS = 12;
const darkness = matchMedia('(prefers-color-scheme: dark)');

/**
 * A figure; `show(x, lines)` draws anew. x: ascending; lines: [{label, values, strong}].
 * options: x: title of the x axis; top: highest y, if known; y: how a value is told.
 */
export function plot(title, options = {}) {
  const place = el('div', { 'aria-hidden': 'true' });
  const summary = el('p', { class: 'hidden' });
  const data = el('div');
  const details = el('details', {}, el('summary', {}, `Numbers: ${title}`), data);
  const figure = el('figure', {}, el('figcaption', {}, title), place, summary, details);
  let drawn = null;
  let last = [[], []];
  let labels = '';

  const draw = () => {
    const [x, lines] = last;
    drawn?.destroy();
    drawn = x.length ? new uPlot(looks(options, lines, place.clientWidth || 400), [x, ...lines.map((line) => line.values)], place) : null;
    if (!x.length) place.replaceChildren(el('p', { class: 'muted' }, 'nothing yet'));
    labels = lines.map((line) => line.label).join('|');
  };
  const tell = () => {
    const [x, lines] = last;
    const say = options.y ?? number;
    const newest = lines.map((line) => `${line.label} ${say(line.values.findLast((value) => value !== null))}`);
    summary.textContent = x.length ? `Newest values: ${newest.join(', ')}.` : 'Nothing yet.';
    if (details.open) data.replaceChildren(numbers(title, options, x, lines));
  };
  figure.show = (x, lines) => {
    const first = !last[0].length;
    last = [x, lines];
    if (!first && drawn && labels === lines.map((line) => line.label).join('|')) drawn.setData([x, ...lines.map((line) => line.values)]);
    else { place.replaceChildren(); drawn = null; draw(); }
    tell();
  };
  details.addEventListener('toggle', tell);
  const resized = new ResizeObserver(() => { if (drawn && place.clientWidth) drawn.setSize({ width: place.clientWidth, height: HEIGHT }); });
  resized.observe(place);
  darkness.addEventListener('change', draw);
  figure.end = () => { resized.disconnect(); darkness.removeEventListener('change', draw); drawn?.destroy(); };
  return figure;
}

function looks(options, lines, width) {
  const style = getComputedStyle(document.documentElement);
  const [text, grid] = [style.getPropertyValue('--text').trim(), style.getPropertyValue('--grid').trim()];
  const colours = COLOURS[darkness.matches ? 'dark' : 'light'];
  const axis = { stroke: text, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid }, font: '12px system-ui' };
  const say = options.y ?? number;
  return {
    width, height: HEIGHT, cursor: { drag: { x: true, y: false } },
    scales: { x: { time: Boolean(options.clock) }, y: { range: (_, low, high) => [Math.min(options.bottom ?? 0, low ?? 0), Math.max(options.top ?? 0, high ?? 1) || 1] } },
    axes: [{ ...axis, label: options.x ?? 'seconds', labelFont: '12px system-ui', labelSize: 18 }, { ...axis, size: options.tick ? 92 : 56, values: (_, ticks) => ticks.map((tick) => options.tick?.(tick) ?? tick) }],
    series: [{ label: options.x ?? 'seconds', value: (_, x) => (options.clock ? (x === null ? '' : new Date(1000 * x).toLocaleString()) : x === null ? '' : Math.round(x).toLocaleString('en')) },
      ...lines.map((line, at) => ({ label: line.label, stroke: colours[at % colours.length], width: line.strong ? 2.5 : 1.5, dash: DASHES[Math.floor(at / colours.length) % 4],
        spanGaps: true, points: { show: false }, value: (_, value) => say(value) }))],
  };
}

function numbers(title, options, x, lines) {
  const step = Math.max(1, Math.ceil(x.length / ROWS));
  const chosen = x.map((_, at) => at).filter((at) => at % step === 0 || at === x.length - 1);
  const say = options.y ?? number;
  const rows = chosen.map((at) => [options.clock ? new Date(1000 * x[at]).toLocaleString() : Math.round(x[at]).toLocaleString('en'), ...lines.map((line) => say(line.values[at]))]);
  return table(title, [[options.x ?? 'seconds', false], ...lines.map((line) => [line.label, true])], rows);
}
