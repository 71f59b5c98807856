"use strict";
// The map, its inspector and the charts of one plan. Everything drawn comes from the JSON of the element #data.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const VARIABLE = { tiles: "--tiles", "gathered columns": "--gathered", "single edges": "--single", rows: "--rows", dense: "--dense" };
const count = (value) => Math.round(value).toLocaleString("en-US");
const percent = (share) => (share >= 0.1 || share === 0 ? `${(100 * share).toFixed(0)} %` : `${Number((100 * share).toPrecision(2))} %`);

// Packed numbers: base 64, deflated, byte planes, differences of 32 bits.

function bytesOf(text) {
  const raw = atob(text), bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return bytes;
}

async function inflated(text) {
  const stream = new Blob([bytesOf(text)]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function unpacked(text) {
  const planes = await inflated(text), n = planes.length / 4, values = new Int32Array(n);
  let sum = 0;
  for (let i = 0; i < n; i++) {
    sum = (sum + (planes[i] | (planes[n + i] << 8) | (planes[2 * n + i] << 16) | (planes[3 * n + i] << 24))) | 0;
    values[i] = sum;
  }
  return values;
}

async function unpackAll(held) {
  const names = Object.keys(held).filter((name) => typeof held[name] === "string");
  const values = await Promise.all(names.map((name) => unpacked(held[name])));
  return { ...held, ...Object.fromEntries(names.map((name, i) => [name, values[i]])) };
}

async function loadView(view) {
  if (view.loaded) return view;
  for (const layer of view.layers) layer.runs = await unpackAll(layer.runs);
  if (view.overview) view.overview.counts = await unpackAll(view.overview.counts);
  for (const step of data.steps) {
    const tiles = step.costs.tiles;
    if (tiles && typeof tiles.indices === "string") step.costs.tiles = await unpackAll(tiles);
  }
  view.loaded = true;
  return view;
}

// Rows: the progressions of one query, from its run.

function firstRunAt(runs, row) {
  // The last run that starts at or before the row, or the first run.
  let low = 0, high = runs.first.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (runs.first[middle] <= row) low = middle + 1;
    else high = middle;
  }
  return Math.max(low - 1, 0);
}

function* progressions(runs, row, kvLen) {
  const run = firstRunAt(runs, row), into = row - runs.first[run];
  if (!runs.first.length || into < 0 || into >= runs.length[run]) return;
  for (let r = runs.indptr[run]; r < runs.indptr[run + 1]; r++) {
    const step = runs.step[r];
    let start = runs.start[r] + into * runs.startSlope[r];
    const stop = Math.min(runs.start[r] + runs.span[r] + into * runs.stopSlope[r], kvLen);
    if (start < 0) start += Math.ceil(-start / step) * step;
    if (start < stop) yield [start, stop, step];
  }
}

const isCovered = (runs, row) => {
  if (runs.whole) return true;
  const run = firstRunAt(runs, row);
  return runs.first.length > 0 && row >= runs.first[run] && row < runs.first[run] + runs.length[run];
};

function keysIn(runs, row, low, high, kvLen) {
  let found = 0;
  for (const [start, stop, step] of progressions(runs, row, kvLen)) {
    const first = Math.ceil((Math.max(low, start) - start) / step), last = Math.ceil((Math.min(high, stop) - start) / step);
    found += Math.max(last - first, 0);
  }
  return found;
}

// The raster: edges of every cell of the part in sight, layer by layer.

const MOST_SAMPLES = 4;

function raster(runs, box, rows, columns, kvLen) {
  const grid = new Float32Array(rows * columns);
  const perRow = (box.q1 - box.q0) / rows, perColumn = (box.kv1 - box.kv0) / columns;
  const slope = new Float64Array(columns + 2);
  const add = (base, start, stop, step, weight) => {
    const a = (start - box.kv0) / perColumn, b = (stop - box.kv0) / perColumn;
    if (b <= 0 || a >= columns) return;
    if (step > perColumn || stop - start <= step) {
      // Keys far enough apart to be seen one by one.
      const first = start + Math.max(0, Math.ceil((box.kv0 - start) / step)) * step;
      for (let key = first; key < Math.min(stop, box.kv1); key += step) grid[base + Math.min(columns - 1, Math.floor((key - box.kv0) / perColumn))] += weight;
      return;
    }
    const density = (weight * perColumn) / step, low = Math.max(a, 0), high = Math.min(b, columns);
    const i = Math.floor(low), j = Math.min(Math.floor(high), columns - 1);
    if (i === j) grid[base + i] += density * (high - low);
    else {
      grid[base + i] += density * (i + 1 - low);
      grid[base + j] += density * (high - j);
      slope[i + 1] += density;
      slope[j] -= density;
    }
  };
  for (let g = 0; g < rows; g++) {
    const top = box.q0 + g * perRow, bottom = top + perRow, base = g * columns;
    slope.fill(0);
    for (let run = firstRunAt(runs, Math.floor(top)); run < runs.first.length && runs.first[run] < bottom; run++) {
      const from = Math.max(runs.first[run], Math.ceil(top)), to = Math.min(runs.first[run] + runs.length[run], Math.ceil(bottom));
      if (from >= to) continue;
      const samples = Math.min(to - from, MOST_SAMPLES), weight = (to - from) / samples;
      for (let s = 0; s < samples; s++) {
        const into = Math.floor(from + ((s + 0.5) * (to - from)) / samples) - runs.first[run];
        for (let r = runs.indptr[run]; r < runs.indptr[run + 1]; r++) {
          const step = runs.step[r];
          let start = runs.start[r] + into * runs.startSlope[r];
          const stop = Math.min(runs.start[r] + runs.span[r] + into * runs.stopSlope[r], kvLen);
          if (start < 0) start += Math.ceil(-start / step) * step;
          if (start < stop) add(base, start, stop, step, weight);
        }
      }
    }
    let level = 0;
    for (let c = 0; c < columns; c++) {
      level += slope[c];
      if (level > 1e-9) grid[base + c] += level;
    }
  }
  return grid;
}

// The state of the map.

const canvas = byId("map"), pen = canvas.getContext("2d");
const state = { group: 0, view: 0, box: null, over: null, colours: {}, busy: false };
const currentGroup = () => data.groups[state.group];
const currentView = () => currentGroup().views[state.view];

function wholeBox(view) {
  const side = Math.max(view.qLen, view.kvLen);
  return { q0: 0, q1: side, kv0: 0, kv1: side };
}

function clamped(box, view) {
  const side = Math.max(view.qLen, view.kvLen), size = Math.min(Math.max(box.q1 - box.q0, 8), side);
  const q0 = Math.min(Math.max(box.q0, 0), side - size), kv0 = Math.min(Math.max(box.kv0, 0), side - size);
  return { q0, q1: q0 + size, kv0, kv1: kv0 + size };
}

function show(box) {
  state.box = clamped(box, currentView());
  if (!state.busy) {
    state.busy = true;
    requestAnimationFrame(() => { state.busy = false; draw(); });
  }
}

function colours() {
  const style = getComputedStyle(document.documentElement);
  const read = (name) => style.getPropertyValue(name).trim();
  const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  state.colours = { kind: Object.fromEntries(Object.entries(VARIABLE).map(([kind, name]) => [kind, rgb(read(name))])), paper: rgb(read("--card")), empty: rgb(read("--empty")), ink: read("--ink"), soft: read("--soft"), line: read("--line"), hex: Object.fromEntries(Object.entries(VARIABLE).map(([kind, name]) => [kind, read(name)])) };
}

function draw() {
  const view = currentView(), box = state.box, size = canvas.width, tokens = box.q1 - box.q0;
  if (!view.loaded) return;
  const cells = Math.max(8, Math.min(Math.round(size / (tokens > 1024 ? 1.5 : 1)), 560));
  const image = tokens <= cells ? exact(view, box) : coarse(view, box, cells);
  const scratch = document.createElement("canvas");
  [scratch.width, scratch.height] = [image.width, image.height];
  scratch.getContext("2d").putImageData(image.pixels, 0, 0);
  pen.imageSmoothingEnabled = false;
  pen.fillStyle = `rgb(${state.colours.paper})`;
  pen.fillRect(0, 0, size, size);
  const scale = size / tokens;
  pen.drawImage(scratch, (image.kv0 - box.kv0) * scale, (image.q0 - box.q0) * scale, image.tokensAcross * scale, image.tokensDown * scale);
  outside(view, box, scale, size);
  gridLines(view, box, scale, size);
  axes(box);
}

// Every pair by itself.
function exact(view, box) {
  const q0 = Math.floor(box.q0), q1 = Math.min(Math.ceil(box.q1), view.qLen), kv0 = Math.floor(box.kv0), kv1 = Math.min(Math.ceil(box.kv1), view.kvLen);
  const width = Math.max(kv1 - kv0, 1), height = Math.max(q1 - q0, 1);
  const pixels = new ImageData(width, height), out = pixels.data, paper = state.colours.paper, empty = state.colours.empty;
  paintTiles(view, q0, q1, kv0, kv1, out, width, paper, empty);
  for (let q = q0; q < q1; q++) {
    for (const layer of view.layers) {
      const [r, g, b] = state.colours.kind[layer.kind];
      for (const [start, stop, step] of progressions(layer.runs, q, view.kvLen)) {
        const first = start + Math.max(0, Math.ceil((kv0 - start) / step)) * step;
        for (let kv = first; kv < Math.min(stop, kv1); kv += step) {
          const at = 4 * ((q - q0) * width + kv - kv0);
          out[at] = r; out[at + 1] = g; out[at + 2] = b; out[at + 3] = 255;
        }
      }
    }
  }
  if (!view.isWhole) shadeUncovered(view, q0, q1, kv0, kv1, out, width);
  return { pixels, width, height, q0, kv0, tokensAcross: width, tokensDown: height };
}

// Behind the edges: tiles that the kernel walks, tinted.
function paintTiles(view, q0, q1, kv0, kv1, out, width, paper, empty) {
  const tiles = tilesOf(view);
  for (let q = q0; q < q1; q++) {
    for (let kv = kv0; kv < kv1; kv++) {
      const at = 4 * ((q - q0) * width + kv - kv0);
      const colour = tiles && tileAt(tiles, Math.floor(q / tiles.blockQ), Math.floor(kv / tiles.blockKv)) >= 0 ? empty : paper;
      out[at] = colour[0]; out[at + 1] = colour[1]; out[at + 2] = colour[2]; out[at + 3] = 255;
    }
  }
}

// Rows that the page does not hold: what the overview says of their cells.
function shadeUncovered(view, q0, q1, kv0, kv1, out, width) {
  const held = view.overview;
  if (!held) return;
  for (let q = q0; q < q1; q++) {
    if (view.layers.every((layer) => isCovered(layer.runs, q))) continue;
    for (let kv = kv0; kv < kv1; kv++) {
      // Hatched: how many of these pairs attend is known, but not which.
      const full = overviewColour(held, Math.floor(q / held.block), Math.floor(kv / held.block));
      const colour = mix(full, state.colours.paper, (q + kv) % 6 === 0 ? 0.3 : 0.1);
      const at = 4 * ((q - q0) * width + kv - kv0);
      for (let i = 0; i < 3; i++) out[at + i] = colour[i];
      out[at + 3] = 255;
    }
  }
}

function mix(colour, paper, strength) {
  return colour.map((value, i) => Math.round(paper[i] + (value - paper[i]) * strength));
}

function overviewColour(held, row, column) {
  let best = null, most = 0, total = 0;
  for (const [kind, counts] of Object.entries(held.counts)) {
    const value = counts[row * held.columns + column] || 0;
    total += value;
    if (value > most) [best, most] = [kind, value];
  }
  if (!best) return state.colours.paper;
  held.fullest ||= Math.max(...Object.values(held.counts).map((counts) => counts.reduce((a, b) => Math.max(a, b), 1)));
  return mix(state.colours.kind[best], state.colours.paper, 0.3 + (0.7 * Math.log1p(total)) / Math.log1p(held.fullest));
}

// Cells of many pairs: the colour of who does most, deeper where more of the pairs attend.
function coarse(view, box, cells) {
  const pixels = new ImageData(cells, cells), out = pixels.data, paper = state.colours.paper;
  const result = { pixels, width: cells, height: cells, q0: box.q0, kv0: box.kv0, tokensAcross: box.kv1 - box.kv0, tokensDown: box.q1 - box.q0 };
  if (!view.isWhole && view.overview) {
    const per = (box.q1 - box.q0) / cells, held = view.overview;
    for (let i = 0; i < cells; i++) for (let j = 0; j < cells; j++) {
      const row = Math.floor((box.q0 + (i + 0.5) * per) / held.block), column = Math.floor((box.kv0 + (j + 0.5) * per) / held.block);
      const known = row < held.rows && column < held.columns ? overviewColour(held, row, column) : paper;
      // Closer than the overview can tell, it is hatched.
      const colour = per > held.block / 16 ? known : mix(known, paper, (i + j) % 6 === 0 ? 0.3 : 0.1);
      const at = 4 * (i * cells + j);
      out[at] = colour[0]; out[at + 1] = colour[1]; out[at + 2] = colour[2]; out[at + 3] = 255;
    }
    if (per <= held.block / 16) overlaySampled(view, box, cells, out);
    return result;
  }
  const grids = view.layers.map((layer) => raster(layer.runs, box, cells, cells, view.kvLen));
  if (view.firstHoldsAll) for (let i = 0; i < cells * cells; i++) for (let l = 1; l < grids.length; l++) grids[0][i] = Math.max(0, grids[0][i] - grids[l][i]);
  const palette = view.layers.map((layer) => state.colours.kind[layer.kind]), area = ((box.q1 - box.q0) / cells) ** 2;
  let fullest = 0;
  for (let i = 0; i < cells * cells; i++) {
    let total = 0;
    for (const grid of grids) total += grid[i];
    fullest = Math.max(fullest, total);
  }
  const depth = Math.log(Math.max(Math.min(fullest, area), 1.0001));
  for (let i = 0; i < cells * cells; i++) {
    let total = 0, best = 0;
    for (let l = 0; l < grids.length; l++) {
      total += grids[l][i];
      if (grids[l][i] > grids[best][i]) best = l;
    }
    const strength = total > 0.01 ? 0.3 + 0.7 * Math.min(1, Math.max(0, Math.log(Math.max(total, 1)) / depth)) : 0;
    for (let c = 0; c < 3; c++) out[4 * i + c] = paper[c] + (palette[best][c] - paper[c]) * strength;
    out[4 * i + 3] = 255;
  }
  return result;
}

// The rows that the page holds, over what the overview knows of all.
function overlaySampled(view, box, cells, out) {
  const per = (box.q1 - box.q0) / cells;
  for (const layer of view.layers) {
    const grid = raster(layer.runs, box, cells, cells, view.kvLen), colour = state.colours.kind[layer.kind];
    for (let i = 0; i < cells; i++) {
      if (!isCovered(layer.runs, Math.floor(box.q0 + (i + 0.5) * per))) continue;
      for (let j = 0; j < cells; j++) {
        const at = 4 * (i * cells + j), shown = grid[i * cells + j] > 0.01 ? colour : state.colours.paper;
        for (let c = 0; c < 3; c++) out[at + c] = shown[c];
      }
    }
  }
}

function outside(view, box, scale, size) {
  // Beyond the shorter side of a mask that is not square.
  pen.fillStyle = state.colours.line;
  const right = (view.kvLen - box.kv0) * scale, bottom = (view.qLen - box.q0) * scale;
  if (right < size) pen.fillRect(Math.max(right, 0), 0, size, size);
  if (bottom < size) pen.fillRect(0, Math.max(bottom, 0), size, size);
}

function gridLines(view, box, scale, size) {
  const tiles = tilesOf(view);
  const block = tiles ? [tiles.blockQ, tiles.blockKv] : [];
  const ratio = size / Math.max(canvas.clientWidth, 1);
  const lines = (everyQ, everyKv, style) => {
    pen.strokeStyle = style;
    pen.lineWidth = 1;
    pen.beginPath();
    for (let q = Math.ceil(box.q0 / everyQ) * everyQ; q < box.q1; q += everyQ) { const y = Math.round((q - box.q0) * scale) + 0.5; pen.moveTo(0, y); pen.lineTo(size, y); }
    for (let kv = Math.ceil(box.kv0 / everyKv) * everyKv; kv < box.kv1; kv += everyKv) { const x = Math.round((kv - box.kv0) * scale) + 0.5; pen.moveTo(x, 0); pen.lineTo(x, size); }
    pen.stroke();
  };
  if (scale >= 9 * ratio) lines(1, 1, state.colours.line);
  if (block.length && Math.min(...block) * scale >= 10 * ratio) { pen.globalAlpha = 0.55; lines(block[0], block[1], state.colours.soft); pen.globalAlpha = 1; }
  if (state.over) {
    const [high, wide] = block.length && tokensPerPixel() < Math.max(...block) ? block : [Math.max(1, tokensPerPixel()), Math.max(1, tokensPerPixel())];
    const q = Math.floor(state.over.q / high) * high, kv = Math.floor(state.over.kv / wide) * wide;
    pen.strokeStyle = state.colours.ink;
    pen.lineWidth = 1.5 * ratio;
    pen.strokeRect((kv - box.kv0) * scale, (q - box.q0) * scale, Math.max(wide * scale, 3), Math.max(high * scale, 3));
  }
}

const tokensPerPixel = () => (state.box.q1 - state.box.q0) / Math.max(canvas.clientWidth, 1);

function axes(box) {
  for (const [id, from, to, side] of [["kv-axis", box.kv0, box.kv1, "left"], ["q-axis", box.q0, box.q1, "top"]]) {
    const rough = (to - from) / 5, power = 10 ** Math.floor(Math.log10(Math.max(rough, 1)));
    const every = Math.max(1, [1, 2, 5, 10].map((m) => m * power).find((m) => m >= rough) || 1);
    const marks = [];
    for (let at = Math.ceil(from / every) * every; at < to; at += every) marks.push(`<span style="${side}:${(100 * (at - from)) / (to - from)}%">${count(at)}</span>`);
    byId(id).innerHTML = marks.join("");
  }
}

// Tiles, and what is said of the place pointed at.

function tilesOf(view) {
  const steps = view.step === null ? view.layers.map((layer) => layer.step) : [view.step];
  for (const number of steps) {
    const tiles = data.steps[number].costs.tiles;
    if (tiles && view.layers.some((layer) => layer.step === number && layer.kind === "tiles") && inPlace(view, number)) return tiles;
  }
  return null;
}

// Whether the view has its tokens where that launch sees them.
const inPlace = (view, number) => view.step === number || !currentGroup().views.some((other) => other.step === number);

function tileAt(tiles, row, column) {
  if (!tiles.indices || typeof tiles.indices === "string" || row + 1 >= tiles.indptr.length) return -1;
  let low = tiles.indptr[row], high = tiles.indptr[row + 1];
  const end = high;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (tiles.indices[middle] < column) low = middle + 1;
    else high = middle;
  }
  return low < end && tiles.indices[low] === column ? low : -1;
}

