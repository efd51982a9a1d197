"""Models and tokenizers: loaded or created from scratch, checked against each other, and partly frozen.

Does not depend on data, tasks or engines: a task names the head that it needs, and an engine wraps the result.
"""
