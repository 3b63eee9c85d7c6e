"""What measures, compares and draws: the evidence for `offramp`, and how to repeat it.

In the order data flows: `inputs`, `experiments`, `records`, `tables`, `pages`. A production process
never imports it, and neither does `offramp`.
"""
