// One episode: picture, turns, rewards and remarks.
const regionOf = (span) => (Array.isArray(span.action?.region) && span.action.region.length === 4 ? span.action.region.map(Number) : null);

// Pictures of an episode, each once, with the turns that saw it.
function picturesOf(spans) {
  const found = new Map();
  for (const span of spans)
    for (const [place, image] of span.images.entries()) {
      const one = found.get(image.sha256) ?? { ...image, turns: [] };
      one.turns.push(span.seq);
      one.attention = { ...one.attention, [span.seq]: span.attention?.[place] };
      if (span.latents?.length > 0) one.thinks ??= span.seq;
      one.chosen = { ...one.chosen, [span.seq]: chosenIn(span, place) };
      found.set(image.sha256, one);
    }
  return [...found.values()];
}

// Patches of one of a turn's pictures that its latent steps read again: place in the picture, and the steps, from 1.
function chosenIn(span, place) {
  const sizes = span.images.map((image) => image.placeholder_count ?? 0);
  const first = sizes.slice(0, place).reduce((sum, size) => sum + size, 0);
  const found = new Map();
  for (const [step, latent] of (span.latents ?? []).entries())
    for (const patch of latent.chosen)
      if (patch >= first && patch < first + sizes[place]) found.set(patch - first, [...(found.get(patch - first) ?? []), step + 1]);
  return [...found];
}

// Rows and columns of the patches behind a picture's placeholders: the grid, merged evenly along both sides.
function patchGrid(image) {
  const [time, high, wide] = image.grid ?? [0, 0, 0];
  const merge = Math.round(Math.sqrt((time * high * wide) / (image.placeholder_count || 1)));
  return merge > 0 ? [high / merge, wide / merge] : [0, 0];
}

function Patches({ image, weights }) {
  const [rows, columns] = patchGrid(image);
  if (!weights || rows * columns !== weights.length) return null;
  const most = Math.max(1e-9, ...weights.map(Number));
  const [width, height] = [image.width / columns, image.height / rows];
  return weights.map(
    (weight, place) => html`<rect
      class="patch"
      x=${(place % columns) * width}
      y=${Math.floor(place / columns) * height}
      width=${width}
      height=${height}
      fill-opacity=${0.75 * (1 - Number(weight) / most)}
    >
      <title>patch ${place + 1} of ${weights.length}: ${String(weight)}</title>
    </rect>`,
  );
}

function Chosen({ image, chosen }) {
  const [rows, columns] = patchGrid(image);
  if (!chosen || rows * columns !== image.placeholder_count) return null;
  const [width, height] = [image.width / columns, image.height / rows];
  return chosen.map(([patch, steps]) => {
    const [x, y] = [(patch % columns) * width, Math.floor(patch / columns) * height];
    return html`<g class="reread">
      <rect x=${x} y=${y} width=${width} height=${height} vector-effect="non-scaling-stroke"><title>read again in latent step ${steps.join(", ")}</title></rect>
      <text x=${x + width / 2} y=${y + height / 2} font-size=${height / 2}>${steps.join(" ")}</text>
    </g>`;
  });
}

function Picture({ image, regions, focus, place, count }) {
  const [address, setAddress] = useState("");
  const seen = image.turns.map((turn) => turn + 1).join(", ");
  const small = Math.max(image.width, image.height) < 200;
  const words = `picture ${place + 1} of ${count}, ${image.width} × ${image.height} pixels, seen in turn ${seen}`;
  const [failed, setFailed] = useState(false);
  useEffect(() => {
    source.picture(image.sha256).then(setAddress, () => setFailed(true));
  }, [image.sha256]);
  const weights = focus === null ? null : image.attention?.[focus];
  return html`<figure class="picture">
    <div class="frame">
      ${failed
        ? html`<p class="bad missing">The run lacks picture ${image.sha256.slice(0, 12)}.</p>`
        : address !== "" && html`<img src=${address} alt=${words} class=${small ? "small" : ""} onError=${() => setFailed(true)} />`}
      <svg viewBox=${`0 0 ${image.width} ${image.height}`} preserveAspectRatio="none" aria-hidden="true">
        <${Patches} image=${image} weights=${weights} />
        <${Chosen} image=${image} chosen=${image.chosen?.[focus === null ? image.thinks : focus]} />
        ${regions.map(
          ({ seq, box: [left, top, right, bottom] }) => html`<g class=${seq === focus || seq + 1 === focus ? "region lit" : "region"}>
            <rect
              x=${left * image.width}
              y=${top * image.height}
              width=${(right - left) * image.width}
              height=${(bottom - top) * image.height}
              vector-effect="non-scaling-stroke"
            >
              <title>region of turn ${seq + 1}: ${[left, top, right, bottom].join(", ")}</title>
            </rect>
          </g>`,
        )}
      </svg>
    </div>
    <figcaption>
      ${words}${regions.length > 0 && `; ${plural(regions.length, "region")} enlarged: turn ${regions.map((one) => one.seq + 1).join(", ")}`}
    </figcaption>
  </figure>`;
}

