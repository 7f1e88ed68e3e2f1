// Where the page's data comes from: the server that serves it, or the file that holds it. Both answer the same questions.
const boot = JSON.parse(document.getElementById("boot").textContent);

function servedSource() {
  const get = async (path) => {
    const answer = await fetch(path, { cache: "no-store" });
    if (!answer.ok) throw new Error(await answer.text());
    return answer.json();
  };
  return {
    index: (after) => get(`api/index?after=${after}`),
    episode: (row) => get(`api/episode?id=${encodeURIComponent(row.id)}`),
    search: (text) => get(`api/search?q=${encodeURIComponent(text)}`),
    curves: () => get("api/curves"),
    picture: async (sha256) => `image/${sha256}.png`,
    async annotate(wish) {
      const answer = await fetch("api/annotate", {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify(wish),
      });
      if (!answer.ok) throw new Error(await answer.text());
      return answer.json();
    },
  };
}

function fileSource() {
  const parsed = new Map();
  // The browser may still be reading the file: an element is whole once something follows it.
  const whole = (name) => {
    const element = document.getElementById(name);
    return element && (element.nextElementSibling || document.readyState !== "loading") ? element.textContent : null;
  };
  const present = async (name) => {
    for (;;) {
      const [done, text] = [document.readyState !== "loading", whole(name)];
      if (text !== null) return text;
      if (done) throw new Error(`the file lacks its part ${name}; it was cut off`);
      await new Promise((next) => setTimeout(next, 30));
    }
  };
  const unpack = async (name) => {
    const packed = Uint8Array.from(atob(await present(name)), (c) => c.charCodeAt(0));
    const plain = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(plain).json();
  };
  const part = (name) => {
    if (!parsed.has(name)) parsed.set(name, unpack(name));
    return parsed.get(name);
  };
  return {
    index: async () => JSON.parse(await present("index")),
    async episode(row) {
      const found = (await part(`episodes-${Math.floor(row.number / boot.chunk)}`))[row.number % boot.chunk];
      if (found.fault) throw new Error(found.fault);
      return found;
    },
    async search(text) {
      const wanted = text.toLowerCase();
      return (await part("texts")).flatMap((said, number) => (said.includes(wanted) ? [number] : []));
    },
    curves: async () => JSON.parse(await present("curves")),
    picture: async (sha256) => `data:image/png;base64,${await present(`picture-${sha256}`)}`,
    annotate: null,
  };
}

const source = boot.served ? servedSource() : fileSource();

// A row of the listing as an object.
function rowOf(fields, values) {
  const row = { number: values[0] };
  fields.forEach((name, place) => (row[name] = values[place + 1]));
  row.right = row.gold === null || row.answer === null ? null : same(row.answer, row.gold);
  row.haystack = [row.id, row.problem, row.family, row.question, row.answer, row.gold, row.error].join("\n").toLowerCase();
  return row;
}

const same = (a, b) => a.trim().toLowerCase() === b.trim().toLowerCase();

const NO_FILTER = { text: "", role: "", state: "", least: "", most: "", shortest: "", longest: "", order: "run" };

const STATES = {
  "": ["any outcome", () => true],
  right: ["right answer", (row) => row.right === true],
  wrong: ["wrong answer", (row) => row.right === false],
  none: ["no answer", (row) => row.status === "ok" && row.answer === null],
  error: ["any error", (row) => row.status === "failed" || row.failures > 0 || row.faults > 0],
  failed: ["failed or cancelled", (row) => row.status === "failed" || row.status === "cancelled"],
  fault: ["a reply did not parse", (row) => row.faults > 0],
  unfinished: ["unfinished", (row) => row.status === "unfinished"],
  noted: ["remarked by a person", (row) => row.notes > 0],
};

const ORDERS = {
  run: ["in order of play", (a, b) => a.number - b.number],
  newest: ["newest first", (a, b) => b.number - a.number],
  low: ["lowest reward first", (a, b) => (a.reward ?? Infinity) - (b.reward ?? Infinity) || a.number - b.number],
  high: ["highest reward first", (a, b) => (b.reward ?? -Infinity) - (a.reward ?? -Infinity) || a.number - b.number],
  long: ["longest first", (a, b) => b.turns - a.turns || b.tokens - a.tokens || a.number - b.number],
};

// Rows that pass the filter, in its order. `said`: numbers of rows whose outputs hold the text, or null while unknown.
function filtered(rows, filter, said) {
  const text = filter.text.trim().toLowerCase();
  const [least, most, shortest, longest] = [filter.least, filter.most, filter.shortest, filter.longest].map((one) =>
    one === "" ? null : Number(one),
  );
  const passes = STATES[filter.state][1];
  const kept = rows.filter(
    (row) =>
      passes(row) &&
      (filter.role === "" || row.roles.includes(filter.role)) &&
      (least === null || (row.reward !== null && row.reward >= least)) &&
      (most === null || (row.reward !== null && row.reward <= most)) &&
      (shortest === null || row.turns >= shortest) &&
      (longest === null || row.turns <= longest) &&
      (text === "" || row.haystack.includes(text) || (said !== null && said.has(row.number))),
  );
  return filter.order === "run" ? kept : kept.sort(ORDERS[filter.order][1]);
}
