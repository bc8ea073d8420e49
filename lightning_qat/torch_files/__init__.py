"""Look at files that torch wrote before torch reads them: parts, sizes, pickles."""
