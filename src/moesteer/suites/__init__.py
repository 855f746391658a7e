"""Named suites: the field's data sets as conversations, from the Hub or from a local file, by one table.

table.py holds a row per suite, mappings.py says what its columns mean, loading.py reads it. No data is shipped.
"""

from moesteer.suites.loading import load, read
from moesteer.suites.named import NamedSuite
from moesteer.suites.table import SUITES, named

__all__ = ["SUITES", "NamedSuite", "load", "named", "read"]
