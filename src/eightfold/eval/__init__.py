"""Accuracy on data sets: `eightfold eval`.

A data set is a `Task` (one file per family): it loads items, makes queries of them, and scores the answers. `ask` puts
queries to the engine, `evaluate` keeps the records, `results` makes tables of them; others may call them too.
"""
