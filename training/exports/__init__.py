"""Rows of a run in the shapes that other trainers document: TRL, verl, verifiers. None of them is imported here.

What a tool can take exactly, it gets exactly: the ids that were sampled, the mask, the log-probs. Where a tool takes only messages
and tokenises anew (pictures in TRL, everything in verl), the shape says so by name: its files are called ``*.retokenised.parquet``.
What a shape cannot say is refused in one sentence, never left out quietly.

Left out: a column for every fact of a trace. The run stays the record; ``episode_id`` and ``stream`` lead back to it.
"""
