// The page that scripts/registration/view.py writes: NiiVue draws the planes, this mixes the two images it shows and
// draws outlines, field and targets upon them. Voxels are those of the page's grid, axes towards R, A, S; mm are along
// these axes from the first voxel, but for the readout, which is in the patient's.

const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const TRUS = "#2fd6e6", MR = "#ff9f1c", MOTION = [[82, 112, 143], [243, 231, 155], [255, 75, 51]];
const state = { mode: "both", before: false, plane: 3, blink: 0 };
const size = data.size, spacing = data.spacing, count = size[0] * size[1] * size[2];
const longest = Math.max(...size.map((n, k) => n * spacing[k]));

async function unpacked(text, kind = Uint8Array) {
  const letters = atob(text), bytes = new Uint8Array(letters.length);
  for (let i = 0; i < letters.length; i++) bytes[i] = letters.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new kind(await new Response(stream).arrayBuffer());
}

// ---- what is shown

let nv, images, masks, field, board;

function shades(low, high) { // grey level of the file -> on the screen
  return Uint8Array.from({ length: 256 }, (_, v) => Math.max(0, Math.min(255, (255 * (v - low)) / Math.max(1, high - low))));
}

function boardOf() { // true on every other cube, seven along the longest side
  const tile = longest / 7;
  const cubes = size.map((n, k) => Array.from({ length: n }, (_, i) => Math.floor(((i + 0.5) * spacing[k]) / tile)));
  const found = new Uint8Array(count);
  for (let z = 0, at = 0; z < size[2]; z++)
    for (let y = 0; y < size[1]; y++)
      for (let x = 0; x < size[0]; x++) found[at++] = (cubes[0][x] + cubes[1][y] + cubes[2][z]) & 1;
  return found;
}

function show() {
  const trus = images.fixed, mr = state.before ? images.before : images.after;
  const t = shades(+$("trus_low").value, +$("trus_high").value), m = shades(+$("mr_low").value, +$("mr_high").value);
  const share = { trus: 0, mr: 1, both: $("share").value / 100 }[state.mode];
  const out = nv.volumes[0].img;
  if (state.mode === "board") for (let i = 0; i < count; i++) out[i] = board[i] ? m[mr[i]] : t[trus[i]];
  else for (let i = 0; i < count; i++) out[i] = t[trus[i]] + share * (m[mr[i]] - t[trus[i]]);
  for (const button of document.querySelectorAll("[data-mode]")) press(button, button.dataset.mode === state.mode);
  for (const button of document.querySelectorAll("[data-before]")) press(button, (button.dataset.before === "1") === state.before);
  const name = state.before ? "MR before: only the centres aligned" : "MR registered";
  $("shown").textContent = { trus: "TRUS", mr: name, both: "TRUS and " + name, board: "TRUS / " + name }[state.mode];
  nv.updateGLVolume();
}

function press(button, on) { button.setAttribute("aria-pressed", on ? "true" : "false"); }

function set(change) {
  if (change.mode) still();
  Object.assign(state, change);
  show();
}

function other() { return { mode: state.mode === "mr" ? "trus" : "mr" }; }
function flip() { set(other()); }

function still() {
  clearInterval(state.blink);
  state.blink = 0;
  press($("blink"), false);
}

function blink() {
  if (state.blink) return still();
  state.blink = setInterval(() => { Object.assign(state, other()); show(); }, 700);
  press($("blink"), true);
}

function fitted() { // the stage is as tall as what is shown across its width
  const [x, y, z] = size.map((n, k) => n * spacing[k]), narrow = innerWidth < 700;
  nv.setMultiplanarLayout(narrow ? 2 : 3);
  const [wide, tall] = [[x, y], [x, z], [y, z], narrow ? [x + y, y + z] : [2 * x + y, Math.max(y, z)]][state.plane];
  const room = $("stage").clientWidth;
  $("stage").style.height = Math.round(Math.min(room * tall / wide + 8, Math.max(0.7 * innerHeight, 320))) + "px";
}

function look(plane) {
  state.plane = plane;
  fitted();
  for (const button of document.querySelectorAll("[data-plane]")) press(button, +button.dataset.plane === plane);
  nv.setSliceType(plane);
}

// ---- where

