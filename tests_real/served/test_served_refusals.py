"""What would kill a server, hang it, or be dropped in silence is refused before it is sent; the server lives and works on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from monologue.backends.base import Prompt, RequestRefused, Sampling
from monologue.backends.serving.launch import Server
from tests_real.served.kit import GREEDY, Connect


async def test_what_would_kill_or_hang_the_server_is_refused_before_it_is_sent(
    servers: dict[str, Server], connect: Connect, dialogues: dict[str, list[Prompt]]
) -> None:
    served, good = connect(servers["answerer"]), dialogues["answerer"][0]
    pad, frame = served.image_token_id, good.ids.index(served.image_token_id) - 1
    assert pad is not None
    bad = {
        "ids from 0 to": Prompt((1, 10**6)),
        "ids from 0": Prompt((1, -4)),
        "at least one prompt id": Prompt(()),
        "image placeholders": replace(good, ids=(*good.ids, pad)),
        "for 2 pictures": replace(good, pictures=good.pictures * 2),
        "for 0 pictures": replace(good, pictures=()),
        "no video placeholder": replace(good, ids=(*good.ids, pad + 1)),
        "got 0 in": replace(good, ids=(*good.ids[:frame], 20, *good.ids[frame + 1 :])),
        "within": Prompt((5,) * 600),
    }
    for word, prompt in bad.items():
        with pytest.raises(RequestRefused, match=word):
            await served.generate(prompt, GREEDY)
        with pytest.raises(RequestRefused, match=word):
            await served.score(prompt, (20, 21), Sampling())
    huge = replace(GREEDY, temperature=1.0, top_p=0.5, top_k=10**6)
    with pytest.raises(RequestRefused, match="top_k"):
        await served.generate(good, huge)
    with pytest.raises(RequestRefused, match="can sample"):
        await served.score(good, (20, pad), Sampling())
    assert servers["answerer"].alive() and (await served.generate(good, GREEDY)).ids


async def test_a_text_model_takes_no_pictures(servers: dict[str, Server], connect: Connect, dialogues: dict[str, list[Prompt]]) -> None:
    served, asked = connect(servers["questioner"]), dialogues["questioner"][0]
    with pytest.raises(RequestRefused, match="text-only"):
        await served.generate(replace(asked, pictures=dialogues["answerer"][0].pictures), GREEDY)
