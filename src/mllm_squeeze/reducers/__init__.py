"""One file per idea: a class with typed parameters, the signals it needs, and one pure function."""