const voxel = () => size.map((n, k) => nv.scene.crosshairPos[k] * n - 0.5);

function go(to) {
  nv.scene.crosshairPos = to.map((v, k) => Math.max(0, Math.min(1, (v + 0.5) / size[k])));
  told();
  nv.drawScene();
}

function step(axis, by) {
  const at = voxel().map(Math.round);
  at[axis] += by;
  go(at);
}

function zoom(by) {
  const [x, y, z, now] = nv.scene.pan2Dxyzmm, next = by ? Math.max(1, Math.min(10, now * by)) : 1;
  const mm = voxel().map((v, k) => v * spacing[k]); // what the cross-hair points at stays where it is
  nv.setPan2Dxyzmm([...[x, y, z].map((p, k) => (next > 1 ? p + (now - next) * mm[k] : 0)), next]);
}

function told() {
  const at = voxel(), patient = data.affine.map((row) => row[0] * at[0] + row[1] * at[1] + row[2] * at[2] + row[3]);
  const words = patient.map((mm, k) => Math.abs(mm).toFixed(1) + " mm " + ["LR", "PA", "IS"][k][mm < 0 ? 0 : 1]);
  const slices = at.map((v, k) => ["sagittal", "coronal", "axial"][k] + " " + (Math.round(v) + 1) + "/" + size[k]);
  const u = field && displacement(at);
  $("where").textContent = words.join(", ") + "; slice " + slices.reverse().join(", ")
    + (u ? "; deformation here " + Math.hypot(...u).toFixed(1) + " mm" : "");
}

// ---- drawn upon the planes

function drawn() {
  const canvas = $("marks"), glass = canvas.getContext("2d");
  if (canvas.width !== nv.canvas.width || canvas.height !== nv.canvas.height) {
    [canvas.width, canvas.height] = [nv.canvas.width, nv.canvas.height];
  }
  glass.clearRect(0, 0, canvas.width, canvas.height);
  const scale = nv.uiData.dpr || 1;
  for (const tile of nv.screenSlices) {
    if (tile.axCorSag > 2 || !tile.fovMM.length) continue;
    const axes = [[0, 1], [0, 2], [1, 2]][tile.axCorSag], normal = 3 - axes[0] - axes[1];
    let [left, top, width, height] = tile.leftTopWidthHeight;
    const mirrored = width < 0;
    if (mirrored) [left, width] = [left + width, -width];
    const place = (x, y) => { // mm in the plane -> pixels of the canvas
      const across = (x - tile.leftTopMM[0]) / tile.fovMM[0], up = (y - tile.leftTopMM[1]) / tile.fovMM[1];
      return [left + (mirrored ? 1 - across : across) * width, top + (1 - up) * height];
    };
    const slice = Math.max(0, Math.min(size[normal] - 1, Math.round(voxel()[normal])));
    glass.save();
    glass.beginPath();
    glass.rect(left, top, width, height);
    glass.clip();
    if (field && $("field").value !== "none") motion(glass, axes, normal, slice, place, scale);
    for (const mask of masks) {
      if (!$(mask.kind).checked || (mask.when && (mask.when === "before") !== state.before)) continue;
      glass.strokeStyle = mask.side === "fixed" ? TRUS : MR;
      glass.lineWidth = (mask.kind === "glands" ? 2 : 1.2) * scale;
      glass.setLineDash(mask.side === "fixed" ? [] : [6 * scale, 3 * scale]);
      outline(glass, mask.values, axes, normal, slice, place);
    }
    glass.setLineDash([]);
    for (const [number, one] of data.targets.entries()) {
      if (!$("targets").checked || Math.abs(one.voxel[normal] - slice) * spacing[normal] > 3) continue;
      const [x, y] = place(...axes.map((k) => one.voxel[k] * spacing[k])), r = 6 * scale;
      for (const [colour, line] of [["#000", 4], ["#fff", 1.8]]) {
        glass.strokeStyle = colour;
        glass.lineWidth = line * scale;
        glass.beginPath();
        glass.arc(x, y, r, 0, 7);
        glass.stroke();
      }
      glass.font = 12 * scale + "px system-ui, sans-serif";
      written(glass, String(number + 1), x + 1.4 * r, y - r, scale);
    }
    hair(glass, place(...axes.map((k) => voxel()[k] * spacing[k])), [left, top, left + width, top + height], scale);
    letters(glass, axes, [left, top, width, height], scale);
    if (tile === nv.screenSlices[0]) bar(glass, left, top + height, width / Math.abs(tile.fovMM[0]), scale);
    glass.restore();
  }
}

