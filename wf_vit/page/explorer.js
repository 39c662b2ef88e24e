"use strict";

/* Words: a patch p lies in row p / columns and column p % columns. A share is what
   part of all that a patch listens to comes from another patch; shares of a row sum
   to 1. A view is one layer and one head (or all heads fused) of one indicator. */

const $ = (id) => document.getElementById(id);
const block = (id) => $(`data-${id}`).textContent;

const meta = JSON.parse(block("meta"));
const [ROWS, COLUMNS] = meta.grid;
const PATCHES = ROWS * COLUMNS;
const FUSED = "all";
const TOP_COUNT = 5;
const DARKEST = 0.1; // of an even row: the low end of the colour scale

// --- Decoding (the counterpart of coding.py) --------------------------------------

function bytesOf(base64) {
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
}

async function unpack(id) {
  const inflate = new DecompressionStream("deflate");
  const stream = new Blob([bytesOf(block(id))]).stream().pipeThrough(inflate);
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** Joins the planes of low and of high bytes into 16-bit numbers. */
function joined(planes, Type) {
  const count = planes.length / 2;
  return Type.from({ length: count }, (_, k) => planes[k] | (planes[count + k] << 8));
}

const unpackInt16 = async (id) => joined(await unpack(id), Int16Array);

/** Interactions of one indicator, fused or per head, with their measured fields. */
class Stack {
  constructor(note, codes, scales, field) {
    Object.assign(this, { heads: note.heads, codes, field });
    this.steps = Float32Array.from(
      { length: note.levels + 1 },
      (_, code) => (code / note.levels) ** 2,
    );
    this.largest = Float32Array.from(scales, (root) => (root / 65535) ** 2);
  }

  share(slice, i, j) {
    const row = slice * PATCHES + i;
    return this.steps[this.codes[row * PATCHES + j]] * this.largest[row];
  }

  /** What patch p listens to ("to"), or how much each patch listens to it ("by"). */
  shares(slice, p, direction) {
    const one = direction === "to"
      ? (other) => this.share(slice, p, other)
      : (other) => this.share(slice, other, p);
    return Float32Array.from({ length: PATCHES }, (_, other) => one(other));
  }

  fieldOf(slice, p) {
    const plane = this.field.length / 7;
    const number = (k) => this.field[k * plane + slice * PATCHES + p];
    return {
      extents: [0, 1, 2, 3].map((k) => number(k) / meta.lengthSteps),
      arrow: [4, 5].map((k) => number(k) / meta.lengthSteps),
      area: number(6) / PATCHES,
    };
  }
}

const stacks = new Map(); // by "indicator-kind": a Stack, or null while it decodes

/** Returns a stack once it is decoded; until then starts that, and redraws after. */
function stackOf(kind) {
  const { indicator } = state;
  const id = `${indicator}-${kind}`;
  if (!stacks.has(id)) {
    stacks.set(id, null);
    const parts = [unpack(`${id}-codes`), unpack(`${id}-scales`), unpackInt16(`${id}-field`)];
    Promise.all(parts).then(([codes, scales, field]) => {
      const note = meta.indicators[indicator].stacks[kind];
      stacks.set(id, new Stack(note, codes, joined(scales, Uint16Array), field));
      requestDraw();
    });
  }
  return stacks.get(id);
}

// --- State, kept in the address so that a link restores it ------------------------

const FLAGS = ["impact", "field", "arrow", "arrows", "learned", "compare"];
const state = {
  indicator: 0,
  direction: "to",
  patch: Math.floor(ROWS / 2) * COLUMNS + Math.floor(COLUMNS / 2),
  held: false,
  other: null, // the patch under the pointer while another one is held
  flags: new Set(["impact", "field", "arrow", "learned"]),
  views: [
    { layer: Math.floor(meta.layers.length / 2), head: FUSED },
    { layer: meta.layers.length - 1, head: FUSED },
  ],
};

function toHash() {
  const { indicator, direction, patch, held, flags, views } = state;
  const entries = { indicator, direction, patch, held: Number(held), show: [...flags].join(".") };
  views.forEach(({ layer, head }, k) => {
    entries[`layer${k}`] = meta.layers[layer];
    entries[`head${k}`] = head;
  });
  return `#${new URLSearchParams(entries)}`;
}

/** Takes over what a link says, and ignores what this page does not have. */
function fromHash(hash) {
  const link = new URLSearchParams(hash.slice(1));
  const choice = (name, allowed, otherwise) =>
    link.has(name) && allowed.includes(link.get(name)) ? link.get(name) : otherwise;
  const upTo = (count) => Array.from({ length: count }, (_, k) => String(k));
  state.indicator = Number(choice("indicator", upTo(meta.indicators.length), state.indicator));
  state.direction = choice("direction", ["to", "by"], state.direction);
  state.patch = Number(choice("patch", upTo(PATCHES), state.patch));
  state.held = choice("held", ["0", "1"], "0") === "1";
  if (link.has("show")) {
    state.flags = new Set(link.get("show").split(".").filter((flag) => FLAGS.includes(flag)));
  }
  state.views.forEach((view, k) => {
    const layer = choice(`layer${k}`, meta.layers.map(String), meta.layers[view.layer]);
    view.layer = meta.layers.map(String).indexOf(String(layer));
    view.head = choice(`head${k}`, headChoices(), view.head);
  });
}

const headCount = () => meta.indicators[state.indicator].stacks.heads?.heads ?? 0;
const headChoices = () => [FUSED, ...Array.from({ length: headCount() }, (_, k) => String(k))];

let hashTimer;
function saveSoon() {
  clearTimeout(hashTimer);
  // Browsers refuse hundreds of changes of the address in a short time.
  hashTimer = setTimeout(() => history.replaceState(null, "", toHash()), 250);
}

// --- Words ------------------------------------------------------------------------

const percent = (share) => `${(100 * share).toFixed(2)} %`;
const nameOf = (p) => `(${Math.floor(p / COLUMNS)}, ${p % COLUMNS})`;
const viewName = ({ layer, head }) =>
  `layer ${meta.layers[layer]}, ${head === FUSED ? "all heads" : `head ${head}`}`;

function extentsText(extents, limit = Infinity) {
  const names = ["left", "up", "right", "down"];
  return extents
    .map((length, k) => `${length >= limit ? "≥ " : ""}${length.toFixed(1)} ${names[k]}`)
    .join(", ");
}

function strongest(shares) {
  const order = Array.from(shares.keys()).sort((a, b) => shares[b] - shares[a]);
  return order.slice(0, TOP_COUNT);
}

// --- Drawing ----------------------------------------------------------------------

const colors = bytesOf(meta.colors);

/** Position of a share on the logarithmic colour scale, 0 to 1. */
function level(share) {
  const { top } = meta.indicators[state.indicator];
  const place = Math.log(share * PATCHES / DARKEST) / Math.log(top / DARKEST);
  return Math.min(1, Math.max(0, place));
}

function paint(pixels, k, place) {
  const color = 3 * Math.round(255 * place);
  pixels.set([colors[color], colors[color + 1], colors[color + 2], 255], 4 * k);
}

function canvasOf(width, height) {
  return Object.assign(document.createElement("canvas"), { width, height });
}

const heat = canvasOf(COLUMNS, ROWS);
const heatContext = heat.getContext("2d");
const heatImage = heatContext.createImageData(COLUMNS, ROWS);

function drawHeat(context, shares, width, height) {
  shares.forEach((share, p) => paint(heatImage.data, p, level(share)));
  heatContext.putImageData(heatImage, 0, 0);
  context.globalAlpha = 0.66;
  context.imageSmoothingEnabled = false;
  context.drawImage(heat, 0, 0, width, height);
  context.globalAlpha = 1;
}

/** A pale gray copy of the picture, on which colours can be told apart. */
const backdrop = (() => {
  const picture = $("picture");
  const canvas = canvasOf(picture.naturalWidth || 1, picture.naturalHeight || 1);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  return {
    canvas,
    async make() {
      await picture.decode();
      canvas.width = picture.naturalWidth;
      canvas.height = picture.naturalHeight;
      context.drawImage(picture, 0, 0);
      const image = context.getImageData(0, 0, canvas.width, canvas.height);
      for (let k = 0; k < image.data.length; k += 4) {
        const [red, green, blue] = image.data.subarray(k, k + 3);
        image.data.fill(70 + (red + green + blue) / 4.5, k, k + 3);
      }
      context.putImageData(image, 0, 0);
    },
  };
})();

/** Strokes a path twice, so that it is seen on dark and on light. */
function stroke(context, color, width) {
  context.lineJoin = "round";
  context.strokeStyle = "rgb(0 0 0 / 0.75)";
  context.lineWidth = width + 2 * devicePixelRatio;
  context.stroke();
  context.strokeStyle = color;
  context.lineWidth = width;
  context.stroke();
}

function arrowPath(context, x, y, dx, dy, head) {
  const length = Math.hypot(dx, dy);
  if (length === 0) return;
  const [ux, uy] = [dx / length, dy / length];
  const [tipX, tipY, size] = [x + dx, y + dy, Math.min(head, length)];
  context.moveTo(x, y);
  context.lineTo(tipX, tipY);
  for (const side of [-1, 1]) {
    context.moveTo(tipX, tipY);
    context.lineTo(tipX - size * (ux - 0.6 * side * uy), tipY - size * (uy + 0.6 * side * ux));
  }
}

class Panel {
  constructor(view) {
    this.view = view;
    this.root = $("panel").content.firstElementChild.cloneNode(true);
    const find = (name) => this.root.querySelector(name);
    this.canvas = find(".grid");
    this.layer = find(".layer");
    this.layer.max = meta.layers.length - 1;
    this.layerName = find(".layer-name");
    this.head = find(".head");
    this.headLabel = find(".head-label");
    this.patch = find(".patch");
    this.measured = find(".measured");
    this.learned = find("p.learned");
    this.rows = find("tbody");
    for (let k = 0; k < TOP_COUNT; k++) {
      const row = this.rows.insertRow();
      for (let cell = 0; cell < 4; cell++) row.insertCell();
    }
    this.layer.addEventListener("input", () => {
      view.layer = Number(this.layer.value);
      changed();
    });
    this.head.addEventListener("change", () => {
      view.head = this.head.value;
      changed();
    });
    listen(this);
    new ResizeObserver(() => requestDraw()).observe(this.canvas);
  }

  stack() {
    return stackOf(this.view.head === FUSED ? "fused" : "heads");
  }

  /** Position of the view among the slices of its stack. */
  slice(stack) {
    return this.view.layer * stack.heads + (this.view.head === FUSED ? 0 : Number(this.view.head));
  }

  /** Device pixels of a patch's centre, and of a length in patches. */
  centre(p) {
    return [(p % COLUMNS + 0.5) * this.cell[0], (Math.floor(p / COLUMNS) + 0.5) * this.cell[1]];
  }

  draw() {
    const stack = this.stack();
    this.layer.value = this.view.layer;
    this.layer.setAttribute("aria-valuetext", `layer ${meta.layers[this.view.layer]}`);
    this.layerName.value = meta.layers[this.view.layer];
    const choices = headChoices();
    if (this.head.options.length !== choices.length) {
      this.head.replaceChildren(
        ...choices.map((head) => new Option(head === FUSED ? "all, fused" : head, head)),
      );
    }
    this.headLabel.hidden = choices.length === 1;
    this.head.value = this.view.head;
    if (!stack) {
      this.patch.textContent = "Unpacking …";
      return;
    }
    const slice = this.slice(stack);
    const to = stack.shares(slice, state.patch, "to");
    const by = stack.shares(slice, state.patch, "by");
    this.drawCanvas(stack, slice, state.direction === "to" ? to : by);
    this.write(stack.fieldOf(slice, state.patch), to, by);
  }

  drawCanvas(stack, slice, shares) {
    const { canvas } = this;
    const aspect = backdrop.canvas.height / backdrop.canvas.width;
    const width = Math.round(canvas.clientWidth * devicePixelRatio);
    const height = Math.round(width * aspect);
    if (canvas.width !== width || canvas.height !== height) {
      canvas.width = width;
      canvas.height = height;
    }
    this.cell = [width / COLUMNS, height / ROWS];
    const context = canvas.getContext("2d");
    // A picture of few pixels is clearer as pixels than as a blur.
    context.imageSmoothingEnabled = 4 * backdrop.canvas.width > canvas.clientWidth;
    const impact = state.flags.has("impact");
    context.drawImage(impact ? backdrop.canvas : $("picture"), 0, 0, width, height);
    if (impact) drawHeat(context, shares, width, height);
    if (state.flags.has("arrows")) this.drawArrows(context, stack, slice);
    if (state.flags.has("learned") && learned) this.drawLearned(context);
    const field = stack.fieldOf(slice, state.patch);
    if (state.flags.has("field")) this.drawBox(context, field.extents, "#ffffff", 2);
    if (state.flags.has("arrow")) {
      const [dx, dy] = [field.arrow[0] * this.cell[0], field.arrow[1] * this.cell[1]];
      context.beginPath();
      arrowPath(context, ...this.centre(state.patch), dx, dy, 10 * devicePixelRatio);
      stroke(context, "#ffffff", 2 * devicePixelRatio);
    }
    this.drawCell(context, state.patch, "#ffffff", state.held ? 3 : 2);
    if (state.other !== null) this.drawCell(context, state.other, "#ffc233", 2);
  }

  drawCell(context, p, color, width) {
    const [x, y] = this.centre(p);
    const [w, h] = this.cell;
    context.beginPath();
    context.rect(x - w / 2, y - h / 2, w, h);
    stroke(context, color, width * devicePixelRatio);
  }

  drawBox(context, [left, top, right, bottom], color, width) {
    const [x, y] = this.centre(state.patch);
    const [w, h] = this.cell;
    // Cut at the rim, so that no side of a wide field vanishes.
    const inset = width * devicePixelRatio;
    const low = [Math.max(x - left * w, inset), Math.max(y - top * h, inset)];
    const high = [
      Math.min(x + right * w, this.canvas.width - inset),
      Math.min(y + bottom * h, this.canvas.height - inset),
    ];
    context.beginPath();
    context.rect(...low, high[0] - low[0], high[1] - low[1]);
    stroke(context, color, width * devicePixelRatio);
  }

  drawArrows(context, stack, slice) {
    // Enough arrows to see a flow; more would only hide each other.
    const stride = Math.ceil(Math.max(ROWS, COLUMNS) / 20);
    const start = Math.floor(stride / 2);
    const arrows = [];
    for (let row = start; row < ROWS; row += stride) {
      for (let column = start; column < COLUMNS; column += stride) {
        const p = row * COLUMNS + column;
        arrows.push([p, stack.fieldOf(slice, p).arrow]);
      }
    }
    const longest = Math.max(...arrows.map(([, [dx, dy]]) => Math.hypot(dx, dy)), 1e-6);
    const shrink = Math.min(1, (1.5 * stride) / longest);
    context.beginPath();
    for (const [p, [dx, dy]] of arrows) {
      const [x, y] = [dx * shrink * this.cell[0], dy * shrink * this.cell[1]];
      arrowPath(context, ...this.centre(p), x, y, 4 * devicePixelRatio);
    }
    stroke(context, "#ffffff", devicePixelRatio);
  }

  learnedExtents() {
    const heads = meta.learnedHeads;
    const chosen = this.view.head === FUSED ? [...Array(heads).keys()] : [Number(this.view.head)];
    return chosen.filter((head) => head < heads).map((head) => {
      const start = 4 * ((this.view.layer * heads + head) * PATCHES + state.patch);
      return [...learned.subarray(start, start + 4)].map((steps) => steps / meta.lengthSteps);
    });
  }

  drawLearned(context) {
    context.setLineDash([6 * devicePixelRatio, 3 * devicePixelRatio]);
    for (const extents of this.learnedExtents()) this.drawBox(context, extents, "#ffc233", 2);
    context.setLineDash([]);
  }

  write(field, to, by) {
    const { patch } = state;
    this.patch.textContent = `Patch ${nameOf(patch)}, ${viewName(this.view)}`;
    this.canvas.setAttribute("aria-label", `${viewName(this.view)}, patch ${nameOf(patch)}`);
    const [dx, dy] = field.arrow;
    this.measured.textContent =
      `Field of ${Math.round(100 * meta.mass)} %: ${extentsText(field.extents)}; area ${percent(field.area)} of the grid; ` +
      `arrow ${Math.abs(dx).toFixed(2)} ${dx < 0 ? "left" : "right"}, ` +
      `${Math.abs(dy).toFixed(2)} ${dy < 0 ? "up" : "down"}.`;
    const learnedFields = learned ? this.learnedExtents() : [];
    this.learned.hidden = learnedFields.length === 0;
    this.learned.textContent = learnedFields.length === 1
      ? `Learned: ${extentsText(learnedFields[0], Math.max(ROWS, COLUMNS))}.`
      : `Learned: ${learnedFields.length} boxes, one a head; choose a head for its numbers.`;
    const [listens, heard] = [strongest(to), strongest(by)];
    [...this.rows.rows].forEach((row, k) => {
      row.hidden = k >= PATCHES;
      if (row.hidden) return;
      const words = [
        nameOf(listens[k]), percent(to[listens[k]]), nameOf(heard[k]), percent(by[heard[k]]),
      ];
      words.forEach((word, cell) => { row.cells[cell].textContent = word; });
    });
    this.summary =
      `Patch row ${Math.floor(patch / COLUMNS)}, column ${patch % COLUMNS}, ` +
      `${viewName(this.view)}. Listens most to ${nameOf(listens[0])}, ` +
      `${percent(to[listens[0]])}; is heard most by ${nameOf(heard[0])}, ` +
      `${percent(by[heard[0]])}. Area ${percent(field.area)}.`;
  }
}

// --- One frame --------------------------------------------------------------------

let learned = null;
let frame = 0;
let speakTimer;

function requestDraw() {
  frame ||= requestAnimationFrame(() => {
    frame = 0;
    drawAll();
  });
}

function drawAll() {
  const two = state.flags.has("compare");
  $("panels").classList.toggle("two", two);
  panels[1].root.hidden = !two;
  $("scale").hidden = !state.flags.has("impact");
  for (const panel of two ? panels : panels.slice(0, 1)) panel.draw();
  writePair();
  // Speech that a newer patch would interrupt is not worth starting.
  clearTimeout(speakTimer);
  speakTimer = setTimeout(() => {
    $("status").textContent = state.other === null ? panels[0].summary : $("pair").textContent;
  }, 400);
}

/** What the held patch and the one under the pointer give each other. */
function writePair() {
  const { held, patch, other } = state;
  const stack = panels[0].stack();
  if (!held) {
    $("pair").textContent = "Click or press Enter to hold a patch.";
  } else if (other === null || !stack) {
    $("pair").textContent = `Holding ${nameOf(patch)}: move on to see what the two give each other.`;
  } else {
    const slice = panels[0].slice(stack);
    const [to, by] = [stack.share(slice, patch, other), stack.share(slice, other, patch)];
    $("pair").textContent =
      `${nameOf(patch)} listens to ${nameOf(other)}: ${percent(to)}; ` +
      `${nameOf(other)} listens to ${nameOf(patch)}: ${percent(by)}.`;
  }
}

function changed() {
  for (const view of state.views) {
    if (!headChoices().includes(view.head)) view.head = FUSED;
  }
  saveSoon();
  requestDraw();
}

// --- Input ------------------------------------------------------------------------

/** Moves to a patch: the shown one, or the second one while the first is held. */
function moveTo(p) {
  const target = state.held ? "other" : "patch";
  if (state[target] === p) return;
  state[target] = p;
  changed();
}

function hold(p) {
  state.held = !state.held || p !== state.patch;
  state.patch = p;
  state.other = null;
  changed();
}

function patchAt(canvas, event) {
  const { width, height } = canvas.getBoundingClientRect();
  const within = (offset, size, count) =>
    Math.min(count - 1, Math.max(0, Math.floor((offset / size) * count)));
  return within(event.offsetY, height, ROWS) * COLUMNS + within(event.offsetX, width, COLUMNS);
}

function step(p, key) {
  const [row, column] = [Math.floor(p / COLUMNS), p % COLUMNS];
  const places = {
    ArrowLeft: [row, column - 1],
    ArrowRight: [row, column + 1],
    ArrowUp: [row - 1, column],
    ArrowDown: [row + 1, column],
    Home: [row, 0],
    End: [row, COLUMNS - 1],
  };
  if (!(key in places)) return null;
  const [y, x] = places[key];
  return Math.min(ROWS - 1, Math.max(0, y)) * COLUMNS + Math.min(COLUMNS - 1, Math.max(0, x));
}

function listen(panel) {
  const { canvas, view } = panel;
  canvas.addEventListener("pointermove", (event) => {
    // A finger that moves scrolls the page; it chooses by a tap.
    if (event.pointerType !== "touch") moveTo(patchAt(canvas, event));
  });
  canvas.addEventListener("pointerleave", () => {
    state.other = null;
    requestDraw();
  });
  canvas.addEventListener("click", (event) => hold(patchAt(canvas, event)));
  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const here = state.held ? state.other ?? state.patch : state.patch;
    const next = step(here, event.key);
    const turn = (value, by, count) => (value + by + count) % count;
    const heads = headChoices();
    const actions = {
      Enter: () => hold(here),
      " ": () => hold(here),
      Escape: () => { state.held = false; state.other = null; },
      "[": () => { view.layer = Math.max(0, view.layer - 1); },
      "]": () => { view.layer = Math.min(meta.layers.length - 1, view.layer + 1); },
      h: () => { view.head = heads[turn(heads.indexOf(view.head), 1, heads.length)]; },
      d: () => { state.direction = state.direction === "to" ? "by" : "to"; showControls(); },
    };
    const action = next === null ? actions[event.key] : () => moveTo(next);
    if (!action) return;
    event.preventDefault();
    action();
    changed();
  });
}

