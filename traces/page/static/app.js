// The page: what is chosen, what is shown, what keys do, and following a run that is still written.
const POLL = 1000;
const GROUP_MOST = 12;

// The listing, kept up to date: rows by number, and facts of the run.
function useListing() {
  const [listing, setListing] = useState({ rows: [], facts: null, revision: 0, error: "" });
  const now = useRef(listing);
  const poll = useCallback(async () => {
    try {
      const answer = await source.index(now.current.revision);
      const changed = answer.rows.length > 0 || (answer.damaged ?? 0) !== (now.current.facts?.damaged ?? 0);
      if (changed || now.current.facts === null || now.current.error !== "" || answer.reading !== now.current.facts.reading) {
        const rows = now.current.rows.slice();
        for (const values of answer.rows) rows[values[0]] = rowOf(answer.fields, values);
        const facts = answer.same ? { ...now.current.facts, reading: false } : { ...answer, rows: null };
        now.current = { rows, facts, revision: answer.revision, error: "" };
        setListing(now.current);
      }
      return answer.reading === true;
    } catch (error) {
      if (now.current.error === "") setListing((now.current = { ...now.current, error: error.message || "no answer" }));
      return false;
    }
  }, []);
  useEffect(() => {
    let timer;
    const again = async () => {
      const reading = await poll();
      if (boot.served) timer = setTimeout(again, reading ? 150 : document.hidden ? 5 * POLL : POLL);
    };
    again();
    return () => clearTimeout(timer);
  }, []);
  return [listing, poll];
}

// An episode's detail, read again when its row changes.
function useDetail(row) {
  const [found, setFound] = useState({ id: null, detail: null, error: "" });
  const stamp = row && `${row.id} ${row.status} ${row.turns} ${row.notes} ${row.reward} ${row.stamp ?? 0}`;
  const [again, setAgain] = useState(0);
  useEffect(() => {
    if (!row) return;
    let stale = false;
    const timer = setTimeout(
      async () => {
        try {
          const detail = await source.episode(row);
          if (!stale) setFound({ id: row.id, detail, error: "" });
        } catch (error) {
          if (!stale) setFound({ id: row.id, detail: null, error: error.message });
        }
      },
      found.id === row.id || found.id === null ? 0 : 40,
    );
    return () => ((stale = true), clearTimeout(timer));
  }, [stamp, again]);
  return [found.id === row?.id ? found : { detail: null, error: "", stale: found.detail }, () => setAgain((count) => count + 1)];
}

// Numbers of rows whose outputs hold the text; null while unknown.
function useSearch(text, revision) {
  const [said, setSaid] = useState(null);
  useEffect(() => {
    if (text.trim() === "") return setSaid(null);
    let stale = false;
    const timer = setTimeout(async () => {
      const numbers = await source.search(text.trim()).catch(() => []);
      if (!stale) setSaid(new Set(numbers));
    }, 120);
    return () => ((stale = true), clearTimeout(timer));
  }, [text, revision]);
  return said;
}

const fromAddress = () => new URLSearchParams(location.hash.slice(1));

function App() {
  const [listing, poll] = useListing();
  const [filter, setFilter] = useState(NO_FILTER);
  const [chosen, setChosen] = useState(fromAddress().get("episode"));
  const [view, setView] = useState(fromAddress().get("view") ?? "episode");
  const [curves, setCurves] = useState([]);
  const [mode, setMode] = useState("logprob");
  const said = useSearch(filter.text, listing.revision);
  const rows = useMemo(() => filtered(listing.rows, filter, said), [listing, filter, said]);
  const roles = useMemo(() => [...new Set(listing.rows.flatMap((row) => row.roles))].sort(), [listing]);
  const row = useMemo(() => listing.rows.find((one) => one.id === chosen) ?? null, [listing, chosen]);
  const input = useRef();
  const pane = useRef();

  useEffect(() => {
    source.curves().then(setCurves, () => setCurves([]));
  }, [listing.facts?.revision > 0 && Math.floor(listing.revision / 20)]);
  useEffect(() => {
    if (chosen === null && rows.length > 0) setChosen(rows[0].id);
  }, [rows]);
  useEffect(() => {
    history.replaceState(null, "", `#${new URLSearchParams({ ...(chosen && { episode: chosen }), view })}`);
  }, [chosen, view]);
  const open = () => pane.current?.querySelector("h2")?.focus();
  useEffect(() => {
    const onKey = (event) => {
      const typing = event.target.closest?.("input, textarea, select");
      if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey) event.preventDefault(), input.current.focus();
      if (event.key === "Escape") document.getElementById("list").focus();
      if ((event.key === "j" || event.key === "k") && !typing && document.activeElement?.id !== "list" && !event.ctrlKey && !event.metaKey) {
        const at = rows.findIndex((one) => one.id === chosen);
        const next = rows[Math.max(0, Math.min(rows.length - 1, at + (event.key === "j" ? 1 : -1)))];
        if (next) setChosen(next.id);
      }
    };
    document.addEventListener("keydown", onKey);
    return () => document.removeEventListener("keydown", onKey);
  }, [rows, chosen]);

  return html`<a class="skip" href="#pane" onClick=${(event) => (event.preventDefault(), open())}>skip to the episode</a>
    <${Top} listing=${listing} rows=${rows} view=${view} setView=${setView} curves=${curves} row=${row} />
    <aside aria-label="episodes">
      <${Filters} filter=${filter} setFilter=${setFilter} roles=${roles} input=${input} />
      <${Episodes} rows=${rows} total=${listing.rows.length} chosen=${chosen} choose=${setChosen} open=${open} />
    </aside>
    <main ref=${pane} id="pane">
      ${view === "curves"
        ? html`<${Curves} curves=${curves} />`
        : row === null
          ? html`<p class="empty">${listing.facts === null ? "Reading the run…" : chosen ? "This run has no such episode." : "No episode is chosen."}</p>`
          : view === "group"
            ? html`<${Group} row=${row} rows=${listing.rows} mode=${mode} choose=${(id) => (setChosen(id), setView("episode"))} />`
            : html`<${Episode} row=${row} mode=${mode} setMode=${setMode} graphs=${listing.facts?.graphs} poll=${poll} />`}
    </main>`;
}

