"""`bald-sam bench`: how long things take, as ratios to what they cannot be quicker than, and to the stock way.

Each module measures one part and returns plain dicts; all of one part is measured in turn (A, B, A, B, ...), so that
what else the machine does falls on everybody alike.
"""
