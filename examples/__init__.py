"""Complete trainings with these losses, on data that is at hand: ``python -m examples.NAME --out DIR``."""
