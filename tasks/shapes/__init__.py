"""The shapes world: pictures drawn from a seed, questions of one to four hops with a program and an oracle monologue.

``scene`` says what is in a picture, ``draw`` paints it, ``language`` holds every word and sentence, ``programs`` executes a
question on a scene, ``families`` makes problems whose answer cannot be guessed, ``perception`` makes the one-hop questions
that an answerer practises on, and ``task`` is the door.
"""

from monologue.tasks.shapes.task import Looks, Shapes

__all__ = ["Looks", "Shapes"]