function Pictures({ detail, focus }) {
  const pictures = useMemo(() => picturesOf(detail.spans), [detail]);
  const regions = useMemo(
    () => detail.spans.map((span) => ({ seq: span.seq, box: regionOf(span) })).filter((one) => one.box !== null),
    [detail],
  );
  if (pictures.length === 0) return html`<p class="empty">No turn of this episode saw a picture.</p>`;
  return html`<div class="pictures">
    ${pictures.map(
      (image, place) => html`<${Picture}
        key=${image.sha256}
        image=${image}
        regions=${place === 0 ? regions : []}
        focus=${focus}
        place=${place}
        count=${pictures.length}
      />`,
    )}
  </div>`;
}

function Part({ part }) {
  if (part.type === "text") return html`<p><${Said} text=${part.content ?? ""} /></p>`;
  if (part.type === "uri") return html`<p class="quiet">picture ${spoken(part.uri ?? "").split("/").pop().slice(0, 12)}</p>`;
  if (part.type === "choices") return html`<p>choices: ${(part.choices ?? []).map((one, place) => [place > 0 && " | ", html`<${Said} text=${one} />`])}</p>`;
  return html`<p><span class="quiet">${spoken(part.type ?? "part")}</span> <${Said} text=${JSON.stringify(part)} /></p>`;
}

function Heard({ messages }) {
  if (messages.length === 0) return null;
  return html`<details class="heard">
    <summary>heard ${plural(messages.length, "new message")}</summary>
    ${messages.map(
      (message) => html`<div class="message">
        <span class="who">${spoken(message.role ?? "?")}</span>
        <div>${(message.parts ?? []).map((part) => html`<${Part} part=${part} />`)}</div>
      </div>`,
    )}
  </details>`;
}

function Action({ action }) {
  if (action === null) return null;
  const { kind, ...rest } = action;
  const words = Object.entries(rest).filter(([, value]) => value !== null);
  return html`<dl class="action" aria-label="parsed action">
    <div><dt>does</dt><dd><b>${spoken(kind ?? "?")}</b></dd></div>
    ${words.map(([name, value]) => html`<div><dt>${spoken(name)}</dt><dd><${Said} text=${value} cut=${400} /></dd></div>`)}
  </dl>`;
}

function Reply({ span, mode }) {
  const tokens = span.tokens;
  if (tokens === null) return html`<div class="reply"><${Said} text=${span.output ?? ""} /></div>`;
  const recorded = mode !== "plain" && tokens.values[mode] !== null;
  const missing = mode !== "plain" && !recorded && html`<p class="quiet">${MODES[mode]} not recorded</p>`;
  const label = `reply of ${spoken(span.role ?? "?")}, ${plural(tokens.ids.length, "token")}; arrow keys read them one by one`;
  if (mode === "plain" || (tokens.text === null && !recorded)) return html`<div class="reply"><${Said} text=${span.output ?? ""} />${missing}</div>`;
  return html`<div class="reply">
    ${tokens.text === null && html`<p><${Said} text=${span.output ?? ""} /></p><p class="quiet">The tokenizer is not at hand; token ids:</p>`}
    <${Tokens} key=${span.id} tokens=${tokens} mode=${mode} label=${label} />${missing}
  </div>`;
}

