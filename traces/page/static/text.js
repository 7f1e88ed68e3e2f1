// Text of models and strangers: only ever text nodes, with every invisible or direction-changing character shown as a mark.
const { html, render, useState, useEffect, useLayoutEffect, useMemo, useRef, useCallback } = window.htmPreact;

const NAMES = {
  0x00ad: "SHY", 0x061c: "ALM", 0x180e: "MVS", 0x200b: "ZWSP", 0x200c: "ZWNJ", 0x200d: "ZWJ", 0x200e: "LRM", 0x200f: "RLM",
  0x2028: "LSEP", 0x2029: "PSEP", 0x202a: "LRE", 0x202b: "RLE", 0x202c: "PDF", 0x202d: "LRO", 0x202e: "RLO", 0x2060: "WJ",
  0x2066: "LRI", 0x2067: "RLI", 0x2068: "FSI", 0x2069: "PDI", 0xfeff: "BOM", 0x1b: "ESC", 0x00: "NUL", 0x07: "BEL", 0x0d: "CR",
};
// Controls, formats (bidi, zero width, tags), private use, lone surrogates; not the line feed and the tab.
const HIDDEN = /(?![\n\t])[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Co}\p{Cs}]/gu;
const CUT = 3000;

function markName(code) {
  return NAMES[code] ?? `U+${code.toString(16).toUpperCase().padStart(4, "0")}`;
}

// The text as an array of strings and marks.
function marked(text) {
  const parts = [];
  let at = 0;
  for (const found of text.matchAll(HIDDEN)) {
    if (found.index > at) parts.push(text.slice(at, found.index));
    const code = found[0].codePointAt(0);
    parts.push(html`<span class="mark" title=${`U+${code.toString(16).toUpperCase().padStart(4, "0")}`}>${markName(code)}</span>`);
    at = found.index + found[0].length;
  }
  parts.push(at ? text.slice(at) : text);
  return parts;
}

// The text as one string, marks in brackets: for titles and labels.
const spoken = (text) => String(text).replace(HIDDEN, (c) => `[${markName(c.codePointAt(0))}]`);

// A cut that does not fall within a character.
const cutAt = (text, most) => text.slice(0, most - (/[\uD800-\uDBFF]/.test(text[most - 1]) ? 1 : 0));

function Said({ text, cut = CUT }) {
  const [shown, setShown] = useState(cut);
  const all = typeof text === "string" ? text : JSON.stringify(text) ?? "";
  if (all.length <= shown) return html`<bdi class="said">${marked(all)}</bdi>`;
  return html`<bdi class="said">${marked(cutAt(all, shown))}…</bdi>
    <button class="more" onClick=${() => setShown(shown * 2 + 50000)}>
      ${all.length > shown * 2 + 50000 ? "show more" : "show all"} (${all.length.toLocaleString("en")} characters)
    </button>`;
}

const round = (value, digits = 3) =>
  typeof value !== "number" ? String(value) : value === 0 ? "0" : Math.abs(value) < 0.001 ? value.toExponential(1) : String(+value.toFixed(digits));

const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;
