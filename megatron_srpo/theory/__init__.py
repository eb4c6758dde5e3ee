"""What can be proven about resets, where everything is small enough to be computed exactly.

    mdp.py -> instances.py -> cpi.py, sampling.py     conservative policy iteration, claims 1 and 2
    product_rule.py                                   the gradient behind chain credit

numpy and scipy only; nothing else of the package imports it (`tools/theory.py` runs it).
"""