function showControls() {
  $("indicator").value = state.indicator;
  document.querySelector(`[name=direction][value=${state.direction}]`).checked = true;
  for (const flag of FLAGS) $(flag).checked = state.flags.has(flag);
  showScale();
}

function showScale() {
  const { top } = meta.indicators[state.indicator];
  const one = Math.log(1 / DARKEST) / Math.log(top / DARKEST);
  $("scale").style.gridTemplateColumns = `${one}fr ${1 - one}fr auto`;
  $("scale-low").textContent = `≤ ${DARKEST}`;
  $("scale-one").textContent = "1";
  $("scale-high").textContent = `≥ ${top}`;
  $("scale").setAttribute("aria-label", `Colour scale from ${DARKEST} to ${top} times an even row`);
}

function listenToControls() {
  $("indicator").addEventListener("change", (event) => {
    state.indicator = Number(event.target.value);
    showScale();
    changed();
  });
  for (const radio of document.getElementsByName("direction")) {
    radio.addEventListener("change", () => {
      state.direction = radio.value;
      changed();
    });
  }
  for (const flag of FLAGS) {
    $(flag).addEventListener("change", (event) => {
      state.flags[event.target.checked ? "add" : "delete"](flag);
      changed();
    });
  }
  $("copy").addEventListener("click", copyLink);
  addEventListener("hashchange", () => {
    fromHash(location.hash);
    showControls();
    requestDraw();
  });
}

