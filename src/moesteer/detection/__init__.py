"""Detection: from a trace (or, for `direct`, the model itself) to a steering mask. Siblings import no sibling."""
