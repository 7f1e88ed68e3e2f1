"""The page: a run in a browser, served on this machine or written as one file. Standard library and a vendored 13 kB of Preact."""
