"""What the command line needs beside training: options, the model and its files, the folder of a
run, its figures.
"""