function hair(glass, [x, y], [left, top, right, bottom], scale) { // with a gap, so that what it points at is seen
  const gap = 12 * scale;
  for (const [colour, line] of [["#0008", 3], ["#fffb", 1]]) {
    glass.strokeStyle = colour;
    glass.lineWidth = line * scale;
    glass.beginPath();
    for (const [a, b, c, d] of [[left, y, x - gap, y], [x + gap, y, right, y], [x, top, x, y - gap], [x, y + gap, x, bottom]]) {
      glass.moveTo(a, b);
      glass.lineTo(c, d);
    }
    glass.stroke();
  }
}

function letters(glass, axes, [left, top, width, height], scale) { // the patient's directions at the edges of a plane
  const [low, high] = axes.map((k) => "LPI"[k]), [far, up] = axes.map((k) => "RAS"[k]), inset = 10 * scale;
  glass.font = "bold " + 15 * scale + "px system-ui, sans-serif";
  [glass.textAlign, glass.textBaseline] = ["center", "middle"];
  written(glass, far, left + inset, top + height / 2, scale); // right, or in the sagittal plane front, is on the left
  written(glass, low, left + width - inset, top + height / 2, scale);
  written(glass, up, left + width / 2, top + inset, scale);
  written(glass, high, left + width / 2, top + height - inset, scale);
  [glass.textAlign, glass.textBaseline] = ["start", "alphabetic"];
}

function written(glass, text, x, y, scale) {
  glass.lineWidth = 3 * scale;
  glass.strokeStyle = "#000";
  glass.fillStyle = "#fff";
  glass.strokeText(text, x, y);
  glass.fillText(text, x, y);
}

function bar(glass, left, bottom, pixels, scale) { // 10 mm
  const x = left + 10 * scale, y = bottom - 10 * scale;
  for (const [colour, line] of [["#000", 5], ["#fff", 2.5]]) {
    glass.strokeStyle = colour;
    glass.lineWidth = line * scale;
    glass.beginPath();
    glass.moveTo(x, y);
    glass.lineTo(x + 10 * pixels, y);
    glass.stroke();
  }
  glass.font = 12 * scale + "px system-ui, sans-serif";
  written(glass, "10 mm", x, y - 6 * scale, scale);
}

// Marching squares at half of 255: each cell's pieces have the mask on their left, so that they chain into closed lines.
function outline(glass, values, axes, normal, slice, place) {
  const [w, h] = axes.map((k) => size[k]), strides = [1, size[0], size[0] * size[1]];
  const at = (i, j) => (i < 0 || j < 0 || i >= w || j >= h ? 0 : values[i * strides[axes[0]] + j * strides[axes[1]] + slice * strides[normal]]);
  const next = new Map(), points = new Map();
  const cross = (i, j, down) => { // the edge from (i, j) to its neighbour, and where the line meets it
    const key = 2 * ((j + 1) * (w + 2) + i + 1) + (down ? 1 : 0), a = at(i, j), b = down ? at(i, j + 1) : at(i + 1, j);
    const share = (127.5 - a) / (b - a);
    points.set(key, [(i + (down ? 0 : share)) * spacing[axes[0]], (j + (down ? share : 0)) * spacing[axes[1]]]);
    return key;
  };
  for (let j = -1; j < h; j++) {
    for (let i = -1; i < w; i++) {
      const inside = [at(i, j), at(i + 1, j), at(i + 1, j + 1), at(i, j + 1)].map((v) => v > 127.5);
      if (inside.every((v) => v === inside[0])) continue;
      const edge = [() => cross(i, j, false), () => cross(i + 1, j, true), () => cross(i, j + 1, false), () => cross(i, j, true)];
      for (let k = 0; k < 4; k++) { // a line enters where the border goes out of the mask, and leaves where it comes in
        if (!inside[k] || inside[(k + 1) % 4]) continue;
        let back = (k + 3) % 4;
        while (!(!inside[back] && inside[(back + 1) % 4])) back = (back + 3) % 4;
        next.set(edge[back](), edge[k]());
      }
    }
  }
  glass.beginPath();
  while (next.size) {
    const first = next.keys().next().value;
    let key = first;
    glass.moveTo(...place(...points.get(key)));
    while (next.has(key)) {
      const to = next.get(key);
      next.delete(key);
      key = to;
      glass.lineTo(...place(...points.get(key)));
    }
  }
  glass.stroke();
}