function edgesWithin(view, q0, q1, kv0, kv1) {
  const found = view.layers.map((layer) => {
    let edges = 0;
    for (let q = q0; q < Math.min(q1, view.qLen); q++) edges += keysIn(layer.runs, q, kv0, kv1, view.kvLen);
    return edges;
  });
  if (view.firstHoldsAll) found[0] -= found.slice(1).reduce((a, b) => a + b, 0);
  return found;
}

const nanoseconds = (ns) => (ns >= 1e6 ? `${Number((ns / 1e6).toPrecision(3))} ms` : ns >= 1e3 ? `${Number((ns / 1e3).toPrecision(3))} µs` : `${Number(ns.toPrecision(3))} ns`);

function placeFacts(view, q, kv) {
  const tiles = tilesOf(view), per = Math.max(1, tokensPerPixel());
  const isTile = tiles && per < Math.max(tiles.blockQ, tiles.blockKv);
  const high = isTile ? tiles.blockQ : Math.max(1, Math.round(per)), wide = isTile ? tiles.blockKv : Math.max(1, Math.round(per));
  const q0 = Math.floor(q / high) * high, kv0 = Math.floor(kv / wide) * wide;
  const covered = view.layers.every((layer) => isCovered(layer.runs, q));
  const facts = [["query", count(q)], ["key", count(kv)]];
  const title = isTile ? `Tile ${count(q0 / high)}, ${count(kv0 / wide)}` : high > 1 ? `Cell of ${count(high)} × ${count(wide)} tokens` : `Query ${count(q)}, key ${count(kv)}`;
  if (!covered) return { title, facts: [...facts, ["edges", "this row is not in the page's sample"]], kind: null };
  const edges = high <= 4096 ? edgesWithin(view, q0, q0 + high, kv0, kv0 + wide) : null;
  const pair = edgesWithin(view, q, q + 1, kv, kv + 1), attending = pair.findIndex((n) => n > 0);
  facts.push(["attends", attending >= 0 ? "yes" : "no"]);
  let best = attending;
  if (edges) {
    const total = edges.reduce((a, b) => a + b, 0), area = (Math.min(q0 + high, view.qLen) - q0) * (Math.min(kv0 + wide, view.kvLen) - kv0);
    if (high > 1) facts.push([isTile ? "in the tile" : "in the cell", `${count(total)} edges, ${percent(total / area)} full`]);
    if (best < 0 && total) best = edges.indexOf(Math.max(...edges));
    facts.push(...costFacts(view, best, { isTile, tiles, row: q0 / high, column: kv0 / wide, total, area, q, edges }));
  }
  return { title, facts, kind: best >= 0 ? view.layers[best].kind : null };
}

