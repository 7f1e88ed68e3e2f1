"""The spine: what a run remembers, how it is written, checked and looked at. Imports nothing else of ours."""
