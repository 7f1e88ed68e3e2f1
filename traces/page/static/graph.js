// The graph with the path taken, and training curves: plain SVG.
const BOX = { height: 34, gap: 92, top: 96 };

// How far the handles of an arc over so many nodes reach out; the arc itself reaches three quarters of it.
const bow = (nodes) => 20 + 14 * nodes;

// Nodes in the order in which paths reach them, the end last.
function orderOf(moves) {
  const order = ["start"];
  for (const [from, , to] of moves) for (const node of [from, to]) if (!order.includes(node) && node !== "end") order.push(node);
  return moves.some((move) => move[2] === "end") ? [...order, "end"] : order;
}

function counted(path) {
  const counts = new Map();
  for (const move of path) counts.set(move.join("\u0000"), (counts.get(move.join("\u0000")) ?? 0) + 1);
  return counts;
}

function Graph({ path, run }) {
  const taken = counted(path);
  const known = new Map((run ?? []).map(([from, edge, to, count]) => [[from, edge, to].join("\u0000"), { from, edge, to, count }]));
  for (const [from, edge, to] of path) if (!known.has([from, edge, to].join("\u0000"))) known.set([from, edge, to].join("\u0000"), { from, edge, to, count: 0 });
  const order = orderOf([...path, ...[...known.values()].map((one) => [one.from, one.edge, one.to])]).slice(0, 24);
  const visits = (node) => path.filter((move) => move[2] === node).length;
  const caption = (node) => spoken(node).slice(0, 16) + (visits(node) > 1 ? ` ×${visits(node)}` : "");
  const widths = order.map((node) => 28 + 8 * caption(node).length);
  const lefts = widths.map((_, place) => 4 + widths.slice(0, place).reduce((sum, width) => sum + width + BOX.gap, 0));
  const edges = bundled([...known.entries()].map(([key, one]) => ({ ...one, times: taken.get(key) ?? 0 })), order);
  const above = Math.max(-1, ...edges.filter((one) => one.j > one.i + 1 || one.j === one.i).map((one) => one.j - one.i));
  const below = Math.max(0, ...edges.map((one) => one.i - one.j));
  const [top, bottom] = [BOX.top, BOX.top + BOX.height];
  const width = lefts.at(-1) + widths.at(-1) + 4;
  const words = path.map(([, edge, to]) => `${edge ? ` by ${spoken(edge)}` : ""} to ${spoken(to)}`).join(",");
  const height = bottom + (below > 0 ? bow(below) * 0.75 + 18 : 4);
  const least = top - (above >= 0 ? bow(above) * 0.75 + 18 : 18);
  return html`<div class="graph" tabindex="0" role="group" aria-label="graph and path taken">
    <svg viewBox=${`0 ${least} ${width} ${height - least}`} width=${width} height=${height - least} role="img" aria-label=${`from start${words}`}>
      <defs>
        <marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" /></marker>
        <marker id="tip-taken" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" orient="auto"><path class="taken" d="M0 0L8 4L0 8z" /></marker>
      </defs>
      ${edges.map((one) => html`<${Edge} ...${one} lefts=${lefts} widths=${widths} top=${top} bottom=${bottom} />`)}
      ${order.map(
        (node, place) => html`<g class=${`node ${place === 0 || visits(node) ? "taken" : ""}`}>
          <rect x=${lefts[place]} y=${top} width=${widths[place]} height=${BOX.height} rx="8" />
          <text x=${lefts[place] + widths[place] / 2} y=${top + 21}>${caption(node)}</text>
          <title>${spoken(node)}: ${place === 0 ? "where it began" : plural(visits(node), "visit")}</title>
        </g>`,
      )}
    </svg>
  </div>`;
}

// One line for all edges between the same two nodes.
function bundled(edges, order) {
  const found = new Map();
  for (const one of edges) {
    const [i, j] = [order.indexOf(one.from), order.indexOf(one.to)];
    if (i < 0 || j < 0) continue;
    const line = found.get(`${i} ${j}`) ?? { i, j, labels: [], times: 0, count: 0 };
    if (one.edge) line.labels.push([one.times, spoken(one.edge).slice(0, 24)]);
    line.times += one.times;
    line.count += one.count;
    found.set(`${i} ${j}`, line);
  }
  return [...found.values()].sort((a, b) => a.times - b.times);
}