// ---- the field: nodes every data.field.every voxels, values in mm / 100

function node(indices) {
  const n = data.field.size, at = indices[0] + n[0] * (indices[1] + n[1] * indices[2]), all = n[0] * n[1] * n[2];
  return [0, 1, 2].map((k) => field[at + k * all] / 100);
}

function displacement(at) { // of the nearest node
  return node(at.map((v, k) => Math.max(0, Math.min(data.field.size[k] - 1, Math.round(v / data.field.every[k])))));
}

function colour(mm) {
  const place = Math.min(1, mm / data.field.most) * 2, low = MOTION[Math.min(1, Math.floor(place))], high = MOTION[Math.min(1, Math.floor(place)) + 1];
  const share = place - Math.min(1, Math.floor(place));
  return "rgb(" + low.map((v, k) => Math.round(v + share * (high[k] - v))).join(",") + ")";
}

function motion(glass, axes, normal, slice, place, scale) {
  const n = data.field.size, every = data.field.every, indices = [0, 0, 0];
  indices[normal] = Math.min(n[normal] - 1, Math.round(slice / every[normal]));
  const nodes = [];
  for (let i = 0; i < n[axes[0]]; i++) {
    nodes.push([]);
    for (let j = 0; j < n[axes[1]]; j++) {
      [indices[axes[0]], indices[axes[1]]] = [i, j];
      const u = node(indices), from = axes.map((k) => indices[k] * every[k] * spacing[k]);
      nodes[i].push({ from: place(...from), to: place(...axes.map((k, m) => from[m] + u[k])), mm: Math.hypot(...u) });
    }
  }
  const line = (a, b, mm) => {
    glass.strokeStyle = colour(mm);
    glass.beginPath();
    glass.moveTo(...a);
    glass.lineTo(...b);
    glass.stroke();
  };
  glass.lineWidth = 1.4 * scale;
  for (let i = 0; i < n[axes[0]]; i++) {
    for (let j = 0; j < n[axes[1]]; j++) {
      const one = nodes[i][j];
      if ($("field").value === "arrows") {
        const [x, y] = [one.to[0] - one.from[0], one.to[1] - one.from[1]], long = Math.hypot(x, y);
        if (long < 2 * scale) continue;
        line(one.from, one.to, one.mm);
        for (const side of [-0.5, 0.5]) {
          const angle = Math.atan2(y, x) + Math.PI + side, head = Math.min(6 * scale, long / 2);
          line(one.to, [one.to[0] + head * Math.cos(angle), one.to[1] + head * Math.sin(angle)], one.mm);
        }
      } else {
        for (const other of [nodes[i + 1] && nodes[i + 1][j], nodes[i][j + 1]]) {
          if (other) line(one.to, other.to, (one.mm + other.mm) / 2);
        }
      }
    }
  }
}

// ---- by hand

const KEYS = {
  arrowleft: () => step(0, 1), arrowright: () => step(0, -1), arrowup: () => step(1, 1), arrowdown: () => step(1, -1),
  pageup: () => step(2, 1), pagedown: () => step(2, -1), " ": flip,
  t: () => set({ mode: "trus" }), m: () => set({ mode: "mr" }), b: () => set({ mode: "both" }),
  c: () => set({ mode: "board" }), r: () => set({ before: !state.before }), k: blink,
  "+": () => zoom(1.25), "=": () => zoom(1.25), "-": () => zoom(0.8), 0: () => zoom(0),
  1: () => look(0), 2: () => look(1), 3: () => look(2), 4: () => look(3),
  o: () => $("glands").click(), n: () => next(1), p: () => next(-1),
  f: () => { $("field").selectedIndex = ($("field").selectedIndex + 1) % 3; nv.drawScene(); },
};
const ON_THE_PLANES = ["arrowleft", "arrowright", "arrowup", "arrowdown", "pageup", "pagedown", " "]; // elsewhere they are the page's