function Top({ listing, rows, view, setView, curves, row }) {
  const facts = listing.facts;
  const scored = rows.filter((one) => one.reward !== null);
  const mean = scored.reduce((sum, one) => sum + one.reward, 0) / (scored.length || 1);
  const spread = Math.sqrt(scored.reduce((sum, one) => sum + (one.reward - mean) ** 2, 0) / Math.max(1, scored.length - 1) / (scored.length || 1));
  const failed = rows.filter((one) => one.status === "failed" || one.status === "cancelled").length;
  const mates = row === null ? 0 : listing.rows.filter((one) => one.group === row.group).length;
  const live = boot.served && facts !== null && facts.open > 0;
  const tabs = [["episode", "episode"], ["group", `group of ${mates}`], ...(curves.length > 0 ? [["curves", "training curves"]] : [])];
  return html`<header class="top">
    <h1><bdi>${marked(boot.name)}</bdi></h1>
    <p class="sum" role="status">
      ${plural(rows.length, "episode")}${facts !== null && rows.length !== listing.rows.length ? ` of ${listing.rows.length.toLocaleString("en")}` : ""}
      ${scored.length > 0 && html`<span>mean reward <b title=${String(mean)}>${mean.toFixed(3)}</b> ± ${spread.toFixed(3)}</span>`}
      ${failed > 0 && html`<span class="bad">${failed.toLocaleString("en")} failed</span>`}
      ${live && html`<span class="live">${plural(facts.open, "episode")} under way</span>`}
      ${facts?.reading && html`<span>reading…</span>`}
    </p>
    <nav aria-label="view">
      ${tabs.map(([name, words]) => html`<button aria-pressed=${view === name ? "true" : "false"} onClick=${() => setView(name)}>${words}</button>`)}
    </nav>
    ${listing.error !== "" && html`<p class="alarm" role="alert">The server does not answer (${listing.error}); what is shown stays.</p>`}
    ${facts?.damaged > 0 &&
    html`<p class="alarm" role="alert" title=${facts.damage.map(spoken).join("\n")}>
      ${plural(facts.damaged, "line")} of this run cannot be read. First: ${spoken(facts.damage[0])}
    </p>`}
  </header>`;
}

function ModeSwitch({ mode, setMode }) {
  return html`<fieldset class="modes">
    <legend>shade by</legend>
    ${Object.entries(MODES).map(
      ([name, words]) => html`<label><input type="radio" name="mode" value=${name} checked=${mode === name} onChange=${() => setMode(name)} />${words}</label>`,
    )}
    <${Legend} mode=${mode} />
  </fieldset>`;
}

