"""Data sets in another language: pieces of text, engines, checks, and a run that loses nothing."""
