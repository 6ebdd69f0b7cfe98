"""Records and readings in, one self-contained HTML page out. Reads only `core.run`; never imports torch."""
