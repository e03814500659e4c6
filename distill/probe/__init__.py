"""What an encoder is worth: frozen features, linear probe, kNN and fidelity to the teacher, with intervals.

Nothing here trains an encoder or knows of the trainer: everything takes an `Encoder` or arrays of features.
Selection (regularisation, k, ridge strength) happens on the selection split; the test split is scored once.
"""
