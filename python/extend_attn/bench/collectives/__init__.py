"""The collective benches: all-reduce, tp_qknorm, a decoder step, capture cost. Importing it needs no torch."""