function Edge({ i, j, labels, times, count, lefts, widths, top, bottom }) {
  const middle = (place) => lefts[place] + widths[place] / 2;
  const shown = labels.filter(([here]) => here > 0 || times === 0);
  const mark = shown.map(([here, name]) => (here > 1 ? `${name} ×${here}` : name)).join(", ");
  let line, x, y;
  if (j === i + 1) {
    [line, x, y] = [`M${lefts[i] + widths[i]} ${top + 12}H${lefts[j] - 1}`, (lefts[i] + widths[i] + lefts[j]) / 2, top + 6];
  } else if (j < i) {
    const deep = bottom + bow(i - j);
    [line, x, y] = [`M${middle(i)} ${bottom}C${middle(i)} ${deep} ${middle(j)} ${deep} ${middle(j)} ${bottom + 2}`, (middle(i) + middle(j)) / 2, bottom + bow(i - j) * 0.75 + 13];
  } else {
    const high = top - bow(j - i);
    [line, x, y] = [`M${middle(i) - (i === j ? 12 : 0)} ${top}C${middle(i) - (i === j ? 30 : 0)} ${high} ${middle(j) + (i === j ? 30 : 0)} ${high} ${middle(j) + (i === j ? 12 : 0)} ${top - 2}`, (middle(i) + middle(j)) / 2, top - bow(j - i) * 0.75 - 5];
  }
  return html`<g class=${`edge ${times ? "taken" : ""}`}>
    <path d=${line} marker-end=${times ? "url(#tip-taken)" : "url(#tip)"} />
    <text x=${x} y=${y}>${mark}</text>
    <title>${labels.map(([, name]) => name).join(", ") || "edge"}: ${times} here, ${count} in the finished episodes of the run</title>
  </g>`;
}

const PLOT = { width: 300, height: 120, left: 44, right: 8, top: 10, bottom: 16 };

function Curve({ curve }) {
  const [at, setAt] = useState(null);
  const points = curve.points;
  const [xs, ys] = [points.map((one) => one[0]), points.map((one) => one[1])];
  const [x0, x1, y0, y1] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const x = (value) => PLOT.left + ((value - x0) / (x1 - x0 || 1)) * (PLOT.width - PLOT.left - PLOT.right);
  const y = (value) => PLOT.height - PLOT.bottom - ((value - y0) / (y1 - y0 || 1)) * (PLOT.height - PLOT.top - PLOT.bottom);
  const near = (event) => {
    const room = event.currentTarget.getBoundingClientRect();
    const wanted = x0 + (((event.clientX - room.left) / room.width) * PLOT.width - PLOT.left) / (PLOT.width - PLOT.left - PLOT.right) * (x1 - x0);
    setAt(xs.reduce((best, one, place) => (Math.abs(one - wanted) < Math.abs(xs[best] - wanted) ? place : best), 0));
  };
  const move = (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    setAt(Math.max(0, Math.min(points.length - 1, (at ?? 0) + step)));
  };
  const name = `${curve.stage ? `${spoken(curve.stage)}: ` : ""}${spoken(curve.name)}`;
  const shown = points[at ?? points.length - 1];
  return html`<figure class="curve">
    <figcaption><b>${name}</b> <span>${at === null ? "last" : `step ${shown[0]}`}: ${at === null ? round(shown[1], 4) : String(shown[1])}</span></figcaption>
    <svg
      viewBox=${`0 0 ${PLOT.width} ${PLOT.height}`}
      tabindex="0"
      role="img"
      aria-label=${`${name}: ${plural(points.length, "point")}, from ${round(ys[0], 4)} to ${round(ys.at(-1), 4)}, least ${round(y0, 4)}, most ${round(y1, 4)}`}
      onMouseMove=${near}
      onMouseLeave=${() => setAt(null)}
      onKeyDown=${move}
    >
      <line class="axis" x1=${PLOT.left} x2=${PLOT.width - PLOT.right} y1=${PLOT.height - PLOT.bottom} y2=${PLOT.height - PLOT.bottom} />
      <polyline points=${points.map((one) => `${x(one[0]).toFixed(1)},${y(one[1]).toFixed(1)}`).join(" ")} />
      <circle cx=${x(shown[0])} cy=${y(shown[1])} r="3" />
      <text x=${PLOT.left} y=${PLOT.height - 4}>${round(x0)}</text>
      <text class="end" x=${PLOT.width - PLOT.right} y=${PLOT.height - 4}>step ${round(x1)}</text>
      <text class="side" x=${PLOT.left - 6} y=${PLOT.top + 4}>${round(y1)}</text>
      <text class="side" x=${PLOT.left - 6} y=${PLOT.height - PLOT.bottom}>${round(y0)}</text>
    </svg>
  </figure>`;
}