function Latents({ latents }) {
  if (latents.length === 0) return null;
  const nearest = (latent) => latent.words.map((word, place) => `${spoken(word)} ${round(latent.chances[place])}`).join(", ");
  return html`<table class="latents">
    <thead><tr><th>latent step</th><th>nearest words</th><th>patches read again</th><th>norm</th></tr></thead>
    <tbody>
      ${latents.map(
        (latent) => html`<tr>
          <td>${latent.step + 1}</td><td>${latent.words.length > 0 ? nearest(latent) : "not recorded"}</td>
          <td>${latent.chosen.map((patch) => patch + 1).join(", ") || "none"}</td><td>${latent.norm == null ? "not told" : round(latent.norm)}</td>
        </tr>`,
      )}
    </tbody>
  </table>`;
}

function Flags({ span }) {
  const flags = [
    span.truncated && ["cut off", "the reply reached its limit of tokens"],
    span.finish === "abort" && ["aborted", "the engine stopped the call"],
    span.broken && [`prompt broken: ${span.broken}`, "this prompt does not begin with what the stream had before"],
    span.trainable === false && ["not trained", "this policy is frozen"],
  ].filter(Boolean);
  return flags.map(([words, why]) => html`<span class="flag" title=${why}>${words}</span>`);
}

function Notes({ notes }) {
  return notes.map(
    (note) => html`<div class=${`note ${String(note.source).startsWith("person") ? "person" : ""}`}>
      <span class="name">${spoken(note.name)}</span>
      ${note.value !== null && html`<span class="value" title=${String(note.value)}>${round(note.value)}</span>`}
      ${note.values && html`<span>${plural(note.values.length, "value")}, one a token </span>`}
      ${note.text !== null && html`<${Said} text=${note.text} cut=${600} />`}
      <span class="quiet"
        >${spoken(note.source)}${note.scope !== "episode" ? `, ${note.scope}${note.role ? ` ${spoken(note.role)}` : ""}` : ""}${note.weight
          ? `, weight ${round(note.weight)}`
          : ""}</span
      >
    </div>`,
  );
}

const TONES = ["a", "b", "c", "d", "e"];

function Turn({ span, mode, notes, tone, focus, setFocus }) {
  const title = span.kind === "tool" ? `tool ${spoken(span.tool ?? "?")}` : spoken(span.role ?? span.name);
  const count = span.tokens?.ids.length;
  const cost = [count !== undefined && plural(count, "token"), `${span.ms < 10 ? round(span.ms, 1) : Math.round(span.ms).toLocaleString("en")} ms`];
  return html`<li
    class=${`turn tone-${tone} ${span.kind}`}
    onMouseEnter=${() => setFocus(span.seq)}
    onfocusin=${() => setFocus(span.seq)}
    onMouseLeave=${() => setFocus(null)}
    data-turn=${span.seq}
  >
    <header>
      <h3><span class="number">${span.seq + 1}</span> ${title}</h3>
      ${span.node && html`<span class="where">${spoken(span.node)}${span.edge ? ` → ${spoken(span.edge)}` : ""}</span>`}
      <${Flags} span=${span} />
      ${facts(span) === ""
        ? html`<span class="cost">${cost.filter(Boolean).join(", ")}</span>`
        : html`<details class="cost"><summary>${cost.filter(Boolean).join(", ")}</summary><pre>${facts(span)}</pre></details>`}
    </header>
    ${span.kind === "policy" && html`<${Heard} messages=${span.messages} /><${Reply} span=${span} mode=${mode} /><${Action} action=${span.action} />`}
    ${span.kind === "tool" && html`<${ToolCall} span=${span} />`}
    ${span.fault && html`<p class="fault"><b>no action:</b> <${Said} text=${span.fault} /></p>`}
    ${span.error && html`<p class="fault"><b>error:</b> <${Said} text=${span.error} /></p>`}
    <${Latents} latents=${span.latents ?? []} />
    ${span.attention?.some(Boolean) && html`<p class="quiet">Patches attended to are shown on the picture while the pointer or focus is here.</p>`}
    <${Notes} notes=${notes} />
  </li>`;
}

const facts = (span) =>
  Object.entries({ model: span.model, policy: span.policy, weights: span.weights, engine: span.engine, temperature: span.temperature,
    seed: span.seed, "prompt tokens": span.input, "of them cached": span.cached, "of them known before": span.prefix, finish: span.finish })
    .filter(([, value]) => value !== null && value !== undefined)
    .map(([name, value]) => `${name}: ${spoken(value)}`)
    .join("\n");