function costFacts(view, best, at) {
  if (best < 0) return [["kernel", at.total === 0 ? "none: skipped, and costs nothing" : "none"]];
  const layer = view.layers[best], step = data.steps[layer.step], costs = step.costs;
  const told = [["kernel", `${step.title}: ${layer.kind}`]];
  if (step.config) told.push(["config", step.config]);
  if (layer.kind === "tiles" && at.isTile && inPlace(view, layer.step)) {
    const tile = tileAt(at.tiles, at.row, at.column), isFull = at.total === at.area;
    told.push(["tile", isFull ? "full: no mask is looked at" : "partial: by its bit pattern"]);
    const cost = tile >= 0 ? at.tiles.table[at.tiles.which[tile]] : isFull ? at.tiles.full : at.tiles.partial;
    if (cost !== null && cost !== undefined) told.push(["cost", `${nanoseconds(cost)} a head on one worker${tile >= 0 ? "" : ", on average"}`]);
  } else if (layer.kind === "tiles" && !inPlace(view, layer.step)) {
    told.push(["where", "in another order of tokens: choose “as run” above"]);
  } else if (layer.kind === "gathered columns") {
    told.push(["cost", `${nanoseconds(costs.column)} a gathered column of ${costs.blockQ} queries`]);
  } else if (layer.kind === "single edges" || layer.kind === "rows") {
    const keys = keysIn(layer.runs, at.q, 0, view.kvLen, view.kvLen);
    told.push(["this query", `${count(keys)} keys, about ${nanoseconds(keys * costs.edge)} a head on one worker`]);
  }
  return told;
}

