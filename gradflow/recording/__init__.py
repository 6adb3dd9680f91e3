"""Everything that imports torch: from a target to a frozen Trace."""
