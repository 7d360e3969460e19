"""A report of one or more runs as a web page: `python -m zods.report RUN_FOLDER ...`."""
