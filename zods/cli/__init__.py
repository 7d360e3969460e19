"""The parts of the command line: options, the model and its files, the run folder, its figures."""