function ToolCall({ span }) {
  return html`<dl class="action" aria-label="tool call">
    <div><dt>arguments</dt><dd><${Said} text=${span.arguments ?? ""} cut=${1000} /></dd></div>
    <div><dt>result</dt><dd>${span.result === null ? html`<span class="quiet">none</span>` : html`<${Said} text=${span.result} cut=${1000} />`}</dd></div>
  </dl>`;
}

// Each role has its tone, in the order in which they speak.
function tonesOf(spans) {
  const tones = new Map();
  for (const span of spans) {
    const who = span.kind === "tool" ? " tool" : span.role ?? span.name;
    if (!tones.has(who)) tones.set(who, span.kind === "tool" ? "tool" : TONES[tones.size % TONES.length]);
  }
  return (span) => tones.get(span.kind === "tool" ? " tool" : span.role ?? span.name);
}

function Turns({ detail, mode, focus, setFocus }) {
  const tone = useMemo(() => tonesOf(detail.spans), [detail]);
  const [most, setMost] = useState(100);
  const shown = detail.spans.slice(0, most);
  return html`<ol class="turns" aria-label="turns">
      ${shown.map(
        (span) => html`<${Turn}
          key=${span.id}
          span=${span}
          mode=${mode}
          tone=${tone(span)}
          focus=${focus}
          setFocus=${setFocus}
          notes=${detail.notes.filter((note) => note.span_id === span.id && note.scope !== "token")}
        />`,
      )}
    </ol>
    ${detail.spans.length > most && html`<button class="more" onClick=${() => setMost(most + 200)}>more of ${plural(detail.spans.length, "turn")}</button>`}`;
}

function Verdict({ detail }) {
  const { start, end } = detail;
  const gold = start.gold === null ? null : start.choices[start.gold];
  if (end === null) return html`<p class="verdict open">The episode has not ended.</p>`;
  if (end.status !== "ok") return html`<p class="verdict bad">${spoken(end.status)}: <${Said} text=${end.error ?? "no cause given"} cut=${600} /></p>`;
  if (end.answer === null) return html`<p class="verdict bad">No answer within its budget.${gold !== null && html` Right is <${Said} text=${gold} cut=${300} />.`}</p>`;
  if (gold === null) return html`<p class="verdict open">Answer: <b><${Said} text=${end.answer} cut=${300} /></b></p>`;
  const right = same(end.answer, gold);
  return html`<p class=${`verdict ${right ? "good" : "bad"}`}>
    Answer: <b><${Said} text=${end.answer} cut=${300} /></b>, ${right ? "right." : html`wrong. Right is <b><${Said} text=${gold} cut=${300} /></b>.`}
  </p>`;
}

function Remark({ detail, done }) {
  const empty = { span: "", score: "", remark: "" };
  const [wish, setWish] = useState(empty);
  const [told, setTold] = useState("");
  const set = (name) => (event) => setWish({ ...wish, [name]: event.target.value });
  const send = async (event) => {
    event.preventDefault();
    try {
      await source.annotate({
        episode_id: detail.start.episode_id,
        span_id: wish.span || null,
        score: wish.score.trim() === "" ? null : Number(wish.score),
        remark: wish.remark.trim() || null,
      });
      setWish(empty);
      setTold("Written to the run.");
      done();
    } catch (error) {
      setTold(`Not written: ${error.message}`);
    }
  };
  return html`<form class="remark" onSubmit=${send} aria-label="add an annotation">
    <label>about
      <select value=${wish.span} onChange=${set("span")}>
        <option value="" selected=${wish.span === ""}>the whole episode</option>
        ${detail.spans.map((span) => html`<option value=${span.id} selected=${wish.span === span.id}>turn ${span.seq + 1}, ${spoken(span.role ?? span.tool ?? span.name)}</option>`)}
      </select>
    </label>
    <label>score <input type="number" step="any" value=${wish.score} onInput=${set("score")} /></label>
    <label class="wide">remark <textarea rows="2" maxlength="4000" value=${wish.remark} onInput=${set("remark")}></textarea></label>
    <button type="submit" disabled=${wish.score.trim() === "" && wish.remark.trim() === ""}>add</button>
    <span role="status">${told}</span>
  </form>`;
}