function inspect(place) {
  state.over = place;
  const view = currentView();
  if (!place || place.q < 0 || place.kv < 0 || place.q >= view.qLen || place.kv >= view.kvLen || !view.loaded) { state.over = null; return; }
  const { title, facts, kind } = placeFacts(view, place.q, place.kv);
  const swatch = kind ? `<span class="swatch" style="background:var(${VARIABLE[kind]})"></span>` : "";
  byId("inspector").innerHTML = `<h4>${swatch}${title}</h4><dl>${facts.map(([name, value]) => `<dt>${name}</dt><dd>${value}</dd>`).join("")}</dl>`;
}

// Pointer, wheel, keys and buttons.

const placeOf = (event) => {
  const area = canvas.getBoundingClientRect(), box = state.box;
  return { q: Math.floor(box.q0 + ((event.clientY - area.top) / area.height) * (box.q1 - box.q0)), kv: Math.floor(box.kv0 + ((event.clientX - area.left) / area.width) * (box.kv1 - box.kv0)), x: (event.clientX - area.left) / area.width, y: (event.clientY - area.top) / area.height };
};

function zoomed(factor, x = 0.5, y = 0.5) {
  const box = state.box, view = currentView(), side = Math.max(view.qLen, view.kvLen);
  const size = Math.min(Math.max((box.q1 - box.q0) * factor, Math.min(8, side)), side);
  const q = box.q0 + y * (box.q1 - box.q0), kv = box.kv0 + x * (box.kv1 - box.kv0);
  show({ q0: q - y * size, q1: q + (1 - y) * size, kv0: kv - x * size, kv1: kv + (1 - x) * size });
}