async function copyLink() {
  history.replaceState(null, "", toHash());
  $("link").value = location.href;
  try {
    await navigator.clipboard.writeText(location.href);
    $("copy").textContent = "Link copied";
  } catch {
    // Not allowed here: show the link instead, ready to be copied.
    $("link").select();
    $("copy").textContent = "Copy it from here:";
  }
}

// --- What the page holds, in words ------------------------------------------------

function describe() {
  $("model").textContent = [
    meta.model, `${ROWS} × ${COLUMNS} patches`, layerText(), ...meta.indicators.map(headsText),
  ].filter(Boolean).join(" · ");
  $("meaning").textContent =
    "A percentage is the share of all that a patch listens to, over patches only. " +
    `The field is the box around the patch that holds ${Math.round(100 * meta.mass)} % of ` +
    "its rows and of its columns; its area counts the fewest patches that hold as much; " +
    "the arrow runs to the centroid. Positions are " +
    "(row, column), counted from 0 at the upper left; lengths are in patches.";
  $("storage").textContent = meta.indicators.map(storageText).join(" ");
}

function layerText() {
  const { layers, allLayers } = meta;
  return layers.length === allLayers
    ? `all ${allLayers} layers`
    : `${layers.length} of ${allLayers} layers (${layers.join(", ")}): more did not fit`;
}

