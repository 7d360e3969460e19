"""Forwards of a model at points near its parameters, several at once."""