const pointers = new Map();
let pinch = 0;
canvas.addEventListener("wheel", (event) => { event.preventDefault(); const { x, y } = placeOf(event); zoomed(Math.exp(event.deltaY * 0.0016), x, y); }, { passive: false });
canvas.addEventListener("pointerdown", (event) => { canvas.setPointerCapture(event.pointerId); pointers.set(event.pointerId, event); inspect(placeOf(event)); show(state.box); });
canvas.addEventListener("pointermove", (event) => {
  const before = pointers.get(event.pointerId), area = canvas.getBoundingClientRect(), size = state.box.q1 - state.box.q0;
  if (!before) { inspect(placeOf(event)); show(state.box); return; }
  pointers.set(event.pointerId, event);
  if (pointers.size === 2) {
    const [a, b] = [...pointers.values()], apart = Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY);
    if (pinch) zoomed(pinch / Math.max(apart, 1), ((a.clientX + b.clientX) / 2 - area.left) / area.width, ((a.clientY + b.clientY) / 2 - area.top) / area.height);
    pinch = apart;
    return;
  }
  const down = ((event.clientY - before.clientY) / area.height) * size, across = ((event.clientX - before.clientX) / area.width) * size;
  show({ q0: state.box.q0 - down, q1: state.box.q1 - down, kv0: state.box.kv0 - across, kv1: state.box.kv1 - across });
});
for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, (event) => { pointers.delete(event.pointerId); pinch = 0; });
canvas.addEventListener("pointerleave", () => { if (!pointers.size) { state.over = null; show(state.box); } });
canvas.addEventListener("dblclick", (event) => { const { x, y } = placeOf(event); zoomed(event.shiftKey ? 4 : 0.25, x, y); });
canvas.addEventListener("keydown", (event) => {
  const step = (state.box.q1 - state.box.q0) / 8, moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (moves) { event.preventDefault(); show({ q0: state.box.q0 + moves[0] * step, q1: state.box.q1 + moves[0] * step, kv0: state.box.kv0 + moves[1] * step, kv1: state.box.kv1 + moves[1] * step }); }
  else if (event.key === "+" || event.key === "=") zoomed(0.5);
  else if (event.key === "-") zoomed(2);
});
for (const button of document.querySelectorAll("[data-zoom]")) button.addEventListener("click", () => zoomed(button.dataset.zoom === "in" ? 0.4 : 2.5));
for (const button of document.querySelectorAll("[data-tokens]")) button.addEventListener("click", () => {
  const view = currentView(), tiles = tilesOf(view);
  const tokens = button.dataset.tokens === "tile" ? 6 * (tiles ? Math.max(tiles.blockQ, tiles.blockKv) : 64) : Number(button.dataset.tokens);
  if (!tokens) { show(wholeBox(view)); return; }
  const isWhole = state.box.q1 - state.box.q0 >= Math.max(view.qLen, view.kvLen);
  // From the whole there is no place in particular: half way down the diagonal is one.
  const q = isWhole ? landmark(view) : (state.box.q0 + state.box.q1) / 2, kv = isWhole ? q * (view.kvLen / view.qLen) : (state.box.kv0 + state.box.kv1) / 2;
  show({ q0: q - tokens / 2, q1: q + tokens / 2, kv0: kv - tokens / 2, kv1: kv + tokens / 2 });
});
byId("jump").addEventListener("submit", (event) => {
  event.preventDefault();
  const read = (id, most) => { const value = parseInt(byId(id).value.replace(/\D/g, ""), 10); return Number.isFinite(value) ? Math.min(value, most - 1) : null; };
  const view = currentView(), q = read("jump-q", view.qLen), kv = read("jump-kv", view.kvLen), size = Math.min(state.box.q1 - state.box.q0, 128);
  const at = { q: q ?? kv ?? 0, kv: kv ?? q ?? 0 };
  show({ q0: at.q - size / 2, q1: at.q + size / 2, kv0: at.kv - size / 2, kv1: at.kv + size / 2 });
  inspect({ q: Math.min(at.q, view.qLen - 1), kv: Math.min(at.kv, view.kvLen - 1) });
});

