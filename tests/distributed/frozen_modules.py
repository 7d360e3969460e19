"""Exempts what has been imported from garbage collection, in the server that ranks are forked from.

A collection in a rank would otherwise walk half a million objects, and copy their pages. Last of the
modules that the server imports.
"""

import gc

gc.collect()
gc.freeze()
