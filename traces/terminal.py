"""An episode in the terminal: the picture in half blocks, the turns as they came, tokens per turn, answer against gold.

Model text is untrusted where it is shown: control characters are replaced and markup is escaped before anything is printed.
"""

from __future__ import annotations

import json
from typing import Any

from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from monologue.traces import names
from monologue.traces.images import PictureError
from monologue.traces.schema import Annotation, EpisodeEnd, EpisodeStart, SpanRecord
from monologue.traces.store import Episode, RunReader

COLOURS = {"questioner": "cyan", "answerer": "green"}
LEAST = 0.005
"""Probability below which a word that a thought is near to is not told."""


def half_blocks(image: Image.Image, width: int = 42) -> Text:
    """A picture as coloured half blocks: two pixels a character, at most ``width`` characters wide and as many pixels high."""
    width = max(1, min(width, round(width * image.width / image.height)))
    rows = max(2, min(round(width * image.height / image.width), 2 * width if width > 1 else 42))
    small = image.convert("RGB").resize((width, rows + rows % 2), Image.Resampling.BOX)
    text = Text()
    for y in range(0, small.height, 2):
        for x in range(width):
            upper, lower = (small.getpixel((x, y + k)) for k in (0, 1))
            text.append("▀", style=f"rgb({_rgb(upper)}) on rgb({_rgb(lower)})")
        text.append("\n")
    return text


def _rgb(pixel: Any) -> str:
    return ",".join(str(value) for value in pixel[:3])


def plain(text: str) -> str:
    """Text that cannot move the cursor, ring, or pretend to be markup."""
    return escape("".join(c if c.isprintable() else "�" for c in text))


def head(start: EpisodeStart, console: Console) -> None:
    """The problem."""
    console.print(f"[bold]{plain(start.question)}[/bold]")
    if start.choices:
        console.print("   " + " | ".join(plain(choice) for choice in start.choices))


def thoughts(span: SpanRecord, console: Console) -> None:
    """Latent steps before a reply, one line each: what the state was nearest to saying, and the patches read again, counted from 1."""
    for event in span.events:
        if event.name == names.LATENT_STEP:
            words, chances = json.loads(str(event.attributes.get("words", "[]"))), json.loads(str(event.attributes["chances"]))
            pairs = [(word, chance) for word, chance in zip(words, chances, strict=False) if chance >= LEAST]
            near = ", ".join(f"{plain(word.strip())} {chance:.2f}" for word, chance in pairs[:2])
            patches = ", ".join(str(patch + 1) for patch in json.loads(str(event.attributes["chosen"])))
            told = f"near {near or 'words that were not recorded'}" + (f"; reads {patches} again" if patches else "")
            console.print(f"  [dim]{'thought':>10}  {told}[/dim]")


def turn(attributes: dict[str, Any], kind: str, console: Console) -> None:
    """One step as one line: who, what, how many tokens, how sure."""
    if kind == "tool":
        name, arguments = attributes[names.TOOL_NAME], attributes[names.TOOL_ARGUMENTS]
        console.print(
            f"  [magenta]{plain(str(name)):>10}[/magenta]  {plain(str(arguments))} → {plain(str(attributes.get(names.TOOL_RESULT, '-')))}"
        )
        return
    role = str(attributes[names.ROLE])
    colour = COLOURS.get(role, "yellow")
    cost = f"{attributes.get(names.INPUT_TOKENS, '?')} in, {attributes.get(names.OUTPUT_TOKENS, '?')} out"
    said = f"[red]{plain(str(attributes[names.ERROR]))}[/red]" if names.ERROR in attributes else _said(attributes)
    console.print(f"  [{colour}]{plain(role):>10}[/{colour}]  {said}  [dim]{cost}[/dim]")


def _said(attributes: dict[str, Any]) -> str:
    if names.ACTION not in attributes:
        return f"{plain(str(attributes.get(names.OUTPUT, '')))}  [red]no action: {plain(str(attributes.get(names.PARSE_ERROR, '')))}[/red]"
    action = json.loads(str(attributes[names.ACTION]))
    kind = action.pop("kind", "")
    if kind == "look":
        return f"{plain(action['question'])}"
    if kind == "conclude":
        because = f"[dim]{plain(action['explanation'])} →[/dim] " if action.get("explanation") else ""
        return f"{because}[bold]{plain(action['answer'])}[/bold]"
    if kind == "reply":
        return f"[bold]{plain(action['text'])}[/bold]"
    return plain(json.dumps(action, ensure_ascii=False))


def verdict(start: EpisodeStart, end: EpisodeEnd | None, notes: list[Annotation], console: Console) -> None:
    """Answer against gold, and what was said about the episode."""
    if end is None or end.status != "ok":
        console.print(f"  [red]{'never ended' if end is None else plain(f'{end.status}: {end.error}')}[/red]")
        return
    answer = "no answer within its budget" if end.answer is None else end.answer
    if start.gold is None:
        console.print(f"  answer: [bold]{plain(answer)}[/bold]")
    else:
        gold = start.choices[start.gold]
        right = answer.strip().lower() == gold.strip().lower()
        console.print(
            f"  answer: [bold]{plain(answer)}[/bold]  gold: {plain(gold)}  " + ("[green]right[/green]" if right else "[red]wrong[/red]")
        )
    for note in notes:
        console.print(
            f"  [dim]{plain(note.name)} = {note.value if note.value is not None else plain(note.text or '')}  ({plain(note.source)})[/dim]"
        )


def pictures_of(spans: list[SpanRecord]) -> list[str]:
    """Hashes of the pictures that the episode's calls saw, each once, in order."""
    found: dict[str, None] = {}
    for span in spans:
        for image in json.loads(str(span.attributes.get(names.IMAGES, "[]"))):
            found[image["sha256"]] = None
    return list(found)


def replay(reader: RunReader, episode: Episode, console: Console | None = None) -> None:
    """The whole episode, as it was."""
    console = console or Console(highlight=False)
    for sha256 in pictures_of(episode.spans):
        try:
            console.print(half_blocks(reader.picture(sha256)))
        except PictureError as error:
            console.print(f"[red]{plain(str(error))}[/red]")
    head(episode.start, console)
    for span in episode.spans:
        thoughts(span, console)
        turn(dict(span.attributes), span.kind, console)
    verdict(episode.start, episode.end, episode.annotations, console)