function landmark(view) {
  const runs = view.layers[0].runs, middle = Math.floor(view.qLen / 2);
  return runs.whole || !runs.first.length ? middle : runs.first[firstRunAt(runs, middle)] + 8;
}

// Choosing what is shown.

async function chooseView(number) {
  state.view = number;
  const view = await loadView(currentView());
  const total = view.nnz;
  const kinds = new Map();
  for (const layer of view.layers) kinds.set(`${layer.kind}|${layer.step}`, layer);
  byId("legend").innerHTML = [...kinds.values()].map((layer) => `<div><span class="swatch" style="background:var(${VARIABLE[layer.kind]})"></span>${layer.kind}, ${data.steps[layer.step].title}</div>`).join("");
  byId("honesty").textContent = `${count(total)} edges. ` + (view.isWhole ? "Every one of them is on this page: zoom in to see each. A deeper colour means that more pairs of a cell attend." : `The map counts them by cells of ${count(view.overview.block)} tokens; single edges are here for ${count(view.sampledRows)} rows, evenly spread. “edges” goes to some of them.`);
  show(wholeBox(view));
}

function chooseGroup(number) {
  state.group = number;
  const choice = byId("view");
  choice.innerHTML = currentGroup().views.map((view, i) => `<option value="${i}">${view.title}</option>`).join("");
  choice.parentElement.hidden = currentGroup().views.length < 2;
  drawCharts();
  return chooseView(0);
}
byId("view").addEventListener("change", (event) => chooseView(Number(event.target.value)));
byId("group")?.addEventListener("change", (event) => chooseGroup(Number(event.target.value)));