function Episode({ row, mode, setMode, graphs, poll }) {
  const [{ detail, error, stale }, reload] = useDetail(row);
  const [focus, setFocus] = useState(null);
  useEffect(() => setFocus(null), [row.id]);
  if (error) return html`<p class="alarm" role="alert">This episode cannot be shown: <${Said} text=${error} /></p>`;
  if (detail === null) return html`<article class="episode" aria-busy="true"><h2 tabindex="-1">${stale ? "" : "Reading…"}</h2></article>`;
  const { start } = detail;
  const whole = detail.notes.filter((note) => note.span_id === null || note.scope === "token");
  return html`<article class="episode" key=${row.id} aria-label="episode">
    <header>
      <h2 tabindex="-1"><${Said} text=${start.question} cut=${600} /></h2>
      ${start.choices.length > 0 && html`<p class="choices">${start.choices.map((one, place) => html`<span class=${place === start.gold ? "gold" : ""}><${Said} text=${one} cut=${200} />${place === start.gold && html`<span class="unseen"> (right)</span>`}</span>`)}</p>`}
      <p class="quiet ids">
        <code title=${row.id}>${row.id.slice(0, 12)}</code> <span>${spoken(start.problem_id)}</span>
        <span>graph ${spoken(start.graph)}</span> <span>sample ${start.sample_index + 1}</span>${start.attempt > 0 && html` <span>attempt ${start.attempt + 1}</span>`}
        ${Object.entries(start.extra ?? {}).map(([name, value]) => html` <span>${spoken(name)}: ${spoken(typeof value === "string" ? value : JSON.stringify(value))}</span>`)}
      </p>
    </header>
    <div class="columns">
      <div class="side">
        <${Pictures} detail=${detail} focus=${focus} />
        <section aria-label="outcome"><${Verdict} detail=${detail} />
          ${detail.reward !== null && html`<p class="total">reward <b title=${String(detail.reward)}>${round(detail.reward)}</b></p>`}
          <${Notes} notes=${whole} />
        </section>
        ${source.annotate !== null && html`<${Remark} key=${row.id} detail=${detail} done=${() => (reload(), poll())} />`}
      </div>
      <div class="talk">
        <${ModeSwitch} mode=${mode} setMode=${setMode} />
        <${Turns} detail=${detail} mode=${mode} focus=${focus} setFocus=${setFocus} />
      </div>
    </div>
    <section aria-label="path"><h3>Path through the graph</h3><${Graph} path=${detail.path} run=${graphs?.[start.graph]} /></section>
  </article>`;
}

function Group({ row, rows, mode, choose }) {
  const mates = useMemo(() => rows.filter((one) => one.group === row.group).sort((a, b) => a.sample - b.sample || a.number - b.number), [rows, row.group]);
  const [most, setMost] = useState(GROUP_MOST);
  const [{ detail }] = useDetail(row);
  const scored = mates.filter((one) => one.reward !== null);
  const mean = scored.reduce((sum, one) => sum + one.reward, 0) / (scored.length || 1);
  return html`<section class="group" aria-label="group">
    <h2 tabindex="-1"><${Said} text=${row.question} cut=${600} /></h2>
    <p class="quiet">
      ${plural(mates.length, "episode")} of group ${spoken(row.group)}${scored.length > 0 && `, mean reward ${round(mean)}`}${row.gold !== null && html`, right is <${Said} text=${row.gold} cut=${200} />`}
    </p>
    ${detail && picturesOf(detail.spans).length > 0 && html`<${Pictures} detail=${detail} focus=${null} />`}
    <div class="mates" tabindex="0" role="list" aria-label="episodes of the group">
      ${mates.slice(0, most).map((one) => html`<${Mate} key=${one.id} row=${one} mean=${scored.length > 1 ? mean : null} mode=${mode} choose=${choose} />`)}
    </div>
    ${mates.length > most && html`<button class="more" onClick=${() => setMost(most + GROUP_MOST)}>more of ${plural(mates.length, "episode")}</button>`}
  </section>`;
}

function Mate({ row, mean, mode, choose }) {
  const [{ detail, error }] = useDetail(row);
  const [mark, word, kind] = outcome(row);
  const tone = useMemo(() => (detail ? tonesOf(detail.spans) : null), [detail]);
  return html`<article class="mate" role="listitem">
    <header>
      <span class=${`outcome ${kind}`}><span aria-hidden="true">${mark}</span><span class="unseen">${word}</span></span>
      <h3 aria-label=${`sample ${row.sample + 1}`}>#${row.sample + 1}</h3>
      <span class="figure"
        >${row.reward !== null && html`<span title=${`reward ${row.reward}`}>${round(row.reward)}</span>`}${row.reward !== null && mean !== null &&
        html` <span class="quiet" title="reward less the group's mean">(${row.reward - mean >= 0 ? "+" : "−"}${round(Math.abs(row.reward - mean))})</span>`}</span
      >
      <button onClick=${() => choose(row.id)}>open</button>
    </header>
    ${error && html`<p class="fault"><${Said} text=${error} /></p>`}
    ${detail &&
    html`<ol class="turns">
        ${detail.spans.slice(0, 60).map(
          (span) => html`<li class=${`turn tone-${tone(span)} ${span.kind}`}>
            <span class="who">${spoken(span.kind === "tool" ? (span.tool ?? "tool") : (span.role ?? span.name))}</span>
            ${span.kind === "policy" ? html`<${Reply} span=${span} mode=${mode} />` : html`<${ToolCall} span=${span} />`}
            ${(span.fault || span.error) && html`<p class="fault"><${Said} text=${span.error ?? span.fault} cut=${300} /></p>`}
          </li>`,
        )}
      </ol>
      <${Verdict} detail=${detail} />`}
  </article>`;
}

function Curves({ curves }) {
  if (curves.length === 0) return html`<p class="empty">The run has no training curves.</p>`;
  return html`<section aria-label="training curves">
    <h2 tabindex="-1">Training curves</h2>
    <div class="curves">${curves.map((curve) => html`<${Curve} key=${`${curve.stage} ${curve.name}`} curve=${curve} />`)}</div>
  </section>`;
}

document.title = `${spoken(boot.name)} · monologue`;
document.getElementById("page").textContent = "";
render(html`<${App} />`, document.getElementById("page"));
