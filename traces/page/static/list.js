// The list of episodes: only the rows in sight exist, so ten thousand cost what thirty cost.
const ROW = 58;
const SPARE = 6;

function Episodes({ rows, chosen, choose, open, total }) {
  const box = useRef();
  const [top, setTop] = useState(0);
  const [height, setHeight] = useState(800);
  useLayoutEffect(() => {
    const measure = new ResizeObserver(() => setHeight(box.current?.clientHeight ?? 800));
    measure.observe(box.current);
    return () => measure.disconnect();
  }, []);
  const at = rows.findIndex((row) => row.id === chosen);
  useLayoutEffect(() => {
    const list = box.current;
    if (at < 0 || !list) return;
    if (at * ROW < list.scrollTop) list.scrollTop = at * ROW;
    else if ((at + 1) * ROW > list.scrollTop + list.clientHeight) list.scrollTop = (at + 1) * ROW - list.clientHeight;
  }, [chosen, at]);
  const page = Math.max(1, Math.floor(height / ROW) - 1);
  const steps = { ArrowDown: 1, j: 1, ArrowUp: -1, k: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
  const onKeyDown = (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Enter" && at >= 0) return event.preventDefault(), open();
    if (!(event.key in steps) || rows.length === 0) return;
    event.preventDefault();
    const next = at < 0 ? 0 : at + steps[event.key];
    choose(rows[Math.max(0, Math.min(rows.length - 1, next))].id);
  };
  const first = Math.max(0, Math.floor(top / ROW) - SPARE);
  const last = Math.min(rows.length, Math.ceil((top + height) / ROW) + SPARE);
  const seen = at >= first && at < last;
  return html`<div
    class="list"
    id="list"
    role="listbox"
    tabindex="0"
    aria-label="episodes"
    aria-activedescendant=${seen ? `row-${rows[at].number}` : undefined}
    ref=${box}
    onScroll=${(event) => setTop(event.currentTarget.scrollTop)}
    onKeyDown=${onKeyDown}
  >
    ${rows.length === 0 && html`<p class="empty">${total === 0 ? "No episode yet." : "No episode passes the filter."}</p>`}
    <div class="tall" style=${`height:${rows.length * ROW}px`} role="presentation">
      ${rows.slice(first, last).map(
        (row, place) => html`<${EpisodeRow}
          key=${row.id}
          row=${row}
          place=${first + place}
          count=${rows.length}
          chosen=${row.id === chosen}
          choose=${choose}
        />`,
      )}
    </div>
  </div>`;
}

// Mark, word and class of how an episode came out.
function outcome(row) {
  if (row.status === "unfinished") return ["…", "unfinished", "open"];
  if (row.status !== "ok") return ["!", row.status, "bad"];
  if (row.answer === null) return ["–", "no answer", "bad"];
  if (row.right === null) return ["•", "answered", "open"];
  return row.right ? ["✓", "right", "good"] : ["✗", "wrong", "bad"];
}

function EpisodeRow({ row, place, count, chosen, choose }) {
  const [mark, word, kind] = outcome(row);
  const trouble = row.faults + row.failures;
  return html`<div
    class=${`row ${chosen ? "chosen" : ""}`}
    style=${`top:${place * ROW}px`}
    role="option"
    id=${`row-${row.number}`}
    aria-selected=${chosen ? "true" : "false"}
    aria-setsize=${count}
    aria-posinset=${place + 1}
    onClick=${() => choose(row.id)}
  >
    <span class=${`outcome ${kind}`} title=${word}><span aria-hidden="true">${mark}</span><span class="unseen">${word}: </span></span>
    <span class="question"><bdi>${marked(row.question)}</bdi></span>
    <span class="figure">${row.reward === null ? "" : round(row.reward)}<span class="unseen"> reward</span></span>
    <span class="facts"
      >${row.family && html`<span>${row.family}</span>`}${row.status === "ok"
        ? row.answer !== null && html`<span class="long">answer <bdi>${marked(row.answer)}</bdi></span>`
        : row.error !== null && html`<span class="bad long"><bdi>${marked(row.error)}</bdi></span>`}<span>${plural(row.turns, "turn")}</span
      >${trouble > 0 && html`<span class="bad">${plural(trouble, "fault")}</span>`}${row.notes > 0 && html`<span>remarked</span>`}</span
    >
    <span class="sample">${row.sample > 0 ? `#${row.sample + 1}` : ""}</span>
  </div>`;
}

function Filters({ filter, setFilter, roles, input }) {
  const set = (name) => (event) => setFilter({ ...filter, [name]: event.target.value });
  const choice = (name, label, listed) => html`<select aria-label=${label} value=${filter[name]} onChange=${set(name)}>
    ${listed.map(([value, words]) => html`<option key=${value} value=${value} selected=${filter[name] === value}>${words}</option>`)}
  </select>`;
  const number = (name, label, words) => html`<input
    type="number"
    step="any"
    aria-label=${label}
    placeholder=${words}
    value=${filter[name]}
    onInput=${set(name)}
  />`;
  const named = (table) => Object.entries(table).map(([value, [words]]) => [value, words]);
  const touched = Object.keys(NO_FILTER).some((name) => filter[name] !== NO_FILTER[name]);
  return html`<form class="filters" role="search" aria-label="filters" onSubmit=${(event) => event.preventDefault()}>
    <input
      type="search"
      ref=${input}
      aria-label="text in question, answer, error or any output"
      placeholder="text, press / to get here"
      maxlength="500"
      value=${filter.text}
      onInput=${set("text")}
    />
    ${choice("state", "outcome", named(STATES))} ${choice("role", "role", [["", "any role"], ...roles.map((role) => [role, spoken(role)])])}
    <span class="pair"><span>reward</span>${number("least", "reward from", "from")}${number("most", "reward to", "to")}</span>
    <span class="pair"><span>turns</span>${number("shortest", "turns from", "from")}${number("longest", "turns to", "to")}</span>
    ${choice("order", "order", named(ORDERS))}
    <button type="button" disabled=${!touched} onClick=${() => setFilter(NO_FILTER)}>clear</button>
  </form>`;
}
