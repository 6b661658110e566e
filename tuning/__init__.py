"""Many trainings over one store: sweep, compare, report. `python -m tuning tune --store STORE`."""