function headsText({ name, omittedHeads }) {
  return omittedHeads ? `“${name}” without its ${omittedHeads} heads: they did not fit` : "";
}

function storageText({ name, stacks: held }) {
  const parts = Object.entries(held).map(([kind, { levels, errorBound, misplaced }]) =>
    `${kind === "fused" ? "fused over heads" : "each head"} in ${levels} steps (error at most ` +
    `${(100 * errorBound).toFixed(1)} % of the row's largest; ${percent(misplaced)} of the ` +
    "impact misplaced on average)");
  return `“${name}” is stored ${parts.join(", ")}.`;
}

// --- Start ------------------------------------------------------------------------

const panels = state.views.map((view) => new Panel(view));

async function start() {
  $("panels").append(...panels.map((panel) => panel.root));
  $("indicator").append(...meta.indicators.map(({ name }, k) => new Option(name, k)));
  $("indicator-label").hidden = meta.indicators.length === 1;
  $("learned-label").hidden = !("learnedHeads" in meta);
  const ramp = $("ramp").getContext("2d");
  const image = ramp.createImageData(256, 1);
  for (let k = 0; k < 256; k++) paint(image.data, k, k / 255);
  ramp.putImageData(image, 0, 0);
  fromHash(location.hash);
  describe();
  showControls();
  listenToControls();
  await backdrop.make();
  if ("learnedHeads" in meta) learned = await unpackInt16("learned");
  requestDraw();
}

start();
