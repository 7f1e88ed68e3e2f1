// Tokens of a reply, shaded by a value that each of them has; the exact value on hover and on focus.
const MODES = { logprob: "log-prob", entropy: "entropy", advantage: "advantage", plain: "nothing" };
const MOST_TOKENS = 1000;
const LONGEST_TOKEN = 200;
// Per cent of the shade: more, and light text on it falls below a contrast of 4.5.
const STRONGEST = 62;

// Class and strength of a value's shade. Log-probs: 0 is certain, -4 nats and less is full.
function shade(mode, value, scale) {
  const number = Number(value);
  if (value === null || value === undefined) return ["", 0];
  if (Number.isNaN(number)) return ["bad", 60];
  if (mode === "logprob") return ["low", STRONGEST * Math.min(1, -number / 4)];
  if (mode === "entropy") return ["low", STRONGEST * Math.min(1, number / 3)];
  return [number < 0 ? "minus" : "plus", STRONGEST * Math.min(1, Math.abs(number) / scale)];
}

function tokenLabel(tokens, place) {
  const value = (mode) => (tokens.values[mode] === null ? "not recorded" : String(tokens.values[mode][place]));
  const text = tokens.text === null ? "" : `${JSON.stringify(spoken(tokens.text[place].slice(0, LONGEST_TOKEN)))}  `;
  const masked = tokens.mask !== null && !tokens.mask[place] ? ", not trained on" : "";
  return `${text}id ${tokens.ids[place]}, token ${place + 1} of ${tokens.ids.length}${masked}
log-prob ${value("logprob")}
entropy ${value("entropy")}
advantage ${value("advantage")}`;
}

function tokenBody(tokens, place) {
  if (tokens.text === null) return String(tokens.ids[place]);
  const text = tokens.text[place];
  const cut = text.length > LONGEST_TOKEN ? `${cutAt(text, LONGEST_TOKEN)}… (${text.length} characters)` : text;
  return cut === "" ? html`<span class="mark">empty</span>` : marked(cut);
}

// One tab stop for the whole reply; arrow keys go from token to token.
function Tokens({ tokens, mode, label }) {
  const [at, setAt] = useState(null);
  const [most, setMost] = useState(MOST_TOKENS);
  const box = useRef();
  const values = tokens.values[mode];
  const scale = useMemo(() => Math.max(1e-9, ...(values ?? [1]).map((one) => Math.abs(Number(one)) || 0).slice(0, 100000)), [values]);
  const placeOf = (event) => {
    const token = event.target.closest?.("[data-place]");
    return token ? Number(token.dataset.place) : null;
  };
  const move = (event) => {
    const steps = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity };
    if (!(event.key in steps)) return;
    event.preventDefault();
    event.stopPropagation();
    const next = Math.max(0, Math.min(Math.min(most, tokens.ids.length) - 1, (at ?? -1) + steps[event.key]));
    setAt(next);
    box.current.querySelector(`[data-place="${next}"]`)?.focus();
  };
  const shown = tokens.ids.slice(0, most);
  const body = useMemo(
    () =>
      shown.map((id, place) => {
        const [kind, strength] = shade(mode, values?.[place], scale);
        const masked = tokens.mask !== null && !tokens.mask[place] ? " masked" : "";
        return html`<span
          class=${`token ${kind}${masked}`}
          data-place=${place}
          tabindex=${place === 0 ? 0 : -1}
          style=${`--strength:${strength.toFixed(1)}%`}
          aria-label=${tokenLabel(tokens, place)}
          role="img"
          >${tokenBody(tokens, place)}</span
        >${tokens.text === null ? "" : tokens.gap}`;
      }),
    [tokens, mode, most, scale],
  );
  return html`<div
    class=${`tokens ${tokens.text === null ? "ids" : ""}`}
    ref=${box}
    role="group"
    aria-label=${label}
    onMouseOver=${(event) => setAt(placeOf(event))}
    onMouseLeave=${() => setAt(null)}
    onfocusin=${(event) => setAt(placeOf(event))}
    onfocusout=${() => setAt(null)}
    onKeyDown=${move}
  >
    ${body}
    ${tokens.ids.length > most &&
    html`<button class="more" onClick=${() => setMost(most * 10)}>more of ${plural(tokens.ids.length, "token")}</button>`}
    ${at !== null && at < tokens.ids.length && html`<${Readout} box=${box} place=${at} text=${tokenLabel(tokens, at)} />`}
  </div>`;
}

// The exact values, beside the token they belong to.
function Readout({ box, place, text }) {
  const card = useRef();
  useLayoutEffect(() => {
    const token = box.current.querySelector(`[data-place="${place}"]`);
    if (!token) return;
    const [room, spot] = [box.current.getBoundingClientRect(), (token.getClientRects()[0] ?? token.getBoundingClientRect())];
    const left = Math.max(0, Math.min(spot.left - room.left, room.width - card.current.offsetWidth));
    card.current.style.left = `${left}px`;
    const above = spot.top - card.current.offsetHeight > 60;
    card.current.style.top = `${above ? spot.top - room.top - card.current.offsetHeight - 4 : spot.bottom - room.top + 4}px`;
  });
  return html`<div class="readout" ref=${card} aria-hidden="true">${text}</div>`;
}

function Legend({ mode }) {
  if (mode === "plain") return null;
  const [left, right, kind] = {
    logprob: ["certain", "−4 nats or less", "low"],
    entropy: ["certain", "3 nats or more", "low"],
    advantage: ["negative", "positive", "both"],
  }[mode];
  return html`<span class="legend" aria-hidden="true">${left}<i class=${kind}></i>${right}</span>`;
}