let chosen = -1;
function next(by) {
  if (!data.targets.length) return;
  chosen = (chosen + by + data.targets.length) % data.targets.length;
  choose(chosen);
}

function choose(number) {
  chosen = number;
  for (const button of document.querySelectorAll("[data-target]")) press(button, +button.dataset.target === number);
  go(data.targets[number].voxel);
}

function listen() {
  document.addEventListener("keydown", (event) => {
    const key = event.key.toLowerCase(), typed = ["INPUT", "SELECT"].includes(event.target.tagName) && event.target.type !== "checkbox";
    if (event.target === nv.canvas) event.stopPropagation(); // NiiVue has keys of its own
    const ours = KEYS[key] && !event.ctrlKey && !event.metaKey && !event.altKey && !typed;
    if (!ours || (ON_THE_PLANES.includes(key) && event.target !== nv.canvas)) return;
    event.preventDefault();
    KEYS[key]();
  }, true);
  document.addEventListener("keyup", (event) => event.stopPropagation(), true);
  nv.canvas.addEventListener("wheel", (event) => {
    if (!event.ctrlKey) return;
    event.preventDefault();
    event.stopPropagation();
    zoom(event.deltaY < 0 ? 1.15 : 1 / 1.15);
  }, { capture: true, passive: false });
  for (const button of document.querySelectorAll("[data-mode]")) button.onclick = () => set({ mode: button.dataset.mode });
  for (const button of document.querySelectorAll("[data-before]")) button.onclick = () => set({ before: button.dataset.before === "1" });
  for (const button of document.querySelectorAll("[data-plane]")) button.onclick = () => look(+button.dataset.plane);
  for (const button of document.querySelectorAll("[data-target]")) button.onclick = () => choose(+button.dataset.target);
  for (const button of document.querySelectorAll("[data-zoom]")) button.onclick = () => zoom(+button.dataset.zoom);
  for (const id of ["trus_low", "trus_high", "mr_low", "mr_high"]) $(id).oninput = show;
  $("share").oninput = () => set({ mode: "both" });
  for (const id of ["glands", "labels", "targets", "field"]) $(id).onchange = () => nv.drawScene();
  $("blink").onclick = blink;
  addEventListener("resize", fitted);
}

async function start() {
  if (!document.createElement("canvas").getContext("webgl2")) throw new Error("this browser has no WebGL 2, or it is switched off");
  images = Object.fromEntries(await Promise.all(Object.entries(data.images).map(async ([name, text]) => [name, await unpacked(text)])));
  masks = await Promise.all(data.masks.map(async (one) => ({ ...one, values: await unpacked(one.values) })));
  field = data.field && (await unpacked(data.field.values, Int16Array));
  board = boardOf();
  const CROSSHAIR = 8, PAN = 3, NEVER = 0;
  nv = new globalThis.Niivue({
    backColor: [0.063, 0.078, 0.094, 1], crosshairWidth: 0, // the cross-hair is drawn here, a pixel wide at any zoom
    isRadiologicalConvention: true, sagittalNoseLeft: true, isOrientationTextVisible: false,
    multiplanarShowRender: NEVER, dragAndDropEnabled: false, loadingText: "",
    mouseEventConfig: { leftButton: { primary: CROSSHAIR, withShift: PAN }, rightButton: PAN, centerButton: PAN },
    tileMargin: 4, logLevel: "error",
  });
  const scene = nv.drawScene;
  nv.drawScene = function (...given) {
    const result = scene.apply(this, given);
    if (this.volumes.length) drawn();
    return result;
  };
  nv.onLocationChange = told;
  await nv.attachToCanvas($("planes"));
  await nv.loadFromArrayBuffer((await unpacked(data.grid)).buffer, "shown.nii");
  nv.volumes[0].cal_min = 0;
  nv.volumes[0].cal_max = 255;
  listen();
  show();
  look(3);
  go(data.start);
  document.body.dataset.ready = String(Math.round(performance.now())); // ms since the page began to load
}

start().catch((error) => {
  console.error(error);
  $("stage").hidden = true;
  $("unseen").hidden = false;
  $("why").textContent = error.message;
});