// Charts, by plotly, once they come into sight.

let plotlyReady = null;
function loadPlotly() {
  plotlyReady ||= inflated(byId("plotly").textContent).then((bytes) => {
    const script = document.createElement("script");
    script.textContent = new TextDecoder().decode(bytes);
    document.head.append(script);
  });
  return plotlyReady;
}

function chartLayout(more) {
  const style = getComputedStyle(document.documentElement), read = (name) => style.getPropertyValue(name).trim();
  const axis = { gridcolor: read("--line"), zerolinecolor: read("--line"), linecolor: read("--soft"), automargin: true };
  return { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: read("--soft"), size: 11.5, family: "system-ui, sans-serif" }, margin: { l: 48, r: 10, t: 10, b: 38 }, legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 11 } }, hoverlabel: { font: { size: 12 } }, ...more, xaxis: { ...axis, ...more.xaxis }, yaxis: { ...axis, ...more.yaxis } };
}

// A logarithmic axis over whole decades, one mark each.
function decades(least, values, unit) {
  const low = Math.floor(Math.log10(Math.max(Math.min(...values), least || 1e-30))), high = Math.ceil(Math.log10(Math.max(...values)) + 1e-9);
  const every = Math.ceil((high - low) / 6), at = [];
  for (let power = low; power <= high; power += every) at.push(power);
  const name = (power) => { const group = Math.min(Math.floor(power / 3), 5); return power < 0 ? `${10 ** power}` : `${10 ** (power - 3 * group)}${[" ", " k", " M", " G", " T", " P"][group]}`.trim() + unit; };
  return { range: [low, high], tickvals: at.map((power) => 10 ** power), ticktext: at.map(name), title: { text: "" } };
}

