"use strict";

/* Words: a token is a patch p, in row p / columns and column p % columns, or, after all
   patches, a prefix token (CLS, registers). A share is what part of all that a token
   takes from patches comes from one of them; shares of a row sum to 1. A view is one
   layer and one head (or all heads fused) of one indicator. The last indicator of the
   menu may be the effect on a class, which is signed. */

const $ = (id) => document.getElementById(id);
const block = (id) => $(`data-${id}`).textContent;

const meta = JSON.parse(block("meta"));
const [ROWS, COLUMNS] = meta.grid;
const PATCHES = ROWS * COLUMNS;
const TOKENS = PATCHES + meta.prefix.length;
const FUSED = "all";
const TOP_COUNT = 5;
// Okabe and Ito's colours, without black; more heads repeat them.
const HEAD_COLORS = ["#56b4e9", "#e69f00", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7"];

// --- Decoding (the counterpart of coding.py and build.py) -------------------------

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
const unpackUint16 = async (id) => joined(await unpack(id), Uint16Array);

const squares = (levels) =>
  Float32Array.from({ length: levels + 1 }, (_, code) => (code / levels) ** 2);
const squaredRoots = (scales) => Float32Array.from(scales, (root) => (root / 65535) ** 2);

/** Interactions of one indicator, fused or per head, with their measured fields. */
class Stack {
  constructor(note, codes, scales, given, field, mask) {
    Object.assign(this, { heads: note.heads, codes, given, field, mask });
    this.steps = squares(note.levels);
    this.largest = squaredRoots(scales);
  }

  share(slice, i, j) {
    const row = slice * TOKENS + i;
    return this.steps[this.codes[row * PATCHES + j]] * this.largest[row];
  }

  /** The share of all that token i takes from prefix token t. */
  givenBy(slice, i, t) {
    return this.given[(slice * TOKENS + i) * meta.prefix.length + t] / 65535;
  }

  /** What a token listens to ("to"), or how much each patch listens to it ("by"). */
  shares(slice, token, direction) {
    let one;
    if (direction === "to") one = (other) => this.share(slice, token, other);
    else if (token < PATCHES) one = (other) => this.share(slice, other, token);
    else one = (other) => this.givenBy(slice, other, token - PATCHES);
    return Float32Array.from({ length: PATCHES }, (_, other) => one(other));
  }

  /** The field of a patch; the prefix tokens have none. */
  fieldOf(slice, p) {
    const plane = this.field.length / 3;
    const number = (k) => this.field[k * plane + slice * PATCHES + p];
    return {
      arrow: [0, 1].map((k) => number(k) / meta.arrowSteps),
      count: number(2),
      area: number(2) / PATCHES,
    };
  }

  /** The patches of the field, from the bits of its row, the highest first. */
  maskOf(slice, p) {
    const start = (slice * PATCHES + p) * Math.ceil(PATCHES / 8);
    const isIn = (other) => (this.mask[start + (other >> 3)] >> (7 - (other & 7))) & 1;
    return new Set(Array.from({ length: PATCHES }, (_, other) => other).filter(isIn));
  }
}

/** Signed effects of the interactions on the logit of a class. */
class Effects {
  constructor(note, codes, scales, maps) {
    Object.assign(this, { heads: 1, note, codes, maps });
    this.steps = squares(note.levels);
    this.largest = squaredRoots(scales).map((share) => share * note.largest);
  }

  effect(slice, i, j) {
    const row = slice * TOKENS + i;
    const code = this.codes[row * PATCHES + j];
    return (code & 128 ? -1 : 1) * this.steps[code & 127] * this.largest[row];
  }

  shares(slice, token, direction) {
    if (direction === "map") {
      const layer = state.flags.has("bylayer") ? slice : meta.layers.length;
      const unit = this.note.mapLargest / 32767;
      return Float32Array.from({ length: PATCHES }, (_, p) => this.maps[layer * PATCHES + p] * unit);
    }
    const one = direction === "to"
      ? (other) => this.effect(slice, token, other)
      : (other) => (token < PATCHES ? this.effect(slice, other, token) : 0);
    return Float32Array.from({ length: PATCHES }, (_, other) => one(other));
  }
}

const noteOf = () => meta.indicators[state.indicator];
const isSigned = () => "className" in noteOf();

const stacks = new Map(); // by "indicator-kind": a Stack, or null while it decodes

/** Returns a stack once it is decoded; until then starts that, and redraws after. */
function stackOf(kind) {
  const { indicator } = state;
  const note = meta.indicators[indicator];
  const id = "className" in note ? "class" : `${indicator}-${kind}`;
  if (!stacks.has(id)) {
    stacks.set(id, null);
    const parts = id === "class"
      ? [unpack("class-codes"), unpackUint16("class-scales"), unpackInt16("class-maps")]
      : [
        unpack(`${id}-codes`), unpackUint16(`${id}-scales`),
        unpackUint16(`${id}-given`), unpackInt16(`${id}-field`), unpack(`${id}-mask`),
      ];
    Promise.all(parts).then((arrays) => {
      stacks.set(id, id === "class"
        ? new Effects(note, ...arrays)
        : new Stack(note.stacks[kind], ...arrays));
      requestDraw();
    });
  }
  return stacks.get(id);
}

// --- State, kept in the address so that a link restores it ------------------------

const FLAGS = [
  "impact", "field", "arrow", "arrows", "learned", "colors", "overview", "bylayer", "compare",
];
const DIRECTIONS = ["to", "by", "map"];
const state = {
  indicator: 0,
  direction: "to",
  patch: Math.floor(ROWS / 2) * COLUMNS + Math.floor(COLUMNS / 2), // a token
  held: false,
  other: null, // the patch under the pointer while another token is held
  original: false, // while the key is held: the picture alone
  opacity: 85,
  flags: new Set(["impact", "field", "arrow", "learned"]),
  views: [
    { layer: Math.floor(meta.layers.length / 2), head: FUSED },
    { layer: meta.layers.length - 1, head: FUSED },
  ],
};

function toHash() {
  const { indicator, direction, patch, held, opacity, flags, views } = state;
  const entries = {
    indicator, direction, patch, held: Number(held), opacity, show: [...flags].join("."),
  };
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
  state.direction = choice("direction", DIRECTIONS, state.direction);
  state.patch = Number(choice("patch", upTo(TOKENS), state.patch));
  state.held = choice("held", ["0", "1"], "0") === "1";
  state.opacity = Number(choice("opacity", upTo(101), state.opacity));
  if (link.has("show")) {
    state.flags = new Set(link.get("show").split(".").filter((flag) => FLAGS.includes(flag)));
  }
  state.views.forEach((view, k) => {
    const layer = choice(`layer${k}`, meta.layers.map(String), meta.layers[view.layer]);
    view.layer = meta.layers.map(String).indexOf(String(layer));
    view.head = choice(`head${k}`, headChoices(), view.head);
  });
  settle();
}

/** Puts right what the indicator does not have. */
function settle() {
  if (!isSigned() && state.direction === "map") state.direction = "to";
  for (const view of state.views) {
    if (!headChoices().includes(view.head)) view.head = FUSED;
  }
}

const headCount = () => noteOf().stacks.heads?.heads ?? 0;
const headChoices = () => [FUSED, ...Array.from({ length: headCount() }, (_, k) => String(k))];

let hashTimer;
function saveSoon() {
  clearTimeout(hashTimer);
  // Browsers refuse hundreds of changes of the address in a short time.
  hashTimer = setTimeout(() => history.replaceState(null, "", toHash()), 250);
}

// --- Words ------------------------------------------------------------------------

const percent = (share) => `${(100 * share).toFixed(2)} %`;
const place = (p) => `(${Math.floor(p / COLUMNS)}, ${p % COLUMNS})`;
const nameOf = (token) => (token < PATCHES ? place(token) : meta.prefix[token - PATCHES]);
const titleOf = (token) => (token < PATCHES ? `Patch ${place(token)}` : nameOf(token));
const viewName = ({ layer, head }) =>
  `layer ${meta.layers[layer]}, ${head === FUSED ? "all heads" : `head ${head}`}`;
const signedWords = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toPrecision(2)}`;

function learnedText({centre: [x, y], radii: [across, down]}) {
  const limit = Math.max(ROWS, COLUMNS);
  const radius = (length) => (length >= limit ? `over ${limit}` : length.toFixed(1));
  return (
    `centre ${Math.abs(x).toFixed(1)} ${x < 0 ? "left" : "right"}, ` +
    `${Math.abs(y).toFixed(1)} ${y < 0 ? "up" : "down"}; ` +
    `radius ${radius(across)} across, ${radius(down)} down`
  );
}

function strongest(values) {
  const order = Array.from(values.keys());
  order.sort((a, b) => Math.abs(values[b]) - Math.abs(values[a]));
  return order.slice(0, TOP_COUNT);
}

// --- Drawing ----------------------------------------------------------------------

const tables = {
  amounts: bytesOf(meta.colors.amounts),
  signed: bytesOf(meta.colors.signed),
};

/** Where values lie on the colour scale: amounts over their mean, or signed ones. */
function scaleOf(direction) {
  if (isSigned()) {
    const { top, mapTop, layerTop } = noteOf();
    const limits = { map: state.flags.has("bylayer") ? layerTop : mapTop };
    const limit = limits[direction] ?? top;
    return { table: tables.signed, low: -limit, top: limit };
  }
  return { table: tables.amounts, low: 1, top: noteOf().top };
}

/** Returns the place of each value on the scale, 0 to 1. */
function placesOf(values, direction, own) {
  const { low, top } = scaleOf(direction);
  const clip = (x) => Math.min(1, Math.max(0, x));
  if (isSigned()) return values.map((value) => clip((value - low) / (top - low)));
  let sum = 0;
  for (const value of values) sum += value;
  // What others hear is measured against the mean of the others.
  const mean = direction === "to" ? 1 / PATCHES
    : (sum - (values[own] ?? 0)) / (PATCHES - (own < PATCHES ? 1 : 0)) || 1;
  return values.map((value) => clip(Math.log(value / mean) / Math.log(top)));
}

function canvasOf(width, height) {
  return Object.assign(document.createElement("canvas"), { width, height });
}

const heat = canvasOf(COLUMNS, ROWS);
const heatContext = heat.getContext("2d");
const heatImage = heatContext.createImageData(COLUMNS, ROWS);

/** Fills the small canvas with one colour for each patch. */
function fillHeat(colorOf) {
  const opacity = state.opacity / 85; // The table's own largest opacity is 85 %.
  for (let p = 0; p < PATCHES; p++) {
    const [red, green, blue, alpha] = colorOf(p);
    heatImage.data.set([red, green, blue, Math.min(255, alpha * opacity)], 4 * p);
  }
  heatContext.putImageData(heatImage, 0, 0);
}

function drawHeat(context, places, table, x, y, width, height) {
  fillHeat((p) => {
    const color = 4 * Math.round(255 * places[p]);
    return table.subarray(color, color + 4);
  });
  context.imageSmoothingEnabled = false;
  context.drawImage(heat, x, y, width, height);
}

const rgbOf = (hex) => [1, 3, 5].map((k) => parseInt(hex.slice(k, k + 2), 16));
const headColor = (head) => HEAD_COLORS[head % HEAD_COLORS.length];

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

/** By what to draw arrows; those below 1e-3 patches may be rounding, and stay short. */
function arrowFactor(arrows, stride) {
  const longest = Math.max(...arrows.map(([dx, dy]) => Math.hypot(dx, dy)), 1e-3);
  return (1.5 * stride) / longest;
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
    this.absent = find(".absent");
    this.head = find(".head");
    this.headLabel = find(".head-label");
    this.patch = find(".patch");
    this.measured = find(".measured");
    this.given = find(".given");
    this.learned = find("p.learned");
    this.table = find("table");
    this.rows = find("tbody");
    this.overview = find(".overview");
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
    this.overview.addEventListener("click", (event) => this.chooseView(event));
    listen(this);
    new ResizeObserver(() => requestDraw()).observe(this.root);
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
    const gone = meta.allLayers.filter((layer) => !meta.layers.includes(layer));
    this.absent.hidden = gone.length === 0;
    this.absent.textContent = `Layers ${gone.join(", ")} are not in this page: they did not fit.`;
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
    const shown = { to, by, map: state.direction === "map" && stack.shares(slice, 0, "map") };
    this.drawCanvas(stack, slice, shown[state.direction], to);
    this.write(stack, slice, to, by);
    const overview = state.flags.has("overview");
    this.overview.hidden = !overview;
    this.table.hidden = overview;
    if (overview) this.drawOverview();
  }

  fitCanvas() {
    const { canvas } = this;
    const aspect = picture.naturalHeight / picture.naturalWidth;
    canvas.style.setProperty("--aspect", 1 / aspect);
    const width = Math.round(canvas.clientWidth * devicePixelRatio);
    const height = Math.round(width * aspect);
    if (canvas.width !== width || canvas.height !== height) {
      canvas.width = width;
      canvas.height = height;
    }
    this.cell = [width / COLUMNS, height / ROWS];
    return canvas.getContext("2d");
  }

  drawCanvas(stack, slice, values, to) {
    const context = this.fitCanvas();
    const { width, height } = this.canvas;
    // A picture of few pixels is clearer as pixels than as a blur.
    context.imageSmoothingEnabled = 4 * picture.naturalWidth > this.canvas.clientWidth;
    context.drawImage(picture, 0, 0, width, height);
    if (state.original) return;
    const isPatch = state.patch < PATCHES;
    if (state.flags.has("impact")) {
      if (colorsShown()) this.drawColors(context);
      else {
        const places = placesOf(values, state.direction, state.patch);
        drawHeat(context, places, scaleOf(state.direction).table, 0, 0, width, height);
      }
    }
    if (!isSigned() && state.flags.has("arrows")) this.drawArrows(context, stack, slice);
    if (isPatch && state.flags.has("learned") && learned) this.drawLearned(context);
    if (!isSigned() && isPatch) {
      const field = stack.fieldOf(slice, state.patch);
      if (state.flags.has("field")) this.drawMask(context, stack.maskOf(slice, state.patch));
      if (state.flags.has("arrow")) {
        const [dx, dy] = [field.arrow[0] * this.cell[0], field.arrow[1] * this.cell[1]];
        context.beginPath();
        arrowPath(context, ...this.centre(state.patch), dx, dy, 10 * devicePixelRatio);
        stroke(context, "#ffffff", 2 * devicePixelRatio);
      }
    }
    if (isPatch) this.drawCell(context, state.patch, "#ffffff", state.held ? 3 : 2);
    if (state.other !== null) this.drawCell(context, state.other, "#ffc233", 2);
  }

  /** Each patch in the colour of the head that takes or gives the most. */
  drawColors(context) {
    const stack = stackOf("heads");
    if (!stack) return;
    const all = Array.from({ length: stack.heads }, (_, head) => {
      const shares = stack.shares(this.view.layer * stack.heads + head, state.patch, state.direction);
      return placesOf(shares, state.direction, state.patch);
    });
    fillHeat((p) => {
      let best = 0;
      for (let head = 1; head < all.length; head++) if (all[head][p] > all[best][p]) best = head;
      return [...rgbOf(headColor(best)), 217 * Math.min(1, 1.4 * all[best][p])];
    });
    context.imageSmoothingEnabled = false;
    context.drawImage(heat, 0, 0, this.canvas.width, this.canvas.height);
  }

  drawMask(context, mask) {
    const [w, h] = this.cell;
    context.beginPath();
    for (const p of mask) {
      const [row, column] = [Math.floor(p / COLUMNS), p % COLUMNS];
      const [x, y] = [column * w, row * h];
      const line = (inside, x0, y0, x1, y1) => {
        if (inside) return;
        context.moveTo(x0, y0);
        context.lineTo(x1, y1);
      };
      line(row > 0 && mask.has(p - COLUMNS), x, y, x + w, y);
      line(row < ROWS - 1 && mask.has(p + COLUMNS), x, y + h, x + w, y + h);
      line(column > 0 && mask.has(p - 1), x, y, x, y + h);
      line(column < COLUMNS - 1 && mask.has(p + 1), x + w, y, x + w, y + h);
    }
    stroke(context, "#ffffff", 1.5 * devicePixelRatio);
  }

  drawCell(context, p, color, width) {
    const [x, y] = this.centre(p);
    const [w, h] = this.cell;
    context.beginPath();
    context.rect(x - w / 2, y - h / 2, w, h);
    stroke(context, color, width * devicePixelRatio);
  }

  drawLearnedField(context, {centre, radii}) {
    const at = this.centre(state.patch);
    const [dx, dy] = centre.map((length, axis) => length * this.cell[axis]);
    const size = [this.canvas.width, this.canvas.height];
    const inset = 2 * devicePixelRatio;
    context.beginPath();
    for (let step = 0; step <= 96; step++) {
      const angle = (2 * Math.PI * step) / 96;
      const round = [Math.cos(angle), Math.sin(angle)];
      // Cut at the rim, so that no side of a wide field vanishes.
      const point = size.map((length, axis) => {
        const free = at[axis] + (centre[axis] + radii[axis] * round[axis]) * this.cell[axis];
        return Math.min(Math.max(free, inset), length - inset);
      });
      context.lineTo(...point);
    }
    stroke(context, "#ffc233", inset);
    context.setLineDash([]);
    context.beginPath();
    arrowPath(context, ...at, dx, dy, 8 * devicePixelRatio);
    stroke(context, "#ffc233", inset);
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
    const factor = arrowFactor(arrows.map(([, arrow]) => arrow), stride);
    context.beginPath();
    for (const [p, [dx, dy]] of arrows) {
      const [x, y] = [dx * factor * this.cell[0], dy * factor * this.cell[1]];
      arrowPath(context, ...this.centre(p), x, y, 4 * devicePixelRatio);
    }
    stroke(context, "#ffffff", devicePixelRatio);
  }

  learnedFields() {
    const heads = meta.learnedHeads;
    const chosen = this.view.head === FUSED ? [...Array(heads).keys()] : [Number(this.view.head)];
    return chosen.filter((head) => head < heads).map((head) => {
      const start = 4 * ((this.view.layer * heads + head) * PATCHES + state.patch);
      const [x, y, sx, sy] = learned.subarray(start, start + 4);
      const scale = 1 / meta.lengthSteps;
      const half = Math.sqrt(2 * Math.log(2)) * scale;
      return {centre: [x * scale, y * scale], radii: [sx * half, sy * half]};
    });
  }

  drawLearned(context) {
    for (const field of this.learnedFields()) {
      context.setLineDash([6 * devicePixelRatio, 3 * devicePixelRatio]);
      this.drawLearnedField(context, field);
    }
  }

  /** All layers (down) and heads (across) of the chosen token, small. */
  drawOverview() {
    const heads = headCount() ? stackOf("heads") : null;
    const fused = stackOf("fused");
    if (!fused || (headCount() && !heads)) return;
    const count = 1 + (heads?.heads ?? 0);
    const layers = meta.layers.length;
    const box = this.overview.getBoundingClientRect();
    const gap = 2;
    const room = Math.max(innerHeight - box.top - 16, 240);
    // With one column, layers stand beside each other too.
    const across = count > 1 ? count : Math.ceil(Math.sqrt(layers));
    const down = count > 1 ? layers : Math.ceil(layers / across);
    const side = Math.max(8, Math.min((box.width || 300) / across, (room / down) * (COLUMNS / ROWS)) - gap);
    const high = side * (ROWS / COLUMNS);
    Object.assign(this.layout = {}, { across, side, high, gap, count });
    const ratio = devicePixelRatio;
    this.overview.width = across * (side + gap) * ratio;
    this.overview.height = down * (high + gap) * ratio;
    this.overview.style.width = `${across * (side + gap)}px`;
    const context = this.overview.getContext("2d");
    context.scale(ratio, ratio);
    const direction = state.direction;
    for (let layer = 0; layer < layers; layer++) {
      for (let k = 0; k < count; k++) {
        const stack = k === 0 ? fused : heads;
        const slice = layer * stack.heads + Math.max(k - 1, 0);
        const values = direction === "map"
          ? stack.maps.subarray(layer * PATCHES, (layer + 1) * PATCHES)
          : stack.shares(slice, state.patch, direction);
        const shown = direction === "map"
          ? Float32Array.from(values, (v) => (v * noteOf().mapLargest) / 32767) : values;
        const [row, column] = count > 1 ? [layer, k] : [Math.floor(layer / across), layer % across];
        const [x, y] = [column * (side + gap), row * (high + gap)];
        context.globalAlpha = 0.35;
        context.drawImage(picture, x, y, side, high);
        context.globalAlpha = 1;
        drawHeat(context, placesOf(shown, direction, state.patch), scaleOf(direction).table, x, y, side, high);
        const chosen = this.view.layer === layer
          && (this.view.head === FUSED ? k === 0 : Number(this.view.head) === k - 1);
        if (chosen) {
          context.strokeStyle = getComputedStyle(document.body).getPropertyValue("--focus");
          context.lineWidth = 3;
          context.strokeRect(x + 1, y + 1, side - 2, high - 2);
        }
      }
    }
    const words = count > 1 ? "a row for each layer; all heads, then each head" : "all layers";
    this.overview.setAttribute("aria-label", `Overview: ${words}. Click to go there.`);
    this.overview.title = words;
  }

  chooseView(event) {
    const { across, side, high, gap, count } = this.layout;
    const column = Math.min(Math.floor(event.offsetX / (side + gap)), across - 1);
    const row = Math.floor(event.offsetY / (high + gap));
    const layer = count > 1 ? row : row * across + column;
    if (layer >= meta.layers.length) return;
    this.view.layer = layer;
    this.view.head = count > 1 && column > 0 ? String(column - 1) : FUSED;
    changed();
  }

  write(stack, slice, to, by) {
    const token = state.patch;
    const what = state.direction === "map" ? "Class map" : titleOf(token);
    this.patch.textContent = `${what}, ${viewName(this.view)}`;
    this.canvas.setAttribute(
      "aria-label", `${viewName(this.view)}, ${titleOf(token).toLowerCase()}`,
    );
    this.writeField(stack, slice, token);
    const learnedFields = learned && token < PATCHES ? this.learnedFields() : [];
    this.learned.hidden = learnedFields.length === 0;
    this.learned.textContent = learnedFields.length === 1
      ? `Learned: ${learnedText(learnedFields[0])}.`
      : `Learned: ${learnedFields.length} fields, one a head; choose a head for its numbers.`;
    const words = isSigned() ? signedWords : percent;
    const [listens, heard] = [strongest(to), strongest(by)];
    [...this.rows.rows].forEach((row, k) => {
      row.hidden = k >= PATCHES;
      if (row.hidden) return;
      const cells = [
        place(listens[k]), words(to[listens[k]]), place(heard[k]), words(by[heard[k]]),
      ];
      cells.forEach((word, cell) => { row.cells[cell].textContent = word; });
    });
    this.summary =
      `${token < PATCHES ? `Patch row ${Math.floor(token / COLUMNS)}, column ${token % COLUMNS}` : nameOf(token)}, ` +
      `${viewName(this.view)}. Listens most to ${place(listens[0])}, ` +
      `${words(to[listens[0]])}; is heard most by ${place(heard[0])}, ` +
      `${words(by[heard[0]])}.`;
  }

  writeField(stack, slice, token) {
    if (isSigned()) {
      const { className, probability } = noteOf();
      const map = stack.shares(slice, 0, "map");
      const own = token < PATCHES ? ` The patch adds ${signedWords(map[token])}.` : "";
      this.measured.textContent =
        `What is added to the logit of ${className}, of probability ${Math.round(100 * probability)} %.${own}`;
      this.given.textContent = "";
      return;
    }
    if (token < PATCHES) {
      const field = stack.fieldOf(slice, token);
      const [dx, dy] = field.arrow;
      this.measured.textContent =
        `Field of ${Math.round(100 * meta.mass)} %: ${field.count} patches, area ${percent(field.area)} of the grid; ` +
        `tendency ${Math.abs(dx).toFixed(2)} ${dx < 0 ? "left" : "right"}, ` +
        `${Math.abs(dy).toFixed(2)} ${dy < 0 ? "up" : "down"}.`;
    } else {
      this.measured.textContent = "";
    }
    const parts = meta.prefix.map((name, t) => `${name} ${percent(stack.givenBy(slice, token, t))}`);
    this.given.textContent = parts.length ? `Of all that it listens to: ${parts.join(", ")}.` : "";
  }
}

const colorsShown = () =>
  state.flags.has("colors") && headCount() > 1 && state.direction !== "map";

// --- One frame --------------------------------------------------------------------

const picture = $("picture");
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
  for (const panel of two ? panels : panels.slice(0, 1)) panel.draw();
  writePair();
  // Speech that a newer patch would interrupt is not worth starting.
  clearTimeout(speakTimer);
  speakTimer = setTimeout(() => {
    $("status").textContent = state.other === null ? panels[0].summary : $("pair").textContent;
  }, 400);
}

/** What the held token and the patch under the pointer give each other. */
function writePair() {
  const { held, patch, other } = state;
  const stack = panels[0].stack();
  if (!held) {
    $("pair").textContent = "Click or press Enter to hold a patch.";
  } else if (other === null || !stack || patch >= PATCHES) {
    $("pair").textContent = `Holding ${nameOf(patch)}: move on to see what the two give each other.`;
  } else {
    const slice = panels[0].slice(stack);
    const one = (i, j) => (isSigned() ? signedWords(stack.effect(slice, i, j)) : percent(stack.share(slice, i, j)));
    $("pair").textContent =
      `${nameOf(patch)} listens to ${nameOf(other)}: ${one(patch, other)}; ` +
      `${nameOf(other)} listens to ${nameOf(patch)}: ${one(other, patch)}.`;
  }
}

function changed() {
  settle();
  showControls();
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
    const chosen = state.held ? state.other ?? state.patch : state.patch;
    const here = chosen < PATCHES ? chosen : 0;
    const next = step(here, event.key);
    const turn = (value, by, count) => (value + by + count) % count;
    const heads = headChoices();
    const directions = isSigned() ? DIRECTIONS : ["to", "by"];
    const tokens = [...Array(meta.prefix.length).keys()].map((t) => PATCHES + t);
    const actions = {
      enter: () => hold(here),
      " ": () => hold(here),
      escape: () => { state.held = false; state.other = null; },
      "[": () => { view.layer = Math.max(0, view.layer - 1); },
      "]": () => { view.layer = Math.min(meta.layers.length - 1, view.layer + 1); },
      h: () => { view.head = heads[turn(heads.indexOf(view.head), 1, heads.length)]; },
      d: () => {
        state.direction = directions[turn(directions.indexOf(state.direction), 1, directions.length)];
      },
      c: () => {
        if (tokens.length) state.patch = tokens[turn(tokens.indexOf(state.patch), 1, tokens.length)];
      },
      o: () => showOriginal(true),
    };
    // Whatever Shift and Caps Lock make of a letter, and of a bracket.
    const key = { "{": "[", "}": "]" }[event.key] ?? event.key.toLowerCase();
    const action = next === null ? actions[key] : () => moveTo(next);
    if (!action) return;
    event.preventDefault();
    action();
    changed();
  });
  canvas.addEventListener("keyup", (event) => {
    if (event.key.toLowerCase() === "o") showOriginal(false);
  });
  canvas.addEventListener("blur", () => showOriginal(false));
}

function showOriginal(original) {
  if (state.original === original) return;
  state.original = original;
  requestDraw();
}

// What the controls show is compared first: to set it is slow, and hovering does it.
let controlsShown = "";
function showControls() {
  const { indicator, direction, patch, opacity, flags, views } = state;
  const now = JSON.stringify([indicator, direction, Math.max(patch, PATCHES - 1), opacity, [...flags], views]);
  if (now === controlsShown) return;
  controlsShown = now;
  $("indicator").value = indicator;
  document.querySelector(`[name=direction][value=${direction}]`).checked = true;
  for (const flag of FLAGS) $(flag).checked = flags.has(flag);
  $("opacity").value = opacity;
  const signed = isSigned();
  const visible = {
    "map-label": signed, "bylayer-label": direction === "map", "colors-label": headCount() > 1,
    "field-label": !signed, "arrow-label": !signed, "arrows-label": !signed,
  };
  for (const [id, shown] of Object.entries(visible)) $(id).hidden = !shown;
  for (const chip of document.querySelectorAll("#prefix button")) {
    chip.setAttribute("aria-pressed", Number(chip.value) === patch);
  }
  showScale();
}

function showScale() {
  const heads = colorsShown();
  $("scale").hidden = !state.flags.has("impact");
  $("ramp").hidden = heads;
  $("ramp-labels").hidden = heads;
  $("head-legend").hidden = !heads;
  if (heads) {
    $("head-legend").replaceChildren(...Array.from({ length: headCount() }, (_, head) => {
      const item = document.createElement("span");
      item.textContent = `head ${head}`;
      item.style.setProperty("--hue", headColor(head));
      return item;
    }));
  }
  const { low, top, table } = scaleOf(state.direction);
  const ramp = $("ramp").getContext("2d");
  const image = ramp.createImageData(256, 1);
  for (let k = 0; k < 256; k++) image.data.set(table.subarray(4 * k, 4 * k + 4), 4 * k);
  ramp.putImageData(image, 0, 0);
  const signed = isSigned();
  $("scale-low").textContent = signed ? `≤ −${top}` : "≤ 1";
  $("scale-middle").textContent = signed ? "0" : String(Number(Math.sqrt(top).toPrecision(2)));
  $("scale-high").textContent = `≥ ${top}`;
  const units = {
    to: "what it listens to; 1 is what each patch would have if all counted alike",
    by: "who listens to it; 1 is the mean over the other patches",
  };
  const effects = {
    to: "what each patch adds to the logit through it", by: "what it adds through each patch",
    map: "what each patch adds to the logit in all",
  };
  $("unit").textContent = (signed ? effects : units)[state.direction]
    + (heads ? "; the colour is the head with the most" : "");
  $("scale").setAttribute("aria-label", `Colour scale from ${signed ? low : "1 and less"} to ${top}`);
}

function listenToControls() {
  $("indicator").addEventListener("change", (event) => {
    state.indicator = Number(event.target.value);
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
  $("opacity").addEventListener("input", (event) => {
    state.opacity = Number(event.target.value);
    changed();
  });
  for (const [kind, original] of [["pointerdown", true], ["pointerup", false], ["pointerleave", false]]) {
    $("original").addEventListener(kind, () => showOriginal(original));
  }
  $("copy").addEventListener("click", copyLink);
  addEventListener("hashchange", () => {
    fromHash(location.hash);
    changed();
  });
}

function addChips() {
  $("prefix").hidden = meta.prefix.length === 0;
  meta.prefix.forEach((name, t) => {
    const chip = Object.assign(document.createElement("button"), {
      type: "button", textContent: name, value: PATCHES + t,
    });
    const choose = () => {
      state.patch = PATCHES + t;
      state.other = null;
      changed();
    };
    chip.addEventListener("click", () => {
      state.held = !(state.held && state.patch === PATCHES + t);
      choose();
    });
    chip.addEventListener("pointerenter", () => { if (!state.held) choose(); });
    $("prefix").append(chip);
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
    "A percentage is the share of all that a token takes from patches; what it takes from " +
    "CLS and registers is told apart. The outlined field is the fewest patches that hold " +
    `${Math.round(100 * meta.mass)} % of it, and the patch itself; it is found from the ` +
    "stored numbers, so that patches of nearly equal shares at its border may be exchanged. " +
    "The arrow is the field's tendency: from the patch to the field's centre of gravity, " +
    "without the part that the patch's place in the grid explains. Positions are " +
    "(row, column), counted from 0 at the upper left; lengths are in patches.";
  $("storage").textContent = meta.indicators.map(storageText).filter(Boolean).join(" ");
}

function layerText() {
  const { layers, allLayers } = meta;
  return layers.length === allLayers.length
    ? `all ${allLayers.length} layers`
    : `${layers.length} of ${allLayers.length} layers (${layers.join(", ")}): more did not fit`;
}

function headsText({ name, omittedHeads }) {
  return omittedHeads ? `“${name}” without its ${omittedHeads} heads: they did not fit` : "";
}

function storageText({ name, stacks: held }) {
  const parts = Object.entries(held).map(([kind, { levels, errorBound, misplaced }]) =>
    `${kind === "fused" ? "fused over heads" : "each head"} in ${levels} steps (error at most ` +
    `${(100 * errorBound).toFixed(1)} % of the row's largest; ${percent(misplaced)} of the ` +
    "impact misplaced on average)");
  return parts.length ? `“${name}” is stored ${parts.join(", ")}.` : "";
}

// --- Start ------------------------------------------------------------------------

const panels = state.views.map((view) => new Panel(view));

async function start() {
  $("panels").append(...panels.map((panel) => panel.root));
  $("indicator").append(...meta.indicators.map(({ name }, k) => new Option(name, k)));
  $("indicator-label").hidden = meta.indicators.length === 1;
  $("learned-label").hidden = !("learnedHeads" in meta);
  addChips();
  fromHash(location.hash);
  describe();
  showControls();
  listenToControls();
  await picture.decode();
  if ("learnedHeads" in meta) learned = await unpackInt16("learned");
  requestDraw();
}

start();
