"""The outer loop: a log of events becomes slow weights θ under which the update rule predicts well."""
