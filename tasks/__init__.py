"""Problems and their scoring. Imports nothing else of ours."""
