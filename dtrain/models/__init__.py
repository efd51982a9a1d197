"""Models and tokenizers: loaded or made from scratch, checked against each other, and frozen in part.

Knows nothing of data, tasks or engines: a task says which head it needs, an engine wraps what comes from here.
"""
