"""Memory and traffic of a zeroth-order run, computed before anything is started."""
