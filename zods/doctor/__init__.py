"""Checks of an installation and of its hosts: `python -m zods.doctor`."""