async function drawCharts() {
  await loadPlotly();
  const { degrees, locality, roofline } = currentGroup(), hex = state.colours.hex, options = { displayModeBar: false, responsive: true };
  const lines = Object.entries(degrees).map(([name, each], i) => ({ x: each.x.map((n) => Math.max(n, 0.5)), y: each.y, name, mode: each.x.length < 4 ? "lines+markers" : "lines", line: { shape: "vh", color: i ? hex.rows : hex.tiles, width: 2, dash: i ? "dot" : "solid" }, customdata: each.x, hovertemplate: "%{y:.2%} have %{customdata:,} or more<extra></extra>" }));
  Plotly.react("degrees", lines, chartLayout({ xaxis: { type: "log", ...decades(1, lines.flatMap((each) => each.x), ""), title: { text: "edges" } }, yaxis: { type: "log", tickformat: "~p" } }), options);
  Plotly.react("locality", [{ x: locality.x, y: locality.y, type: "bar", marker: { color: hex.tiles }, hovertemplate: "%{y:.2%} lie %{x} tokens away, or up to twice as far<extra></extra>" }], chartLayout({ xaxis: { type: "category", tickangle: 0, nticks: 8, title: { text: "tokens away, up to twice as far" } }, yaxis: { tickformat: ".0%" }, bargap: 0.15 }), options);
  byId("locality-rows").textContent = locality.isAll ? "" : `, from ${count(locality.rows)} rows evenly spread`;
  const ridge = roofline.flopsPerS / roofline.bytesPerS, xs = roofline.points.map((p) => p.x), low = Math.min(ridge, ...xs) / 4, high = Math.max(ridge, ...xs) * 4;
  const roof = [low, ridge, high], [chosen, ...others] = roofline.points;
  const dots = (points, name, colour, symbol) => ({ x: points.map((p) => p.x), y: points.map((p) => p.y), text: points.map((p) => p.name), name, mode: "markers", marker: { color: colour, size: symbol === "circle" ? 11 : 8, symbol }, hovertemplate: "%{text}<br>%{y:.3s}FLOP/s<extra></extra>" });
  Plotly.react("roofline", [{ x: roof, y: roof.map((x) => Math.min(roofline.flopsPerS, x * roofline.bytesPerS)), mode: "lines", name: "ceiling", line: { color: state.colours.ink, width: 2 }, hoverinfo: "skip" }, dots(others, "other candidates", state.colours.soft, "x-thin-open"), dots([chosen], "this plan", hex.tiles, "circle")], chartLayout({ xaxis: { type: "log", ...decades(0, [low, high], ""), title: { text: "useful operations a byte" } }, yaxis: { type: "log", ...decades(0, [roofline.flopsPerS * 2, ...roofline.points.map((p) => p.y / 2)], "FLOP/s") } }), options);
  if (data.history.length) {
    const h = data.history.filter((each) => each.us !== null);
    Plotly.react("history", [{ x: h.map((_, i) => i + 1), y: h.map((each) => each.us), text: h.map((each) => each.what), mode: "markers", marker: { color: h.map((each) => (each.isBest ? hex.rows : hex.tiles)), size: 7 }, hovertemplate: "%{text}<br>%{y:.4s} µs<extra></extra>" }], chartLayout({ xaxis: { title: { text: "measurement" } }, yaxis: { type: "log", ticksuffix: " µs" } }), options);
  }
}

// Source, highlighted when it is opened.

const TOKENS = /(?<c>\/\/[^\n]*|\/\*[\s\S]*?\*\/|(?<![\w"'])#(?!\s*(?:include|define|if|ifdef|ifndef|endif|else|elif|pragma|undef|error))[^\n]*)|(?<s>"""[\s\S]*?"""|"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')|(?<k>\b(?:alignas|and|as|assert|auto|bool|break|case|char|class|const|constexpr|continue|def|double|elif|else|enum|extern|float|for|from|if|import|in|inline|int|int32_t|int64_t|is|lambda|long|namespace|not|or|pass|raise|return|sizeof|static|struct|switch|template|typename|uint32_t|uint64_t|unsigned|using|void|while|with|yield|None|True|False|true|false|__global__|__device__|__shared__)\b|^\s*#\s*\w+)|(?<n>\b0x[0-9a-fA-F]+\b|\b\d[\d.]*(?:[eE][-+]?\d+)?[fu]?\b)/gm;
const escaped = (text) => text.replace(/[&<>]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[c]);

function highlighted(text) {
  let out = "", last = 0;
  for (const match of text.matchAll(TOKENS)) {
    const kind = Object.keys(match.groups).find((name) => match.groups[name] !== undefined);
    out += escaped(text.slice(last, match.index)) + `<span class="${kind}">${escaped(match[0])}</span>`;
    last = match.index + match[0].length;
  }
  return out + escaped(text.slice(last));
}

for (const frame of document.querySelectorAll("details[data-file]")) frame.addEventListener("toggle", async () => {
  const code = frame.querySelector("code");
  if (!frame.open || code.textContent) return;
  const files = JSON.parse(new TextDecoder().decode(await inflated(data.sources[frame.dataset.launch])));
  const text = files[frame.dataset.file];
  code.innerHTML = frame.dataset.file === "compiled by" || text.length > 400000 ? escaped(text) : highlighted(text);
});
byId("sources").hidden = !Object.keys(data.sources).length;

// Light and dark, and the size of the map.

function repaint() {
  colours();
  if (state.box) { draw(); drawCharts(); }
}
byId("theme").addEventListener("click", () => {
  const isDark = document.documentElement.dataset.theme === "dark" || (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
  document.documentElement.dataset.theme = isDark ? "light" : "dark";
  repaint();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
new ResizeObserver(() => {
  const side = Math.round(canvas.clientWidth * Math.min(devicePixelRatio || 1, 2));
  if (side && side !== canvas.width) { canvas.width = canvas.height = side; if (state.box) draw(); }
}).observe(canvas);

canvas.width = canvas.height = Math.max(1, Math.round(canvas.clientWidth * Math.min(devicePixelRatio || 1, 2)));
colours();
if (typeof DecompressionStream === "undefined") byId("inspector").innerHTML = '<p class="hint">This browser cannot unpack the page’s data (no DecompressionStream); a newer one draws the map and the charts.</p>';
else chooseGroup(0).then(() => { document.documentElement.dataset.ready = "true"; });
